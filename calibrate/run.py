"""One calibration: samples in; scores, a choice, what it costs, and a package out."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from tqdm import tqdm

from shortv_llava.calibrate import report
from shortv_llava.calibrate.contribution import (
    Direction,
    Granularity,
    RowBudget,
    Tokens,
    contributions,
    cosine_distance,
)
from shortv_llava.calibrate.cost import CostMeter
from shortv_llava.calibrate.journal import Journal
from shortv_llava.calibrate.samples import Sample, make_inputs
from shortv_llava.calibrate.selection import DEFAULT_FRACTION, Units, bootstrap, number_of_layers
from shortv_llava.errors import ShortVError
from shortv_llava.model_card import write_card
from shortv_llava.package import JOURNAL, check_output, replacing_file, write_package

STRATEGIES = ("lc", "greedy", "cosine", "random")
GRANULARITIES = ("layer", "block", "auto")


@dataclass(frozen=True)
class Choice:
    """How to choose what is frozen.

    Args:
        strategy: one of STRATEGIES.
        granularity: `layer`, `block`, or `auto`: whichever diverges less on held-out samples at the same FLOPs.
        num_layers, fraction, flops_ratio, max_divergence: the budget; at most one, a fraction of 0.6 by default.
        seed: of random choices and of the bootstrap.
    """

    strategy: str = "lc"
    granularity: str = "layer"
    num_layers: int | None = None
    fraction: float | None = None
    flops_ratio: float | None = None
    max_divergence: float | None = None
    seed: int = 0

    def check(self, num_layers: int) -> None:
        """Raises ShortVError if the options contradict one another or the model."""
        for name, value, known in (
            ("strategy", self.strategy, STRATEGIES),
            ("granularity", self.granularity, GRANULARITIES),
        ):
            if value not in known:
                raise ShortVError(f"--{name} must be one of {', '.join(known)}, not {value!r}")
        budgets = ("num_layers", "fraction", "flops_ratio", "max_divergence")
        given = [f"--{name.replace('_', '-')}" for name in budgets if getattr(self, name) is not None]
        if len(given) > 1:
            raise ShortVError(f"{' and '.join(given)} contradict each other; give one")
        if self.num_layers is not None and not 0 <= self.num_layers <= num_layers:
            raise ShortVError(f"--num-layers {self.num_layers}: the model has {num_layers} layers")
        for name in ("fraction", "flops_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ShortVError(f"--{name.replace('_', '-')} must be from 0 to 1, not {value}")
        if self.strategy == "cosine" and self.granularity != "layer":
            raise ShortVError("--strategy cosine compares the states around whole layers; it needs --granularity layer")

    def number(self, units: Units, order: Sequence[int], curve: Sequence[dict]) -> int:
        """How many units of `order` the budget allows or, for layers counted, their operations amount to.

        Args:
            curve: the cost of every number, see [`Candidate`].
        """
        if self.max_divergence is not None:
            return max(entry["number"] for entry in curve if entry["cost"].kl <= self.max_divergence)
        if self.flops_ratio is not None:
            return units.reaching(order, self.flops_ratio)
        layers = self.num_layers
        if layers is None:
            fraction = DEFAULT_FRACTION if self.fraction is None else self.fraction
            layers = number_of_layers(units.num_layers, fraction)
        return units.reaching(order, units.ratio_of_layers(layers))


class Candidate(NamedTuple):
    """An order of replacement, and how far along it to go."""

    units: Units
    scores: np.ndarray  # LC (samples, sets of tokens, units)
    order: list[int]
    curve: list[dict]  # number, flops_ratio and cost on held-out samples, for every number of units frozen
    number: int

    @property
    def frozen(self) -> dict[str, list[int]]:
        return self.units.frozen(self.order[: self.number])

    @property
    def chosen(self) -> dict:
        return self.curve[self.number]


def calibrate(
    base: Path,
    model,
    processor,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    output: Path,
    choice: Choice = Choice(),
    settings: dict | None = None,
    tokens: Sequence[Tokens] = ("visual",),
    direction: Direction = "release",
    max_rows: int | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
) -> Candidate:
    """Score the units of `model`, choose, measure the choice, and write the package `output`.

    Args:
        base: the folder that `model` was loaded from.
        samples: for scoring and choosing.
        held_out: for measuring what the choice costs.
        settings: further things that the scores depend on, kept with them.
        tokens: sets of tokens to score; the first one's scores choose.
        max_rows: rows that a layer takes at once, for small memories.
        chat_template: of the package, see [`write_package`].

    Raises:
        ShortVError: if the output must not be written, an unfinished calibration of other settings lies there, options
            contradict each other, a sample cannot be read, or scores are not finite.
    """
    choice.check(model.config.text_config.num_hidden_layers)
    check_output(output, overwrite, base)
    scored_as = {
        **(settings or {}),
        "samples": [sample.id for sample in samples],
        "tokens": list(tokens),
        "direction": direction,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    run = Run(model, processor, samples, held_out, Journal(output / JOURNAL, scored_as), tokens, direction, max_rows)
    candidates = {}
    for granularity in ("layer", "block") if choice.granularity == "auto" else (choice.granularity,):
        candidates[granularity] = run.candidate(choice, granularity, candidates.get("layer"))
    best = min(candidates, key=lambda granularity: candidates[granularity].chosen["cost"].kl)
    if run.state.is_main_process:
        overwrite = overwrite or run.journal.path.exists()
        measured_on = [sample.id for sample in held_out]
        _write(base, output, overwrite, candidates, best, scored_as, measured_on, choice, chat_template)
    run.state.wait_for_everyone()
    return candidates[best]


class Run:
    """The computations of a calibration, shared among processes; the main one keeps the journal."""

    def __init__(self, model, processor, samples, held_out, journal, tokens, direction, max_rows):
        self.model, self.processor, self.samples, self.journal = model, processor, samples, journal
        self.tokens, self.direction, self.budget = tokens, direction, RowBudget(max_rows)
        self.state = PartialState()
        self.held_out = CostMeter(model, processor, held_out, direction)

    def candidate(self, choice: Choice, granularity: Granularity, rival: Candidate | None) -> Candidate:
        """Score, order, measure; with a `rival`, go along the order until as many operations are saved."""
        units = Units(self.model.config, granularity)
        scores = self.collect(
            f"{granularity} LC",
            lambda inputs: contributions(self.model, inputs, self.tokens, self.direction, granularity, self.budget)[
                :, 0
            ],
        )
        order = self.order(choice, units, scores)
        curve = []
        for number in self.progress(range(len(order) + 1), "cost", "choice"):
            cost = self.held_out.measure(units.frozen(order[:number]))
            curve.append({"number": number, "flops_ratio": units.ratio(order[:number]), "cost": cost})
        number = (
            choice.number(units, order, curve) if rival is None else units.reaching(order, rival.chosen["flops_ratio"])
        )
        return Candidate(units, scores, order, curve, number)

    def order(self, choice: Choice, units: Units, scores: np.ndarray) -> list[int]:
        """All units in order of replacement."""
        if choice.strategy == "lc":
            return units.order_by(scores[:, 0].mean(axis=0).tolist())
        if choice.strategy == "cosine":
            distances = self.collect("cosine distance", lambda inputs: cosine_distance(self.model, inputs))
            return units.order_by(distances.mean(axis=0).tolist())
        if choice.strategy == "random":
            return units.order_at_random(choice.seed)

        meter = CostMeter(self.model, self.processor, self.samples, self.direction)
        bar = self.progress(None, f"greedy {units.granularity}", "trial", total=len(units) * (len(units) + 1) // 2)

        def divergence(candidate: tuple[int, ...]) -> float:
            bar.update()
            return self.once(
                f"greedy {units.granularity} {candidate}", lambda: meter.measure(units.frozen(candidate)).kl
            )

        with bar:
            return units.order_greedily(divergence)

    def collect(self, name: str, compute) -> np.ndarray:
        """`compute(inputs)` for every sample, stacked. Processes take samples in turns."""
        keys = {f"{name} {sample.id}": sample for sample in self.samples}
        missing = [key for key in keys if key not in self.journal.results]
        count, rank = self.state.num_processes, self.state.process_index
        with self.progress(None, name, "sample", total=len(keys), initial=len(keys) - len(missing)) as bar:
            for start in range(0, len(missing), count):
                found = []
                for key in missing[start + rank : start + rank + 1]:
                    inputs = make_inputs(self.processor, [keys[key]]).to(self.model.device)
                    found.append((key, compute(inputs).tolist()))
                for key, values in gather_object(found) if count > 1 else found:
                    if not np.isfinite(values).all():
                        raise ShortVError(
                            f"sample {keys[key].id}: scores are not finite; try --dtype float32, or leave it out"
                        )
                    self.once(key, lambda values=values: values)
                    bar.update()
        return np.array([self.journal.results[key] for key in keys])

    def once(self, key: str, compute):
        """A result from the journal, else computed and put there."""
        if key not in self.journal.results:
            value = compute()
            if self.state.is_main_process:
                self.journal.add(key, value)
            self.journal.results[key] = value
        return self.journal.results[key]

    def progress(self, items, name: str, unit: str, **settings) -> tqdm:
        return tqdm(items, desc=name, unit=unit, disable=not self.state.is_main_process, **settings)


def _write(
    base, output, overwrite, candidates: dict[str, Candidate], best: str, scored_as, held_out, choice, chat_template
) -> None:
    """The package with the best candidate, what was found in calibration.json, pictures beside it, tables on screen."""
    taken = candidates[best]
    units, scores, order, curve, number = taken
    tokens = scored_as["tokens"]
    means = dict(zip(tokens, scores.mean(axis=0).tolist()))
    saved = [units.saved(unit) for unit in range(len(units))]
    intervals, shares = bootstrap(scores[:, 0], number, saved, choice.seed)
    summary = {
        **scored_as,
        "choice": {key: value for key, value in asdict(choice).items() if value is not None},
        "granularity": best,
        "flops_ratio": taken.chosen["flops_ratio"],
        "cost": taken.chosen["cost"]._asdict(),
    }
    details = {
        **summary,
        "held_out": held_out,
        "frozen": taken.frozen,
        "order": order,
        "scores": means,
        "intervals": intervals.tolist(),
        "chosen_in": shares.tolist(),
        "curves": {
            name: [entry | {"cost": entry["cost"]._asdict()} for entry in candidate.curve]
            for name, candidate in candidates.items()
        },
    }
    lc_scores = candidates["layer"].scores[:, 0].mean(axis=0).tolist() if "layer" in candidates else None
    settings = {**taken.frozen, "lc_scores": lc_scores, "calibration": summary}
    write_package(base, output, overwrite, chat_template=chat_template, **settings)

    series = means
    if best == "block":
        half = units.num_layers
        series = {f"{kind}, attention": values[:half] for kind, values in means.items()}
        series |= {f"{kind}, FFN": values[half:] for kind, values in means.items()}
    for name, draw in (
        ("calibration.json", lambda path: path.write_text(json.dumps(details, indent=1) + "\n")),
        ("lc_scores.png", lambda path: report.draw_scores(path, series, taken.frozen)),
        ("tradeoff.png", lambda path: report.draw_tradeoff(path, candidates, taken)),
    ):
        with replacing_file(output / name) as unfinished:
            draw(unfinished)
    write_card(output)  # now that there is more to tell

    console = Console()
    console.print(report.score_table(series, taken.frozen, shares.tolist()))
    for name, candidate in candidates.items():
        console.print(report.cost_table(name, candidate.curve, candidate.number))
    if len(candidates) > 1:
        kls = {name: candidate.chosen["cost"].kl for name, candidate in candidates.items()}
        found = ", ".join(f"{name} {kl:.2e}" for name, kl in kls.items())
        console.print(
            f"KL at the same FLOPs: {found}; taken: {best}, {min(kls.values()) / max(kls.values()):.2f} of the other's"
        )
    unsure = report.unsettled(shares.tolist())
    if choice.strategy == "lc" and unsure:
        console.print(
            f"more samples could change the choice: between 5% and 95% of resamples take {best} units {unsure}"
        )
