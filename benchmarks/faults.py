"""Fault injection: commands killed at random moments, impossible outputs, broken pictures, files and weights.

Every trial is a command in its own process, forked from one that has imported all libraries, on the embedded
checkpoint. Counted are lost results (that differ from an undisturbed run's), half-written folders and leftovers, and
tracebacks.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from shortv_llava import cli
from shortv_llava.examples.shapes_llava import CHECKPOINT

IMAGES = CHECKPOINT.parent / "samples" / "images"
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
TIMES = ("measured.jsonl", "results.json")  # hold seconds, which differ from run to run
QUESTION = {"question_id": 1, "image": "000.png", "text": "What is it?", "answer": "a"}
MODEL_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json")
DAMAGE = {
    "deleted": None,
    "cut": lambda data: data[: len(data) // 2],
    "nested": lambda data: b'{"a":' * 100_000,
    "array": lambda data: b"[1]",
    "half a character": lambda data: b'{"a": "\\ud800"}',
    "not UTF-8": lambda data: b'{"a": "\xe9"}',
    "a web page": lambda data: b"<!DOCTYPE html>",
}
LINES = {
    "NUL": json.dumps(QUESTION | {"image": "a\0b"}),
    "long name": json.dumps(QUESTION | {"image": "x" * 5000}),
    "link to itself": json.dumps(QUESTION | {"image": "loop.png"}),
    "outside": json.dumps(QUESTION | {"image": "/etc/passwd"}),
    "nested": '{"a":' * 100_000,
    "half a character": json.dumps(QUESTION | {"text": "\ud800"}),
    "too long": json.dumps(QUESTION | {"text": "word " * 3000}),
    "array": "[1, 2]",
    "cut": json.dumps(QUESTION)[:-5],
    "large number": json.dumps(QUESTION)[:-1] + f', "n": {"9" * 5000}}}',
    "no answer": json.dumps({key: QUESTION[key] for key in ("image", "text")}),
}


@dataclass
class Count:
    """Counts of one kind of fault; `notes` describe the trials that went wrong."""

    kind: str
    tried: int = 0
    lost: int = 0
    half_written: int = 0
    tracebacks: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, log: str, lost: bool = False, half_written: bool = False) -> None:
        traceback = "Traceback" in log
        self.tried, self.lost = self.tried + 1, self.lost + lost
        self.half_written, self.tracebacks = self.half_written + half_written, self.tracebacks + traceback
        if lost or half_written or traceback:
            told = log[log.index("Traceback") :][:1500] if traceback else log.strip()[-300:]
            self.notes.append(f"{self.kind}, {what}: {told}")


class Command:
    """A `shortv` command in a process that was forked with all libraries imported."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [f"shortv_llava.{name}" for name in ("calibrate.run", "evaluation.run", "chat.terminal")]
    )

    def __init__(self, *arguments, folder: Path = Path()):
        _, name = tempfile.mkstemp()
        self.log = Path(name)
        self.process = self.context.Process(target=_run, args=([*map(str, arguments)], self.log, folder))
        self.process.start()

    def end(self) -> tuple[int, str]:
        """Wait for the command to end. Returns its exit code and its output on the screen."""
        self.process.join()
        text = self.log.read_text(errors="replace")
        self.log.unlink()
        return self.process.exitcode, text


def _run(arguments: list[str], log: Path, folder: Path) -> None:
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.argv = ["shortv"]
    cli.main(*arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder by name; for files that hold seconds, the contents are left out."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): b"" if path.name in TIMES else path.read_bytes() for path in files}


def leftovers(output: Path) -> bool:
    return any(path != output for path in output.parent.iterdir())


def commands(work: Path) -> dict[str, list]:
    """The commands to kill, without their output arguments."""
    questions = work / "questions.jsonl"
    lines = (CHECKPOINT.parent / "samples" / "questions.jsonl").read_text().splitlines()
    questions.write_text("\n".join(lines[:24]) + "\n")
    few = ("--samples", 3, "--held-out", 2, "--correction-samples", 3, "--dtype", "float32")
    asked = ("--questions", questions, "--images", IMAGES, "--batch-size", 2, "--dtype", "float32")
    return {
        "calibrate": ["calibrate", CHECKPOINT, "--data", "shapes", *few],
        "package": ["package", CHECKPOINT, "--layers", "1,2"],
        "evaluate": ["evaluate", CHECKPOINT, *asked, "--replaced-layers", "3", "--compare", "--max-new-tokens", 4],
    }


def kill(work: Path, name: str, arguments: list, number: int, at_end: bool) -> Count:
    """Kill a command repeatedly; the same command must then give the result of an undisturbed run."""
    count = Count(f"{name}, killed {'at its end' if at_end else 'at random'}")
    reference = work / f"{name}-{at_end}" / "out"
    began = time.monotonic()
    code, log = Command(*arguments, "--output", reference).end()
    seconds, expected = time.monotonic() - began, contents(reference)
    if code != 0:
        raise RuntimeError(log)
    for trial in tqdm(range(number), desc=count.kind, leave=False):
        output = work / f"{name}-{at_end}-{trial}" / "out"
        output.parent.mkdir()
        command, sent = Command(*arguments, "--output", output), random.choice(SIGNALS)
        if at_end:
            _wait_for_the_end(command, output)
            time.sleep(0.4 * random.random())
        else:
            time.sleep(seconds * random.random())
        if command.process.is_alive():
            os.kill(command.process.pid, sent)
        _, log = command.end()
        whole = output.is_dir() and contents(output) == expected
        torn = (output / "config.json").exists() and not whole
        torn |= sent != signal.SIGKILL and leftovers(output)
        if not whole:
            _, again = Command(*arguments, "--output", output).end()
            log += again
        lost = contents(output) != expected
        count.add(f"{sent.name}, trial {trial}", log, lost, torn or leftovers(output))
        shutil.rmtree(output.parent)
    return count


def _wait_for_the_end(command: Command, output: Path) -> None:
    while command.process.is_alive() and not any(
        found for pattern in (".*.shortv-*", "out/answers*") for found in output.parent.glob(pattern)
    ):
        time.sleep(0.001)


def outputs(work: Path) -> Count:
    """Outputs that are links or cannot be renamed, twice each."""
    count = Count("outputs")
    for name in ("folder", "link", "dangling link", "working folder"):
        parent = work / name
        place = parent / "place"
        (parent if name in ("folder", "dangling link") else place).mkdir(parents=True)
        output = parent / "link" if name.endswith("link") else place
        if output != place:
            output.symlink_to("place")
        for again in ((), ("--overwrite",)):
            given = "." if name == "working folder" else output
            folder = place if given == "." else work
            code, log = Command("package", CHECKPOINT, "--layers", 1, *again, "--output", given, folder=folder).end()
            left = {path.name for path in parent.iterdir()} - {"place", "link"}
            lost = code != 0 or (output != place and not output.is_symlink())
            count.add(name, log, lost, bool(left) or not (place / "config.json").exists())
    return count


def broken_pictures(folder: Path) -> Iterator[tuple[str, Path]]:
    for size in ((8000, 1), (1, 8000), (20_000, 3)):
        path = folder / f"{size[0]} x {size[1]}.png"
        Image.new("RGB", size).save(path)
        yield path.name, path
    whole = (IMAGES / "000.png").read_bytes()
    for name, data in (("cut", whole[: len(whole) // 2]), ("text", b"no picture"), ("empty", b"")):
        (folder / name).write_bytes(data)
        yield name, folder / name
    yield "folder", folder
    yield "missing", folder / "none.png"


def pictures_and_lines(work: Path) -> Iterator[Count]:
    """Broken pictures and lines of question files, after a good line: `evaluate` must refuse each in one line."""
    folder, asked, output = work / "images", work / "asked.jsonl", work / "answers"
    folder.mkdir()
    shutil.copyfile(IMAGES / "000.png", folder / "000.png")
    (folder / "loop.png").symlink_to("loop.png")
    evaluate = ("evaluate", CHECKPOINT, "--questions", asked, "--images", folder, "--metric", "gqa", "--output", output)
    pictures = {name: json.dumps(QUESTION | {"image": path.name}) for name, path in broken_pictures(folder)}
    for count, lines in ((Count("pictures"), pictures), (Count("lines of questions"), LINES)):
        for what, line in lines.items():
            asked.write_text(json.dumps(QUESTION | {"question_id": 0}) + "\n" + line + "\n")
            code, log = Command(*evaluate, "--max-new-tokens", 1).end()
            count.add(what, log, code != 1 or "shortv: error:" not in log, (output / "results.json").exists())
            shutil.rmtree(output, ignore_errors=True)
        yield count


def damaged(work: Path, kind: str, damage: Iterator[tuple[str, str, Callable | None]]) -> Count:
    """Checkpoints with one damaged file: `package` must refuse them in one line, or the package must answer."""
    count, base, output, answered = Count(kind), work / "base", work / "made", work / "answered"
    asked = ("--questions", work / "questions.jsonl", "--images", IMAGES, "--max-new-tokens", 1, "--output", answered)
    for what, name, change in damage:
        shutil.copytree(CHECKPOINT, base)
        data = (base / name).read_bytes()
        (base / name).unlink()
        if change is not None:
            (base / name).write_bytes(change(data))
        code, log = Command("package", base, "--layers", 1, "--output", output).end()
        refused, made = code == 1 and "shortv: error:" in log, output.exists()
        if code == 0 and "takes only token ids" not in log:
            code, more = Command("evaluate", output, *asked).end()
            log += more
        count.add(f"{name} {what}", log, code != 0 and not refused, refused and made)
        for folder in (base, output, answered):
            shutil.rmtree(folder, ignore_errors=True)
    return count


def tampered(number: int) -> Iterator[tuple[str, str, Callable]]:
    """Weights cut at random, or with a random byte of the header changed."""
    size = 8 + int.from_bytes((CHECKPOINT / "model.safetensors").read_bytes()[:8], "little")
    for trial in range(number):
        place, byte = random.randrange(size), bytes([random.randrange(256)])
        if trial % 4:
            change = f"byte {place} is {byte}", lambda data, at=place, byte=byte: data[:at] + byte + data[at + 1 :]
        else:
            change = "cut", lambda data: data[: random.randrange(len(data))]
        yield change[0], "model.safetensors", change[1]


def run(kills: int, at_end: int, weights: int, seed: int) -> None:
    """Commit faults, and count what is lost, half-written or ends in a traceback."""
    random.seed(seed)
    counts = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for command, arguments in commands(work).items():
            counts += [kill(work, command, arguments, kills, False), kill(work, command, arguments, at_end, True)]
        counts += [outputs(work), *pictures_and_lines(work)]
        damage = ((what, file, change) for file in MODEL_FILES for what, change in DAMAGE.items())
        counts += [damaged(work, "files of a model", damage), damaged(work, "weights", tampered(weights))]
    table = Table("faults", "tried", "lost", "half-written", "tracebacks")
    for count in counts:
        table.add_row(count.kind, *map(str, (count.tried, count.lost, count.half_written, count.tracebacks)))
    console = Console()
    console.print(table)
    for note in (note for count in counts for note in count.notes):
        console.print(note, highlight=False, markup=False)
