"""Idefics3 with ShortV."""

from torch import nn
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from .configuration_shortv_llava import ShortVConfigMixin
from .modeling_shortv_llava import ShortVMixin, register


class ShortVIdefics3Config(ShortVConfigMixin, Idefics3Config):
    model_type = "shortv_idefics3"


class ShortVIdefics3ForConditionalGeneration(ShortVMixin, Idefics3ForConditionalGeneration):
    config_class = ShortVIdefics3Config
    saved_names = {}  # the model's own

    def get_decoder(self) -> nn.Module:
        return self.model.text_model  # not found by transformers 4


register(ShortVIdefics3ForConditionalGeneration)
