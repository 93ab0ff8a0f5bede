"""Questions about pictures, as evaluation takes them, and LLaVA's files of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from shortv_llava.errors import ShortVError
from shortv_llava.images import check_sides, open_image


class Question(NamedTuple):
    """A question about a picture, or about none.

    Args:
        id: as the data has it, a number or a text; answers are filed under it.
        text: the prompt's text, without image placeholders and chat template.
        images: files, pictures that are loaded already, or functions that give them (a table's are read when they are
            needed, for all of them would not fit into memory); see [`open_images`].
        image_id: the same for questions about the same pictures; None where nothing is known to be shared.
        reference: the right answer, or several, as the task's metric takes it; None if unknown.
        details: what else its task knows: this question's share of each further argument of the metric, what belongs
            into the task's upload file, perhaps the `subset` to score apart, and the `question_id` and `prompt` that
            LLaVA's scripts look for in the answers file, where they are not its id and text.
    """

    id: int | str
    text: str
    images: tuple[Path | Image.Image | Callable[[], Image.Image], ...] = ()
    image_id: str | None = None
    reference: str | list[str] | None = None
    details: dict = {}


def open_images(question: Question) -> list[Image.Image]:
    """The pictures of a question, in RGB.

    Raises:
        ShortVError: if one cannot be read.
    """
    pictures = []
    for image in question.images:
        if isinstance(image, Path):
            pictures.append(open_image(image))
            continue
        try:
            pictures.append((image if isinstance(image, Image.Image) else image()).convert("RGB"))
        except Exception as error:  # decoders raise every kind on broken pictures
            raise ShortVError(f"question {question.id!r}: its picture cannot be read ({error})") from error
        check_sides(pictures[-1], f"question {question.id!r}, its picture")
    return pictures


def read_questions(path: Path, images: Path) -> list[Question]:
    """LLaVA's question format: a JSON object a line with `question_id`, `image`, `text`, perhaps `answer`.

    Raises:
        ShortVError: if a file is missing, a line is no such object, an id comes twice, or an image is not in the folder
            `images`.
    """
    if not images.is_dir():
        raise ShortVError(f"{images}: no such folder of images")
    lines = {}  # of each id
    questions = []
    for number, entry in read_jsonl(path):
        where = f"{path}, line {number}"
        for key in ("image", "text"):
            if not isinstance(entry.get(key), str) or not entry[key]:
                raise ShortVError(f"{where}: needs a text {key!r}")
        id = entry.get("question_id", number)
        if not isinstance(id, int | str):
            raise ShortVError(f"{where}: question_id must be a number or a text, not {id!r}")
        if str(id) in lines:
            raise ShortVError(f"{where}: question_id {id!r} was used in line {lines[str(id)]} already")
        lines[str(id)] = number
        image = image_file(images, entry["image"], where)
        text = entry["text"].replace("<image>", "").strip()
        questions.append(Question(id, text, (image,), entry["image"], entry.get("answer")))
    if not questions:
        raise ShortVError(f"{path}: holds no questions")
    return questions


def read_jsonl(path: Path) -> list[tuple[int, dict]]:
    """Line numbers, from 1, and objects of a file with a JSON object a line; empty lines are left out.

    Raises:
        ShortVError: if the file cannot be read or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ShortVError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ShortVError(f"{path}, line {number}: is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ShortVError(f"{path}, line {number}: must be a JSON object")
        entries.append((number, entry))
    return entries


def image_file(folder: Path, name: str, where: str) -> Path:
    """The file `name` in a folder of images.

    Args:
        where: what names it, for the error.

    Raises:
        ShortVError: if it lies outside the folder or is missing.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ShortVError(f"{where}: image {name!r} lies outside {folder}")
    if not path.is_file():
        raise ShortVError(f"{where}: there is no image {path}")
    return path
