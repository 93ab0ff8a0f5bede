"""`shortv evaluate`: from options to answers, a table, results.json, a plot and the model card."""

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.questions import Question, read_questions
from shortv_llava.evaluation.scoring import check_metric, check_references
from shortv_llava.evaluation.tasks import TASKS
from shortv_llava.outputs import check_writable, only_one
from shortv_llava.package import load, read_config

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
    data: Data, output: Path, compare: bool = False, sweep: str | None = None, card: Path | None = None
) -> None:
    """Raises [`ShortVError`] if options, as for [`run`], contradict one another or the disk."""
    data.check()
    if sweep is not None:
        _numbers(sweep)
    if compare and sweep is not None:
        raise ShortVError("--compare and --sweep: give one; a sweep compares with the dense model too")
    if card is not None:
        read_config(card)
        if sweep is not None or (TASKS[data.task].metric if data.task else data.metric) is None:
            raise ShortVError("--card tells a score of the package: it goes with a metric, and without --sweep")
    check_writable(output)


def run(
    base: str,
    data: Data,
    output: Path,
    compare: bool = False,
    sweep: str | None = None,
    card: Path | None = None,
    loading: dict | None = None,
    max_new_tokens: int | None = None,
    **answering,
) -> None:
    """Evaluate and tell.

    Args:
        base: the model, a folder or Hub id.
        sweep: numbers of layers, separated by commas.
        card: package folder whose card shall tell the results.
        loading: of [`load`].
        answering: of [`Answerer`].

    Raises:
        ShortVError: if options contradict each other, data or references are missing, or `output` holds other answers.
    """
    from accelerate import PartialState
    from rich.console import Console

    from shortv_llava.evaluation import report
    from shortv_llava.evaluation.answering import Answerer
    from shortv_llava.evaluation.run import choose_variants, evaluate
    from shortv_llava.model_card import write_card

    check(data, output, compare, sweep, card)
    numbers = _numbers(sweep) if sweep is not None else []
    task = TASKS.get(data.task)
    metric, metric_kwargs = (task.metric, task.metric_kwargs) if task else (data.metric, {})
    questions = data.load()
    if metric is not None:
        check_references(metric, questions)

    loading = dict(loading or {})
    if loading.get("image_aspect_ratio") is None:
        loading["image_aspect_ratio"] = task.image_aspect_ratio if task else "pad"
    loaded = load(base, **loading)
    variants = choose_variants(loaded.model.config, compare, numbers)
    if max_new_tokens is None:
        max_new_tokens = task.max_new_tokens if task else MAX_NEW_TOKENS
    if task:
        answering["vicuna_system"] = task.vicuna_system
    answerer = Answerer(loaded.model, loaded.processor, max_new_tokens=max_new_tokens, **answering)
    model_id = base if not Path(base).is_dir() else Path(base).resolve().name
    with only_one(output) if PartialState().is_main_process else nullcontext():
        results = evaluate(answerer, questions, variants, output, model_id, metric, **metric_kwargs)
    if not PartialState().is_main_process:
        return

    name = data.task or data.questions.stem
    about = {"model": model_id, "data": name, "metric": metric, "questions": len(questions)}
    report.write_results(output / "results.json", results, **about, settings=answerer.settings)
    console = Console()
    title = f"{name}, {len(questions)} question{'s' * (len(questions) != 1)}"
    console.print(report.table(results, title=title, title_justify="left"))
    if note := report.prefill_note(results):
        console.print(note, highlight=False)
    if len(results) == 1:
        for score, value in results[0].scores.items():
            console.print(f"{score}: {value:.2f}")
    if numbers:
        report.draw_sweep(output / "sweep.png", results, f"{name}, {metric}" if metric else name)
    for result in results if task and task.write_upload else ():
        folder = output if len(results) == 1 else output / result.name
        folder.mkdir(exist_ok=True)
        console.print(f"to be scored elsewhere: {task.write_upload(questions, result.answers, folder)}")
    if card is not None:
        write_card(card, eval_results=report.card_results(results, name, metric))


def _numbers(sweep: str) -> list[int]:
    try:
        numbers = [int(number) for number in sweep.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise ShortVError(f"--sweep takes numbers of layers, as 8,16,24, not {sweep!r}")
    return numbers
