"""Qwen3-VL with ShortV. Stock adds DeepStack's features to visual tokens between layers, to frozen ones as to all."""

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextAttention, Qwen3VLTextDecoderLayer

from .configuration_shortv_llava import ShortVConfigMixin
from .modeling_shortv_llava import ShortVMixin, add_backbone, register


class ShortVQwen3VLConfig(ShortVConfigMixin, Qwen3VLConfig):
    model_type = "shortv_qwen3_vl"


class ShortVQwen3VLForConditionalGeneration(ShortVMixin, Qwen3VLForConditionalGeneration):
    config_class = ShortVQwen3VLConfig
    saved_names = {}  # the model's own


add_backbone(Qwen3VLTextDecoderLayer, Qwen3VLTextAttention)
register(ShortVQwen3VLForConditionalGeneration)
