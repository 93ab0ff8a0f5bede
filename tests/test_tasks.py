import base64
import io
import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from PIL import Image

from shortv_llava.calibrate.samples import gqa_samples
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation import tasks
from shortv_llava.evaluation.answers import AnswersFile
from shortv_llava.evaluation.questions import Question, open_images
from shortv_llava.evaluation.scoring import headline, score
from shortv_llava.evaluation.tasks import TASKS

datasets = pytest.importorskip("datasets")
evaluate = pytest.importorskip("evaluate")
pytest.importorskip("openpyxl")

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def lines(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def asked(image: str, text: str, id: int | str, **more) -> dict:
    return {"question_id": id, "image": image, "text": text, **more}


def tsv(*rows: tuple) -> str:
    header = "index question hint A B C D answer category image source l2-category comment split".split()
    return "".join("\t".join(map(str, row)) + "\n" for row in [header, *rows])


RED, BLUE = (base64.b64encode(picture(color)).decode() for color in COLORS)
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."

# What the tables on the Hub hold: (repository, configuration, split, columns). A picture is the name of a colour, or
# a list of them for a video.
TABLES = {
    "vqav2": [
        (
            *("lmms-lab-encoder/VQAv2", "default", "testdev"),
            {
                "question_type": [None] * 2,
                "multiple_choice_answer": [None] * 2,
                "answers": [None] * 2,
                "image_id": [7, 7],
                "answer_type": [None] * 2,
                "question_id": [70, 71],
                "question": ["What color is it?", "How many?"],
                "image": ["red", "red"],
            },
        ),
        (
            *("lmms-lab-encoder/VQAv2", "default", "test"),
            {"image_id": [7, 7, 8], "question_id": [70, 71, 80], "question": ["a", "b", "c"], "image": ["red"] * 3},
        ),
    ],
    "gqa": [
        (
            *("lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev"),
            {
                "id": ["1", "2", "3"],
                "imageId": ["n1", "n2", "n1"],
                "question": ["Is it red?", "Is it red?", "What is it?"],
                "answer": ["yes", "no", "square"],
            },
        ),
        (
            *("lmms-lab-encoder/GQA", "testdev_balanced_images", "testdev"),
            {"id": ["n2", "n1"], "image": ["blue", "red"]},
        ),
    ],
    "vizwiz": [
        (
            *("lmms-lab-encoder/VizWiz-VQA", "default", "test"),
            {
                "question_id": ["VizWiz_test_00000000.jpg", "VizWiz_test_00000001"],
                "image": ["red", "blue"],
                "question": ["what's This? thanks", "what color is it?"],
                "answers": [None, None],
                "category": ["", ""],
            },
        )
    ],
    "scienceqa": [
        (
            *("lmms-lab-encoder/ScienceQA", "ScienceQA-FULL", "test"),
            {
                "image": [None, "red", "red"],
                "question": ["Which is a plant?", "What is shown?", "And its color?"],
                "choices": [["an oak", "an orca"], ["a square", "a circle", "a star"], ["red", "blue"]],
                "answer": [0, 0, 0],
                "hint": ["", "Look at it.", ""],
            },
        )
    ],
    "textvqa": [
        (
            *("lmms-lab-encoder/textvqa", "default", "validation"),
            {
                "image_id": ["003a", "003a", "b9dc"],
                "question_id": [34602, 34603, 34604],
                "question": ["what is the Brand?", "who made it?", "what time is it?"],
                "image": ["red", "red", "blue"],
                "answers": [["dakota"] * 10, ["nobody"] * 10, ["5:10"] * 10],
                "ocr_tokens": [["DAKOTA", "a, b"], ["DAKOTA", "a, b"], []],
            },
        )
    ],
    "pope": [
        (
            *("lmms-lab-encoder/POPE", "default", "test"),
            {
                "id": ["0", "1", "2", "3"],
                "question_id": ["1", "2", "1", "2"],
                "question": ["Is there a dog in the image?", "Is there a cat in the image?"] * 2,
                "answer": ["yes", "no", "yes", "no"],
                "image_source": ["COCO_val2014_000000000001"] * 4,
                "image": ["red"] * 4,
                "category": ["adversarial", "adversarial", "random", "random"],
            },
        )
    ],
    "mme": [
        (
            *("lmms-lab-encoder/MME", "default", "test"),
            {
                "question_id": ["code_reasoning/0020.png"] * 2 + ["artwork/images/339.jpg"] * 2,
                "image": ["red", "red", "blue", "blue"],
                "question": [
                    "Is this Python? Please answer yes or no.",
                    "Is this C++?  Please answer yes or no.",
                    "Is it in Berlin? Please answer yes or no.",
                    "Is it in Paris? Please answer yes or no.",
                ],
                "answer": ["Yes", "No", "Yes", "No"],
                "category": ["code_reasoning", "code_reasoning", "artwork", "artwork"],
            },
        )
    ],
    "mmbench": [
        (
            *("lmms-lab-encoder/MMBench", name, "dev"),
            {
                "index": index,
                "question": ["Which is right?", "What color?", "What color?"],
                "hint": ["Read it.", missing, missing],
                "answer": ["B", "A", "B"],
                "A": ["one", "red", "blue"],
                "B": ["two", "blue", "red"],
                "C": ["three", missing, missing],
                "D": ["four", missing, missing],
                "category": ["x"] * 3,
                "image": ["red", "blue", "blue"],
                "source": ["y"] * 3,
                "L2-category": ["z"] * 3,
                "comment": [missing] * 3,
                "split": ["dev"] * 3,
            },
        )
        for name, index, missing in (("en", ["0", "241", "1000241"], "nan"), ("cn", [0, 241, 1000241], None))
    ],
    "seed_bench": [
        (
            *("lmms-lab-encoder/SEED-Bench", "default", "test"),
            {
                "answer": ["A", "D"],
                "choice_a": ["One", "run"],
                "choice_b": ["Two", "sit"],
                "choice_c": ["Three", "eat"],
                "choice_d": ["Four", "cook"],
                "data_id": ["1454426", "v.webm"],
                "data_type": ["image", "video"],
                "question": ["How many towels?", "What happens?"],
                "question_id": ["101669", "v1"],
                "question_type_id": [5, 10],
                "image": [["red"], ["red", "red", "blue", "red", "red", "red"]],
                "segment": [None, ["1", "2"]],
            },
        )
    ],
    "llava_bench": [
        (
            *("lmms-lab-encoder/llava-bench-in-the-wild", "default", "train"),
            {
                "question_id": [0, 1],
                "question": ["What is it?", "Describe it in detail."],
                "image": ["red", "red"],
                "caption": ["a", "b"],
                "gpt_answer": ["c", "d"],
                "category": ["conv", "detail"],
            },
        )
    ],
    "mm_vet": [
        (
            *("lmms-lab-encoder/MMVet", "default", "test"),
            {
                "question_id": ["v1_0", "v1_1"],
                "image": ["red", "blue"],
                "question": ["What is x?", "What is d?"],
                "answer": ["-1", "1.25<OR>5"],
                "capability": ["ocr", "math"],
            },
        )
    ],
    "q_bench": [
        (
            *("q-future/Q-Bench-HF", "default", "dev"),
            {
                "id": [0, 1],
                "image": ["red", "blue"],
                "question": ["How clear is it?", "Is it sharp?"],
                "option0": ["Good", "Yes"],
                "option1": ["Poor", "No"],
                "option2": ["Fair", "N/A"],
                "option3": ["N/A", "N/A"],
                "question_type": [1, 0],
                "question_concern": [0, 2],
                "correct_choice": ["B", "A"],
            },
        )
    ],
}
TABLES["mmbench_cn"] = TABLES["mmbench"]

PROMPTS = {
    "vqav2": [
        "What color is it?\nAnswer the question using a single word or phrase.",
        "How many?\nAnswer the question using a single word or phrase.",
    ],
    "gqa": [
        "Is it red?\nAnswer the question using a single word or phrase.",
        "Is it red?\nAnswer the question using a single word or phrase.",
        "What is it?\nAnswer the question using a single word or phrase.",
    ],
    "vizwiz": [
        f"What's this? thanks\n{UNANSWERABLE}\nAnswer the question using a single word or phrase.",
        f"What color is it?\n{UNANSWERABLE}\nAnswer the question using a single word or phrase.",
    ],
    "scienceqa": [
        "Which is a plant?\nA. an oak\nB. an orca\nAnswer with the option's letter from the given choices directly.",
        "Context: Look at it.\nWhat is shown?\nA. a square\nB. a circle\nC. a star\n"
        "Answer with the option's letter from the given choices directly.",
        "And its color?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.",
    ],
    "textvqa": [
        "What is the brand?\nReference OCR token: DAKOTA, a, b\nAnswer the question using a single word or phrase.",
        "Who made it?\nReference OCR token: DAKOTA, a, b\nAnswer the question using a single word or phrase.",
        "What time is it?\nReference OCR token: \nAnswer the question using a single word or phrase.",
    ],
    "pope": [
        "Is there a dog in the image?\nAnswer the question using a single word or phrase.",
        "Is there a cat in the image?\nAnswer the question using a single word or phrase.",
    ]
    * 2,
    "mme": [
        "Is this Python?\nAnswer the question using a single word or phrase.",
        "Is this C++?\nAnswer the question using a single word or phrase.",
        "Is it in Berlin?\nAnswer the question using a single word or phrase.",
        "Is it in Paris?\nAnswer the question using a single word or phrase.",
    ],
    "mmbench": [
        "Read it.\nWhich is right?\nA. one\nB. two\nC. three\nD. four\n"
        "Answer with the option's letter from the given choices directly.",
        "What color?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.",
        "What color?\nA. blue\nB. red\nAnswer with the option's letter from the given choices directly.",
    ],
    "mmbench_cn": [
        "Read it.\nWhich is right?\nA. one\nB. two\nC. three\nD. four\n请直接回答选项字母。",
        "What color?\nA. red\nB. blue\n请直接回答选项字母。",
        "What color?\nA. blue\nB. red\n请直接回答选项字母。",
    ],
    "seed_bench": [
        "How many towels?\nA. One\nB. Two\nC. Three\nD. Four\n"
        "Answer with the option's letter from the given choices directly.",
        "What happens?\nA. run\nB. sit\nC. eat\nD. cook\n"
        "Answer with the option's letter from the given choices directly.",
    ],
    "llava_bench": ["What is it?", "Describe it in detail."],
    "mm_vet": ["What is x?", "What is d?"],
    "q_bench": [
        "How clear is it?\nChoose between one of the options as follows:\nA. Good\nB. Poor\nC. Fair\n",
        "Is it sharp?\nChoose between one of the options as follows:\nA. Yes\nB. No\n",
    ],
}

# Of each question the picture (None: there is none) and the reference.
SHOWN = {
    "vqav2": ("red red", None),
    "gqa": ("red blue red", ["yes", "no", "square"]),
    "vizwiz": ("red blue", None),
    "scienceqa": ("none red red", ["A", "A", "A"]),
    "textvqa": ("red red blue", [["dakota"] * 10, ["nobody"] * 10, ["5:10"] * 10]),
    "pope": ("red red red red", ["yes", "no", "yes", "no"]),
    "mme": ("red red blue blue", ["Yes", "No", "Yes", "No"]),
    "mmbench": ("red blue blue", ["B", "A", "B"]),
    "mmbench_cn": ("red blue blue", ["B", "A", "B"]),
    "seed_bench": ("red blue", ["A", "D"]),
    "llava_bench": ("red red", None),
    "mm_vet": ("red blue", None),
    "q_bench": ("red blue", ["B", "A"]),
}

MME = "MME/MME_Benchmark_release_version"

# LLaVA's folders: what each file holds; a picture is the name of a colour.
FOLDERS = {
    "vqav2": {
        "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl": lines(
            *(asked("7.jpg", text, id) for text, id in zip(PROMPTS["vqav2"], (70, 71)))
        ),
        "vqav2/llava_vqav2_mscoco_test2015.jsonl": lines(*(asked("7.jpg", "", id) for id in (70, 71, 80))),
        "vqav2/test2015/7.jpg": "red",
    },
    "gqa": {
        "gqa/llava_gqa_testdev_balanced.jsonl": lines(
            *(asked(f"n{n}.jpg", text, str(id)) for id, (n, text) in enumerate(zip((1, 2, 1), PROMPTS["gqa"]), 1))
        ),
        "gqa/data/testdev_balanced_questions.json": json.dumps(
            {"1": {"answer": "yes"}, "2": {"answer": "no"}, "3": {"answer": "square"}}
        ),
        "gqa/data/images/n1.jpg": "red",
        "gqa/data/images/n2.jpg": "blue",
    },
    "vizwiz": {
        "vizwiz/llava_test.jsonl": lines(
            *(asked(f"VizWiz_test_0000000{id}.jpg", text, id) for id, text in enumerate(PROMPTS["vizwiz"]))
        ),
        "vizwiz/test/VizWiz_test_00000000.jpg": "red",
        "vizwiz/test/VizWiz_test_00000001.jpg": "blue",
    },
    "scienceqa": {
        "scienceqa/llava_test_CQM-A.json": json.dumps(
            [
                {"id": id}
                | ({"image": "p/image.png"} if id > "4" else {})
                | {
                    "conversations": [
                        {
                            "from": "human",
                            "value": ("<image>\n" if id > "4" else "") + text.rpartition("\n")[0],
                        },
                        {"from": "gpt", "value": "A"},
                    ]
                }
                for id, text in zip("456", PROMPTS["scienceqa"])
            ]
        ),
        "scienceqa/problems.json": json.dumps(
            {id: {"choices": choices, "answer": 0} for id, choices in zip("456", TABLES["scienceqa"][0][3]["choices"])}
        ),
        "scienceqa/images/test/p/image.png": "red",
    },
    "textvqa": {
        "textvqa/llava_textvqa_val_v051_ocr.jsonl": lines(
            *(asked(f"{id}.jpg", text, id) for id, text in zip(("003a", "003a", "b9dc"), PROMPTS["textvqa"]))
        ),
        "textvqa/TextVQA_0.5.1_val.json": json.dumps(
            {
                "data": [
                    {"image_id": "003a", "question": "what is the Brand?", "answers": ["dakota"] * 10},
                    {"image_id": "003a", "question": "who made it?", "answers": ["nobody"] * 10},
                    {"image_id": "b9dc", "question": "what time is it?", "answers": ["5:10"] * 10},
                ]
            }
        ),
        "textvqa/train_images/003a.jpg": "red",
        "textvqa/train_images/b9dc.jpg": "blue",
    },
    "pope": {
        "pope/llava_pope_test.jsonl": lines(
            *(
                asked("1.jpg", text, id, category="adversarial" if id < 3 else "random")
                for id, text in enumerate(PROMPTS["pope"], 1)
            )
        ),
        "pope/val2014/1.jpg": "red",
    }
    | {
        f"pope/coco/coco_pope_{category}.json": lines(
            *(asked("1.jpg", "", id, label=label) for id, label in enumerate(("yes", "no"), 1))
        )
        for category in ("adversarial", "random")
    },
    "mme": {
        "MME/llava_mme.jsonl": lines(
            *(
                asked(image, text, image, category=image.partition("/")[0])
                for image, text in zip(TABLES["mme"][0][3]["question_id"], PROMPTS["mme"])
            )
        ),
        f"{MME}/code_reasoning/0020.png": "red",
        f"{MME}/code_reasoning/0020.txt": (
            "Is this Python? Please answer yes or no.\tYes\nIs this C++?  Please answer yes or no.\tNo\n"
        ),
        f"{MME}/artwork/images/339.jpg": "blue",
        f"{MME}/artwork/questions_answers_YN/339.txt": (
            "Is it in Berlin? Please answer yes or no.\tYes\nIs it in Paris? Please answer yes or no.\tNo"
        ),
    },
    "mmbench": {
        "mmbench/mmbench_dev_20230712.tsv": tsv(
            (0, "Which is right?", "Read it.", "one", "two", "three", "four", "B", "x", RED, "y", "z", "", "dev"),
            (241, "What color?", "", "red", "blue", "", "", "A", "x", BLUE, "y", "z", "", "dev"),
            (1000241, "What color?", "nan", "blue", "red", "", "", "B", "x", BLUE, "y", "z", "", "dev"),
        )
    },
    "seed_bench": {
        "seed_bench/llava-seed-bench.jsonl": lines(
            asked("SEED-Bench-image/1454426", PROMPTS["seed_bench"][0], 101669),
            asked("SEED-Bench-video-image/10_v1.png", PROMPTS["seed_bench"][1], "v1"),
        ),
        "seed_bench/SEED-Bench.json": json.dumps(
            {
                "questions": [
                    {name: values[n] for name, values in TABLES["seed_bench"][0][3].items() if name != "image"}
                    for n in range(2)
                ]
            }
        ),
        "seed_bench/SEED-Bench-image/1454426": "red",
        "seed_bench/SEED-Bench-video-image/10_v1.png": "blue",
    },
    "llava_bench": {
        "llava-bench-in-the-wild/questions.jsonl": lines(
            *(asked("001.jpg", text, id, category="conv") for id, text in enumerate(PROMPTS["llava_bench"]))
        ),
        "llava-bench-in-the-wild/images/001.jpg": "red",
    },
    "mm_vet": {
        "mm-vet/llava-mm-vet.jsonl": lines(
            *(asked(f"v1_{id}.png", text, id, category="conv") for id, text in enumerate(PROMPTS["mm_vet"]))
        ),
        "mm-vet/images/v1_0.png": "red",
        "mm-vet/images/v1_1.png": "blue",
    },
    "q_bench": {
        "qbench/llvisionqa_dev.json": json.dumps(
            [
                {
                    "img_path": "00001.jpg",
                    "question": "How clear is it?",
                    "candidates": ["Good", "Poor", "Fair"],
                    "correct_ans": "Poor",
                },
                {
                    "img_path": "00002.jpg",
                    "question": "Is it sharp?",
                    "candidates": ["Yes", "No"],
                    "correct_ans": "Yes",
                },
            ]
        ),
        "qbench/images_llvisionqa/00001.jpg": "red",
        "qbench/images_llvisionqa/00002.jpg": "blue",
    },
}
FOLDERS["mmbench_cn"] = {
    "mmbench_cn/mmbench_dev_cn_20231003.tsv": FOLDERS["mmbench"]["mmbench/mmbench_dev_20230712.tsv"]
}


def write_tables(folder: Path, name: str) -> None:
    """Data sets as the Hub lays them out. load_dataset takes `owner/name` for a folder if there is one."""
    configs = {}
    for repository, config, split, columns in TABLES[name]:
        files = "data" if config == "default" else config
        path = folder / repository / files / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(
            {
                key: [as_pictures(v, f"{n:05}.jpg") for n, v in enumerate(values, 1)] if key == "image" else values
                for key, values in columns.items()
            }
        )
        if "image" in columns:
            listed = isinstance(columns["image"][0], list)
            image = datasets.Sequence(datasets.Image()) if listed else datasets.Image()
            table = table.cast_column("image", image)
        table.to_parquet(path)
        configs.setdefault(repository, []).append(
            f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {files}/{split}-*\n"
        )
    for repository, entries in configs.items():
        (folder / repository / "README.md").write_text("---\nconfigs:\n" + "".join(entries) + "---\n")


def as_pictures(value, name: str):
    if value is None:
        return None
    return [as_pictures(v, name) for v in value] if isinstance(value, list) else {"bytes": picture(value), "path": name}


def write_folder(folder: Path, name: str) -> None:
    for path, content in FOLDERS[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(picture(content) if content in COLORS else content.encode())


@pytest.fixture(params=["hub", "folder"])
def source(request):
    return request.param


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Questions of a task, from tables or from a folder."""

    def load(name: str, source: str = "folder") -> list[Question]:
        if source == "folder":
            write_folder(tmp_path, name)
            return TASKS[name].load(tmp_path)
        write_tables(tmp_path, name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        tasks._vqav2_test_ids.cache_clear()
        return TASKS[name].load(None)

    return load


def test_every_task_of_the_release_is_there():
    names = "gqa llava_bench mm_vet mmbench mmbench_cn mme pope q_bench scienceqa seed_bench textvqa vizwiz vqav2"
    assert sorted(TASKS) == names.split() == sorted(TABLES) == sorted(FOLDERS) == sorted(PROMPTS) == sorted(SHOWN)
    elsewhere = {"vqav2", "vizwiz", "llava_bench", "mm_vet"}
    assert {name for name, task in TASKS.items() if task.metric is None} == elsewhere
    assert {name for name, task in TASKS.items() if task.hub_note} == {"pope", "mmbench", "seed_bench"}
    assert {task.max_new_tokens for task in TASKS.values()} == {128, 1024}


@pytest.mark.parametrize("name", TASKS)
def test_questions(name, load, source):
    questions = load(name, source)
    assert [question.text for question in questions] == PROMPTS[name]
    assert len({question.id for question in questions}) == len(questions)
    colors, references = SHOWN[name]
    assert [question.reference for question in questions] == (references or [None] * len(questions))
    shown = ["none" if not (images := open_images(q)) else images[0].getpixel((0, 0)) for q in questions]
    assert shown == [COLORS.get(color, color) for color in colors.split()]
    ids = {}  # the same picture has one id, another picture another
    for question, color in zip(questions, colors.split()):
        assert (question.image_id is None) == (color == "none") == (not question.images)
        assert ids.setdefault(color, question.image_id) == question.image_id
    assert len(set(ids.values())) == len(ids)


def test_only_the_split_is_read(tmp_path, load, monkeypatch):
    load("textvqa", "hub")
    folder = tmp_path / "lmms-lab-encoder" / "textvqa"
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"would be gigabytes")
    card = """---
dataset_info:
  features:
  - {name: image_id, dtype: string}
  - {name: question_id, dtype: int64}
  - {name: question, dtype: string}
  - {name: image, dtype: image}
  - {name: answers, sequence: string}
  - {name: ocr_tokens, sequence: string}
  splits:
  - {name: train, num_bytes: 1000, num_examples: 34602}
  - {name: validation, num_bytes: 1000, num_examples: 5000}
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
---
"""
    (folder / "README.md").write_text(card)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "another cache"))
    assert len(TASKS["textvqa"].load(None)) == 3


def test_pictures_of_a_table_are_not_kept(load):
    question = load("gqa", "hub")[0]
    first, second = (open_images(question)[0] for _ in range(2))
    assert callable(question.images[0]) and first is not second


def test_ids_that_come_twice(load, source):
    assert [question.id for question in load("mme", source)] == [
        *("code_reasoning/0020.png", "code_reasoning/0020.png#2"),
        *("artwork/images/339.jpg", "artwork/images/339.jpg#2"),
    ]
    assert [question.id for question in load("textvqa", source)] == ["003a", "003a#2", "b9dc"]


# --- Scores ----------------------------------------------------------------------------------------------------------

SCORES = {  # answers, the headline, and other figures
    "gqa": (["Yes.", "yes", "square"], 200 / 3, {"accuracy": 200 / 3}),
    "scienceqa": (
        *(["A", "The answer is B.", "A. red"], 50),
        {"accuracy": 200 / 3, "image/accuracy": 50, "text/accuracy": 100, "answered": 100},
    ),
    "textvqa": (["Dakota", "Somebody", "5:10"], 200 / 3, {}),
    "pope": (
        *(["Yes", "No", "Yes", "Yes"], 250 / 3),
        {"f1": 80, "accuracy": 75, "categories/adversarial/f1": 100, "categories/random/precision": 50},
    ),
    "mme": (
        *(["Yes", "No", "Yes", "Yes"], 50),
        {"cognition": 200, "tasks/artwork/accuracy": 50, "tasks/artwork/accuracy_plus": 0},
    ),
    "mmbench": (["B", "A", "A"], 50, {"accuracy": 200 / 3}),
    "mmbench_cn": (["B", "A", "red"], 100, {"accuracy": 100}),
    "seed_bench": (["A", "D."], 50, {"image/accuracy": 100, "video/accuracy": 0, "lenient_accuracy": 100}),
    "q_bench": (["Poor.", "No"], 50, {}),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores(name, load, source):
    questions, task = load(name, source), TASKS[name]
    answers, main, others = SCORES[name]
    scores = score(task.metric, questions, dict(zip([q.id for q in questions], answers)), **task.metric_kwargs)
    assert headline(task.metric, scores, task.subset) == pytest.approx(main)
    assert {figure: scores[figure] for figure in others} == pytest.approx(others)


def test_every_task_with_a_metric_is_scored_here():
    assert set(SCORES) == {name for name, task in TASKS.items() if task.metric}


# --- Upload files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def upload(load, tmp_path):
    """What a task's upload file holds for these answers."""

    def upload(name: str, source: str, *answers: str) -> bytes:
        questions = load(name, source)
        folder = tmp_path / "out" / "uploads"
        path = TASKS[name].write_upload(questions, dict(zip([q.id for q in questions], answers)), folder)
        assert list(folder.iterdir()) == [path]
        return path.read_bytes()

    return upload


def test_vqav2_upload(upload, source):
    assert json.loads(upload("vqav2", source, "The Red.", "Two dogs, maybe")) == [
        {"question_id": 70, "answer": "red"},
        {"question_id": 71, "answer": "2 dogs maybe"},
        {"question_id": 80, "answer": ""},
    ]


def test_vizwiz_upload(upload, source):
    assert json.loads(upload("vizwiz", source, "Unanswerable", "A red mug")) == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "red mug"},
    ]


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench_upload(upload, source, name):
    import openpyxl

    rows = openpyxl.load_workbook(io.BytesIO(upload(name, source, "B", "=A1\x00", "word " * 10_000))).active
    assert [[cell.value for cell in row] for row in rows] == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        [0, "Which is right?", "one", "two", "three", "four", "B", "B", "dev"],
        [241, "What color?", "red", "blue", None, None, "=A1", "A", "dev"],
        [1000241, "What color?", "blue", "red", None, None, ("word " * 10_000)[:32_767], "B", "dev"],
    ]
    assert rows["G3"].data_type == "s"


def test_mm_vet_upload(upload, source):
    assert json.loads(upload("mm_vet", source, "x = 1", "日本")) == {"v1_0": "x = 1", "v1_1": "日本"}


@pytest.mark.parametrize(
    "name, ids",
    [
        ("llava_bench", ["0", "1"]),
        ("textvqa", ["003a", "003a", "b9dc"]),
        ("mme", ["code_reasoning/0020.png"] * 2 + ["artwork/images/339.jpg"] * 2),
    ],
)
def test_answers_are_filed_under_llavas_ids(load, tmp_path, source, name, ids):
    questions = load(name, source)
    path = tmp_path / "answers.jsonl"
    answers = {question.id: f"answer\n{question.id}" for question in questions}
    AnswersFile(path, "model", {}, questions).add(questions, list(answers.values()))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [str(entry["question_id"]) for entry in entries] == ids
    assert [entry["prompt"] for entry in entries] == PROMPTS[name]
    assert len({entry["answer_id"] for entry in entries}) == len(entries)
    assert AnswersFile(path, "model", {}, questions).answers == answers


def test_scienceqas_answers_tell_where_a_picture_was(load, tmp_path, source):
    questions = load("scienceqa", source)
    path = tmp_path / "answers.jsonl"
    AnswersFile(path, "model", {}, questions).add(questions, ["A"] * 3)
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert prompts == [PROMPTS["scienceqa"][0], *(f"<image>\n{prompt}" for prompt in PROMPTS["scienceqa"][1:])]


def test_q_bench_upload(upload, source):
    entries = [json.loads(line) for line in upload("q_bench", source, "B. Poor", "A").splitlines()]
    assert [entry["response"] for entry in entries] == ["B. Poor", "A"]
    assert [entry["candidates"] for entry in entries] == [["Good", "Poor", "Fair"], ["Yes", "No"]]
    assert [entry["img_path"] for entry in entries] == ["00001.jpg", "00002.jpg"]
    assert [entry["correct_ans"] for entry in entries] == ["Poor", "Yes"]


def test_upload_wants_every_answer(load, tmp_path):
    with pytest.raises(ShortVError, match="^question 1 has no answer$"):
        TASKS["mm_vet"].write_upload(load("mm_vet"), {0: "x"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_upload_that_cannot_be_written(load, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ShortVError, match="mm_vet.json: cannot be written"):
        TASKS["mm_vet"].write_upload(load("mm_vet"), {0: "x", 1: "y"}, tmp_path / "out")


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, path", [(name, path) for name, paths in FOLDERS.items() for path in paths])
def test_missing_files_are_named(name, path, load, tmp_path):
    load(name)
    (tmp_path / path).unlink()
    with pytest.raises(ShortVError) as error:
        TASKS[name].load(tmp_path)
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message and path in message
    assert "missing" in message or "there is no image" in message


@pytest.mark.parametrize(
    "name, file", [("gqa", "gqa/llava_gqa_testdev_balanced.jsonl"), ("q_bench", "qbench/llvisionqa_dev.json")]
)
def test_pictures_outside_the_folder(name, file, load, tmp_path):
    load(name)
    (tmp_path / "secret.jpg").write_bytes(picture("red"))
    text = (tmp_path / file).read_text()
    image = {"gqa": "n1.jpg", "q_bench": "00001.jpg"}[name]
    up = {"gqa": "../../../secret.jpg", "q_bench": "../../secret.jpg"}[name]
    (tmp_path / file).write_text(text.replace(f'"{image}"', f'"{up}"'))
    with pytest.raises(ShortVError, match=f"image '{up}' lies outside"):
        TASKS[name].load(tmp_path)


@pytest.mark.parametrize(
    "name, path, content, message",
    [
        ("gqa", "gqa/data/testdev_balanced_questions.json", "{}", "not laid out .*KeyError: '1'"),
        ("gqa", "gqa/data/testdev_balanced_questions.json", "{", "testdev_balanced_questions.json: is not JSON"),
        ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", "", "there are no questions"),
        ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", "{}\n", "not laid out"),
        ("pope", "pope/coco/coco_pope_random.json", "", "question 3 .*no label .*1.jpg"),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", "[]", "TextVQA_0.5.1_val.json: .*no JSON object"),
        ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "index\tquestion\n0\n", "not laid out"),
        ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "", "cannot be read"),
        ("scienceqa", "scienceqa/problems.json", "{}", "not laid out"),
    ],
)
def test_files_that_are_not_what_they_should_be(name, path, content, message, load, tmp_path):
    load(name)
    (tmp_path / path).write_text(content)
    with pytest.raises(ShortVError, match=message) as error:
        TASKS[name].load(tmp_path)
    assert "\n" not in str(error.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(ShortVError, match="nowhere: no such folder"):
        TASKS["gqa"].load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["gqa", "vqav2"])
def test_hub_out_of_reach(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShortVError, match=r"^lmms-lab-encoder/(\w+), .*lmms-lab/\1: cannot be read .*--data"):
        TASKS[name].load(None)


def test_question_names_a_picture_that_is_not_there(load, monkeypatch):
    columns = TABLES["gqa"][1][3] | {"id": ["n2", "n3"]}
    monkeypatch.setitem(TABLES, "gqa", [TABLES["gqa"][0], (*TABLES["gqa"][1][:3], columns)])
    with pytest.raises(ShortVError, match="question 1 .*picture n1.* not there"):
        load("gqa", "hub")


def test_tables_are_found_where_they_were(load, tmp_path):
    load("pope", "hub")
    (tmp_path / "lmms-lab-encoder").rename(tmp_path / "lmms-lab")
    assert [question.text for question in TASKS["pope"].load(None)] == PROMPTS["pope"]


@pytest.mark.parametrize(
    "name, path, others",
    [
        ("mm_vet", "mm-vet", ["mmvet"]),
        ("mm_vet", "mm-vet/images", ["mmvet/images", "mmvet/mm-vet/images"]),
        ("q_bench", "qbench/images_llvisionqa", ["qbench/images_llviqionqa"]),
        ("mmbench_cn", "mmbench_cn", ["mmbench"]),
    ],
)
def test_folders_as_llavas_documentation_names_them(name, path, others, load, tmp_path):
    load(name)
    for other in others:
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).rename(tmp_path / other)
        assert [question.text for question in TASKS[name].load(tmp_path)] == PROMPTS[name]
        (tmp_path / other).rename(tmp_path / path)


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_a_right_answer_none_stops_nothing(name, load, source, monkeypatch):
    if source == "folder":
        files = {file: text.replace("\tfour\tB\t", "\tNone\tD\t") for file, text in FOLDERS[name].items()}
        monkeypatch.setitem(FOLDERS, name, files)
    else:
        tables = [(*t[:3], t[3] | {"D": ["None", *t[3]["D"][1:]], "answer": ["D", "A", "B"]}) for t in TABLES[name]]
        monkeypatch.setitem(TABLES, name, tables)
    questions, task = load(name, source), TASKS[name]
    assert questions[0].reference == "D" and "\nD." not in questions[0].text
    answers = dict(zip([question.id for question in questions], ("D", "A", "B")))
    scores = score(task.metric, questions, answers, **task.metric_kwargs)
    assert scores["accuracy"] == pytest.approx(200 / 3) and scores["circular_accuracy"] == 50


def test_broken_picture(load, tmp_path):
    questions = load("mmbench")
    assert open_images(questions[0])
    broken = questions[0]._replace(images=(lambda: tasks.base64_image("aGVsbG8="),))
    with pytest.raises(ShortVError, match="question 0: .*picture cannot be read"):
        open_images(broken)


def test_open_images(tmp_path):
    (tmp_path / "a.png").write_bytes(picture("red"))
    grey = Image.new("L", (8, 8))
    pictures = open_images(Question(1, "", (tmp_path / "a.png", grey, lambda: grey)))
    assert [image.mode for image in pictures] == ["RGB"] * 3 and open_images(Question(2, "")) == []
    with pytest.raises(ShortVError, match="b.png: no such image"):
        open_images(Question(3, "", (tmp_path / "b.png",)))


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("would try again and again"))
    with pytest.raises(ShortVError, match="encoder/POPE, .*lmms-lab/POPE: cannot be read: .*connection"):
        TASKS["pope"].load(None)
    with pytest.raises(ShortVError, match="encoder/GQA, .*lmms-lab/GQA: cannot be read: .*connection"):
        gqa_samples(1, seed=0)
