"""SmolVLM and SmolVLM2 with ShortV."""

from torch import nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from .configuration_shortv_llava import ShortVConfigMixin
from .modeling_shortv_llava import ShortVMixin, register


class ShortVSmolVLMConfig(ShortVConfigMixin, SmolVLMConfig):
    model_type = "shortv_smolvlm"


class ShortVSmolVLMForConditionalGeneration(ShortVMixin, SmolVLMForConditionalGeneration):
    config_class = ShortVSmolVLMConfig
    saved_names = {}  # the model's own

    def get_decoder(self) -> nn.Module:
        return self.model.text_model  # not found by transformers 4


register(ShortVSmolVLMForConditionalGeneration)
