"""What people do to models that they did not write, done to stock LLaVA with hooks and to ours: the same comes out."""

import copy
import inspect
import pickle
import types

import pytest
import tiny
import torch
import transformers
from test_attention import flash_kernel  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LAYERS = 5
FROZEN = {"layers": (3, 2), "attention": (0,), "ffn": (1,)}  # the last layer is stock's, two neighbours are replaced
LAST = {"layers": (4, 3)}
LAYOUT = ["ttItttt", "tItttItt"]
CACHE = "cache" if transformers.__version__ >= "5.24" else "past_key_values"


def make_pair(blocks=FROZEN, backbone="llama", **settings):
    """(stock, ours), copies that may be changed."""
    stock, ours = copy.deepcopy(tiny.pair("llava", backbone, num_hidden_layers=LAYERS, **settings))
    tiny.freeze(ours, **blocks)
    return stock, ours


def layers_of(model):
    return tiny.decoder(model).layers


def assert_same(stock, ours, do, inputs, blocks=FROZEN, dense=True):
    """`do(model, inputs)` gives a list of tensors, equal on both sides; with nothing frozen, others (if `dense`)."""
    before = copy.deepcopy(stock) if dense else None
    with tiny.frozen(stock, **blocks):
        expected = do(stock, dict(inputs))
    found = do(ours, dict(inputs))
    assert len(found) == len(expected) > 0
    for actual, wanted in zip(found, expected):
        torch.testing.assert_close(actual, wanted, **tiny.CLOSE)
    if dense:  # what is compared does depend on what is frozen
        others = do(before, dict(inputs))
        assert any(a.shape != b.shape or not torch.allclose(a, b, atol=1e-3) for a, b in zip(others, expected))


def real(states, inputs):
    """The rows of (B, S, ...) that carry tokens."""
    mask = inputs.get("attention_mask")
    return states if mask is None or mask.dim() != 2 else states[mask[:, : states.shape[1]].bool()]


def logits(model, inputs):
    return [real(model(**inputs).logits, inputs)]


# Hooks


def states_of(output):
    return output[0] if isinstance(output, tuple) else output


def read_layers(model, inputs, call=None):
    """Every layer's output and input, as hooks see them."""
    seen, handles = [], []
    for layer in layers_of(model):
        handles.append(layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
        handles.append(layer.register_forward_hook(lambda module, args, output: seen.append(states_of(output))))
    (call or (lambda: model(**inputs, logits_to_keep=1)))()
    for handle in handles:
        handle.remove()
    return [real(states, inputs) if states.shape[1] == inputs["input_ids"].shape[1] else states for states in seen]


def read_layers_in_generate(model, inputs):
    settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [tiny.END_TOKEN, tiny.IMAGE_TOKEN]}
    return read_layers(model, inputs, lambda: model.generate(**inputs, **settings))


def steer(model, inputs):
    """A direction is added to what a layer gives: at text, at the picture, everywhere, before and behind layers."""
    vector = torch.linspace(-1, 1, 32, dtype=torch.float64)
    visual = inputs["input_ids"] == tiny.IMAGE_TOKEN
    found = []
    for layer in layers_of(model):
        for rows in (visual, ~visual, torch.ones_like(visual)):

            def after(module, args, output, rows=rows):
                steered = states_of(output) + rows.unsqueeze(-1) * vector
                return (steered, *output[1:]) if isinstance(output, tuple) else steered

            def before(module, args, rows=rows):
                return (args[0] + rows.unsqueeze(-1) * vector, *args[1:])

            for handle in (layer.register_forward_hook(after), layer.register_forward_pre_hook(before)):
                found += logits(model, inputs)
                handle.remove()
    return found


def write_into_outputs(model, inputs):
    """Hooks that change what a module gave in place, and return nothing."""

    def write(module, args, output):
        states_of(output).mul_(1.1)

    for layer in layers_of(model):
        for module in (layer, layer.input_layernorm):
            module.register_forward_hook(write)
    return logits(model, inputs)


def patch_activations(model, inputs):
    """One layer's output in another prompt takes the place of its output in this one."""
    other = dict(inputs) | {"pixel_values": inputs["pixel_values"].flip(0)}
    found = []
    for layer in layers_of(model):
        kept = []
        handle = layer.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        model(**other)
        handle.remove()
        handle = layer.register_forward_hook(lambda module, args, output, kept=kept: kept[0])
        found += logits(model, inputs)
        handle.remove()
    return found


def read_norms(model, inputs):
    seen = []
    norms = [layer.input_layernorm for layer in layers_of(model)]
    handles = [norm.register_forward_hook(lambda module, args, output: seen.append(output)) for norm in norms]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return [real(states, inputs) for states in seen]


def clamp_norms(model, inputs):
    def clamp(module, args, output):
        return output.clamp(-0.5, 0.7) + 0.1

    for layer in layers_of(model):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(clamp)
    return logits(model, inputs)


class OtherNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, states):
        return self.weight * torch.tanh(states - states.mean(-1, keepdim=True))


def replace_norms(model, inputs):
    for layer in layers_of(model):
        layer.input_layernorm = OtherNorm(layer.input_layernorm)
        layer.post_attention_layernorm = OtherNorm(layer.post_attention_layernorm)
    return logits(model, inputs)


class Wrapped(nn.Module):
    """Around a module, which keeps its attributes within reach."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


def wrap_layers(model, inputs):
    for index, layer in enumerate(layers_of(model)):
        layers_of(model)[index] = Wrapped(layer)
    return logits(model, inputs)


def wrap_parts(model, inputs):
    for layer in layers_of(model):
        layer.self_attn, layer.mlp = Wrapped(layer.self_attn), Wrapped(layer.mlp)
        layer.self_attn.inner.k_proj = Wrapped(layer.self_attn.inner.k_proj)
    return logits(model, inputs)


def parametrize_weights(model, inputs):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for layer in layers_of(model):
        for linear in (layer.self_attn.k_proj, layer.self_attn.q_proj, layer.mlp.up_proj):
            parametrize.register_parametrization(linear, "weight", Doubled())
    return logits(model, inputs)


def knock_out_attention(model, inputs):
    """In some layers text is kept from seeing the picture: a mask of their own for these layers alone."""
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    mask &= ~(inputs["input_ids"] == tiny.IMAGE_TOKEN)[:, None, None, :] | torch.eye(length, dtype=torch.bool)

    def knock_out(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask}

    for index in (1, 3):
        layers_of(model)[index].self_attn.register_forward_pre_hook(knock_out, with_kwargs=True)
    return logits(model, inputs)


def cut_layers(model, inputs):
    found = []
    for number in range(LAYERS - 1, 0, -1):
        tiny.decoder(model).layers = layers_of(model)[:number]
        found += logits(model, inputs)
    return found


def call_the_base(model, inputs):
    """By position, as far as all families and versions agree, and by keyword."""
    ids, pixels, mask = (inputs[name] for name in ("input_ids", "pixel_values", "attention_mask"))
    found = [model.model(ids, pixels, mask), model.model(ids, pixels, attention_mask=mask), model.model(**inputs)]
    found.append(model.model(None, pixels, mask, inputs_embeds=model.get_input_embeddings()(ids)))
    return [real(output.last_hidden_state, inputs) for output in found]


def attend_to_both_sides(model, inputs):
    """As LLM2Vec and its like: attention modules that are told not to be causal."""
    for layer in layers_of(model):
        layer.self_attn.is_causal = False
    return logits(model, inputs)


def read_all_states(model, inputs):
    output = model(**inputs, output_hidden_states=True, logits_to_keep=1)
    return [real(states, inputs) for states in output.hidden_states]


def copy_and_pickle(model, inputs):
    return logits(copy.deepcopy(model), inputs) + logits(pickle.loads(pickle.dumps(model)), inputs)


def call_in_inference_mode(model, inputs):
    with torch.inference_mode():
        return logits(model, inputs)


def call_functionally(model, inputs):
    weights = {name: value * 1.1 for name, value in model.named_parameters()}
    return [real(torch.func.functional_call(model, weights, kwargs=inputs).logits, inputs)]


HOOKS = [
    read_layers, read_layers_in_generate, steer, write_into_outputs, patch_activations, read_norms, clamp_norms,
    replace_norms, wrap_layers, wrap_parts, parametrize_weights, knock_out_attention, cut_layers, call_the_base,
    attend_to_both_sides, read_all_states, copy_and_pickle, call_in_inference_mode, call_functionally,
]  # fmt: skip


@pytest.mark.parametrize("layout", [["ttItttt", "tttItttt"], LAYOUT], ids=["even", "uneven"])
@pytest.mark.parametrize("blocks", [FROZEN, LAST], ids=["some", "last"])
@pytest.mark.parametrize("do", HOOKS, ids=lambda do: do.__name__)
@torch.no_grad()
def test_hooks_and_other_modules(do, blocks, layout):
    stock, ours = make_pair(blocks)
    inputs = tiny.batch(stock, "llava", [row + "t" for row in layout], "left" if "generate" in do.__name__ else "right")
    if do is copy_and_pickle:  # hooks with closures, as the oracle's, cannot be pickled
        with tiny.frozen(stock, **blocks):
            expected = logits(stock, inputs)[0]
        for found in do(ours, inputs):
            torch.testing.assert_close(found, expected, **tiny.CLOSE)
        return
    # Of the replaced last layer nothing but rows that no text reads depends on what is frozen in it.
    assert_same(stock, ours, do, inputs, blocks, dense=do not in (read_norms,))


def test_gradients_of_pictures_and_attention_maps():
    """Saliency: what a logit, or an attention weight in a replaced layer, owes to pixels and embeddings."""

    def saliency(model, inputs):
        pixels = inputs["pixel_values"].clone().requires_grad_()
        output = model(**inputs | {"pixel_values": pixels}, output_attentions=True)
        wanted = [output.logits[:, -1].max(), *(weights[:, :, -1].square().sum() for weights in output.attentions)]
        return [torch.autograd.grad(value, pixels, retain_graph=True, allow_unused=True)[0] for value in wanted[:-1]]

    stock, ours = make_pair(attn_implementation="eager")
    inputs = tiny.batch(stock, "llava", ["ttItttt", "tttIttt"])
    assert_same(stock, ours, lambda *given: [g for g in saliency(*given) if g is not None], inputs)


def test_outputs_of_layers_are_no_views():
    """Of a view that a hook writes into, FSDP loses its own hook on the gradient."""
    _, ours = make_pair()
    found = []
    for layer in layers_of(ours):
        layer.register_forward_hook(lambda module, args, output: found.append(states_of(output)._is_view()))
    ours(**tiny.batch(ours, "llava", LAYOUT, "right"))
    assert found == [False] * LAYERS


def test_backward_hooks():
    def gradients(model, inputs):
        seen = []
        for layer in layers_of(model):
            for module in (layer, layer.input_layernorm):
                module.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
        model(**inputs).logits[:, -1].square().sum().backward()
        return seen

    stock, ours = make_pair()
    assert_same(stock, ours, gradients, tiny.batch(stock, "llava", ["ttItttt", "tttIttt"]))


# Masks


def prefix_mask(inputs, dtype=torch.bool, heads=1):
    """(B, heads, S, S): causal but for the first five tokens, which see each other."""
    length = inputs["input_ids"].shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[:5, :5] = True
    seen = seen.expand(len(inputs["input_ids"]), heads, -1, -1)
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(torch.float32).min)


MASKS = {
    "prefix": lambda inputs: prefix_mask(inputs),
    "additive": lambda inputs: prefix_mask(inputs, torch.float64),
    "one for each head": lambda inputs: prefix_mask(inputs, heads=4),
    "the same for all rows": lambda inputs: prefix_mask(inputs)[:1],
    "the same for all queries": lambda inputs: (torch.arange(12) % 5 != 2).expand(2, 1, 1, -1),
    "all see all": lambda inputs: torch.ones_like(prefix_mask(inputs)),
    "biased": lambda inputs: prefix_mask(inputs, torch.float64) - torch.arange(12.0, dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_whole_masks(implementation, make):
    stock, ours = make_pair(attn_implementation=implementation)
    inputs = tiny.batch(stock, "llava", ["ttItttttt", "tttIttttt"])
    assert inputs["input_ids"].shape[1] == 12
    inputs["attention_mask"] = make(inputs)
    if implementation == "eager" and inputs["attention_mask"].dtype == torch.bool:
        inputs["attention_mask"] = torch.zeros(1, dtype=torch.float64).masked_fill(
            ~inputs["attention_mask"], torch.finfo(torch.float32).min
        )
    assert_same(stock, ours, logits, inputs)


@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
@torch.no_grad()
def test_attention_told_not_to_be_causal(flash_kernel, implementation, padded):  # noqa: F811
    """In the call, in the configuration: as this transformers' stock model takes it."""
    rows = ["ttItttt", "tttItttt" if padded else "tttIttt"]
    for where in ("call", "configuration"):
        stock, ours = make_pair()
        for model in (stock, ours):
            tiny.decoder(model).config._attn_implementation = implementation
            if where == "configuration":
                tiny.decoder(model).config.is_causal = False
        inputs = tiny.batch(stock, "llava", rows, "right")
        told = {"is_causal": False} if where == "call" else {}
        assert_same(stock, ours, lambda model, inputs, told=told: logits(model, inputs | told), inputs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_mask_longer_than_the_tokens_so_far(implementation):
    """A static cache's length; and the first chunk of a padded prompt with the whole prompt's mask."""
    stock, ours = make_pair(attn_implementation=implementation)
    inputs = tiny.batch(stock, "llava", ["ttItttt", "tttItttttt"], "right")
    chunk = dict(inputs) | {"input_ids": inputs["input_ids"][:, :8]}

    def with_static_cache(model, inputs):
        length = inputs["input_ids"].shape[1]
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 6)
        padded = nn.functional.pad(inputs["attention_mask"], (0, 6))
        output = model(**inputs | {"attention_mask": padded}, **{CACHE: cache})
        return [real(output.logits, inputs)]

    assert_same(stock, ours, with_static_cache, inputs)
    whole = tiny.batch(stock, "llava", ["ttItttttttt", "tttItttttt"], "right")
    chunk = dict(whole) | {"input_ids": whole["input_ids"][:, :9]}
    assert_same(stock, ours, lambda model, given: [model(**given, **{CACHE: DynamicCache()}).logits], chunk)


@pytest.mark.parametrize("told_by", ["positions", "bounds"])
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
@torch.no_grad()
def test_packed_rows(flash_kernel, implementation, told_by):  # noqa: F811
    """Training samples one behind the other in one row, which see nothing of each other."""
    stock, ours = make_pair()
    for model in (stock, ours):
        tiny.decoder(model).config._attn_implementation = implementation
    inputs = tiny.batch(stock, "llava", ["ttIttttttItttt"])
    inputs.pop("attention_mask")
    lengths = [9, 11]
    assert inputs["input_ids"].shape[1] == sum(lengths)
    inputs["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    if told_by == "bounds":
        ends = torch.tensor([0, 9, 20], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11}
        inputs["position_ids"] = torch.arange(20)[None]
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE_TOKEN, -100)
    for use_cache in (False, True):
        do = lambda model, given: [(out := model(**given)).logits, out.loss]  # noqa: E731
        assert_same(stock, ours, do, inputs | {"use_cache": use_cache})


# Attention functions and caches


def softer_attention(module, query, key, value, attention_mask, **kwargs):
    kwargs["scaling"] = kwargs["scaling"] / 2
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@pytest.mark.parametrize("with_mask", [False, True], ids=["no mask function", "mask function"])
@pytest.mark.parametrize("backbone", ["llama", "qwen2", "mistral"])
@torch.no_grad()
def test_a_registered_attention_function(backbone, with_mask):
    name = "softer" + "_masked" * with_mask
    AttentionInterface.register(name, softer_attention)
    if with_mask:
        AttentionMaskInterface.register(name, sdpa_mask)
    stock, ours = make_pair(backbone=backbone)
    for model in (stock, ours):
        tiny.decoder(model).config._attn_implementation = name
    assert_same(stock, ours, logits, tiny.batch(stock, "llava", ["ttItttt", "tttItttt"], "right"))
    assert_same(stock, ours, logits, tiny.batch(stock, "llava", ["ttItttt", "tttIttt"]))


class ShiftingCache(DynamicCache):
    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return super().update(key_states + 0.3, value_states * 0.7, layer_idx, *args, **kwargs)


@torch.no_grad()
def test_a_cache_with_an_update_of_its_own():
    stock, ours = make_pair()
    inputs = tiny.batch(stock, "llava", LAYOUT, "right")
    assert_same(stock, ours, lambda model, given: logits(model, given | {CACHE: ShiftingCache()}), inputs)


@torch.no_grad()
def test_attention_modules_are_called_by_keyword_as_stock_calls_them():
    seen = {}
    for side, model in zip(("stock", "ours"), make_pair()):

        def note(module, args, kwargs, side=side):
            states = kwargs["hidden_states"]
            kept = {name for name, value in kwargs.items() if value is not None} - {
                "frozen_tokens",
                "hidden_states",
                "use_cache",
            }
            seen.setdefault(side, []).append((len(args), states.shape, kept))

        for layer in layers_of(model):
            layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        model(**tiny.batch(model, "llava", LAYOUT), use_cache=True)
    assert seen["ours"] == seen["stock"]


@pytest.fixture
def kvpress():
    """The library, without what it puts around every attention function of the process when it is imported."""
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    yield pytest.importorskip("kvpress", reason="kvpress is not installed: it takes transformers before 5.3")
    for name, function in before.items():
        ALL_ATTENTION_FUNCTIONS[name] = function


@pytest.mark.parametrize("press", ["KnormPress", "ExpectedAttentionPress", "KeyDiffPress", "SnapKVPress"])
@torch.no_grad()
def test_kvpress(kvpress, press):
    """Compresses the cache by hooks on attention modules."""

    def compressed(model, inputs):
        settings = {"window_size": 3} if press == "SnapKVPress" else {}
        settings |= {"n_sink": 1} if press == "ExpectedAttentionPress" else {}
        press_of = getattr(kvpress, press)(compression_ratio=0.4, **settings)
        handles = []
        for layer in layers_of(model):
            if hasattr(tiny.decoder(model), "rotary_emb"):
                layer.self_attn.rotary_emb = tiny.decoder(model).rotary_emb
            handles.append(layer.self_attn.register_forward_hook(press_of.forward_hook, with_kwargs=True))
        press_of.post_init_from_model(model)
        cache = DynamicCache()
        length = inputs["input_ids"].shape[1]
        output = model(**inputs, past_key_values=cache, cache_position=torch.arange(length))
        for handle in handles:
            handle.remove()
        return [output.logits, *(layer.keys for layer in cache.layers), *(layer.values for layer in cache.layers)]

    stock, ours = make_pair()
    assert_same(stock, ours, compressed, tiny.batch(stock, "llava", ["ttItttttttItttt"]))


@torch.no_grad()
def test_steering_vectors():
    library = pytest.importorskip("steering_vectors", reason="steering-vectors is not installed: transformers before 5")

    def steered(model, inputs):
        direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
        vector = library.SteeringVector({index: direction for index in range(LAYERS)}, "decoder_block")
        config = {"decoder_block": "model.language_model.layers.{num}"}
        with vector.apply(model, layer_config=config, multiplier=0.5):
            found = logits(model, inputs)
        with library.record_activations(model, layer_type="decoder_block", layer_config=config) as recorded:
            model(**inputs)
        return found + [real(states[0], inputs) for states in recorded.values()]

    stock, ours = make_pair()
    assert_same(stock, ours, steered, tiny.batch(stock, "llava", LAYOUT, "right"))


# What others ask of classes


@torch.no_grad()
def test_tensors_made_in_a_pass_say_where():
    """As with `torch.set_default_device("cuda")`, where what names no device lands elsewhere than the model."""
    stock, ours = make_pair()
    inputs = tiny.batch(stock, "llava", LAYOUT)
    for given in (inputs, {key: value for key, value in inputs.items() if key != "attention_mask"}):
        expected = ours(**given).logits
        with torch.device("meta"):
            assert torch.equal(ours(**given).logits, expected)
        embedded = {"inputs_embeds": ours.get_input_embeddings()(given["input_ids"])}
        embedded |= {key: value for key, value in given.items() if key != "input_ids"}
        with torch.device("meta"):
            torch.testing.assert_close(ours(**embedded).logits, expected, **tiny.CLOSE)


def test_names_signatures_and_classes_are_stocks():
    for family in tiny.CLASSES:
        for backbone in tiny.BACKBONES:
            stock, ours = tiny.pair(family, backbone)
            for names in ("named_modules", "named_parameters", "named_buffers", "state_dict"):
                assert [*dict(getattr(ours, names)())] == [*dict(getattr(stock, names)())]
            for ours_module, stock_module in zip(ours.modules(), stock.modules()):
                assert isinstance(ours_module, type(stock_module))
                if ours_module is not ours:
                    assert type(ours_module).__name__ == type(stock_module).__name__
            assert ours._no_split_modules == stock._no_split_modules
            for ours_part, stock_part in ((ours, stock), (ours.model, stock.model)):
                assert inspect.signature(ours_part.forward) == inspect.signature(stock_part.forward)


@torch.no_grad()
def test_a_patched_forward_of_a_layer():
    """As accelerate and other libraries do: a function of their own that calls the old one."""

    def patch(model, inputs):
        for layer in layers_of(model):
            old = layer.forward
            layer.forward = types.MethodType(lambda self, *args, old=old, **kwargs: old(*args, **kwargs) * 1.1, layer)
        return logits(model, inputs)

    stock, ours = make_pair()
    assert_same(stock, ours, patch, tiny.batch(stock, "llava", LAYOUT, "right"))


@torch.no_grad()
def test_the_attention_implementation_is_changed_on_a_loaded_model():
    stock, ours = make_pair()
    inputs = tiny.batch(stock, "llava", LAYOUT, "right")

    def both(model, inputs):
        found = []
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            found += logits(model, inputs)
        return found

    assert_same(stock, ours, both, inputs)
