import random
import shutil
import socket
import sys
from pathlib import Path

import pytest

evaluate = pytest.importorskip("evaluate")

METRICS = Path(__file__).parents[1] / "evaluation" / "metrics"
NAMES = sorted(folder.name for folder in METRICS.iterdir() if (folder / f"{folder.name}.py").is_file())
LONG = "word " * 10_000


def forget_loaded_metrics():
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a metric by path, with the copies that evaluate makes kept out of the user's cache."""
    cache = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache / "modules"))
        patch.setattr(sys, "path", sys.path.copy())  # evaluate adds the cache to it
        forget_loaded_metrics()
        yield lambda name: evaluate.load(str(METRICS / name), cache_dir=str(cache), keep_in_memory=True)
        forget_loaded_metrics()


@pytest.fixture(scope="module")
def functions(load):
    """The module of a metric, for its functions."""
    return lambda name: sys.modules[type(load(name)).__module__]


# --- All metrics -----------------------------------------------------------------------------------------------------


def arguments(name, prediction="no", rows=1):
    """Valid arguments for any metric; each of its MME tasks has one image."""
    reference = {"vqa_accuracy": ["no"] * 10, "cider": ["no dog"], "multiple_choice": "A"}.get(name, "no")
    result = {"predictions": [prediction] * rows, "references": [reference] * rows}
    if name == "mme":
        images = [str(i // 2) for i in range(2 * rows)]
        result = {key: values * 2 for key, values in result.items()} | {"tasks": ["OCR"] * 2 * rows, "images": images}
    return result


def test_every_metric_is_there():
    assert NAMES == ["cider", "gqa", "mme", "multiple_choice", "pope", "vqa_accuracy"]


@pytest.mark.parametrize("name", NAMES)
def test_loads_without_network_and_leaves_the_folder_alone(name, load, monkeypatch):
    def refuse(*args):
        raise AssertionError("a metric reached out")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = sorted(METRICS.rglob("*"))
    metric = load(name)
    metric.compute(**arguments(name))
    assert isinstance(metric, evaluate.Metric) and metric.name == name
    assert metric.description and metric.citation.startswith("@") and "Returns:" in metric.inputs_description
    assert sorted(METRICS.rglob("*")) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", ["", " ", "\n", LONG, "日本語 é 😀 ’“”…", "no " * 10_000, "(" * 50, "\\d+[", "..."])
def test_any_answer_is_scored(name, answer, load):
    scores = load(name).compute(**arguments(name, answer))
    assert all(value >= 0 for value in scores.values() if isinstance(value, float))


@pytest.mark.parametrize("name", NAMES)
def test_no_predictions(name, load):
    with pytest.raises(ValueError, match="no predictions"):
        load(name).compute(**{key: [] for key in arguments(name)})


@pytest.mark.parametrize("name", NAMES)
def test_lengths_differ(name, load):
    several = arguments(name, rows=3)
    several["references"] = several["references"][:-1]
    with pytest.raises(ValueError, match="^Mismatch .*references.*$"):
        load(name).compute(**several)


@pytest.mark.parametrize("name", ["vqa_accuracy", "cider"])
def test_empty_references(name, load):
    with pytest.raises(ValueError, match=r"^references\[1\] holds .*$"):
        load(name).compute(predictions=["a", "b"], references=[["a", "b"], []])


def test_batches_add_up(load):
    metric = load("gqa")
    metric.add_batch(predictions=["yes", "no"], references=["yes", "yes"])
    metric.add(prediction="left", reference="left")
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


# --- VQA accuracy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("Yes.", "yes"),
        ("A  dog\nand the CAT", "dog and cat"),
        ("none", "0"),
        ("Ten dogs", "10 dogs"),
        ("twenty", "twenty"),
        ("dont", "don't"),
        ("couldntve couldnt've couldn'tve", "couldntve couldn't've couldn't've"),
        ("Im", "im"),
        ("1,000", "1000"),
        ("1,000 (about)/x", "1000 aboutx"),  # a comma in a number: every mark goes without a space
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("2.5", "2.5"),
        ("3. U.S.", "3 us"),
        (".5", ".5"),
        ("2:50 pm", "2:50 pm"),
        ("girl's", "girl's"),
        ("the", ""),
        ("¿dónde?", "¿dónde"),
    ],
)
def test_vqa_normalization(text, normalized, functions):
    assert functions("vqa_accuracy").normalize(text) == normalized


@pytest.mark.parametrize(
    "text, normalized", [("red,blue", "redblue"), ("why?not", "whynot"), ("Girl's", "girl 's"), ("1,000/x", "1000 x")]
)
def test_evalai_normalization(text, normalized, functions):
    assert functions("vqa_accuracy").normalize(text, "evalai") == normalized


@pytest.mark.parametrize("matches, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_ten_answers(matches, accuracy, load):
    answers = ["yes"] * matches + ["no"] * (10 - matches)
    result = load("vqa_accuracy").compute(predictions=["Yes."], references=[answers])
    assert result == {"accuracy": pytest.approx(accuracy)}


def test_vqa_mean_and_other_numbers_of_answers(load):
    references = [["a dog", "dog"], ["x"] * 5 + ["y"] * 4, ["cat"] * 10]  # 1/3, 1, 0
    result = load("vqa_accuracy").compute(predictions=["Dog", "x", "dog"], references=references)
    assert result["accuracy"] == pytest.approx((1 / 3 + 1 + 0) / 3)


def test_vqa_unanimous_answers(load):
    metric, references = load("vqa_accuracy"), [["P.O. Box"] * 10, ["yes"] * 9 + ["Yes"]]
    for skip, accuracy in ((False, 1), (True, 0.5)):
        result = metric.compute(predictions=["po box", "Yes!"], references=references, skip_unanimous=skip)
        assert result["accuracy"] == accuracy


def test_vqa_bad_arguments(load):
    metric = load("vqa_accuracy")
    with pytest.raises(ValueError, match="^normalization must be"):
        metric.compute(predictions=["a"], references=[["a", "b"]], normalization="none")
    with pytest.raises(ValueError, match="at least two$"):
        metric.compute(predictions=["a"], references=[["a"]])


# --- GQA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prediction, right",
    [("Left.", 1), (" left", 0), ("LEFT .", 0), ("left...", 1), ("left!", 0), ("the left", 0), ("", 0), (".", 0)],
)
def test_gqa(prediction, right, load):
    assert load("gqa").compute(predictions=[prediction], references=["left"]) == {"accuracy": right}


# --- POPE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, yes",
    [
        ("Yes", True), ("No", False), ("no, it is", False), ("There is not a dog", False), ("Yes. No dog", True),
        ("Yes, there is no dog", False), ("I know", True), ("NO", True), ("", True), ("None", True), ("No.", False),
    ],
)  # fmt: skip
def test_pope_answers(answer, yes, functions):
    assert functions("pope").says_yes(answer) is yes


def test_pope(load):
    # said yes, yes, no, no, yes: two true positives, one false positive, one false negative, one true negative
    result = load("pope").compute(
        predictions=["Yes", "yes", "No", "no", "Yes"],
        references=["yes", "Yes", "yes", "no", "no"],
        categories=["random", "popular", "random", "random", "popular"],
    )
    categories, mean_f1 = result.pop("categories"), result.pop("mean_f1")
    assert result == pytest.approx(
        {"accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 0.6}
    )
    assert list(categories) == ["random", "popular"]
    assert categories["random"] == pytest.approx(
        {"accuracy": 2 / 3, "precision": 1, "recall": 0.5, "f1": 2 / 3, "yes_ratio": 1 / 3}
    )
    assert categories["popular"]["precision"] == 0.5
    assert mean_f1 == pytest.approx((categories["random"]["f1"] + categories["popular"]["f1"]) / 2)


def test_pope_without_positives(load):
    result = load("pope").compute(predictions=["no"], references=["no"])
    assert result == {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


def test_pope_bad_arguments(load):
    with pytest.raises(ValueError, match=r"^references\[0\] is 'maybe', neither"):
        load("pope").compute(predictions=["no"], references=["maybe"])
    with pytest.raises(ValueError, match="^2 categories for 1 predictions$"):
        load("pope").compute(predictions=["no"], references=["no"], categories=["random", "popular"])


# --- MME -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, parsed",
    [("Yes", "yes"), (" yes, it is", "yes"), ("No.", "no"), ("Not", "no"), ("I know", "other"), ("y", "other"),
     ("know", "no"), ("", "other"), ("The answer is yes", "other")],
)  # fmt: skip
def test_mme_answers(answer, parsed, functions):
    assert functions("mme").parse(answer) == parsed


def test_mme(load):
    rows = [  # the questions of an image need not follow each other
        ("Yes", "yes", "existence", "1"), ("Yes", "yes", "existence", "2"),
        ("No", "no", "existence", "1"), ("Yes", "no", "existence", "2"),
        ("maybe", "yes", "OCR", "1"), ("no", "no", "OCR", "1"),
        ("yes", "yes", "code_reasoning", "1"), ("no", "No", "code_reasoning", "1"),
    ]  # fmt: skip
    names = ("predictions", "references", "tasks", "images")
    assert load("mme").compute(**{name: list(column) for name, column in zip(names, zip(*rows))}) == {
        "perception": 75 + 50 + 50 + 0,
        "cognition": 200,
        "tasks": {
            "existence": {"accuracy": 75, "accuracy_plus": 50, "score": 125},
            "OCR": {"accuracy": 50, "accuracy_plus": 0, "score": 50},
            "code_reasoning": {"accuracy": 100, "accuracy_plus": 100, "score": 200},
        },
    }


def test_mme_bad_arguments(load):
    def compute(labels, task="OCR"):
        count = len(labels)
        load("mme").compute(
            predictions=["yes"] * count, references=labels, tasks=[task] * count, images=["1.jpg"] * count
        )

    with pytest.raises(ValueError, match="'1.jpg' .*'OCR' .*3 questions"):
        compute(["yes", "no", "no"])
    with pytest.raises(ValueError, match=r"^tasks\[0\] is 'ocr', .*existence, "):
        compute(["yes", "no"], task="ocr")
    with pytest.raises(ValueError, match=r"^references\[1\] is 'x', neither"):
        compute(["yes", "x"])


# --- Multiple choice -------------------------------------------------------------------------------------------------

OPTIONS = ["cat", "red dog", "a bird", "11"]


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("A", "A"), ("b", "B"), ("B.", "B"), ("(C)", "C"), ("(d).", "D"), (" B\n", "B"),
        ("Red dog.", "B"), ("11", "D"), ("A bird", "C"),
        ("B. red dog", "B"), ("(B) red dog", "B"), ("B: red dog", "B"), ("B) red dog", "B"), ("A\ncat", "A"),
        ("The answer is B", "B"), ("The answer is B.", "B"), ("the correct answer is (C), a bird", "C"),
        ("Answer: D", "D"), ("Option A", "A"), ("答案是C", "C"), ("B、猫", "B"), ("The answer is Apple", None),
        ("It must be (B)", "B"), ("**B**", "B"), ("It is A", "A"), ("A is right", "A"), ("A dog", None),
        ("both A and B", None), ("I see a cat", "A"), ("It is a red dog!", "B"), ("a cat and a red dog", None),
        ("category", None), ("111", None), ("E", None), ("", None), ("?", None),
    ],
)  # fmt: skip
def test_find_choice(answer, letter, functions):
    assert functions("multiple_choice").find_choice(answer, OPTIONS) == letter


# SEED-Bench wants the bare letter, ScienceQA one of three forms, MMBench one letter as a word near the end, or a text.
@pytest.mark.parametrize(
    "answer, letter, scienceqa, mmbench",
    [
        ("B", "B", "B", "B"),
        ("b", None, None, None),
        ("B.", None, None, "B"),
        ("B. red dog", None, "B", "B"),
        ("B.red dog", None, None, "B"),
        ("B: red dog", None, None, "B"),
        ("B is the sentence.", None, None, "B"),
        ("B is the run-on sentence.", None, None, None),
        ("B is what I think that it must be", None, None, None),
        ("The answer is B.", None, "B", "B"),
        ("The answer is B", None, None, "B"),
        ("The answer is B. The answer is A.", None, None, "B"),
        ("Answer is a cat", None, None, "A"),
        ("The answer is E.", None, None, None),
        ("B or C", None, None, None),
        ("B, not A", None, None, None),
        ("It is a Red Dog", None, None, "B"),
        ("a red dog and a cat", None, None, None),
        ("Z. red dog", None, None, None),
        ("E", None, None, None),
        ("", None, None, None),
        ("red dog " * 9, None, None, None),
    ],
)
def test_rules(answer, letter, scienceqa, mmbench, functions):
    module = functions("multiple_choice")
    found = [module.RULES[rule](answer, OPTIONS) for rule in ("letter", "scienceqa", "mmbench")]
    assert found == [letter, scienceqa, mmbench]


def test_a_missing_option_is_never_given(functions):
    for find in functions("multiple_choice").RULES.values():
        assert find("C", ["cat", "dog", None, None]) is None and find("B", ["cat", "dog", None]) == "B"


def test_the_official_rule_decides_and_the_lenient_one_stands_beside(load):
    answers = ["D", "D.", "(D)", "The answer is D.", "d", "Option D", "D", "D"]  # as eight right answers to SEED-Bench
    result = load("multiple_choice").compute(
        predictions=answers, references=["D"] * 8, groups=[*range(8)], rule="letter"
    )
    expected = {"accuracy": 3 / 8, "answered": 3 / 8, "circular_accuracy": 3 / 8}
    assert result == expected | dict.fromkeys([f"lenient_{name}" for name in expected], 1)


@pytest.mark.parametrize("answer, letter", [("E", "E"), ("cat", None), ("F. cat", "F"), ("I think so", None)])
def test_find_choice_without_options(answer, letter, functions):
    assert functions("multiple_choice").find_choice(answer) == letter


def test_find_choice_in_text_without_spaces(functions):
    assert functions("multiple_choice").find_choice("这是一只狗。", ["猫", "狗"]) == "B"


def test_multiple_choice(load):
    result = load("multiple_choice").compute(
        predictions=["A", "cat", "dog", "who knows"],
        references=["A", "B", "A", "A"],
        choices=[["cat", "dog"], ["dog", "cat"], ["cat", "dog"], ["cat", "dog"]],
        groups=[7, 7, 8, 9],
    )
    assert result == {"accuracy": 0.5, "answered": 0.75, "circular_accuracy": pytest.approx(1 / 3)}


def test_circular_needs_every_rotation(load):
    result = load("multiple_choice").compute(
        predictions=["A", "B", "C", "D"], references=["A", "B", "C", "A"], groups=[0, 0, 0, 0]
    )
    assert result == {"accuracy": 0.75, "answered": 1, "circular_accuracy": 0}


def test_multiple_choice_bad_arguments(load):
    metric = load("multiple_choice")
    with pytest.raises(ValueError, match="^1 groups for 2 predictions$"):
        metric.compute(predictions=["A", "B"], references=["A", "B"], groups=[1])
    with pytest.raises(ValueError, match="^rule must be .*lenient.* 'strict'$"):
        metric.compute(predictions=["A"], references=["A"], rule="strict")
    with pytest.raises(ValueError, match=r"^references\[0\] is 'C', .*options"):
        metric.compute(predictions=["A"], references=["C"], choices=[["cat", "dog"]])


# --- CIDEr -----------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "Two dogs aren't running; they're sitting, isn't it?": "two dogs are n't running they 're sitting is n't it",
    'A man\'s t-shirt says "STOP!" (in red).': "a man 's t-shirt says stop -lrb- in red -rrb-",
    "The kids' toys - black-and-white - cannot be seen...": "the kids toys black-and-white can not be seen",
    "1,000 people at 2:30 p.m. with $5, 10% off & 1/2": "1,000 people at 2:30 p.m. with $ 5 10 % off & 1/2",
    "Mr. O'Neill of the U.S. wears #19, it’s ‘new’": "mr. o'neill of the u.s. wears # 19 it 's new",
    "What?! A café in the '90s, 'tis gonna be 2.5 m": "what ?! a café in the '90s 't is gon na be 2.5 m",
    ".": "",
}


def test_cider_by_hand(load):
    # Every n-gram of the references is in one picture of two, so all weights are log 2 and the cosines are by counting.
    result = load("cider").compute(
        predictions=["a red cat", "big dog runs"], references=[["a red cat"], ["big dog sits"]], tokenizer="python"
    )
    first = (1 + 1 + 1 + 0) / 4  # there are no 4-grams
    second = (2 / 3 + 1 / 2 + 0 + 0) / 4
    assert result == {"cider": pytest.approx(10 * (first + second) / 2), "tokenizer": "python"}


def test_cider_single_picture_is_zero(load):
    assert load("cider").compute(predictions=["a dog"], references=[["a dog"]], tokenizer="python")["cider"] == 0


def test_cider_tokens(functions):
    tokenize = functions("cider").tokenize
    assert {caption: " ".join(tokenize(caption)) for caption in CAPTIONS} == CAPTIONS


def test_cider_without_java(load, functions, monkeypatch):
    metric = load("cider")
    monkeypatch.setattr(functions("cider").shutil, "which", lambda name: None)
    assert metric.compute(predictions=["a dog"], references=[["a dog"]])["tokenizer"] == "python"
    with pytest.raises(ValueError, match="needs Java and pycocoevalcap"):
        metric.compute(predictions=["a dog"], references=[["a dog"]], tokenizer="ptb")
    with pytest.raises(ValueError, match="^tokenizer must be"):
        metric.compute(predictions=["a dog"], references=[["a dog"]], tokenizer="words")


def test_cider_equals_pycocoevalcap(load):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    draw = random.Random(0)

    def caption():
        return " ".join(draw.choices("a the man dog red on runs street".split(), k=draw.randint(0, 12)))

    predictions = [caption() for _ in range(40)]
    references = [[caption() for _ in range(draw.randint(1, 5))] for _ in range(40)]
    official, _ = Cider().compute_score(
        dict(enumerate(references)), {i: [prediction] for i, prediction in enumerate(predictions)}
    )
    ours = load("cider").compute(predictions=predictions, references=references, tokenizer="python")
    assert ours["cider"] == pytest.approx(official, rel=1e-12)


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tokeniser is a Java program")
def test_cider_tokens_equal_the_official(functions):
    pytest.importorskip("pycocoevalcap")
    cider = functions("cider")
    captions = [*CAPTIONS, "two\nlines", ""]
    assert cider.tokenize_ptb(captions) == [cider.tokenize(caption) for caption in captions]
