"""Any layout of text and images, any config.json, threads, and a thousand prefills."""

import copy
import gc
import json
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import tiny
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shortv_llava import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration

# The same examples every time, and no verdict that depends on how busy the machine is.
SETTINGS = settings(
    derandomize=True, deadline=None, database=None, max_examples=100, suppress_health_check=list(HealthCheck)
)
LISTS = ("replaced_layers", "replaced_attention_layers", "replaced_ffn_layers")


@st.composite
def frozen_blocks(draw):
    """Every layer whole, its attention, its FFN or nothing, in any order."""
    kinds = draw(st.lists(st.sampled_from(["layers", "attention", "ffn", None]), min_size=4, max_size=4))
    order = draw(st.permutations(range(tiny.LAYERS)))
    return {name: [i for i in order if kinds[i] == name] for name in ("layers", "attention", "ffn")}


rows = st.text("tttI", min_size=1, max_size=9)
# Stock eager attention has no numbers for rows that see no token, as padding on the left: float64's least number, by
# which it masks, is no number of the float32 in which it takes the softmax.
attention = st.sampled_from([("sdpa", "left"), ("sdpa", "right"), ("sdpa", "both"), ("eager", "right")])
models = st.sampled_from([("llava", "llama"), ("llava", "qwen2"), ("llava_next", "mistral"), ("llava_next", "llama")])


@SETTINGS
@given(
    model=models,
    layout=st.lists(rows, min_size=1, max_size=4),
    attention=attention,
    blocks=frozen_blocks(),
    kept=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 9),
)
@example(("llava", "llama"), ["I"], ("sdpa", "left"), {"layers": [0, 1, 2, 3]}, 1, 0)
@example(("llava", "llama"), ["IIII", "t"], ("eager", "right"), {"layers": [3, 2, 1, 0]}, 0, 0)
@example(("llava_next", "llama"), ["IttII", "tttt", "I"], ("sdpa", "both"), {"attention": [0, 1, 2, 3]}, 0, 0)
@torch.no_grad()
def test_any_layout(model, layout, attention, blocks, kept, seed):
    attn_implementation, side = attention
    stock, ours = tiny.pair(*model, attn_implementation=attn_implementation)
    tiny.freeze(ours, **blocks)
    inputs = tiny.batch(stock, model[0], layout, side, seed)
    with tiny.frozen(stock, **blocks):
        expected = stock(**inputs, logits_to_keep=kept).logits
    actual = ours(**inputs, logits_to_keep=kept).logits
    real = inputs["attention_mask"].bool()[:, -kept:]
    torch.testing.assert_close(actual[real], expected[real], **tiny.CLOSE)


@SETTINGS
@given(
    turns=st.lists(st.lists(rows, min_size=2, max_size=2), min_size=2, max_size=3),
    blocks=frozen_blocks(),
    sliding=st.booleans(),
)
@torch.no_grad()
def test_any_turns(turns, blocks, sliding):
    """Each goes on from the cache that the one before it left."""
    stock, ours = tiny.pair("llava", "mistral", sliding_window=7 if sliding else None)
    ours.set_replaced_layers(blocks["layers"], blocks["attention"], blocks["ffn"])
    caches, mask = [None, None], torch.ones(2, 0, dtype=torch.long)
    for turn, layout in enumerate(turns):
        inputs = tiny.batch(stock, "llava", layout, seed=turn)
        real = inputs["attention_mask"].bool()
        mask = inputs["attention_mask"] = torch.cat([mask, inputs["attention_mask"]], dim=1)
        with tiny.frozen(stock, **blocks):
            expected = stock(**inputs, past_key_values=caches[0], use_cache=True)
        actual = ours(**inputs, past_key_values=caches[1], use_cache=True)
        torch.testing.assert_close(actual.logits[real], expected.logits[real], **tiny.CLOSE)
        caches = [expected.past_key_values, actual.past_key_values]


sizes = st.sampled_from([-(10**400), -1, 0, 1, 2, 3, 4, 5, 64, 2**31, 2**63, 10**30, 10**400])
numbers = sizes | st.floats() | st.booleans()
junk = st.recursive(
    st.none() | numbers | st.text(max_size=4) | st.sampled_from(["3", "llama", "clip", "gelu"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def entries() -> dict:
    """The config.json of a tiny model, as read from a file."""
    return json.loads(ShortVLlavaConfig(**tiny.config_dict(num_hidden_layers=2)).to_json_string(use_diff=False))


layer_lists = st.lists(st.integers(0, 1), unique=True) | st.lists(st.integers(-1, 2) | junk, max_size=3) | junk
score_lists = st.lists(st.floats(0, 1) | numbers, min_size=1, max_size=3) | junk


@SETTINGS
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(LISTS, layer_lists) | {"lc_scores": score_lists})
    | st.fixed_dictionaries({"calibration": junk, "lc_scores": st.lists(st.floats(0, 1), min_size=2, max_size=2)})
)
@example({"replaced_layers": [1, 0], "lc_scores": [0.5, 10**400]})
@example({"replaced_layers": [10**400]})
@example({"replaced_layers": [[0]], "replaced_ffn_layers": {"0": 1}})
@example({"replaced_layers": [1], "replaced_ffn_layers": [0], "lc_scores": [1, 0.5], "calibration": {}})
@torch.no_grad()
def test_any_value_of_our_own_entries(own):
    """A ValueError that names the entry, or a model that runs as the hooked one."""
    given = entries() | own
    try:
        config = ShortVLlavaConfig.from_dict(copy.deepcopy(given))
    except ValueError as error:
        assert any(name in str(error) for name in own)
        return
    for name, value in own.items():
        assert getattr(config, name) == value
    stock = tiny.CLASSES["llava"][1](tiny.CLASSES["llava"][0](**tiny.config_dict(num_hidden_layers=2)))
    stock, ours = stock.double().eval(), ShortVLlavaForConditionalGeneration(config).double().eval()
    ours.load_state_dict(stock.state_dict())
    inputs = tiny.batch(stock, "llava", ["ttItt", "Itttt"])
    blocks = {block: own.get(name, ()) for block, name in zip(("layers", "attention", "ffn"), LISTS)}
    with tiny.frozen(stock, **blocks):
        expected = stock(**inputs).logits
    torch.testing.assert_close(ours(**inputs).logits, expected, **tiny.CLOSE)


def built(model_class, config):
    """The shapes of a model's tensors, or what building it raises. Nothing is allocated."""
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
    except Exception as error:
        return type(error)


@st.composite
def spoilt_entries(draw):
    given = entries()
    for _ in range(draw(st.integers(1, 2))):
        part = draw(st.sampled_from([None, "text_config", "vision_config"]))
        where = given[part] if part and isinstance(given[part], dict) else given
        known = sorted(where.keys() - {*LISTS, "lc_scores", "calibration"})
        of_numbers = [key for key in known if type(where[key]) is int]
        key, value = draw(
            st.tuples(st.sampled_from(of_numbers or [""]), sizes)  # none are left in a part that is junk itself
            | st.tuples(st.sampled_from(known or [""]), junk)
            | st.tuples(st.text(max_size=5), junk)
        )
        where[key] = value
    return given


@SETTINGS
@given(spoilt_entries())
def test_any_value_of_other_entries(given):
    """The model or the error that stock LLaVA makes of it. ValueError may stand for any error, and refuses a number of
    layers that is no integer."""
    stock_config_class, stock_class, _, our_class = tiny.CLASSES["llava"]
    plain = {key: value for key, value in given.items() if key not in (*LISTS, "lc_scores", "calibration", "auto_map")}
    try:
        stock_config = stock_config_class.from_dict(copy.deepcopy(plain | {"model_type": "llava"}))
        stock_error = None
    except Exception as error:
        stock_error = type(error)
    try:
        config = ShortVLlavaConfig.from_dict(copy.deepcopy(given))
    except Exception as error:
        if stock_error is None:
            assert type(error) is ValueError and "num_hidden_layers must be an integer" in str(error)
            assert type(stock_config.text_config.num_hidden_layers) is not int
        else:
            assert isinstance(error, ValueError) or type(error) is stock_error
        return
    assert stock_error is None
    depths = [getattr(part, "num_hidden_layers", 0) for part in (config.text_config, config.vision_config)]
    if any(isinstance(depth, (int, float)) and depth > 5 for depth in depths):
        return  # layer upon layer until the memory is full, in stock LLaVA too
    assert built(our_class, config) == built(stock_class, stock_config)


def test_threads_generate_at_once():
    """Each gets what it gets alone, whatever the others do: nothing of a forward pass stays on the model."""
    _, ours = tiny.pair()
    ours.set_replaced_layers([3, 1], attention=[2], ffn=[0])
    layouts = [["ttIttt"], ["Ittt", "tttttI"], ["tttt"], ["tIttItt", "ttt"], ["IIt"], ["tttIttttt", "ItI", "ttt"]]
    batches = [tiny.batch(ours, "llava", layout, seed=seed) for seed, layout in enumerate(layouts)] * 4

    def answer(inputs):
        return ours.generate(**inputs, max_new_tokens=6, suppress_tokens=[tiny.END_TOKEN, tiny.IMAGE_TOKEN])

    expected = [answer(inputs) for inputs in batches]
    with ThreadPoolExecutor(4) as pool:
        for actual, alone in zip(pool.map(answer, batches), expected):
            assert torch.equal(actual, alone)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.slow
@torch.no_grad()
def test_memory_is_stable_over_a_thousand_prefills():
    _, ours = tiny.pair()
    ours.set_replaced_layers([3, 1], attention=[2], ffn=[0])
    layouts = ["t" * 90 + "I", "I" + "t" * 50], ["ttIt", "tIttI" + "t" * 80], ["t" * 99]
    batches = [tiny.batch(ours, "llava", layout) for layout in layouts]

    def prefill(times):
        """Bytes of the keys and values that were made."""
        made = 0
        for index in range(times):
            cache = ours(**batches[index % len(batches)], use_cache=True, logits_to_keep=1).past_key_values
            made += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return made

    prefill(100)  # what is kept for all later ones is there now
    tensors, resident = live_tensors(), psutil.Process().memory_info().rss
    made = prefill(1000)
    assert live_tensors() == tensors
    assert psutil.Process().memory_info().rss - resident < made / 10
