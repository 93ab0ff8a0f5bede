"""Folders that commands write: links, mount points, the working directory, kills at every step, two at once."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shortv_llava.checkpoint.config import read_config
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.package import check_output, write_package
from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.files import outputs
from shortv_llava.files.outputs import JOURNAL, UNFINISHED, only_one, replacing


def package(output: Path, layers=(1,), **options) -> None:
    write_package(CHECKPOINT, output, overwrite=True, replaced_layers=[*layers], **options)


def assert_whole(folder: Path, layers=(1,)) -> None:
    assert read_config(folder)["replaced_layers"] == [*layers]
    load_model(folder, device_map="meta")
    assert not [path.name for path in (*folder.iterdir(), *folder.parent.iterdir()) if ".shortv-" in path.name]


def test_symbolic_links_stay_and_what_they_name_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    for name, target in (("link", "there"), ("dangling", "new")):
        (tmp_path / name).symlink_to(target)
        package(tmp_path / name)
        package(tmp_path / name, (2, 3))
        assert (tmp_path / name).is_symlink()
        assert_whole(tmp_path / target, (2, 3))


def test_a_link_to_itself_and_other_impossible_paths(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path / "loop",
        tmp_path / "file",
        tmp_path / "file" / "out",
        tmp_path / "a\0b",
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(ShortVError, match="give another folder|give a folder"):
            check_output(path, overwrite=False)


@pytest.mark.parametrize("where", ["working directory", "mount point", "parent that may not be written"])
def test_folders_that_cannot_be_renamed_away(tmp_path, monkeypatch, where):
    output = tmp_path / "out"
    output.mkdir()
    if where == "working directory":
        monkeypatch.chdir(output)
    elif where == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    else:  # these tests may run as root, who may write everywhere
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    inode = output.stat().st_ino
    package(Path(".") if where == "working directory" else output)
    (output / "old.txt").write_text("old")
    package(output, (2, 3))
    assert output.stat().st_ino == inode and not (output / "old.txt").exists()
    assert_whole(output, (2, 3))


class Killed(BaseException):
    pass


def test_killed_at_any_step_nothing_mixes_and_the_same_command_ends(tmp_path, monkeypatch):
    """The step is every change of a name that `outputs` makes; a kill leaves things as they are, without clean-up."""

    def run(output: Path, in_place: bool, kill_at: int) -> bool:
        """Whether it was killed."""
        count = 0

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal count
                count += 1
                if count >= kill_at:
                    raise Killed
                return function(*args, **kwargs)

            return wrapper

        with monkeypatch.context() as patch:
            for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (Path, "unlink")):
                patch.setattr(module, name, counted(getattr(module, name)))
            if in_place:
                patch.setattr(os.path, "ismount", lambda path: Path(path) == output)
            try:
                with replacing(output) as staging:
                    for name in ("config.json", "weights"):
                        (staging / name).write_text("new")
            except Killed:
                return True
        return False

    for in_place in (False, True):
        kill_at, killed = 1, True
        while killed:
            output = tmp_path / f"{in_place}-{kill_at}" / "out"
            output.mkdir(parents=True)
            for name in ("config.json", "weights"):
                (output / name).write_text("old")
            killed = run(output, in_place, kill_at)
            outputs._restore(output)
            if (output / "config.json").exists():
                assert (output / "config.json").read_text() == (output / "weights").read_text()
            else:
                assert (output / UNFINISHED).is_dir()
            assert not run(output, in_place, 10**6)
            assert {path.name: path.read_text() for path in output.iterdir()} == {
                "config.json": "new",
                "weights": "new",
            }
            assert [path.name for path in output.parent.iterdir()] == ["out"]
            kill_at += 1
        assert kill_at > 3


def test_what_a_kill_left_beside_the_output_goes(tmp_path):
    for name in (".out.shortv-abcdefgh", ".out.shortv-abcdefgh-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "out").mkdir()
    others = [".out.shortv-notes", ".other.shortv-abcdefgh", "out.shortv-abcdefgh"]
    for name in others:
        (tmp_path / name).mkdir()
    package(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}


def test_further_files_come_with_the_package_or_not_at_all(tmp_path):
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    package(tmp_path / "out", write_more=lambda folder: (folder / "more").write_text("x"))
    assert (tmp_path / "out" / "more").read_text() == "x"
    with pytest.raises(OSError, match="No space"):
        package(tmp_path / "out", (2,), write_more=fail)
    assert_whole(tmp_path / "out")


def test_two_commands_in_one_folder(tmp_path):
    script = f"""
import sys
from pathlib import Path
from shortv_llava.files.outputs import only_one
with only_one(Path({str(tmp_path)!r}) / "out"):
    print("ready", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ShortVError, match="out: another command"):
            package(tmp_path / "out")
        other.stdin.close()
    package(tmp_path / "out")
    with only_one(tmp_path / "out"), only_one(tmp_path / "out"):  # the same process may ask again
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["package", "calibrate"])
def test_signals_end_with_one_line(tmp_path, number, command):
    script = """
import os, sys
from shortv_llava import cli
from shortv_llava.checkpoint import source
number = int(sys.argv.pop())
source.fetch_checkpoint = lambda *args, **kwargs: os.kill(os.getpid(), number)
cli.main()
"""
    arguments = [
        command,
        "some/model",
        "--output",
        tmp_path / "out",
        *(["--layers", "1"] if command == "package" else []),
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, [*arguments, int(number)])], capture_output=True, text=True
    )
    assert done.returncode == 128 + number and done.stderr.count("\n") == 1
    assert done.stderr.startswith("shortv: error: interrupted")
    assert ("same command" in done.stderr) == (command == "calibrate")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_where_python_ignores_it_comes_again(number):
    script = """
import os, signal, sys
from shortv_llava import cli
from shortv_llava.checkpoint import source
number = int(sys.argv.pop())
class Dying:
    def __del__(self):
        os.kill(os.getpid(), number)
def fetch(*args, **kwargs):
    Dying()
    signal.pause()
source.check_name = fetch
cli.main()
"""
    arguments = ["package", "some/model", "--layers", "1", "--output", "out", str(int(number))]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (128 + number, "shortv: error: interrupted")


def test_an_unfinished_calibration_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_text("")
    check_output(tmp_path / "out", overwrite=False)
