"""LLaVA with ShortV layers: in the layers its configuration names, visual tokens are frozen.

In a frozen block the visual tokens are read-only memory. Frozen attention: they lend keys and values, made from their
unchanged hidden states with the layer's own weights, but ask no query. Frozen FFN: they skip it. Text tokens pass every
layer as ever, and so does a forward pass without images (decoding). Method: Yuan et al., "ShortV", ICCV 2025.

Shapes below: B rows, S tokens a row, of which T are computed and F = S - T frozen; h hidden size.
"""

import copy
import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoModel,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    PreTrainedModel,
    VipLlavaForConditionalGeneration,
    VipLlavaModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    eager_attention_forward,
)
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer

from .configuration_shortv_llava import (
    ShortVLlavaConfig,
    ShortVLlavaNextConfig,
    ShortVLlavaNextVideoConfig,
    ShortVLlavaOnevisionConfig,
    ShortVVipLlavaConfig,
)


class Streams(NamedTuple):
    """Hidden states between two layers with frozen blocks, where there is no need to put them together."""

    whole: torch.Tensor  # (B, S, h), out of date where tokens are computed
    computed: torch.Tensor  # (B, T, h)
    normalized: torch.Tensor | None  # `whole` divided by its rows' root mean squares, where layers share that


class FrozenTokens:
    """The frozen tokens of one forward pass, worked out once. The layers are handed one for each layer that has any.

    Rows may hold different numbers of frozen tokens: T is the largest number of others, and a row that has fewer fills
    its places with frozen ones, whose updates are dropped.

    Args:
        frozen (`torch.BoolTensor` of shape `(B, S)`, on the CPU): which tokens.
        attention_layers, ffn_layers (`Collection[int]`): layers in which attention and FFN are frozen for them.
        keep_apart (`bool`): whether consecutive layers with these frozen tokens may exchange [`Streams`].
        weights_asked (`bool`): whether somebody reads attention weights, (B, heads, S, keys) of each layer.
        device: of the hidden states.
    """

    def __init__(self, frozen, attention_layers, ffn_layers, keep_apart, weights_asked, device):
        self.attention_layers, self.ffn_layers = attention_layers, ffn_layers
        self.keep_apart, self.weights_asked = keep_apart, weights_asked
        self.length = frozen.shape[1]
        computed = ~frozen
        num_computed = computed.sum(dim=1).tolist()
        length = max(1, *num_computed)  # attention takes no empty sequence
        even = min(num_computed) == length
        if even:  # most prompts; what follows would sort all tokens of theirs
            index = computed.nonzero()[:, 1].view(-1, length)
        else:
            index = frozen.to(torch.int8).argsort(dim=1, stable=True)[:, :length]
        # Text around images apart, as (start, stop, end): computed tokens start:stop see nothing from position end on.
        ends = (index.amax(dim=0).cummax(dim=0).values + 1).tolist()
        stops = [*(stop for stop in range(1, length) if ends[stop] > ends[stop - 1] + 1), length]
        self.segments = [(start, stop, ends[stop - 1]) for start, stop in zip([0, *stops], stops)]
        # Few queries of many keys leave most of a GPU idle, but in kernels that share out keys. These take no mask.
        self.biases = None
        few = length <= 256 and self.length >= 1024 * len(stops)
        if few and device.type == "cuda" and bool((index == index[0]).all()):
            self.biases = [
                # None: SDPA's own rule, for one row no mask and for as many queries as keys a causal one.
                None if stop - start in (1, end) else causal_lower_right(stop - start, end)
                for start, stop, end in self.segments
            ]
        first = torch.arange(0, frozen.numel(), self.length)[:, None]  # of each row, all rows one after another
        self.shape, self.index = index.shape, (first + index).flatten().to(device)
        self.dropped = None if even else frozen.gather(1, index).unsqueeze(-1).to(device)
        self.rotary_made, self.masks = None, {}
        self.on_device = {device: self}

    def to(self, device, **kwargs):
        """The same for a layer on another device; accelerate calls this where it has split a model."""
        device = torch.device(device)
        if device not in self.on_device:
            moved = self.on_device[device] = copy.copy(self)
            moved.index = self.index.to(device)
            moved.dropped = None if self.dropped is None else self.dropped.to(device)
            moved.rotary_made, moved.masks = None, {}
        return self.on_device[device]

    def take(self, states):
        """The computed tokens' rows (B, T, ...) of (B, S, ...)."""
        return states.flatten(0, 1).index_select(0, self.index).unflatten(0, self.shape)

    def put(self, states, computed):
        """(B, S, ...) with the computed tokens' rows replaced by (B, T, ...)."""
        return states.flatten(0, 1).index_copy(0, self.index, computed.flatten(0, 1)).view(states.shape)

    def insert(self, states, computed):
        """The same in place, where `states` are new."""
        states = states.contiguous()
        states.flatten(0, 1).index_copy_(0, self.index, computed.flatten(0, 1))
        return states

    def drop(self, update):
        """Zero the updates (B, T, h) of the frozen tokens that fill up uneven rows."""
        return update if self.dropped is None else update.masked_fill(self.dropped, 0)

    def spread(self, computed):
        """(B, T, ...) to (B, S, ...) with zeros for the frozen tokens."""
        rows = self.drop(computed.flatten(2))
        return self.put(rows.new_zeros(len(rows), self.length, rows.shape[2]), rows).unflatten(2, computed.shape[2:])

    def rotary(self, position_embeddings):
        """Rotary embeddings of all tokens and of the computed ones, as [`rotate`] takes them."""
        if self.rotary_made is None:  # the same in every layer
            cos, sin = (part.expand(self.shape[0], -1, -1).unsqueeze(2) for part in position_embeddings)
            self.rotary_made = [(cos, *sin.chunk(2, dim=-1)) for cos, sin in ((cos, sin), map(self.take, (cos, sin)))]
        return self.rotary_made

    def mask(self, attention_mask, num_keys, sliding_window, dtype):
        """The computed tokens' rows of the mask, (B, 1, T, keys), as SDPA takes it."""
        if sliding_window not in self.masks:  # the same in every layer with this window
            position = (self.index % self.length).view(self.shape)
            if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
                row = torch.arange(self.shape[0], device=position.device)[:, None]
                mask = attention_mask.expand(self.shape[0], -1, -1, -1).transpose(1, 2)
                mask = mask[row, position].transpose(1, 2)
            elif isinstance(attention_mask, BlockMask):

                def computed(row, head, query, key):
                    return attention_mask.mask_mod(row, head, position[row, query], key)

                mask = create_mask(computed, self.shape[0], 1, self.shape[1], num_keys, position.device)
            else:  # plain causal attention, or a flash kernel's (B, keys)
                key = torch.arange(num_keys, device=position.device)
                query = position[:, None, :, None] + num_keys - self.length
                mask = key <= query
                if sliding_window is not None:
                    mask &= key > query - sliding_window
                if attention_mask is not None:
                    mask &= attention_mask[:, None, None, -num_keys:].bool()
            if mask.dtype == torch.bool:  # SDPA would do this in every layer
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
            if missing := -mask.shape[-1] % 8:  # on a GPU it would copy masks whose rows begin elsewhere
                mask = nn.functional.pad(mask, (0, missing))[..., :-missing]
            self.masks[sliding_window] = mask
        return self.masks[sliding_window]


def rotate(states, cos, sin_first, sin_second):
    """Rotary embedding of (B, N, heads, head size) by cosines (B, N, 1, head size) and the halves of the sines, with no
    copies of the states' halves."""
    rotated, (first, second) = states * cos, states.chunk(2, dim=-1)
    half = first.shape[-1]
    rotated[..., :half].addcmul_(second, sin_first, value=-1)
    rotated[..., half:].addcmul_(first, sin_second)
    return rotated


def append(cache, key, value, layer, cache_kwargs):
    """`cache.update`, but what a growing cache begins with is kept as it is, where that would copy it."""
    entry = cache.layers[layer] if layer < len(cache.layers) else None
    if type(entry) is not DynamicLayer or entry.is_initialized or cache.offloading:
        return cache.update(key, value, layer, cache_kwargs)
    # All that `lazy_initialization` notes from transformers 4.57 to 5.24, without its empty tensors.
    entry.keys, entry.values, entry.is_initialized = key, value, True
    entry.dtype, entry.device = key.dtype, key.device
    return key, value


class ShortVAttentionMixin:
    """Attention in which some tokens ask no query; otherwise the stock module.

    The few queries left attend through SDPA, which takes any mask, where the model uses flash or flex kernels.
    """

    sliding_window = None  # where a family has one, its attention says so

    def forward(self, hidden_states, *args, frozen_tokens=None, **kwargs):
        """(B, S, h) to (B, S, h). With frozen tokens (B, T, h) to (B, T, h), see [`updates`]."""
        if frozen_tokens is None:
            return super().forward(hidden_states, *args, **kwargs)
        kwargs.setdefault("cache", kwargs.pop("past_key_values", None))  # its name before transformers 5.24
        return self.updates(hidden_states, frozen_tokens, **kwargs)

    def updates(
        self,
        hidden_states,
        tokens,
        normed,
        norm_weight,
        position_embeddings,
        attention_mask=None,
        cache=None,
        **kwargs,
    ):
        """Normed states of the computed tokens (B, T, h) to their updates. All tokens' keys and values are made of
        `normed` (B, S, h), to be multiplied by `norm_weight` (h) if there is one."""
        rotary, computed_rotary = tokens.rotary(position_embeddings)
        key, value = self.keys_and_values(normed, norm_weight, *rotary)
        if cache is not None:
            cache_kwargs = {"cache_position": kwargs.get("cache_position")}  # read by transformers 4's static cache
            key, value = append(cache, key, value, self.layer_idx, cache_kwargs)
        implementation = self.config._attn_implementation
        unmasked = attention_mask is None and implementation == "sdpa"  # all keys are new, then a static cache's room
        num_keys = tokens.length if unmasked else key.shape[2]
        query = rotate(self.heads(self.q_proj(hidden_states)), *computed_rotary).transpose(1, 2)
        # Biases take no mixed types, which autocast would mend.
        biased = unmasked and tokens.biases is not None and query.dtype == key.dtype == value.dtype
        segments = tokens.segments
        if not biased:
            mask = tokens.mask(attention_mask, num_keys, self.sliding_window, key.dtype)
            num_keys = mask.shape[-1]
            if key.device.type != "cpu":  # a launch costs more than the keys that it spares
                segments = [(0, query.shape[2], tokens.length)]
        attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS["sdpa"]
        dropout = self.attention_dropout if self.training else 0.0
        updates, attentions = [], []
        for number, (start, stop, end) in enumerate(segments):
            end += num_keys - tokens.length  # the cache's tokens come first
            part = query[:, :, start:stop], key[:, :, :end], value[:, :, :end]
            bias = tokens.biases[number] if biased else mask[:, :, start:stop, :end]
            update, weights = attend(self, *part, bias, dropout=dropout, scaling=self.scaling, **kwargs)
            updates.append(update)
            if weights is not None and tokens.weights_asked:  # eager attention's
                attentions.append(nn.functional.pad(weights.transpose(1, 2), (0, num_keys - end)))
        weights = tokens.spread(torch.cat(attentions, dim=1)).transpose(1, 2) if attentions else None
        update = torch.cat(updates, dim=1) if len(updates) > 1 else updates[0]
        return self.o_proj(update.flatten(2)), weights

    def heads(self, states):
        """(B, N, heads * head size) to (B, N, heads, head size)."""
        return states.unflatten(-1, (-1, self.head_dim))

    def keys_and_values(self, normed, norm_weight, *rotary):
        """Each (B, key heads, S, head size). On a CPU made of at most 1,024 tokens at a time, which its cache holds."""
        if norm_weight is None:
            return self.project(normed, *rotary)
        length = normed.shape[1]
        if normed.device.type != "cpu" or length <= 1024:
            return self.project(normed * norm_weight, *rotary)
        for start in range(0, length, 1024):
            part = slice(start, start + 1024)
            made = self.project(normed[:, part] * norm_weight, *(rows[:, part] for rows in rotary))
            if start == 0:
                key, value = (states.new_empty(*states.shape[:2], length, self.head_dim) for states in made)
            key[:, :, part], value[:, :, part] = made
        return key, value

    def project(self, states, *rotary):
        """Keys and values (B, key heads, N, head size) of (B, N, h)."""
        key = rotate(self.heads(self.k_proj(states)), *rotary)
        return key.transpose(1, 2), self.heads(self.v_proj(states)).transpose(1, 2)


class ShortVDecoderLayerMixin:
    """A decoder layer in which attention, FFN or both may be frozen for some tokens. In a pass without frozen tokens it
    is the stock layer."""

    def forward(self, hidden_states, frozen_tokens=None, **kwargs):
        if not frozen_tokens:
            return super().forward(hidden_states, **kwargs)
        layer = self.self_attn.layer_idx
        tokens = frozen_tokens.get(layer)
        if tokens is None:  # the stock layer, but for norms of one operation, as in the others
            update, _ = self.self_attn(self.normed(self.input_layernorm, hidden_states), **kwargs)
            hidden_states = hidden_states + update
            return hidden_states + self.mlp(self.normed(self.post_attention_layernorm, hidden_states))

        if isinstance(hidden_states, Streams):
            whole, computed, normalized = hidden_states
        else:
            whole, computed, normalized = hidden_states, tokens.take(hidden_states), None
        if layer in tokens.attention_layers:
            norm, later = self.input_layernorm, None
            weight = self.readable_weight(norm, computed)
            if weight is None:  # of a constant row, large beside epsilon, the norm makes its weight
                later = norm(computed.new_full((1, computed.shape[-1]), 1024))[0]
            elif computed.device.type == "cpu":  # what layers share is made once; elsewhere a whole norm is one kernel
                weight, later = None, weight
            if normalized is None or weight is not None:
                normalized = self.normalize(whole, weight)
            asking = self.normalize(computed, weight)
            normalized = tokens.insert(normalized, asking)
            asking = asking if later is None else asking * later
            update, _ = self.self_attn(asking, frozen_tokens=tokens, normed=normalized, norm_weight=later, **kwargs)
            computed = computed + tokens.drop(update)
            normalized = None if later is None else normalized
        else:
            update, _ = self.self_attn(self.normed(self.input_layernorm, whole, computed, tokens), **kwargs)
            whole, computed, normalized = whole + update, computed + tokens.take(update), None
        if layer in tokens.ffn_layers:
            computed = computed + tokens.drop(self.mlp(self.normed(self.post_attention_layernorm, computed)))
        else:
            update = self.mlp(self.normed(self.post_attention_layernorm, whole, computed, tokens))
            whole, computed, normalized = whole + update, computed + tokens.take(update), None
        if tokens.keep_apart and frozen_tokens.get(layer + 1) is tokens:
            return Streams(whole, computed, normalized)
        return tokens.put(whole, computed)

    def normalize(self, states, weight):
        """A norm, or without weight what layers with the same states have in common."""
        return nn.functional.rms_norm(states, states.shape[-1:], weight, self.self_attn.config.rms_norm_eps)

    def normed(self, norm, states, computed=None, tokens=None):
        """A norm of states (B, S, h), of which some tokens' are in `computed` (B, T, h)."""
        weight = self.readable_weight(norm, states)
        apply = norm if weight is None else functools.partial(self.normalize, weight=weight)
        return apply(states) if computed is None else tokens.insert(apply(states), apply(computed))

    def readable_weight(self, norm, states):
        """A norm's weight (h). None if the norm is to be called: with hooks, in a wrapper, offloaded or sharded."""
        weight, expected = norm._parameters.get("weight"), (states.shape[-1:], states.dtype, states.device)
        plain = type(weight) is nn.Parameter and (weight.shape, weight.dtype, weight.device) == expected
        hooks = norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks
        return weight if plain and not any(hooks) and "forward" not in vars(norm) else None


class ShortVLlamaAttention(ShortVAttentionMixin, LlamaAttention):
    pass


class ShortVMistralAttention(ShortVAttentionMixin, MistralAttention):
    @property
    def sliding_window(self):
        return self.config.sliding_window


class ShortVQwen2Attention(ShortVAttentionMixin, Qwen2Attention):
    pass


class ShortVLlamaDecoderLayer(ShortVDecoderLayerMixin, LlamaDecoderLayer):
    pass


class ShortVMistralDecoderLayer(ShortVDecoderLayerMixin, MistralDecoderLayer):
    pass


class ShortVQwen2DecoderLayer(ShortVDecoderLayerMixin, Qwen2DecoderLayer):
    pass


SHORTV_LAYERS = {
    LlamaDecoderLayer: (ShortVLlamaDecoderLayer, ShortVLlamaAttention),
    MistralDecoderLayer: (ShortVMistralDecoderLayer, ShortVMistralAttention),
    Qwen2DecoderLayer: (ShortVQwen2DecoderLayer, ShortVQwen2Attention),
}


class ShortVModelMixin:
    """LLaVA's model, without head: finds the visual tokens of a forward pass and tells the layers."""

    _no_split_modules = [layer.__name__ for layer, _ in SHORTV_LAYERS.values()]

    def __init__(self, config):
        super().__init__(config)
        for layer in self.language_model.layers:
            if type(layer) not in SHORTV_LAYERS:
                supported = ", ".join(stock.__name__.removesuffix("DecoderLayer") for stock in SHORTV_LAYERS)
                raise ValueError(
                    f"text backbone {config.text_config.model_type!r} is not supported; those are: {supported}"
                )
            # Classes add behaviour, no state: checkpoints load as they are.
            layer.__class__, layer.self_attn.__class__ = SHORTV_LAYERS[type(layer)]
        # FSDP wraps the classes that are named here, and refuses names of classes that are not in the model.
        present = {type(module).__name__ for module in self.modules()}
        for module in (self.language_model, self):
            names = {*module._no_split_modules, *ShortVModelMixin._no_split_modules}
            module._no_split_modules = sorted(names & present)

    def set_replaced_layers(self, replaced_layers=(), attention=(), ffn=()):
        """Freeze visual tokens in other layers from now on, see [`ShortVConfigMixin`]. The weights stay as they are."""
        self.config.set_replaced_layers(replaced_layers, attention, ffn)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        inputs_embeds=None,
        num_logits=None,
        **kwargs,
    ):
        videos = kwargs.get("pixel_values_videos")
        if pixel_values is not None or videos is not None or kwargs.get("mm_encoder_outputs"):
            kwargs["frozen_tokens"] = self.frozen_tokens(input_ids, inputs_embeds, attention_mask, num_logits, kwargs)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    @torch.compiler.disable  # what is worked out depends on the tokens; layers are compiled around it
    def frozen_tokens(self, input_ids, inputs_embeds, attention_mask, num_logits, kwargs):
        """[`FrozenTokens`] by layer. None in the last one but those with logits, if only these are asked for."""
        attention_layers, ffn_layers = self.config.frozen_layers()
        if not attention_layers and not ffn_layers:
            return None
        frozen = self.visual_positions(input_ids, inputs_embeds)
        device = frozen.device
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:  # nobody reads padding
            frozen = frozen | (attention_mask[:, -frozen.shape[1] :].to(device) == 0)
        frozen = frozen.cpu()  # the host waits
        states_asked, weights_asked = (
            kwargs.get(name) or getattr(self.config, name, False) or getattr(self.config.text_config, name, False)
            for name in ("output_hidden_states", "output_attentions")
        )
        keep_apart = not (torch.is_grad_enabled() or states_asked or weights_asked)
        tokens = FrozenTokens(frozen, attention_layers, ffn_layers, keep_apart, weights_asked, device)
        by_layer = dict.fromkeys(attention_layers | ffn_layers, tokens)
        if keep_apart and num_logits and not frozen[:, -num_logits:].any():
            last, unread = self.config.text_config.num_hidden_layers - 1, torch.ones_like(frozen)
            unread[:, -num_logits:] = False
            by_layer[last] = FrozenTokens(unread, {last}, {last}, keep_apart, weights_asked, device)
        return by_layer

    def visual_positions(self, input_ids, inputs_embeds):
        """(B, S), true where LLaVA puts features of images and videos: the placeholders, in ids or in embeddings."""
        placeholders = {self.config.image_token_id, getattr(self.config, "video_token_id", self.config.image_token_id)}
        if input_ids is not None:
            return functools.reduce(torch.logical_or, (input_ids == token for token in placeholders))
        embedded = self.get_input_embeddings()(torch.tensor(list(placeholders), device=inputs_embeds.device))
        return (inputs_embeds.unsqueeze(-2) == embedded).all(dim=-1).any(dim=-1)


class ShortVLlavaModel(ShortVModelMixin, LlavaModel):
    config_class = ShortVLlavaConfig


class ShortVLlavaNextModel(ShortVModelMixin, LlavaNextModel):
    config_class = ShortVLlavaNextConfig


class ShortVVipLlavaModel(ShortVModelMixin, VipLlavaModel):
    config_class = ShortVVipLlavaConfig


class ShortVLlavaOnevisionModel(ShortVModelMixin, LlavaOnevisionModel):
    config_class = ShortVLlavaOnevisionConfig


class ShortVLlavaNextVideoModel(ShortVModelMixin, LlavaNextVideoModel):
    config_class = ShortVLlavaNextVideoConfig


def announcing_logits(forward):
    """Let the model know when only the last positions' logits are asked for."""

    @functools.wraps(forward)
    def wrapped(self, *args, logits_to_keep=0, **kwargs):
        if isinstance(logits_to_keep, int):
            kwargs["num_logits"] = logits_to_keep
        return forward(self, *args, logits_to_keep=logits_to_keep, **kwargs)

    return wrapped


class ShortVGenerationMixin:
    """LLaVA's model with its head, around a ShortV model."""

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def set_replaced_layers(self, replaced_layers=(), attention=(), ffn=()):
        """See [`ShortVModelMixin.set_replaced_layers`]."""
        self.model.set_replaced_layers(replaced_layers, attention, ffn)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As ever, or with the names that `save_pretrained` writes: `Trainer` resumes from its files by this method."""
        names = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model."}
        names |= {name: f"model.{name}" for name in ("vision_tower.", "multi_modal_projector.", "image_newline")}

        def in_memory(name):
            saved = next((saved for saved in names if name.startswith(saved)), "")
            return names.get(saved, "") + name.removeprefix(saved)

        renamed = {in_memory(name): tensor for name, tensor in state_dict.items()}
        return nn.Module.load_state_dict(self, renamed, *args, **kwargs)


class ShortVLlavaForConditionalGeneration(ShortVGenerationMixin, LlavaForConditionalGeneration):
    """[`LlavaForConditionalGeneration`] that freezes visual tokens in the layers named by its configuration."""

    config_class, model_class = ShortVLlavaConfig, ShortVLlavaModel
    forward = announcing_logits(LlavaForConditionalGeneration.forward)


class ShortVLlavaNextForConditionalGeneration(ShortVGenerationMixin, LlavaNextForConditionalGeneration):
    """[`LlavaNextForConditionalGeneration`] that freezes visual tokens in the layers named by its configuration."""

    config_class, model_class = ShortVLlavaNextConfig, ShortVLlavaNextModel
    forward = announcing_logits(LlavaNextForConditionalGeneration.forward)


class ShortVVipLlavaForConditionalGeneration(ShortVGenerationMixin, VipLlavaForConditionalGeneration):
    """[`VipLlavaForConditionalGeneration`] that freezes visual tokens in the layers named by its configuration."""

    config_class, model_class = ShortVVipLlavaConfig, ShortVVipLlavaModel
    forward = announcing_logits(VipLlavaForConditionalGeneration.forward)


class ShortVLlavaOnevisionForConditionalGeneration(ShortVGenerationMixin, LlavaOnevisionForConditionalGeneration):
    """[`LlavaOnevisionForConditionalGeneration`] that freezes tokens of images and videos in the layers named by its
    configuration."""

    config_class, model_class = ShortVLlavaOnevisionConfig, ShortVLlavaOnevisionModel
    forward = announcing_logits(LlavaOnevisionForConditionalGeneration.forward)


class ShortVLlavaNextVideoForConditionalGeneration(ShortVGenerationMixin, LlavaNextVideoForConditionalGeneration):
    """[`LlavaNextVideoForConditionalGeneration`] that freezes tokens of images and videos in the layers named by its
    configuration."""

    config_class, model_class = ShortVLlavaNextVideoConfig, ShortVLlavaNextVideoModel
    forward = announcing_logits(LlavaNextVideoForConditionalGeneration.forward)


MODEL_CLASSES = (
    ShortVLlavaForConditionalGeneration,
    ShortVLlavaNextForConditionalGeneration,
    ShortVVipLlavaForConditionalGeneration,
    ShortVLlavaOnevisionForConditionalGeneration,
    ShortVLlavaNextVideoForConditionalGeneration,
)
for model_class in MODEL_CLASSES:
    model_class.register_for_auto_class("AutoModelForImageTextToText")  # `save_pretrained` then saves this file too
    # The pipeline and `transformers serve` look class names up here.
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_class.config_class.model_type] = model_class.__name__

try:  # transformers 5 renames a checkpoint's tensors by tables that leave custom classes out; 4 by a class attribute
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    pass
else:
    for model_class in MODEL_CLASSES:
        for name in (model_class.config_class.model_type, model_class.model_class.__name__):
            stock = name.removeprefix("shortv_").removeprefix("ShortV")
            if (renaming := get_checkpoint_conversion_mapping(stock)) is not None:
                register_checkpoint_conversion_mapping(name, renaming, overwrite=True)
