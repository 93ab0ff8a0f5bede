"""The cost model: the paper's table to the printed digit, and the operations that the model really spends."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from shortv_llava import ShortVLlavaConfig
from shortv_llava.checkpoint import published
from shortv_llava.evaluation.methods import Dropping
from shortv_llava.flops import block_flops, flops_ratio, image_tokens, prefill_flops, replacement_order

SEVEN_B = published.PUBLISHED["llava-1.5-7b"].replaced_layers
PUBLISHED = [  # h, m, L, heads, v, TFLOPs dense, N, TFLOPs ShortV, ratio in percent
    (4096, 11008, 32, 32, 576, 8.5, 19, 4.7, 55),
    (5120, 13824, 40, 40, 576, 16.6, 24, 9.1, 55),
    (4096, 11008, 32, 32, 2880, 42.7, 19, 21.6, 51),
    (5120, 13824, 40, 40, 2880, 81.8, 24, 41.0, 50),
]


def text_config(h, m, layers, heads, kv_heads=None):
    return SimpleNamespace(
        hidden_size=h,
        intermediate_size=m,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
    )


@pytest.mark.parametrize("h, m, layers, heads, v, dense, n, shortv, percent", PUBLISHED)
def test_published_table(h, m, layers, heads, v, dense, n, shortv, percent):
    config = text_config(h, m, layers, heads)
    full = prefill_flops(config, 64, v)
    reduced = prefill_flops(config, 64, v, range(n), range(n))
    assert (round(full / 1e12, 1), round(reduced / 1e12, 1), round(100 * reduced / full)) == (dense, shortv, percent)


@pytest.mark.parametrize(
    "replaced, dropping, percent", [((), (2, 0.5), 57.2), ((), (16, 1.0), 54.9), (SEVEN_B, (2, 0.5), 33.9)]
)
def test_dropped_tokens_are_not_counted(replaced, dropping, percent):
    """LLaVA-1.5-7B with FastV (4.9 of 8.5 TFLOPs are published), VTW (55%), and ShortV with FastV."""
    config = text_config(4096, 11008, 32, 32)
    counts = Dropping(*dropping).visual_tokens(576, 32)
    found = prefill_flops(config, 64, counts, replaced, replaced) / prefill_flops(config, 64, 576)
    assert round(100 * found, 1) == percent
    by_hand = sum(
        prefill_flops(text_config(4096, 11008, 1, 32), 64, counts[layer], *[[0][: layer in replaced]] * 2)
        for layer in range(32)
    )
    assert found * prefill_flops(config, 64, 576) == pytest.approx(by_hand)


def test_multi_head_attention_gives_the_papers_formulas():
    h, m, t, v = 4096, 11008, 64, 576
    blocks = block_flops(text_config(h, m, 32, 32), t, v)
    assert blocks.attention + blocks.ffn == 2 * (t + v) * (4 * h + 3 * m) * h + 4 * (t + v) ** 2 * h
    assert (
        blocks.frozen_attention + blocks.frozen_ffn == 2 * t * (4 * h + 3 * m) * h + 4 * v * h**2 + 4 * t * (t + v) * h
    )


def test_visual_tokens_of_an_image():
    llava = SimpleNamespace(model_type="llava", vision_config=SimpleNamespace(image_size=336, patch_size=14))
    grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert image_tokens(llava) == 576
    next_config = SimpleNamespace(model_type="llava_next", vision_config=llava.vision_config, image_grid_pinpoints=grid)
    assert image_tokens(next_config) == 2880


# Of the real configurations, as their processors cut and resize a picture of 640 x 480 pixels.
@pytest.mark.parametrize(
    "family, settings, expected",
    [
        ("gemma3", {"mm_tokens_per_image": 256}, 256),
        ("internvl", {"image_seq_length": 256}, 13 * 256),
        ("idefics3", {"scale_factor": 2, "vision_config": {"image_size": 364, "patch_size": 14}}, 13 * 169),
        ("smolvlm", {"scale_factor": 4, "vision_config": {"image_size": 512, "patch_size": 16}}, 13 * 64),
        ("mistral3", {"spatial_merge_size": 2, "vision_config": {"image_size": 1540, "patch_size": 14}}, 23 * 18),
        ("qwen2_5_vl", {"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}, 23 * 18),
        ("qwen3_vl", {"vision_config": {"patch_size": 16, "spatial_merge_size": 2}}, 20 * 15),
    ],
)
def test_visual_tokens_of_other_families(family, settings, expected):
    settings = {"vision_config": {}} | settings
    vision = SimpleNamespace(**settings.pop("vision_config"))
    assert image_tokens(SimpleNamespace(model_type=f"shortv_{family}", vision_config=vision, **settings)) == expected


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "frozen",
    [{}, {"layers": [1, 3]}, {"attention": [0, 2]}, {"ffn": [1, 2]}, {"layers": [0], "attention": [1], "ffn": [3]}],
)
@torch.no_grad()
def test_linear_operations_spent_equal_the_formula(kv_heads, frozen):
    """Counted on the modules: rows in, times width in, times width out. Attention scores are no module: left out."""
    stock, ours = tiny.pair("llava", "llama", kv_heads)
    inputs = tiny.batch(stock, "llava", ["tttIttttt"] * 3)
    visual = int((inputs["input_ids"][0] == tiny.IMAGE_TOKEN).sum())
    text = inputs["input_ids"].shape[1] - visual
    tiny.freeze(ours, **frozen)
    spent = [0] * tiny.LAYERS

    def counter(layer):
        def count(module, args, output):
            spent[layer] += 2 * args[0].shape[:-1].numel() * module.weight.numel()

        return count

    handles = [
        module.register_forward_hook(counter(index))
        for index, layer in enumerate(ours.model.language_model.layers)
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    ours(**inputs)
    for handle in handles:
        handle.remove()

    config = ours.config.text_config
    blocks, width = block_flops(config, text, visual), config.hidden_size
    attention_layers, ffn_layers = ours.config.frozen_layers()
    for index in range(tiny.LAYERS):
        scores = 4 * (text if index in attention_layers else text + visual) * (text + visual) * width
        attention = blocks.frozen_attention if index in attention_layers else blocks.attention
        ffn = blocks.frozen_ffn if index in ffn_layers else blocks.ffn
        assert spent[index] == 3 * (attention - scores + ffn)


def test_ratio_of_a_configuration():
    _, ours = tiny.pair()
    ours.set_replaced_layers([])
    assert flops_ratio(ours.config) == 1
    ours.set_replaced_layers([0, 1, 2, 3])
    whole = flops_ratio(ours.config)
    ours.set_replaced_layers(ffn=[0, 1, 2, 3])
    assert whole < flops_ratio(ours.config) < 1


@pytest.mark.parametrize(
    "scores, order", [(None, [3, 0]), ([5.0, 2.0, 1.0, 9.0, 1.0, 0.0], [3, 0, 5, 4, 2, 1])], ids=["unscored", "scored"]
)
def test_order_of_replacement(scores, order):
    text_config = {"model_type": "llama", "num_hidden_layers": 6}
    config = ShortVLlavaConfig(text_config=text_config, replaced_layers=[3, 0], lc_scores=scores)
    assert replacement_order(config) == order
