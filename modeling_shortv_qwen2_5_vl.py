"""Qwen2.5-VL with ShortV. The windows of its vision tower's attention are as in stock."""

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention, Qwen2_5_VLDecoderLayer

from .configuration_shortv_llava import ShortVConfigMixin
from .modeling_shortv_llava import ShortVMixin, add_backbone, register
from .modeling_shortv_qwen2_vl import ShortVMropeAttention, ShortVQwen2VLForConditionalGeneration


class ShortVQwen2_5_VLConfig(ShortVConfigMixin, Qwen2_5_VLConfig):
    model_type = "shortv_qwen2_5_vl"


class ShortVQwen2_5_VLForConditionalGeneration(ShortVMixin, Qwen2_5_VLForConditionalGeneration):
    config_class = ShortVQwen2_5_VLConfig
    saved_names = ShortVQwen2VLForConditionalGeneration.saved_names


add_backbone(Qwen2_5_VLDecoderLayer, Qwen2_5_VLAttention, attention_mixin=ShortVMropeAttention)
register(ShortVQwen2_5_VLForConditionalGeneration)
