"""Tables and plots of a calibration's results."""

import math
import re
from collections.abc import Sequence
from itertools import chain, cycle
from pathlib import Path

from rich import box
from rich.table import Table

from shortv_llava.calibrate import AROUND
from shortv_llava.calibrate.cost import Cost
from shortv_llava.checkpoint.config import LAYER_LISTS
from shortv_llava.files.figures import FLOPS_AXIS, as_percent, log_with_zero, new_figure, save_figure


def _bar(score: float, highest: float) -> str:
    """A bar that spans four decades below the highest score."""
    if score <= 0:
        return ""
    return "█" * max(1, round(8 + 2 * math.log10(score / highest)))


def score_table(scores: dict[str, Sequence[float]], frozen: dict[str, list[int]], shares: Sequence[float]) -> Table:
    """One row a layer: LC scores, a bar for the visual score (log scale), what is frozen, and how often it is chosen.

    Args:
        scores: LC score of every layer for each set of tokens.
        frozen: the configuration's three lists.
        shares: share of bootstrap resamples that choose each unit; empty for a single sample.
    """
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title="Layer Contribution", title_justify="left")
    for column in ("layer", *(f"{tokens} LC" for tokens in scores)):
        table.add_column(column, justify="right")
    table.add_column("log scale")
    table.add_column("frozen")
    if shares:
        table.add_column("chosen in, %", justify="right", no_wrap=True)
    first = next(iter(scores.values()))
    for layer, score in enumerate(first):
        cells = [f"{values[layer]:.1e}" for values in scores.values()]
        what = ", ".join(LAYER_LISTS[key] for key, layers in frozen.items() if layer in layers)
        cells += [_bar(score, max(first)), what]
        if shares:
            several = shares[layer :: len(first)]  # attention / FFN, for blocks
            cells.append(" / ".join(f"{100 * share:.0f}" for share in several))
        table.add_row(str(layer), *cells)
    if shares:
        table.caption = "chosen in: share of resamples (bootstrap) that choose the layer"
        table.caption_justify = "left"
    return table


def unsettled(shares: Sequence[float]) -> list[int]:
    """Units that between 5% and 95% of the resamples choose."""
    return [unit for unit, share in enumerate(shares) if 0.05 < share < 0.95]


def cost_table(granularity: str, curve: Sequence[dict], chosen: int) -> Table:
    """Measured cost for numbers of frozen units near the chosen one.

    Args:
        curve: entries with `number`, `flops_ratio`, `cost` and, with corrections, `corrected_cost`, by number.
        chosen: index into `curve`.
    """
    corrected = any("corrected_cost" in entry for entry in curve)
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"Cost of {granularity}s frozen together, on samples not used for choosing",
        title_justify="left",
        caption_justify="left",
    )
    kl = "KL" if curve[chosen]["cost"].kl_interval is None else "KL ± 95%"
    for column in ["frozen", "FLOPs", kl, "top-1", "NLL"] + [f"corrected {kl}", "top-1"] * corrected:
        table.add_column(column, justify="right")
    table.caption = "top-1: the same next token; NLL: change of the answer's, nats a token"
    for index in range(max(0, chosen - AROUND), min(len(curve), chosen + AROUND + 1)):
        entry = curve[index]
        cells = _cells(entry["cost"])
        if "corrected_cost" in entry:
            cells += _cells(entry["corrected_cost"])[:2]
        style = "bold" if index == chosen else None
        table.add_row(f"{entry['number']}", f"{entry['flops_ratio']:.1%}", *cells, style=style)
    return table


def _cells(cost: Cost) -> tuple[str, ...]:
    change = "" if cost.nll_change is None else f"{cost.nll_change:+.4f}"
    kl = f"{cost.kl:.2e}" + ("" if cost.kl_interval is None else f" ± {cost.kl_interval:.0e}")
    return kl, f"{cost.agreement:.0%}", change


def draw_scores(
    path: Path,
    scores: dict[str, Sequence[float]],
    frozen: dict[str, list[int]],
    intervals: dict[str, Sequence[Sequence[float]]],
) -> None:
    """The paper's Figure 3: LC of every layer for each set of tokens, the replaced layers marked.

    Args:
        intervals: (low, high) of every layer, for the sets of tokens that have intervals; drawn as bands.
    """
    figure, axes = new_figure()
    for (name, values), marker in zip(scores.items(), cycle("os^vDP")):
        label = re.sub(r"^\w+", r"\g<0> tokens", name)
        [line] = axes.plot(range(len(values)), values, f"-{marker}", label=label, ms=5, clip_on=False)
        if name in intervals:
            axes.fill_between(range(len(values)), *zip(*intervals[name]), color=line.get_color(), alpha=0.25, lw=0,
                              label=f"{label}: 95% interval")  # fmt: skip
    visual = next(iter(scores.values()))
    for (key, name), color in zip(LAYER_LISTS.items(), ("0.85", "#cfe3f7", "#f7e3c8")):
        for index, layer in enumerate(frozen[key]):
            label = f"{name} frozen" if index == 0 else None
            axes.axvspan(layer - 0.5, layer + 0.5, color=color, lw=0, zorder=0, label=label)
    log_with_zero(axes, chain.from_iterable(scores.values()))
    axes.set(xlabel="layer of the language model", ylabel="Layer Contribution (KL divergence, nats)")
    axes.set(xlim=(-0.5, len(visual) - 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, axes, path)


def draw_tradeoff(path: Path, candidates: dict, taken) -> None:
    """Plot the FLOPs ratio against divergence, with its interval, for every number of frozen units; mark the choice.

    Args:
        candidates: [`Candidate`]s by granularity.
        taken: the chosen candidate.
    """
    figure, axes = new_figure()
    drawn = []
    for (name, candidate), marker in zip(candidates.items(), "os"):
        for key, label in (("cost", f"{name}s frozen"), ("corrected_cost", f"{name}s frozen, corrected")):
            points = [(entry["flops_ratio"], entry[key]) for entry in candidate.curve if key in entry]
            if not points:
                continue
            ratios, costs = zip(*points)
            kls, style = [cost.kl for cost in costs], f"-{marker}" if key == "cost" else f"--{marker}"
            halves = [cost.kl_interval or 0 for cost in costs]
            bars = [max(0, min(kl, half)) for kl, half in zip(kls, halves)], halves  # none below 0
            axes.errorbar(ratios, kls, bars, fmt=style, label=label, ms=4, elinewidth=1, capsize=2, clip_on=False)
            drawn += kls
    axes.plot([taken.chosen["flops_ratio"]], [taken.cost.kl], "*", color="black", ms=14, zorder=3, label="this package")
    log_with_zero(axes, drawn)
    axes.set(xlabel=FLOPS_AXIS, ylabel="KL divergence from the unfrozen model (nats)\nbars: 95% interval")
    as_percent(axes)
    save_figure(figure, axes, path)
