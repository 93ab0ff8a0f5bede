"""The command line: whole runs in a process of their own, and what it says to bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import shortv_here
from huggingface_hub import ModelCard
from PIL import Image

from shortv_llava import commands
from shortv_llava.benchmarks.command import app as benchmarks
from shortv_llava.calibrate.samples import embedded_samples
from shortv_llava.checkpoint.loading import load
from shortv_llava.checkpoint.package import write_package
from shortv_llava.checkpoint.published import PUBLISHED
from shortv_llava.examples.shapes_llava import CHECKPOINT


def shortv(*arguments, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "shortv_llava.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **settings)


def shortv_in_a_process_group(*arguments) -> subprocess.CompletedProcess:
    """As a launcher runs it; says at its end whether the process still is in the group."""
    script = """
import atexit, torch
from shortv_llava.cli import main
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
atexit.register(lambda: print("in a group:", torch.distributed.is_initialized()))
main()
"""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def assert_fails(done: subprocess.CompletedProcess, *words: str, code: int = 1) -> None:
    """One line on standard error with these words, no traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def questions(tmp_path) -> Path:
    """A folder with a question file, an image, and a file outside that it must not reach."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (96, 96), "red").save(folder / "images" / "red.png")
    Image.new("RGB", (96, 96), "blue").save(folder / "outside.png")
    lines = [f'{{"question_id": {i}, "image": "red.png", "text": "Is it red?", "answer": "yes"}}\n' for i in (7, 8)]
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.slow
def test_launched_commands_leave_their_process_group(questions, tmp_path):
    sources = ("--questions", questions / "questions.jsonl", "--images", questions / "images")
    data = ("--data", "shapes", "--samples", 1, "--held-out", 1, "--correction-samples", 1, "--dtype", "float32")
    for command in (
        ("evaluate", CHECKPOINT, *sources, "--max-new-tokens", 1, "--output", tmp_path / "answers"),
        ("calibrate", CHECKPOINT, *data, "--output", tmp_path / "package"),
    ):
        done = shortv_in_a_process_group(*command)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("in a group: False\n"), done.stdout


def test_package_from_given_layers(tmp_path):
    output = tmp_path / "made"
    done = shortv("package", CHECKPOINT, "--layers", "11,3", "--output", output)
    assert done.returncode == 0, done.stderr
    config = json.loads((output / "config.json").read_text())
    assert (config["replaced_layers"], config["model_type"]) == ([11, 3], "shortv_llava")
    assert config["architectures"] == ["ShortVLlavaForConditionalGeneration"]
    base = json.loads((CHECKPOINT / "config.json").read_text())
    assert {key: config[key] for key in base if key not in ("model_type", "architectures")} == {
        key: base[key] for key in base if key not in ("model_type", "architectures")
    }
    assert (output / "model.safetensors").read_bytes() == (CHECKPOINT / "model.safetensors").read_bytes()
    assert {path.name for path in CHECKPOINT.iterdir()} <= set(left_in(output))
    assert left_in(tmp_path) == ["made"]


def test_given_layers_take_the_place_of_all_three_lists(tmp_path):
    write_package(CHECKPOINT, tmp_path / "package", replaced_layers=[11], replaced_ffn_layers=[3])
    loaded = load(str(tmp_path / "package"), "3,11")
    assert (loaded.model.config.replaced_layers, loaded.model.config.replaced_ffn_layers) == ([3, 11], [])
    assert loaded.package_layers == ([11], [], [3])
    data = ("--data", "shapes", "--samples", 1, "--held-out", 1, "--correction-rank", 0)
    done = shortv_here("calibrate", tmp_path / "package", *data, "--layers", "3,11", "--output", tmp_path / "other")
    assert done.returncode == 0 and "other: replaced_layers [3, 11]" in done.stdout, done.stderr


def test_calibrate_on_own_questions(tmp_path, questions):
    output = tmp_path / "made"
    data = ("--data", questions / "questions.jsonl", "--images", questions / "images", "--samples", 1, "--held-out", 1)
    done = shortv_here("calibrate", CHECKPOINT, "--output", output, *data, "--num-layers", 5, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    config = json.loads((output / "config.json").read_text())
    scores = config["lc_scores"]
    assert len(scores) == 12 and scores[11] == 0
    assert config["replaced_layers"] == sorted(range(12), key=lambda layer: (scores[layer], -layer))[:5]
    assert config["calibration"]["samples"] in (["questions.jsonl/7"], ["questions.jsonl/8"])
    assert "without corrections" in done.stdout
    done = shortv_here("calibrate", CHECKPOINT, "--output", tmp_path / "other", *data, "--correction-rank", 8)
    assert done.returncode == 1 and "--correction-rank 0" in done.stderr and not (tmp_path / "other").exists()
    assert config["calibration"]["direction"] == "release"


def test_calibrating_a_package_again_needs_overwrite_and_keeps_it_on_failure(package_folder, tmp_path):
    output = tmp_path / "made"
    assert shortv_here("package", package_folder, "--layers", "none", "--output", output).returncode == 0
    before = (output / "config.json").read_text()
    assert json.loads(before)["replaced_layers"] == []
    again = ("package", CHECKPOINT, "--output", output, "--layers")
    assert_fails(shortv_here(*again, 1), "holds a package already", "--overwrite")
    assert_fails(shortv_here(*again, 12, "--overwrite"), "12", "0 to 11")
    assert (output / "config.json").read_text() == before
    assert shortv_here(*again, 1, "--overwrite").returncode == 0
    assert json.loads((output / "config.json").read_text())["replaced_layers"] == [1]
    assert left_in(tmp_path) == ["made"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layers_by_name_and_by_id(name):
    from shortv_llava.checkpoint.published import parse_layers

    model = PUBLISHED[name]
    expected = list(model.replaced_layers)
    assert parse_layers("published", model.hf_id) == parse_layers("published", model.original_id) == expected
    assert parse_layers(f"published:{name}", "./my-finetune") == expected
    assert len(set(expected)) == (24 if "13b" in name else 19)


class TestBadInput:
    def test_missing_folder(self, tmp_path):
        assert_fails(
            shortv_here("package", tmp_path / "none", "--layers", "1", "--output", tmp_path / "out"), "no such folder"
        )
        assert left_in(tmp_path) == []

    def test_hub_out_of_reach(self, tmp_path):
        done = shortv_here("package", "llava-hf/llava-1.5-7b-hf", "--output", tmp_path / "out")
        assert_fails(done, "llava-hf/llava-1.5-7b-hf", "Hub")
        assert left_in(tmp_path) == []

    def test_unknown_published_model(self, tmp_path):
        assert_fails(
            shortv_here("package", CHECKPOINT, "--output", tmp_path / "out"), "no layers are published", "llava-1.5-7b"
        )

    def test_another_model(self, tmp_path):
        (tmp_path / "bert").mkdir()
        (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
        done = shortv_here("package", tmp_path / "bert", "--layers", "1", "--output", tmp_path / "out")
        assert_fails(done, "does not fit", "bert")

    @pytest.mark.parametrize("layers, word", [("12", "12"), ("1,1", "twice"), ("a,b", "a,b"), ("-1", "-1")])
    def test_layers(self, tmp_path, layers, word):
        assert_fails(shortv_here("package", CHECKPOINT, f"--layers={layers}", "--output", tmp_path / "out"), word)
        assert left_in(tmp_path) == []

    def test_output_that_is_no_package(self, tmp_path):
        (tmp_path / "letter.txt").write_text("dear")
        done = shortv_here("package", CHECKPOINT, "--layers", "1", "--output", tmp_path, "--overwrite")
        assert_fails(done, "no package")
        assert left_in(tmp_path) == ["letter.txt"]

    def test_no_weights(self, tmp_path):
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
        done = shortv_here("package", tmp_path / "base", "--layers", "1", "--output", tmp_path / "out")
        assert_fails(done, "no weights")
        assert left_in(tmp_path) == ["base"]

    @pytest.mark.parametrize(
        "line, words",
        [
            ("{not json", ["line 3", "not JSON"]),
            ('["a"]', ["line 3", "object"]),
            ('{"text": "What?"}', ["about no picture"]),
            ('{"image": "red.png", "text": "half \\ud800"}', ["line 3", "half a character"]),
            ('{"image": "a\\u0000b", "text": "What?"}', ["line 3", "no usable name", "correct it"]),
            ('{"a":' * 99999, ["line 3", "nested too deeply"]),
            ('{"image": "none.png", "text": "What?"}', ["line 3", "none.png"]),
            ('{"image": "../outside.png", "text": "What?"}', ["line 3", "outside"]),
            ('{"image": "/etc/passwd", "text": "What?"}', ["line 3", "outside"]),
        ],
    )
    def test_question_lines(self, tmp_path, questions, line, words):
        with open(questions / "questions.jsonl", "a") as file:
            file.write(line + "\n")
        data = (
            "--data",
            questions / "questions.jsonl",
            "--images",
            questions / "images",
            "--samples",
            1,
            "--held-out",
            1,
        )
        assert_fails(shortv_here("calibrate", CHECKPOINT, "--output", tmp_path / "out", *data), *words)
        assert left_in(tmp_path) == ["data"]

    def test_more_samples_than_there_are(self, tmp_path):
        done = shortv_here("calibrate", CHECKPOINT, "--output", tmp_path / "out", "--data", "shapes", "--samples", 55)
        assert_fails(done, "65", "60")

    def test_broken_image(self, tmp_path, questions):
        (questions / "images" / "red.png").write_bytes(embedded_samples()[0].image.read_bytes()[:200])
        data = (
            "--data",
            questions / "questions.jsonl",
            "--images",
            questions / "images",
            "--samples",
            1,
            "--held-out",
            1,
        )
        done = shortv_here("calibrate", CHECKPOINT, "--output", tmp_path / "out", *data)
        assert done.returncode == 1 and "red.png" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        assert left_in(tmp_path) == ["data"]

    def test_usage(self, tmp_path):
        assert shortv_here("calibrate", CHECKPOINT).returncode == 2
        for options in (["--direction", "both"], ["--tokens", "image"], ["--samples", "0"], ["--num-layers", "many"]):
            assert shortv_here("calibrate", CHECKPOINT, "--output", tmp_path / "out", *options).returncode == 2


def test_wrong_options_are_found_before_torch_is_imported(questions, tmp_path):
    calibrate, evaluate = ["calibrate", CHECKPOINT], ["evaluate", CHECKPOINT]
    own = [*evaluate, "--questions", questions / "questions.jsonl", "--images", questions / "images"]
    cases = [
        [*calibrate, "--strategy", "best"],
        [*calibrate, "--dtype", "int8"],
        [*calibrate, "--seed", "-1"],
        [*calibrate, "--max-divergence", "-1"],
        [*calibrate, "--num-layers", "-1"],
        [*calibrate, "--num-layers", "1", "--fraction", "0.5"],
        [*calibrate, "--layers", "one"],
        [*calibrate, "--data", "nowhere.jsonl", "--images", tmp_path],
        [*calibrate, "--chat-template", "nowhere"],
        ["calibrate", "nowhere"],
        ["package", "nowhere", "--layers", "1"],
        ["package", CHECKPOINT, "--layers", "one"],
        [*evaluate, "--task", "nothing"],
        [*evaluate, "--questions", "nowhere.jsonl"],
        [*evaluate, "--lmms-tasks", "pope", "--task", "pope"],
        [*evaluate, "--lmms-tasks", "pope"],  # lmms-eval is not installed
        [*own, "--metric", "none"],
        [*own, "--sweep", "-1"],
        [*own, "--replaced-layers", "one"],
        [*own, "--load-in-4bit", "--load-in-8bit"],
        [*own, "--method", "fastv"],
    ]
    cases = [[*map(str, case), "--output", str(tmp_path / "out")] for case in cases]
    cases += [["chat", str(CHECKPOINT), *case] for case in (["--seed", "-1"], ["--image", "x.png"], ["--dtype", "x"])]
    push = ["push", str(CHECKPOINT)]
    cases += [
        push,
        [*push, "name"],
        ["push", "nowhere", "me/name"],
        [*push, "me/name"],
        [*push, "me/name", "--tag", "a b"],
        [*push, "me/name", "--tag", "v1", "--create-pr"],
        [*push, "me/name", "--revision", "a..b"],
        [*push, "me/name", "--collection", "mine"],
        [*push, "me/name", "--weights-from", "nowhere"],
    ]
    bench = {
        "nothing": [[]],
        "prefill": [
            ["--model", "llava-2"],
            ["--model", "scaled", "--layers", "17"],
            ["--layers", "41"],
            ["--layers", "few"],
            ["--batch", "0"],
            ["--pairs", "0"],
            ["--method", "fastv"],
            ["--method", "vtw:40"],
            ["--method", "vtw:2", "--cuda-graphs"],
            ["--output", str(CHECKPOINT / "config.json")],
        ],
        "decoding": [["--model", "llava-2"], ["--tokens", "0"]],
        "calibration": [["--width", "100"], ["--pairs", "0"]],
        "shared-prefix": [["--width", "100"], ["--fraction", "2"]],
        "turns": [["--width", "100"], ["--conversations", "0"]],
        "conversion": [["--hidden", "200"], ["--folder", "nowhere"]],
        "correction-fit": [["--model", "llava-2"], ["--for", "llava-2"], ["--rank", "0"]],
        "vllm-prefill": [["--width", "100"], ["--batch", "0"]],
        "vllm-load": [["--width", "100"], ["--log", str(tmp_path)]],
        "faults": [["--kills", "-1"]],
    }
    cases += [["bench", name, *options] for name, several in bench.items() for options in several]
    script = """
import json, sys
from shortv_llava.cli import main
for case in json.load(sys.stdin):
    try:
        main(*case)
    except SystemExit as end:
        print(end.code)
    assert "torch" not in sys.modules, case
"""
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(cases), capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(done.stdout.split()) == len(cases) and set(done.stdout.split()) == {"1", "2"}
    assert left_in(tmp_path) == ["data"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_person_at_the_terminal_sees_at_once_what_is_loaded(monkeypatch, capsys, terminal):
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    with commands.loading("my-model"):
        assert ("loading my-model" in capsys.readouterr().err) == terminal
    assert capsys.readouterr().out == ""


def test_disk_full_leaves_nothing(tmp_path, monkeypatch):
    from shortv_llava.checkpoint import package

    def full(*args):
        raise OSError(28, "No space left on device", str(args[1]))

    monkeypatch.setattr(package, "link_or_copy", full)
    with pytest.raises(OSError, match="No space left"):
        package.write_package(CHECKPOINT, tmp_path / "out", replaced_layers=[1])
    assert left_in(tmp_path) == []


def test_interrupted_leaves_nothing(tmp_path, monkeypatch):
    from shortv_llava.checkpoint import package

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "link_or_copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        package.write_package(CHECKPOINT, tmp_path / "out", replaced_layers=[1])
    assert left_in(tmp_path) == []


COMMANDS = "package push calibrate chat evaluate serve demo".split()
BENCHMARKS = [f"bench {command.callback.__name__.replace('_', '-')}" for command in benchmarks.registered_commands]


@pytest.mark.parametrize("command", ["", "bench", *COMMANDS, *BENCHMARKS])
def test_help_is_whole_at_80_columns(command, monkeypatch):
    """Nothing is cut off, no name breaks at its hyphen, and every command has examples, of one line each."""
    monkeypatch.setenv("COLUMNS", "80")
    done = shortv_here(*command.split(), "--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and max(map(len, lines)) <= 80 and "..." not in done.stdout.partition("\n")[2]
    assert not [line for line in lines if re.search(r"\w-$", line)]
    examples = [
        number for number, line in enumerate(lines) if f" shortv {command}" in line and line.startswith(" " * 6)
    ]
    assert (examples or command in ("", "bench")) and all(lines[number + 1] == "" for number in examples)


@pytest.mark.slow
def test_demo(tmp_path):
    """Every answer of the package is the dense model's, and the last line is a speed-up."""
    done = shortv("demo", "--output", tmp_path / "package")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "package" / "config.json").read_text())
    assert len(config["replaced_layers"]) == 10 and len(config["corrected_layers"]) == 9
    answers = [map(str.strip, line.split("│")[3:5]) for line in done.stdout.splitlines() if ".png" in line]
    assert len(answers) == 6 and all(dense == ours for dense, ours in answers)
    assert "13 of 16 layers replaced and corrected: " in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "package --layers 3".split(),
        "calibrate --layers 3 --data shapes --samples 1 --held-out 1 --correction-rank 0".split(),
    ],
    ids=lambda command: command[0],
)
def test_what_a_local_base_does_not_tell_is_given(tmp_path, command):
    output, told = tmp_path / "package", ["--base-model", "org/base", "--license", "mit"]
    done = shortv_here(command[0], CHECKPOINT, *command[1:], *told, "--output", output)
    assert done.returncode == 0, done.stderr
    data = ModelCard.load(output / "README.md").data
    assert (data.base_model, data.license) == ("org/base", "mit")
