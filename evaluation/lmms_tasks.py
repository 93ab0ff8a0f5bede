"""Run lmms-eval's tasks on the variants of one model: `shortv evaluate --lmms-tasks`."""

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
    """The harness's model, which also records the time of a task's answers and the pictures of its samples.

    Attributes:
        seconds: time by task, since the dictionary was last cleared.
        image_ids: id of the picture by task and document, equal for equal pictures.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seconds, self.image_ids = {}, {}
        self.tasks: list[str] = []  # tasks of the current requests

    def clean(self) -> None:
        """Do nothing. lmms-eval would release the model after its tasks, but the next variant needs it."""

    def _answer(self, questions: Sequence[Question], settings: Sequence[dict]) -> list[str]:
        return self._timed(super()._answer, questions, settings)

    def _score(self, batch: Sequence[Question], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        return self._timed(super()._score, batch, continuations)

    def _timed(self, method: Callable, questions: Sequence[Question], asked: Sequence) -> list:
        """Results of a method for questions and its second argument, computed and timed task by task."""
        numbers: dict[str, list[int]] = {}
        for number, question in enumerate(questions):
            numbers.setdefault(self.tasks[question.id], []).append(number)
        found = {}
        for task, members in numbers.items():
            given = [questions[number] for number in members], [asked[number] for number in members]
            if task not in self.seconds:  # warm-up, so that set-up does not count for the first variant
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
    """Raises [`ShortVError`] if neither lmms-eval nor `include_path` has such a task, group or tag, or one of them
    needs a missing library."""
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
    logger.remove()  # lmms-eval logs the reading of each file
    logger.add(sys.stderr, level="WARNING")
    return TaskManager(include_path=None if include_path is None else str(include_path))


def choose_variants(config, compares: bool) -> list[Variant]:
    """The model itself; for a comparison also the dense model, before it, and its layers without corrections."""
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
    """Run each task on each variant, one variant after the other, and compare the variants.

    Finished results are in `output` as `TASK-VARIANT.json`, with each sample's answer, and are not computed again.

    Args:
        names: names of tasks, groups and tags of lmms-eval.
        settings: settings that results depend on, besides the variant; they include `limit` and `seed`.
        include_path: a folder of further tasks.

    Returns:
        In the main process, results of each task and of each group that has a score; in others an empty list.

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
    """The input of [`compare`] for each task that a name stands for, in the main process."""
    model.seconds, model.image_ids = {}, {}
    # `output_path` is where tasks write files of their own; the other value is the default of lmms-eval's command line.
    arguments = Namespace(output_path=str(output / variant.name), process_with_media=False)
    try:
        with dense(model.model), variant.applied(model.model):  # the model's own layers are restored afterwards
            # Tasks are loaded again for each variant, because some keep state between samples, such as OCRBench.
            found = simple_evaluate(
                model,
                tasks=[name],
                task_manager=manager,
                limit=settings["limit"],
                torch_random_seed=settings["seed"],
                bootstrap_iters=0,
                cli_args=arguments,
            )
    except RetryError as error:  # loading the data failed
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
    for key, value in found["results"][task].items():  # such as `anls,none`; the first of several filters counts
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
    """A sample's score of a metric; tasks that aggregate scores themselves store it under `score`."""
    value = value.get("score") if isinstance(value, dict) else value
    return float(value) if _is_number(value) else None


def _hub_id(path: str | None) -> str | None:
    """A task's data set on the Hub; None if its data are a folder or files."""
    is_id = isinstance(path, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
    return path if is_id else None


def _read(path: Path, about: dict) -> dict[str, dict]:
    """The tasks in a file of [`_write`].

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
