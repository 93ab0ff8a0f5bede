"""Quantised models against the stock model with hooks, quantised the same way; saved and loaded again."""

import pytest
import tiny
import torch
import transformers
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration, TorchAoConfig

from shortv_llava import ShortVLlavaForConditionalGeneration
from shortv_llava.calibrate.samples import embedded_samples, make_inputs
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.examples.shapes_llava import CHECKPOINT

BLOCKS = {"layers": (0, 3, 6), "attention": (9,), "ffn": (2, 10)}


def int8_weights():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


SCHEMES = {
    "bitsandbytes 4 bit": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes 8 bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8 weights": ("torchao", int8_weights),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@torch.no_grad()
def test_quantised_saved_and_loaded(scheme, package_folder, tmp_path):
    package, config = scheme
    pytest.importorskip(package)
    settings = {"device_map": "cpu", "dtype": torch.float32}
    dense = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, **settings)
    stock = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, quantization_config=config(), **settings)
    ours = ShortVLlavaForConditionalGeneration.from_pretrained(package_folder, quantization_config=config(), **settings)
    tiny.freeze(ours, **BLOCKS)
    inputs = make_inputs(load_processor(CHECKPOINT), embedded_samples()[:4])
    real, visual = inputs["attention_mask"].bool(), inputs["input_ids"] == stock.config.image_token_id
    unfrozen = dense(**inputs).logits[real]
    with tiny.frozen(stock, visual, **BLOCKS), tiny.frozen(dense, visual, **BLOCKS):
        exact, expected = dense(**inputs).logits[real], stock(**inputs).logits[real]
    actual = ours(**inputs).logits[real]
    ours_off, stock_off = tiny.root_mean_square(actual - exact), tiny.root_mean_square(expected - exact)
    frozen_off = tiny.root_mean_square(unfrozen - exact)
    assert 0.001 * frozen_off < ours_off <= 1.1 * stock_off  # quantised, and as near as the stock model
    # Where activations are rounded too, a last bit can become a step of 1/127.
    assert tiny.root_mean_square(actual - expected) < 0.01 * frozen_off

    # transformers 4 writes torchao's integers as a pickle alone.
    old_torchao = {"safe_serialization": False} if package == "torchao" and transformers.__version__ < "5" else {}
    ours.save_pretrained(tmp_path, **old_torchao)
    again = ShortVLlavaForConditionalGeneration.from_pretrained(tmp_path, **settings)
    assert again.config.frozen_layers() == ours.config.frozen_layers()
    # On a CPU bitsandbytes takes nested scales apart when it saves, so the saved model itself is what to compare with.
    assert torch.equal(again(**inputs).logits, ours(**inputs).logits)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_package_answers_quantised(bits, package_folder):
    """As `--load-in-4bit` and `--load-in-8bit` load it."""
    pytest.importorskip("bitsandbytes")
    model, processor = load_model(package_folder, device_map="cpu", **{bits: True}), load_processor(package_folder)
    samples = embedded_samples()[:10]
    inputs = make_inputs(processor, samples)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    right = sum(answer == sample.answer for answer, sample in zip(answers, samples))
    assert right >= 7, answers
