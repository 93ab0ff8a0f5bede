"""Attention in which only some tokens of a step have queries, through vLLM's own attention backends.

Keys and values of the other tokens are already in the cache. The backend sees the tokens with queries as a batch of
more and shorter requests: each run of consecutive tokens is one request, whose sequence ends with the run.
"""

import functools
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch
from vllm.forward_context import ForwardContext
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)


@functools.lru_cache
def partial_query_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The backend with metadata that can be rebuilt for fewer queries once a step's visual tokens are known."""

    class PartialQueryBuilder(backend.get_builder_cls()):
        supports_update_block_table = False  # it would make metadata without `build`

        @classmethod
        def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
            # Full graphs replay steps of one token a request without calling `forward`, and the token may be visual.
            return AttentionCGSupport.NEVER

        def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
            metadata.rebuild = lambda change: super(PartialQueryBuilder, self).build(0, change(common_attn_metadata))
            return metadata

    return subclass_attention_backend("PartialQuery", backend, PartialQueryBuilder)


def partial_query_context(
    context: ForwardContext, layers: Collection[str], tokens: np.ndarray, index: torch.Tensor, positions: torch.Tensor
) -> ForwardContext:
    """The step's forward context for attention in which only `tokens` have queries.

    Args:
        layers: names of the attention layers, each with a [`partial_query_backend`].
        tokens: int64 `(T,)`, the step's tokens that have queries, ascending; T > 0.
        index: `tokens` on the device.
        positions: `(T,)`, positions of `tokens` in their requests.
    """
    change = functools.partial(_asked_by, tokens=tokens, index=index, positions=positions)
    rebuilt = {}  # layers share metadata
    for layer in layers:
        metadata = context.attn_metadata[layer]
        if id(metadata) not in rebuilt:
            rebuilt[id(metadata)] = metadata.rebuild(change), context.slot_mapping[layer][index]
    made = {layer: rebuilt[id(context.attn_metadata[layer])] for layer in layers}
    return replace(
        context,
        attn_metadata=context.attn_metadata | {layer: metadata for layer, (metadata, _) in made.items()},
        slot_mapping=context.slot_mapping | {layer: slots for layer, (_, slots) in made.items()},
    )


def _asked_by(
    common: CommonAttentionMetadata, tokens: np.ndarray, index: torch.Tensor, positions: torch.Tensor
) -> CommonAttentionMetadata:
    """The metadata with each run of consecutive `tokens` as one request; see [`partial_query_context`]."""
    device = common.query_start_loc.device
    ends = common.query_start_loc_cpu.numpy()[1:]
    requests = np.searchsorted(ends, tokens, side="right")
    starts = np.flatnonzero(np.r_[True, (np.diff(tokens) > 1) | (np.diff(requests) > 0)])
    bounds = np.r_[starts, len(tokens)].astype(np.int32)
    last = bounds[1:] - 1  # of each run, as index into tokens
    request = torch.from_numpy(requests[starts])
    query_start_loc = torch.from_numpy(bounds)

    def of_request(values):
        return None if values is None else values[request.to(values.device)]

    upper_bound = of_request(common.seq_lens_cpu_upper_bound)
    if upper_bound is not None:
        upper_bound = upper_bound - torch.from_numpy(ends[requests[last]] - 1 - tokens[last]).to(upper_bound.dtype)
    return replace(
        common,
        query_start_loc=query_start_loc.to(device),
        query_start_loc_cpu=query_start_loc,
        seq_lens=(positions[torch.from_numpy(last).to(device)] + 1).to(common.seq_lens.dtype),
        seq_lens_cpu_upper_bound=upper_bound,
        num_reqs=len(starts),
        num_actual_tokens=len(tokens),
        max_query_len=int(np.diff(bounds).max()),
        block_table_tensor=of_request(common.block_table_tensor),
        slot_mapping=common.slot_mapping[index],
        positions=positions,
        is_prefilling=of_request(common.is_prefilling),
        req_idx=None if common.req_idx is None else common.req_idx[requests[starts]],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
