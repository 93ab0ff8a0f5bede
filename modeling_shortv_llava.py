"""LLaVA with ShortV: in the layers that the configuration lists, visual tokens are frozen.

A frozen visual token keeps its hidden state, or adds a cheap linear correction to it. Text still attends to it, by a
key and a value made from that state, but it has no query and skips the FFN. Text is computed in every layer as in LLaVA
is, and so is everything in a pass without images, such as decoding. Method: Yuan et al., "ShortV", ICCV 2025, arXiv
2504.00502.
[`ShortVDecoderLayer`] and [`ShortVAttention`] are the method, the rest finds the visual tokens of a forward pass and
puts these two into a stock model. All that is private to transformers here is `config._attn_implementation`.
Shapes: B rows of S tokens, of which T are computed; h hidden size, d head size, K keys.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask, flex_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.granite import modeling_granite as granite
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from .configuration_shortv_llava import (
    ShortVConfigMixin,
    ShortVLlavaConfig,
    ShortVLlavaNextConfig,
    ShortVLlavaNextVideoConfig,
    ShortVLlavaOnevisionConfig,
    ShortVVipLlavaConfig,
    register_config,
)

try:
    from transformers import conversion_mapping
except ImportError:  # transformers 4
    conversion_mapping = None


class FrozenTokens:
    """The frozen tokens of one forward pass (`frozen`, boolean, (B, S)), and the layers in which they are frozen.

    T is the largest number of computed tokens in a row. A row with fewer is filled up with frozen tokens of its own,
    whose results are dropped.
    """

    def __init__(self, frozen: torch.Tensor, attention_layers: frozenset[int], ffn_layers: frozenset[int]):
        self.attention_layers, self.ffn_layers = attention_layers, ffn_layers
        counts = (~frozen).sum(dim=1).tolist()
        width = max(1, *counts)  # T; attention takes no empty sequence
        self.positions = frozen.to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        self.rows = torch.arange(len(frozen), device=frozen.device)[:, None]
        self.index = (self.rows * frozen.shape[1] + self.positions).flatten()  # among all B * S
        self.kept = None if min(counts) == width else (~frozen.gather(1, self.positions)).flatten().nonzero()[:, 0]
        self.made = {}

    def to(self, device: torch.device, **kwargs: Any) -> "FrozenTokens":
        """The same on another device. accelerate calls this for layers that it has placed there."""
        moved = copy.copy(self)
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        vars(moved).update(tensors, made=self.made if tensors["index"] is self.index else {})
        return moved

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """The computed tokens' rows (B, T, ...) of (B or 1, S, ...)."""
        states = states.expand(len(self.rows), *states.shape[1:])
        return states.flatten(0, 1).index_select(0, self.index).unflatten(0, self.positions.shape)

    def scatter(self, states: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
        """(B, S, ...) with the computed tokens' rows replaced by (B, T, ...)."""
        index, computed = self.index, computed.flatten(0, 1)
        if self.kept is not None:  # which of the B * T are no filling
            index, computed = index[self.kept], computed[self.kept]
        states = states.clone(memory_format=torch.contiguous_format)
        states.flatten(0, 1).index_copy_(0, index, computed)
        return states  # no view, for hooks may write to it

    def once(self, name: str, source: Any, settings: tuple, make: Callable[[], Any]) -> Any:
        """What `make` returns, made anew only if the last layer had another object as source, or other settings."""
        last_source, last_settings, made = self.made.get(name, (None, None, None))
        if last_source is not source or last_settings != settings:
            made = make()
            self.made[name] = source, settings, made
        return made

    def mask(
        self, given: torch.Tensor | BlockMask | None, length: int, num_keys: int, is_causal: bool, window: int | None,
        dtype: torch.dtype, flash: dict[str, Any] | None,
    ) -> torch.Tensor:  # fmt: skip
        """The computed tokens' rows (B, 1 or heads, T, K) of the mask that stock gave, or of what kernels do without.

        SDPA's causal mask begins at the first key. Those of flash kernels (`flash`: what they are told) end at the last
        one, and regard padding (B, K), a sliding window and where packed samples start.
        """
        if isinstance(given, torch.Tensor) and given.dim() == 4:
            return given.expand(len(self.rows), -1, length, -1)[self.rows, :, self.positions].transpose(1, 2)
        if isinstance(given, torch.Tensor):
            num_keys = given.shape[1]
        elif given is None and is_causal and not flash:
            num_keys = length  # what follows is room in a static cache
        row, query = self.rows[..., None], self.positions[..., None]
        key = torch.arange(num_keys, device=row.device)
        distance = query + num_keys - length - key
        visible = distance >= 0 if is_causal and length > 1 else torch.ones_like(distance, dtype=torch.bool)
        if isinstance(given, BlockMask):
            visible = given.mask_mod(row, torch.zeros_like(row), query, key)
        elif given is not None:
            visible = visible & given[:, None].bool()
        if flash and window is not None:
            visible = visible & (distance.abs() < window)
        if flash and given is None and num_keys == length:
            starts, ids = flash.get("cu_seq_lens_k"), flash.get("position_ids")
            if starts is None:  # a single row may hold samples, each with positions from 0
                starts = query.new_zeros(1) if ids is None else (ids[: len(row) == 1] == 0).nonzero()[:, 1]
            samples = [torch.bucketize(row * length + place, starts, right=True) for place in (query, key)]
            visible = visible & (samples[0] == samples[1])
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min).unsqueeze(1)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (B, heads, N, d) by (B, N, d), as `apply_rotary_pos_emb` in fewer operations."""
    rotated, sin, half = states * cos.unsqueeze(1), sin.unsqueeze(1), states.shape[-1] // 2
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated


class ShortVAttention:
    """Mixin for an attention class: given frozen tokens, only the others have queries."""

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, frozen_tokens: FrozenTokens | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As stock. With frozen tokens, normed states (B, S, h) to the computed tokens' updates (B, T, h) and, if the
        attention function returns them, attention weights (B, heads, S, K) with zero rows for frozen tokens."""
        if frozen_tokens is None:
            return super().forward(hidden_states, *args, **kwargs)
        cache = kwargs.pop("cache", kwargs.pop("past_key_values", None))  # its name before transformers 5.24
        rotary, given, told = map(kwargs.pop, ("position_embeddings", "attention_mask", "is_causal"), (None,) * 3)
        tokens, length = frozen_tokens, hidden_states.shape[1]

        def heads(states: torch.Tensor) -> torch.Tensor:  # (B, N, heads * d) to (B, heads, N, d)
            return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        query, key = heads(self.q_proj(tokens.gather(hidden_states))), heads(self.k_proj(hidden_states))
        if hasattr(self, "q_norm"):  # Qwen3's norm of each head
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, *tokens.once("rotary", rotary[0], (), lambda: [tokens.gather(x) for x in rotary]))
        key, value = rotate(key, *rotary), heads(self.v_proj(hidden_states))
        if cache is not None:
            wanted = [kwargs] if "cache_position" in kwargs else []  # by static caches of transformers 4
            key, value = cache.update(key, value, self.layer_idx, *wanted)

        name = self.config._attn_implementation
        mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
        flash = kwargs if mask_function is flash_attention_mask else None
        name = "sdpa" if flash or mask_function is flex_attention_mask else name  # their kernels take no rows of masks
        attend = llama.eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        is_causal = name != "eager" and (self.is_causal if told is None else told)
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        settings = length, key.shape[2], is_causal, window, query.dtype
        mask = tokens.once("mask", given, settings, lambda: tokens.mask(given, *settings, flash))
        key, value = (states[:, :, : mask.shape[-1]] for states in (key, value))
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        update, weights = attend(self, query, key, value, mask, is_causal=False, **kwargs)  # the mask says it
        if weights is not None:
            whole = weights.new_zeros(len(weights), length, *weights.shape[1::2])
            weights = tokens.scatter(whole, weights.transpose(1, 2)).transpose(1, 2)
        return self.o_proj(update.flatten(2)), weights


class Correction(nn.Module):
    """Linear map of low rank from the normed state of a token to what its frozen update would nearly have been."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Linear(hidden_size, rank, bias=False), nn.Linear(rank, hidden_size)

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """(..., h) to (..., h)."""
        return self.up(self.down(normed))


class ShortVDecoderLayer:
    """Mixin for a decoder layer: frozen tokens skip its attention, its FFN or both. Without any it is stock's.

    A child `correction`, if there is one, stands in for the FFN's update or for that of both blocks.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, frozen_tokens: FrozenTokens | None = None, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, h) to (B, S, h); some layers of older versions of transformers return attention weights, too."""
        layer, tokens = self.self_attn.layer_idx, frozen_tokens
        attention_frozen = tokens is not None and layer in tokens.attention_layers
        ffn_frozen = tokens is not None and layer in tokens.ffn_layers
        if not attention_frozen and not ffn_frozen:
            return super().forward(hidden_states, *args, **kwargs)

        normed = self.input_layernorm(hidden_states)
        if attention_frozen:
            update, weights = self.self_attn(hidden_states=normed, frozen_tokens=tokens, **kwargs)
            computed = self.add(tokens.gather(hidden_states), update, "attention")
        else:
            update, weights = self.self_attn(hidden_states=normed, **kwargs)
            hidden_states = self.add(hidden_states, update, "attention")
            computed = tokens.gather(hidden_states)
        if ffn_frozen:
            correction = getattr(self, "correction", None)
            if correction is None or attention_frozen:
                computed_normed = self.ffn_norm(computed)
            else:
                normed = self.ffn_norm(hidden_states)
                computed_normed = tokens.gather(normed)
            if correction is not None:  # of all tokens; those that are computed are put over it
                hidden_states = hidden_states + correction(normed)
            hidden_states = tokens.scatter(hidden_states, self.add(computed, self.mlp(computed_normed), "ffn"))
        else:
            hidden_states = tokens.scatter(hidden_states, computed)
            hidden_states = self.add(hidden_states, self.mlp(self.ffn_norm(hidden_states)), "ffn")
        return (hidden_states, weights) if self.in_tuple else hidden_states

    def ffn_norm(self, states: torch.Tensor) -> torch.Tensor:
        return self.post_attention_layernorm(states)

    def add(self, states: torch.Tensor, update: torch.Tensor, block: str) -> torch.Tensor:
        """The update (B, N, h) of a block, `attention` or `ffn`, added to the residual stream."""
        return states + update


class ShortVGraniteDecoderLayer(ShortVDecoderLayer):
    """Granite's layers scale their updates."""

    def add(self, states: torch.Tensor, update: torch.Tensor, block: str) -> torch.Tensor:
        return states + update * self.residual_multiplier


SHORTV_LAYERS = {}  # stock decoder layers, with ShortV's and the class of its attention


def add_backbone(layer: type, attention: type, layer_mixin=ShortVDecoderLayer, attention_mixin=ShortVAttention) -> None:
    """Support a text backbone. Its classes keep their names, by which device maps, FSDP and users find them."""
    made = []
    for mixin, stock in ((layer_mixin, layer), (attention_mixin, attention)):
        in_tuple = "output_attentions" in stock.forward.__annotations__  # of an older version of transformers
        made.append(type(stock.__name__, (mixin, stock), {"__module__": __name__, "in_tuple": in_tuple}))
        globals()[stock.__name__] = made[-1]  # where pickle looks
    SHORTV_LAYERS[layer] = tuple(made)


add_backbone(gemma.GemmaDecoderLayer, gemma.GemmaAttention)
add_backbone(granite.GraniteDecoderLayer, granite.GraniteAttention, ShortVGraniteDecoderLayer)
add_backbone(llama.LlamaDecoderLayer, llama.LlamaAttention)
add_backbone(mistral.MistralDecoderLayer, mistral.MistralAttention)
add_backbone(qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention)
add_backbone(qwen3.Qwen3DecoderLayer, qwen3.Qwen3Attention)


def hand_on_frozen_tokens(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a model without head, for a pass with images. Stock hands its keywords on to the layers."""
    given = dict(zip(type(model).forward.__annotations__, args)) | kwargs  # stock annotates every parameter
    images = map(given.get, ("pixel_values", "pixel_values_videos", "image_hidden_states", "mm_encoder_outputs"))
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if tokens is None or all(image is None or image == {} for image in images) or not any(model.config.frozen_layers()):
        return None
    cache = given.get("cache", given.get("past_key_values"))  # its name before transformers 5.24
    return args, {"frozen_tokens": find_frozen_tokens(model, tokens, given.get("attention_mask"), cache)} | kwargs


@torch.compiler.disable  # how many tokens are computed depends on the ids; the layers are compiled around it
def find_frozen_tokens(model: nn.Module, given: torch.Tensor, attention_mask: Any, cache: Any) -> FrozenTokens:
    """Visual tokens, told by their placeholders among ids (B, S) or embeddings, and padding, which nobody reads."""
    names = [name for name in ("image_token_id", "video_token_id") if hasattr(model.config, name)]
    placeholders = torch.tensor([getattr(model.config, name) for name in names], device=given.device)
    if given.dim() == 2:
        frozen = torch.isin(given, placeholders)
    else:
        frozen = (given.unsqueeze(-2) == model.get_input_embeddings()(placeholders)).all(dim=-1).any(dim=-1)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        past = 0 if cache is None else int(cache.get_seq_length())
        padding = attention_mask[:, past : past + frozen.shape[1]].to(frozen.device) == 0
        frozen = frozen | padding if padding.shape == frozen.shape else frozen
    return FrozenTokens(frozen, *model.config.frozen_layers())


class ShortVMixin:
    """Mixin for a model with its head. Raises ValueError for a text backbone that is not in `SHORTV_LAYERS`."""

    # Beginnings of the tensor names that `save_pretrained` writes, with those in the model; the first that fits counts.
    saved_names = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model."}
    saved_names |= {name: f"model.{name}" for name in ("vision_tower.", "multi_modal_projector.", "image_newline")}

    def __init__(self, config: ShortVConfigMixin):
        super().__init__(config)
        for layer in self.get_decoder().layers:
            if type(layer) not in SHORTV_LAYERS:
                ours = ", ".join(stock.__name__.removesuffix("DecoderLayer") for stock in SHORTV_LAYERS)
                raise ValueError(f"text backbone {config.text_config.model_type!r} is not supported; those are: {ours}")
            # Classes add behaviour, no state: checkpoints load as they are. What has state is a module of its own.
            layer.__class__, layer.self_attn.__class__ = SHORTV_LAYERS[type(layer)]
            if layer.self_attn.layer_idx in config.corrected_layers:
                layer.correction = Correction(config.text_config.hidden_size, config.correction_rank)
        self.model.register_forward_pre_hook(hand_on_frozen_tokens, with_kwargs=True)

    def set_replaced_layers(self, *args: Any, **kwargs: Any) -> None:
        """Freeze visual tokens in other layers from now on, see [`ShortVConfigMixin.set_replaced_layers`].

        Corrections stay where they are: that of a layer no longer replaced rests, a layer without is the paper's.
        """
        self.config.set_replaced_layers(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """As stock, or with the names that `save_pretrained` writes: `Trainer` resumes from its files by this."""
        renamed = {}
        for name, tensor in state_dict.items():
            saved = next((saved for saved in self.saved_names if name.startswith(saved)), "")
            renamed[self.saved_names.get(saved, "") + name.removeprefix(saved)] = tensor
        return super().load_state_dict(renamed, *args, **kwargs)


class ShortVLlavaForConditionalGeneration(ShortVMixin, transformers.LlavaForConditionalGeneration):
    config_class = ShortVLlavaConfig


class ShortVLlavaNextForConditionalGeneration(ShortVMixin, transformers.LlavaNextForConditionalGeneration):
    config_class = ShortVLlavaNextConfig


class ShortVVipLlavaForConditionalGeneration(ShortVMixin, transformers.VipLlavaForConditionalGeneration):
    config_class = ShortVVipLlavaConfig


class ShortVLlavaOnevisionForConditionalGeneration(ShortVMixin, transformers.LlavaOnevisionForConditionalGeneration):
    config_class = ShortVLlavaOnevisionConfig


class ShortVLlavaNextVideoForConditionalGeneration(ShortVMixin, transformers.LlavaNextVideoForConditionalGeneration):
    config_class = ShortVLlavaNextVideoConfig


def register(model_class: type) -> None:
    """Tell transformers of a model class and of its configuration's."""
    stock, model_type = model_class.__bases__[1], model_class.config_class.model_type
    register_config(model_class.config_class)
    model_class.register_for_auto_class("AutoModelForImageTextToText")  # `save_pretrained` then saves this file too
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type] = model_class.__name__  # the pipeline looks here
    if conversion_mapping is not None:  # by tables transformers 5 renames tensors, 4 by an attribute of the class
        find = conversion_mapping.get_checkpoint_conversion_mapping
        renaming = find(stock.__name__) or find(stock.config_class.model_type) or []
        conversion_mapping.register_checkpoint_conversion_mapping(model_type, renaming, overwrite=True)


for llava in ShortVMixin.__subclasses__():
    register(llava)
