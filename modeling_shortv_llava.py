"""LLaVA with ShortV layers: in the layers its configuration names, visual tokens are frozen.

In a frozen block the visual tokens are read-only memory. Frozen attention: they lend keys and values, made from their
unchanged hidden states with the layer's own weights, but ask no query. Frozen FFN: they skip it. Text tokens pass every
layer as ever, and so does a forward pass without images (decoding). Method: Yuan et al., "ShortV", ICCV 2025.

Shapes below: B rows, S tokens a row, of which T are computed and F = S - T frozen; h hidden size.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaModel, LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, rotate_half
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .configuration_shortv_llava import ShortVLlavaConfig, ShortVLlavaNextConfig


class Streams(NamedTuple):
    """Hidden states between two layers with frozen blocks, where there is no need to put them together."""

    computed: torch.Tensor  # (B, T, h)
    frozen: torch.Tensor  # (B, F, h)


class FrozenTokens:
    """Which tokens of one forward pass are frozen, and in which layers. Worked out once, handed to every layer.

    Rows may hold different numbers of frozen tokens: T is the largest number of others, and a row that has fewer fills
    its places with frozen ones, whose updates are dropped.

    Args:
        frozen (`torch.BoolTensor` of shape `(B, S)`): true for visual tokens and padding.
        attention_layers, ffn_layers (`frozenset[int]`): layers in which attention and FFN are frozen.
        keep_apart (`bool`): whether consecutive frozen layers may exchange [`Streams`].
    """

    def __init__(self, frozen, attention_layers, ffn_layers, keep_apart):
        self.attention_layers, self.ffn_layers, self.keep_apart = attention_layers, ffn_layers, keep_apart
        num_computed = (~frozen).sum(dim=1).cpu()
        length = max(1, int(num_computed.max()))  # attention modules take no empty sequence
        order = frozen.to(torch.int8).argsort(dim=1, stable=True)
        self.computed_index, self.frozen_index = order[:, :length], order[:, length:]
        self.row = torch.arange(frozen.shape[0], device=frozen.device)[:, None]
        even = bool((num_computed == length).all())
        self.dropped = None if even else frozen[self.row, self.computed_index].unsqueeze(-1)
        self.inputs = None, None, None

    def any_in(self, layer):
        return layer in self.attention_layers or layer in self.ffn_layers

    def split(self, states):
        """(B, S, ...) to (B, T, ...) and (B, F, ...)."""
        return Streams(states[self.row, self.computed_index], states[self.row, self.frozen_index])

    def join(self, computed, frozen):
        """(B, T, ...) and (B, F, ...) to (B, S, ...) in the order of the sequence."""
        joined = computed.new_empty(computed.shape[0], computed.shape[1] + frozen.shape[1], *computed.shape[2:])
        joined[self.row, self.computed_index] = computed
        joined[self.row, self.frozen_index] = frozen
        return joined

    def drop(self, update):
        """Zero the updates (B, T, h) of the frozen tokens that fill up uneven rows."""
        return update if self.dropped is None else update.masked_fill(self.dropped, 0)

    def attention_inputs(self, attention_mask, position_embeddings):
        """The mask rows of the computed tokens, and the rotary embeddings of both kinds; made once a pass."""
        if self.inputs[0] is not attention_mask or self.inputs[1] is not position_embeddings:
            num_rows, length = self.row.shape[0], position_embeddings[0].shape[1]
            if attention_mask is not None:
                mask = attention_mask.expand(num_rows, -1, -1, -1).transpose(1, 2)
                rows = mask[self.row, self.computed_index].transpose(1, 2)
            elif length > 1:  # SDPA's plain causal attention, over these tokens alone
                positions = torch.arange(length, device=self.row.device)
                rows = (positions <= self.computed_index[:, :, None])[:, None]
            else:
                rows = None
            computed, frozen = zip(*(self.split(part.expand(num_rows, -1, -1)) for part in position_embeddings))
            self.inputs = attention_mask, position_embeddings, (rows, computed, frozen)
        return self.inputs[2]


class FrozenMemory:
    """Stands in for the cache of one layer: adds the frozen tokens' keys and values to those of the computed ones."""

    def __init__(self, key, value, tokens, cache, mask):
        self.key, self.value, self.tokens, self.cache = key, value, tokens, cache
        self.length = None if mask is None else mask.shape[-1]

    def update(self, key, value, *args, **kwargs):
        """(B, heads, T, head size) twice, to the keys and values that the T tokens may attend to."""
        key, value = (
            self.tokens.join(new.transpose(1, 2), memory).transpose(1, 2)
            for new, memory in ((key, self.key), (value, self.value))
        )
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        return key[:, :, : self.length], value[:, :, : self.length]  # a static cache returns its empty places too


class ShortVDecoderLayerMixin:
    """A decoder layer in which attention, FFN or both may be frozen for some tokens; otherwise the stock layer."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        past_key_values=None,
        frozen_tokens=None,
        **kwargs,
    ):
        kwargs.update(position_embeddings=position_embeddings, past_key_values=past_key_values)
        tokens, layer = frozen_tokens, self.self_attn.layer_idx
        if tokens is None or not tokens.any_in(layer):
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)

        if layer in tokens.attention_layers:
            streams = hidden_states if isinstance(hidden_states, Streams) else tokens.split(hidden_states)
            update = self.attend_to_frozen(streams, attention_mask, tokens, **kwargs)
            computed, frozen = streams.computed + tokens.drop(update), streams.frozen
        else:
            if isinstance(hidden_states, Streams):
                hidden_states = tokens.join(*hidden_states)
            normed = self.input_layernorm(hidden_states)
            update, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
            computed, frozen = tokens.split(hidden_states + update)

        update = self.mlp(self.post_attention_layernorm(computed))
        if layer in tokens.ffn_layers:
            computed = computed + tokens.drop(update)
        else:
            computed = computed + update
            frozen = frozen + self.mlp(self.post_attention_layernorm(frozen))

        if tokens.keep_apart and tokens.any_in(layer + 1):
            return Streams(computed, frozen)
        return tokens.join(computed, frozen)

    def attend_to_frozen(self, streams, attention_mask, tokens, position_embeddings, past_key_values, **kwargs):
        """The stock attention module on the computed tokens, with the frozen ones as memory. Returns (B, T, h)."""
        rows, computed_rotary, (cos, sin) = tokens.attention_inputs(attention_mask, position_embeddings)
        attention = self.self_attn
        states = self.input_layernorm(streams.frozen)
        key, value = (
            project(states).unflatten(-1, (-1, attention.head_dim)) for project in (attention.k_proj, attention.v_proj)
        )
        key = key * cos.unsqueeze(2) + rotate_half(key) * sin.unsqueeze(2)
        update, _ = attention(
            hidden_states=self.input_layernorm(streams.computed),
            attention_mask=rows,
            position_embeddings=computed_rotary,
            past_key_values=FrozenMemory(key, value, tokens, past_key_values, rows),
            **kwargs,
        )
        return update


class ShortVLlamaDecoderLayer(ShortVDecoderLayerMixin, LlamaDecoderLayer):
    pass


class ShortVMistralDecoderLayer(ShortVDecoderLayerMixin, MistralDecoderLayer):
    pass


class ShortVQwen2DecoderLayer(ShortVDecoderLayerMixin, Qwen2DecoderLayer):
    pass


SHORTV_LAYERS = {
    LlamaDecoderLayer: ShortVLlamaDecoderLayer,
    MistralDecoderLayer: ShortVMistralDecoderLayer,
    Qwen2DecoderLayer: ShortVQwen2DecoderLayer,
}


class ShortVModelMixin:
    """LLaVA's model, without head: finds the visual tokens of a forward pass and tells the layers."""

    _no_split_modules = [layer.__name__ for layer in SHORTV_LAYERS.values()]
    _supports_flash_attn = False  # its kernels have no mask for queries on both sides of an image
    _supports_flex_attn = False

    def __init__(self, config):
        super().__init__(config)
        for layer in self.language_model.layers:
            if type(layer) not in SHORTV_LAYERS:
                supported = ", ".join(stock.__name__.removesuffix("DecoderLayer") for stock in SHORTV_LAYERS)
                raise ValueError(
                    f"text backbone {config.text_config.model_type!r} is not supported; those are: {supported}"
                )
            layer.__class__ = SHORTV_LAYERS[type(layer)]  # adds behaviour, no state: checkpoints load as they are

    def set_replaced_layers(self, replaced_layers=(), attention=(), ffn=()):
        """Freeze visual tokens in other layers from now on, see [`ShortVConfigMixin`]. The weights stay as they are."""
        self.config.set_replaced_layers(replaced_layers, attention, ffn)

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, inputs_embeds=None, **kwargs):
        if pixel_values is not None or kwargs.get("mm_encoder_outputs"):
            attention_layers, ffn_layers = self.config.frozen_layers()
            if attention_layers or ffn_layers:
                frozen = self.visual_positions(input_ids, inputs_embeds)
                if attention_mask is not None and attention_mask.dim() == 2:  # nobody reads padding
                    frozen = frozen | (attention_mask[:, -frozen.shape[1] :] == 0).to(frozen.device)
                keep_apart = not torch.is_grad_enabled() and not kwargs.get("output_hidden_states")
                kwargs["frozen_tokens"] = FrozenTokens(frozen, attention_layers, ffn_layers, keep_apart)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def visual_positions(self, input_ids, inputs_embeds):
        """(B, S), true where LLaVA puts image features: the placeholders, in ids or in embeddings."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(dim=-1)


class ShortVLlavaModel(ShortVModelMixin, LlavaModel):
    config_class = ShortVLlavaConfig


class ShortVLlavaNextModel(ShortVModelMixin, LlavaNextModel):
    config_class = ShortVLlavaNextConfig


class ShortVLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """[`LlavaForConditionalGeneration`] that freezes visual tokens in the layers named by its configuration."""

    config_class = ShortVLlavaConfig
    _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = ShortVLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def set_replaced_layers(self, replaced_layers=(), attention=(), ffn=()):
        """See [`ShortVModelMixin.set_replaced_layers`]."""
        self.model.set_replaced_layers(replaced_layers, attention, ffn)


class ShortVLlavaNextForConditionalGeneration(LlavaNextForConditionalGeneration):
    """[`LlavaNextForConditionalGeneration`] that freezes visual tokens in the layers named by its configuration."""

    config_class = ShortVLlavaNextConfig
    _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config):
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = ShortVLlavaNextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    set_replaced_layers = ShortVLlavaForConditionalGeneration.set_replaced_layers


for config_class, model_class in (
    (ShortVLlavaConfig, ShortVLlavaForConditionalGeneration),
    (ShortVLlavaNextConfig, ShortVLlavaNextForConditionalGeneration),
):
    model_class.register_for_auto_class("AutoModelForImageTextToText")  # `save_pretrained` then saves this file too
    # The pipeline and `transformers serve` look class names up here.
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config_class.model_type] = model_class.__name__

try:  # transformers 5 renames a checkpoint's tensors by tables that leave custom classes out; 4 by a class attribute
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    pass
else:
    for ours, stock in (
        ("shortv_llava", "llava"),
        ("shortv_llava_next", "llava_next"),
        ("ShortVLlavaModel", "LlavaModel"),
        ("ShortVLlavaNextModel", "LlavaNextModel"),
    ):
        if (renaming := get_checkpoint_conversion_mapping(stock)) is not None:
            register_checkpoint_conversion_mapping(ours, renaming, overwrite=True)
