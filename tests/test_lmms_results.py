"""Scores of lmms-eval's tasks side by side, without lmms-eval."""

import pytest

from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.lmms_results import compare
from shortv_llava.evaluation.questions import Question
from shortv_llava.evaluation.scoring import bootstrap


def run(figures: dict, scores: list[dict] | None = None, pictures: list | None = None, ids: list | None = None) -> dict:
    scores = [{}] * 4 if scores is None else scores
    ids, pictures = ids or list(range(len(scores))), pictures or [None] * len(scores)
    samples = [{"doc_id": id, "picture": p, "scores": s} for id, p, s in zip(ids, pictures, scores)]
    return {"seconds": 1.5, "dataset": None, "questions": len(samples), "figures": figures, "samples": samples}


def right(*values: float) -> dict:
    return run({"exact_match": sum(values) / len(values)}, [{"exact_match": value} for value in values], list("aabc"))


def test_intervals_are_those_of_our_own_tasks():
    found = compare("task", {"dense": right(1, 1, 0, 1), "shortv": right(1, 0, 0, 1)})
    answers = {"dense": ["yes", "yes", "no", "yes"], "shortv": ["yes", "no", "no", "yes"]}
    questions = [Question(id, "Is it?", (), image, "yes") for id, image in enumerate("aabc")]
    wanted = bootstrap("gqa", questions, {name: dict(enumerate(given)) for name, given in answers.items()})
    dense, shortv = found.results
    assert (found.metric, found.questions, dense.headline, shortv.headline) == ("exact_match", 4, 75, 50)
    assert shortv.retention == pytest.approx(100 * 2 / 3) and shortv.seconds == 1.5
    for result in found.results:
        assert result.interval == wanted.headline[result.name]
        assert result.retention_interval == wanted.retention[result.name]


@pytest.mark.parametrize(
    "figures, metric, headline",
    [
        ({"mmmu_acc": 0.36}, "mmmu_acc", 36),
        ({"gpt_eval_score": 64.1}, "gpt_eval_score", 64.1),
        ({"acc": 64.1}, "acc", 64.1),
        ({"mme_perception_score": 1510.7, "mme_cognition_score": 300}, "mme_perception_score", 1510.7),
        ({"flickr_Bleu_4": 0.3, "flickr_CIDEr": 0.749}, "flickr_CIDEr", 74.9),
        ({"coco_CIDEr": 1.2}, "coco_CIDEr", 120),
        ({"math": 0.1, "average": 0.33}, "average", 0.33),
        ({"pope_accuracy": 0.8, "pope_f1_score": 0.85}, "pope_f1_score", 85),
    ],
)
def test_the_figure_of_papers(figures, metric, headline):
    (result,) = compare("task", {"shortv": run(figures)}).results
    assert result.headline == pytest.approx(headline) and result.scores == figures
    assert (result.interval, result.retention) == (None, None)
    assert compare("task", {"shortv": run(figures)}).metric == metric


def test_no_interval_but_of_means():
    scores = [{"score": 1.0}, {"score": 0.0}]
    for other in (
        run({"score": 0.5}, scores[:1] + [{}]),
        run({"score": 0.7}, scores),
        run({"score": 0.5}, scores, ids=[0, 0]),
    ):
        (result,) = compare("task", {"shortv": other}).results
        assert (result.headline, result.interval) == (other["figures"]["score"], None)
    dense, shortv = compare("task", {"dense": run({"score": 0.0}), "shortv": run({"score": 1.0})}).results
    assert shortv.retention is None


def test_what_cannot_be_compared():
    with pytest.raises(ShortVError, match="task: .*different samples"):
        compare("task", {"dense": run({"acc": 1.0}), "shortv": run({"acc": 1.0}, ids=[1, 2, 3, 4])})
    with pytest.raises(ShortVError, match="task: .*no score"):
        compare("task", {"dense": run({})})
