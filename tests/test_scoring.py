import numpy as np
import pytest

from shortv_llava.errors import ShortVError
from shortv_llava.evaluation import scoring
from shortv_llava.evaluation.questions import Question
from shortv_llava.evaluation.scoring import bootstrap, check_references, headline, headline_name, of_subset, score

evaluate = pytest.importorskip("evaluate")


def ask(id, reference, image_id=None, **details) -> Question:
    return Question(id, "?", (), image_id, reference, details)


def examples(metric: str, number: int, seed: int) -> tuple[list[Question], dict, dict]:
    """Questions for a metric, two about each picture, with the answers of two models, the second one worse."""
    random = np.random.default_rng(seed)
    questions = []
    for i in range(number):
        for j in range(2):
            picture, id = f"{metric}{i}", f"{i}-{j}"
            if metric == "mme":
                task = ["OCR", "color", "code_reasoning"][i % 3]
                questions.append(ask(id, ["Yes", "No"][j], picture, tasks=task, images=picture))
            elif metric == "pope":
                category = ["random", "popular", "adversarial"][i % 3]
                questions.append(ask(id, ["yes", "no"][random.integers(2)], picture, categories=category))
            elif metric == "multiple_choice":
                questions.append(ask(id, "AB"[j], picture, choices=["a cat", "a dog"], groups=i))
            elif metric == "vqa_accuracy":
                questions.append(ask(id, ["yes"] * int(random.integers(1, 10)) + ["no", "maybe"], picture))
            elif metric == "cider":
                words = random.choice("red blue green dog cat bird on in near box mat".split(), (3, 6))
                questions.append(ask(id, [" ".join(caption) for caption in words], picture))
            else:
                questions.append(ask(id, ["yes", "no"][random.integers(2)], picture))

    def answers(right: float) -> dict:
        result = {}
        for question in questions:
            reference = question.reference if isinstance(question.reference, str) else question.reference[0]
            wrong = {"yes": "no", "no": "yes", "A": "B", "B": "A"}.get(reference.lower(), "a red bird in a box")
            result[question.id] = reference if random.random() < right else wrong
        return result

    return questions, answers(0.9), answers(0.6)


METRICS = ["vqa_accuracy", "gqa", "pope", "mme", "multiple_choice", "cider"]


@pytest.mark.parametrize("metric", METRICS)
def test_shares_add_up_to_the_headline(metric):
    questions, answers, _ = examples(metric, 12, seed=0)
    parts, wholes = scoring._shares(metric, questions, [answers[q.id] for q in questions], {}).sum(0)
    assert (parts[wholes > 0] / wholes[wholes > 0]).sum() == pytest.approx(
        headline(metric, score(metric, questions, answers))
    )


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "cider"])
def test_resamples_are_what_the_metric_gives_for_them(metric, monkeypatch):
    questions, answers, _ = examples(metric, 6, seed=1)
    drawn = [0, 1, 1, 2, 4, 5]  # pictures
    again = []
    for copy, picture in enumerate(drawn):
        for question in questions[2 * picture : 2 * picture + 2]:
            details = {key: f"{value}#{copy}" for key, value in question.details.items() if key in ("images", "groups")}
            again.append(
                (question.id, question._replace(id=f"{question.id}#{copy}", details=question.details | details))
            )
    expected = headline(metric, score(metric, [q for _, q in again], {q.id: answers[id] for id, q in again}))

    class Draw:
        def integers(self, *args, **kwargs):
            return np.array(drawn)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Draw())
    low, high = bootstrap(metric, questions, {"dense": answers}, resamples=3).headline["dense"]
    assert low == high == pytest.approx(expected)


def test_questions_about_a_single_picture_tell_no_interval():
    questions, dense, shortv = examples("gqa", 1, seed=2)
    intervals = bootstrap("gqa", questions, {"dense": dense, "shortv": shortv})
    assert intervals.headline == intervals.retention == {"dense": None, "shortv": None}


@pytest.mark.parametrize("metric", METRICS)
def test_intervals(metric):
    questions, dense, shortv = examples(metric, 30, seed=2)
    variants = {"dense": dense, "shortv": shortv, "same": dense}
    intervals = bootstrap(metric, questions, variants, resamples=200)
    assert intervals == bootstrap(metric, questions, variants, resamples=200)
    assert intervals != bootstrap(metric, questions, variants, resamples=200, seed=1)
    figures = {name: headline(metric, score(metric, questions, answers)) for name, answers in variants.items()}
    for name, (low, high) in intervals.headline.items():
        assert low < figures[name] < high
    low, high = intervals.retention["shortv"]
    assert low < 100 * figures["shortv"] / figures["dense"] < high < 100
    assert intervals.retention["dense"] == pytest.approx((100, 100))
    assert intervals.retention["same"] == pytest.approx((100, 100))


def test_pictures_are_drawn_whole():
    """Of ten questions about one picture, all right or all wrong, an interval cannot be narrower than of one."""
    answers = {f"{picture}-{n}": "yes" if picture % 2 else "no" for picture in range(20) for n in range(10)}
    together = [ask(f"{picture}-{n}", "yes", str(picture)) for picture in range(20) for n in range(10)]
    apart = [question._replace(image_id=None) for question in together]
    wide, narrow = (bootstrap("gqa", q, {"x": answers}, 300).headline["x"] for q in (together, apart))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_retention_of_nothing():
    questions = [ask(n, "yes") for n in range(4)]
    intervals = bootstrap("gqa", questions, {"dense": dict.fromkeys(range(4), "no")}, resamples=10)
    assert intervals.headline == {"dense": (0, 0)} and intervals.retention == {"dense": None}


@pytest.mark.parametrize(
    "metric, questions, answers, kwargs, expected",
    [
        ("gqa", [ask(1, "yes"), ask("b", "no")], {1: "Yes.", "b": ""}, {}, {"accuracy": 50}),
        ("vqa_accuracy", [ask(1, ["girl 's"] * 2)], {1: "Girl's"}, {"normalization": "evalai"}, {"accuracy": 100 / 3}),
        (
            *("pope", [ask(1, "yes", categories="random")], {1: "Yes"}, {}),
            dict.fromkeys(["accuracy", "precision", "recall", "f1", "yes_ratio"], 100)
            | dict.fromkeys([f"categories/random/{x}" for x in "accuracy precision recall f1 yes_ratio".split()], 100)
            | {"mean_f1": 100},
        ),
        (
            *("multiple_choice", [ask(1, "A", subset="x"), ask(2, "B", subset="y")], {1: "A", 2: ""}, {}),
            {"accuracy": 50, "answered": 50, "x/accuracy": 100, "x/answered": 100, "y/accuracy": 0, "y/answered": 0},
        ),
    ],
    ids=["gqa", "vqa_accuracy", "pope", "multiple_choice"],
)
def test_score(metric, questions, answers, kwargs, expected):
    assert score(metric, questions, answers, **kwargs) == pytest.approx(expected)


def test_a_subset_can_have_the_headline():
    questions = [ask(n, "A", subset="image" if n % 2 else "text") for n in range(8)]
    answers = {n: "A" if n in (0, 2, 4, 6, 1) else "B" for n in range(8)}
    scores = score("multiple_choice", questions, answers)
    assert headline("multiple_choice", scores) == 62.5 and headline("multiple_choice", scores, "image") == 25
    assert headline_name("multiple_choice", scores, "image") == "image/accuracy"
    assert [question.id for question in of_subset(questions, "image")] == [1, 3, 5, 7]


def test_notes_of_a_metric_are_no_scores():
    questions = [ask(1, ["a dog on a mat"]), ask(2, ["a cat in a box"])]
    scores = score("cider", questions, {1: "a dog on a mat", 2: "a cat in a box"}, tokenizer="python")
    assert scores == {"cider": pytest.approx(1000)}


@pytest.mark.parametrize(
    "metric, questions, message",
    [
        ("bleu", [ask(1, "a")], "no metric 'bleu'.* cider, gqa, mme, "),
        ("gqa", [], "^gqa: .*no questions"),
        ("gqa", [ask(1, "a"), ask(2, None)], "^question 2 has no reference"),
        ("gqa", [ask("x", ["a"])], "^question 'x': gqa .*one reference"),
        ("vqa_accuracy", [ask("x", "a")], "^question 'x': vqa_accuracy .*a list"),
        ("mme", [ask("x", "yes", tasks="OCR")], "^question 'x' has no 'images'"),
        ("pope", [ask(1, "yes", categories="a"), ask(2, "no")], "^question 2 has no 'categories'"),
    ],
)
def test_references_are_checked_first(metric, questions, message):
    with pytest.raises(ShortVError, match=message):
        check_references(metric, questions)


@pytest.mark.parametrize(
    "metric, questions, answers, message",
    [
        ("gqa", [ask(1, "a")], {}, "^question 1 has no answer$"),
        ("pope", [ask(1, "maybe")], {1: "yes"}, "^pope: references.0. is 'maybe'"),
        ("mme", [ask(1, "yes", tasks="OCR", images="a")], {1: "yes"}, "^mme: .*'a' .*'OCR' .*1 questions"),
    ],
)
def test_what_cannot_be_scored(metric, questions, answers, message):
    for run in (score, lambda metric, questions, answers: bootstrap(metric, questions, {"x": answers})):
        with pytest.raises(ShortVError, match=message):
            run(metric, questions, answers)


@pytest.mark.parametrize("metric", METRICS)
def test_any_answer_is_scored(metric):
    questions, answers, _ = examples(metric, 3, seed=3)
    strange = ["", " ", "\n", "word " * 10_000, "日本語 😀", "\\d+["]
    assert all(value >= 0 for value in score(metric, questions, dict(zip(answers, strange))).values())
