"""A record of finished work, so that an interrupted run continues where it stopped."""

import json
import os
from pathlib import Path

from shortv_llava.errors import ShortVError


class Journal:
    """Results by key, each a line of a file that is appended to and never rewritten.

    Args:
        path: the file; made with the first result.
        settings: what the results depend on; a journal of other settings is refused.

    Raises:
        ShortVError: if the file holds results of other settings; names what differs.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings, self.results = path, json.loads(json.dumps(settings)), {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        complete = lines[:-1]  # a line without its end was cut off by a kill
        if complete:
            begun = json.loads(complete[0])
            for key in sorted({*begun, *self.settings}):
                if begun.get(key) != self.settings.get(key):
                    raise ShortVError(
                        f"{path}: an unfinished calibration with {key} {begun.get(key)!r}, "
                        f"not {self.settings.get(key)!r}, lies there; repeat that command, or remove the file"
                    )
            for line in complete[1:]:
                key, value = json.loads(line)
                self.results[key] = value
        if lines and lines[-1]:
            with open(path, "r+b") as file:
                file.truncate(sum(len(line) + 1 for line in complete))

    def add(self, key: str, value) -> None:
        """Keep a result for good."""
        self.results[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists() or self.path.stat().st_size == 0
        with open(self.path, "a", encoding="utf-8") as file:
            for entry in ([self.settings] if new else []) + [[key, value]]:
                file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
