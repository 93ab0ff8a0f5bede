"""One calibration: score units on samples, choose, measure the cost, and write a package."""

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from accelerate import PartialState
from rich.console import Console
from tqdm import tqdm

from shortv_llava.calibrate import Direction, Granularity, Tokens, report
from shortv_llava.calibrate.contribution import RowBudget, contributions, cosine_distance, dense
from shortv_llava.calibrate.correction import (
    Factors,
    FitSample,
    correction_tensors,
    fit_corrections,
    layers_to_correct,
    make_correction,
    packed,
    unpacked,
)
from shortv_llava.calibrate.cost import Cost, CostMeter
from shortv_llava.calibrate.journal import Journal
from shortv_llava.calibrate.samples import Sample, make_inputs, samples_digest
from shortv_llava.calibrate.selection import Choice, Units, bootstrap
from shortv_llava.checkpoint.config import LAYER_LISTS
from shortv_llava.checkpoint.digest import checkpoint_digest
from shortv_llava.checkpoint.package import check_output, write_package
from shortv_llava.distributed import shared
from shortv_llava.errors import ShortVError
from shortv_llava.files.outputs import JOURNAL, only_one

logger = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """An order of replacement, and the number of units to freeze."""

    units: Units
    scores: np.ndarray | None  # LC (samples, sets of tokens, units); None for given layers
    order: list[int]
    curve: list[dict]  # for each number of frozen units: number, flops_ratio, cost (held-out samples), corrected_cost
    number: int
    corrections: dict[int, Factors]

    @property
    def frozen(self) -> dict[str, list[int]]:
        return self.units.frozen(self.order[: self.number])

    @property
    def chosen(self) -> dict:
        return next(entry for entry in self.curve if entry["number"] == self.number)

    @property
    def cost(self) -> Cost:
        """Cost of the choice, with its corrections."""
        return self.chosen["corrected_cost" if self.corrections else "cost"]


def calibrate(
    base: Path,
    model,
    processor,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    output: Path,
    choice: Choice = Choice(),  # noqa: B008
    settings: dict | None = None,
    tokens: Sequence[Tokens] = ("visual",),
    direction: Direction = "release",
    max_rows: int | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
    fit_on: Sequence[Sample] = (),
    base_model: str | None = None,
    license: str | None = None,
) -> Candidate:
    """Score the units of `model`, choose, measure the choice, and write the package `output`.

    Args:
        base: the folder that `model` was loaded from.
        samples: samples for scoring and choosing.
        held_out: samples for measuring the cost of the choice.
        settings: further settings that the scores depend on; saved with the scores.
        tokens: sets of tokens to score; the scores of the first set decide the choice.
        max_rows: number of rows that a layer takes at once, for little memory.
        chat_template: chat template of the package, see [`write_package`].
        fit_on: samples for fitting corrections, if the choice has a rank for them.
        base_model, license: for the model card, see [`write_package`].

    Raises:
        ShortVError: if the output must not be written, or has an unfinished calibration with other settings; if options
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
    if choice.correction_rank:
        scored_as |= {"correction_rank": choice.correction_rank, "correction_samples": [one.id for one in fit_on]}
    # Of an interrupted run with other weights, questions or pictures under the same names nothing may be taken.
    read = {
        "weights_and_processor": checkpoint_digest(base),
        "content_of_samples": samples_digest([*samples, *held_out, *fit_on]),
    }
    with only_one(output) if PartialState().is_main_process else nullcontext():
        journal = Journal(output / JOURNAL, scored_as | read)
        run = Run(model, processor, samples, held_out, journal, tokens, direction, max_rows, fit_on)
        outcome = Outcome(run.candidates(choice), choice, scored_as, [sample.id for sample in held_out])
        if run.state.is_main_process:
            options = {"chat_template": chat_template, "base_model": base_model, "license": license}
            options["overwrite"] = overwrite or run.journal.path.exists()
            _write(outcome, base, output, model.dtype, **options)
            _tell(outcome)
        run.state.wait_for_everyone()
    return outcome.taken


class Run:
    """The computations of a calibration, divided among processes; the main process writes the journal."""

    def __init__(self, model, processor, samples, held_out, journal, tokens, direction, max_rows, fit_on):
        self.model, self.processor, self.samples, self.journal = model, processor, samples, journal
        self.tokens, self.direction, self.budget, self.fit_on = tokens, direction, RowBudget(max_rows), fit_on
        self.state = PartialState()
        self.held_out = CostMeter(model, processor, held_out, direction)

    def candidates(self, choice: Choice) -> dict[str, Candidate]:
        """The candidates of the choice, by granularity."""
        found = {}
        for granularity in ("layer", "block") if choice.granularity == "auto" else (choice.granularity,):
            found[granularity] = self.candidate(choice, granularity, found.get("layer"))
        return found

    def candidate(self, choice: Choice, granularity: Granularity, rival: Candidate | None) -> Candidate:
        """Score, order, measure, choose the number of units; with a `rival`, as many as reach its FLOPs ratio."""
        rank = choice.correction_rank
        units = Units(self.model.config, granularity, rank or 0)
        if choice.layers is not None:
            scores, order, numbers = None, list(choice.layers), [len(choice.layers)]
        else:
            scores = self.scores(choice, units)
            order = self.order(choice, units, scores)
            numbers = range(len(order) + 1)
        # The curve of whole layers uses corrections of each layer alone. Those fitted together serve their number only.
        fitted = self.fit_alone(units, rank) if rank and granularity == "layer" and len(numbers) > 1 else {}
        curve = []
        for number in self.progress(numbers, "cost", "choice"):
            frozen = units.frozen(order[:number])
            curve.append({"number": number, "flops_ratio": units.ratio(order[:number])})
            curve[-1]["cost"] = self.held_out.measure(frozen)
            if fitted:
                curve[-1]["corrected_cost"] = self.held_out.measure(frozen, fitted)
        if choice.layers is not None:
            number = len(order)
        elif rival is not None:
            number = units.reaching(order, rival.chosen["flops_ratio"])
        else:
            number = choice.number(units, order, curve)
        corrections = self.fit(units, order[:number], rank) if rank else {}
        if corrections:
            entry = next(entry for entry in curve if entry["number"] == number)
            entry["corrected_cost"] = self.held_out.measure(units.frozen(order[:number]), corrections)
            if entry["corrected_cost"].kl >= entry["cost"].kl:
                logger.warning(f"{granularity}s: the corrections do not lower the divergence and are left out")
                corrections = {}
        return Candidate(units, scores, order, curve, number, corrections)

    def fit(self, units: Units, frozen: Sequence[int], rank: int, alone: bool = False) -> dict[int, Factors]:
        """Corrections of these units frozen together, or of each `alone`. Processes share the samples."""
        name = f"{units.granularity} correction{' alone' if alone else ''} {list(frozen)}"
        lists, known = units.frozen(frozen), self.journal.results

        def once(layer: int, compute) -> Factors:
            return unpacked(self.once(f"{name} {layer}", lambda: packed(compute())))

        with dense(self.model):
            self.model.set_replaced_layers(*(lists[key] for key in LAYER_LISTS))
            config, device = self.model.config, self.model.device
            layers = layers_to_correct(config)
            if all(f"{name} {layer}" in known for layer in layers):  # as when a budget takes all layers
                return {layer: unpacked(known[f"{name} {layer}"]) for layer in layers}
            own = self.fit_on[self.state.process_index :: self.state.num_processes]
            label = "corrections of each layer alone" if alone else "corrections of the choice"
            bar = partial(self.progress, name=label, unit="layer")
            inputs = (make_inputs(self.processor, [sample], config).to(device) for sample in own)
            samples = [FitSample(self.model, each, folder=self.place_for_states(each, len(own))) for each in inputs]
            return fit_corrections(self.model, samples, rank, alone, budget=self.budget, once=once, progress=bar)

    def fit_alone(self, units: Units, rank: int) -> dict[int, Factors]:
        """Corrections of every layer, or of every FFN, on the dense model's states."""
        return self.fit(units, range(len(units) - units.num_layers, len(units)), rank, alone=True)

    def place_for_states(self, inputs, number: int) -> Path | None:
        """The output folder if the states of `number` samples like this one would fill half of the free memory."""
        first_dense_and_corrected = 3
        size = self.model.config.text_config.hidden_size * self.model.dtype.itemsize
        needed = first_dense_and_corrected * number * inputs["input_ids"].numel() * size
        if needed <= psutil.virtual_memory().available / 2:
            return None
        self.journal.path.parent.mkdir(parents=True, exist_ok=True)
        return self.journal.path.parent

    def scores(self, choice: Choice, units: Units) -> np.ndarray:
        """LC (samples, sets of tokens, units); with strategy `corrected-lc` the last set is that of corrected units."""
        granularity, corrections = units.granularity, None
        name = f"{granularity} LC"
        if choice.chosen_by == "corrected-lc":
            like, fitted = self.model.lm_head.weight, self.fit_alone(units, choice.correction_rank)
            corrections = {layer: make_correction(factors, like) for layer, factors in fitted.items()}
            name += ", plain and corrected"

        def compute(inputs):
            settings = self.tokens, self.direction, granularity, self.budget
            return contributions(self.model, inputs, *settings, corrections=corrections)[:, 0]

        return self.collect(name, compute)

    def order(self, choice: Choice, units: Units, scores: np.ndarray) -> list[int]:
        """All units in order of replacement."""
        if choice.chosen_by in ("lc", "corrected-lc"):
            chooses = len(self.tokens) if choice.chosen_by == "corrected-lc" else 0
            return units.order_by(scores[:, chooses].mean(axis=0).tolist())
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
        """`compute(inputs)` for every sample, stacked. The samples are divided among the processes in turns."""
        keys = {f"{name} {sample.id}": sample for sample in self.samples}
        missing = [key for key in keys if key not in self.journal.results]

        def computed(key: str) -> list:
            inputs = make_inputs(self.processor, [keys[key]], self.model.config).to(self.model.device)
            return compute(inputs).tolist()

        with self.progress(None, name, "sample", total=len(keys), initial=len(keys) - len(missing)) as bar:
            for key, values in zip(missing, shared(computed, missing)):
                if not np.isfinite(values).all():
                    raise ShortVError(
                        f"sample {keys[key].id}: scores are not finite; try --dtype float32, or leave it out"
                    )
                self.once(key, lambda values=values: values)
                bar.update()
        return np.array([self.journal.results[key] for key in keys])

    def once(self, key: str, compute):
        """A result from the journal, else computed and added to it."""
        if key not in self.journal.results:
            value = compute()
            if self.state.is_main_process:
                self.journal.add(key, value)
            self.journal.results[key] = value
        return self.journal.results[key]

    def progress(self, items, name: str, unit: str, **settings) -> tqdm:
        return tqdm(items, desc=name, unit=unit, disable=not self.state.is_main_process, **settings)


class Statistics(NamedTuple):
    """Statistics of LC scores over the samples: empty for given layers, only means for a single sample.

    Args:
        means: mean score of every unit, by set of tokens.
        intervals: 95% intervals (low, high) of the means, for the set of tokens that decides.
        chosen_in: share of resamples that choose each unit.
    """

    means: dict[str, list[float]]
    intervals: dict[str, list[list[float]]]
    chosen_in: list[float]


@dataclass(frozen=True)
class Outcome:
    """Results of a calibration.

    Args:
        candidates: candidates by granularity.
        settings: settings that the scores depend on.
        held_out: ids of the samples that costs were measured on.
    """

    candidates: dict[str, Candidate]
    choice: Choice
    settings: dict
    held_out: list[str]

    @property
    def best(self) -> str:
        """The chosen granularity."""
        return min(self.candidates, key=lambda granularity: self.candidates[granularity].cost.kl)

    @property
    def taken(self) -> Candidate:
        return self.candidates[self.best]

    @cached_property
    def statistics(self) -> Statistics:
        scores, tokens = self.taken.scores, self.settings["tokens"]
        if scores is None:
            return Statistics({}, {}, [])
        sets = [*tokens, f"{tokens[0]}, corrected"][: scores.shape[1]]
        means = dict(zip(sets, scores.mean(axis=0).tolist()))
        if len(scores) == 1:
            return Statistics(means, {}, [])
        chooses = scores.shape[1] - 1 if self.choice.chosen_by == "corrected-lc" else 0
        saved = [self.taken.units.saved(unit) for unit in range(len(self.taken.units))]
        intervals, shares = bootstrap(scores[:, chooses], self.taken.number, saved, self.choice.seed)
        return Statistics(means, {sets[chooses]: intervals.tolist()}, shares.tolist())

    @property
    def summary(self) -> dict:
        """Entries for config.json."""
        taken, choice = self.taken, asdict(self.choice) | {"strategy": self.choice.chosen_by}
        settings = self.settings.items()
        summary = {
            **{key: value for key, value in settings if taken.corrections or not key.startswith("correction")},
            "choice": {key: value for key, value in choice.items() if value is not None},
            "granularity": self.best,
            "flops_ratio": taken.chosen["flops_ratio"],
            "cost": taken.cost._asdict(),
        }
        return summary | ({"cost_without_correction": taken.chosen["cost"]._asdict()} if taken.corrections else {})

    @property
    def details(self) -> dict:
        """Entries for calibration.json."""

        def plain(entry: dict) -> dict:
            return {key: value._asdict() if isinstance(value, Cost) else value for key, value in entry.items()}

        means, intervals, chosen_in = self.statistics
        details = {
            **self.summary,
            "held_out": self.held_out,
            "frozen": self.taken.frozen,
            "order": self.taken.order,
            "curves": {name: [plain(entry) for entry in one.curve] for name, one in self.candidates.items()},
        }
        if means:
            details["scores"] = means
        if chosen_in:
            [details["intervals"]] = intervals.values()
            details["chosen_in"] = chosen_in
        return details

    def by_layer(self, values: dict[str, list]) -> dict[str, list]:
        """Values of units as values of layers, by set of tokens; for blocks by set and kind of block."""
        if self.best == "layer":
            return values
        half = self.taken.units.num_layers
        attention = {f"{kind}, attention": both[:half] for kind, both in values.items()}
        return attention | {f"{kind}, FFN": both[half:] for kind, both in values.items()}


def _write(outcome: Outcome, base: Path, output: Path, dtype, **options) -> None:
    """Write the package with the choice, all results in calibration.json, and the plots.

    Args:
        dtype: dtype of the corrections.
        options: options of [`write_package`].
    """
    taken, candidates = outcome.taken, outcome.candidates
    scored = candidates["layer"].scores if "layer" in candidates else None
    lc_scores = None if scored is None else scored[:, 0].mean(axis=0).tolist()
    settings = {"lc_scores": lc_scores, "calibration": outcome.summary}
    if taken.corrections:
        settings |= {"correction_rank": outcome.choice.correction_rank, "corrected_layers": list(taken.corrections)}

    def write_more(folder: Path) -> None:
        (folder / "calibration.json").write_text(json.dumps(outcome.details, indent=1) + "\n")
        means, intervals, _ = outcome.statistics
        if means:
            means, intervals = outcome.by_layer(means), outcome.by_layer(intervals)
            report.draw_scores(folder / "lc_scores.png", means, taken.frozen, intervals)
            report.draw_tradeoff(folder / "tradeoff.png", candidates, taken)

    tensors = correction_tensors(taken.corrections, dtype)
    write_package(base, output, corrections=tensors, write_more=write_more, **options, **taken.frozen, **settings)


def _tell(outcome: Outcome) -> None:
    """Print the tables, and hints about other choices."""
    console, candidates, best = Console(), outcome.candidates, outcome.best
    means, _, shares = outcome.statistics
    if means:
        console.print(report.score_table(outcome.by_layer(means), outcome.taken.frozen, shares))
    for name, candidate in candidates.items():
        console.print(report.cost_table(name, candidate.curve, candidate.curve.index(candidate.chosen)))
    if len(candidates) > 1:
        kls = {name: candidate.cost.kl for name, candidate in candidates.items()}
        found = ", ".join(f"{name} {kl:.2e}" for name, kl in kls.items())
        console.print(
            f"KL at the same FLOPs: {found}; taken: {best}, {min(kls.values()) / max(kls.values()):.2f} of the other's"
        )
    unsure = report.unsettled(shares)
    if outcome.choice.chosen_by in ("lc", "corrected-lc") and unsure:
        console.print(
            f"more samples could change the choice: between 5% and 95% of resamples take {best} units {unsure}"
        )
