"""Find a checkpoint: a local folder, a download from the Hub, or a converted copy."""

import atexit
import logging
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from shortv_llava.checkpoint.processors import (
    PROCESSOR_PATTERNS,
    copy_files,
)
from shortv_llava.errors import ShortVError, one_line
from shortv_llava.hub.errors import hub_reason

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
# Files of an adapter; mm_projector.bin, LLaVA's projector alone, is no adapter and gets its own message.
ADAPTER_PATTERNS = ("adapter_config.json", "adapter_model.*", "non_lora_trainables.bin", "mm_projector.bin")
INDEX_PATTERNS = ("*.safetensors.index.json", "pytorch_model.bin.index.json")
TERMS_PATTERNS = ("LICENSE*", "NOTICE*")
OTHER_PATTERNS = ("generation_config.json", *TERMS_PATTERNS)  # beside configuration, weights and processor


def find_checkpoint(base: str, vision_tower: str | None = None, base_weights: str | None = None) -> Path:
    """The local folder of a checkpoint in the Hugging Face layout: `base` itself, or the download of a Hub id.

    A checkpoint in the original LLaVA layout is converted, and an adapter merged, into a folder that is deleted when
    the process ends.

    Args:
        base: a folder, or a Hub id with or without `@revision`.
        vision_tower: folder or Hub id of an original checkpoint's tower; by default the one its config.json names.
        base_weights: folder or Hub id of an adapter's base; by default the one its adapter_config.json names.

    Raises:
        ShortVError: if there is no such folder, the download fails, or it cannot be converted.
    """
    from huggingface_hub import cached_assets_path

    from shortv_llava.checkpoint.conversion import must_convert

    folder = fetch_checkpoint(base)
    if not must_convert(folder):
        return folder
    # Next to the Hub's cache, which has room for models; /tmp is often in memory.
    temporary = tempfile.TemporaryDirectory(dir=cached_assets_path("shortv_llava"))
    atexit.register(temporary.cleanup)
    # The end of the path is kept: in the Hub's cache it names the repository, see `hub_id`.
    converted = Path(temporary.name, *folder.absolute().parts[-3:])
    converted.mkdir(parents=True)
    convert_checkpoint(folder, converted, vision_tower, base_weights)
    copy_files(folder, converted, (CARD_FILE, *TERMS_PATTERNS))
    return converted


def check_name(base: str) -> None:
    """Raises [`ShortVError`] if `base` is no folder and does not have the form of a Hub id."""
    if Path(base).is_dir():
        return
    repo_id, _ = split_revision(base)
    if Path(base).is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or base.startswith("."):
        raise ShortVError(f"{base}: no such folder, and no Hub id (owner/name) either")


def model_name(base: str) -> str:
    """The name of a model: its Hub id, or its folder's name."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def fetch_checkpoint(base: str, weights: bool = True) -> Path:
    """The local folder of a checkpoint in either layout, unchanged; weights are downloaded only with `weights`.

    Raises:
        ShortVError: if there is no such folder, or the download fails.
    """
    check_name(base)
    if Path(base).is_dir():
        return Path(base)
    repo_id, revision = split_revision(base)
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    from shortv_llava.checkpoint.tensors import SINGLE_WEIGHT_FILES, listed_shards

    def download(revision: str | None, names: list[str]) -> Path:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=names))

    others = ["config.json", CARD_FILE, *INDEX_PATTERNS, *OTHER_PATTERNS, *PROCESSOR_PATTERNS]
    with one_line(lambda error: f"{base}: no such folder, and not to be had from the Hub: {hub_reason(error)}"):
        folder = download(revision, others)
        for name in SINGLE_WEIGHT_FILES if weights else ():  # only those that transformers would load
            with suppress(EntryNotFoundError):
                hf_hub_download(repo_id, name, revision=folder.name)
                break
            if (folder / f"{name}.index.json").is_file():
                download(folder.name, [path.name for path in listed_shards(folder / f"{name}.index.json")])
                break
        else:
            if weights:
                download(folder.name, [*ADAPTER_PATTERNS])
        return folder


def fetch_part(checkpoint: Path, part: Path | str | None, what: str, hint: str, weights: bool = True) -> Path:
    """The local folder of a part that a checkpoint lacks, such as its vision tower; see [`fetch_checkpoint`].

    Args:
        part: folder or Hub id of the part, from the checkpoint or the user.
        what: what the part is, for the error.
        hint: how to give the part, for the error.

    Raises:
        ShortVError: if `part` is None or cannot be fetched.
    """
    if not part or not isinstance(part, (str, Path)):
        raise ShortVError(f"{checkpoint}: does not name its {what}; {hint}")
    try:
        return fetch_checkpoint(str(part), weights)
    except ShortVError as error:
        raise ShortVError(f"{checkpoint}: its {what} cannot be had ({error}); {hint}") from error


def split_revision(base: str) -> tuple[str, str | None]:
    """Id and revision of `owner/name@revision`; the revision may be left out."""
    repo_id, _, revision = base.partition("@")
    return repo_id, revision or None


def hub_id(folder: Path) -> str | None:
    """Hub id of a folder in the Hub's cache, `models--OWNER--NAME/snapshots/COMMIT`; None for other folders."""
    repository, snapshots, _ = ("", "", "", *folder.absolute().parts)[-3:]
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def convert_checkpoint(source: Path, output: Path, vision_tower: str | None, base_weights: str | None) -> None:
    """Convert an original LLaVA checkpoint, or merge an adapter, into the folder `output`."""
    from shortv_llava.checkpoint.conversion import convert

    for note in convert(source, output, vision_tower, base_weights):
        logger.warning(note)
