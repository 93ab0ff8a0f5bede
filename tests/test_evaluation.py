"""`shortv evaluate`: the same answers with and without shared prefixes, in one process or two, in one go or several."""

import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import official
import pytest
import tiny
import torch
from command import shortv_here
from PIL import Image
from rich.console import Console

from shortv_llava.chat.prompts import CHAT_SYSTEM, TUNING_SYSTEM
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation import answering, report
from shortv_llava.evaluation import command as evaluate_command
from shortv_llava.evaluation import options as evaluate_options
from shortv_llava.evaluation.answering import Answerer
from shortv_llava.evaluation.answers import AnswersFile
from shortv_llava.evaluation.dropping import dropped
from shortv_llava.evaluation.methods import parse_methods
from shortv_llava.evaluation.options import EvaluationOptions
from shortv_llava.evaluation.questions import Question, read_questions
from shortv_llava.evaluation.run import choose_variants, evaluate
from shortv_llava.evaluation.tasks import TASKS
from shortv_llava.examples.shapes_llava import CHECKPOINT, shapes
from shortv_llava.hub.metadata import read_card
from shortv_llava.hub.scores import read_scores

LAYERS = [11, 0, 10, 5, 8, 4, 1]
QUESTIONS = (9, 1, 4, 3)  # about each picture


@pytest.fixture(scope="module")
def embedded():
    model = load_model(CHECKPOINT, dtype=torch.float32)
    model.set_replaced_layers(LAYERS)
    return model, load_processor(CHECKPOINT)


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    """Questions about a few pictures, those about the same one not together."""
    found = []
    for number, count in enumerate(QUESTIONS):
        rng = random.Random(f"evaluation/{number}")
        scene = shapes.make_scene(rng)
        for turn, question in enumerate(shapes.ask_several(scene, count, rng)):
            image = shapes.draw(scene)
            found.append((turn, Question(f"{number}/{turn}", question.text, (image,), str(number), question.answer)))
    return [question for _, question in sorted(found, key=lambda pair: pair[0])]


@pytest.fixture
def files(asked, tmp_path) -> list[str]:
    """The same as files, as options of the command."""
    (tmp_path / "images").mkdir()
    lines = []
    for question in asked:
        name = f"{question.image_id}.png"
        question.images[0].save(tmp_path / "images" / name)
        entry = {"question_id": question.id, "image": name, "text": question.text, "answer": question.reference}
        lines.append(json.dumps(entry))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return ["--questions", str(tmp_path / "questions.jsonl"), "--images", str(tmp_path / "images")]


def answers(answerer: Answerer, questions: list[Question]) -> dict:
    found = {}
    for batch in answerer.batches(questions):
        found |= dict(zip([question.id for question in batch], answerer.answer(batch).answers))
    return found


def alone(model, processor, question: Question, max_new_tokens: int) -> str:
    """The answer from nothing but transformers."""
    content = [{"type": "image"}] * len(question.images) + [{"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=list(question.images) or None, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


class TestAnswerer:
    @pytest.mark.parametrize("shared_prefix", [True, False])
    @pytest.mark.parametrize("batch_size", [1, 4, 64])  # smaller and larger than groups
    def test_answers_are_those_of_each_question_alone(self, embedded, asked, batch_size, shared_prefix):
        found = answers(Answerer(*embedded, batch_size, 6, shared_prefix), asked)
        assert found == {question.id: alone(*embedded, question, 6) for question in asked}

    def test_pictures_of_different_numbers_of_tokens(self, asked):
        model, processor = tiny.next_model()
        model.set_replaced_layers([1, 3])
        sizes = [(28, 56), (50, 20), (40, 45), (30, 30)]
        resized = [q._replace(images=(q.images[0].resize(sizes[int(q.image_id)]),)) for q in asked]
        found = answers(Answerer(model, processor, 17, 6), resized)
        assert found == {question.id: alone(model, processor, question, 6) for question in resized}

    def test_none_and_several_pictures_among_others(self, embedded, asked):
        picture = asked[0].images[0]
        mixed = [
            Question("none", "Is there a red circle?"),
            *asked[:5],
            asked[0]._replace(id="two", images=(picture,) * 2),
        ]
        found = answers(Answerer(*embedded, 8, 6), mixed)
        assert found == {question.id: alone(*embedded, question, 6) for question in mixed}

    def test_each_picture_is_prefilled_once(self, embedded, asked):
        model = embedded[0]
        rows = []  # that go through the first layer's keys, whatever is frozen
        projection = model.model.language_model.layers[2].self_attn.q_proj  # of a layer that is not replaced
        handle = projection.register_forward_hook(lambda module, args, output: rows.append(output.shape[:2].numel()))
        answerer = Answerer(*embedded, 64, 1)
        (batch,) = answerer.batches(asked)
        answered = answerer.answer(batch)
        handle.remove()
        assert answered.prefilled.visual == len(QUESTIONS) * 64
        assert answered.prompted.visual == len(asked) * 64
        assert sum(answered.prefilled) <= sum(rows) < 1.3 * sum(answered.prefilled)  # the rest is padding
        apart = Answerer(*embedded, 64, 1, shared_prefix=False).answer(batch)
        assert apart.prefilled == apart.prompted == answered.prompted

    def test_batches_hold_rows_or_one_picture(self, embedded, asked):
        batches = Answerer(*embedded, 4).batches(asked)
        assert sorted(question.id for batch in batches for question in batch) == sorted(q.id for q in asked)
        assert all(len(batch) <= 4 or len({question.image_id for question in batch}) == 1 for batch in batches)

    def test_a_template_that_puts_pictures_last_shares_nothing(self, embedded, asked, monkeypatch):
        model, processor = embedded
        template = "USER: {{ messages[0]['content'][-1]['text'] }} <image> ASSISTANT:"
        monkeypatch.setattr(processor, "chat_template", template)
        answerer = Answerer(model, processor, 64, 2)
        (batch,) = answerer.batches(asked)
        answered = answerer.answer(batch)
        assert answered.prefilled == answered.prompted

    def test_sampling_is_repeatable(self, embedded, asked):
        settings = {"max_new_tokens": 8, "temperature": 3.0}
        once, again, other = (answers(Answerer(*embedded, **settings, seed=seed), asked) for seed in (1, 1, 2))
        assert once == again != other


class TestRun:
    def test_interrupted_it_continues_to_the_same_bytes(self, embedded, asked, tmp_path):
        answerer = Answerer(*embedded, 4, 6)
        variants = choose_variants(embedded[0].config, compare=True)
        evaluate(answerer, asked, variants, tmp_path / "whole", "model")

        class Interrupted(Answerer):
            left = 3

            def answer(self, batch):
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
                return super().answer(batch)

        cut = tmp_path / "cut"
        with pytest.raises(KeyboardInterrupt):
            evaluate(Interrupted(*embedded, 4, 6), asked, variants, cut, "model")
        before = (cut / "answers-dense.jsonl").read_bytes()
        assert 0 < before.count(b"\n") < len(asked)
        with open(cut / "answers-dense.jsonl", "a") as file:
            file.write('{"question_id": "3/1", "prom')  # as a kill in the middle of writing leaves it
        evaluate(answerer, asked, variants, cut, "model")
        for name in ("answers-dense.jsonl", "answers-shortv.jsonl"):
            assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            ids = [json.loads(line)["question_id"] for line in (cut / name).read_text().splitlines()]
            assert ids == [question.id for question in asked]

    def test_answers_of_other_files_are_refused(self, embedded, asked, tmp_path, capsys):
        answerer, variants = Answerer(*embedded, 4, 6), choose_variants(embedded[0].config)
        for _ in range(2):
            evaluate(answerer, asked[:2], variants, tmp_path, "model", digest="sha256:1")
        assert capsys.readouterr().out.count("all answers are there already") == 1
        with pytest.raises(ShortVError, match="answer with weights_and_processor 'sha256:1', not 'sha256:2'"):
            evaluate(answerer, asked[:2], variants, tmp_path, "model", digest="sha256:2")

    @pytest.mark.parametrize("shared", [True, False])
    def test_a_prompt_longer_than_the_context_is_refused(self, embedded, asked, shared):
        long = asked[0]._replace(text="circle " * embedded[0].config.text_config.max_position_embeddings)
        with pytest.raises(ShortVError, match=f"question {long.id!r}: its prompt has .* context ends at"):
            Answerer(*embedded, 4, 6, shared_prefix=shared).answer([asked[0]._replace(id="other"), long])

    def test_what_was_measured_stays(self, embedded, asked, tmp_path):
        answerer, variants = Answerer(*embedded, 4, 6), choose_variants(embedded[0].config, compare=True)
        first, again = (evaluate(answerer, asked, variants, tmp_path, "model") for _ in range(2))
        for one, other in zip(first, again):
            assert one.seconds == pytest.approx(other.seconds) and one.seconds > 0
            assert (one.prompted, one.prefilled) == (other.prompted, other.prefilled)
        assert first[1].speed_up == pytest.approx(again[1].speed_up)

    def test_lines_are_llavas(self, embedded, asked, tmp_path):
        evaluate(Answerer(*embedded, 4, 6), asked[:3], choose_variants(embedded[0].config), tmp_path, "model")
        for line in (tmp_path / "answers.jsonl").read_text().splitlines():
            entry = json.loads(line)
            assert list(entry) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
            assert entry["model_id"] == "model" and entry["metadata"]["replaced_layers"] == LAYERS

    def test_compares_with_the_dense_model(self, embedded, asked, tmp_path):
        model, processor = embedded
        answerer = Answerer(model, processor, 4, 6)
        dense, ours = evaluate(answerer, asked, choose_variants(model.config, True), tmp_path, "model", "gqa")
        assert (dense.name, ours.name) == ("dense", "shortv") and dense.flops_ratio == 1 > ours.flops_ratio
        model.set_replaced_layers([])
        right = [alone(model, processor, question, 6) == question.reference for question in asked]
        model.set_replaced_layers(LAYERS)
        assert dense.headline == pytest.approx(100 * sum(right) / len(right))
        assert dense.retention == dense.agreement == 100 and dense.speed_up == 1
        assert ours.retention == pytest.approx(100 * ours.headline / dense.headline)
        assert ours.retention_interval[0] <= ours.retention <= ours.retention_interval[1]
        same = [dense.answers[question.id] == ours.answers[question.id] for question in asked]
        assert ours.agreement == pytest.approx(100 * sum(same) / len(same))

    def test_methods_beside_one_another(self, embedded, asked, tmp_path):
        model, processor = embedded
        variants = choose_variants(model.config, methods=parse_methods("fastv:3:0.5,shortv+vtw:6"))
        answerer = Answerer(model, processor, 4, 3, shared_prefix=False)
        results = evaluate(answerer, asked[:3], variants, tmp_path, "model", "gqa")
        assert [result.name for result in results] == ["dense", "fastv-3-0.5", "shortv+vtw-6"]
        for result, variant in zip(results, variants):
            with variant.applied(model, dropped):
                found = {question.id: alone(model, processor, question, 3) for question in asked[:3]}
            assert result.answers == found
        assert results[0].kl == 0 < min(result.kl for result in results[1:])
        ratios = [result.flops_ratio for result in results]
        assert ratios[2] < ratios[1] < ratios[0] == 1
        assert all(result.prefill_seconds > 0 for result in results)
        assert [result.speed_up is None for result in results] == [False, True, True]
        line = json.loads((tmp_path / "answers-shortv+vtw-6.jsonl").read_text().splitlines()[0])
        assert line["metadata"]["dropping"] == {"layer": 6, "share": 1.0}
        assert line["metadata"]["replaced_layers"] == LAYERS
        printed = io.StringIO()
        Console(file=printed, width=80).print(report.table(results))
        assert all(name in printed.getvalue() for name in ("KL", "prefill", "fastv-3-0.5"))

    def test_divergence_is_that_of_the_prompts_ends(self, embedded, asked, tmp_path):
        model, processor = embedded
        variants = choose_variants(model.config, compare=True)
        _, ours = evaluate(Answerer(model, processor, 64, 1), asked[:6], variants, tmp_path, "model")
        expected = []
        for question in asked[:6]:
            inputs, logits = Answerer(model, processor).inputs([question]), []
            for variant in variants:
                with variant.applied(model), torch.no_grad():
                    logits.append(model(**inputs).logits[0, -1].double().log_softmax(-1))
            expected.append((logits[1].exp() * (logits[1] - logits[0])).sum().item())
        assert ours.kl == pytest.approx(sum(expected) / 6, rel=1e-3)

    def test_what_does_not_fit_is_told_before_weights_are_read(self, package_folder, tmp_path, monkeypatch):
        monkeypatch.setattr("shortv_llava.checkpoint.loading.load_model", None)
        samples = CHECKPOINT.parent / "samples"
        asked = ("--questions", samples / "questions.jsonl", "--images", samples / "images", "--metric", "gqa")
        for options, words in (
            (("--sweep", "4,99"), "--sweep 99: the model has 12 layers"),
            (("--method", "shortv,vtw:99"), "K is at most"),
            (("--card", package_folder, "--replaced-layers", "1"), "its layers are not those to be evaluated"),
            (("--replaced-layers", "1,99"), "99 is no layer id"),
        ):
            done = shortv_here("evaluate", package_folder, *asked, *options, "--output", tmp_path / "out")
            assert done.returncode == 1 and words in done.stderr.splitlines()[-1], done.stderr

    def test_sweep_goes_along_the_order_of_replacement(self, embedded):
        config = embedded[0].config
        names = [
            (variant.name, variant.frozen["replaced_layers"]) for variant in choose_variants(config, sweep=[0, 2, 7])
        ]
        assert names == [("dense", []), ("2-layers", LAYERS[:2]), ("7-layers", LAYERS)]
        with pytest.raises(ShortVError, match="order of replacement for 7 layers alone"):
            choose_variants(config, sweep=[8])
        config.lc_scores = [float(layer) for layer in range(12)]
        try:
            assert choose_variants(config, sweep=[9])[1].frozen["replaced_layers"] == [*LAYERS, 2, 3]
        finally:
            config.lc_scores = None

    def test_a_dense_model_has_nothing_to_compare(self, embedded):
        model, _ = embedded
        model.set_replaced_layers([])
        with pytest.raises(ShortVError, match="replaces no layers"):
            choose_variants(model.config, compare=True)
        assert [variant.name for variant in choose_variants(model.config)] == ["dense"]
        with pytest.raises(ShortVError, match="--method shortv: .*no layers"):
            choose_variants(model.config, methods=parse_methods("shortv+vtw:3"))
        assert [variant.name for variant in choose_variants(model.config, methods=parse_methods("vtw:3"))] == ["vtw-3"]
        model.set_replaced_layers(LAYERS)


class TestAnswersFile:
    @pytest.fixture
    def path(self, asked, tmp_path) -> Path:
        file = AnswersFile(tmp_path / "answers.jsonl", "model", {"replaced_layers": [1]}, asked)
        file.add(asked[:2], ["yes", "no"])
        return file.path

    def test_is_read_back(self, path, asked):
        file = AnswersFile(path, "model", {"replaced_layers": [1]}, asked)
        assert file.answers == {asked[0].id: "yes", asked[1].id: "no"}
        file.add(asked[:3], ["other", "other", ""])
        assert file.answers == {asked[0].id: "yes", asked[1].id: "no", asked[2].id: ""}
        assert AnswersFile(path, "model", {"replaced_layers": [1]}, asked).answers == file.answers

    @pytest.mark.parametrize(
        "model_id, metadata, number, words",
        [
            ("other", {"replaced_layers": [1]}, None, "model_id 'model', not 'other'"),
            ("model", {"replaced_layers": [2]}, None, r"replaced_layers \[1\], not \[2\]"),
            ("model", {"replaced_layers": [1], "seed": 1}, None, "seed None, not 1"),
            ("model", {"replaced_layers": [1]}, 1, "line 2: no answer to one of these questions"),
        ],
    )
    def test_of_something_else_is_refused(self, path, asked, model_id, metadata, number, words):
        with pytest.raises(ShortVError, match=words):
            AnswersFile(path, model_id, metadata, asked[:number])

    def test_two_answers_to_one_question(self, path, asked):
        path.write_text(path.read_text() * 2)
        with pytest.raises(ShortVError, match="line 3: a second answer"):
            AnswersFile(path, "model", {"replaced_layers": [1]}, asked)


class TestQuestionFiles:
    @pytest.mark.parametrize(
        "entry, words",
        [
            ({"image": 3, "text": "What?"}, "'image' must be the name of a file, not 3"),
            ({"image": "0.png", "text": "<image>"}, "needs a text 'text'"),
            ({"image": "x" * 5000, "text": "What?"}, "line 2: image 'x+' is no usable name .*; correct it"),
            ({"image": "loop.png", "text": "What?"}, "line 2: image 'loop.png' is no usable name .*; correct it"),
            ({"image": "0.png", "text": "What?", "answer": {}}, "line 2: 'answer' must be a text or several"),
            ({"image": "0.png", "text": "\ud800"}, r"line 2: holds \\ud800, half a character"),
            ({"image": "0.png"}, "needs a text 'text'"),
            ({"question_id": 1, "image": "0.png", "text": "What?"}, "line 2: question_id 1 was used in line 1"),
            ({"question_id": "1", "image": "0.png", "text": "What?"}, "question_id '1' was used in line 1"),
            ({"question_id": [1], "image": "0.png", "text": "What?"}, "must be a number or a text"),
            ({"image": "1.png", "text": "What?"}, "there is no image"),
            ({"image": "../questions.jsonl", "text": "What?"}, "lies outside"),
            ([], "must be a JSON object"),
        ],
    )
    def test_bad_lines(self, tmp_path, entry, words):
        (tmp_path / "images").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / "images" / "0.png")
        (tmp_path / "images" / "loop.png").symlink_to("loop.png")
        good = {"question_id": 1, "image": "0.png", "text": "<image>\nWhat?", "answer": "it"}
        path = tmp_path / "questions.jsonl"
        path.write_text(json.dumps(good) + "\n")
        assert read_questions(path, tmp_path / "images")[0][:2] == (1, "What?")
        path.write_text(json.dumps(good) + "\n" + json.dumps(entry) + "\n")
        with pytest.raises(ShortVError, match=words):
            read_questions(path, tmp_path / "images")

    def test_questions_about_no_picture(self, embedded, tmp_path):
        path = tmp_path / "questions.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"text": "What is a star?", "answer": 5}\r\n')
        [question] = read_questions(path, None)
        assert question == Question(1, "What is a star?", reference="5")
        assert len(Answerer(*embedded, max_new_tokens=2).answer([question]).answers) == 1
        path.write_text('{"image": "0.png", "text": "What?"}')
        with pytest.raises(ShortVError, match="line 1: .*'0.png'.* --images"):
            read_questions(path, None)


def command(folder, *options, launch=(sys.executable, "-m", "shortv_llava.cli", "evaluate")) -> list[str]:
    quick = ("--max-new-tokens", "6", "--batch-size", "4", "--dtype", "float32")
    return [*launch, str(folder), *quick, *map(str, options)]


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True)


@pytest.mark.slow
class TestCommand:
    def test_compare_and_card(self, package_folder, files, tmp_path):
        card = tmp_path / "package"
        card.mkdir()
        for path in package_folder.iterdir():
            os.link(path, card / path.name)
        done = run(card, *files, "--metric", "gqa", "--compare", "--card", card, "--output", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "out" / "results.json").read_text())
        dense, ours = found["results"]
        assert found["questions"] == 17 and ours["frozen"]["replaced_layers"] == LAYERS
        assert f"{ours['retention']:.1f} [" in done.stdout and f"{dense['headline']:.2f}" in done.stdout
        (score,) = read_scores(card)
        assert (score.data, score.metric, score.questions, score.dataset) == ("questions", "accuracy", 17, None)
        assert (score.score, score.base_score) == (ours["headline"], dense["headline"])
        (result,) = read_card(card / "README.md").data.eval_results
        assert result.metric_value == round(ours["headline"], 2)
        low, high = ours["interval"]
        assert (
            f"| questions | 17 | accuracy | {ours['headline']:.2f} [{low:.2f}, {high:.2f}] |"
            in read_card(card / "README.md").text
        )

    def test_killed_and_in_two_processes_it_ends_the_same(self, package_folder, files, tmp_path):
        whole, cut, two = tmp_path / "whole", tmp_path / "cut", tmp_path / "two"
        assert run(package_folder, *files, "--output", whole).returncode == 0
        process = subprocess.Popen(command(package_folder, *files, "--output", cut), stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if (cut / "answers.jsonl").exists():
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        assert process.returncode == -signal.SIGKILL
        assert run(package_folder, *files, "--output", cut).returncode == 0
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
        launch += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "-m",
            "shortv_llava.evaluation",
        ]
        done = run(package_folder, *files, "--output", two, launch=launch)
        assert done.returncode == 0, done.stderr
        assert {(folder / "answers.jsonl").read_bytes() for folder in (whole, cut, two)} == {
            (whole / "answers.jsonl").read_bytes()
        }

    def test_sweep(self, package_folder, files, tmp_path):
        done = run(package_folder, *files, "--metric", "gqa", "--sweep", "3,7", "--output", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [result["name"] for result in found["results"]] == ["dense", "3-layers", "7-layers"]
        assert Image.open(tmp_path / "out" / "sweep.png").size[0] > 500


class TestTasks:
    """The command in this process, on four made-up questions."""

    @pytest.fixture
    def evaluated(self, tmp_path, monkeypatch):
        def evaluated(name: str, hub: bool = False) -> tuple[dict, dict]:
            """What the answerer was given, and results.json."""
            monkeypatch.setattr(official, "CHOSEN", official.CHOSEN[:1])
            monkeypatch.setattr(official, "COUNT", 4)
            questions, _ = official.make(name, tmp_path / "eval")
            monkeypatch.setitem(TASKS, name, TASKS[name]._replace(load=lambda folder: questions))
            given = {}

            def answerer(model, processor, **settings):
                given.update(settings)
                return Answerer(model, processor, **settings)

            monkeypatch.setattr(answering, "Answerer", answerer)
            asked = {"task": name, "data": None if hub else tmp_path / "eval", "max_new_tokens": 2}
            loading = {"dtype": "float32", "device_map": "cpu", "replaced_layers": "3"}
            evaluate_command.run(EvaluationOptions(str(CHECKPOINT), tmp_path / "out", **asked, **loading))
            return given, json.loads((tmp_path / "out" / "results.json").read_text())

        return evaluated

    def test_q_bench_has_a_system_sentence_and_pictures_of_its_own(self, evaluated):
        given, found = evaluated("q_bench")
        assert given["vicuna_system"] == CHAT_SYSTEM and found["settings"]["image_aspect_ratio"] == "base"

    def test_scienceqa_is_compared_by_questions_with_pictures(self, evaluated, tmp_path, capsys):
        given, found = evaluated("scienceqa")
        assert given["vicuna_system"] == TUNING_SYSTEM and found["settings"]["image_aspect_ratio"] == "pad"
        (result,) = found["results"]
        assert found["score"] == "image/accuracy" and result["headline"] == result["scores"]["image/accuracy"]
        assert "score: image/accuracy" in capsys.readouterr().out and found["note"] is None
        prompts = [json.loads(line)["prompt"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
        assert [prompt.startswith("<image>\n") for prompt in prompts] == [True, True, False, False]

    def test_tables_that_are_not_llavas_are_told(self, evaluated, capsys):
        _, found = evaluated("seed_bench", hub=True)
        assert "frames" in found["note"] and f"not LLaVA's own data: {found['note']}" in capsys.readouterr().out

    def test_what_is_scored_elsewhere_is_named(self, evaluated, tmp_path, capsys):
        evaluated("mm_vet")
        assert f"to be scored elsewhere: {tmp_path / 'out' / 'mm_vet.json'}" in capsys.readouterr().out


@pytest.mark.parametrize("method, shared", [("shortv", True), ("shortv,fastv:2:0.5", False)])
def test_a_method_that_drops_shares_no_prefix(package_folder, files, tmp_path, monkeypatch, method, shared):
    class Stopped(Exception):
        pass

    def answerer(*args, shared_prefix, **settings):
        assert shared_prefix is shared
        raise Stopped

    monkeypatch.setattr(answering, "Answerer", answerer)
    asked = {"questions": Path(files[1]), "images": Path(files[3]), "method": method}
    with pytest.raises(Stopped):
        evaluate_command.run(EvaluationOptions(str(package_folder), tmp_path / "out", **asked))


def test_a_card_tells_no_score_of_other_layers(package_folder, files, tmp_path):
    asked = {"questions": Path(files[1]), "images": Path(files[3]), "metric": "gqa"}
    options = EvaluationOptions(
        str(package_folder), tmp_path / "out", **asked, card=package_folder, replaced_layers="3"
    )
    with pytest.raises(ShortVError, match="layers are not those"):
        evaluate_command.run(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"task": "nothing"}, "there is no task 'nothing'; there are gqa"),
        ({}, "give one of --task NAME, --lmms-tasks NAMES, or --questions"),
        ({"task": "gqa", "metric": "gqa"}, "--metric goes with --questions"),
        ({"questions": Path("q.jsonl")}, "q.jsonl: no such file"),
        ({"questions": Path(__file__), "images": Path("nowhere")}, "nowhere: no such folder"),
        ({"questions": Path(__file__), "metric": "none"}, "there is no metric 'none'"),
        ({"task": "gqa", "sweep": "-1"}, "--sweep takes numbers of layers"),
        ({"task": "gqa", "output": Path(__file__)}, "is a file; give a folder"),
        ({"task": "gqa", "compare": True, "sweep": "3"}, "--compare and --sweep: give one"),
        ({"task": "gqa", "method": "vtw:2", "sweep": "3"}, "--method and --sweep: give one"),
        ({"task": "gqa", "method": "vtw"}, "'vtw' is none of shortv, fastv:K:R"),
        ({"task": "gqa", "method": "vtw:2", "card": CHECKPOINT}, "leave out --sweep and --method"),
        ({"task": "gqa", "sweep": "few"}, "--sweep takes numbers of layers"),
        ({"task": "gqa", "card": Path("nowhere")}, "nowhere: no checkpoint"),
        ({"task": "vqav2", "card": CHECKPOINT}, "--card tells a score"),
        ({"task": "gqa", "data": Path("nowhere")}, "nowhere: no such folder"),
        ({"task": "gqa", "limit": 3}, "--limit goes with --lmms-tasks"),
        ({"task": "gqa", "include_path": Path("tests")}, "--include-path goes with --lmms-tasks"),
        ({"lmms_tasks": "pope", "task": "gqa"}, "give one of --task NAME, --lmms-tasks NAMES"),
        ({"lmms_tasks": "pope", "questions": Path(__file__)}, "give one of --task NAME, --lmms-tasks NAMES"),
        ({"lmms_tasks": "pope", "data": Path("tests")}, "--data goes with --task"),
        ({"lmms_tasks": "pope", "metric": "gqa"}, "--metric goes with --questions"),
        ({"lmms_tasks": "pope", "include_path": Path("nowhere")}, "nowhere: no such folder"),
        ({"lmms_tasks": "pope", "sweep": "3"}, "--lmms-tasks and --sweep: leave one out; it takes --compare"),
        ({"lmms_tasks": "pope", "method": "vtw:2"}, "--lmms-tasks and --method: leave one out"),
        ({"lmms_tasks": "pope", "max_new_tokens": 3}, "--lmms-tasks and --max-new-tokens: .*its tasks say how"),
        ({"lmms_tasks": "pope", "temperature": 0.5}, "--lmms-tasks and --temperature"),
        ({"lmms_tasks": "pope", "top_p": 0.5}, "--lmms-tasks and --top-p"),
        ({"lmms_tasks": "pope,,mme"}, "--lmms-tasks takes names of tasks, each once, not 'pope,,mme'"),
        ({"lmms_tasks": "pope, pope"}, "--lmms-tasks takes names of tasks, each once"),
        ({"lmms_tasks": "pope", "limit": 3, "card": CHECKPOINT}, "--card tells scores of whole tasks"),
    ],
)
def test_contradictions_come_before_any_work(tmp_path, options, words):
    with pytest.raises(ShortVError, match=words):
        EvaluationOptions(**{"model": "no/model", "output": tmp_path / "out"} | options).check()
    assert not (tmp_path / "out").exists()


def test_a_harness_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_options, "find_spec", lambda name: None)
    with pytest.raises(ShortVError, match="--lmms-tasks needs lmms-eval"):
        EvaluationOptions("no/model", tmp_path / "out", lmms_tasks="pope").check()
