"""`shortv evaluate`: from options to answers, a table, results.json, a plot and the model card."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.methods import parse_methods
from shortv_llava.evaluation.questions import Question, read_questions
from shortv_llava.evaluation.scoring import check_metric, check_references, headline_name, of_subset
from shortv_llava.evaluation.tasks import TASKS, Task
from shortv_llava.model_card import read_scores, record_score
from shortv_llava.outputs import check_writable, only_one
from shortv_llava.package import config_object, load, read_config

MAX_NEW_TOKENS = 128  # of LLaVA's own script for question files


class Data(NamedTuple):
    """What is asked: a task of TASKS, perhaps from a folder, or a file of questions about pictures in a folder."""

    task: str | None
    folder: Path | None
    questions: Path | None
    images: Path | None
    metric: str | None

    def check(self) -> None:
        """Raises ShortVError if the options contradict one another."""
        if (self.task is None) == (self.questions is None):
            raise ShortVError("give --task NAME, or --questions FILE.jsonl and its pictures' folder, --images DIR")
        if self.task is not None and self.task not in TASKS:
            raise ShortVError(f"there is no task {self.task!r}; there are {', '.join(sorted(TASKS))}")
        for name, value, partner in (
            ("--data", self.folder, self.task),
            ("--images", self.images, self.questions),
            ("--metric", self.metric, self.questions),
        ):
            if value is not None and partner is None:
                raise ShortVError(f"{name} goes with {'--task' if name == '--data' else '--questions'}")
        if self.metric is not None:
            check_metric(self.metric)
        for path in (self.folder, self.images):
            if path is not None and not path.is_dir():
                raise ShortVError(f"{path}: no such folder")
        if self.questions is not None and not self.questions.is_file():
            raise ShortVError(f"{self.questions}: no such file")

    def load(self) -> list[Question]:
        if self.task is not None:
            return TASKS[self.task].load(self.folder)
        return read_questions(self.questions, self.images)


def check(
    data: Data,
    output: Path,
    compare: bool = False,
    sweep: str | None = None,
    method: str | None = None,
    card: Path | None = None,
) -> None:
    """Raises [`ShortVError`] if options, as for [`run`], contradict one another or the disk."""
    data.check()
    if sweep is not None:
        _numbers(sweep)
    if compare and sweep is not None:
        raise ShortVError("--compare and --sweep: give one; a sweep compares with the dense model too")
    if method is not None:
        parse_methods(method)
        if sweep is not None:
            raise ShortVError("--method and --sweep: give one; --method takes several, separated by commas")
    if card is not None:
        read_config(card)
        read_scores(card)
        several = sweep is not None or method is not None
        if several or (TASKS[data.task].metric if data.task else data.metric) is None:
            raise ShortVError(
                "--card tells a score of the package: it needs a metric, and takes no --sweep or --method"
            )
    check_writable(output)


def run(
    base: str,
    data: Data,
    output: Path,
    compare: bool = False,
    sweep: str | None = None,
    method: str | None = None,
    card: Path | None = None,
    loading: dict | None = None,
    max_new_tokens: int | None = None,
    **answering,
) -> None:
    """Evaluate and tell.

    Args:
        base: the model, a folder or Hub id.
        sweep: numbers of layers, separated by commas.
        method: names for [`parse_methods`].
        card: package folder whose card shall tell the results.
        loading: of [`load`].
        answering: of [`Answerer`].

    Raises:
        ShortVError: if options contradict each other, data or references are missing, or `output` holds other answers.
    """
    from accelerate import PartialState

    from shortv_llava.evaluation import report
    from shortv_llava.evaluation.answering import Answerer
    from shortv_llava.evaluation.run import choose_variants, evaluate

    check(data, output, compare, sweep, method, card)
    numbers = _numbers(sweep) if sweep is not None else []
    methods = parse_methods(method) if method is not None else []
    task = TASKS.get(data.task)
    metric, scoring = (task.metric, task.metric_kwargs) if task else (data.metric, {})
    subset = task.subset if task else None
    questions = data.load()
    if metric is not None:
        check_references(metric, of_subset(questions, subset))
        check_references(metric, questions)

    loading = dict(loading or {})
    if loading.get("image_aspect_ratio") is None:
        loading["image_aspect_ratio"] = task.image_aspect_ratio if task else "pad"
    loaded = load(base, **loading)
    if card is not None and _computed(loaded.model.config) != _computed(config_object(read_config(card))):
        raise ShortVError(f"--card {card}: its layers are not those to be evaluated; leave out --card or the layers")
    variants = choose_variants(loaded.model.config, compare, numbers, methods)
    if max_new_tokens is None:
        max_new_tokens = task.max_new_tokens if task else MAX_NEW_TOKENS
    if any(found.dropping for found in methods):
        answering["shared_prefix"] = False  # what is dropped of a picture depends on the whole prompt
    if task:
        answering["vicuna_system"] = task.vicuna_system
    answerer = Answerer(loaded.model, loaded.processor, max_new_tokens=max_new_tokens, **answering)
    model_id = base if not Path(base).is_dir() else Path(base).resolve().name
    with only_one(output) if PartialState().is_main_process else nullcontext():
        results = evaluate(answerer, questions, variants, output, model_id, metric, subset, **scoring)
    if not PartialState().is_main_process:
        return

    name = data.task or data.questions.stem
    figure = headline_name(metric, results[0].scores, subset) if metric else None
    about = {"model": model_id, "data": name, "metric": metric, "score": figure, "questions": len(questions)}
    note = task.hub_note if task and data.folder is None else None
    report.write_results(output / "results.json", results, **about, note=note, settings=answerer.settings)
    report.tell(results, f"{name}, {len(questions)} question{'s' * (len(questions) != 1)}", figure, note)
    if numbers:
        unit = "" if metric in ("mme", "cider") else " (%)"
        report.draw_sweep(output / "sweep.png", results, f"{name}: {figure}{unit}" if figure else name)
    if task:
        _write_uploads(task, questions, results, output)
    if card is not None:
        dataset = task.dataset if task else None
        loaded = next((f"loaded in {bits} bit" for bits in (4, 8) if loading.get(f"load_in_{bits}bit")), None)
        number = len(of_subset(questions, subset))
        record_score(card, report.card_score(results, name, dataset, figure, number, loaded))


def _computed(config) -> tuple:
    """What a configuration says of the layers that are not computed as in the base model."""
    return config.frozen_layers(), config.correction_rank, config.corrected_layers


def _write_uploads(task: Task, questions: Sequence[Question], results: Sequence, output: Path) -> None:
    """Write, or name, the files of [`Result`]s that are scored elsewhere."""
    from shortv_llava.evaluation.run import answers_file

    for result in results:
        if task.write_upload is not None:
            path = task.write_upload(questions, result.answers, output if len(results) == 1 else output / result.name)
        elif task.metric is None:
            path = output / answers_file(result.name, len(results))
        else:
            continue
        print(f"to be scored elsewhere: {path}")


def _numbers(sweep: str) -> list[int]:
    try:
        numbers = [int(number) for number in sweep.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise ShortVError(f"--sweep takes numbers of layers, as 8,16,24, not {sweep!r}")
    return numbers
