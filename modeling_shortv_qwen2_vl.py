"""Qwen2-VL with ShortV."""

from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention, Qwen2VLDecoderLayer

from .configuration_shortv_llava import ShortVConfigMixin
from .modeling_shortv_llava import FrozenTokens, ShortVAttention, ShortVMixin, add_backbone, register


class ShortVMropeAttention(ShortVAttention):
    """For rotary rows of all three axes of positions, which transformers 4 hands to attention."""

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, frozen_tokens: FrozenTokens | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if frozen_tokens is not None and (rotary := kwargs["position_embeddings"])[0].dim() == 4:
            kwargs["position_embeddings"] = frozen_tokens.once("axes", rotary[0], (), lambda: self.fold(rotary))
        return super().forward(hidden_states, *args, frozen_tokens=frozen_tokens, **kwargs)

    def fold(self, rotary: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """(3, B, S, d), time, height and width, to (B, S, d): each section of d is that of one axis."""
        sections = self.rope_scaling["mrope_section"] * 2
        return [
            torch.cat([part[number % 3] for number, part in enumerate(rows.split(sections, dim=-1))], dim=-1)
            for rows in rotary
        ]


class ShortVQwen2VLConfig(ShortVConfigMixin, Qwen2VLConfig):
    model_type = "shortv_qwen2_vl"


class ShortVQwen2VLForConditionalGeneration(ShortVMixin, Qwen2VLForConditionalGeneration):
    config_class = ShortVQwen2VLConfig
    saved_names = {"model.visual.": "model.visual.", "model.language_model.": "model.language_model."}
    saved_names |= {"visual.": "model.visual.", "model.": "model.language_model."}


add_backbone(Qwen2VLDecoderLayer, Qwen2VLAttention, attention_mixin=ShortVMropeAttention)
register(ShortVQwen2VLForConditionalGeneration)
