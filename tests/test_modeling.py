"""The ShortV model against the stock model whose frozen blocks are silenced by hooks."""

import copy

import pytest
import tiny
import torch
from transformers import Phi3Config

from shortv_llava import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration

LAYOUTS = {
    "one image each": ["tttIttttt", "tttIttttttt", "tttItt"],
    "image first and last": ["Itttt", "ttttI", "ttItt"],
    "0, 1 and 2 images": ["tttttt", "ttIttt", "tIttItt"],
}
FROZEN = {
    "layers": {"layers": (3, 1)},
    "run of layers": {"layers": (3, 2, 1)},
    "all layers": {"layers": (0, 1, 2, 3)},
    "attention": {"attention": (0, 2)},
    "ffn": {"ffn": (1, 2, 3)},
    "mixed blocks": {"layers": (3,), "attention": (0, 1), "ffn": (2,)},
}
MODELS = [
    ("llava", "llama", 4),
    ("llava", "llama", 2),
    ("llava", "mistral", 2),
    ("llava", "qwen2", 2),
    ("llava_next", "llama", 4),
    ("llava_next", "mistral", 2),
    ("llava_next", "qwen2", 4),
]


def assert_close(ours, stock, attention_mask):
    real = attention_mask.bool()
    torch.testing.assert_close(ours[real], stock[real], **tiny.CLOSE)


@pytest.mark.parametrize("blocks", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model)))
@torch.no_grad()
def test_logits_equal_the_hooked_stock_model(model, layout, side, blocks):
    stock, ours = tiny.pair(*model)
    inputs = tiny.batch(stock, model[0], layout, side)
    tiny.freeze(ours, **blocks)
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, **blocks):
        expected = stock(**inputs).logits
    assert_close(ours(**inputs).logits, expected, inputs["attention_mask"])


@pytest.mark.parametrize("blocks", [FROZEN["layers"], FROZEN["mixed blocks"]], ids=str)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("backbone", tiny.OTHER_BACKBONES)
@torch.no_grad()
def test_other_backbones(backbone, family, blocks):
    stock, ours = tiny.pair(family, backbone, 2, **tiny.OTHER_BACKBONES[backbone])
    inputs = tiny.batch(stock, family, LAYOUTS["0, 1 and 2 images"])
    tiny.freeze(ours, **blocks)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, **blocks):
        expected, tokens = stock(**inputs).logits, stock.generate(**inputs, **settings)
    assert_close(ours(**inputs).logits, expected, inputs["attention_mask"])
    assert torch.equal(ours.generate(**inputs, **settings), tokens)


@pytest.mark.parametrize("blocks", FROZEN.values(), ids=FROZEN)
@torch.no_grad()
def test_hooks_on_norms_count(blocks):
    pair = [copy.deepcopy(model) for model in tiny.pair()]
    for model in pair:
        for layer in tiny.decoder(model).layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.register_forward_hook(lambda module, args, output: output * module.weight)
    stock, ours = pair
    inputs = tiny.batch(stock, "llava", LAYOUTS["0, 1 and 2 images"])
    tiny.freeze(ours, **blocks)
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, **blocks):
        expected = stock(**inputs).logits
    assert_close(ours(**inputs).logits, expected, inputs["attention_mask"])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model)))
@torch.no_grad()
def test_greedy_tokens_equal(model, attn_implementation):
    stock, ours = tiny.pair(*model, attn_implementation)
    inputs = tiny.batch(stock, model[0], LAYOUTS["0, 1 and 2 images"], "left", seed=1)
    ours.set_replaced_layers([3, 1], ffn=[0])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, layers=(3, 1), ffn=(0,)):
        expected = stock.generate(**inputs, **settings)
    assert torch.equal(ours.generate(**inputs, **settings), expected)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@torch.no_grad()
def test_turns_with_a_kept_cache_and_a_new_image(family):
    """A turn with an image, a decoded token, a turn without image, turns with new images: each as the hooked model."""
    stock, ours = tiny.pair(family, "llama", 2)
    ours.set_replaced_layers([3, 2, 0], attention=[1])
    caches, mask = {}, torch.ones(2, 0, dtype=torch.long)
    for turn, layout in enumerate(
        [["ttIttt", "tttItt"], ["t", "t"], ["tttt", "tttt"], ["tItI", "tIIt"], ["tIt", "Itt"]]
    ):
        inputs = tiny.batch(stock, family, layout, seed=turn, same_size=True)  # a turn without padding inside
        mask = torch.cat([mask, inputs["attention_mask"]], dim=1)
        inputs["attention_mask"] = mask
        visual = inputs["input_ids"] == tiny.IMAGE_TOKEN
        with tiny.frozen(stock, visual, layers=(3, 2, 0), attention=(1,)):
            expected = stock(**inputs, past_key_values=caches.get("stock"), use_cache=True)
        actual = ours(**inputs, past_key_values=caches.get("ours"), use_cache=True)
        torch.testing.assert_close(actual.logits, expected.logits, **tiny.CLOSE)
        caches = {"stock": expected.past_key_values, "ours": actual.past_key_values}


@torch.no_grad()
def test_cache_equals_the_hooked_models():
    stock, ours = tiny.pair()
    inputs = tiny.batch(stock, "llava", LAYOUTS["one image each"], "left")
    ours.set_replaced_layers([3, 2, 0])
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, layers=(3, 2, 0)):
        expected = stock(**inputs, use_cache=True).past_key_values
    actual = ours(**inputs, use_cache=True).past_key_values
    real = inputs["attention_mask"].bool()
    for layer in range(tiny.LAYERS):
        for kind in ("keys", "values"):
            ours_kv, stock_kv = (getattr(cache.layers[layer], kind).transpose(1, 2) for cache in (actual, expected))
            torch.testing.assert_close(ours_kv[real], stock_kv[real], **tiny.CLOSE)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_inputs_embeds_in_place_of_input_ids(attn_implementation):
    stock, ours = tiny.pair(attn_implementation=attn_implementation)
    inputs = tiny.batch(stock, "llava", LAYOUTS["0, 1 and 2 images"], "right")
    ours.set_replaced_layers([3, 1])
    expected = ours(**inputs).logits
    inputs["inputs_embeds"] = ours.get_input_embeddings()(inputs.pop("input_ids"))
    assert_close(ours(**inputs).logits, expected, inputs["attention_mask"])


@pytest.mark.parametrize("cache_implementation", ["static", "dynamic"])
@torch.no_grad()
def test_generate_with_cache(cache_implementation):
    stock, ours = tiny.pair()
    inputs = tiny.batch(stock, "llava", ["ttIttt", "tItttt"])
    ours.set_replaced_layers([3, 2, 0])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, layers=(3, 2, 0)):
        expected = stock.generate(**inputs, **settings)
    settings |= {"cache_implementation": cache_implementation, "disable_compile": True}
    assert torch.equal(ours.generate(**inputs, **settings), expected)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model)))
@torch.no_grad()
def test_no_frozen_layer_is_the_stock_model_to_the_bit(model):
    stock, ours = tiny.pair(*model)
    ours.set_replaced_layers([])
    for layout in LAYOUTS.values():
        inputs = tiny.batch(stock, model[0], layout)
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


@torch.no_grad()
def test_text_alone_is_the_stock_model_to_the_bit():
    stock, ours = tiny.pair()
    ours.set_replaced_layers([0, 1, 2, 3])
    inputs = tiny.batch(stock, "llava", ["tttttt", "ttt"])
    assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("asked_by", ["call", "config"])
@torch.no_grad()
def test_hidden_states_are_whole_and_equal(asked_by):
    stock, ours = tiny.pair()
    ours.set_replaced_layers([3, 2, 1])
    inputs = tiny.batch(stock, "llava", LAYOUTS["one image each"])
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, layers=(3, 2, 1)):
        expected = stock(**inputs, output_hidden_states=True).hidden_states
    inputs["logits_to_keep"] = 1
    if asked_by == "call":
        actual = ours(**inputs, output_hidden_states=True).hidden_states
    else:
        ours = copy.deepcopy(ours)
        ours.config.output_hidden_states = ours.config.text_config.output_hidden_states = True
        actual = ours(**inputs).hidden_states
    assert len(actual) == len(expected) == tiny.LAYERS + 1
    for ours_states, stock_states in zip(actual, expected):
        assert_close(ours_states, stock_states, inputs["attention_mask"])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_attentions_equal_with_no_rows_for_frozen_tokens(layout):
    stock, ours = tiny.pair(attn_implementation="eager")
    ours.set_replaced_layers([2, 1], ffn=[0])
    inputs = tiny.batch(stock, "llava", layout, "right")  # stock's padding rows on the left are NaN in float64
    visual = inputs["input_ids"] == tiny.IMAGE_TOKEN
    with tiny.frozen(stock, visual, layers=(2, 1), ffn=(0,)):
        expected = stock(**inputs, output_attentions=True).attentions
    actual = ours(**inputs, output_attentions=True, logits_to_keep=1).attentions
    assert len(actual) == len(expected) == tiny.LAYERS
    real = inputs["attention_mask"].bool()
    for layer, (ours_weights, stock_weights) in enumerate(zip(actual, expected)):
        if layer in (1, 2):
            stock_weights = stock_weights.masked_fill(visual[:, None, :, None], 0)
        ours_rows, stock_rows = (weights.transpose(1, 2)[real] for weights in (ours_weights, stock_weights))
        torch.testing.assert_close(ours_rows, stock_rows, **tiny.CLOSE)


@pytest.mark.parametrize("blocks", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("kept", [1, 3, 100])
@torch.no_grad()
def test_last_logits_alone(kept, blocks):
    stock, ours = tiny.pair()
    inputs = tiny.batch(stock, "llava", LAYOUTS["0, 1 and 2 images"])
    tiny.freeze(ours, **blocks)
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, **blocks):
        expected = stock(**inputs, logits_to_keep=kept, use_cache=True)
    actual = ours(**inputs, logits_to_keep=kept, use_cache=True)
    assert_close(actual.logits, expected.logits, inputs["attention_mask"][:, -kept:])
    real = inputs["attention_mask"].bool()
    for name in ("keys", "values"):
        ours_last, stock_last = (
            getattr(o.past_key_values.layers[-1], name).transpose(1, 2) for o in (actual, expected)
        )
        torch.testing.assert_close(ours_last[real], stock_last[real], **tiny.CLOSE)


def test_config_is_the_truth():
    stock, ours = tiny.pair()
    inputs = tiny.batch(stock, "llava", ["tttIttttt"])
    ours.set_replaced_layers([1])
    with torch.no_grad():
        expected = ours(**inputs).logits
        ours.config.replaced_layers = [2, 3]
        changed = ours(**inputs).logits
        assert not torch.equal(changed, expected)
        with pytest.raises(ValueError, match="replaced_layers: 9 is no layer id"):
            ours.config.replaced_layers = [9]
        assert torch.equal(ours(**inputs).logits, changed)
        ours.set_replaced_layers([1])
        assert torch.equal(ours(**inputs).logits, expected)
    with pytest.raises(ValueError, match="replaced_ffn_layers: layer 1 .*replaced_layers"):
        ours.set_replaced_layers([1], ffn=[1])
    assert ours.config.replaced_layers == [1] and ours.config.replaced_ffn_layers == []


def test_unsupported_backbone_is_named():
    text = Phi3Config(
        num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=96, pad_token_id=0
    )
    config = ShortVLlavaConfig(**tiny.config_dict() | {"text_config": text})
    with pytest.raises(ValueError, match="'phi3' is not supported.*Gemma.*Qwen3"):
        ShortVLlavaForConditionalGeneration(config)
