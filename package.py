"""Package folders: what one holds, how it is made from a LLaVA checkpoint, and how it is loaded.

Weights are linked or copied as they are, never loaded and saved again, so that their tensors keep the names that
every engine knows.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from shortv_llava.errors import ShortVError

CODE_FILES = ("configuration_shortv_llava.py", "modeling_shortv_llava.py")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
# Processor, tokenizer, generation settings and the base model's terms.
OTHER_PATTERNS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
MODEL_TYPES = {"llava": "shortv_llava", "llava_next": "shortv_llava_next"}


class PublishedModel(NamedTuple):
    """A model of the paper: its checkpoint's two ids and its layers in order of replacement."""

    original_id: str
    hf_id: str
    replaced_layers: tuple[int, ...]


PUBLISHED = {
    "llava-1.5-7b": PublishedModel(
        "liuhaotian/llava-v1.5-7b",
        "llava-hf/llava-1.5-7b-hf",
        (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19),
    ),
    "llava-1.5-13b": PublishedModel(
        "liuhaotian/llava-v1.5-13b",
        "llava-hf/llava-1.5-13b-hf",
        (39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),
    ),
    "llava-next-7b": PublishedModel(
        "liuhaotian/llava-v1.6-vicuna-7b",
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        (31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2),
    ),
    "llava-next-13b": PublishedModel(
        "liuhaotian/llava-v1.6-vicuna-13b",
        "llava-hf/llava-v1.6-vicuna-13b-hf",
        (39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2, 28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17),
    ),
}


def parse_layers(spec: str, base: str) -> list[int]:
    """Layer ids from `31,29,30`, `none`, `published` (those of `base`, a Hub id) or `published:NAME`.

    Raises:
        ShortVError: if the model is no published one or an entry is no integer.
    """
    if spec.strip() in ("", "none"):
        return []
    source, _, name = spec.partition(":")
    if source == "published":
        for known, model in PUBLISHED.items():
            if (name or base) in (known, model.original_id, model.hf_id):
                return list(model.replaced_layers)
        hint = "" if name else f"; name one for a local copy or a fine-tune, such as published:{next(iter(PUBLISHED))}"
        raise ShortVError(f"no layers are published for {name or base!r}, only for {', '.join(PUBLISHED)}{hint}")
    try:
        return [int(entry) for entry in spec.split(",")]
    except ValueError:
        raise ShortVError(f"layers must be published, none or ids separated by commas, got {spec!r}") from None


def find_checkpoint(base: str) -> Path:
    """The local folder of a checkpoint: `base` itself, or the download of a Hub id.

    Raises:
        ShortVError: if there is no such folder, or the Hub does not give it.
    """
    if Path(base).is_dir():
        return Path(base)
    if Path(base).is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", base) or base.startswith("."):
        raise ShortVError(f"{base}: no such folder, and no Hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["config.json", *WEIGHT_PATTERNS, *OTHER_PATTERNS]))
    except Exception as error:  # the client's errors differ by version and transport
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ShortVError(f"{base}: no such folder, and not to be had from the Hub ({reason})") from error


def read_config(folder: Path) -> dict:
    """The config.json of a LLaVA checkpoint or package, as written there.

    Raises:
        ShortVError: if there is none, or it is another model's.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShortVError(f"{folder}: no checkpoint, there is no config.json in it") from None
    except (ValueError, OSError) as error:
        raise ShortVError(f"{path}: cannot be read as JSON ({error})") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    supported = [*MODEL_TYPES, *MODEL_TYPES.values()]
    if model_type not in supported:
        raise ShortVError(f"{folder}: no LLaVA checkpoint (model_type {model_type!r}; supported: {', '.join(supported)})")
    return config


def package_config(base_config: dict, **settings) -> dict:
    """The config.json of a package: the base's entries, kept as they are, and ShortV's.

    Raises:
        ValueError: if the layers or scores do not fit the model.
    """
    from shortv_llava import ShortVLlavaConfig, ShortVLlavaNextConfig

    model_type = MODEL_TYPES.get(base_config["model_type"], base_config["model_type"])
    config_class = next(c for c in (ShortVLlavaConfig, ShortVLlavaNextConfig) if c.model_type == model_type)
    entries = base_config | settings | {"model_type": model_type}
    config = config_class.from_dict(json.loads(json.dumps(entries)))  # checks; reading changes the entries
    own = ("replaced_layers", "replaced_attention_layers", "replaced_ffn_layers", "lc_scores", "calibration", "auto_map")
    return (
        entries
        | {key: getattr(config, key) for key in own}
        | {"architectures": [config.auto_map["AutoModel"].split(".")[-1]]}
    )


def check_output(output: Path, overwrite: bool, base: Path | None = None) -> None:
    """Refuse, before any work, an output folder that must not or cannot be written.

    Raises:
        ShortVError: if it holds something, unless that is a package and `overwrite` is set, or if it is the base.
        OSError: if its parent cannot be made or written.
    """
    if base is not None and output.resolve() == base.resolve():
        raise ShortVError(f"{output}: the output is the base itself; give another folder")
    if output.exists() and not output.is_dir():
        raise ShortVError(f"{output}: is a file; give a folder")
    if output.is_dir() and any(output.iterdir()):
        try:
            is_package = read_config(output)["model_type"] in MODEL_TYPES.values()
        except ShortVError:
            is_package = False
        if not is_package:
            raise ShortVError(f"{output}: holds files that are no package; give a new or empty folder")
        if not overwrite:
            raise ShortVError(f"{output}: holds a package already; give another folder or --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise ShortVError(f"{output.parent}: no permission to write; give another folder")


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block ends well, and goes when it does not."""
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if output.exists():
            old = staging.with_name(staging.name + "-old")
            os.rename(output, old)
            os.rename(staging, output)
            shutil.rmtree(old)
        else:
            os.rename(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link, or copy where the file system has none. A download's symbolic links are followed."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def write_package(base: Path, output: Path, overwrite: bool = False, **settings) -> None:
    """Make the package `output` from the checkpoint `base`, with ShortV's `settings` in config.json.

    Raises:
        ShortVError: if the base is no LLaVA checkpoint with weights, or the output must not be written.
        ValueError: if the layers do not fit the model.
        OSError: if writing fails; nothing is left then.
    """
    config = package_config(read_config(base), **settings)
    check_output(output, overwrite, base)
    weights = matching(base, WEIGHT_PATTERNS)
    if not weights:
        raise ShortVError(f"{base}: there are no weight files ({', '.join(WEIGHT_PATTERNS)}) in it")
    with replacing(output) as staging:
        for path in weights:
            link_or_copy(path, staging / path.name)
        for path in matching(base, OTHER_PATTERNS):
            shutil.copyfile(path, staging / path.name)
        for name in CODE_FILES:
            shutil.copyfile(Path(__file__).parent / name, staging / name)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def load_model(folder: Path, **kwargs):
    """The ShortV model of a checkpoint or package folder; a plain LLaVA has no frozen layers.

    Args:
        kwargs: of `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        ShortVError: if the folder is none of the kind, or tensors are missing or left over.
    """
    from shortv_llava import ShortVLlavaForConditionalGeneration, ShortVLlavaNextForConditionalGeneration

    is_next = "next" in read_config(folder)["model_type"]
    model_class = ShortVLlavaNextForConditionalGeneration if is_next else ShortVLlavaForConditionalGeneration
    config = model_class.config_class.from_pretrained(folder)
    model, info = model_class.from_pretrained(folder, config=config, output_loading_info=True, **kwargs)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            first = sorted(map(str, info[kind]))[0]
            raise ShortVError(f"{folder}: {len(info[kind])} {kind.replace('_', ' ')} in the weights, such as {first}")
    return model.eval()


def load_processor(folder: Path):
    """The processor of a checkpoint or package folder.

    Raises:
        ShortVError: if there is none, or it has no chat template.
    """
    from transformers import AutoConfig, AutoProcessor

    from shortv_llava import ShortVLlavaConfig, ShortVLlavaNextConfig

    for config_class in (ShortVLlavaConfig, ShortVLlavaNextConfig):  # else a package's own code would be asked for
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    if not (folder / "tokenizer_config.json").exists():
        raise ShortVError(f"{folder}: has no tokenizer; copy the processor files of the base model there")
    processor = AutoProcessor.from_pretrained(folder)
    if not getattr(processor, "chat_template", None):
        raise ShortVError(f"{folder}: has no chat template; put chat_template.jinja there")
    return processor
