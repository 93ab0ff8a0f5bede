"""Sources of a benchmark's questions: tables on the Hub, and folders in the layout of LLaVA's scripts."""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants
from PIL import Image

from shortv_llava.errors import ShortVError, first_line, one_line, reason
from shortv_llava.evaluation.questions import Question, image_file
from shortv_llava.files.digests import digest
from shortv_llava.files.json_lines import read_jsonl
from shortv_llava.hub.errors import hub_reason

REACH_SECONDS = 10
SHUFFLE_BUFFER = 200  # rows, most of them with a picture
FORMER_OWNERS = {"lmms-lab-encoder": "lmms-lab"}  # of data sets that moved; copies may have either owner


class Table(NamedTuple):
    """A split of a data set on the Hub, or of a folder with the same layout.

    Args:
        name: name of the configuration.
        files: files that hold the split, to avoid downloading the other splits.
        pictures: configuration with the pictures, by `id`, if the column `image` of this one lacks them.
    """

    repository: str
    split: str
    name: str | None = None
    files: str | None = None
    pictures: str | None = None


def table_questions(table: Table, make: Callable[[dict], Question]) -> list[Question]:
    """The questions of a table. Pictures are read from disk only when they are needed.

    Args:
        make: returns the question of a row, without pictures. The row has no column `image`, but its `number` and the
            `image_file` that its picture came from, None if unknown. A question without `image_id` gets the digest of
            its picture as `image_id`; all pictures are read once for this.

    Raises:
        ShortVError: if the table cannot be loaded, or names a missing picture.
    """
    rows = load_table(table)
    if table.pictures is None:
        pictures, texts, place_of = rows, rows.remove_columns("image"), None
    else:
        pictures, texts = load_table(table._replace(name=table.pictures)), rows
        place_of = {id: place for place, id in enumerate(pictures["id"])}
    pictures = pictures.select_columns("image")
    files = _file_names(pictures) if table.pictures is None else [None] * len(texts)
    rows = ({**row, "number": number, "image_file": file} for number, (row, file) in enumerate(zip(texts, files)))
    questions, ids = list(map(make, rows)), None
    for number, question in enumerate(questions):
        if question.image_id is None:
            ids = _digests(pictures) if ids is None else ids
            question = question._replace(image_id=ids[number])
        place = number if place_of is None else place_of.get(question.image_id)
        if place is None:
            raise ShortVError(
                f"{table.repository}: question {question.id} names picture {question.image_id}, which is not there"
            )
        shown = () if question.image_id is None else (partial(_picture, pictures, place),)
        questions[number] = question._replace(images=shown)
    return questions


def load_table(table: Table, **options):
    """The rows of a table.

    Args:
        options: for `load_dataset`.

    A data set that moved is looked for under its new owner, then under the old one.

    Raises:
        ShortVError: if the datasets library is missing or the table cannot be loaded.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ShortVError(
            f"{table.repository}: reading it needs the datasets library; pip install 'shortv-llava[eval]'"
        ) from error
    if table.files is not None:
        # The data set's card counts the rows of all splits; with some of the files, that check would fail.
        options |= {"data_files": {table.split: table.files}, "verification_mode": "no_checks"}
    places, problems = _places(table.repository), []
    for place in places:
        try:
            with one_line(_out_of_reach):
                _reach(place)
                return load_dataset(place, table.name, split=table.split, **options)
        except ShortVError as error:
            problems.append(error)
    raise ShortVError(f"{', formerly '.join(places)}: {problems[0]}") from problems[0]


def _places(repository: str) -> list[str]:
    """Repositories that may hold a data set, the newest first."""
    owner, _, name = repository.partition("/")
    return [repository] + ([f"{FORMER_OWNERS[owner]}/{name}"] if owner in FORMER_OWNERS else [])


def _reach(repository: str) -> None:
    """Ask the Hub for a data set once; the datasets library would retry for half a minute.

    The Hub is not asked for folders, or if HF_HUB_OFFLINE is set; the data set must then be in the cache.

    Raises:
        ShortVError: if the Hub does not answer or has no such data set.
    """
    if constants.HF_HUB_OFFLINE or Path(repository).exists():
        return
    hint = "or set HF_HUB_OFFLINE=1 if it was downloaded before"
    with one_line(lambda error: f"cannot be read: {hub_reason(error)}, {hint}"):
        HfApi().dataset_info(repository, timeout=REACH_SECONDS)


def stream(table: Table, shuffle_seed: int | None = None, take: int | None = None, **options) -> Iterator[dict]:
    """Stream the rows of a table, without downloading all of it.

    Args:
        shuffle_seed: seed to shuffle the rows; SHUFFLE_BUFFER further rows are downloaded.
        take: number of rows; all by default.
        options: for `load_dataset`.

    Raises:
        ShortVError: if the datasets library is missing or the table cannot be loaded.
    """
    rows = load_table(table, streaming=True, **options)
    with one_line(lambda error: f"{table.repository}: {_out_of_reach(error)}"):  # the download happens here
        if shuffle_seed is not None:
            rows = rows.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        yield from rows if take is None else rows.take(take)


def column(table: Table, name: str) -> list:
    """One column of a table; the other columns are not downloaded.

    Raises:
        ShortVError: if the table cannot be loaded.
    """
    return [row[name] for row in stream(table, columns=[name])]


def _out_of_reach(error: Exception) -> str:
    return f"cannot be read ({first_line(error)}); check the connection, or give data on this disk with --data"


def _picture(pictures, place: int) -> Image.Image:
    return _middle(pictures[place]["image"])


def _middle(pictures: Any) -> Any:
    """The middle frame of a video, which LLaVA is shown; a single picture is returned as it is."""
    return pictures[(len(pictures) - 1) // 2] if isinstance(pictures, list) else pictures


def _file_names(pictures) -> list[str | None]:
    """The file that each picture came from; None for videos, or if the table does not say."""
    from pyarrow import compute, types

    files = pictures.data.column("image")
    if not types.is_struct(files.type):
        return [None] * len(pictures)
    return compute.struct_field(files, "path").to_pylist()  # the pictures themselves are not read


def _digests(pictures) -> list[str | None]:
    """A digest of each picture's file, None where there is no picture."""
    ids = []
    for batch in pictures.with_format("arrow").iter(batch_size=64):
        for file in map(_middle, batch["image"].to_pylist()):
            ids.append(None if file is None else digest(file["bytes"] or str(file["path"]).encode()))
    return ids


# --- LLaVA's folders -------------------------------------------------------------------------------------------------


def jsonl_questions(
    paths: Sequence[str],
    images: Sequence[str],
    answers: Callable[[Path], Callable[[dict], tuple[Any, dict]]],
    root: Path,
) -> list[Question]:
    """The questions of a JSON-lines file of LLaVA's `eval.zip`; their texts are whole prompts.

    Args:
        paths: possible paths of the file, below `root`.
        images: possible paths of the folder of its pictures, below `root`.
        answers: takes `root` and returns a function from an entry of the file to the question's reference and details.

    Raises:
        ShortVError: if a file is missing or a picture is not in its folder.
    """
    file, folder = find(root, *paths), find(root, *images)
    answer = answers(root)
    questions = []
    for number, entry in read_jsonl(file):
        picture = image_file(folder, entry["image"], f"{file}, line {number}")
        reference, details = answer(entry)
        questions.append(Question(entry["question_id"], entry["text"], (picture,), entry["image"], reference, details))
    return questions


def find(root: Path, *names: str) -> Path:
    """The first of these files or folders below `root` that exists.

    Raises:
        ShortVError: if none exists.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    raise ShortVError(f"{root}: {' or '.join(names)} is missing; LLaVA's docs/Evaluation.md says where to get it")


def read_tsv(path: Path) -> list[dict[str, str | None]]:
    """The rows of a tab-separated file; values that pandas, and so LLaVA, takes for missing are None.

    Raises:
        ShortVError: if the file cannot be read or pandas is missing.
    """
    try:
        import pandas
    except ImportError as error:
        raise ShortVError(f"{path}: reading it needs pandas; pip install 'shortv-llava[eval]'") from error
    try:
        rows = pandas.read_table(path, dtype=str)
    except (OSError, ValueError) as error:
        raise ShortVError(f"{path}: cannot be read ({reason(error)})") from error
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


def base64_image(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))
