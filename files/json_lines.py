"""Files with a JSON object a line: files that others wrote, and records of finished work that survive interruptions."""

import codecs
import json
import os
from collections.abc import Iterable
from pathlib import Path

from shortv_llava.errors import ShortVError, reason
from shortv_llava.files.json_files import parse_json


def read_jsonl(path: Path) -> list[tuple[int, dict]]:
    """Line numbers (from 1) and objects of a file with a JSON object a line; empty lines are skipped.

    Raises:
        ShortVError: if the file cannot be read or a line is no JSON object.
    """
    return _objects(_read(path), path)


def read_record(path: Path) -> list[tuple[int, dict]]:
    """As [`read_jsonl`], for a file of [`add_to_record`]: empty if it does not exist, without an incomplete last line.

    Raises:
        ShortVError: if the file cannot be read or a line is no JSON object.
    """
    if not path.exists():
        return []
    data = _read(path)
    return _objects(data[: data.rfind(b"\n") + 1], path)


def add_to_record(path: Path, entries: Iterable[dict]) -> None:
    """Append a line for each object and sync to disk. An incomplete last line of the file is removed first."""
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with open(path, "a+b") as file:
        file.seek(max(file.tell() - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ShortVError(f"{path}: cannot be read ({reason(error)})") from error


def _objects(data: bytes, path: Path) -> list[tuple[int, dict]]:
    entries = []
    for number, line in enumerate(data.splitlines(), start=1):
        line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        entry = parse_json(line, where)
        if not isinstance(entry, dict):
            raise ShortVError(f"{where}: must be a JSON object; correct it")
        entries.append((number, entry))
    return entries
