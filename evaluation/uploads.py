"""Upload files for benchmarks that are scored elsewhere."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from shortv_llava.errors import ShortVError, reason
from shortv_llava.evaluation.questions import Question
from shortv_llava.evaluation.scoring import answers_of, functions
from shortv_llava.files.outputs import replacing_file

Answered = list[tuple[Question, str]]

# The columns that LLaVA's convert_mmbench_for_submission.py keeps, in their order.
MMBENCH_COLUMNS = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")


def write_upload(
    name: str,
    content: Callable[[Answered], str | bytes],
    questions: Sequence[Question],
    answers: dict,
    folder: Path,
) -> Path:
    """Write an upload file, whole or not at all.

    Args:
        name: name of the file.
        content: returns the file's content from questions and their answers.
        answers: answers by question id.

    Returns:
        The file's path.

    Raises:
        ShortVError: if a question has no answer or the file cannot be written.
    """
    data = content(list(zip(questions, answers_of(questions, answers))))
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as unfinished:
            unfinished.write_bytes(data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise ShortVError(f"{path}: cannot be written ({reason(error)})") from error
    return path


def vqav2(answered: Answered) -> str:
    """JSON for the evaluation server, which needs all questions of the test set; those not asked have empty answers."""
    known = {question.id: _normalized(answer) for question, answer in answered}
    ids = answered[0][0].details["test_ids"]
    return json.dumps([{"question_id": id, "answer": known.get(id, "")} for id in ids])


def vizwiz(answered: Answered) -> str:
    return json.dumps(
        [{"image": question.details["image"], "answer": _normalized(answer)} for question, answer in answered]
    )


def _normalized(answer: str) -> str:
    return functions("vqa_accuracy").normalize(answer, "evalai")


def mmbench(answered: Answered) -> bytes:
    """An Excel table. Cells hold 32,767 characters at most; longer answers are cut off.

    Raises:
        ShortVError: if openpyxl is missing.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise ShortVError("MMBench's upload file needs openpyxl; pip install 'shortv-llava[eval]'") from error
    book = Workbook()
    sheet = book.active
    sheet.append(MMBENCH_COLUMNS)
    for question, answer in answered:
        row = question.details["row"] | {"prediction": ILLEGAL_CHARACTERS_RE.sub("", answer)}
        sheet.append([row.get(name) for name in MMBENCH_COLUMNS])
        for cell in sheet[sheet.max_row]:
            if cell.data_type == "f":  # a text that begins with "=" is no formula
                cell.data_type = "s"
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def mm_vet(answered: Answered) -> str:
    return json.dumps({f"v1_{question.id}": answer for question, answer in answered}, indent=2)


def q_bench(answered: Answered) -> str:
    """The benchmark's own entries with the answers, one a line."""
    return "".join(json.dumps(question.details["entry"] | {"response": answer}) + "\n" for question, answer in answered)
