"""LC scores: the shared computation against one full pass for every layer."""

import pytest
import tiny
import torch

from shortv_llava.calibrate import layer_contribution
from shortv_llava.calibrate.contribution import sample_contributions


def brute_force(stock, inputs, token_set, direction):
    """L + 1 full passes, the layer's X rows put back to its input by a hook."""
    last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
    rows = torch.arange(len(last))
    original = stock(**inputs).logits[rows, last].double().log_softmax(-1)
    scores = []
    for layer in stock.model.language_model.layers:

        def put_back(module, args, output):
            return torch.where(token_set.unsqueeze(-1), args[0], output)

        handle = layer.register_forward_hook(put_back)
        variant = stock(**inputs).logits[rows, last].double().log_softmax(-1)
        handle.remove()
        p, q = (variant, original) if direction == "release" else (original, variant)
        scores.append((p.exp() * (p - q)).sum(-1))
    return torch.stack(scores, dim=1)


@pytest.mark.parametrize("model", [("llava", "llama", 2), ("llava", "qwen2", 2), ("llava_next", "mistral", 2)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", ["visual", "text", "all"])
@pytest.mark.parametrize("direction", ["release", "paper"])
@torch.no_grad()
def test_shared_equals_brute_force(model, side, tokens, direction):
    stock, ours = tiny.pair(*model)
    ours.set_replaced_layers([1, 2])  # must not matter
    inputs = tiny.batch(stock, model[0], ["ttIttt", "tIttItttt", "tItttttt"], side)
    visual = inputs["input_ids"] == tiny.IMAGE_TOKEN
    token_set = {"visual": visual, "text": ~visual, "all": torch.ones_like(visual)}[tokens]
    expected = brute_force(stock, inputs, token_set, direction)
    for scored in (stock, ours):
        actual = sample_contributions(scored, inputs, tokens, direction)
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer_contribution(scored, inputs, tokens, direction), actual.mean(0))


def test_last_layer_contributes_nothing_to_visual_tokens():
    stock, _ = tiny.pair()
    scores = layer_contribution(stock, tiny.batch(stock, "llava", ["ttIttt"]))
    assert scores[-1] == 0 and (scores[:-1] > 0).all()


@pytest.mark.parametrize("which", ["stock", "ours"])
def test_number_of_layer_passes_and_no_trace_left(which):
    pair = dict(zip(("stock", "ours"), tiny.pair()))
    model = pair[which]
    inputs = tiny.batch(pair["stock"], "llava", ["ttIttt"])
    layers = model.model.language_model.layers
    classes = [type(layer) for layer in layers]
    passes = []
    handles = [layer.register_forward_pre_hook(lambda layer, args: passes.append(len(args[0]))) for layer in layers]
    layer_contribution(model, inputs)
    for handle in handles:
        handle.remove()
    recording, scored = passes[: tiny.LAYERS], passes[tiny.LAYERS :]
    assert recording == [1] * tiny.LAYERS  # with the layers' work left out
    assert sum(scored) == tiny.LAYERS + tiny.LAYERS * (tiny.LAYERS - 1) // 2
    assert [type(layer) for layer in layers] == classes
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("wrong", [{"tokens": "image"}, {"direction": "both"}])
def test_unknown_options_are_refused(wrong):
    stock, _ = tiny.pair()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        layer_contribution(stock, tiny.batch(stock, "llava", ["ttIttt"]), **wrong)
