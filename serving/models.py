"""vLLM's LLaVA with ShortV layers: in the layers that a package names, visual tokens are frozen.

Visual tokens are frozen as in `modeling_shortv_llava.py`. A step of vLLM holds tokens of many requests in one row. In a
frozen block the visual tokens' keys and values are written to the cache, and vLLM's own modules run on the text tokens.
Steps without visual tokens run vLLM's own `forward`.

Shapes below: S tokens a step, of which T are text and V visual; h hidden size.
"""

from typing import NamedTuple

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.sequence import IntermediateTensors

from shortv_llava.modeling_shortv_llava import Correction
from shortv_llava.serving.attention import partial_query_backend, partial_query_context

logger = init_logger("vllm.shortv")  # vLLM shows what is logged below its own name

VISUAL = "visual_tokens"  # name of the tensor that pipeline stages get in addition to vLLM's own


class KeyValueProjection(nn.Module):
    """The key and value part of an unquantised fused projection, as a view of its weight.

    vLLM treats it as a linear layer, and packs its weight like the fused projection's if a CPU's kernels need that.
    """

    def __init__(self, qkv_proj: nn.Module, query_size: int):
        super().__init__()
        self.quant_method = qkv_proj.quant_method
        # Not a parameter: checkpoints have no such tensor, and loading the fused projection fills this view.
        self.weight = qkv_proj.weight.data[query_size:]
        self.bias = None if qkv_proj.bias is None else qkv_proj.bias.data[query_size:]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(V, h) to (V, 2 * key size)."""
        return self.quant_method.apply(self, states, self.bias)


class FusedProjection(nn.Module):
    """Keys and values of a quantised fused projection. It cannot be split, so queries are computed and dropped."""

    def __init__(self, qkv_proj: nn.Module, query_size: int):
        super().__init__()
        self.__dict__["qkv_proj"] = qkv_proj  # not a child: it is the attention's child already
        self.query_size = query_size
        logger.info_once("ShortV: quantised projections are computed whole, queries of visual tokens included.")

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.qkv_proj(states)[0][..., self.query_size :]


class Stream(NamedTuple):
    """Hidden states between two layers, as the two summands that vLLM's norms add."""

    update: torch.Tensor  # (S or T, h)
    residual: torch.Tensor | None  # same shape; None before the first layer

    def normed(self, norm: nn.Module) -> "Stream":
        """The normed sum, and the sum."""
        return Stream(norm(self.update), self.update) if self.residual is None else Stream(*norm(*self))

    def rows(self, index: torch.Tensor) -> "Stream":
        return Stream(self.update[index], None if self.residual is None else self.residual[index])


class Apart(NamedTuple):
    """Hidden states between two layers with frozen blocks, with text and visual tokens kept separate."""

    text: Stream  # (T, h)
    visual: torch.Tensor  # (V, h)


class Step:
    """One step's forward pass through the layers, with its visual tokens frozen in some.

    Args:
        visual: bool, on the CPU, one value a token of the step; rows beyond are padding.
        positions: `(S,)`, positions of the tokens in their requests.
        attention_layers: names of vLLM's attention layers in which visual tokens are frozen.
    """

    def __init__(self, visual: torch.Tensor, positions: torch.Tensor, attention_layers: list[str]):
        tokens = (~visual).nonzero().flatten()
        self.has_text = len(tokens) > 0
        self.text, self.visual = tokens.to(positions.device), visual.nonzero().flatten().to(positions.device)
        self.positions = positions
        self.text_positions, self.visual_positions = positions[self.text], positions[self.visual]
        context = get_forward_context()
        self.visual_slots = {layer: context.slot_mapping[layer][self.visual] for layer in attention_layers}
        if self.has_text and attention_layers:
            context = partial_query_context(context, attention_layers, tokens.numpy(), self.text, self.text_positions)
        self.context = context

    def split(self, states: Stream | Apart) -> Apart:
        if isinstance(states, Apart):
            return states
        update, residual = states.rows(self.visual)
        return Apart(states.rows(self.text), update if residual is None else update + residual)

    def join(self, states: Stream | Apart) -> Stream:
        if isinstance(states, Stream):
            return states
        text, visual = states
        update, residual = visual.new_zeros(2, len(self.positions), visual.shape[1])
        update[self.text] = text.update
        residual[self.visual] = visual
        if text.residual is not None:
            residual[self.text] = text.residual
        return Stream(update, residual)

    def through(self, layer: nn.Module, states: Stream | Apart, frozen_attention: bool, frozen_ffn: bool):
        """Run a decoder layer on `states`, with one block frozen, both or none."""
        if not (frozen_attention or frozen_ffn):
            return Stream(*layer(self.positions, *self.join(states)))
        if frozen_attention:
            text, visual = self.split(states)
            normed = layer.input_layernorm(visual)
            self.contribute(layer, normed)
            if self.has_text:
                text = self.attend(layer, text, self.text_positions)
        else:
            text, visual = self.split(self.attend(layer, self.join(states), self.positions))
        correction = getattr(layer, "correction", None)
        if not frozen_ffn:
            visual = visual + layer.mlp(layer.post_attention_layernorm(visual))
        elif correction is not None:
            visual = visual + correction(normed if frozen_attention else layer.post_attention_layernorm(visual))
        if self.has_text:
            normed, residual = text.normed(layer.post_attention_layernorm)
            text = Stream(layer.mlp(normed), residual)
        return Apart(text, visual)

    def attend(self, layer: nn.Module, states: Stream, positions: torch.Tensor) -> Stream:
        normed, residual = states.normed(layer.input_layernorm)
        return Stream(layer.self_attn(positions=positions, hidden_states=normed), residual)

    def contribute(self, layer: nn.Module, normed: torch.Tensor) -> None:
        """Write the visual tokens' keys and values, computed from their normed states (V, h), to the cache."""
        attention = layer.self_attn
        key, value = attention.kv_proj(normed).chunk(2, dim=-1)
        key, _ = attention.rotary_emb(self.visual_positions, key, None)
        cache = attention.attn
        shape = -1, cache.num_kv_heads, cache.head_size
        slots = self.visual_slots[cache.layer_name]
        cache.impl.do_kv_cache_update(cache, key.reshape(shape), value.reshape(shape), cache.kv_cache, slots)


class ShortVMixin:
    """vLLM's model with ShortV layers. `embed_input_ids` records a step's visual tokens for `forward`."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.visual = None  # visual tokens of the next step: bool, one value a token
        self.frozen_attention, self.frozen_ffn = self.config.frozen_layers()
        self.make_empty_intermediate_tensors = self.make_received_tensors
        self.attention_layers = []  # names of the frozen attention layers of this pipeline stage
        model = self.language_model.model
        for index in range(model.start_layer, model.end_layer):
            layer, attention = model.layers[index], model.layers[index].self_attn
            if index in self.config.corrected_layers:
                layer.correction = Correction(self.config.text_config.hidden_size, self.config.correction_rank)
            if index in self.frozen_attention | self.frozen_ffn:
                attention.attn.attn_backend = partial_query_backend(attention.attn.attn_backend)
            if index in self.frozen_attention:
                self.attention_layers.append(attention.attn.layer_name)
                whole = not isinstance(attention.qkv_proj.quant_method, UnquantizedLinearMethod)
                projection = FusedProjection if whole else KeyValueProjection
                attention.kv_proj = projection(attention.qkv_proj, attention.q_size)

    def make_received_tensors(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        """Empty tensors for what a later pipeline stage receives: vLLM's own, and which tokens are visual."""
        tensors = self.language_model.make_empty_intermediate_tensors(batch_size, dtype, device)
        tensors[VISUAL] = torch.zeros(batch_size, dtype=torch.bool, device=device)
        return tensors

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        merges = multimodal_embeddings is not None and len(multimodal_embeddings) > 0
        self.visual = is_multimodal if merges else None
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        visual, self.visual = self.visual, None
        if intermediate_tensors is not None:
            tensors = dict(intermediate_tensors.items())
            sent = tensors.pop(VISUAL)
            intermediate_tensors = IntermediateTensors(tensors)
            visual = sent.cpu()
            visual = visual if visual.any() else None
        if visual is None or not self.frozen_attention | self.frozen_ffn:
            hidden_states = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        else:
            hidden_states = self.forward_frozen(visual, positions, intermediate_tensors, inputs_embeds)
        if not get_pp_group().is_last_rank:
            if intermediate_tensors is None:
                sent = torch.zeros(len(positions), dtype=torch.bool)
                if visual is not None:
                    sent[: len(visual)] = visual
            hidden_states[VISUAL] = sent.to(positions.device)
        return hidden_states

    def forward_frozen(self, visual, positions, intermediate_tensors, inputs_embeds):
        """vLLM's `forward` of a step with visual tokens."""
        model = self.language_model.model
        step = Step(visual, positions, self.attention_layers)
        if intermediate_tensors is None:
            states = Stream(inputs_embeds, None)
        else:
            states = Stream(intermediate_tensors["hidden_states"], intermediate_tensors["residual"])
        with override_forward_context(step.context):
            for index in range(model.start_layer, model.end_layer):
                frozen = index in self.frozen_attention, index in self.frozen_ffn
                states = step.through(model.layers[index], states, *frozen)
        states = step.join(states)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": states.update, "residual": states.residual})
        return states.normed(model.norm).update


class ShortVLlavaForConditionalGeneration(ShortVMixin, LlavaForConditionalGeneration):
    pass


class ShortVLlavaNextForConditionalGeneration(ShortVMixin, LlavaNextForConditionalGeneration):
    pass
