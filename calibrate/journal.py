"""A record of finished work, so that an interrupted run continues where it stopped."""

import json
from pathlib import Path

from shortv_llava.errors import ShortVError
from shortv_llava.files.json_lines import add_to_record, read_record


class Journal:
    """Results by key, each a line of a file. Lines are only appended, never rewritten.

    Args:
        path: the file; created with the first result.
        settings: settings that the results depend on; a journal of other settings is refused.

    Raises:
        ShortVError: if the file holds results of other settings; the message names the differences.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings, self.results = path, json.loads(json.dumps(settings)), {}
        lines = [entry for _, entry in read_record(path)]
        self.head = [] if lines else [self.settings]  # written before the first result
        for begun in lines[:1]:
            for key in sorted({*begun, *self.settings}):
                if begun.get(key) != self.settings.get(key):
                    raise ShortVError(
                        f"{path}: an unfinished calibration with {key} {begun.get(key)!r}, "
                        f"not {self.settings.get(key)!r}, lies there; repeat that command, or remove the file"
                    )
        for result in lines[1:]:
            self.results |= result

    def add(self, key: str, value) -> None:
        """Append a result to the file."""
        self.results[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        add_to_record(self.path, [*self.head, {key: value}])
        self.head = []
