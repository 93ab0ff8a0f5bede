"""FastV and VTW with masks: answers of a model that drops some or all visual tokens from a layer on.

The tokens stay in place, and masks hide them: no token attends to them from that layer on, in the prompt and in
generation. So answers equal those of a model that drops the tokens, up to rounding, for any batch, padding and number
of pictures, on LLaVA and on ShortV. `evaluation/dropping.py` really drops tokens, to measure the time that this saves.
Shapes: B rows of S tokens, K keys, h hidden size, d head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shortv_llava import LLAVA_FAMILIES
from shortv_llava.calibrate.contribution import last_tokens
from shortv_llava.chat.prompts import visual_tokens
from shortv_llava.checkpoint.loading import cache_name, text_decoder
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.methods import Dropping
from shortv_llava.modeling_shortv_llava import rotate


@contextmanager
def hidden(model, dropping: Dropping | None) -> Iterator[None]:
    """Make the model answer as if it dropped visual tokens within the context; with None nothing changes.

    A prompt must be one forward pass with token ids, and its rows must keep their order in the cache.
    FastV ranks the visual tokens of all pictures of a row together, by the attention of the last non-padding token.

    Args:
        model: LLaVA or ShortV LLaVA with its head.

    Raises:
        ShortVError: if the model is none of LLaVA's families, or its attention is neither `sdpa` nor `eager`.
        ValueError: in a forward pass with a non-empty cache, if its tokens include visual tokens.
    """
    if dropping is None:
        yield
        return
    check_family(model.config)
    implementation = model.config.text_config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ShortVError(f"a method that drops visual tokens needs sdpa or eager attention, not {implementation!r}")
    hiding, layers = _Hiding(model, dropping), text_decoder(model).layers
    hooks = [(model.model, hiding.begin)]
    if dropping.share < 1:
        hooks.append((layers[dropping.layer - 1].self_attn, hiding.choose))
    with forward_pre_hooks([*hooks, *((layer, hiding.hide) for layer in layers[dropping.layer :])]):
        yield


def check_family(config) -> None:
    """Raises [`ShortVError`] for a model whose masks and positions differ by layer, or may."""
    family = config.model_type.removeprefix("shortv_")
    if family not in LLAVA_FAMILIES:
        raise ShortVError(f"methods that drop visual tokens run with LLaVA's families alone, not with {family}")


@contextmanager
def forward_pre_hooks(hooks: Sequence[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Register these hooks, which also get keyword arguments, within the context."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Hiding:
    """Forward pre-hooks, and their state for the current pass and its prompt.

    Attributes:
        past: number of tokens in the cache before the pass.
        visual, last: the prompt's visual tokens, boolean (B, S), and its last tokens, (B,).
        dropped: dropped tokens, boolean (B, S); None before they are chosen.
        masks: masks of this pass, with the mask that each was made from, by the id of that mask.
    """

    def __init__(self, model, dropping: Dropping):
        self.config, self.dropping = model.config, dropping

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook of LLaVA without head: a pass with an empty cache is a prompt."""
        given = by_name(module, args, kwargs)
        self.past, self.masks = seen_before(given), {}
        visual = visual_tokens(self.config, given["input_ids"])
        if self.past == 0:
            self.visual, self.last = visual, last_tokens(visual, given.get("attention_mask"))
            self.dropped = visual if self.dropping.share == 1 else None
        elif visual.any():
            raise ValueError("visual tokens on top of a cache: which are dropped depends on the whole prompt")

    def choose(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook of the attention of the last layer that sees all visual tokens: choose the tokens to drop."""
        if self.dropped is None:
            weights = last_row_attention(attention, self.last, **kwargs)
            visual = self.visual.to(weights.device)
            self.dropped = visual & ~most_attended(weights, visual, self.dropping)

    def hide(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Hook of each later layer: hide the dropped tokens in its mask."""
        given = kwargs["attention_mask"]
        if id(given) not in self.masks:  # one for all layers with the same mask
            self.masks[id(given)] = given, self._mask(given, args[0])
        return args, kwargs | {"attention_mask": self.masks[id(given)][1]}

    def _mask(self, given: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
        """(B, 1, S, K), stock's mask, or the causal mask if stock left it to SDPA, with the dropped tokens hidden.

        A dropped token still attends to itself, because attention of an empty row is undefined.
        """
        seen = self.past + states.shape[1]
        num_keys = seen if given is None else given.shape[-1]  # a static cache has more keys than tokens seen
        device = states.device if given is None else given.device
        dropped = F.pad(self.dropped.to(device), (0, num_keys - self.dropped.shape[1]))
        query = torch.arange(self.past, seen, device=device)[:, None]
        key = torch.arange(num_keys, device=device)
        hidden = dropped[:, None, None] & (query != key)
        if given is None:
            return (key <= query) & ~hidden
        if given.dtype == torch.bool:
            return given & ~hidden
        return given.masked_fill(hidden, torch.finfo(given.dtype).min)


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of transformers' module, by parameter name; LLaVA-NeXT passes ids by position."""
    return dict(zip(type(module).forward.__annotations__, args)) | kwargs  # stock annotates every parameter


def seen_before(given: dict[str, Any]) -> int:
    """Number of tokens in the cache before a pass."""
    cache = given.get(cache_name())
    return 0 if cache is None else int(cache.get_seq_length())


def last_row_attention(
    attention: nn.Module,
    last: torch.Tensor,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention of one token of each row to all, mean over heads: (B, S), in float32 or the states' dtype if finer.

    Args:
        attention: attention module of a layer; the arguments after `last` are those of the layer's call.
        last: (B,), index of the token.
        hidden_states: (B, S, h), normed states of a pass with an empty cache.
        position_embeddings: cosines and sines, (B or 1, S, d).
        attention_mask: (B or 1, 1, S, K), boolean or to be added; None for causal attention without padding.
    """
    number, length = hidden_states.shape[:2]
    rows, last = torch.arange(number, device=hidden_states.device), last.to(hidden_states.device)

    def heads(states: torch.Tensor, norm: str) -> torch.Tensor:  # (B, N, heads * d) to (B, heads, N, d)
        states = states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        return getattr(attention, norm, nn.Identity())(states)  # Qwen3 has one

    cos, sin = (states.expand(number, -1, -1) for states in position_embeddings)
    query = heads(attention.q_proj(hidden_states[rows, last][:, None]), "q_norm")
    query = rotate(query, cos[rows, last][:, None], sin[rows, last][:, None])
    key = rotate(heads(attention.k_proj(hidden_states), "k_norm"), cos, sin)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(2, 3))[:, :, 0] * attention.scaling  # (B, heads, S)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attention_mask is None:
        visible = torch.arange(length, device=last.device) <= last[:, None]
    else:
        visible = attention_mask.expand(number, -1, -1, -1)[rows, 0, last, :length]
    if visible.dtype == torch.bool:
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    else:
        scores = scores + visible[:, None]
    return scores.softmax(dim=-1).mean(dim=1)


def most_attended(weights: torch.Tensor, visual: torch.Tensor, dropping: Dropping) -> torch.Tensor:
    """Which of each row's visual tokens (B, S) are kept, by their attention weights (B, S); ties go to the first."""
    rank = weights.masked_fill(~visual, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = torch.tensor([dropping.kept(number) for number in visual.sum(dim=1).tolist()], device=weights.device)
    return visual & (rank < kept[:, None])
