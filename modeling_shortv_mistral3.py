"""Mistral 3 with ShortV, in the layout of transformers (`Mistral-Small-3.1-24B-Instruct-2503`)."""

from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from .configuration_shortv_llava import ShortVConfigMixin
from .modeling_shortv_llava import ShortVMixin, register


class ShortVMistral3Config(ShortVConfigMixin, Mistral3Config):
    model_type = "shortv_mistral3"


class ShortVMistral3ForConditionalGeneration(ShortVMixin, Mistral3ForConditionalGeneration):
    config_class = ShortVMistral3Config


register(ShortVMistral3ForConditionalGeneration)
