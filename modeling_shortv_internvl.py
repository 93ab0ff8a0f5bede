"""InternVL with ShortV, in the layout of transformers (`InternVL3-8B-hf`, `InternVL3_5-8B-HF`)."""

from transformers import InternVLConfig, InternVLForConditionalGeneration

from .configuration_shortv_llava import ShortVConfigMixin
from .modeling_shortv_llava import ShortVMixin, register


class ShortVInternVLConfig(ShortVConfigMixin, InternVLConfig):
    model_type = "shortv_internvl"


class ShortVInternVLForConditionalGeneration(ShortVMixin, InternVLForConditionalGeneration):
    config_class = ShortVInternVLConfig


register(ShortVInternVLForConditionalGeneration)
