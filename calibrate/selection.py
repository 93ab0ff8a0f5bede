"""Choose from scores what to freeze.

A unit is the smallest part that can be frozen: a layer (units 0 to L - 1), or with granularity `block` an attention
block (unit i for layer i) or an FFN block (unit L + i). A strategy gives the order of replacement, a budget the number
of units.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from shortv_llava.calibrate import Granularity, Strategy
from shortv_llava.errors import ShortVError
from shortv_llava.flops import TEXT_TOKENS, block_flops, image_tokens, lowest, prefill_flops

DEFAULT_FRACTION = 0.6  # of the layers: 19 of 32 and 24 of 40, as published
RESAMPLES = 1000


def number_of_layers(num_layers: int, fraction: float = DEFAULT_FRACTION) -> int:
    return round(fraction * num_layers)


class Units:
    """The units of one model, and the operations that freezing them saves for a prompt of the paper's length.

    Args:
        config: a ShortV configuration.
        granularity: whether a unit is a layer or a block.
        correction_rank: rank of the corrections of frozen layers and FFNs except the last layer's; 0 for none.
    """

    def __init__(self, config, granularity: Granularity, correction_rank: int = 0):
        self.text_config, self.granularity, self.correction_rank = config.text_config, granularity, correction_rank
        self.num_layers = config.text_config.num_hidden_layers
        self.tokens = TEXT_TOKENS, image_tokens(config)

    def __len__(self) -> int:
        return self.num_layers * (2 if self.granularity == "block" else 1)

    def saved(self, unit: int) -> int:
        """Operations saved by freezing the unit."""
        blocks = block_flops(self.text_config, *self.tokens)
        attention, ffn = blocks.attention - blocks.frozen_attention, blocks.ffn - blocks.frozen_ffn
        if self.granularity == "layer":
            return attention + ffn
        return attention if unit < self.num_layers else ffn

    def frozen(self, units: Sequence[int]) -> dict[str, list[int]]:
        """The configuration's three lists; a layer with both blocks frozen counts as replaced."""
        attention = [unit for unit in units if unit < self.num_layers]
        ffn = (
            attention
            if self.granularity == "layer"
            else [unit - self.num_layers for unit in units if unit not in attention]
        )
        return {
            "replaced_layers": [layer for layer in attention if layer in ffn],
            "replaced_attention_layers": [layer for layer in attention if layer not in ffn],
            "replaced_ffn_layers": [layer for layer in ffn if layer not in attention],
        }

    def ratio(self, units: Sequence[int]) -> float:
        """FLOPs ratio r of the model with these units frozen."""
        lists = self.frozen(units)
        both = lists["replaced_layers"]
        attention, ffn = both + lists["replaced_attention_layers"], both + lists["replaced_ffn_layers"]
        return self._ratio(attention, ffn)

    def ratio_of_layers(self, number: int) -> float:
        """FLOPs ratio r of the model with `number` whole layers frozen."""
        layers = range(number)
        return self._ratio(layers, layers)

    def _ratio(self, attention_layers, ffn_layers) -> float:
        correction = range(self.num_layers - 1), self.correction_rank
        frozen = prefill_flops(self.text_config, *self.tokens, attention_layers, ffn_layers, *correction)
        return frozen / prefill_flops(self.text_config, *self.tokens)

    def reaching(self, order: Sequence[int], ratio: float) -> int:
        """How many units of `order` bring the FLOPs ratio down to `ratio`; all if it is not reached."""
        for number in range(len(order) + 1):
            if self.ratio(order[:number]) <= ratio + 1e-9:
                return number
        return len(order)

    def order_by(self, scores: Sequence[float]) -> list[int]:
        """The units in ascending order of score per operation saved."""
        return lowest([score / self.saved(unit) for unit, score in enumerate(scores)])

    def order_greedily(self, divergence: Callable[[tuple[int, ...]], float]) -> list[int]:
        """Repeatedly add the unit that adds least `divergence` (of all chosen units together) per operation saved."""
        order, reached = [], 0.0
        while len(order) < len(self):
            found = {unit: divergence((*order, unit)) for unit in range(len(self)) if unit not in order}
            best = min(found, key=lambda unit: ((found[unit] - reached) / self.saved(unit), -unit))
            order.append(best)
            reached = found[best]
        return order

    def order_at_random(self, seed: int) -> list[int]:
        return random.Random(seed).sample(range(len(self)), len(self))


@dataclass(frozen=True)
class Choice:
    """How to choose what is frozen.

    Args:
        strategy: by default `corrected-lc` (LC with the layer corrected) with corrections, else `lc`.
        granularity: `layer`, `block`, or `auto`: the one that diverges less on held-out samples at the same FLOPs.
        num_layers, fraction, flops_ratio, max_divergence: the budget; at most one, by default a fraction of 0.6.
        seed: seed of random choices and of the bootstrap.
        correction_rank: rank of the corrections; None for no corrections.
        layers: given layers, in place of a choice.
    """

    strategy: Strategy | None = None
    granularity: str = "layer"
    num_layers: int | None = None
    fraction: float | None = None
    flops_ratio: float | None = None
    max_divergence: float | None = None
    seed: int = 0
    correction_rank: int | None = None
    layers: tuple[int, ...] | None = None

    @property
    def chosen_by(self) -> str:
        """The strategy, or `given`."""
        if self.layers is not None:
            return "given"
        return self.strategy or ("corrected-lc" if self.correction_rank else "lc")

    def check(self, num_layers: int | None = None) -> None:
        """Raises ShortVError if the options contradict one another or, if `num_layers` is given, the model."""
        for name, value, known in (
            ("strategy", self.strategy or "lc", get_args(Strategy)),
            ("granularity", self.granularity, (*get_args(Granularity), "auto")),
        ):
            if value not in known:
                raise ShortVError(f"--{name} must be one of {', '.join(known)}, not {value!r}")
        budgets = ("num_layers", "fraction", "flops_ratio", "max_divergence")
        given = [f"--{name.replace('_', '-')}" for name in budgets if getattr(self, name) is not None]
        if self.layers is not None:
            given += ["--layers"] + ["--strategy"] * (self.strategy is not None)
            given += ["--granularity"] * (self.granularity != "layer")
        if len(given) > 1:
            raise ShortVError(f"{' and '.join(given)} contradict each other; give one")
        if self.num_layers is not None and self.num_layers < 0:
            raise ShortVError(f"--num-layers must be 0 or more, not {self.num_layers}")
        if None not in (self.num_layers, num_layers) and self.num_layers > num_layers:
            raise ShortVError(f"--num-layers {self.num_layers}: the model has {num_layers} layers")
        if self.max_divergence is not None and not self.max_divergence >= 0:
            raise ShortVError(f"--max-divergence must be 0 or more, not {self.max_divergence}")
        for name in ("fraction", "flops_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ShortVError(f"--{name.replace('_', '-')} must be from 0 to 1, not {value}")
        if self.strategy == "corrected-lc" and not self.correction_rank:
            raise ShortVError("--strategy corrected-lc needs corrections; give --correction-rank")
        if self.strategy == "cosine" and self.granularity != "layer":
            raise ShortVError("--strategy cosine compares the states around whole layers; it needs --granularity layer")

    def number(self, units: Units, order: Sequence[int], curve: Sequence[dict]) -> int:
        """How many units of `order` the budget allows; a number of layers is converted by the operations saved.

        Args:
            curve: the cost of every number, see [`Candidate`].
        """
        if self.max_divergence is not None:
            costs = {entry["number"]: entry.get("corrected_cost", entry["cost"]) for entry in curve}
            return max(number for number, cost in costs.items() if cost.kl <= self.max_divergence)
        if self.flops_ratio is not None:
            return units.reaching(order, self.flops_ratio)
        layers = self.num_layers
        if layers is None:
            fraction = DEFAULT_FRACTION if self.fraction is None else self.fraction
            layers = number_of_layers(units.num_layers, fraction)
        return units.reaching(order, units.ratio_of_layers(layers))


def bootstrap(scores: np.ndarray, number: int, saved: Sequence[int], seed: int):
    """How stable a choice by LC is: resample the samples and choose again.

    Args:
        scores: LC scores, `(samples, units)`.
        number: number of units chosen.
        saved: operations saved by each unit.

    Returns:
        The 95% interval of every unit's mean score, `(units, 2)`; the share of resamples that choose it, `(units,)`.
    """
    generator = np.random.default_rng(seed)
    means = np.stack([scores[generator.integers(len(scores), size=len(scores))].mean(axis=0) for _ in range(RESAMPLES)])
    chosen = np.zeros(scores.shape[1])
    for row in means / np.asarray(saved):
        chosen[lowest(row.tolist(), number)] += 1
    return np.quantile(means, [0.025, 0.975], axis=0).T, chosen / RESAMPLES
