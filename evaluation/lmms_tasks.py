"""lmms-eval's tasks for the variants of one model: `shortv evaluate --lmms-tasks`."""

import difflib
import functools
import json
import re
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import handle_non_serializable, load_yaml_config
from loguru import logger
from tenacity import RetryError

from shortv_llava.calibrate.contribution import dense
from shortv_llava.errors import ShortVError, first_line
from shortv_llava.evaluation.harness import ShortVLlava
from shortv_llava.evaluation.lmms_results import TaskResults, compare
from shortv_llava.evaluation.questions import Question
from shortv_llava.evaluation.run import Variant
from shortv_llava.evaluation.run import choose_variants as variants_of
from shortv_llava.files.json_files import read_json
from shortv_llava.files.outputs import replacing_file

CORRECTED = "corrected"


class TimedLlava(ShortVLlava):
    """The model of the harness, which tells how long a task's answers took and what its samples are about.

    Attributes:
        seconds: by task, since it was emptied.
        image_ids: by task and document, what stands for the same picture in several.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seconds, self.image_ids = {}, {}
        self.tasks: list[str] = []  # of the requests at hand

    def clean(self) -> None:
        """Nothing, where lmms-eval would give the model away after its tasks: the next variant needs it."""

    def _answer(self, questions: Sequence[Question], settings: Sequence[dict]) -> list[str]:
        return self._timed(super()._answer, questions, settings)

    def _score(self, batch: Sequence[Question], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        return self._timed(super()._score, batch, continuations)

    def _timed(self, method: Callable, questions: Sequence[Question], asked: Sequence) -> list:
        """What a method makes of questions and of what else is asked of them, one task after another."""
        numbers: dict[str, list[int]] = {}
        for number, question in enumerate(questions):
            numbers.setdefault(self.tasks[question.id], []).append(number)
        found = {}
        for task, members in numbers.items():
            given = [questions[number] for number in members], [asked[number] for number in members]
            if task not in self.seconds:  # what a first pass sets up shall not count for the first variant
                with torch.random.fork_rng():
                    method(*(each[:1] for each in given))
            began = time.perf_counter()
            found |= zip(members, method(*given))
            self.seconds[task] = self.seconds.get(task, 0.0) + time.perf_counter() - began
        return [found[number] for number in range(len(questions))]

    def _questions(self, requests: Sequence[Instance]) -> list[Question]:
        self.tasks = [request.task_name for request in requests]
        questions = super()._questions(requests)
        for request, question in zip(requests, questions):
            self.image_ids[request.task_name, request.doc_id] = question.image_id
        return questions


def check_tasks(names: Sequence[str], include_path: Path | None) -> None:
    """Raises [`ShortVError`] if lmms-eval has no such task, group or tag, the folder's own included, or one of them
    needs a library that is not there."""
    manager = _task_manager(include_path)
    known = manager.all_tasks
    for name in names:
        if name not in known:
            alike = difflib.get_close_matches(name, known)
            hint = f"; there are {', '.join(alike)}" if alike else "; `python -m lmms_eval --tasks list` lists them"
            raise ShortVError(f"lmms-eval has no task {name!r}{hint}")
        path = manager.task_index[name]["yaml_path"]
        try:
            if path != -1:  # as of a tag
                load_yaml_config(path)
        except ImportError as error:
            raise ShortVError(f"{name}: {first_line(error)}; install what this task of lmms-eval needs") from error


@functools.cache
def _task_manager(include_path: Path | None) -> TaskManager:
    logger.remove()  # lmms-eval tells how it reads each file
    logger.add(sys.stderr, level="WARNING")
    return TaskManager(include_path=None if include_path is None else str(include_path))


def choose_variants(config, compares: bool) -> list[Variant]:
    """The model as it is; for a comparison the dense one before it, and the same layers without their corrections."""
    found = variants_of(config, compares)
    own = found[-1]
    if config.frozen_layers()[1] & set(config.corrected_layers):
        found[-1:] = [own._replace(corrects=False)] * compares + [own._replace(name=CORRECTED)]
    return found


def evaluate(
    model: TimedLlava,
    names: Sequence[str],
    variants: Sequence[Variant],
    output: Path,
    settings: dict,
    include_path: Path | None = None,
) -> list[TaskResults]:
    """Ask each variant each task's samples, one variant after the other, and compare them.

    What is finished stands in `output` as `TASK-VARIANT.json`, with each sample's answer, and is not asked again.

    Args:
        names: of tasks, groups and tags of lmms-eval.
        settings: what results depend on beside the variant, `limit` and `seed` among them.
        include_path: a folder of other tasks.

    Returns:
        On the main process, of each task, and each group with a score of its own; elsewhere nothing.

    Raises:
        ShortVError: if a task's data cannot be loaded, or `output` holds results of other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    found = []
    for name in names:
        runs = {}
        for variant in variants:
            path = output / f"{name}-{variant.name}.json"
            about = settings | {"frozen": variant.frozen, "corrects": variant.corrects}
            runs[variant.name] = _read(path, about) if path.exists() else None
            if runs[variant.name] is None:
                runs[variant.name] = _ask(model, variant, name, output, settings, _task_manager(include_path))
                if PartialState().is_main_process:
                    _write(path, {"settings": about, "tasks": runs[variant.name]})
        if PartialState().is_main_process:
            tasks = next(iter(runs.values()))
            found += [compare(task, {variant: run[task] for variant, run in runs.items()}) for task in tasks]
    return found


def _ask(
    model: TimedLlava, variant: Variant, name: str, output: Path, settings: dict, manager: TaskManager
) -> dict[str, dict] | None:
    """Of each task that a name stands for what [`compare`] takes, on the main process."""
    model.seconds, model.image_ids = {}, {}
    # Where tasks put files of their own; the rest as lmms-eval's command line has it.
    arguments = Namespace(output_path=str(output / variant.name), process_with_media=False)
    try:
        with dense(model.model), variant.applied(model.model):  # its own layers come back afterwards
            # Tasks are loaded anew for each variant: some add up what they have seen, as OCRBench.
            found = simple_evaluate(
                model,
                tasks=[name],
                task_manager=manager,
                limit=settings["limit"],
                torch_random_seed=settings["seed"],
                bootstrap_iters=0,
                cli_args=arguments,
            )
    except RetryError as error:  # of loading the data
        reason = first_line(error.last_attempt.exception())
        raise ShortVError(f"{name}: lmms-eval cannot load its data: {reason}") from error
    gathered = gather_object([(model.seconds, model.image_ids)])
    if found is None:
        return None
    seconds, image_ids = Counter(), {}
    for taken, ids in gathered:
        seconds.update(taken)
        image_ids |= ids
    tasks = {task: _entry(task, found, seconds, image_ids) for task in found["results"]}
    return {task: entry for task, entry in tasks.items() if entry["figures"] or entry["samples"]}


def _entry(task: str, found: dict, seconds: dict, image_ids: dict) -> dict:
    """A task's or group's part of what lmms-eval gives."""
    config, members = found["configs"].get(task, {}), [task, *found["group_subtasks"].get(task, ())]
    values = {}
    for key, value in found["results"][task].items():  # such as `anls,none`, of the first of several filters
        metric, comma, _ = key.partition(",")
        if comma and "_stderr" not in metric and _is_number(value):
            values.setdefault(metric, float(value))
    listed = [entry["metric"] for entry in config.get("metric_list") or ()]
    order = sorted(values, key=lambda metric: (listed.index(metric) if metric in listed else len(listed), metric))
    samples = []
    for sample in sorted(found["samples"].get(task, ()), key=lambda sample: sample["doc_id"]):
        scores = {metric: _sample_score(sample.get(metric)) for metric in order}
        samples.append(
            {
                "doc_id": sample["doc_id"],
                "picture": image_ids.get((task, sample["doc_id"])),
                "target": sample["target"],
                "answers": sample["filtered_resps"],
                "scores": {metric: score for metric, score in scores.items() if score is not None},
            }
        )
    return {
        "dataset": _hub_id(config.get("dataset_path")),
        "questions": sum(len({sample["doc_id"] for sample in found["samples"].get(each, ())}) for each in members),
        "seconds": sum(seconds.get(each, 0.0) for each in members),
        "figures": {metric: values[metric] for metric in order},
        "samples": samples,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) and not isinstance(value, complex)


def _sample_score(value: Any) -> float | None:
    """A sample's score of a metric; tasks that add them up themselves keep it under `score`."""
    value = value.get("score") if isinstance(value, dict) else value
    return float(value) if _is_number(value) else None


def _hub_id(path: str | None) -> str | None:
    """A task's data set on the Hub; None if its data are a folder or files."""
    is_id = isinstance(path, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
    return path if is_id else None


def _read(path: Path, about: dict) -> dict[str, dict]:
    """The tasks of a file that [`_write`] wrote.

    Raises:
        ShortVError: if it holds results of other settings.
    """
    content, about = read_json(path), json.loads(json.dumps(about))
    found = content.get("settings")
    for key, expected in about.items():
        if not isinstance(found, dict) or found.get(key) != expected:
            was = found.get(key) if isinstance(found, dict) else None
            raise ShortVError(
                f"{path}: a result with {key} {was!r}, not {expected!r}; repeat that command, or give another --output"
            )
    return content["tasks"]


def _write(path: Path, content: dict) -> None:
    with replacing_file(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1, default=handle_non_serializable)
