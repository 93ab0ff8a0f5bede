"""Folders and files that commands write: whole or not at all, by one command at a time."""

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from shortv_llava.errors import ShortVError, reason

JOURNAL = "calibration.journal.jsonl"  # of an unfinished calibration, alone in its output folder
UNFINISHED = ".shortv-unfinished"  # in a folder that cannot be renamed away: what is to be put there


def check_folder(output: Path, overwrite: bool, is_package: bool, base: Path | None = None) -> None:
    """Refuse, before any work, an output folder that must not or cannot be written.

    A symbolic link stands for the folder that it names.

    Args:
        overwrite: whether a package may be replaced.
        is_package: whether the folder holds one.
        base: what the output is made from.

    Raises:
        ShortVError: if the folder holds something, unless that is a package and `overwrite` is set, or what an
            interrupted command left; if it is the base, a file, or may not be written.
    """
    output = check_writable(output)
    if base is not None and output == base.resolve():
        raise ShortVError(f"{output}: the output is the base itself; give another folder")
    _restore(output)
    held = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if held - {JOURNAL, UNFINISHED} and UNFINISHED not in held:
        if not is_package:
            raise ShortVError(f"{output}: holds files that are no package; give a new or empty folder")
        if not overwrite:
            raise ShortVError(f"{output}: holds a package already; give another folder or --overwrite")


def check_writable(output: Path) -> Path:
    """The folder itself, behind symbolic links; its parent is made.

    Raises:
        ShortVError: if it is a file, cannot be, or may not be written.
    """
    output = resolved(output)
    if output.exists() and not output.is_dir():
        raise ShortVError(f"{output}: is a file; give a folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShortVError(f"{output}: cannot be made ({reason(error)}); give another folder") from error
    written = output if _stays(output) else output.parent
    if not os.access(written, os.W_OK | os.X_OK):
        raise ShortVError(f"{written}: no permission to write; give another folder")
    return output


def resolved(output: Path) -> Path:
    """The folder itself, behind symbolic links.

    Raises:
        ShortVError: if the system takes no such name, or the links lead back to themselves.
    """
    try:
        folder = output.resolve()
        folder.exists()  # fails for names that are too long
        return folder
    except (OSError, RuntimeError, ValueError) as error:
        raise ShortVError(f"{str(output)!r} is no usable path ({reason(error)}); give another folder") from error


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A new folder that takes the place of `output` when the block ends well, and goes when it does not.

    Where the folder cannot be renamed away (a mount point, the working directory) it is filled where it is, config.json
    last. What an interrupted command left of the same output is removed.

    Raises:
        ShortVError: if another command writes there.
    """
    output = resolved(output)
    with only_one(output):
        _restore(output)
        for path in _leftovers(output):
            shutil.rmtree(path, ignore_errors=True)
        if _stays(output):
            staging = output / UNFINISHED
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        else:
            staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.shortv-", dir=output.parent))
        try:
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        if staging.parent == output:
            _fill(staging, output)
            return
        staging.chmod(0o755)
        old = staging.with_name(staging.name + "-old")
        if output.exists():
            os.rename(output, old)
        os.rename(staging, output)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A new file beside `path` that takes its place when the block ends well."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    yield unfinished
    os.replace(unfinished, path)


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """See that no other process of this machine writes into a folder; the same one may ask again.

    Raises:
        ShortVError: if one does.
    """
    output = resolved(output)
    owner = os.getuid() if hasattr(os, "getuid") else ""  # another user's lock could not be opened
    name = hashlib.sha256(f"{owner} {output}".encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"shortv-{name}.lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ShortVError(f"{output}: another command writes there; wait for it, or give another folder") from None
    try:
        yield
    finally:
        lock.release()


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link, or copy where the file system has none. A download's symbolic links are followed."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _stays(output: Path) -> bool:
    """Whether a folder is there and cannot be renamed away."""
    return output.is_dir() and (
        os.path.ismount(output) or output == Path.cwd() or not os.access(output.parent, os.W_OK | os.X_OK)
    )


def _leftovers(output: Path) -> list[Path]:
    """What interrupted commands left beside the folder."""
    pattern = re.compile(re.escape(f".{output.name}.shortv-") + r"\w{8}(-old)?")
    found = output.parent.glob(f".{glob.escape(output.name)}.shortv-*")
    return [path for path in found if pattern.fullmatch(path.name)]


def _restore(output: Path) -> None:
    """Put a folder back that was renamed away by a command that was killed before the new one took its place."""
    for path in _leftovers(output):
        if path.name.endswith("-old") and not output.exists():
            os.rename(path, output)


def _fill(staging: Path, output: Path) -> None:
    """Put what is in `staging` into the folder around it, in place of all that is there.

    Without a config.json the folder is no package, so an interruption leaves none that mixes old and new.
    """
    (output / "config.json").unlink(missing_ok=True)
    for path in output.iterdir():
        if path.name not in (UNFINISHED, JOURNAL):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    staging.rmdir()
    (output / JOURNAL).unlink(missing_ok=True)
