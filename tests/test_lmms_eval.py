"""The model `shortv_llava` in lmms-eval itself, on tasks over local data: `shortv evaluate`'s answers and scores."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from command import shortv_here
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from shortv_llava.calibrate.correction import FitSample, correction_tensors, fit_corrections
from shortv_llava.calibrate.samples import embedded_samples, make_inputs
from shortv_llava.chat.prompts import make_prompt
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.package import write_package
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.command import EvaluationOptions, run
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.hub.metadata import read_card
from shortv_llava.hub.scores import read_scores

NOT_INSTALLED = "lmms-eval is not installed; `make test-lmms-eval` makes an environment with it"
evaluator = pytest.importorskip("lmms_eval.evaluator", reason=NOT_INSTALLED)
models = pytest.importorskip("lmms_eval.models", reason=NOT_INSTALLED)
tasks = pytest.importorskip("lmms_eval.tasks", reason=NOT_INSTALLED)

SAMPLES = CHECKPOINT.parent / "samples"
LAYERS = "11,0,10,5,8,4,1"  # of the fixture `package_folder`
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Folder with the embedded samples, as LLaVA's file, as a table and as a task; each is asked in two ways."""
    folder = tmp_path_factory.mktemp("asked")
    samples = [json.loads(line) for line in (SAMPLES / "questions.jsonl").read_text().splitlines()]
    again = [sample | {"text": f"Look: {sample['text']}"} for sample in samples]
    keys = ("image", "text", "answer")
    questions = [
        {"question_id": number} | {key: sample[key] for key in keys} for number, sample in enumerate(samples + again)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    rows = [question | {"image": str(SAMPLES / "images" / question["image"])} for question in questions]
    features = {"question_id": Value("int64"), "image": Image(), "text": Value("string"), "answer": Value("string")}
    table = Dataset.from_list(rows, features=Features(features))
    DatasetDict({"test": table}).save_to_disk(folder / "table")
    (folder / "task").mkdir()
    (folder / "task" / "shapes.yaml").write_text(json.dumps(task(folder, "shapes", doc_to_visual="image")))
    (folder / "task" / "utils.py").write_text(COUNTING)
    metrics = [
        {"metric": "right", "aggregation": "!function utils.add_up"},
        {"metric": "words", "aggregation": "mean"},
    ]
    counted = task(folder, "ocr_counted", doc_to_visual="image", metric_list=metrics)
    text = json.dumps(counted | {"process_results": "!function utils.process"})
    (folder / "task" / "counted.yaml").write_text(re.sub(r'"(!function [\w.]+)"', r"\1", text))
    return folder


# A task that adds up all it has ever seen, and writes a file, as OCRBench does.
COUNTING = """
from lmms_eval.tasks._task_utils.file_utils import generate_submission_file

seen = []


def process(doc, results):
    return {"words": len(results[0].split()), "right": {"score": 3 * (results[0].lower() == doc["answer"].lower())}}


def add_up(results, args):
    seen.extend(result["score"] for result in results)
    with open(generate_submission_file("counted.txt", args), "w") as file:
        file.write(str(sum(seen)))
    return sum(seen)
"""


def task(folder, name: str, **settings) -> dict:
    """A task over the table, as lmms-eval's YAML describes it; JSON is YAML."""
    match = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
    generation = {"generation_kwargs": {"max_new_tokens": 6, "temperature": 0, "do_sample": False}}
    return {
        "task": name,
        "dataset_path": str(folder / "table"),
        "dataset_kwargs": {"load_from_disk": True},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "text",
        "doc_to_target": "answer",
        "metric_list": [match],
        **(generation if "output_type" not in settings else {}),
        **settings,
    }


@pytest.fixture(scope="module")
def expected(package_folder, asked):
    """Results and answers, by variant, of `shortv evaluate`."""
    output, data = asked / "evaluated", {"questions": asked / "questions.jsonl", "images": SAMPLES / "images"}
    asking = {"metric": "gqa", "compare": True, "dtype": "float32", "max_new_tokens": 6, "batch_size": 8}
    run(EvaluationOptions(str(package_folder), output, **data, **asking))
    found = {}
    for result in json.loads((output / "results.json").read_text())["results"]:
        lines = (output / f"answers-{result['name']}.jsonl").read_text().splitlines()
        found[result["name"]] = result, [json.loads(line)["text"] for line in lines]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("launch", [[sys.executable], LAUNCH], ids=["one process", "two processes"])
@pytest.mark.parametrize("variant, layers", [("dense", "none"), ("shortv", LAYERS)], ids=["dense", "shortv"])
def test_scores_are_those_of_shortv_evaluate(package_folder, asked, expected, tmp_path, variant, layers, launch):
    command = [*launch, "-m", "lmms_eval", "--model", "shortv_llava", "--include_path", str(asked / "task")]
    command += ["--model_args", f"pretrained={package_folder},replaced_layers={layers},dtype=float32"]
    command += ["--tasks", "shapes", "--batch_size", "8", "--log_samples", "--output_path", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (table,) = re.findall(r"^\|Tasks.*\n(?:\|.*\n)+", done.stdout, re.MULTILINE)
    print(table)
    result, answers = expected[variant]
    heads, _, cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    assert float(cells[heads.index("Value")]) == round(result["headline"] / 100, 4)
    (samples,) = tmp_path.rglob("*_samples_shapes.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [entry["filtered_resps"] for entry in sorted(found, key=lambda entry: entry["doc_id"])] == answers


@pytest.fixture(scope="module")
def oracle(package_folder):
    return load_model(package_folder, dtype=torch.float32), load_processor(package_folder)


@pytest.fixture
def ours(package_folder):
    """The harness's own way to a model."""
    return lambda arguments="", **options: models.get_model("shortv_llava").create_from_arg_string(
        f"pretrained={package_folder},dtype=float32{arguments}", options
    )


def evaluate(model, *descriptions: dict, limit: int = 6) -> list[list]:
    """What the model gave for each document of each task."""
    done = evaluator.simple_evaluate(
        model,
        tasks=[tasks.ConfigurableTask(config=description) for description in descriptions],
        task_manager=tasks.TaskManager(include_defaults=False),  # reading a thousand others takes long
        limit=limit,
        log_samples=True,
    )
    names = [description["task"] for description in descriptions]
    return [[sample["filtered_resps"] for sample in done["samples"][name]] for name in names]


def alone(model, processor, text: str, pictures: list, max_new_tokens: int = 6) -> str:
    prompt = make_prompt(processor, text, len(pictures))
    inputs = processor(text=prompt, images=pictures or None, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


class TestGeneration:
    def test_pictures_first_several_in_the_text_and_none(self, asked, oracle, ours):
        def both(doc):
            return [doc["image"], doc["image"].rotate(90)]

        def placed(doc):
            return f"First: <image> {doc['text']} Second: <image>"

        found = evaluate(
            ours(batch_size=4),
            task(asked, "several", doc_to_visual=both),
            task(asked, "placed", doc_to_visual=both, doc_to_text=placed),
            task(asked, "misplaced", doc_to_visual="image", doc_to_text=lambda doc: f"<image><image>{doc['text']}"),
            task(asked, "none"),
        )
        docs = list(Dataset.load_from_disk(asked / "table" / "test").select(range(6)))
        assert found == [
            [[alone(*oracle, doc["text"], both(doc))] for doc in docs],
            [[alone(*oracle, placed(doc), both(doc))] for doc in docs],
            [[alone(*oracle, doc["text"], [doc["image"]])] for doc in docs],
            [[alone(*oracle, doc["text"], [])] for doc in docs],
        ]

    def test_each_task_has_its_own_length_and_stops(self, asked, oracle, ours):
        def describe(doc):
            return "Provide a one-sentence caption for the provided image."

        found = evaluate(
            ours(batch_size=4),
            task(asked, "long", doc_to_visual="image", doc_to_text=describe, generation_kwargs={"max_new_tokens": 20}),
            task(asked, "short", doc_to_visual="image", doc_to_text=describe, generation_kwargs={"max_new_tokens": 2}),
            task(
                asked,
                "stopped",
                doc_to_visual="image",
                doc_to_text=describe,
                generation_kwargs={"max_new_tokens": 20, "until": ["nowhere", " "]},
            ),
        )
        docs = list(Dataset.load_from_disk(asked / "table" / "test").select(range(6)))
        captions = [alone(*oracle, describe(doc), [doc["image"]], 20) for doc in docs]
        assert all(" " in caption for caption in captions)
        assert found == [
            [[caption] for caption in captions],
            [[alone(*oracle, describe(doc), [doc["image"]], 2)] for doc in docs],
            [[caption.split(" ")[0]] for caption in captions],
        ]

    @pytest.mark.parametrize("shared, pictures", [("true", 60), ("false", 120)])
    def test_a_picture_is_prefilled_once(self, asked, ours, shared, pictures):
        model = ours(f",shared_prefix={shared}", batch_size=8)
        seen = []
        model.model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs.get("pixel_values", args[0] if args else None))),
            with_kwargs=True,
        )
        evaluate(model, task(asked, "shapes", doc_to_visual="image"), limit=120)
        assert sum(seen) == pictures

    def test_repeats_are_sampled_apart_and_again_the_same(self, asked, ours):
        sampled = {"max_new_tokens": 8, "temperature": 3.0, "do_sample": True}
        hot = task(asked, "hot", doc_to_visual="image", generation_kwargs=sampled, repeats=4)
        hot["filter_list"] = [{"name": "all", "filter": [{"function": "take_first_k", "k": 4}]}]
        once, again = (evaluate(ours(batch_size=1), hot, limit=2) for _ in range(2))
        assert once == again
        assert all(len(set(answers)) > 1 for (answers,) in once[0])

    def test_rounds(self, asked, oracle, ours):
        def ask(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
            if round_idx is None:
                return doc["text"]
            is_last = round_idx == 2 or doc["question_id"] == 0
            return [doc["image"].rotate(90)], f"{previous_output[-1]}?", is_last, previous_output, None

        def score(doc, results):
            return {"rounds": len(results[0])}

        metric = {"metric": "rounds", "aggregation": "mean", "higher_is_better": True}
        (found,) = evaluate(
            ours(batch_size=4),
            task(
                asked,
                "rounds",
                output_type="generate_until_multi_round",
                generation_kwargs={"max_new_tokens": 6},
                doc_to_visual="image",
                doc_to_text=ask,
                process_results=score,
                metric_list=[metric],
            ),
        )
        model_answers = []
        for doc in Dataset.load_from_disk(asked / "table" / "test").select(range(6)):
            answers = [alone(*oracle, doc["text"], [doc["image"]])]
            if doc["question_id"] != 0:
                answers.append(alone(*oracle, f"{answers[0]}?", [doc["image"].rotate(90)]))
            model_answers.append([answers])
        assert found == model_answers


class TestLikelihood:
    CHOICES = ["red", "a dark green circle", "3"]

    def test_is_the_loss_of_each_choice(self, asked, oracle, ours):
        metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        settings = {"output_type": "multiple_choice", "doc_to_choice": self.CHOICES, "doc_to_target": 0}
        found = evaluate(
            ours(batch_size=4),
            task(asked, "choices", doc_to_visual="image", metric_list=[metric], **settings),
            task(asked, "text choices", metric_list=[metric], **settings),
        )
        docs = list(Dataset.load_from_disk(asked / "table" / "test").select(range(6)))
        for results, with_picture in zip(found, (True, False)):
            for doc, result in zip(docs, results):
                wanted = [self.loss(*oracle, doc, f" {choice}", with_picture) for choice in self.CHOICES]
                assert [loss for loss, _ in result] == pytest.approx([loss for loss, _ in wanted], rel=1e-4)
                assert [greedy for _, greedy in result] == [greedy for _, greedy in wanted]

    def test_a_greedy_answer_is_known_as_one(self, asked, oracle, ours):
        def answer(doc):
            return f" {alone(*oracle, doc['text'], [doc['image']])}"

        def score(doc, results):
            return {"acc": results[0][1]}

        metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        settings = {"output_type": "loglikelihood", "process_results": score, "metric_list": [metric]}
        likely = task(asked, "likely", doc_to_visual="image", doc_to_target=answer, **settings)
        (found,) = evaluate(ours(batch_size=4), likely)
        assert [greedy for ((_, greedy),) in found] == [True] * 6

    @staticmethod
    def loss(model, processor, doc, continuation: str, with_picture: bool) -> tuple[float, bool]:
        pictures = [doc["image"]] if with_picture else []
        prompt = make_prompt(processor, doc["text"], len(pictures))
        begun = processor(text=prompt, images=pictures or None, return_tensors="pt")["input_ids"].shape[1]
        inputs = processor(text=prompt + continuation, images=pictures or None, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :begun] = -100
        with torch.no_grad():
            output = model(**inputs, labels=labels)
        greedy = output.logits[0, begun - 1 : -1].argmax(dim=-1)
        return output.loss.item(), bool((greedy == labels[0, begun:]).all())


class TestArguments:
    @pytest.mark.parametrize(
        "arguments, layers",
        [
            ("", [11, 0, 10, 5, 8, 4, 1]),
            (",replaced_layers=none", []),
            (",replaced_layers=3", [3]),
            (",replaced_layers=3,5,7", [3, 5, 7]),
            (",replaced_layers=3,5,7,shared_prefix=false", [3, 5, 7]),
        ],
    )
    def test_layers(self, ours, arguments, layers):
        assert ours(arguments).model.config.replaced_layers == layers

    @pytest.mark.parametrize(
        "arguments, options, words",
        [
            (",replaced_layers=few", {}, "layers must be .*'few'"),
            ("", {"batch_size": "auto"}, "--batch_size .*number.* 'auto'"),
            ("", {"batch_size": 0}, "--batch_size .*number.* 0"),
        ],
    )
    def test_bad_values(self, ours, arguments, options, words):
        with pytest.raises(ShortVError, match=words):
            ours(arguments, **options)

    def test_no_values(self):
        with pytest.raises(ShortVError, match="--model_args .*name=value.* 'somewhere'"):
            models.get_model("shortv_llava").create_from_arg_string("somewhere")

    @pytest.mark.parametrize(
        "settings, words",
        [
            ({"doc_to_visual": lambda doc: [{"array": [0.0], "sampling_rate": 1}]}, "but a task gives dict"),
            ({"doc_to_visual": lambda doc: ["nowhere.mp4"]}, "nowhere.mp4: no such image"),
            ({"doc_to_visual": "image", "generation_kwargs": {"num_beams": 3}}, "beam search is not supported"),
        ],
    )
    def test_what_it_cannot_do(self, asked, ours, settings, words):
        with pytest.raises(ShortVError, match=words):
            evaluate(ours(), task(asked, "impossible", **settings), limit=1)

    def test_pictures_in_files(self, asked, oracle, ours):
        def path(doc):
            return [str(SAMPLES / "images" / f"{doc['question_id']:03}.png")]

        (found,) = evaluate(ours(batch_size=4), task(asked, "files", doc_to_visual=path))
        docs = Dataset.load_from_disk(asked / "table" / "test").select(range(6))
        assert found == [[alone(*oracle, doc["text"], [Pillow.open(path(doc)[0])])] for doc in docs]


@pytest.fixture(scope="module")
def corrected(package_folder, tmp_path_factory):
    """As `package_folder`, with corrections."""
    folder, layers = tmp_path_factory.mktemp("corrected") / "shapes-corrected", list(map(int, LAYERS.split(",")))
    model = load_model(package_folder, dtype=torch.float32)
    inputs = make_inputs(load_processor(package_folder), embedded_samples()[:12])
    factors = fit_corrections(model, [FitSample(model, inputs)], 16)
    settings = {"correction_rank": 16, "corrected_layers": list(factors)}
    tensors = correction_tensors(factors, torch.float32)
    write_package(CHECKPOINT, folder, replaced_layers=layers, corrections=tensors, **settings)
    return folder


class TestTasks:
    """`shortv evaluate --lmms-tasks`."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        from shortv_llava.evaluation import lmms_tasks

        without = functools.partial(tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lmms_tasks, "TaskManager", without)
        lmms_tasks._task_manager.cache_clear()
        yield lmms_tasks
        lmms_tasks._task_manager.cache_clear()

    @staticmethod
    def evaluate(folder, asked, output, *options, names="shapes,ocr_counted"):
        quick = ("--dtype", "float32", "--batch-size", 8, "--include-path", asked / "task", "--output", output)
        return shortv_here("evaluate", folder, "--lmms-tasks", names, *quick, *options)

    @pytest.mark.slow
    def test_dense_shortv_and_corrected_in_one_table_and_the_card(
        self, corrected, asked, expected, tmp_path, quick, monkeypatch
    ):
        folder, output = shutil.copytree(corrected, tmp_path / "shapes-shortv"), tmp_path / "out"
        options = "--compare", "--card", folder
        done = self.evaluate(folder, asked, output, *options)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        found = json.loads((output / "results.json").read_text())
        assert (found["harness"], found["model"]) == ("lmms-eval 0.7.3", "shapes-shortv")
        shapes, counted = found["tasks"]
        assert [(task["name"], task["metric"], task["questions"]) for task in (shapes, counted)] == [
            ("shapes", "exact_match", 120),
            ("ocr_counted", "right", 120),
        ]
        assert [result["name"] for result in shapes["results"]] == ["dense", "shortv", "corrected"]
        given = {}
        for result in shapes["results"]:
            samples = json.loads((output / f"shapes-{result['name']}.json").read_text())["tasks"]["shapes"]["samples"]
            given[result["name"]] = [answer for sample in samples for answer in sample["answers"]]
            if result["name"] == "corrected":
                break
            wanted, answers = expected[result["name"]]
            assert result["scores"] == {"exact_match": pytest.approx(wanted["headline"] / 100)}
            for key in ("headline", "interval", "retention", "retention_interval"):
                assert result[key] == pytest.approx(wanted[key])
            assert given[result["name"]] == answers
        changed = [number for number in range(120) if given["corrected"][number] != given["shortv"][number]][:4]
        docs = list(Dataset.load_from_disk(asked / "table" / "test").select(changed))
        oracle = load_model(corrected, dtype=torch.float32), load_processor(corrected)
        assert docs and [given["corrected"][number] for number in changed] == [
            alone(*oracle, doc["text"], [doc["image"]]) for doc in docs
        ]
        dense, _, own = shapes["results"]
        for result, other in zip(shapes["results"], counted["results"]):
            right = round(result["headline"] / 100 * 120)
            assert (other["headline"], other["interval"]) == (3 * right, None)
            assert (output / result["name"] / "submissions" / "counted.txt").read_text() == str(3 * right)
            assert result["seconds"] > 0 and f"{result['headline']:.2f} [" in done.stdout
        assert "ocr_counted: no interval" in done.stdout and "text in pictures" not in done.stdout

        scores = {score.data: score for score in read_scores(folder)}
        assert (scores["shapes"].score, scores["shapes"].base_score) == (own["headline"], dense["headline"])
        assert (scores["shapes"].metric, scores["shapes"].note) == ("exact_match", "lmms-eval 0.7.3")
        card = read_card(folder / "README.md")
        low, high = own["interval"]
        row = f"| shapes (lmms-eval 0.7.3) | 120 | exact match | {own['headline']:.2f} [{low:.2f}, {high:.2f}] |"
        assert row in card.text and "text in pictures" not in card.text
        values = {result.dataset_name: result.metric_value for result in card.data.eval_results}
        assert values == {name: round(score.score, 2) for name, score in scores.items()}
        print(card.text[card.text.index("## Evaluation") : card.text.index("<!-- /shortv:evaluation")])

        monkeypatch.setattr(quick, "simple_evaluate", None)  # what is finished is not asked again
        assert self.evaluate(folder, asked, output, *options).stdout == done.stdout
        other = self.evaluate(folder, asked, output, "--compare", "--seed", "7")
        assert other.returncode == 1 and re.search("shapes-dense.json: .*seed 0, not 7", other.stderr)

    def test_a_card_without_text_is_told(self, package_folder, asked, tmp_path):
        folder = shutil.copytree(package_folder, tmp_path / "package")
        done = self.evaluate(folder, asked, tmp_path / "out", "--card", folder, names="shapes")
        assert done.returncode == 0, done.stderr
        for told in (done.stdout, read_card(folder / "README.md").text):
            assert "text in pictures" in told and "arxiv.org/abs/2606.08511" in told
        ((result,),) = [task["results"] for task in json.loads((tmp_path / "out/results.json").read_text())["tasks"]]
        assert result["name"] == "shortv" and result["retention"] is None and "% of dense" not in done.stdout

    def test_a_limit(self, package_folder, asked, tmp_path):
        done = self.evaluate(package_folder, asked, tmp_path / "out", "--limit", 3)
        assert done.returncode == 0, done.stderr
        assert "shapes exact_match, 3 samples" in done.stdout

    def test_groups_and_several_filters(self, package_folder, asked, tmp_path):
        folder = shutil.copytree(asked / "task", tmp_path / "task")
        filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("one", "other")]
        (folder / "twice.yaml").write_text(json.dumps(task(asked, "twice", doc_to_visual="image", filter_list=filters)))
        mean = {"metric": "exact_match", "aggregation": "mean", "weight_by_size": True, "filter_list": ["none"]}
        group = {"group": "both", "task": ["shapes", "twice"], "aggregate_metric_list": [mean]}
        (folder / "both.yaml").write_text(json.dumps(group))
        (tmp_path / "asked").mkdir()
        os.rename(folder, tmp_path / "asked" / "task")
        done = self.evaluate(package_folder, tmp_path / "asked", tmp_path / "out", "--limit", 8, names="both")
        assert done.returncode == 0, done.stderr
        found = {task["name"]: task for task in json.loads((tmp_path / "out/results.json").read_text())["tasks"]}
        assert {name: task["questions"] for name, task in found.items()} == {"both": 16, "shapes": 8, "twice": 8}
        ((both,), (shapes,), (twice,)) = (found[name]["results"] for name in ("both", "shapes", "twice"))
        assert both["scores"]["exact_match"] == pytest.approx(shapes["scores"]["exact_match"])
        assert both["seconds"] == pytest.approx(shapes["seconds"] + twice["seconds"])
        assert shapes["interval"] and twice["interval"] is None and twice["headline"] == twice["scores"]["exact_match"]

    def test_tasks_that_are_not_there(self, package_folder, asked, tmp_path, quick, monkeypatch):
        done = self.evaluate(package_folder, asked, tmp_path / "out", names="shape")
        assert done.returncode == 1 and re.search("no task 'shape'.* shapes", done.stderr)
        monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
        missing = task(tmp_path / "nowhere", "missing")
        (tmp_path / "task").mkdir()
        (tmp_path / "task" / "missing.yaml").write_text(json.dumps(missing))
        done = self.evaluate(package_folder, tmp_path, tmp_path / "out", names="missing")
        assert done.returncode == 1 and "missing: lmms-eval cannot load" in done.stderr
        (tmp_path / "task" / "utils.py").write_text("import a_library_that_nobody_has")
        needy = json.dumps(task(asked, "needy", process_results="!function utils.process"))
        (tmp_path / "task" / "needy.yaml").write_text(
            needy.replace('"!function utils.process"', "!function utils.process")
        )
        quick._task_manager.cache_clear()
        done = self.evaluate(package_folder, tmp_path, tmp_path / "out", names="missing,needy")
        assert done.returncode == 1 and re.search("needy: .*'a_library_that_nobody_has'.*install", done.stderr)
