"""The benchmarks of LLaVA-1.5: prompts, data and scoring as in its evaluation scripts.

Data come from copies on the Hub, or from a folder with the layout of LLaVA's `playground/data/eval` (see its
docs/Evaluation.md). Prompts are those of the question files in LLaVA's `eval.zip`; for the Hub's tables they are built
from the rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import takewhile
from pathlib import Path, PurePath
from string import ascii_uppercase
from typing import NamedTuple

from shortv_llava.chat.prompts import CHAT_SYSTEM, SHORT_ANSWER_PROMPT, TUNING_SYSTEM
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation import uploads
from shortv_llava.evaluation.questions import Question, image_file
from shortv_llava.evaluation.sources import (
    Table,
    base64_image,
    column,
    find,
    jsonl_questions,
    read_tsv,
    table_questions,
)
from shortv_llava.files.digests import digest
from shortv_llava.files.json_files import read_json
from shortv_llava.files.json_lines import read_jsonl

SHORT = f"\n{SHORT_ANSWER_PROMPT}"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
MME_FOLDER = "MME/MME_Benchmark_release_version"
# Paths in LLaVA's scripts and in its documentation.
MMBENCH_CN_FILES = (
    "mmbench_cn/mmbench_dev_cn_20231003.tsv",
    "mmbench/mmbench_dev_cn_20231003.tsv",
)
Q_BENCH_IMAGES = ("qbench/images_llvisionqa", "qbench/images_llviqionqa")
MM_VET_FILES = ("mm-vet/llava-mm-vet.jsonl", "mmvet/llava-mm-vet.jsonl")
MM_VET_IMAGES = ("mm-vet/images", "mmvet/images", "mmvet/mm-vet/images")
SEED_HUB_NOTE = "of a video the Hub's table has other frames than the one that LLaVA cut out; the middle one is shown"
YES_OR_NO = "Please answer yes or no."  # end of MME's own questions, which LLaVA replaces by SHORT


class Task(NamedTuple):
    """A benchmark.

    Args:
        metric: folder in `metrics/` that scores it; None if scoring needs another model or a server.
        max_new_tokens: limit for an answer, as in LLaVA's script.
        load: loads its questions, with distinct ids, from the Hub (None) or from a folder in LLaVA's layout. Raises
            ShortVError if data are missing or have another layout.
        write_upload: for tasks that are scored elsewhere from another file than LLaVA's answers file: writes the upload
            file from questions and answers (by id) into a folder, and returns its path.
        metric_kwargs: constant arguments of the metric.
        dataset: Hub id of its data.
        subset: subset of questions whose score papers compare; all if None.
        hub_note: how the Hub's tables differ from LLaVA's own set.
        vicuna_system, image_aspect_ratio: settings of LLaVA's script; `crop` for CLIP's centre crop.
    """

    name: str
    metric: str | None
    max_new_tokens: int
    load: Callable[[Path | None], list[Question]]
    write_upload: Callable[[list[Question], dict, Path], Path] | None
    metric_kwargs: dict
    dataset: str
    subset: str | None = None
    hub_note: str | None = None
    vicuna_system: str = TUNING_SYSTEM
    image_aspect_ratio: str = "pad"


def _task(
    name: str,
    metric: str | None,
    max_new_tokens: int,
    hub: "partial[list[Question]]",
    folder: Callable[[Path], list[Question]],
    upload: tuple[str, Callable[[uploads.Answered], str | bytes]] | None = None,
    by_picture: bool = False,
    **metric_kwargs,
) -> Task:
    write = None if upload is None else partial(uploads.write_upload, *upload)
    load, dataset = partial(_load, name, hub, folder), hub.args[0].repository  # of `_table`'s Table
    load, subset = (_by_picture(load), "image") if by_picture else (load, None)
    return Task(name, metric, max_new_tokens, load, write, metric_kwargs, dataset, subset)


def _load(name: str, hub, folder, root: Path | None) -> list[Question]:
    if root is not None and not root.is_dir():
        raise ShortVError(f"{root}: no such folder")
    try:
        questions = hub() if root is None else folder(root)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        where = "on the Hub" if root is None else f"in {root}"
        raise ShortVError(
            f"{name}: the data {where} are not laid out as expected ({type(error).__name__}: {error})"
        ) from error
    if not questions:
        raise ShortVError(f"{name}: there are no questions")
    return list(_distinct(questions))


def _distinct(questions: Iterable[Question]) -> Iterable[Question]:
    """The questions with distinct ids: repeated ids get a suffix. In MME and TextVQA an id belongs to a picture."""
    seen = Counter()
    for question in questions:
        seen[question.id] += 1
        if seen[question.id] > 1:
            details = question.details | {"question_id": question.id}
            question = question._replace(id=f"{question.id}#{seen[question.id]}", details=details)
        yield question


def _options(choices: Iterable[str]) -> str:
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices))


# --- From rows of tables ---------------------------------------------------------------------------------------------


@cache
def _vqav2_test_ids() -> list[int]:
    return column(Table("lmms-lab-encoder/VQAv2", "test", files="data/test-*"), "question_id")


def _vqav2_row(row: dict) -> Question:
    id, picture = row["question_id"], str(row["image_id"])
    return Question(id, row["question"] + SHORT, image_id=picture, details={"test_ids": _vqav2_test_ids()})


def _gqa_row(row: dict) -> Question:
    return Question(row["id"], row["question"] + SHORT, image_id=row["imageId"], reference=row["answer"])


def _vizwiz_row(row: dict) -> Question:
    id = row["question_id"]
    details = {"image": f"{id.removesuffix('.jpg')}.jpg"}
    return Question(id, row["question"].capitalize() + UNANSWERABLE + SHORT, image_id=id, details=details)


def _scienceqa_row(row: dict) -> Question:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    text = context + row["question"] + _options(row["choices"]) + LETTER
    return _scienceqa_question(row["number"], text, row)


def _scienceqa_question(id: int | str, text: str, problem: dict) -> Question:
    return Question(id, text, reference=ascii_uppercase[problem["answer"]], details={"choices": problem["choices"]})


def _by_picture(load: Callable[[Path | None], list[Question]]) -> Callable[[Path | None], list[Question]]:
    """Also score questions with and without a picture separately; LLaVA's script tells them apart by their prompts."""

    def load_both(root: Path | None) -> list[Question]:
        questions = []
        for q in load(root):
            apart = {"subset": "image", "prompt": f"<image>\n{q.text}"} if q.images else {"subset": "text"}
            questions.append(q._replace(details=q.details | apart))
        return questions

    return load_both


def _textvqa_row(row: dict) -> Question:
    text = f"{row['question'].capitalize()}\nReference OCR token: {', '.join(row['ocr_tokens'])}{SHORT}"
    return Question(row["image_id"], text, image_id=row["image_id"], reference=row["answers"])


def _pope_row(row: dict) -> Question:
    details = {"categories": row["category"]}
    return Question(row["id"], row["question"] + SHORT, reference=row["answer"], details=details)


def _mme_row(row: dict) -> Question:
    id, text = row["question_id"], row["question"].replace(YES_OR_NO, "").strip() + SHORT
    details = {"tasks": row["category"], "images": id}
    return Question(id, text, image_id=id, reference=row["answer"], details=details)


def _mmbench_row(instruction: str, row: dict) -> Question:
    """The question of a row. The table has one row for each rotation of the options, with `index` a million apart.

    An option "None" counts as missing, as in LLaVA, even if it is the right one.
    """
    row = {name: None if str(value).lower() in ("nan", "none") else value for name, value in row.items()}
    choices = list(takewhile(lambda choice: choice is not None, (row[letter] for letter in "ABCD")))
    hint = "" if row["hint"] is None else f"{row['hint']}\n"
    index = int(row["index"])
    upload = {name: row[name] for name in uploads.MMBENCH_COLUMNS if name in row} | {"index": index}
    return Question(
        index,
        hint + row["question"] + _options(choices) + instruction,
        reference=row.get("answer"),
        details={"choices": [row[letter] for letter in "ABCD"], "groups": index % 1_000_000, "row": upload},
    )


def _seed_row(row: dict) -> Question:
    choices = [row[f"choice_{letter}"] for letter in "abcd"]
    text = row["question"] + _options(choices) + LETTER
    details = {"choices": choices, "subset": row["data_type"]}
    return Question(row["question_id"], text, reference=row["answer"], details=details)


def _open_row(row: dict) -> Question:
    """The question of a row of MM-Vet or LLaVA-Bench, without an instruction for the answer's form."""
    return Question(str(row["question_id"]).removeprefix("v1_"), row["question"])


def _q_bench_row(row: dict) -> Question:
    candidates = [row[f"option{n}"] for n in range(4) if row[f"option{n}"] != "N/A"]
    entry = {"id": row["id"], "img_path": row["image_file"], "question": row["question"], "candidates": candidates}
    entry["correct_ans"] = candidates[ascii_uppercase.index(row["correct_choice"])]
    return _q_bench_question(entry, row["id"], row["correct_choice"])


def _q_bench_question(entry: dict, id: int | str, reference: str | None) -> Question:
    options = _options(entry["candidates"])
    text = f"{entry['question']}\nChoose between one of the options as follows:{options}\n"
    return Question(id, text, reference=reference, details={"choices": entry["candidates"], "entry": entry})


# --- From LLaVA's folders --------------------------------------------------------------------------------------------

# Each of these functions takes the folder, and returns a function from an entry to its reference and details.


def _no_answers(root: Path):
    return lambda entry: (None, {})


def _vqav2_answers(root: Path):
    test = find(root, "vqav2/llava_vqav2_mscoco_test2015.jsonl")
    ids = [entry["question_id"] for _, entry in read_jsonl(test)]
    return lambda entry: (None, {"test_ids": ids})


def _gqa_answers(root: Path):
    name = "testdev_balanced_questions.json"
    answers = read_json(find(root, f"gqa/data/{name}", f"gqa/data/questions1.2/{name}"))
    return lambda entry: (answers[entry["question_id"]]["answer"], {})


def _vizwiz_answers(root: Path):
    return lambda entry: (None, {"image": entry["image"]})


def _textvqa_answers(root: Path):
    rows = read_json(find(root, "textvqa/TextVQA_0.5.1_val.json"))["data"]
    answers = {(row["image_id"], row["question"].lower()): row["answers"] for row in rows}
    return lambda entry: (answers[entry["question_id"], entry["text"].split("\n")[0].lower()], {})


def _pope_answers(root: Path):
    """Labels are in one file for each category, in the order of the questions."""

    @cache
    def labels(category: str):
        path = find(root, f"pope/coco/coco_pope_{category}.json")
        return iter(read_jsonl(path))

    def answer(entry: dict):
        _, label = next(labels(entry["category"]), (0, {"image": None}))
        if label["image"] != entry["image"]:
            raise ValueError(f"question {entry['question_id']} has no label for {entry['image']}")
        return label["label"], {"categories": entry["category"]}

    return answer


def _mme_answers(root: Path):
    """Answers are in a text file for each picture, beside it or in a folder: question, tab and answer on each line."""

    @cache
    def answers(picture: str) -> dict[str, str]:
        file = PurePath(MME_FOLDER, picture).with_suffix(".txt")
        path = find(root, str(file), str(file.parent.parent / "questions_answers_YN" / file.name))
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {question.replace(YES_OR_NO, "").strip(): answer.strip() for question, answer in lines}

    def answer(entry: dict):
        question = entry["text"].removesuffix(SHORT).replace(YES_OR_NO, "").strip()
        details = {"tasks": entry["category"], "images": entry["image"]}
        return answers(entry["image"])[question], details

    return answer


def _seed_answers(root: Path):
    rows = {str(row["question_id"]): row for row in read_json(find(root, "seed_bench/SEED-Bench.json"))["questions"]}

    def answer(entry: dict):
        question = _seed_row(rows[str(entry["question_id"])])
        return question.reference, question.details

    return answer


def _scienceqa_folder(root: Path) -> list[Question]:
    problems = read_json(find(root, "scienceqa/problems.json"))
    file = find(root, "scienceqa/llava_test_CQM-A.json")
    questions = []
    for entry in read_json(file, list):
        name, images, problem = entry.get("image"), (), problems[entry["id"]]
        if name is not None:
            images = (image_file(find(root, "scienceqa/images/test"), name, f"{file}, question {entry['id']}"),)
        text = entry["conversations"][0]["value"].replace("<image>", "").strip() + LETTER
        questions.append(_scienceqa_question(entry["id"], text, problem)._replace(images=images, image_id=name))
    return questions


def _mmbench_folder(instruction: str, names: tuple[str, ...], root: Path) -> list[Question]:
    """The questions of MMBench's table, which holds the pictures as text, one copy for each rotation."""
    questions = []
    for row in read_tsv(find(root, *names)):
        picture = row.pop("image")
        question = _mmbench_row(instruction, row)
        questions.append(question._replace(images=(partial(base64_image, picture),), image_id=digest(picture.encode())))
    return questions


def _q_bench_folder(root: Path) -> list[Question]:
    file, folder = find(root, "qbench/llvisionqa_dev.json"), find(root, *Q_BENCH_IMAGES)
    questions = []
    for entry in read_json(file, list):
        name = entry["img_path"]
        picture = image_file(folder, name, f"{file}, question {name}")
        reference = ascii_uppercase[entry["candidates"].index(entry["correct_ans"])]
        questions.append(_q_bench_question(entry, name, reference)._replace(images=(picture,), image_id=name))
    return questions


# --- The tasks -------------------------------------------------------------------------------------------------------


def _table(make: Callable[[dict], Question], *table, **options) -> "partial[list[Question]]":
    return partial(table_questions, Table(*table, **options), make)


def _jsonl(
    paths: str | Sequence[str], images: str | Sequence[str], answers: Callable
) -> Callable[[Path], list[Question]]:
    paths, images = ((names,) if isinstance(names, str) else names for names in (paths, images))
    return partial(jsonl_questions, paths, images, answers)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task(
            name="vqav2",
            metric=None,
            max_new_tokens=128,
            hub=_table(_vqav2_row, "lmms-lab-encoder/VQAv2", "testdev", files="data/testdev-*"),
            folder=_jsonl("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", "vqav2/test2015", _vqav2_answers),
            upload=("vqav2.json", uploads.vqav2),
        ),
        _task(
            name="gqa",
            metric="gqa",
            max_new_tokens=128,
            hub=_table(
                _gqa_row,
                "lmms-lab-encoder/GQA",
                "testdev",
                "testdev_balanced_instructions",
                pictures="testdev_balanced_images",
            ),
            folder=_jsonl("gqa/llava_gqa_testdev_balanced.jsonl", "gqa/data/images", _gqa_answers),
        ),
        _task(
            name="vizwiz",
            metric=None,
            max_new_tokens=128,
            hub=_table(_vizwiz_row, "lmms-lab-encoder/VizWiz-VQA", "test", files="data/test-*"),
            folder=_jsonl("vizwiz/llava_test.jsonl", "vizwiz/test", _vizwiz_answers),
            upload=("vizwiz.json", uploads.vizwiz),
        ),
        _task(
            name="scienceqa",
            metric="multiple_choice",
            max_new_tokens=1024,
            hub=_table(_scienceqa_row, "lmms-lab-encoder/ScienceQA", "test", "ScienceQA-FULL"),
            folder=_scienceqa_folder,
            by_picture=True,
            rule="scienceqa",
        ),
        _task(
            name="textvqa",
            metric="vqa_accuracy",
            max_new_tokens=128,
            hub=_table(_textvqa_row, "lmms-lab-encoder/textvqa", "validation", files="data/validation-*"),
            folder=_jsonl("textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/train_images", _textvqa_answers),
            normalization="evalai",
        ),
        _task(
            name="pope",
            metric="pope",
            max_new_tokens=128,
            hub=_table(_pope_row, "lmms-lab-encoder/POPE", "test"),
            folder=_jsonl("pope/llava_pope_test.jsonl", "pope/val2014", _pope_answers),
        )._replace(hub_note="the Hub's table has 9,000 questions, LLaVA's set 8,910"),
        _task(
            name="mme",
            metric="mme",
            max_new_tokens=128,
            hub=_table(_mme_row, "lmms-lab-encoder/MME", "test"),
            folder=_jsonl("MME/llava_mme.jsonl", MME_FOLDER, _mme_answers),
        ),
        _task(
            name="mmbench",
            metric="multiple_choice",
            max_new_tokens=1024,
            hub=_table(partial(_mmbench_row, LETTER), "lmms-lab-encoder/MMBench", "dev", "en"),
            folder=partial(_mmbench_folder, LETTER, ("mmbench/mmbench_dev_20230712.tsv",)),
            upload=("mmbench.xlsx", uploads.mmbench),
            rule="mmbench",
        )._replace(hub_note="the Hub's table has 4,329 rows, LLaVA's file of July 2023 4,377"),
        _task(
            name="mmbench_cn",
            metric="multiple_choice",
            max_new_tokens=1024,
            hub=_table(partial(_mmbench_row, LETTER_CN), "lmms-lab-encoder/MMBench", "dev", "cn"),
            folder=partial(_mmbench_folder, LETTER_CN, MMBENCH_CN_FILES),
            upload=("mmbench_cn.xlsx", uploads.mmbench),
            rule="mmbench",
        ),
        _task(
            name="seed_bench",
            metric="multiple_choice",
            max_new_tokens=128,
            hub=_table(_seed_row, "lmms-lab-encoder/SEED-Bench", "test"),
            folder=_jsonl("seed_bench/llava-seed-bench.jsonl", "seed_bench", _seed_answers),
            rule="letter",
        )._replace(hub_note=SEED_HUB_NOTE),
        _task(
            name="llava_bench",
            metric=None,
            max_new_tokens=1024,
            hub=_table(_open_row, "lmms-lab-encoder/llava-bench-in-the-wild", "train"),
            folder=_jsonl("llava-bench-in-the-wild/questions.jsonl", "llava-bench-in-the-wild/images", _no_answers),
        ),
        _task(
            name="mm_vet",
            metric=None,
            max_new_tokens=1024,
            hub=_table(_open_row, "lmms-lab-encoder/MMVet", "test"),
            folder=_jsonl(MM_VET_FILES, MM_VET_IMAGES, _no_answers),
            upload=("mm_vet.json", uploads.mm_vet),
        ),
        _task(
            name="q_bench",
            metric="multiple_choice",
            max_new_tokens=1024,
            hub=_table(_q_bench_row, "q-future/Q-Bench-HF", "dev", files="data/dev-*"),
            folder=_q_bench_folder,
            upload=("q_bench.jsonl", uploads.q_bench),
            rule="mmbench",
        )._replace(vicuna_system=CHAT_SYSTEM, image_aspect_ratio="crop"),
    )
}
