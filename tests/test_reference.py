"""Against what the method's public reference code computed."""

import pytest
import torch

from shortv_llava import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
from shortv_llava.calibrate import layer_contribution


@pytest.fixture(scope="module")
def model(reference):
    folder, _, _ = reference
    return ShortVLlavaForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["none", "few", "most", "all"])
@torch.no_grad()
def test_logits_and_greedy_tokens(reference, model, name):
    _, expected, description = reference
    model.set_replaced_layers(description["replaced_layers"][name])
    inputs = {key: expected[key] for key in ("input_ids", "pixel_values")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert (model(**inputs).logits[0] - expected[f"logits_{name}"]).abs().max() < 1e-5
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(generated[0, inputs["input_ids"].shape[1] :], expected[f"generated_{name}"])


def test_lc_scores(reference, model):
    _, expected, _ = reference
    scores = layer_contribution(model, {key: expected[key] for key in ("input_ids", "pixel_values")})
    assert (scores - expected["lc_visual"]).abs().max() < 1e-6
    assert scores.argsort().tolist() == expected["lc_visual"].argsort().tolist()


def test_a_plain_configuration_is_extended(reference):
    folder, _, _ = reference
    config = ShortVLlavaConfig.from_pretrained(folder / "hf", replaced_layers=[7, 5])
    assert config.replaced_layers == [7, 5] and config.model_type == "shortv_llava"
