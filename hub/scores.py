"""Scores of a package: evaluation.json, and the file that the Hub reads."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from shortv_llava.checkpoint.package import EVALUATION_FILE
from shortv_llava.errors import ShortVError

logger = logging.getLogger(__name__)

RESULTS_SOURCE = "shortv evaluate"  # marks our results in a card's metadata


class Score(NamedTuple):
    """One result of an evaluation, an entry of evaluation.json. Intervals are (low, high), of 95% confidence.

    Args:
        data: name of the questions.
        dataset: Hub id of the questions' data set; None for a file of one's own.
        metric: name such as `accuracy` or `f1`.
        score, interval: in percent, or in the metric's own points; no interval if all questions are about one picture.
        base_score, base_interval: the base model's, with the same code; None if it was not evaluated.
        percent_of_base, percent_interval: `score` in percent of `base_score`.
        date: ISO 8601.
        note: how the model was loaded and by which harness it was evaluated, if other than by default.
    """

    data: str
    dataset: str | None
    metric: str
    questions: int
    score: float
    interval: tuple[float, float] | None
    base_score: float | None
    base_interval: tuple[float, float] | None
    percent_of_base: float | None
    percent_interval: tuple[float, float] | None
    date: str
    note: str | None


def read_scores(folder: Path) -> list[Score]:
    """The scores of the package `folder`.

    Raises:
        ShortVError: if its evaluation.json does not have the format of `shortv evaluate`.
    """
    path = folder / EVALUATION_FILE
    try:
        scores = [Score(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["results"]]
        for score in scores:
            scores_row(score)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ShortVError(f"{path}: no evaluation wrote it so ({error!r}); evaluate again or remove it") from error
    return scores


def eval_results_file(scores: Sequence[Score], repo_id: str) -> bytes | None:
    """The file in `.eval_results/` with the scores on the Hub's data sets, as the Hub reads it.

    None if there are no such scores, or huggingface_hub does not support the format.
    """
    entries = [
        {
            "dataset_id": score.dataset,
            "task_id": score.data,
            "value": round(score.score, 2),
            "date": score.date,
            "source_url": scores_url(repo_id),
            "source_name": RESULTS_SOURCE,
            "notes": ", ".join(
                [score.metric, f"{score.questions:,} question{'s' * (score.questions != 1)}",
                 *(["95% interval {:.2f} to {:.2f}".format(*score.interval)] if score.interval else []),
                 *([score.note] if score.note else [])]
            ),
        }
        for score in scores
        if score.dataset
    ]  # fmt: skip
    if not entries:
        return None
    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError:
        logger.warning("scores go into the card alone: .eval_results needs a newer huggingface_hub; update it")
        return None
    content = eval_result_entries_to_yaml([EvalResultEntry(**entry) for entry in entries])
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()


def scores_url(name: str) -> str:
    """URL of evaluation.json: in the repository `owner/name`, or relative to the card."""
    return f"https://huggingface.co/{name}/blob/main/{EVALUATION_FILE}" if "/" in name else EVALUATION_FILE


def scores_row(score: Score) -> list[str]:
    def figure(form: str, value: float | None, interval: tuple[float, float] | None) -> str:
        if value is None:
            return ""
        return f"{value:{form}}" + ("" if interval is None else " [{:{form}}, {:{form}}]".format(*interval, form=form))

    data = f"[{score.data}](https://huggingface.co/datasets/{score.dataset})" if score.dataset else score.data
    return [
        data + (f" ({score.note})" if score.note else ""),
        f"{score.questions:,}",
        score.metric.replace("_", " "),
        figure(".2f", score.score, score.interval),
        figure(".2f", score.base_score, score.base_interval),
        figure(".1f", score.percent_of_base, score.percent_interval),
    ]
