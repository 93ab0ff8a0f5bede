"""One evaluation: a model, perhaps with several choices of layers, answers questions and is scored."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from shortv_llava.calibrate.contribution import dense
from shortv_llava.calibrate.selection import Units, lowest
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.answering import Answerer, Tokens
from shortv_llava.evaluation.answers import AnswersFile
from shortv_llava.evaluation.questions import Question
from shortv_llava.evaluation.scoring import bootstrap, check_references, headline, of_subset, score
from shortv_llava.flops import flops_ratio
from shortv_llava.package import LAYER_LISTS

DENSE, OWN = "dense", "shortv"


class Variant(NamedTuple):
    """The model with some choice of layers."""

    name: str  # also of files
    frozen: dict[str, list[int]]  # the configuration's three lists


@dataclass
class Result:
    """What came of a variant.

    Args:
        flops_ratio: of the prefill, to the dense model's.
        answers: by question id.
        scores: of the metric, see [`score`]; none without a metric.
        headline, interval: the score that variants are compared by, and where it lies with 95% confidence.
        retention, retention_interval: that score in percent of the dense model's.
        agreement: answers equal to the dense model's, in percent.
        seconds: that the batches took, in this run and in interrupted ones before.
        prompted, prefilled: visual and text tokens of their prompts, and of these those that went through the model.
        speed_up: the dense model's seconds over these.
    """

    name: str
    frozen: dict[str, list[int]]
    flops_ratio: float
    answers: dict[int | str, str] = field(default_factory=dict)
    seconds: float = 0.0
    prompted: Tokens = Tokens(0, 0)
    prefilled: Tokens = Tokens(0, 0)
    scores: dict[str, float] = field(default_factory=dict)
    headline: float | None = None
    interval: tuple[float, float] | None = None
    retention: float | None = None
    retention_interval: tuple[float, float] | None = None
    agreement: float | None = None
    speed_up: float | None = None

    def count(self, measured: dict) -> None:
        """Add what a batch took: `seconds`, `prompted` and `prefilled` tokens."""
        self.seconds += measured["seconds"]
        self.prompted += Tokens(*measured["prompted"])
        self.prefilled += Tokens(*measured["prefilled"])


def choose_variants(config, compare: bool = False, sweep: Sequence[int] = ()) -> list[Variant]:
    """The model as it is; for a comparison the dense one before it; for a sweep one for each number of layers.

    Layers of a sweep are taken in the configuration's order, then by its LC scores.

    Raises:
        ShortVError: if there is nothing to compare, or no order for so many layers.
    """
    units = Units(config, "layer")
    own = {name: list(getattr(config, name)) for name in LAYER_LISTS}
    is_dense = not any(own.values())
    if sweep:
        order = list(config.replaced_layers)
        order += [layer for layer in lowest(config.lc_scores or ()) if layer not in order]
        for number in sweep:
            if not 0 <= number <= len(order):
                raise ShortVError(
                    f"--sweep {number}: this model names an order of replacement for {len(order)} layers alone; "
                    "calibrate it for one of all layers"
                )
        return [Variant(DENSE, units.frozen([]))] + [
            Variant(f"{number}-layers", units.frozen(order[:number])) for number in sweep if number > 0
        ]
    if compare and is_dense:
        raise ShortVError("--compare: the model replaces no layers; give --replaced-layers, or a package")
    return ([Variant(DENSE, units.frozen([]))] if compare else []) + [Variant(DENSE if is_dense else OWN, own)]


def answers_file(variant: str, number: int) -> str:
    """The name of a variant's answers file, one of `number`."""
    return "answers.jsonl" if number == 1 else f"answers-{variant}.jsonl"


def evaluate(
    answerer: Answerer,
    questions: Sequence[Question],
    variants: Sequence[Variant],
    output: Path,
    model_id: str,
    metric: str | None = None,
    subset: str | None = None,
    **metric_kwargs,
) -> list[Result]:
    """Let each variant answer the questions, write the answers into `output`, score and compare them.

    Variants answer each batch in turns, in changing order, so that their times compare. Processes take batches in
    turns; the main one writes and scores. A run that was interrupted continues.

    Args:
        output: the folder; `answers.jsonl` for a single variant, else `answers-NAME.jsonl` for each.
        metric: of `metrics/`; without one, answers are only written and compared.
        subset: of questions, by whose score variants are compared; all by default.

    Raises:
        ShortVError: if references are missing, a picture cannot be read, or `output` holds other answers.
    """
    if metric is not None:
        check_references(metric, questions)
    output.mkdir(parents=True, exist_ok=True)
    state = PartialState()
    files = {}
    for variant in variants:
        metadata = variant.frozen | answerer.settings
        path = output / answers_file(variant.name, len(variants))
        files[variant.name] = AnswersFile(path, model_id, metadata, questions)
    measured = output / "measured.jsonl"
    before = _read_measured(measured)
    state.wait_for_everyone()  # before anyone writes

    unanswered = [
        batch
        for batch in answerer.batches(questions)
        if any(question.id not in file.lines for file in files.values() for question in batch)
    ]
    with dense(answerer.model):  # its own layers come back afterwards
        results = {
            variant.name: Result(variant.name, variant.frozen, _flops_ratio(answerer.model, variant))
            for variant in variants
        }
        for entry in before:
            if entry["variant"] in results:
                results[entry["variant"]].count(entry)
        if len(variants) > 1 and unanswered:
            answerer.answer(unanswered[0][:1])  # what the first pass sets up shall not count for the first variant
        count, rank = state.num_processes, state.process_index
        with tqdm(total=len(questions), desc="questions", unit="q", disable=not state.is_main_process) as bar:
            bar.update(len(questions) - sum(map(len, unanswered)))
            for start in range(0, len(unanswered), count):
                found = []
                for number in range(start + rank, min(start + rank + 1, len(unanswered))):
                    for variant in variants if number % 2 == 0 else variants[::-1]:
                        answerer.model.set_replaced_layers(*variant.frozen.values())
                        began = time.perf_counter()
                        answered = answerer.answer(unanswered[number])
                        found.append((number, variant.name, answered, time.perf_counter() - began))
                for number, name, answered, seconds in gather_object(found) if count > 1 else found:
                    if all(question.id in files[name].lines for question in unanswered[number]):
                        continue  # an interrupted run counted it, and missed another variant's
                    files[name].add(unanswered[number], answered.answers, write=state.is_main_process)
                    entry = {"variant": name, "seconds": seconds}
                    entry |= {"prompted": answered.prompted, "prefilled": answered.prefilled}
                    results[name].count(entry)
                    if state.is_main_process:
                        with open(measured, "a", encoding="utf-8") as file:
                            file.write(json.dumps(entry) + "\n")
                bar.update(sum(map(len, unanswered[start : start + count])))
    if state.is_main_process:
        for file in files.values():
            file.finish()
    state.wait_for_everyone()
    for name, result in results.items():
        result.answers = files[name].answers
    if state.is_main_process:
        _score(list(results.values()), questions, metric, subset, metric_kwargs)
    return list(results.values())


def _read_measured(path: Path) -> list[dict]:
    """What the batches of earlier runs took; a last line that a kill cut off goes."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content and PartialState().is_main_process:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _score(results: list[Result], questions, metric: str | None, subset: str | None, metric_kwargs: dict) -> None:
    """Score each result and compare it with the first."""
    first = results[0]
    if metric is not None:
        answers = {result.name: result.answers for result in results}
        intervals = bootstrap(metric, of_subset(questions, subset), answers, **metric_kwargs)
    for result in results:
        if metric is not None:
            result.scores = score(metric, questions, result.answers, **metric_kwargs)
            result.headline = headline(metric, result.scores, subset)
            result.interval = intervals.headline[result.name]
        if len(results) > 1:
            same = [result.answers[id] == answer for id, answer in first.answers.items()]
            result.agreement = 100 * statistics.mean(same)
            result.speed_up = first.seconds / result.seconds if result.seconds else None
            if first.headline:
                result.retention = 100 * (result.headline / first.headline)
                result.retention_interval = intervals.retention[result.name]


def _flops_ratio(model, variant: Variant) -> float:
    model.set_replaced_layers(*variant.frozen.values())
    return flops_ratio(model.config)
