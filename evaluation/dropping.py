"""FastV and VTW with tokens really dropped: later layers of a prefill get fewer tokens and have shorter caches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shortv_llava.calibrate.contribution import last_tokens
from shortv_llava.chat.prompts import visual_tokens
from shortv_llava.checkpoint.loading import cache_name, text_decoder
from shortv_llava.evaluation.hiding import (
    by_name,
    check_family,
    forward_pre_hooks,
    last_row_attention,
    most_attended,
    seen_before,
)
from shortv_llava.evaluation.methods import Dropping
from shortv_llava.modeling_shortv_llava import FrozenTokens


@contextmanager
def dropped(model, dropping: Dropping | None) -> Iterator[None]:
    """Make the model drop visual tokens within the context; with None it drops none.

    Kept tokens keep their order and their positions. A pass with an empty cache is a prompt, any other pass generates.
    Rows must have no padding and equal numbers of visual tokens. The score of FastV computes one layer's keys a second
    time.

    Args:
        model: LLaVA or ShortV LLaVA with its head, with SDPA or eager attention.

    Raises:
        ShortVError: if the model is none of LLaVA's families.
    """
    if dropping is None:
        yield
        return
    check_family(model.config)
    dropper, layers = _Dropper(model, dropping), text_decoder(model).layers
    hooks = [(model.model, dropper.begin), (layers[dropping.layer - 1].self_attn, dropper.choose)]
    with forward_pre_hooks([*hooks, *((layer, dropper.drop) for layer in layers[dropping.layer :])]):
        yield


class _Dropper:
    """Forward pre-hooks, and their state for the current pass.

    Attributes:
        is_prompt: whether the pass is a prompt.
        ids: token ids of the pass (B, S).
        left: index (B, T) of the kept tokens.
        given: keyword arguments of all later layers, for the kept tokens.
    """

    def __init__(self, model, dropping: Dropping):
        self.config, self.dropping = model.config, dropping

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = by_name(module, args, kwargs)
        self.ids, self.is_prompt = given["input_ids"], seen_before(given) == 0

    def choose(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.is_prompt:
            return
        visual = visual_tokens(self.config, self.ids).to(kwargs["hidden_states"].device)
        left = ~visual
        if self.dropping.share < 1:
            weights = last_row_attention(attention, last_tokens(visual, None), **kwargs)
            left = left | most_attended(weights, visual, self.dropping)
        self.left = left.nonzero()[:, 1].view(len(left), -1)
        self.frozen, self.given = visual.gather(1, self.left), None

    def drop(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not self.is_prompt:
            mask = kwargs["attention_mask"]
            if mask is not None:  # without padding only its number of keys matters
                seen = kwargs[cache_name()].get_seq_length(layer.self_attn.layer_idx)
                kwargs = kwargs | {"attention_mask": mask[..., : seen + args[0].shape[1]]}
            return args, kwargs
        if self.given is None:
            args, self.given = (self._rows(args[0]), *args[1:]), self._gather(kwargs)
        return args, kwargs | self.given

    def _rows(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) of (B or 1, S, ...)."""
        states, left = states.expand(len(self.left), *states.shape[1:]), self.left.to(states.device)
        return states[torch.arange(len(left), device=states.device)[:, None], left]

    def _gather(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's keyword arguments with one entry a token, for the kept tokens only."""
        given = {"position_embeddings": tuple(map(self._rows, kwargs["position_embeddings"]))}
        mask = kwargs["attention_mask"]
        if mask is not None:
            rows = self._rows(mask.transpose(1, 2)).transpose(1, 2)  # (B, 1, T, S)
            left = self.left.to(rows.device)[:, None, None]
            given["attention_mask"] = rows.gather(3, left.expand(*rows.shape[:3], -1))
        if "frozen_tokens" in kwargs:
            tokens = kwargs["frozen_tokens"]
            of_left = FrozenTokens(self.frozen, tokens.attention_layers, tokens.ffn_layers)
            given["frozen_tokens"] = of_left if self.frozen.any() else None
        return given
