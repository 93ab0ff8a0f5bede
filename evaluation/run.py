"""One evaluation: a model, with one or several choices of layers, answers questions and is scored."""

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from tqdm import tqdm

from shortv_llava.benchmarks.measure import seconds
from shortv_llava.calibrate.contribution import dense, divergence, without_corrections
from shortv_llava.calibrate.selection import Units
from shortv_llava.checkpoint.config import LAYER_LISTS
from shortv_llava.distributed import shared
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.answering import Answerer, Tokens
from shortv_llava.evaluation.answers import AnswersFile
from shortv_llava.evaluation.dropping import dropped
from shortv_llava.evaluation.hiding import hidden
from shortv_llava.evaluation.methods import Dropping, Method, check_layers
from shortv_llava.evaluation.questions import Question
from shortv_llava.evaluation.scoring import bootstrap, check_references, headline, of_subset, score
from shortv_llava.files.json_lines import add_to_record, read_record
from shortv_llava.flops import TEXT_TOKENS, flops_ratio, image_tokens, replacement_order

DENSE, OWN = "dense", "shortv"
PREFILLS = 5  # timed prefills of each variant, after one for warm-up


class Variant(NamedTuple):
    """The model with a choice of layers, and of visual tokens to drop."""

    name: str  # also used in file names
    frozen: dict[str, list[int]]  # the configuration's three lists
    dropping: Dropping | None = None
    corrects: bool = True  # with the corrections that the model has

    def flops_ratio(self, config, text_tokens: int = TEXT_TOKENS, visual_tokens: int | None = None) -> float:
        """Prefill FLOPs, relative to the dense model; by default of a prompt with one full-size image."""
        config, visual = copy.copy(config), image_tokens(config) if visual_tokens is None else visual_tokens
        config.set_replaced_layers(*self.frozen.values())
        if not self.corrects:
            config.corrected_layers = ()
        num_layers = config.text_config.num_hidden_layers
        counts = visual if self.dropping is None else self.dropping.visual_tokens(visual, num_layers)
        return flops_ratio(config, text_tokens, counts)

    @contextmanager
    def applied(self, model, drop: Callable = hidden) -> Iterator[None]:
        """Make the model this variant within the context; `drop` hides tokens ([`hidden`]) or drops them."""
        model.set_replaced_layers(*self.frozen.values())
        with nullcontext() if self.corrects else without_corrections(model), drop(model, self.dropping):
            yield


@dataclass
class Result:
    """Results of a variant.

    Args:
        flops_ratio: prefill FLOPs, relative to the dense model.
        answers: answers by question id.
        scores: scores of the metric, see [`score`]; empty without a metric.
        headline, interval: the score that variants are compared by, and its 95% interval.
        retention, retention_interval: that score in percent of the dense model's.
        agreement: share of answers equal to the dense model's, in percent.
        divergences: KL(this || first variant) of the next-token distributions at the prompts' ends, nats, the direction
            of LC scores; `kl` is their mean.
        seconds: time of all batches, in this run and in earlier interrupted runs.
        prompted, prefilled: number of visual and text tokens of the prompts, and of those that the model computed.
        speed_up: the dense model's seconds divided by these; None if tokens are only hidden.
        prefill_seconds: median time of one question's prefill, with tokens really dropped; measured if any variant
            drops tokens.
    """

    name: str
    frozen: dict[str, list[int]]
    flops_ratio: float
    dropping: Dropping | None = None
    answers: dict[int | str, str] = field(default_factory=dict)
    divergences: list[float] = field(default_factory=list)
    kl: float | None = None
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
    prefill_seconds: float | None = None

    def count(self, measured: dict) -> None:
        """Add the measurements of a batch: `divergences`, `seconds`, `prompted` and `prefilled` tokens."""
        self.divergences += measured.get("divergences", [])  # missing in older runs
        self.seconds += measured["seconds"]
        self.prompted += Tokens(*measured["prompted"])
        self.prefilled += Tokens(*measured["prefilled"])


def choose_variants(
    config, compare: bool = False, sweep: Sequence[int] = (), methods: Sequence[Method] = ()
) -> list[Variant]:
    """The model itself; for a comparison the dense model before it; for a sweep one variant for each number of layers.

    With several methods, the dense model and then each method. With one method, that method; the dense model before it
    only for a comparison. Layers of a sweep are taken in the configuration's order, then by its LC scores.

    Raises:
        ShortVError: if there is nothing to compare, no order for so many layers, or a method does not fit the model.
    """
    units = Units(config, "layer")
    own = {name: list(getattr(config, name)) for name in LAYER_LISTS}
    is_dense = not any(own.values())
    if sweep:
        order = replacement_order(config)
        for number in sweep:
            if not 0 <= number <= units.num_layers:
                raise ShortVError(f"--sweep {number}: the model has {units.num_layers} layers")
            if number > len(order):
                raise ShortVError(
                    f"--sweep {number}: this model names an order of replacement for {len(order)} layers alone; "
                    "calibrate it for one of all layers"
                )
        return [Variant(DENSE, units.frozen([]))] + [
            Variant(f"{number}-layers", units.frozen(order[:number])) for number in sweep if number > 0
        ]
    needs_layers = any(method.shortv for method in methods) if methods else compare
    if needs_layers and is_dense:
        option = "--method shortv" if methods else "--compare"
        raise ShortVError(f"{option}: the model replaces no layers; give --replaced-layers, or a package")
    if methods:
        check_layers(methods, config.text_config.num_hidden_layers)
        chosen = [Variant(name, own if shortv else units.frozen([]), drop) for name, shortv, drop in methods]
        return [Variant(DENSE, units.frozen([]))] * (compare or len(methods) > 1) + chosen
    return ([Variant(DENSE, units.frozen([]))] if compare else []) + [Variant(DENSE if is_dense else OWN, own)]


def answers_file(variant: str, number: int) -> str:
    """The name of a variant's answers file, for `number` variants."""
    return "answers.jsonl" if number == 1 else f"answers-{variant}.jsonl"


def evaluate(
    answerer: Answerer,
    questions: Sequence[Question],
    variants: Sequence[Variant],
    output: Path,
    model_id: str,
    metric: str | None = None,
    subset: str | None = None,
    digest: str | None = None,
    **metric_kwargs,
) -> list[Result]:
    """Let each variant answer the questions, write the answers into `output`, score and compare them.

    Variants answer each batch in turns, in changing order, so that their times can be compared. The batches are divided
    among processes; the main process writes and scores. An interrupted run continues.

    Args:
        output: folder for `answers.jsonl` of a single variant, or `answers-NAME.jsonl` of each.
        metric: a metric of `metrics/`; without one, answers are only written and compared.
        subset: subset of questions by whose score variants are compared; all by default.
        digest: digest of the model's files, see [`checkpoint_digest`]; answers of other files are refused.

    Raises:
        ShortVError: if references are missing, a picture cannot be read, or `output` holds other answers.
    """
    if metric is not None:
        check_references(metric, questions)
    output.mkdir(parents=True, exist_ok=True)
    state = PartialState()
    settings = answerer.settings | ({} if digest is None else {"weights_and_processor": digest})
    record = _Record(output, model_id, settings, variants, questions)
    state.wait_for_everyone()  # before any process writes

    with dense(answerer.model):  # the model's own layers are restored afterwards
        results = {
            variant.name: Result(*variant[:2], variant.flops_ratio(answerer.model.config), variant.dropping)
            for variant in variants
        }
        _answer(answerer, questions, variants, record)
        for entry in record.measured:
            if entry["variant"] in results:
                results[entry["variant"]].count(entry)
        if state.is_main_process and any(variant.dropping for variant in variants):
            for name, taken in _time_prefills(answerer, questions, variants).items():
                results[name].prefill_seconds = taken
    if state.is_main_process:
        for file in record.files.values():
            file.finish()
    state.wait_for_everyone()
    for name, result in results.items():
        result.answers = record.files[name].answers
    if state.is_main_process:
        _score(list(results.values()), questions, metric, subset, metric_kwargs)
    return list(results.values())


class _Record:
    """The finished part of an evaluation: answers and measurements. The main process writes it to files.

    Attributes:
        files: files of answers, by variant.
        measured: an entry for each variant and batch, see [`Result.count`].
    """

    def __init__(self, output: Path, model_id: str, settings: dict, variants: Sequence[Variant], questions):
        self.files = {}
        for variant in variants:
            metadata = variant.frozen | settings
            if variant.dropping is not None:
                metadata |= {"dropping": variant.dropping._asdict()}
            path = output / answers_file(variant.name, len(variants))
            self.files[variant.name] = AnswersFile(path, model_id, metadata, questions)
        self.path = output / "measured.jsonl"
        self.measured = [entry for _, entry in read_record(self.path)]

    def has(self, batch: Sequence[Question], variant: str) -> bool:
        """Whether the variant has answered all of a batch."""
        return all(question.id in self.files[variant].lines for question in batch)

    def add(self, batch: Sequence[Question], answers: Sequence[str], entry: dict) -> None:
        main = PartialState().is_main_process
        self.files[entry["variant"]].add(batch, answers, write=main)
        self.measured.append(entry)
        if main:
            add_to_record(self.path, [entry])


def _answer(answerer: Answerer, questions: Sequence[Question], variants: Sequence[Variant], record: _Record) -> None:
    """Let each variant answer the questions that it has not answered yet."""
    names = [variant.name for variant in variants]
    batches = answerer.batches(questions)
    unanswered = [batch for batch in batches if not all(record.has(batch, name) for name in names)]
    if not unanswered:
        PartialState().print("all answers are there already, and none is asked for again")
    elif len(variants) > 1:
        answerer.answer(unanswered[0][:1])  # warm-up, so that set-up does not count for the first variant
    found = shared(lambda numbered: _in_turns(answerer, variants, *numbered), list(enumerate(unanswered)))
    silent = not PartialState().is_main_process
    with tqdm(total=len(questions), desc="questions", unit="q", disable=silent) as bar:
        bar.update(len(questions) - sum(map(len, unanswered)))
        for batch, answered in zip(unanswered, found):
            for answers, entry in answered:
                if not record.has(batch, entry["variant"]):  # else already counted by an interrupted run
                    record.add(batch, answers, entry)
            bar.update(len(batch))


def _in_turns(
    answerer: Answerer, variants: Sequence[Variant], number: int, batch: list[Question]
) -> list[tuple[list[str], dict]]:
    """Answers and measurements of each variant, for batch number `number`."""
    found, logits = [], {}
    for variant in variants if number % 2 == 0 else variants[::-1]:
        with variant.applied(answerer.model):
            began = time.perf_counter()
            answered = answerer.answer(batch)
            taken = time.perf_counter() - began
        logits[variant.name] = answered.logits
        entry = {"variant": variant.name, "seconds": taken}
        entry |= {"prompted": answered.prompted, "prefilled": answered.prefilled}
        found.append((answered.answers, entry))
    for _, entry in found:
        divergences = divergence(logits[variants[0].name], logits[entry["variant"]][None], "release")
        entry["divergences"] = divergences[0].tolist()
    return found


@torch.no_grad()
def _time_prefills(answerer: Answerer, questions: Sequence[Question], variants: Sequence[Variant]) -> dict[str, float]:
    """Prefill seconds of the first question with a picture, by variant: medians, in turns, tokens really dropped."""
    inputs = answerer.inputs([next((question for question in questions if question.images), questions[0])])
    times = {variant.name: [] for variant in variants}
    for number in range(1 + PREFILLS):
        for variant in variants if number % 2 == 0 else variants[::-1]:
            with variant.applied(answerer.model, dropped):
                prefill = functools.partial(answerer.model, **inputs, use_cache=True, logits_to_keep=1)
                times[variant.name].append(seconds(prefill, answerer.model.device))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


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
            result.kl = statistics.mean(result.divergences) if result.divergences else None
            if result.seconds and result.dropping is None:
                result.speed_up = first.seconds / result.seconds
            if first.headline:
                result.retention = 100 * (result.headline / first.headline)
                result.retention_interval = intervals.retention[result.name]
