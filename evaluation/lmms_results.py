"""Results of lmms-eval's tasks for a model's variants: the headline figure of each task, and its interval."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.scoring import resample

# Endings of the names of figures that papers compare, if that is not the task's first figure.
HEADLINES = ("CIDEr", "pope_f1_score", "average")
# Figures that are not means of their samples' scores but that papers print times 100: part of the name, and the
# largest value of a share. Larger values were multiplied by the task already.
SHARES = {"acc": 1, "f1": 1, "CIDEr": 10}


@dataclass
class TaskResult:
    """A task's results for one variant.

    Args:
        name: name of the variant.
        scores: all figures of the task, as lmms-eval gives them.
        seconds: time of answering, without the set-up for a first question.
        headline, interval: the figure that variants are compared by, and its 95% interval.
        retention, retention_interval: that figure in percent of the dense model's.
    """

    name: str
    scores: dict[str, float]
    seconds: float
    headline: float
    interval: tuple[float, float] | None = None
    retention: float | None = None
    retention_interval: tuple[float, float] | None = None


@dataclass
class TaskResults:
    """Results of a task.

    Args:
        name: lmms-eval's name.
        dataset: Hub id of its data; None for data of one's own.
        metric: name of the headline figure.
        questions: number of its samples.
        results: results of each variant, the dense model's first if it was evaluated.
    """

    name: str
    dataset: str | None
    metric: str
    questions: int
    results: list[TaskResult] = field(default_factory=list)


def compare(task: str, runs: Mapping[str, dict]) -> TaskResults:
    """Compare a task's figures between variants.

    The headline has an interval if it is the mean of its samples' scores: pictures are resampled as by
    [`bootstrap`], the same for all variants. Shares are in percent.

    Args:
        runs: for each variant `seconds`, `dataset`, `questions`, `figures` by name (the task's first figure first), and
            `samples`, each with `doc_id`, `picture` and `scores` by figure.

    Raises:
        ShortVError: if variants have different samples, or the task gives no figure.
    """
    first = next(iter(runs.values()))
    asked = [sample["doc_id"] for sample in first["samples"]]
    for run in runs.values():
        if [sample["doc_id"] for sample in run["samples"]] != asked or run["figures"].keys() != first["figures"].keys():
            raise ShortVError(f"{task}: variants were asked different samples; give another --output")
    if not first["figures"]:
        raise ShortVError(f"{task}: lmms-eval gives no score of it; leave it out")
    metric = next((name for name in first["figures"] if name.endswith(HEADLINES)), next(iter(first["figures"])))
    values = [run["figures"][metric] for run in runs.values()]
    scores = _sample_scores(runs, metric, values)
    if scores is None:
        is_share = any(name in metric and 0 <= min(values) and max(values) <= most for name, most in SHARES.items())
    else:
        is_share = 0 <= scores.min() and scores.max() <= 1
    scale = 100 if is_share else 1
    found = TaskResults(task, first["dataset"], metric, first["questions"])
    for (name, run), value in zip(runs.items(), values):
        found.results.append(TaskResult(name, run["figures"], run["seconds"], scale * value))
    if scores is not None:
        shares = np.stack([scale * scores, np.ones_like(scores)], axis=2)[..., None]
        intervals = resample(list(runs), shares, [sample["picture"] for sample in first["samples"]])
        for result in found.results:
            result.interval = intervals.headline[result.name]
    if len(runs) > 1 and values[0]:
        for result, value in zip(found.results, values):
            result.retention = 100 * (value / values[0])
            result.retention_interval = intervals.retention[result.name] if scores is not None else None
    return found


def _sample_scores(runs: Mapping[str, dict], metric: str, values: list[float]) -> np.ndarray | None:
    """Scores (samples, variants) if the headlines are their means, else None."""
    columns = []
    for run, value in zip(runs.values(), values):
        column = [sample["scores"].get(metric) for sample in run["samples"]]
        doc_ids = {sample["doc_id"] for sample in run["samples"]}
        # A task with several filters logs each sample several times.
        if None in column or len(doc_ids) < len(column) or not column:
            return None
        if not math.isclose(math.fsum(column) / len(column), value, abs_tol=1e-9, rel_tol=1e-6):
            return None
        columns.append(column)
    return np.array(columns, dtype=float).T
