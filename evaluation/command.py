"""`shortv evaluate`: from options to answers, a table, results.json, a plot and the model card."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from shortv_llava.checkpoint.config import config_object, read_config
from shortv_llava.checkpoint.loading import load
from shortv_llava.checkpoint.processors import pads
from shortv_llava.checkpoint.published import parse_layers
from shortv_llava.checkpoint.source import check_name
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.methods import parse_methods
from shortv_llava.evaluation.questions import Question, read_questions
from shortv_llava.evaluation.scoring import check_metric, check_references, headline_name, of_subset
from shortv_llava.evaluation.tasks import TASKS, Task
from shortv_llava.files.outputs import check_writable, only_one
from shortv_llava.hub.card import record_score, text_hint
from shortv_llava.hub.scores import read_scores

MAX_NEW_TOKENS = 128  # of LLaVA's own script for question files


@dataclass(frozen=True)
class EvaluationOptions:
    """What is asked of `shortv evaluate`, named as its options.

    One of `task`, `questions` and `lmms_tasks` says on what the model is evaluated.

    Args:
        model: folder or Hub id.
        output: folder for answers and results.
        task, data: a task of TASKS, and the folder of its data.
        questions, images, metric: a file of questions, the folder of their pictures, and what scores the answers.
        lmms_tasks, include_path, limit: names of lmms-eval's tasks, separated by commas, a folder with others like
            them, and how many samples of each are asked.
        compare, sweep, method: the variants of the model beside it; a sweep names numbers of layers, methods are for
            [`parse_methods`], both separated by commas.
        card: package folder whose card shall tell the scores.
        replaced_layers, dtype, device_map, load_in_4bit, load_in_8bit, image_aspect_ratio: of [`load`].
        batch_size, max_new_tokens, shared_prefix, temperature, top_p, seed: of [`Answerer`].
    """

    model: str
    output: Path
    task: str | None = None
    data: Path | None = None
    questions: Path | None = None
    images: Path | None = None
    metric: str | None = None
    lmms_tasks: str | None = None
    include_path: Path | None = None
    limit: int | None = None
    compare: bool = False
    sweep: str | None = None
    method: str | None = None
    card: Path | None = None
    replaced_layers: str | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    shared_prefix: bool = True
    image_aspect_ratio: str | None = None
    dtype: str = "auto"
    device_map: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False

    def check(self) -> None:
        """Raises [`ShortVError`] if the options contradict one another or the disk, or there is no such task."""
        check_name(self.model)
        if self.replaced_layers is not None:
            parse_layers(self.replaced_layers, self.model)
        self._check_data()
        self._check_variants()
        if self.card is not None:
            self._check_card()
        check_writable(self.output)
        if self.lmms_tasks is not None:
            self._check_lmms_tasks()

    def _check_data(self) -> None:
        if (self.task, self.questions, self.lmms_tasks).count(None) != 2:
            raise ShortVError(
                "give one of --task NAME, --lmms-tasks NAMES, or --questions FILE.jsonl and its pictures' folder, "
                "--images DIR"
            )
        if self.task is not None and self.task not in TASKS:
            raise ShortVError(f"there is no task {self.task!r}; there are {', '.join(sorted(TASKS))}")
        for name, value, partner, given in (
            ("--data", self.data, "--task", self.task),
            ("--images", self.images, "--questions", self.questions),
            ("--metric", self.metric, "--questions", self.questions),
            ("--include-path", self.include_path, "--lmms-tasks", self.lmms_tasks),
            ("--limit", self.limit, "--lmms-tasks", self.lmms_tasks),
        ):
            if value is not None and given is None:
                raise ShortVError(f"{name} goes with {partner}")
        if self.metric is not None:
            check_metric(self.metric)
        for path in (self.data, self.images, self.include_path):
            if path is not None and not path.is_dir():
                raise ShortVError(f"{path}: no such folder")
        if self.questions is not None and not self.questions.is_file():
            raise ShortVError(f"{self.questions}: no such file")

    def _check_variants(self) -> None:
        if self.sweep is not None:
            self.numbers()
        if self.compare and self.sweep is not None:
            raise ShortVError("--compare and --sweep: give one; a sweep compares with the dense model too")
        if self.method is not None:
            parse_methods(self.method)
            if self.sweep is not None:
                raise ShortVError("--method and --sweep: give one; --method takes several, separated by commas")

    def _check_card(self) -> None:
        read_config(self.card)
        read_scores(self.card)
        if self.limit is not None:
            raise ShortVError("--card tells scores of whole tasks: leave out --limit")
        has_score = self.lmms_tasks or (TASKS[self.task].metric if self.task else self.metric)
        if not has_score or self.sweep is not None or self.method is not None:
            raise ShortVError(
                "--card tells a score of the package: it needs a metric, and takes no --sweep or --method"
            )

    def _check_lmms_tasks(self) -> None:
        for name, given in (
            ("--sweep", self.sweep is not None),
            ("--method", self.method is not None),
            ("--max-new-tokens", self.max_new_tokens is not None),
            ("--temperature", self.temperature != 0),
            ("--top-p", self.top_p != 1),
        ):
            if given:
                why = "its tasks say how to answer" if name not in ("--sweep", "--method") else "it takes --compare"
                raise ShortVError(f"--lmms-tasks and {name}: leave one out; {why}")
        names = self.lmms_names()
        if not all(names) or len(set(names)) < len(names):
            raise ShortVError(f"--lmms-tasks takes names of tasks, each once, not {self.lmms_tasks!r}")
        if find_spec("lmms_eval") is None:
            raise ShortVError("--lmms-tasks needs lmms-eval: pip install lmms_eval==0.7.3 'filelock<4.3'")
        from shortv_llava.evaluation.lmms_tasks import check_tasks

        check_tasks(names, self.include_path)

    def numbers(self) -> list[int]:
        """Of layers, of the sweep; none without one."""
        if self.sweep is None:
            return []
        try:
            numbers = [int(number) for number in self.sweep.split(",")]
        except ValueError:
            numbers = [-1]
        if min(numbers) < 0:
            raise ShortVError(f"--sweep takes numbers of layers, as 8,16,24, not {self.sweep!r}")
        return numbers

    def lmms_names(self) -> list[str]:
        """Of lmms-eval's tasks."""
        return [name.strip() for name in self.lmms_tasks.split(",")]

    def loading(self, image_aspect_ratio: str = "pad") -> dict:
        """The arguments of [`load`] beside the model; `image_aspect_ratio` where none is asked for."""
        names = ("replaced_layers", "dtype", "device_map", "load_in_4bit", "load_in_8bit")
        given = {name: getattr(self, name) for name in names}
        return given | {"image_aspect_ratio": self.image_aspect_ratio or image_aspect_ratio}

    def model_id(self) -> str:
        """What results call the model: a folder's name, or the Hub id."""
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    def loaded_in(self) -> str | None:
        """How the weights were quantised on loading, in words."""
        return next((f"loaded in {bits} bit" for bits in (4, 8) if getattr(self, f"load_in_{bits}bit")), None)


def run(options: EvaluationOptions) -> None:
    """Evaluate and tell.

    Args:
        options: checked ones, see [`EvaluationOptions.check`].

    Raises:
        ShortVError: if data or references are missing, or the output folder holds other answers.
    """
    (_run_questions if options.lmms_tasks is None else _run_lmms_tasks)(options)
    if options.card is not None and _is_main_process() and (hint := text_hint(options.card)):
        print(hint)


def _run_questions(options: EvaluationOptions) -> None:
    from shortv_llava.evaluation import report
    from shortv_llava.evaluation.answering import Answerer
    from shortv_llava.evaluation.run import choose_variants, evaluate

    numbers, output = options.numbers(), options.output
    methods = parse_methods(options.method) if options.method is not None else []
    task = TASKS.get(options.task)
    metric, scoring = (task.metric, task.metric_kwargs) if task else (options.metric, {})
    subset = task.subset if task else None
    questions = task.load(options.data) if task else read_questions(options.questions, options.images)
    if metric is not None:
        check_references(metric, of_subset(questions, subset))
        check_references(metric, questions)

    loaded = load(options.model, **options.loading(task.image_aspect_ratio if task else "pad"))
    _check_layers(options, loaded.model.config)
    variants = choose_variants(loaded.model.config, options.compare, numbers, methods)
    answerer = Answerer(
        loaded.model,
        loaded.processor,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens or (task.max_new_tokens if task else MAX_NEW_TOKENS),
        # What is dropped of a picture depends on the whole prompt.
        shared_prefix=options.shared_prefix and not any(found.dropping for found in methods),
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        **({"vicuna_system": task.vicuna_system} if task else {}),
    )
    with _alone(output):
        results = evaluate(answerer, questions, variants, output, options.model_id(), metric, subset, **scoring)
    if not _is_main_process():
        return

    name = options.task or options.questions.stem
    figure = headline_name(metric, results[0].scores, subset) if metric else None
    about = {"model": options.model_id(), "data": name, "metric": metric, "score": figure, "questions": len(questions)}
    note = task.hub_note if task and options.data is None else None
    report.write_results(output / "results.json", results, **about, note=note, settings=answerer.settings)
    report.tell(results, f"{name}, {len(questions)} question{'s' * (len(questions) != 1)}", figure, note)
    if numbers:
        unit = "" if metric in ("mme", "cider") else " (%)"
        report.draw_sweep(output / "sweep.png", results, f"{name}: {figure}{unit}" if figure else name)
    if task:
        _write_uploads(task, questions, results, output)
    if options.card is not None:
        dataset, number = task.dataset if task else None, len(of_subset(questions, subset))
        record_score(options.card, report.card_score(results, name, dataset, figure, number, options.loaded_in()))


def _run_lmms_tasks(options: EvaluationOptions) -> None:
    from shortv_llava.evaluation import lmms_tasks, report

    model = lmms_tasks.TimedLlava(
        options.model, batch_size=options.batch_size, shared_prefix=options.shared_prefix, **options.loading()
    )
    _check_layers(options, model.model.config)
    variants = lmms_tasks.choose_variants(model.model.config, options.compare)
    harness = f"lmms-eval {metadata.version('lmms_eval')}"
    settings = {
        "model": options.model_id(),
        "harness": harness,
        "limit": options.limit,
        "seed": options.seed,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "image_aspect_ratio": "pad" if pads(model.processor) else "base",
        "loaded": options.loaded_in(),
    }
    with _alone(options.output):
        found = lmms_tasks.evaluate(
            model, options.lmms_names(), variants, options.output, settings, options.include_path
        )
    if not _is_main_process():
        return
    report.write_task_results(options.output / "results.json", found, **settings)
    report.tell_tasks(found, f"{options.model_id()}, {harness}")
    if options.card is not None:
        note = ", ".join(filter(None, (harness, options.loaded_in())))
        scores = [
            report.card_score(task.results, task.name, task.dataset, task.metric, task.questions, note)
            for task in found
        ]
        record_score(options.card, *scores)


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _alone(output: Path) -> AbstractContextManager:
    """The main process sees that no other command writes into the folder."""
    return only_one(output) if _is_main_process() else nullcontext()


def _check_layers(options: EvaluationOptions, config) -> None:
    """Raises ShortVError if the card would tell scores of other layers than its package's."""
    if options.card is not None and _computed(config) != _computed(config_object(read_config(options.card))):
        raise ShortVError(
            f"--card {options.card}: its layers are not those to be evaluated; leave out --card or the layers"
        )


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
