"""Questions about pictures for evaluation, and LLaVA's question files."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from shortv_llava.chat.images import check_sides, open_image
from shortv_llava.errors import ShortVError, one_line, reason
from shortv_llava.files.json_lines import read_jsonl


class Question(NamedTuple):
    """A question about a picture, or about none.

    Args:
        id: id in the data, a number or a text; key of the answers.
        text: the prompt's text, without image placeholders and chat template.
        images: files, loaded pictures, or functions that return pictures (a table's pictures are read when they are
            needed, because all of them would not fit into memory); see [`open_images`].
        image_id: id that is equal for questions about the same pictures; None if it is unknown.
        reference: the right answer, or several, in the format of the task's metric; None if unknown.
        details: further entries of its task: this question's part of each further argument of the metric, entries for
            the task's upload file, optionally the `subset` to score separately, and the `question_id` and `prompt` for
            LLaVA's scripts in the answers file, if these differ from `id` and `text`.
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
        with one_line(lambda error: f"question {question.id!r}: its picture cannot be read ({error})"):
            pictures.append((image if isinstance(image, Image.Image) else image()).convert("RGB"))
        check_sides(pictures[-1], f"question {question.id!r}, its picture")
    return pictures


def read_questions(path: Path, images: Path | None) -> list[Question]:
    """Read LLaVA's question format: a JSON object a line with `question_id`, `text`, optionally `image` and `answer`.

    Raises:
        ShortVError: if a file is missing, a line is no such object, an id is not unique, or an image is not in the
            folder `images`.
    """
    if images is not None and not images.is_dir():
        raise ShortVError(f"{images}: no such folder of images")
    lines = {}  # line by id
    questions = []
    for number, entry in read_jsonl(path):
        where = f"{path}, line {number}"
        text, image = entry.get("text"), entry.get("image")
        if not isinstance(text, str) or not text.replace("<image>", "").strip():
            raise ShortVError(f"{where}: needs a text 'text', the question")
        if image is not None and (not isinstance(image, str) or not image):
            raise ShortVError(f"{where}: 'image' must be the name of a file, not {image!r}; leave it out for none")
        if image is not None and images is None:
            raise ShortVError(f"{where}: is about image {image!r}; give the folder of the pictures, --images DIR")
        id = entry.get("question_id", number)
        if not isinstance(id, int | str):
            raise ShortVError(f"{where}: question_id must be a number or a text, not {id!r}")
        if str(id) in lines:
            raise ShortVError(f"{where}: question_id {id!r} was used in line {lines[str(id)]} already")
        lines[str(id)] = number
        pictures = () if image is None else (image_file(images, image, where),)
        answer = _answer(entry.get("answer"), where)
        questions.append(Question(id, text.replace("<image>", "").strip(), pictures, image, answer))
    if not questions:
        raise ShortVError(f"{path}: holds no questions")
    return questions


def _answer(value, where: str) -> str | list[str] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(each, str | int | float) for each in value):
        return [str(each) for each in value]
    raise ShortVError(f"{where}: 'answer' must be a text or several in an array, not {value!r}")


def image_file(folder: Path, name: str, where: str) -> Path:
    """The file `name` in a folder of images.

    Args:
        where: source of the name, for the error.

    Raises:
        ShortVError: if the file is outside the folder or missing.
    """
    path = folder / name
    try:
        inside, there = path.resolve().is_relative_to(folder.resolve()), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # name too long, a loop of links, a forbidden character
        raise ShortVError(f"{where}: image {name!r} is no usable name ({reason(error)}); correct it") from error
    if not inside:
        raise ShortVError(f"{where}: image {name!r} lies outside {folder}; put it there")
    if not there:
        raise ShortVError(f"{where}: there is no image {path}; put it there, or leave the line out")
    return path
