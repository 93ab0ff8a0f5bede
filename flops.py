"""Cost of a prefill with frozen visual tokens, by the cost model of ShortV's section 3.3; order of replacement.

A multiply-add counts as two operations. The paper's formulas are for multi-head attention. Here keys and values may
also be narrower (grouped-query attention), either block of a layer may be frozen alone, and frozen tokens may be
corrected.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

TEXT_TOKENS = 64  # text tokens of a prompt, in the paper's tables
PICTURE = 640, 480  # pixels, for models whose number of visual tokens depends on them
TILES = 13  # a grid of 4 x 3 and the whole picture, into which InternVL and Idefics3 cut one of these proportions


class BlockFlops(NamedTuple):
    """Operations of one decoder layer's blocks for a prompt."""

    attention: int
    frozen_attention: int
    ffn: int
    frozen_ffn: int


def block_flops(text_config, text_tokens: int, visual_tokens: int) -> BlockFlops:
    """Operations of the attention and FFN block of a layer, visual tokens updated or frozen.

    Names: h hidden size, q and k widths of queries and of keys, m FFN size, t text and v visual tokens. For q = k = h
    the sums are the paper's 2(t+v)(4h+3m)h + 4(t+v)^2 h and 2t(4h+3m)h + 4v h^2 + 4t(t+v)h.
    """
    h, m = text_config.hidden_size, text_config.intermediate_size
    head_dim = getattr(text_config, "head_dim", None) or h // text_config.num_attention_heads
    q = text_config.num_attention_heads * head_dim
    k = text_config.num_key_value_heads * head_dim
    t, v = text_tokens, visual_tokens
    keys_and_values = 4 * (t + v) * h * k
    return BlockFlops(
        attention=keys_and_values + 4 * (t + v) * h * q + 4 * (t + v) ** 2 * q,
        frozen_attention=keys_and_values + 4 * t * h * q + 4 * t * (t + v) * q,
        ffn=6 * (t + v) * h * m,
        frozen_ffn=6 * t * h * m,
    )


def prefill_flops(
    text_config,
    text_tokens: int,
    visual_tokens: int | Sequence[int],
    attention_layers: Collection[int] = (),
    ffn_layers: Collection[int] = (),
    corrected_layers: Collection[int] = (),
    correction_rank: int = 0,
) -> int:
    """Operations of all decoder layers for a prompt, with the visual tokens frozen in the given blocks.

    A correction of rank r adds 4 v h r in a layer whose FFN is frozen, and nothing in others.

    Args:
        visual_tokens: number of visual tokens of the prompt; or one number for each layer, if some are dropped.
    """
    operations, num_layers = 0, text_config.num_hidden_layers
    counts = [visual_tokens] * num_layers if isinstance(visual_tokens, int) else visual_tokens
    for layer, count in enumerate(counts):
        blocks = block_flops(text_config, text_tokens, count)
        operations += blocks.frozen_attention if layer in attention_layers else blocks.attention
        operations += blocks.frozen_ffn if layer in ffn_layers else blocks.ffn
        if layer in ffn_layers and layer in corrected_layers:
            operations += 4 * count * text_config.hidden_size * correction_rank
    return operations


def flops_ratio(config, text_tokens: int = TEXT_TOKENS, visual_tokens: int | Sequence[int] | None = None) -> float:
    """Prefill FLOPs of a ShortV model, relative to the dense model: r in the paper; 1 / r bounds the speed-up.

    Args:
        config: a ShortV configuration.
        visual_tokens: number of visual tokens of the prompt, or one number for each layer, where the first layer gets
            all; by default those of one full-size image.
    """
    if visual_tokens is None:
        visual_tokens = image_tokens(config)
    whole = visual_tokens if isinstance(visual_tokens, int) else visual_tokens[0]
    # A package that was made before corrections existed has a configuration class without them.
    correction = getattr(config, "corrected_layers", ()), getattr(config, "correction_rank", 0)
    operations = prefill_flops(config.text_config, text_tokens, visual_tokens, *config.frozen_layers(), *correction)
    return operations / prefill_flops(config.text_config, text_tokens, whole)


def image_tokens(config) -> int:
    """Number of visual tokens of an image. LLaVA: LLaVA-1.5's, or those of the largest grid of tiles, without newlines.
    Other families: of a picture of 640 x 480 pixels, by the settings of their processors."""
    vision, family = config.vision_config, config.model_type.removeprefix("shortv_")
    if family == "gemma3":
        return config.mm_tokens_per_image
    if family == "internvl":
        return TILES * config.image_seq_length
    if family in ("idefics3", "smolvlm"):
        return TILES * (vision.image_size // vision.patch_size // config.scale_factor) ** 2
    if merged := getattr(config if family == "mistral3" else vision, "spatial_merge_size", None):
        return math.prod(math.ceil(side / (vision.patch_size * merged)) for side in PICTURE)
    side = vision.image_size // vision.patch_size
    tiles = 1
    for height, width in getattr(config, "image_grid_pinpoints", None) or ():
        tiles = max(tiles, 1 + height * width // vision.image_size**2)
    limit = getattr(config, "vision_aspect_ratio", "")  # LLaVA-OneVision shrinks larger grids to this number of tiles
    if limit.startswith("anyres_max_"):
        tiles = min(tiles, 1 + int(limit.removeprefix("anyres_max_")))
    return tiles * side**2


def lowest(scores: Sequence[float], number: int | None = None) -> list[int]:
    """The `number` units of lowest score (all by default), ascending by score; for equal scores the deeper first."""
    return sorted(range(len(scores)), key=lambda unit: (scores[unit], -unit))[:number]


def replacement_order(config) -> list[int]:
    """Layers in order of replacement: the configuration's own, then the others by LC if there are scores."""
    order = list(config.replaced_layers)
    return order + [layer for layer in lowest(config.lc_scores or ()) if layer not in order]
