"""Float32 and less: as near to the float64 oracle as the stock model with hooks is at that precision."""

import contextlib
import copy

import pytest
import tiny
import torch
from transformers import LlavaForConditionalGeneration

from shortv_llava import ShortVLlavaForConditionalGeneration
from shortv_llava.calibrate.samples import embedded_samples, make_inputs
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.examples.shapes_llava import CHECKPOINT

PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast bfloat16": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, torch.float16),
}
FROZEN = {
    "layers": {"layers": (3, 2)},
    "blocks": {"attention": (1, 3), "ffn": (0, 2)},
}
MODELS = [("llava", "llama", 4), ("llava", "qwen2", 2), ("llava_next", "mistral", 2)]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("blocks", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model)))
@torch.no_grad()
def test_logits_lose_no_more_than_the_hooked_stock_models(model, precision, blocks, side, device):
    dtype, autocast_dtype = precision
    stock, ours = (copy.deepcopy(model).to(device) for model in tiny.pair(*model))
    inputs = tiny.batch(tiny.pair(*model)[0], model[0], ["tttttt", "ttIttt", "tIttItt"], side)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    real, visual = inputs["attention_mask"].bool(), inputs["input_ids"] == tiny.IMAGE_TOKEN
    tiny.freeze(ours, **blocks)
    dense = stock(**inputs).logits[real]
    with tiny.frozen(stock, visual, **blocks):
        exact = stock(**inputs).logits[real]
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with torch.autocast(device, autocast_dtype) if autocast_dtype else contextlib.nullcontext():
            expected = stock.to(dtype)(**inputs).logits[real]
            actual = ours.to(dtype)(**inputs).logits[real]
    assert actual.dtype == expected.dtype
    ours_off, stock_off = tiny.root_mean_square(actual - exact), tiny.root_mean_square(expected - exact)
    assert ours_off <= 1.5 * stock_off
    assert ours_off < 0.1 * tiny.root_mean_square(dense - exact)  # so that a wrong row or layer would have shown


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_long_prompts(dtype, device):
    """Few tokens ask for thousands of keys."""
    stock, ours = (copy.deepcopy(model).to(device) for model in tiny.pair())
    inputs = tiny.batch(tiny.pair()[0], "llava", [tiny.LONG])
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    ours.set_replaced_layers(list(range(tiny.LAYERS)))
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, layers=range(tiny.LAYERS)):
        exact = stock(**inputs).logits
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        expected, actual = stock.to(dtype)(**inputs).logits, ours.to(dtype)(**inputs).logits
    assert tiny.root_mean_square(actual - exact) <= 1.5 * tiny.root_mean_square(expected - exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generates_in_half_precision(dtype, package_folder):
    """The greedy tokens of a trained model, whose margins are wider than rounding, and a cache of its precision."""
    stock = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype)
    ours = ShortVLlavaForConditionalGeneration.from_pretrained(package_folder, dtype=dtype)
    inputs = make_inputs(load_processor(CHECKPOINT), embedded_samples()[:4])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    visual = inputs["input_ids"] == stock.config.image_token_id
    with tiny.frozen(stock, visual, layers=ours.config.replaced_layers):
        expected = stock.generate(**inputs, **settings)
    actual = ours.generate(**inputs, **settings)
    assert torch.equal(actual.sequences, expected.sequences)
    assert {layer.keys.dtype for layer in actual.past_key_values.layers} == {dtype}
