"""Several hundred made-up questions and nasty answers for every task that has an official script, as LLaVA's folders.

`python tests/official.py FOLDER` writes them: `FOLDER/eval`, laid out as LLaVA's `playground/data/eval`, and
`FOLDER/answers`, the answers and upload files of this package. `official.json` holds what the official scripts gave for
these files, printed with all digits, in percent (MME in points): those of LLaVA (c121f04) for scienceqa, textvqa, pope,
seed_bench and the uploads, and followed by GQA's `eval.py` and MME's `calculation.py` for gqa and mme; `vqaEval.py` of
VQA (a013f00) on TextVQA's answers, as `vqa`; VLMEvalKit's exact matching (e8e78f0) for mmbench, mmbench_cn, q_bench.
"""

import base64
import io
import json
import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from string import ascii_uppercase

from PIL import Image

from shortv_llava.evaluation.answers import AnswersFile
from shortv_llava.evaluation.questions import Question
from shortv_llava.evaluation.tasks import TASKS

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LONG = "word " * 3000

# Answers to a multiple-choice question: its right letter R, small r, another letter W, their texts {right}, {wrong}.
CHOSEN = [
    "{R}", "{r}", "{R}.", "({R})", "{R})", " {R}", "{R} ", "{R}\n", "\t{R}", "{R},", "{R};", "{R}!", "[{R}]", "#{R}",
    "**{R}**", "{R}{W}", "{R}{R}{R}", "{R}. {right}", "{R}.  {right}", "{R}.{right}", "{R}: {right}", "({R}) {right}",
    "{R}\n{right}", "{R}. {wrong}", "{W}. {right}", "{r}. {right}", "E. {right}", "F. {right}", "Z", "Z. {right}",
    "The answer is {R}.", "The answer is {R}", "the answer is {R}.", "The answer is {R}!", "The answer is {R}\n",
    "The answer is {R}. The answer is {W}.", "The answer is {R}.\nThe answer is {R}.", "The answer is {R}{W}.",
    "The answer is {right}.", "The correct answer is ({R}) {right}", "The answer is **{r}**",
    "Answer is {W}, no, {R}", "{R} or {W}", "{R} and {W} both", "{W}. {wrong}, or {R}. {right}", "{R}, not {W}",
    "not {W} but {R}", "{R} is the run-on sentence.", "It must be {R}",
    "{R} I think, because the others do not fit in here", "A {right}", "I see {right}", "I would say {R}",
    "Option {R}", "Answer: {R}", "答案是{R}", "{R}、{right}", "{R}。", "{right}", "{right}.", "It is {right}, surely",
    "{right} and {wrong}", "neither {wrong}", "no {right} at all, none", "", " ", ".", "?", "None", "none", "1",
    "two", "A", "B", "I", "é{R}", "Ａ", LONG + "{R}", "{R} " + LONG, "{R} " * 50,
    "I cannot say what it is from what is to be seen in here alone, {right} it might be", LONG + "{right}",
]  # fmt: skip
TEXTS = ["a cat", "the red dog", "3.5 cm", "Blue", "under water, at night"]
YES_NO = [
    "Yes", "No", "yes", "no", "YES", "NO", "Yes.", "No.", "yes, it is", "no, it is not", "Not", "not", "Nope", "Yeah",
    "There is no dog.", "There is a dog.", "I do not see it", "I don't see it", "Yes. No dog.", "No. Yes.", "Nothing",
    "Yes, there is no dog", "Is there? No", "none", "None of it", "I know", "know", "eyes", "It is not.", "", " ",
    ".", " yes", " no", "  yes", "  no", "maybe", "The answer is yes", "The answer is no.", "no no no", "y", "n", "1",
    "0", "Yes/No", "yes or no", "No,", "'no'", "(No)", "No!", "**No**", "не", "不", "noisy", "yes." * 500, LONG + "no",
]  # fmt: skip
WORDS = [
    "yes", "no", "Yes.", "No..", "2", "two", "Two.", "none", "zero", "ten", "eleven", "a dog", "The dog",
    "an old dog", "dog.", "dogs", "dog's", "Girl's", "dont", "don't", "couldnt've", "couldn'tve", "theyre", "let's",
    "Im", "I'm", "somebody'd", "somebodyd've", "yall'll", "'ows'at", "oclock", "1,000", "1, 000", "1,000/x",
    "red,blue", "red, blue", "black/white", "black / white", "t-shirt", "t - shirt", "2.5", ".5", "3.", "U.S.",
    "p.m.", "2:50 pm", "what?", "why?not", "(left)", "[x]", "{y}", "a=b", "a + b", "\\", "a_b", "<b>", "@home", "`x`",
    "!", "?!", "\"quoted\"", "$5", "50%", "", " ", ".", "...", " left ", "left .", "LEFT", "left,", "the", "a an the",
    "the left of the dog", "left\nright", "left\tright", "¿dónde?", "日本", "’s", "é", "x" * 500, "." * 40 + "x",
    "1." * 40, LONG,
]  # fmt: skip
COUNT = 300


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def write(path: Path, content: bytes | str | list | dict) -> None:
    """Bytes, a text, a list as JSON lines, or a dictionary as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(entry) + "\n" for entry in content)
    elif isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def entry(id: int | str, text: str, image: str = "1.png", **more) -> dict:
    return {"question_id": id, "image": image, "text": text, **more}


def human_answers(number: int) -> list[str]:
    """Ten for a question: in turn all alike, three spellings of one, or of several kinds; half of them about a word
    that is not the answer."""
    word, other = WORDS[(number + number % 2) % len(WORDS)], WORDS[7 * number % len(WORDS)]
    kinds = (
        [word] * 10,
        [word, word.upper(), f"{word}."] * 3 + [other],
        [other] * 3 + [word] * (number % 4) + ["x"] * 9,
    )
    return kinds[number % 3][:10]


def options(number: int, count: int) -> list[str]:
    return [TEXTS[(number + place) % len(TEXTS)] for place in range(count)]


# --- What each task asks ---------------------------------------------------------------------------------------------


def write_gqa(root: Path) -> None:
    write(root / "gqa/data/images/1.png", picture())
    write(root / "gqa/llava_gqa_testdev_balanced.jsonl", [entry(str(n), f"Q{n}?{SHORT}") for n in range(COUNT)])
    answers = [WORDS[(n + n // 3 % 2) % len(WORDS)].lower().rstrip(".") for n in range(COUNT)]
    types = {"structural": "query", "semantic": "obj", "detailed": "x"}
    about = {"isBalanced": True, "question": "Q?", "semantic": [], "types": types, "groups": {"global": "all"}}
    questions = {str(n): about | {"answer": answer} for n, answer in enumerate(answers)}
    write(root / "gqa/data/testdev_balanced_questions.json", questions)


def write_scienceqa(root: Path) -> None:
    asked, problems = [], {}
    for number in range(4 * len(CHOSEN)):
        choices = options(number, 2 + number % 4)
        problems[str(number)] = {"choices": choices, "answer": number // 3 % len(choices)}
        text = f"Q{number}?" + "".join(f"\n{letter}. {text}" for letter, text in zip("ABCDE", choices))
        pictured = {"image": "1/image.png"} if number % 5 < 2 else {}
        text = f"<image>\n{text}" if pictured else text
        asked.append({"id": str(number), **pictured, "conversations": [{"from": "human", "value": text}]})
    write(root / "scienceqa/images/test/1/image.png", picture())
    write(root / "scienceqa/problems.json", problems)
    write(root / "scienceqa/pid_splits.json", {"test": list(problems)})
    write(root / "scienceqa/llava_test_CQM-A.json", json.dumps(asked))


def write_textvqa(root: Path) -> None:
    """Two questions about each picture."""
    write(root / "textvqa/train_images/1.png", picture())
    text = f"\nReference OCR token: A, b.{SHORT}"
    asked = [entry(f"id{n // 2}", f"What is {n}?{text}") for n in range(COUNT)]
    write(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", asked)
    data = [{"image_id": f"id{n // 2}", "question": f"what is {n}?", "answers": human_answers(n)} for n in range(COUNT)]
    write(root / "textvqa/TextVQA_0.5.1_val.json", {"data": data})


def write_pope(root: Path) -> None:
    write(root / "pope/val2014/1.png", picture())
    asked = []
    for place, category in enumerate(("adversarial", "popular", "random")):
        numbers = range(place * COUNT // 3, (place + 1) * COUNT // 3)
        asked += [entry(n, f"Q{n}?{SHORT}", category=category) for n in numbers]
        labels = [entry(n, "", label="yes" if (n + n // 7) % 3 else "no") for n in numbers]
        write(root / f"pope/coco/coco_pope_{category}.json", labels)
    write(root / "pope/llava_pope_test.jsonl", asked)


def write_mme(root: Path) -> None:
    names = "existence count position color posters celebrity scene landmark artwork OCR commonsense_reasoning "
    names += "numerical_calculation text_translation code_reasoning"
    asked, folder = [], root / "MME/MME_Benchmark_release_version"
    for task in names.split():
        for number in range(11):
            image, texts = f"{task}/{number:04}.png", [f"Is it {number}?", f"Is it not {number}?"]
            asked += [entry(image, text + SHORT, image, category=task) for text in texts]
            write(folder / image, picture())
            lines = [f"{text} Please answer yes or no.\t{label}" for text, label in zip(texts, ("Yes", "No"))]
            write((folder / image).with_suffix(".txt"), "\n".join(lines))
    write(root / "MME/llava_mme.jsonl", asked)


def write_mmbench(root: Path) -> None:
    """Every question once for each rotation; in some the last option is a text that is taken for a missing one."""
    image, rows = base64.b64encode(picture()).decode(), []
    for number in range(2 * len(CHOSEN)):
        choices = options(number, 2 + number % 3)
        choices[-1] = "None" if number % 10 == 3 else choices[-1]
        for rotation in range(len(choices)):
            texts = [choices[(place + rotation) % len(choices)] for place in range(len(choices))]
            answer = ascii_uppercase[(number - rotation) % len(choices)]
            texts += [""] * (4 - len(texts))
            rows.append(
                [number + 1_000_000 * rotation, f"Q{number}?", "", *texts, answer, "c", image, "s", "l", "", "dev"]
            )
    header = "index question hint A B C D answer category image source l2-category comment split".split()
    text = "".join("\t".join(map(str, row)) + "\n" for row in [header, *rows])
    for name in ("mmbench/mmbench_dev_20230712.tsv", "mmbench_cn/mmbench_dev_cn_20231003.tsv"):
        write(root / name, text)


def write_seed_bench(root: Path) -> None:
    asked, questions = [], []
    for number in range(4 * len(CHOSEN)):
        id, kind = (number, "image") if number % 4 else (f"v{number}", "video")
        known = {"question_id": str(id), "question": "Q?", "data_type": kind, "answer": "ABCD"[number // 3 % 4]}
        texts = {f"choice_{letter}": text for letter, text in zip("abcd", options(number, 4))}
        questions.append(known | texts | {"question_type_id": 1 + (kind == "video")})
        asked.append(entry(id, f"Q?{LETTER}", "SEED-Bench-image/1"))
    types = {"Scene Understanding": 1, "Action Recognition": 2}
    write(root / "seed_bench/SEED-Bench-image/1", picture())
    write(root / "seed_bench/SEED-Bench.json", {"questions": questions, "question_type": types})
    write(root / "seed_bench/llava-seed-bench.jsonl", asked)


def write_q_bench(root: Path) -> None:
    asked = []
    for number in range(4 * len(CHOSEN)):
        choices = options(number, 2 + number % 3)
        right = choices[number // 3 % len(choices)]
        asked.append({"img_path": "1.png", "question": "Q?", "candidates": choices, "correct_ans": right})
    write(root / "qbench/images_llviqionqa/1.png", picture())
    write(root / "qbench/llvisionqa_dev.json", json.dumps(asked))


def write_vqav2(root: Path) -> None:
    write(root / "vqav2/test2015/1.png", picture())
    asked = [entry(n, f"Q{n}?{SHORT}") for n in range(COUNT)]
    write(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", asked)
    write(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", asked + [entry(n, "Q?") for n in range(COUNT, 400)])


def write_vizwiz(root: Path) -> None:
    write(root / "vizwiz/test/1.png", picture())
    write(root / "vizwiz/llava_test.jsonl", [entry(n, f"Q{n}?{SHORT}") for n in range(COUNT)])


def write_mm_vet(root: Path) -> None:
    write(root / "mmvet/mm-vet/images/1.png", picture())
    write(root / "mm-vet/llava-mm-vet.jsonl", [entry(n, f"Q{n}?") for n in range(COUNT)])


# --- What is answered ------------------------------------------------------------------------------------------------


def chosen(questions: list[Question]) -> list[str]:
    found = []
    for number, question in enumerate(questions):
        choices = [text for text in question.details["choices"] if text is not None]
        right = ascii_uppercase.index(question.reference) % len(choices)
        wrong = (right + 1) % len(choices)
        number = question.details.get("groups", number)
        letters = {"R": question.reference, "r": question.reference.lower(), "W": ascii_uppercase[wrong]}
        texts = {"right": choices[right], "wrong": choices[wrong]}
        found.append((CHOSEN[number % len(CHOSEN)] if number % 3 else "{R}").format(**letters, **texts))
    return found


def yes_or_no(questions: list[Question]) -> list[str]:
    return list(islice(cycle(YES_NO), len(questions)))


def words(questions: list[Question]) -> list[str]:
    return list(islice(cycle(WORDS), len(questions)))


MADE: dict[str, tuple[Callable[[Path], None], Callable[[list[Question]], list[str]]]] = {
    "gqa": (write_gqa, words),
    "scienceqa": (write_scienceqa, chosen),
    "textvqa": (write_textvqa, words),
    "pope": (write_pope, yes_or_no),
    "mme": (write_mme, yes_or_no),
    "mmbench": (write_mmbench, chosen),
    "mmbench_cn": (write_mmbench, chosen),
    "seed_bench": (write_seed_bench, chosen),
    "q_bench": (write_q_bench, chosen),
    "vqav2": (write_vqav2, words),
    "vizwiz": (write_vizwiz, words),
    "mm_vet": (write_mm_vet, words),
}


def make(name: str, root: Path) -> tuple[list[Question], dict]:
    """A task's questions, from a folder that is written for them, and the answers by question id."""
    write_data, answer = MADE[name]
    write_data(root)
    questions = TASKS[name].load(root)
    return questions, dict(zip([question.id for question in questions], answer(questions)))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name in MADE:
        questions, answers = make(name, target / "eval")
        (target / "answers").mkdir(exist_ok=True)
        file = AnswersFile(target / "answers" / f"{name}.jsonl", "made-up", {}, questions)
        file.add(questions, [answers[question.id] for question in questions])
        if TASKS[name].write_upload is not None:
            TASKS[name].write_upload(questions, answers, target / "answers" / "uploads")
