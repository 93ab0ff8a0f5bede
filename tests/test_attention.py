"""Attention kernels besides SDPA and eager attention: flex's, and a stand-in with the contract of flash's."""

import copy
import inspect

import pytest
import tiny
import torch
from transformers import modeling_flash_attention_utils as flash

LAYOUTS = {
    "one image": ["tttIttttt", "tItttItt"],
    "uneven rows": ["tttttt", "ttIttt", "tIttItt"],
}
FROZEN = {"layers": {"layers": (3, 2, 1)}, "mixed blocks": {"layers": (3,), "attention": (0, 1), "ffn": (2,)}}


def attend(query, key, value, causal, window, scale):
    """What FlashAttention computes: (queries, heads, head size) of one sequence, masks aligned at the end."""
    heads = query.shape[1]
    key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    distance = torch.arange(len(key)) - torch.arange(len(query))[:, None] - (len(key) - len(query))
    unseen = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        unseen |= distance > 0
    if window[0] >= 0:
        unseen |= distance < -window[0]
    weights = scores.masked_fill(unseen, -torch.inf).softmax(dim=-1).nan_to_num()
    return torch.einsum("hqk,khd->qhd", weights, value)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    return torch.stack([attend(*row, causal, window_size, softmax_scale) for row in zip(q, k, v)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
):  # fmt: skip
    parts = zip(*(states.tensor_split(cu_seqlens_k[1:-1].tolist()) for states in (k, v)))
    queries = q.tensor_split(cu_seqlens_q[1:-1].tolist())
    return torch.cat([attend(a, *b, causal, window_size, softmax_scale) for a, b in zip(queries, parts)])


@pytest.fixture
def flash_kernel(monkeypatch):
    """The stand-in in place of the package flash_attn."""
    found = [flash_attn_func, flash_attn_varlen_func, flash._pad_input, flash._unpad_input]
    if "attention_wrapper" in inspect.signature(flash._lazy_imports).parameters:  # transformers 5 reads a fifth
        found.insert(2, None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: found)
    for name in ("_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(flash, name, None)
    monkeypatch.setattr(flash, "_loaded_implementation", None, raising=False)


def make_pair(implementation, family="llava", backbone="llama", **text):
    """(stock, ours) whose language model has this implementation; nothing asks whether the kernels are installed."""
    stock, ours = copy.deepcopy(tiny.pair(family, backbone, **text))
    for model in (stock, ours):
        model.model.language_model.config._attn_implementation = implementation
    return stock, ours


@torch.no_grad()
def assert_equal_to_hooked(stock, ours, inputs, blocks):
    tiny.freeze(ours, **blocks)
    real = inputs["attention_mask"].bool()
    with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, **blocks):
        expected = stock(**inputs).logits
    torch.testing.assert_close(ours(**inputs).logits[real], expected[real], **tiny.CLOSE)
    last = real[:, -1]
    torch.testing.assert_close(ours(**inputs, logits_to_keep=1).logits[last, 0], expected[last, -1], **tiny.CLOSE)


@pytest.mark.parametrize("blocks", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", [("llava", "llama"), ("llava", "mistral"), ("llava_next", "qwen2")], ids="-".join)
def test_flash_attention(flash_kernel, model, layout, side, blocks):
    stock, ours = make_pair("flash_attention_2", *model)
    assert_equal_to_hooked(stock, ours, tiny.batch(stock, model[0], layout, side), blocks)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_sliding_window(flash_kernel, implementation):
    stock, ours = make_pair(implementation, backbone="mistral", sliding_window=4)
    for side in ("left", "right"):
        inputs = tiny.batch(stock, "llava", ["tttIttttt", "tItttItt"], side)
        assert_equal_to_hooked(stock, ours, inputs, {"layers": (3, 1), "attention": (0,)})


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
@torch.no_grad()
def test_turns_with_a_kept_cache(flash_kernel, uncompiled, implementation):
    stock, ours = make_pair(implementation)
    ours.set_replaced_layers([3, 2, 0])
    caches, mask = {}, torch.ones(2, 0, dtype=torch.long)
    for turn, layout in enumerate((["ttIttt", "tttItt"], ["t", "t"], ["tItI", "tIIt"])):
        inputs = tiny.batch(stock, "llava", layout, seed=turn)
        mask = inputs["attention_mask"] = torch.cat([mask, inputs["attention_mask"]], dim=1)
        with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, layers=(3, 2, 0)):
            expected = stock(**inputs, past_key_values=caches.get("stock"), use_cache=True)
        actual = ours(**inputs, past_key_values=caches.get("ours"), use_cache=True)
        torch.testing.assert_close(actual.logits, expected.logits, **tiny.CLOSE)
        caches = {"stock": expected.past_key_values, "ours": actual.past_key_values}


@pytest.fixture
def uncompiled():
    """flex_attention is compiled for each shape, by a C++ compiler on a CPU; its eager version computes the same."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", [("llava", "llama"), ("llava", "mistral"), ("llava_next", "qwen2")], ids="-".join)
def test_flex_attention(uncompiled, model, layout):
    stock, ours = make_pair("flex_attention", *model)
    for side, blocks in zip(("left", "right"), FROZEN.values()):
        assert_equal_to_hooked(stock, ours, tiny.batch(stock, model[0], layout, side), blocks)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_the_kernels_are_chosen_as_for_stock(implementation):
    for _, stock_class, _, our_class in tiny.CLASSES.values():
        name = "_supports_" + implementation.replace("attention_2", "attn").replace("attention", "attn")
        assert getattr(our_class, name) == getattr(stock_class, name) is True
