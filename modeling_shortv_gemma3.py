"""Gemma 3 with ShortV. Frozen are the states of visual tokens; text attends to them through stock's masks."""

from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3DecoderLayer

from .configuration_shortv_llava import ShortVConfigMixin
from .modeling_shortv_llava import ShortVAttention, ShortVDecoderLayer, ShortVMixin, add_backbone, register


class ShortVGemma3DecoderLayer(ShortVDecoderLayer):
    """Gemma 3's layers norm what a block adds, too."""

    def ffn_norm(self, states: torch.Tensor) -> torch.Tensor:
        return self.pre_feedforward_layernorm(states)

    def add(self, states: torch.Tensor, update: torch.Tensor, block: str) -> torch.Tensor:
        norm = self.post_attention_layernorm if block == "attention" else self.post_feedforward_layernorm
        return states + norm(update)


class ShortVGemma3Attention(ShortVAttention):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if "position_embeddings_local" in kwargs:  # stock layers of transformers 4 choose between these
            rotary = [kwargs.pop(f"position_embeddings_{reach}") for reach in ("global", "local")]
            kwargs["position_embeddings"] = rotary[self.is_sliding]
        return super().forward(*args, **kwargs)


class ShortVGemma3Config(ShortVConfigMixin, Gemma3Config):
    model_type = "shortv_gemma3"


class ShortVGemma3ForConditionalGeneration(ShortVMixin, Gemma3ForConditionalGeneration):
    config_class = ShortVGemma3Config


add_backbone(Gemma3DecoderLayer, Gemma3Attention, ShortVGemma3DecoderLayer, ShortVGemma3Attention)
register(ShortVGemma3ForConditionalGeneration)
