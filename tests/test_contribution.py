"""LC scores: the shared computation against one full pass for every layer."""

import collections
import copy

import pytest
import tiny
import torch
from accelerate import hooks

from shortv_llava.calibrate import layer_contribution
from shortv_llava.calibrate.contribution import RowBudget, contributions, cosine_distance


def brute_force(stock, inputs, token_set, direction):
    """L + 1 full passes, the layer's X rows put back to its input by a hook."""
    last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
    rows = torch.arange(len(last))
    original = stock(**inputs).logits[rows, last].double().log_softmax(-1)
    scores = []
    for layer in tiny.decoder(stock).layers:

        def put_back(module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            states = torch.where(token_set.unsqueeze(-1), args[0], states)
            return (states, *output[1:]) if isinstance(output, tuple) else states

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
        actual = contributions(scored, inputs, [tokens], direction)[0]
        torch.testing.assert_close(actual, expected, **tiny.CLOSE)
        torch.testing.assert_close(layer_contribution(scored, inputs, tokens, direction), actual.mean(0), **tiny.CLOSE)


@torch.no_grad()
def test_scores_of_a_float32_model_are_taken_in_float64():
    """As near to the float64 model's as those of full passes are, whose logits are turned into float64."""
    stock, ours = tiny.pair()
    inputs = tiny.batch(stock, "llava", ["ttIttt", "tIttItttt", "tItttttt"])
    token_set = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    exact = brute_force(stock, inputs, token_set, "release")
    stock, ours = copy.deepcopy(stock).float(), copy.deepcopy(ours).float()
    expected = brute_force(stock, inputs, token_set, "release")
    for scored in (stock, ours):
        actual = contributions(scored, inputs, ["all"])[0]
        assert actual.dtype == torch.float64
        assert tiny.root_mean_square(actual - exact) <= 1.5 * tiny.root_mean_square(expected - exact)


def test_last_layer_contributes_nothing_to_visual_tokens():
    stock, _ = tiny.pair()
    scores = layer_contribution(stock, tiny.batch(stock, "llava", ["ttIttt"]))
    assert scores[-1] == 0 and (scores[:-1] > 0).all()


def test_methods_left_in_the_modules_of_a_plain_model():
    """As accelerate's hooks and, in transformers 4, a pass that records hidden states leave them."""
    stock, _ = copy.deepcopy(tiny.pair())
    inputs = tiny.batch(stock, "llava", ["ttIttt"])
    expected = layer_contribution(stock, inputs)
    stock(**inputs, output_hidden_states=True)
    torch.testing.assert_close(layer_contribution(stock, inputs), expected, **tiny.CLOSE)
    for layer in tiny.decoder(stock).layers:
        hooks.add_hook_to_module(layer, hooks.ModelHook())
        hooks.add_hook_to_module(layer.self_attn, hooks.ModelHook())
    torch.testing.assert_close(layer_contribution(stock, inputs), expected, **tiny.CLOSE)


@pytest.mark.parametrize("which", ["stock", "ours"])
def test_number_of_layer_passes_and_no_trace_left(which):
    pair = dict(zip(("stock", "ours"), tiny.pair()))
    model = pair[which]
    inputs = tiny.batch(pair["stock"], "llava", ["ttIttt"])
    layers = tiny.decoder(model).layers
    before = [(type(layer), vars(layer).get("forward")) for layer in layers]
    passes = []
    handles = [layer.register_forward_pre_hook(lambda layer, args: passes.append(len(args[0]))) for layer in layers]
    layer_contribution(model, inputs)
    for handle in handles:
        handle.remove()
    recording, scored = passes[: tiny.LAYERS], passes[tiny.LAYERS :]
    assert recording == [1] * tiny.LAYERS  # with the layers' work left out
    assert sum(scored) == tiny.LAYERS + tiny.LAYERS * (tiny.LAYERS - 1) // 2
    assert [(type(layer), vars(layer).get("forward")) for layer in layers] == before


@torch.no_grad()
def test_several_sets_share_a_pass_and_any_budget_gives_the_same():
    stock, ours = tiny.pair("llava", "llama", 2)
    inputs = tiny.batch(stock, "llava", ["ttIttt", "tIttItttt"])
    kinds = ["visual", "text", "all"]
    together = contributions(ours, inputs, kinds, budget=RowBudget(3))
    for kind, scores in zip(kinds, together):
        torch.testing.assert_close(scores, contributions(ours, inputs, [kind])[0], **tiny.CLOSE)


@pytest.mark.parametrize("kind", ["visual", "text"])
@torch.no_grad()
def test_blocks_equal_the_hooked_model(kind):
    stock, ours = tiny.pair("llava", "llama", 2)
    inputs = tiny.batch(stock, "llava", ["ttIttt", "tIttItttt"])
    visual = inputs["input_ids"] == tiny.IMAGE_TOKEN
    frozen = visual if kind == "visual" else ~visual
    last = inputs["attention_mask"].shape[1] - 1
    original = stock(**inputs).logits[:, last].log_softmax(-1)
    expected = []
    for block in ("attention", "ffn"):
        for layer in range(tiny.LAYERS):
            with tiny.frozen(stock, frozen, **{block: [layer]}):
                variant = stock(**inputs).logits[:, last].log_softmax(-1)
            expected.append((variant.exp() * (variant - original)).sum(-1))
    actual = contributions(stock, inputs, [kind], granularity="block")[0]
    torch.testing.assert_close(actual, torch.stack(expected, 1), **tiny.CLOSE)


@torch.no_grad()
def test_running_out_of_memory_halves_the_rows(monkeypatch):
    stock, ours = tiny.pair("llava", "llama", 2)
    inputs = tiny.batch(stock, "llava", ["ttIttt"])
    expected = contributions(ours, inputs)
    forward = type(tiny.decoder(ours).layers[0]).forward

    def small(self, hidden_states, **kwargs):
        if len(hidden_states) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(self, hidden_states, **kwargs)

    monkeypatch.setattr(type(tiny.decoder(ours).layers[0]), "forward", small)
    budget = RowBudget()
    torch.testing.assert_close(contributions(ours, inputs, budget=budget), expected, **tiny.CLOSE)
    assert budget.rows <= 2


@torch.no_grad()
def test_offloaded_weights_move_once_a_batch(tmp_path, monkeypatch):
    from accelerate import dispatch_model

    _, ours = tiny.pair("llava", "qwen2", 2)
    inputs = tiny.batch(ours, "llava", ["ttIttt"])
    expected = contributions(ours, inputs)
    model = copy.deepcopy(ours)
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    device_map |= {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(tiny.LAYERS)}
    model = dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    moved = collections.Counter()
    move = hooks.set_module_tensor_to_device

    def count(module, name, device, value=None, **kwargs):
        if value is not None:
            moved[id(module), name] += 1
        return move(module, name, device, value=value, **kwargs)

    monkeypatch.setattr(hooks, "set_module_tensor_to_device", count)
    torch.testing.assert_close(contributions(model, inputs, budget=RowBudget(1)), expected, **tiny.CLOSE)
    assert len(moved) == 2 * sum(1 for _ in tiny.decoder(ours).layers[0].parameters())
    assert set(moved.values()) == {1}


@torch.no_grad()
def test_cosine_distance_is_that_of_the_dense_models_states():
    stock, ours = tiny.pair()
    ours.set_replaced_layers([1, 2])
    inputs = tiny.batch(stock, "llava", ["ttIttt", "tItttt"])
    visual = inputs["input_ids"] == tiny.IMAGE_TOKEN
    states = [state[visual] for state in stock(**inputs, output_hidden_states=True).hidden_states[:-1]]
    expected = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(states, states[1:])]
    for model in (stock, ours):
        torch.testing.assert_close(cosine_distance(model, inputs)[:-1], torch.stack(expected), **tiny.CLOSE)
    assert ours.config.replaced_layers == [1, 2]


@pytest.mark.parametrize("wrong", [{"tokens": "image"}, {"direction": "both"}])
def test_unknown_options_are_refused(wrong):
    stock, _ = tiny.pair()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        layer_contribution(stock, tiny.batch(stock, "llava", ["ttIttt"]), **wrong)
