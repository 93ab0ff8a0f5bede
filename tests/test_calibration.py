"""Calibration as a whole: data, choice, cost, journal, several processes."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from command import shortv_here
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from shortv_llava.calibrate import report
from shortv_llava.calibrate.cost import Cost, CostMeter
from shortv_llava.calibrate.journal import Journal
from shortv_llava.calibrate.samples import (
    check_sources,
    draw,
    embedded_samples,
    fit_samples,
    flickr30k_samples,
    gqa_samples,
    load_samples,
    source_names,
)
from shortv_llava.calibrate.selection import Choice, Units, bootstrap, number_of_layers
from shortv_llava.chat.prompts import make_prompt
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.package import CORRECTION_FILE
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.files.outputs import JOURNAL
from shortv_llava.flops import flops_ratio, lowest

SAMPLES = CHECKPOINT.parent / "samples"
QUICK = ("--correction-rank", "0", "--data", "shapes", "--samples", "6", "--held-out", "3", "--dtype", "float32")


def command(output, *options, launch=()) -> list[str]:
    launch = launch or (sys.executable, "-m", "shortv_llava.cli", "calibrate")
    return [*launch, str(CHECKPOINT), "--output", str(output), *QUICK, *map(str, options)]


def run(output, *options, launch=()) -> subprocess.CompletedProcess:
    return subprocess.run(command(output, *options, launch=launch), capture_output=True, text=True)


def read(output: Path) -> dict:
    return json.loads((output / "config.json").read_text())


@pytest.fixture(scope="module")
def model():
    return load_model(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor():
    return load_processor(CHECKPOINT)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("calibrated") / "package"
    options = ("--tokens", "visual,text", "--granularity", "auto")
    done = shortv_here("calibrate", CHECKPOINT, "--output", output, *QUICK, *options)
    assert done.returncode == 0, done.stderr
    return output


def test_what_a_calibration_writes(calibrated):
    config, details = read(calibrated), json.loads((calibrated / "calibration.json").read_text())
    assert len(config["lc_scores"]) == 12 and config["lc_scores"][11] == 0
    frozen = {key: config[key] for key in ("replaced_layers", "replaced_attention_layers", "replaced_ffn_layers")}
    assert details["frozen"] == frozen and any(frozen.values())
    kept = config["calibration"]
    assert len(kept["samples"]) == 6 and len(details["held_out"]) == 3
    assert not set(kept["samples"]) & set(details["held_out"])
    assert kept["direction"] == "release" and kept["granularity"] == details["granularity"]
    assert set(details["scores"]) == {"visual", "text"} and set(details["curves"]) == {"layer", "block"}
    assert details["curves"]["layer"][0]["cost"]["kl"] == 0
    assert details["curves"]["layer"][0]["flops_ratio"] == 1
    for name in ("lc_scores.png", "tradeoff.png"):
        with Image.open(calibrated / name) as picture:
            assert picture.width > 500
    assert str(calibrated.parent) not in (calibrated / "config.json").read_text()
    assert "lc_scores.png" in (calibrated / "README.md").read_text()
    assert not (calibrated / JOURNAL).exists()


def test_auto_takes_the_granularity_that_diverges_less_at_the_same_flops(calibrated):
    details = json.loads((calibrated / "calibration.json").read_text())
    layers = next(e for e in details["curves"]["layer"] if e["number"] == number_of_layers(12))
    blocks = next(e for e in details["curves"]["block"] if e["flops_ratio"] <= layers["flops_ratio"] + 1e-9)
    better = "block" if blocks["cost"]["kl"] < layers["cost"]["kl"] else "layer"
    assert details["granularity"] == better


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    whole = tmp_path / "whole"
    assert run(whole).returncode == 0
    cut = tmp_path / "cut"
    for lines in (2, 4, 6):  # the settings and the results so far
        process = subprocess.Popen(command(cut), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if (cut / JOURNAL).exists() and (cut / JOURNAL).read_bytes().count(b"\n") >= lines:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        assert process.returncode == -signal.SIGKILL
    with open(cut / JOURNAL, "a") as journal:
        journal.write('["layer LC shapes/3", [0.1, ')  # as a kill in the middle of writing leaves it
    differs = run(cut, "--direction", "paper")
    assert differs.returncode == 1 and "direction 'release', not 'paper'" in differs.stderr.splitlines()[-1]
    assert run(cut).returncode == 0
    assert (cut / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert (cut / "calibration.json").read_bytes() == (whole / "calibration.json").read_bytes()


def test_an_interrupted_run_with_other_files_is_not_continued(tmp_path, monkeypatch):
    """Neither with other weights nor with other questions, though all of them have the names they had."""
    base, questions, output = tmp_path / "base", tmp_path / "questions.jsonl", tmp_path / "package"
    shutil.copytree(CHECKPOINT, base)
    questions.write_text("".join((SAMPLES / "questions.jsonl").open().readlines()[:3]))
    options = ("--data", questions, "--images", SAMPLES / "images", "--samples", 2, "--held-out", 1)
    command = ("calibrate", base, *options, "--correction-rank", 0, "--output", output)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CostMeter, "measure", interrupted)
        assert shortv_here(*command).returncode != 0
    assert (output / JOURNAL).exists()
    for file, changed, word in (
        (questions, questions.read_bytes().replace(b"the", b"this"), "content_of_samples"),
        (base / "chat_template.jinja", b"{{ messages }}", "weights_and_processor"),
        (base / "model.safetensors", (base / "model.safetensors").read_bytes()[:-2] + b"??", "weights_and_processor"),
    ):
        before = file.read_bytes()
        assert changed != before
        file.write_bytes(changed)
        done = shortv_here(*command)
        assert done.returncode == 1 and f"with {word}" in done.stderr.splitlines()[-1], done.stderr
        file.write_bytes(before)
    assert shortv_here(*command).returncode == 0 and not (output / JOURNAL).exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--correction-rank", 500), "correction_rank must be an integer from 0 to 192, got 500"),
        (("--layers", ""), "got ''"),
    ],
)
def test_what_does_not_fit_the_model_is_told_before_it_is_loaded(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr("shortv_llava.checkpoint.loading.load_model", None)
    done = shortv_here("calibrate", CHECKPOINT, "--output", tmp_path / "package", *QUICK, *options)
    assert done.returncode == 1 and words in done.stderr and not list(tmp_path.iterdir())


def test_nothing_to_replace_is_said(tmp_path):
    done = shortv_here("calibrate", CHECKPOINT, "--output", tmp_path / "package", *QUICK, "--layers", "none")
    assert done.returncode == 0 and "package: no layer replaced" in done.stdout


FIT = ("--layers", "7,2,5", "--correction-rank", "8", "--correction-samples", "7")


def test_states_on_disk_give_the_same_fit(tmp_path, monkeypatch):
    for name, free in (("memory", 2**40), ("disk", 0)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert shortv_here("calibrate", CHECKPOINT, "--output", tmp_path / name, *QUICK, *FIT).returncode == 0
    memory, disk = (load_file(tmp_path / name / CORRECTION_FILE) for name in ("memory", "disk"))
    assert len(memory) == 9 and all(torch.equal(memory[name], disk[name]) for name in memory)
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "disk"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), FIT], ids=["scores", "corrections"])
def test_two_processes_find_what_one_does(tmp_path, options):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(one, *options).returncode == 0
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "shortv_llava.calibrate"]
    done = run(two, *options, launch=launch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    if options:
        found, expected = (load_file(folder / CORRECTION_FILE) for folder in (two, one))
        for layer in (2, 5, 7):
            maps = []
            for tensors in (found, expected):
                down, up = (
                    tensors[f"language_model.model.layers.{layer}.correction.{name}.weight"] for name in ("down", "up")
                )
                maps.append(up @ down)
            torch.testing.assert_close(*maps, atol=1e-5, rtol=1e-3)
        return
    np.testing.assert_allclose(read(two)["lc_scores"], read(one)["lc_scores"], rtol=0, atol=1e-9)
    assert read(two)["replaced_layers"] == read(one)["replaced_layers"]


class TestChoice:
    def test_numbers_as_published(self):
        assert (number_of_layers(32), number_of_layers(40)) == (19, 24)

    def test_orders_and_budgets(self, model):
        layers, blocks = Units(model.config, "layer"), Units(model.config, "block")
        scores = [0.5, 0.1, 0.4, 0.0, *[1.0] * 8]
        assert layers.order_by(scores)[:4] == [3, 1, 2, 0]
        order = layers.order_by(scores)
        assert layers.reaching(order, 1.0) == 0 and layers.reaching(order, 0.0) == 12
        number = layers.reaching(order, 0.75)
        assert layers.ratio(order[:number]) <= 0.75 < layers.ratio(order[: number - 1])
        assert blocks.saved(0) + blocks.saved(12) == layers.saved(0)
        assert blocks.frozen([0, 12, 3, 17]) == {
            "replaced_layers": [0],
            "replaced_attention_layers": [3],
            "replaced_ffn_layers": [5],
        }
        model.set_replaced_layers([0], [3], [5])
        assert blocks.ratio([0, 12, 3, 17]) == pytest.approx(flops_ratio(model.config))
        model.set_replaced_layers()

    def test_greedy_takes_what_adds_least_given_the_others(self, model):
        units = Units(model.config, "layer")

        def divergence(chosen):  # 3 is good alone and bad beside 0
            return sum(unit for unit in chosen) + (100 if {0, 3} <= set(chosen) else 0)

        assert units.order_greedily(divergence)[:3] == [0, 1, 2]
        assert units.order_greedily(divergence)[-1] == 3

    def test_bootstrap(self):
        generator = np.random.default_rng(0)
        scores = np.stack([generator.normal(mean, 0.1, 50) for mean in (0.0, 1.0, 1.01, 5.0)], axis=1)
        intervals, shares = bootstrap(scores, 2, [1, 1, 1, 1], seed=0)
        assert shares[0] == 1 and shares[3] == 0 and 0.05 < shares[1] < 0.95
        assert shares.sum() == pytest.approx(2)
        assert (intervals[:, 0] < scores.mean(0)).all() and (scores.mean(0) < intervals[:, 1]).all()

    def test_of_equal_scores_the_deeper_layer_goes_first(self):
        assert lowest([0.0, 1.0, 0.0], 2) == [2, 0]

    @pytest.mark.parametrize(
        "options, words",
        [
            ({"num_layers": 3, "fraction": 0.5}, "--num-layers and --fraction contradict"),
            ({"num_layers": 13}, "12 layers"),
            ({"fraction": 1.5}, "from 0 to 1"),
            ({"strategy": "best"}, "--strategy .*corrected-lc.* 'best'"),
            ({"granularity": "head"}, "layer, block, auto"),
            ({"strategy": "cosine", "granularity": "auto"}, "--granularity layer"),
        ],
    )
    def test_contradictions(self, options, words):
        with pytest.raises(ShortVError, match=words):
            dataclasses.replace(Choice(), **options).check(12)

    @pytest.mark.slow
    @pytest.mark.parametrize("strategy", ["greedy", "cosine", "random"])
    def test_other_strategies_end_in_a_package(self, tmp_path, strategy):
        output = tmp_path / "package"
        done = run(output, "--strategy", strategy, "--samples", "2", "--max-divergence", "0.05")
        assert done.returncode == 0, done.stderr
        details = json.loads((output / "calibration.json").read_text())
        assert sorted(details["order"]) == list(range(12))
        allowed = [e["number"] for e in details["curves"]["layer"] if e["cost"]["kl"] <= 0.05]
        assert len(read(output)["replaced_layers"]) == max(allowed)


class TestCost:
    @torch.no_grad()
    def test_equals_whole_passes(self, model, processor):
        samples = embedded_samples()[:3]
        meter = CostMeter(model, processor, samples)
        cost = meter.measure({"replaced_layers": [3, 9], "replaced_attention_layers": [], "replaced_ffn_layers": [1]})
        kls, agreed = [], []
        for sample in samples:
            prompt = make_prompt(processor, sample.question)
            inputs = processor(text=prompt, images=Image.open(sample.image), return_tensors="pt")
            model.set_replaced_layers([])
            p = model(**inputs).logits[0, -1].double().log_softmax(-1)
            model.set_replaced_layers([3, 9], ffn=[1])
            q = model(**inputs).logits[0, -1].double().log_softmax(-1)
            kls.append((q.exp() * (q - p)).sum().item())
            agreed.append((p.argmax() == q.argmax()).item())
        model.set_replaced_layers([])
        assert cost.kl == pytest.approx(np.mean(kls), abs=1e-6)
        assert cost.agreement == np.mean(agreed) and cost.nll_change is not None

    def test_of_nothing_is_nothing_and_the_model_is_left_alone(self, model, processor):
        model.set_replaced_layers([2])
        meter = CostMeter(model, processor, embedded_samples()[:2])
        nothing = meter.measure({"replaced_layers": [], "replaced_attention_layers": [], "replaced_ffn_layers": []})
        assert (nothing.kl, nothing.agreement, nothing.nll_change) == (0, 1, 0)
        assert model.config.replaced_layers == [2]
        model.set_replaced_layers([])


class TestReport:
    SCORES = {"visual": [1e-3, 2e-7, 0.0]}
    FROZEN = {"replaced_layers": [2], "replaced_attention_layers": [], "replaced_ffn_layers": []}

    def shown(self, table) -> str:
        console = Console(record=True, width=80, file=StringIO())
        console.print(table)
        return console.export_text()

    def test_one_sample_tells_no_interval_and_no_share(self, model, processor):
        cost = CostMeter(model, processor, embedded_samples()[:1]).measure(self.FROZEN)
        assert cost.kl_interval is None
        table = self.shown(report.cost_table("layer", [{"number": 1, "flops_ratio": 0.9, "cost": cost}], 0))
        assert "±" not in table and "95%" not in table and " KL " in table
        assert "chosen in" not in self.shown(report.score_table(self.SCORES, self.FROZEN, []))
        assert "chosen in" in self.shown(report.score_table(self.SCORES, self.FROZEN, [0.0, 0.1, 1.0]))

    def test_layers_of_no_contribution_and_intervals_are_drawn(self, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(report, "save_figure", lambda figure, axes, path: drawn.append(axes))
        intervals = {"visual": [(1e-4, 2e-3), (0.0, 3e-7), (0.0, 0.0)]}
        report.draw_scores(tmp_path / "scores.png", self.SCORES, self.FROZEN, intervals)
        [axes] = drawn
        [line] = axes.get_lines()
        assert list(line.get_ydata()) == self.SCORES["visual"] and axes.get_ylim()[0] == 0
        heights = axes.transData.transform([(0, y) for y in (0, 2e-7, 1e-3)])[:, 1]
        assert heights[0] < heights[1] < heights[2]
        [band] = axes.collections
        assert {2e-3, 3e-7} <= {y for _, y in band.get_paths()[0].vertices}

    def test_costs_are_drawn_with_their_intervals(self, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(report, "save_figure", lambda figure, axes, path: drawn.append(axes))
        kls = (0.0, 0.0), (-1e-17, 1e-17), (1e-3, 2e-3), (1e-2, None)
        costs = [Cost(*each, 1.0, None) for each in kls]
        curve = [{"flops_ratio": 1 - number / 10, "cost": cost} for number, cost in enumerate(costs)]
        candidate = SimpleNamespace(curve=curve, chosen=curve[2], cost=costs[2])
        report.draw_tradeoff(tmp_path / "tradeoff.png", {"layer": candidate}, candidate)
        [axes] = drawn
        [bars] = axes.collections
        assert [[y for _, y in bar] for bar in bars.get_segments()][2:] == [[0, 3e-3], [1e-2, 1e-2]]
        assert "95% interval" in axes.get_ylabel() and axes.get_ylim()[0] == 0

    def test_a_prompt_longer_than_the_context(self, model, processor):
        sample = embedded_samples()[0]._replace(question="word " * 3000)
        with pytest.raises(ShortVError, match=f"sample {sample.id}: its prompt .*context"):
            CostMeter(model, processor, [sample])


def test_scores_that_are_not_finite_name_the_sample(tmp_path, processor):
    from shortv_llava.calibrate.run import calibrate

    broken = load_model(CHECKPOINT, dtype=torch.float32)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    samples = embedded_samples()
    with pytest.raises(ShortVError, match="sample 0: .*not finite"):
        calibrate(CHECKPOINT, broken, processor, samples[:1], samples[1:2], tmp_path / "package")


class TestJournal:
    def test_other_settings_are_refused(self, tmp_path):
        journal = Journal(tmp_path / "journal", {"seed": 0})
        journal.add("a", 0.1 + 0.2)
        assert Journal(tmp_path / "journal", {"seed": 0}).results == {"a": 0.1 + 0.2}
        with pytest.raises(ShortVError, match="seed 0, not 1"):
            Journal(tmp_path / "journal", {"seed": 1})


class TestData:
    """Local tables with the columns and types of the Hub's."""

    @pytest.fixture
    def gqa(self, tmp_path) -> Path:
        datasets = pytest.importorskip("datasets")
        picture = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
        tables = {
            "testdev_balanced_instructions": {
                "id": [str(i) for i in range(9)],
                "imageId": [f"n{i % 3}" for i in range(9)],
                "question": [f"Is it {i}?" for i in range(9)],
                "answer": ["yes", "no", "red"] * 3,
                "fullAnswer": ["Yes, it is."] * 9,
            },
            "testdev_balanced_images": {"id": ["n0", "n1", "n2"], "image": picture},
        }
        return self.write(tmp_path / "GQA", tables, "testdev", datasets)

    @staticmethod
    def write(folder: Path, tables: dict, split: str, datasets) -> Path:
        configs = []
        for name, columns in tables.items():
            table = datasets.Dataset.from_dict(columns)
            if "image" in columns:
                table = table.cast_column("image", datasets.Image())
            (folder / name).mkdir(parents=True)
            table.to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
            configs.append(f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/{split}-*\n")
        (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
        return folder

    def test_gqa(self, gqa):
        samples = gqa_samples(4, seed=1, repository=str(gqa))
        assert [sample.id for sample in samples] == [sample.id for sample in gqa_samples(4, 1, str(gqa))]
        assert len({sample.id for sample in samples}) == 4
        assert [sample.id for sample in gqa_samples(4, None, str(gqa))] == ["0", "1", "2", "3"]
        for sample in samples:
            assert sample.question == f"Is it {sample.id}?\nAnswer the question using a single word or phrase."
            color = sample.image.convert("RGB").getpixel((0, 0))
            assert color == [(255, 0, 0), (0, 0, 255), (0, 128, 0)][int(sample.id) % 3]
            assert sample.answer == ["yes", "no", "red"][int(sample.id) % 3]

    def test_flickr30k(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        columns = {
            "image": [Image.new("RGB", (8, 8), "red")] * 5,
            "caption": [[f"Caption {i}.", "Another."] for i in range(5)],
            "sentids": [["0", "1"]] * 5,
            "img_id": [str(i) for i in range(5)],
            "filename": [f"{i}.jpg" for i in range(5)],
        }
        folder = self.write(tmp_path / "flickr30k", {"default": columns}, "test", datasets)
        assert [sample.id for sample in flickr30k_samples(3, None, str(folder))] == ["0", "1", "2"]
        samples = flickr30k_samples(3, seed=0, repository=str(folder))
        assert len(samples) == 3
        for sample in samples:
            assert sample.question == "Provide a one-sentence caption for the provided image."
            assert sample.answer == f"Caption {sample.id}."

    @pytest.mark.parametrize("source", ["gqa", "flickr30k"])
    def test_out_of_reach(self, tmp_path, source):
        done = shortv_here("calibrate", CHECKPOINT, "--output", tmp_path / "package", *QUICK, "--data", source)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "cannot be read" in done.stderr and "--data" in done.stderr.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []

    def test_draws(self):
        samples = embedded_samples()
        assert draw(samples, 5, seed=3) == draw(samples, 9, seed=3)[:5]
        assert draw(samples, 5, seed=3) != draw(samples, 5, seed=4)
        assert draw(samples, 5, seed=None) == samples[:5]

    def test_the_first_of_a_source(self):
        """As the harness takes them with a limit; held-out ones follow, and corrections are fitted on neither."""
        samples = embedded_samples()
        drawn = load_samples(["shapes"], None, 5, seed=None)["shapes"]
        assert [sample.id for sample in drawn] == [f"shapes/{sample.id}" for sample in samples[:5]]
        fitted = fit_samples(["shapes"], None, 4, None, held_out=drawn[3:])
        assert [sample.id for sample in fitted] == [f"shapes/{samples[n].id}" for n in (0, 1, 2, 5)]

    def test_files_of_one_name_are_several_sources(self, tmp_path):
        lines = (SAMPLES / "questions.jsonl").read_text().splitlines()
        files = [tmp_path / name / "questions.jsonl" for name in ("one", "two")]
        for file, taken in zip(files, (lines[:4], lines[4:8])):
            file.parent.mkdir()
            rows = [json.dumps(json.loads(line) | {"question_id": id}) for id, line in enumerate(taken)]
            file.write_text("\n".join(rows))
        sources, images = [*map(str, files), "shapes"], SAMPLES / "images"
        names = source_names(sources)
        assert names == ["one/questions.jsonl", "two/questions.jsonl", "shapes"]
        drawn = load_samples(sources, images, 3, seed=0)
        assert [len(several) for several in drawn.values()] == [3, 3, 3]
        ids = {sample.id for several in drawn.values() for sample in several}
        assert len(ids) == 9 and {id.rpartition("/")[0] for id in ids} == set(names)
        fitted = fit_samples(sources, images, 2, 0, held_out=drawn["shapes"])
        assert [sample.id.rpartition("/")[0] for sample in fitted] == [name for name in names for _ in range(2)]
        with pytest.raises(ShortVError, match="given twice"):
            check_sources([sources[0], str(files[0].parent / ".." / "one" / "questions.jsonl")], images)
        assert source_names(["gqa", str(tmp_path / "one" / "gqa")]) == ["gqa", "one/gqa"]

    @pytest.mark.parametrize("leaves_out", [True, False])
    def test_vicunas_sentence_stands_once(self, processor, leaves_out, monkeypatch):
        if leaves_out:  # as the templates of llava-hf
            template = "USER: <image>\n{{ messages[0]['content'][1]['text'] }} ASSISTANT:"
            monkeypatch.setattr(processor, "chat_template", template)
        prompt = make_prompt(processor, "What is it?")
        spelt = "user" if leaves_out else "human"  # as tuned; the embedded checkpoint's own
        assert prompt.startswith(f"A chat between a curious {spelt}") and prompt.count("A chat") == 1
        assert prompt.endswith(" USER: <image>\nWhat is it? ASSISTANT:")
