"""Scores of answers, by the modules in `metrics/`, and their intervals.

Scores are in percent, except that MME's perception (at most 2000), cognition (800) and task scores (200) are points,
and CIDEr is times 100, as papers print it.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.questions import Question

# The headline figure, which papers compare: the first of these that a metric gives.
HEADLINES = {
    "vqa_accuracy": ("accuracy",),
    "gqa": ("accuracy",),
    "pope": ("mean_f1", "f1"),
    "mme": ("perception",),
    "multiple_choice": ("circular_accuracy", "accuracy"),
    "cider": ("cider",),
}
SCALES = dict.fromkeys(HEADLINES, 100.0) | {"mme": 1.0}  # MME's module returns points and percent already

TERMS = {"mme": "tasks", "pope": "categories"}  # detail that groups questions into the headline's ratios

RESAMPLES = 1000


def check_metric(name: str) -> None:
    """Raises [`ShortVError`] if there is no such metric."""
    if name not in HEADLINES:
        raise ShortVError(f"there is no metric {name!r}; there are {', '.join(sorted(HEADLINES))}")


@cache
def load_metric(name: str):
    """The metric of a module of `metrics/`.

    Raises:
        ShortVError: if there is no such metric or the library is missing.
    """
    check_metric(name)
    try:
        import evaluate
    except ImportError as error:
        raise ShortVError("metrics need the evaluate library; pip install 'shortv-llava[eval]'") from error
    # Not `evaluate.load`: it copies the module into a cache that parallel processes would write at the same time.
    classes = [value for value in vars(functions(name)).values() if isinstance(value, type)]
    return next(value for value in classes if issubclass(value, evaluate.Metric))()


def functions(name: str):
    """The Python module of a metric, for its functions."""
    return import_module(f"shortv_llava.evaluation.metrics.{name}.{name}")


def check_references(metric: str, questions: Sequence[Question]) -> None:
    """Check the questions' references and details.

    Raises:
        ShortVError: if a question lacks a reference or a detail that the metric needs, or has one of the wrong kind.
    """
    from datasets import Value  # of the `eval` extra

    several = not isinstance(load_metric(metric).features["references"], Value)
    if not questions:
        raise ShortVError(f"{metric}: there are no questions to score")
    needed = [name for name, parameter in _parameters(metric).items() if parameter.default is parameter.empty]
    for question in questions:
        where = f"question {question.id!r}"
        if question.reference is None:
            raise ShortVError(f"{where} has no reference answer, and {metric} cannot score without one")
        if isinstance(question.reference, str) == several:
            raise ShortVError(
                f"{where}: {metric} takes {'a list of reference answers' if several else 'one reference'}"
            )
        for name in [*needed, *_details(metric, questions[0])]:
            if name not in question.details:
                raise ShortVError(f"{where} has no {name!r}, and {metric} cannot score without it")


def score(metric: str, questions: Sequence[Question], answers: dict, **kwargs) -> dict[str, float]:
    """The figures of a metric; names of nested figures are joined, such as `categories/random/f1`.

    Questions whose details name a `subset` are scored by subset as well (`image/accuracy`).

    Args:
        metric: the name of a folder in `metrics/`.
        answers: by question id.
        kwargs: constant arguments of the metric.

    Raises:
        ShortVError: if an answer, a reference or a detail is missing, or the metric cannot score them.
    """
    check_references(metric, questions)
    given = answers_of(questions, answers)
    scores = _flatten(_compute(metric, questions, given, kwargs), SCALES[metric])
    for subset in sorted({question.details.get("subset") for question in questions} - {None}):
        members = of_subset(questions, subset)
        scores |= _flatten({subset: _compute(metric, members, answers_of(members, answers), kwargs)}, SCALES[metric])
    return scores


def headline(metric: str, scores: dict[str, float], subset: str | None = None) -> float:
    """The figure of [`score`] by which variants of a model are compared, see [`headline_name`]."""
    return scores[headline_name(metric, scores, subset)]


def headline_name(metric: str, scores: dict[str, float], subset: str | None = None) -> str:
    """The name of the figure by which variants of a model are compared.

    Args:
        subset: subset of questions that the figure is computed from; all by default.
    """
    names = [name if subset is None else f"{subset}/{name}" for name in HEADLINES[metric]]
    return next(name for name in names if name in scores)


def of_subset(questions: Sequence[Question], subset: str | None) -> list[Question]:
    """The questions of a subset; all if it is None."""
    return [question for question in questions if subset is None or question.details.get("subset") == subset]


def answers_of(questions: Sequence[Question], answers: dict) -> list[str]:
    """The answers in the order of the questions.

    Raises:
        ShortVError: if a question has no answer.
    """
    for question in questions:
        if question.id not in answers:
            raise ShortVError(f"question {question.id!r} has no answer")
    return [answers[question.id] for question in questions]


@cache
def _parameters(metric: str) -> dict[str, inspect.Parameter]:
    """The arguments of a metric besides predictions and references."""
    parameters = inspect.signature(load_metric(metric)._compute).parameters
    return {name: p for name, p in parameters.items() if name not in ("predictions", "references")}


def _details(metric: str, question: Question) -> list[str]:
    return [name for name in _parameters(metric) if name in question.details]


def _compute(metric: str, questions: Sequence[Question], answers: Sequence[str], kwargs: dict) -> dict:
    details = {name: [q.details[name] for q in questions] for name in _details(metric, questions[0])}
    references = [question.reference for question in questions]
    try:
        # Not `compute`, which first writes all arguments to a file.
        return load_metric(metric)._compute(predictions=answers, references=references, **details, **kwargs)
    except ValueError as error:
        raise ShortVError(f"{metric}: {error}") from error


def _flatten(values: dict, scale: float, prefix: str = "") -> dict[str, float]:
    scores = {}
    for name, value in values.items():
        if isinstance(value, dict):
            scores |= _flatten(value, scale, f"{prefix}{name}/")
        elif isinstance(value, int | float):  # others are notes, such as the tokeniser's name
            scores[prefix + name] = scale * value
    return scores


# --- Intervals -------------------------------------------------------------------------------------------------------


class Intervals(NamedTuple):
    """95 percent intervals, (low, high).

    Args:
        headline: interval of each variant's [`headline`]; None if all questions are about one picture.
        retention: interval of its ratio to the first variant's, in percent; None if the latter is 0 in a resample.
    """

    headline: dict[str, tuple[float, float] | None]
    retention: dict[str, tuple[float, float] | None]


def bootstrap(
    metric: str,
    questions: Sequence[Question],
    answers_by_variant: dict[str, dict],
    resamples: int = RESAMPLES,
    seed: int = 0,
    **kwargs,
) -> Intervals:
    """Percentile intervals over resampled pictures, the same pictures for all variants.

    Questions about one picture are drawn together, because their answers are correlated; a question without `image_id`
    is drawn alone. The metric is computed once for every question (pair of questions in MME, rotations in MMBench), not
    for every resample: each headline consists of ratios of sums, and only the sums are computed again. CIDEr keeps the
    document frequencies of all pictures. 10,000 questions and 1000 resamples take a few seconds on one core.

    Args:
        answers_by_variant: answers by question id, for each variant; retention is relative to the first variant.
        kwargs: constant arguments of the metric.

    Raises:
        ShortVError: if an answer, a reference or a detail is missing, or the metric cannot score them.
    """
    check_references(metric, questions)
    shares = np.stack(
        [_shares(metric, questions, answers_of(questions, answers), kwargs) for answers in answers_by_variant.values()],
        axis=1,
    )
    return resample(list(answers_by_variant), shares, [question.image_id for question in questions], resamples, seed)


def resample(
    variants: Sequence[str],
    shares: np.ndarray,
    image_ids: Sequence[str | None],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Intervals:
    """As [`bootstrap`], for a headline that is a sum of ratios of sums over questions.

    Args:
        shares: (questions, variants, 2, terms), what each question adds to the numerator and denominator of each term.
        image_ids: id of each question's picture.
    """
    names = {}
    keys = [image_id if image_id is not None else number for number, image_id in enumerate(image_ids)]
    for key in keys:
        names.setdefault(key, len(names))
    sums = np.zeros((len(names), *shares.shape[1:]))
    np.add.at(sums, [names[key] for key in keys], shares)

    if len(names) == 1:  # nothing to resample
        unknown = dict.fromkeys(variants)
        return Intervals(unknown, unknown)
    generator = np.random.default_rng(seed)
    flat, drawn = sums.reshape(len(names), -1), []
    for _ in range(resamples):
        counts = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
        drawn.append(counts @ flat)
    parts, wholes = np.moveaxis(np.reshape(drawn, (resamples, *sums.shape[1:])), 2, 0)
    headlines = np.divide(parts, wholes, out=np.zeros_like(parts), where=wholes > 0).sum(-1)  # (resamples, variants)
    retentions = 100 * (headlines / headlines[:, :1]) if headlines[:, 0].all() else None
    return Intervals(
        {name: _interval(headlines[:, i]) for i, name in enumerate(variants)},
        {name: None if retentions is None else _interval(retentions[:, i]) for i, name in enumerate(variants)},
    )


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _shares(metric: str, questions: Sequence[Question], answers: Sequence[str], kwargs: dict) -> np.ndarray:
    """What each question adds to the sums that the headline consists of.

    Returns:
        (questions, 2, terms): numerator and denominator of each term; the headline is the sum of the terms.
    """
    if metric == "cider":
        values = functions("cider").picture_scores(answers, [question.reference for question in questions], **kwargs)
        return np.stack([[100 * value, 1.0] for value in values])[..., None]
    units: dict[Any, list[int]] = {}  # questions that are scored together
    for number, question in enumerate(questions):
        together = [question.details[name] for name in ("tasks", "images", "groups") if name in question.details]
        units.setdefault(tuple(together) or question.id, []).append(number)
    term_of = [question.details.get(TERMS.get(metric)) for question in questions]
    terms = functions("mme").PERCEPTION if metric == "mme" else tuple(dict.fromkeys(term_of))
    shares = np.zeros((len(questions), 2, len(terms)))
    for numbers in units.values():
        members = [questions[number] for number in numbers]
        if term_of[numbers[0]] not in terms:
            continue
        result = _compute(metric, members, [answers[number] for number in numbers], kwargs)
        if metric == "pope":  # F1: twice the true positives, over yes answers plus yes labels; mean over categories
            whole = result["yes_ratio"] + (members[0].reference.strip().lower() == "yes")
            part = 2 * result["recall"] / len(terms)
        else:
            part, whole = headline(metric, result), 1.0
        shares[numbers[0], :, terms.index(term_of[numbers[0]])] = SCALES[metric] * part, whole
    return shares
