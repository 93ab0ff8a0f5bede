"""Write output folders and files: whole or not at all, by one command at a time."""

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

JOURNAL = "calibration.journal.jsonl"  # the only file in the output folder of an unfinished calibration
UNFINISHED = ".shortv-unfinished"  # subfolder with the new contents of a folder that cannot be renamed


def check_folder(output: Path, overwrite: bool, is_package: bool, base: Path | None = None) -> None:
    """Before any work, refuse an output folder that must not or cannot be written.

    Symbolic links are followed.

    Args:
        overwrite: whether a package may be replaced.
        is_package: whether the folder holds a package.
        base: folder that the output is made from.

    Raises:
        ShortVError: if the folder is not empty, except for leftovers of an interrupted command, or a package if
            `overwrite` is set; if it is the base, is a file, or is not writable.
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
    """The folder with symbolic links resolved; its parent is created.

    Raises:
        ShortVError: if it is a file, cannot be created, or is not writable.
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
    """The folder with symbolic links resolved.

    Raises:
        ShortVError: if the name is invalid, or the links form a loop.
    """
    try:
        folder = output.resolve()
        folder.exists()  # fails for names that are too long
        return folder
    except (OSError, RuntimeError, ValueError) as error:
        raise ShortVError(f"{str(output)!r} is no usable path ({reason(error)}); give another folder") from error


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A new folder that replaces `output` when the block ends without an error, and is removed otherwise.

    If `output` cannot be renamed (a mount point, the working directory), its contents are replaced instead, config.json
    last. Leftovers of an interrupted command for the same output are removed.

    Raises:
        ShortVError: if another command is writing to `output`.
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
    """A new file beside `path` that replaces it when the block ends without an error."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    yield unfinished
    os.replace(unfinished, path)


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Lock a folder against other processes on this machine; the same process may lock it again.

    Raises:
        ShortVError: if another process holds the lock.
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
    """Hard-link a file, or copy it if the file system has no hard links. A download's symbolic links are followed."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _stays(output: Path) -> bool:
    """Whether a folder exists and cannot be renamed."""
    return output.is_dir() and (
        os.path.ismount(output) or output == Path.cwd() or not os.access(output.parent, os.W_OK | os.X_OK)
    )


def _leftovers(output: Path) -> list[Path]:
    """Folders that interrupted commands left beside the folder."""
    pattern = re.compile(re.escape(f".{output.name}.shortv-") + r"\w{8}(-old)?")
    found = output.parent.glob(f".{glob.escape(output.name)}.shortv-*")
    return [path for path in found if pattern.fullmatch(path.name)]


def _restore(output: Path) -> None:
    """Restore a folder that a command renamed, if the command was killed before the new folder replaced it."""
    for path in _leftovers(output):
        if path.name.endswith("-old") and not output.exists():
            os.rename(path, output)


def _fill(staging: Path, output: Path) -> None:
    """Replace the contents of `output` by those of `staging`, its subfolder.

    config.json is removed first and written last: without it the folder is no package, so an interruption never leaves
    a package that mixes old and new files.
    """
    (output / "config.json").unlink(missing_ok=True)
    for path in output.iterdir():
        if path.name not in (UNFINISHED, JOURNAL):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    staging.rmdir()
    (output / JOURNAL).unlink(missing_ok=True)
