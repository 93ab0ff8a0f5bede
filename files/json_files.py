"""Read JSON files that others wrote; an error is one line that names the file."""

import json
from pathlib import Path
from typing import Any

from shortv_llava.errors import ShortVError, first_line, reason


def parse_json(data: bytes, where: str) -> Any:
    """The value of `data`, JSON in UTF-8.

    Args:
        where: source of the data, for the error.

    Raises:
        ShortVError: if it is no JSON, nested too deeply, or has a lone surrogate, which tokenizers do not accept.
    """
    try:
        value = json.loads(data.decode())
        if rb"\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise ShortVError(f"{where}: is no UTF-8; save it as UTF-8") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ShortVError(f"{where}: holds {half}, half a character; write the whole one") from None
    except RecursionError:
        raise ShortVError(f"{where}: is nested too deeply; correct it") from None
    except ValueError as error:
        raise ShortVError(f"{where}: is not JSON ({first_line(error)}); correct it") from None
    return value


def read_json(path: Path, kind: type[dict] | type[list] = dict) -> Any:
    """The object or array in a file.

    Raises:
        ShortVError: if the file cannot be read or holds something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShortVError(f"{path}: cannot be read ({reason(error)}); get the file again") from error
    content = parse_json(data, str(path))
    if not isinstance(content, kind):
        raise ShortVError(f"{path}: holds no JSON {'object' if kind is dict else 'array'}; get the file again")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
