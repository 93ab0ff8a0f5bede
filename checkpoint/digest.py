"""A digest of what a checkpoint computes with, by which results of other weights are told apart."""

import hashlib
from pathlib import Path

from shortv_llava.checkpoint.processors import PROCESSOR_PATTERNS, files_like
from shortv_llava.checkpoint.tensors import weight_files
from shortv_llava.files.digests import digest


def checkpoint_digest(folder: Path) -> str:
    """A digest of a checkpoint's weight and processor files. They are read whole, as they are to load the model.

    Raises:
        ShortVError: if a weight file is missing.
    """

    def content(path: Path) -> bytes:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    return digest(b"".join(map(content, [*weight_files(folder), *files_like(folder, PROCESSOR_PATTERNS)])))
