"""The figures and files of the official scripts, to the last digit; see `official.py`."""

import hashlib
import json
from pathlib import Path

import official
import pytest

from shortv_llava.evaluation.answers import AnswersFile
from shortv_llava.evaluation.metrics.vqa_accuracy.vqa_accuracy import VqaAccuracy
from shortv_llava.evaluation.scoring import headline_name, score
from shortv_llava.evaluation.tasks import TASKS

openpyxl = pytest.importorskip("openpyxl")

FIGURES = json.loads((Path(__file__).parent / "official.json").read_text())
UPLOADS = FIGURES.pop("uploads")
VQA = FIGURES.pop("vqa")


def test_every_task_with_a_script_is_compared():
    assert set(FIGURES) == {name for name, task in TASKS.items() if task.metric}
    assert set(official.MADE) == set(FIGURES) | set(UPLOADS)


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name, tmp_path):
    questions, answers = official.make(name, tmp_path)
    assert len(questions) >= 300
    scores = score(TASKS[name].metric, questions, answers, **TASKS[name].metric_kwargs)
    # Some versions of Python add up floats more exactly than others.
    assert {figure: scores[figure] for figure in FIGURES[name]} == pytest.approx(FIGURES[name], rel=1e-13)


@pytest.mark.parametrize(
    "name, figure",
    [
        ("scienceqa", "image/accuracy"),
        ("pope", "mean_f1"),
        ("mmbench", "circular_accuracy"),
        ("seed_bench", "accuracy"),
    ],
)
def test_headline_is_what_papers_compare(name, figure, tmp_path):
    questions, answers = official.make(name, tmp_path)
    scores = score(TASKS[name].metric, questions, answers, **TASKS[name].metric_kwargs)
    assert headline_name(TASKS[name].metric, scores, TASKS[name].subset) == figure
    if name == "pope":
        f1 = [value for figure, value in FIGURES["pope"].items() if figure.endswith("/f1")]
        assert scores["mean_f1"] == pytest.approx(sum(f1) / 3, abs=1e-12)


def test_vqa_script(tmp_path):
    questions, answers = official.make("textvqa", tmp_path)
    references = [question.reference for question in questions]
    given = [answers[question.id] for question in questions]
    result = VqaAccuracy()._compute(given, references, skip_unanimous=True)
    assert {name: 100 * value for name, value in result.items()} == pytest.approx(VQA, rel=1e-13)


@pytest.mark.parametrize("name", UPLOADS)
def test_uploads(name, tmp_path):
    questions, answers = official.make(name, tmp_path / "eval")
    path = TASKS[name].write_upload(questions, answers, tmp_path)
    if path.suffix == ".xlsx":
        cells = openpyxl.load_workbook(path).active
        content = [["" if cell.value is None else cell.value for cell in row] for row in cells]
    else:
        content = json.loads(path.read_text())
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest() == UPLOADS[name]


@pytest.mark.parametrize("name", ["scienceqa", "textvqa"])
def test_answers_files_are_llavas(name, tmp_path):
    """Under the ids and with the prompts by which LLaVA's scripts find questions, and read back all the same."""
    questions, answers = official.make(name, tmp_path)
    file = AnswersFile(tmp_path / "answers.jsonl", "model", {}, questions)
    file.add(questions, list(answers.values()))
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    if name == "scienceqa":
        known = json.loads((tmp_path / "scienceqa" / "problems.json").read_text())
        assert [line["question_id"] for line in lines] == list(known)
        assert [line["prompt"].startswith("<image>\n") for line in lines] == [bool(q.images) for q in questions]
    else:
        data = json.loads((tmp_path / "textvqa" / "TextVQA_0.5.1_val.json").read_text())["data"]
        found = [(line["question_id"], line["prompt"].split("\n")[0].lower()) for line in lines]
        assert found == [(known["image_id"], known["question"]) for known in data]
    assert AnswersFile(file.path, "model", {}, questions).answers == answers
