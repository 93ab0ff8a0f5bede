"""LLaVA's relatives: images, tiles and video frames as visual tokens, against the stock model with hooks."""

import pytest
import tiny
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig

import shortv_llava
from shortv_llava.checkpoint.config import MODEL_TYPES, package_config
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.package import write_package

IMAGE, VIDEO = tiny.IMAGE_TOKEN, tiny.IMAGE_TOKEN + 1
TEXT = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GRIDS = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
FAMILIES = {
    "VipLlava": {
        "text_config": LlamaConfig(**TEXT),
        "vision_config": CLIPVisionConfig(**VISION),
        "vision_feature_layers": [-2, -1],
    },
    "LlavaOnevision": {
        "text_config": Qwen2Config(**TEXT, tie_word_embeddings=True),
        "vision_config": SiglipVisionConfig(**VISION, vision_use_head=False),
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": True,
        **GRIDS,
    },
    "LlavaNextVideo": {
        "text_config": LlamaConfig(**TEXT),
        "vision_config": CLIPVisionConfig(**VISION),
        "spatial_pool_stride": 1,
        **GRIDS,
    },
}


def make_pair(family: str):
    settings = FAMILIES[family] | {"image_token_index": IMAGE}
    if family != "VipLlava":
        settings["video_token_index"] = VIDEO
    torch.manual_seed(0)
    stock_config = getattr(transformers, f"{family}Config")(**settings)
    stock = getattr(transformers, f"{family}ForConditionalGeneration")(stock_config).double().eval()
    ours_class = getattr(shortv_llava, f"ShortV{family}ForConditionalGeneration")
    ours = ours_class(ours_class.config_class(**settings)).double().eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def features(model, kind: str, pixels, **inputs) -> torch.Tensor:
    """All visual tokens of the images or videos of a prompt."""
    arguments = {"vision_feature_layer": model.config.vision_feature_layer}
    if hasattr(model.config, "vision_feature_select_strategy"):
        arguments["vision_feature_select_strategy"] = model.config.vision_feature_select_strategy
    with torch.no_grad():
        found = getattr(model, f"get_{kind}_features")(pixels, **inputs, **arguments)
    found = getattr(found, "pooler_output", found)
    found = torch.cat(list(found)) if isinstance(found, (list, tuple)) else found
    return found.reshape(-1, found.shape[-1])


def make_inputs(stock, family: str) -> dict:
    """Two rows, the second without image: text, an image, text and, where the family knows them, a video, text."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def text(number):
        return torch.randint(3, IMAGE, (number,), generator=generator).tolist()

    if family == "VipLlava":
        pixels, count = {"pixel_values": random(1, 3, 28, 28)}, {IMAGE: 4}
    else:
        image, sizes, video = random(1, 5, 3, 28, 28), torch.tensor([[40, 45]]), random(1, 2, 3, 28, 28)
        pixels = {"pixel_values": image, "image_sizes": sizes, "pixel_values_videos": video}
        count = {
            IMAGE: len(features(stock, "image", image, image_sizes=sizes)),
            # LLaVA-OneVision: a pooled feature of each of two frames, and a newline
            VIDEO: 3 if family == "LlavaOnevision" else len(features(stock, "video", video)),
        }
    ids = text(3)
    for placeholder, number in count.items():
        ids += [*[placeholder] * number, *text(2)]
    rows = [[*ids, *text(4)], text(6)]
    longest = max(map(len, rows))
    return pixels | {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }  # fmt: skip


def visual(inputs) -> torch.Tensor:
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


@pytest.mark.parametrize("blocks", [{"layers": (3, 2, 0)}, {"layers": (1,), "attention": (0,), "ffn": (2, 3)}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_tokens_equal_the_hooked_stock_model(family, blocks):
    stock, ours = make_pair(family)
    inputs = make_inputs(stock, family)
    assert visual(inputs).any()
    tiny.freeze(ours, **blocks)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with tiny.frozen(stock, visual(inputs), **blocks):
        expected, tokens = stock(**inputs).logits, stock.generate(**inputs, **settings)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours(**inputs).logits[real], expected[real], **tiny.CLOSE)
    assert torch.equal(ours.generate(**inputs, **settings), tokens)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_stock_checkpoint_becomes_a_package(family, tmp_path):
    stock, ours = make_pair(family)
    stock.save_pretrained(tmp_path / "stock")
    write_package(tmp_path / "stock", tmp_path / "package", replaced_layers=[3, 1])
    loaded = load_model(tmp_path / "package", dtype=torch.float64).eval()
    assert type(loaded).__name__ == f"ShortV{family}ForConditionalGeneration"
    assert loaded.config.frozen_layers() == ({1, 3}, {1, 3})
    weights = loaded.state_dict()
    assert weights.keys() == stock.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in stock.state_dict().items())
    inputs = make_inputs(stock, family)
    ours.set_replaced_layers([3, 1])
    # A file's tensors lie in memory otherwise than those made there, and sums may be taken in another order for that.
    torch.testing.assert_close(loaded(**inputs).logits, ours(**inputs).logits, **tiny.CLOSE)


def test_every_family_can_be_packaged():
    assert len(MODEL_TYPES) == 13
    for stock, ours in MODEL_TYPES.items():
        entries = package_config({"model_type": stock}, replaced_layers=[1])
        assert (entries["model_type"], entries["replaced_layers"]) == (ours, [1])
        assert hasattr(shortv_llava, entries["architectures"][0])
