"""Package folders: what one holds, how it is made from a LLaVA checkpoint, and how it is loaded.

Weights are linked or copied as they are, never loaded and saved again, so that their tensors keep the names that
every engine knows. Only checkpoints in the original LLaVA layout are converted.
"""

import atexit
import copy
import errno
import functools
import importlib.util
import inspect
import logging
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from shortv_llava.errors import ShortVError, first_line
from shortv_llava.json_files import read_json, write_json
from shortv_llava.outputs import check_folder, link_or_copy, replacing
from shortv_llava.processors import PROCESSOR_PATTERNS, copy_files, load_processor, process_probe, write_processor

logger = logging.getLogger(__name__)

CODE_FILES = ("configuration_shortv_llava.py", "modeling_shortv_llava.py")
CARD_FILE = "README.md"
EVALUATION_FILE = "evaluation.json"  # scores, for the card
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
# What an adapter consists of, and LLaVA's projector alone, which is told apart.
ADAPTER_PATTERNS = ("adapter_config.json", "adapter_model.*", "non_lora_trainables.bin", "mm_projector.bin")
INDEX_PATTERNS = ("*.safetensors.index.json", "pytorch_model.bin.index.json")
TERMS_PATTERNS = ("LICENSE*", "NOTICE*")
OTHER_PATTERNS = ("generation_config.json", *TERMS_PATTERNS)  # beside configuration, weights and processor
CORRECTION_FILE = "correction.safetensors"  # what is fitted, beside the base's files
SHARD = "model-00001-of-00001.safetensors"  # the base's single file's name beside an index, which it would hide
LAYERS_VARIABLE = "REPLACED_LAYERS"  # as in the authors' release
STOCK_TYPES = ("llava", "llava_next", "vipllava", "llava_onevision", "llava_next_video")
MODEL_TYPES = {stock: f"shortv_{stock}" for stock in STOCK_TYPES}
# The configuration's lists, and what each freezes of a layer.
LAYER_LISTS = {"replaced_layers": "layer", "replaced_attention_layers": "attention", "replaced_ffn_layers": "FFN"}
OWN_KEYS = (*LAYER_LISTS, "lc_scores", "calibration", "auto_map")  # of config.json, beyond its base's
# What a package was made with before goes where layers are given by hand: they are not what it tells of.
BY_HAND = {"replaced_attention_layers": [], "replaced_ffn_layers": [], "lc_scores": None, "calibration": None}
BY_HAND |= {"corrections": {}}
CORRECTION = ("correction_rank", "corrected_layers")  # likewise, of a package with corrections
LOADING_FAULTS = {  # as transformers reports them, and in words
    "missing_keys": "{} missing keys in the weights",
    "unexpected_keys": "{} unexpected keys in the weights",
    "mismatched_keys": "its weights do not fit its config.json, {} by their shape",
}


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


def find_checkpoint(base: str, vision_tower: str | None = None, base_weights: str | None = None) -> Path:
    """The local folder of a checkpoint in the Hugging Face layout: `base` itself, or the download of a Hub id.

    A checkpoint in the original LLaVA layout is converted, an adapter merged, into a folder that goes when the process
    ends.

    Args:
        base: a folder, or a Hub id with or without `@revision`.
        vision_tower: of an original checkpoint, folder or Hub id; by default the one its config.json names.
        base_weights: of an adapter, folder or Hub id; by default the one its adapter_config.json names.

    Raises:
        ShortVError: if there is no such folder, the Hub does not give it, or it cannot be converted.
    """
    from huggingface_hub import cached_assets_path

    from shortv_llava.conversion import must_convert

    folder = fetch_checkpoint(base)
    if not must_convert(folder):
        return folder
    # Beside the Hub's cache, where there is room for models; /tmp is often in memory.
    temporary = tempfile.TemporaryDirectory(dir=cached_assets_path("shortv_llava"))
    atexit.register(temporary.cleanup)
    # The end of the path is kept: in the Hub's cache it names the repository, see `hub_id`.
    converted = Path(temporary.name, *folder.absolute().parts[-3:])
    converted.mkdir(parents=True)
    convert_checkpoint(folder, converted, vision_tower, base_weights)
    copy_files(folder, converted, (CARD_FILE, *TERMS_PATTERNS))
    return converted


def check_name(base: str) -> None:
    """Raises [`ShortVError`] for what is neither a folder nor, by its form, a Hub id."""
    if Path(base).is_dir():
        return
    repo_id, _ = split_revision(base)
    if Path(base).is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or base.startswith("."):
        raise ShortVError(f"{base}: no such folder, and no Hub id (owner/name) either")


def model_name(base: str) -> str:
    """What a model is called by: its Hub id, or its folder's name."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def fetch_checkpoint(base: str, weights: bool = True) -> Path:
    """The local folder of a checkpoint in either layout, as it is; from the Hub without its weights if so wanted.

    Raises:
        ShortVError: if there is no such folder, or the Hub does not give it.
    """
    check_name(base)
    if Path(base).is_dir():
        return Path(base)
    repo_id, revision = split_revision(base)
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    from shortv_llava.tensors import SINGLE_WEIGHT_FILES, listed_shards

    def download(revision: str | None, names: list[str]) -> Path:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=names))

    others = ["config.json", CARD_FILE, *INDEX_PATTERNS, *OTHER_PATTERNS, *PROCESSOR_PATTERNS]
    try:
        folder = download(revision, others)
        for name in SINGLE_WEIGHT_FILES if weights else ():  # those that transformers would load, and no others
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
    except ShortVError:
        raise
    except Exception as error:  # the client's errors differ by version and transport
        raise ShortVError(f"{base}: no such folder, and not to be had from the Hub: {hub_reason(error)}") from error


def fetch_part(checkpoint: Path, part: Path | str | None, what: str, hint: str, weights: bool = True) -> Path:
    """The local folder of what a checkpoint lacks and names, or what was given in its place, as [`fetch_checkpoint`].

    Args:
        part: a folder or Hub id.
        what: it is, and `hint` how to give it, for the error.

    Raises:
        ShortVError: if it is not named or cannot be had.
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
    """Hub id of a folder in the Hub's cache, `models--OWNER--NAME/snapshots/COMMIT`; of others none."""
    repository, snapshots, _ = ("", "", "", *folder.absolute().parts)[-3:]
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def hub_reason(error: BaseException) -> str:
    """Why the Hub did not do as asked and what to do about it, in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):  # the client's own, as of a card
        return textwrap.shorten(str(error), 300, placeholder=" ...")
    causes = [error]  # an answer is often wrapped in what the client was about to do
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    answer = next((cause for cause in causes if getattr(cause, "response", None) is not None), None)
    texts = [str(cause) for cause in causes]
    if any(re.search("xet-(read|write)-token", text) and re.search(r"\b(404|405|501)\b", text) for text in texts):
        return "this Hub does not speak Xet; set HF_HUB_DISABLE_XET=1 and run this again"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE is set; unset it and run this again"
    if any(getattr(cause, "errno", None) == errno.ENOSPC for cause in causes):
        return "there is no space left on this machine's disk; make room and run this again"
    if answer is None:
        reason = re.sub(r"\?\S+", "", first_line(causes[-1]))  # links to the storage are signed
        return f"{reason}; check the connection to the Hub and run this again"
    status, said = answer.response.status_code, getattr(answer, "server_message", None)
    said = f"{status}: {' '.join(said.split())}" if said else f"{status}"
    if isinstance(answer, GatedRepoError):
        return "it is gated; ask for access on its page, then run this again"
    if isinstance(answer, RepositoryNotFoundError):
        return "no such repository, or the token may not see it; check the id, and the token with `hf auth whoami`"
    if isinstance(answer, RevisionNotFoundError):
        return "there is no such revision; check its name"
    if status == 401:
        return "the token is not accepted; run `hf auth login` or set HF_TOKEN"
    if status == 403:
        return f"no permission ({said}); use a token that may write there"
    if status in (409, 412):
        return "it is being changed by someone else; run this again"
    if status == 429:
        seconds = answer.response.headers.get("Retry-After", "")
        return f"too many requests; run this again in {f'{seconds} seconds' if seconds.isdigit() else 'a few minutes'}"
    if status in (405, 501):
        return f"this Hub does not offer that ({said}); check HF_ENDPOINT, or use huggingface.co"
    if status >= 500:
        return f"the Hub failed ({said}); run this again"
    return f"the Hub refused ({said})"


def read_config(folder: Path) -> dict:
    """The config.json of a LLaVA checkpoint or package, as written there.

    Raises:
        ShortVError: if there is none, or it is another model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ShortVError(f"{folder}: no checkpoint, there is no config.json in it")
    config = read_json(path)
    model_type = config.get("model_type")
    supported = [*MODEL_TYPES, *MODEL_TYPES.values()]
    if model_type not in supported:
        known = ", ".join(supported)
        raise ShortVError(f"{folder}: no LLaVA checkpoint (model_type {model_type!r}; supported: {known})")
    return config


def _own_type(entries: dict) -> str:
    """ShortV's model type for a config.json's entries, those of a plain LLaVA or of a package."""
    return MODEL_TYPES.get(entries["model_type"], entries["model_type"])


def _model_class(model_type: str) -> type:
    """The class of models of one of ShortV's types."""
    from shortv_llava import MODEL_CLASSES

    return next(c for c in MODEL_CLASSES if c.config_class.model_type == model_type)


def config_object(entries: dict):
    """The ShortV configuration of a config.json's entries; those of a plain LLaVA have no frozen layers.

    Raises:
        ValueError: if the layers or scores do not fit the model.
    """
    from shortv_llava import CONFIG_CLASSES

    model_type = _own_type(entries)
    config_class = next(c for c in CONFIG_CLASSES if c.model_type == model_type)
    return config_class.from_dict(copy.deepcopy(entries | {"model_type": model_type}))  # reading changes them


def package_config(base_config: dict, **settings) -> dict:
    """The config.json of a package: the base's entries, kept as they are, and ShortV's.

    Raises:
        ValueError: if the layers or scores do not fit the model.
    """
    entries = base_config | settings
    config = config_object(entries)
    own = OWN_KEYS + CORRECTION if config.correction_rank else OWN_KEYS
    return (
        entries
        | {"model_type": config.model_type}
        | {key: getattr(config, key) for key in own}
        | {"architectures": [config.auto_map["AutoModel"].split(".")[-1]]}
    )


def check_output(output: Path, overwrite: bool, base: Path | None = None) -> None:
    """Refuse, before any work, an output folder that must not or cannot be written, see [`check_folder`]."""
    try:
        is_package = read_config(output)["model_type"] in MODEL_TYPES.values()
    except (ShortVError, OSError):  # which is told below
        is_package = False
    check_folder(output, overwrite, is_package, base)


def write_package(
    base: Path,
    output: Path,
    overwrite: bool = False,
    *,
    weights: bool = True,
    base_model: str | None = None,
    license: str | None = None,
    vision_tower: str | None = None,
    base_weights: str | None = None,
    chat_template: str | None = None,
    image_aspect_ratio: str = "base",
    corrections: dict[str, Any] | None = None,
    write_more: Callable[[Path], None] | None = None,
    **settings,
) -> None:
    """Make the package `output` from the checkpoint `base`, with ShortV's `settings` in config.json.

    Model and processor are tried before any weights are copied. What was put right is told as warnings.

    Args:
        base: a checkpoint in the Hugging Face layout; one in the original LLaVA layout is converted, an adapter merged.
        weights: whether the package holds them; if not, they are copied from the base when it is pushed.
        base_model: Hub id of the base, for the model card; known for a folder of the Hub's cache.
        license: of the weights, for the model card, where the base does not tell.
        vision_tower, base_weights: as for [`find_checkpoint`].
        chat_template, image_aspect_ratio: of the package's processor, see [`write_processor`].
        corrections: tensors of fitted corrections, by name, in place of those that the base may have.
        write_more: writes further files into the folder before it takes its place; the model card knows of them.

    Raises:
        ShortVError: if the base is no LLaVA checkpoint with weights, of safetensors for corrections, could not answer,
            or the output must not be written.
        ValueError: if the layers do not fit the model.
        OSError: if writing fails; nothing is left then.
    """
    from shortv_llava.model_card import base_metadata, write_card

    entries, card, model = _checked(base, output, overwrite, weights, corrections is not None, settings)
    converted = model is None
    with replacing(output) as staging:
        if converted:
            convert_checkpoint(base, staging, vision_tower, base_weights)
            entries = package_config(read_config(staging), **settings)
            model = model_without_weights(base, config_object(entries))
        write_json(staging / "config.json", entries)
        _put_processor(base, staging if converted else base, staging, model, chat_template, image_aspect_ratio)
        copy_files(base, staging, TERMS_PATTERNS if converted else OTHER_PATTERNS)
        if not converted:
            _put_weights(base, staging, weights)
        if corrections or (corrections is not None and (staging / CORRECTION_FILE).exists()):
            put_corrections(staging, corrections)
        copy_files(Path(__file__).parent, staging, CODE_FILES)
        if write_more is not None:
            write_more(staging)
        write_card(staging, output.resolve().name, card, **base_metadata(base, base_model, license))


def _checked(
    base: Path, output: Path, overwrite: bool, weights: bool, with_corrections: bool, settings: dict
) -> tuple[dict | None, Any, Any]:
    """What can be wrong with [`write_package`]'s arguments, told before any long work.

    Returns:
        The entries of config.json, None for a checkpoint that is to be converted; the card of the package that is
        replaced; the model on the meta device, None as the first.
    """
    from shortv_llava.conversion import is_original, must_convert

    original, entries = is_original(base), None
    if must_convert(base) and not weights:
        kind = "its layout is LLaVA's own" if original else "is an adapter"
        raise ShortVError(f"{base}: {kind}, whose weights are converted; leave out --no-weights")
    if original:  # only the layers can be checked
        known = read_json(base / "config.json")
        text_config = {key: known[key] for key in ("num_hidden_layers",) if key in known}
        package_config({"model_type": "llava", "text_config": text_config}, **settings)
    elif not must_convert(base):
        known = read_config(base)
        if with_corrections:
            known = {key: value for key, value in known.items() if key not in CORRECTION}
        entries = package_config(known, **settings)
    check_output(output, overwrite, base)
    card = _card_before(output)
    return entries, card, None if entries is None else check_model(base, entries, weights)


def _card_before(output: Path):
    """The card of the package that is replaced, without its scores."""
    from shortv_llava.model_card import read_card

    card = read_card(output / CARD_FILE)
    if card and card.data.eval_results:
        measured = ", ".join(dict.fromkeys(result.dataset_name for result in card.data.eval_results))
        logger.warning(f"{output}: scores on {measured} are left out, the package before had them; evaluate again")
        card.data.eval_results = card.data.model_name = None
    return card


def _put_processor(
    base: Path, source: Path, target: Path, model, chat_template: str | None, image_aspect_ratio: str
) -> None:
    """Write the processor of `source` into `target` and try it with the model; tell what was put right in the base."""
    processor, notes = write_processor(source, target, model.config, chat_template, image_aspect_ratio)
    if processor is not None:
        check_pictures(base, model, processor)
    for note in notes:
        logger.warning(f"{base}: {note}")


def _put_weights(base: Path, target: Path, weights: bool) -> None:
    """Link or copy the weights of a checkpoint, or where they come later their index alone."""
    from shortv_llava.tensors import weight_files, weight_index

    for path in weight_files(base) if weights else ():
        link_or_copy(path, target / path.name)
    if index := weight_index(base):
        shutil.copyfile(index, target / index.name)


def put_corrections(folder: Path, tensors: dict[str, Any]) -> None:
    """Put tensors beside the weights of a folder, in a file of their own and in the index.

    Raises:
        ShortVError: if the weights are no safetensors.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        found = read_json(index)
    elif single.is_file():
        single.rename(folder / SHARD)
        with safe_open(folder / SHARD, framework="pt") as file:
            found = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), SHARD)}
    else:
        raise ShortVError(
            "corrections go beside safetensors, and the base's weights are .bin files: convert those first"
        )
    (folder / CORRECTION_FILE).unlink(missing_ok=True)  # the base's
    if tensors:
        save_file(tensors, folder / CORRECTION_FILE, {"format": "pt"})
    kept = {name: file for name, file in found["weight_map"].items() if file != CORRECTION_FILE}
    found["weight_map"] = kept | dict.fromkeys(tensors, CORRECTION_FILE)
    found.get("metadata", {}).pop("total_size", None)  # the base's
    write_json(index, found)


def check_model(folder: Path, entries: dict, weights: bool = True):
    """See, before anything is copied, that a checkpoint's model can be built and its weights fit it.

    Args:
        entries: of its config.json.
        weights: whether to read them too; only their headers are.

    Returns:
        The model, on the meta device.

    Raises:
        ShortVError: if the model is none that ShortV knows, or a weight file is damaged or of another model.
    """
    model = model_without_weights(folder, config_object(entries))
    if weights:
        _check_weights(folder)
    return model


def _check_weights(folder: Path) -> None:
    """See by name and shape that the weights in a folder are those of the model that its config.json describes."""
    import torch

    from shortv_llava.tensors import unpacked_shapes, weight_files

    entries = read_config(folder)
    quantisation = entries.pop("quantization_config", None) or {}
    if not isinstance(quantisation, dict):
        raise ShortVError(f"{folder}/config.json: quantization_config must be an object")
    config = config_object(entries)
    by_bitsandbytes = quantisation.get("quant_method") == "bitsandbytes"
    shapes = _stored_shapes(folder)
    if by_bitsandbytes:
        shapes = unpacked_shapes(weight_files(folder), shapes)
    # Libraries that quantise load no weights onto the meta device, so the plain model takes tensors of these shapes.
    states = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with quiet():
        model, info = _model_class(config.model_type).from_pretrained(
            None,
            config=config,
            state_dict=states,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    info["mismatched_keys"] = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    if quantisation and not by_bitsandbytes:
        # Other libraries put parts of their own in place of a linear layer's weight, or beside it.
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        parts = {key for key in info["unexpected_keys"] if key.rpartition(".")[0] in linear}
        quantised = {f"{key.rpartition('.')[0]}.weight" for key in parts}
        info = {kind: set(info[kind]) - parts - quantised for kind in LOADING_FAULTS}
    _check_loading(folder, info)


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors by name, from the headers of its files.

    Raises:
        ShortVError: if a file that loading reads is missing, damaged or holds something else.
    """
    from shortv_llava.tensors import stored_shapes, weight_files, weight_index

    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    shapes = stored_shapes(weight_files(folder))
    if index := weight_index(folder):  # transformers 4 believes what it names
        missing = sorted(read_json(index)["weight_map"].keys() - shapes.keys())
        if missing:
            raise ShortVError(f"{index}: names {missing[0]}, which its file does not hold; get the files again")
    return shapes


def _check_loading(folder: Path, info: dict) -> None:
    """Raises ShortVError if tensors are missing, left over or of another shape, as transformers reports it."""
    for kind, fault in LOADING_FAULTS.items():
        if info[kind]:
            first = sorted(map(str, info[kind]))[0]
            raise ShortVError(f"{folder}: {fault.format(len(info[kind]))}, such as {first}; get the files again")


def model_without_weights(folder: Path, config):
    """The model of a configuration, that of the checkpoint `folder`, on the meta device.

    Raises:
        ShortVError: if it is none that ShortV knows.
    """
    import torch

    with quiet():
        try:
            with torch.device("meta"):
                return _model_class(config.model_type)(config).eval()
        except Exception as error:  # configurations of other models fail in ways that differ by version
            raise ShortVError(f"{folder}: no model can be made of its config.json ({first_line(error)})") from error


def check_pictures(folder: Path, model, processor) -> None:
    """See that the model takes a picture as the processor gives it, and makes of it what the prompt has room for.

    Args:
        folder: the checkpoint, for the message.
        model: on the meta device, so that nothing is computed but shapes.

    Raises:
        ShortVError: if it does not.
    """
    import torch

    if model.config.vision_config.model_type == "pixtral":  # computes with values, which are not there
        return
    inputs = process_probe(processor)
    num_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    pictures = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
    try:
        with torch.no_grad():
            found = model.get_image_features(**pictures | {"pixel_values": pictures["pixel_values"].to("meta")})
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # differ by version
        problem = f"the model does not take its pictures ({first_line(error)})"
    else:
        num_features = sum(len(picture.flatten(0, -2)) for picture in getattr(found, "pooler_output", found))
        if num_features == num_tokens:
            return
        problem = f"the model makes {num_features} visual tokens of a picture for which the prompt has {num_tokens}"
    raise ShortVError(
        f"{folder}: its processor does not fit config.json: {problem}; put preprocessor_config.json right"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and reports of transformers' loading; what is wrong is said in one line."""
    from transformers.utils import logging as reports

    verbosity, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity(reports.CRITICAL)
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(verbosity)
        if bars:
            reports.enable_progress_bar()


def convert_checkpoint(source: Path, output: Path, vision_tower: str | None, base_weights: str | None) -> None:
    """Convert an original LLaVA checkpoint or merge an adapter into a folder of the caller's own."""
    from shortv_llava.conversion import convert

    for note in convert(source, output, vision_tower, base_weights):
        logger.warning(note)


def load_model(folder: Path, load_in_4bit: bool = False, load_in_8bit: bool = False, **kwargs):
    """The ShortV model of a checkpoint or package folder; a plain LLaVA has no frozen layers.

    Args:
        load_in_4bit, load_in_8bit: quantise the language model through bitsandbytes, as the original code does.
        kwargs: of `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        ShortVError: if the folder is none of the kind, tensors are missing or left over, or bitsandbytes is missing.
    """
    from transformers import BitsAndBytesConfig

    if load_in_4bit or load_in_8bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ShortVError("4-bit and 8-bit loading need bitsandbytes: pip install bitsandbytes")
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype="float16" if kwargs.get("dtype", "auto") == "auto" else kwargs["dtype"],
            llm_int8_skip_modules=[
                "model.vision_tower",
                "model.multi_modal_projector",
                "lm_head",
                "correction",
                r".*\.correction",
            ],
        )
    model_class = _model_class(_own_type(read_config(folder)))
    _stored_shapes(folder)
    config = model_class.config_class.from_pretrained(folder)
    model, info = model_class.from_pretrained(folder, config=config, output_loading_info=True, **kwargs)
    _check_loading(folder, info)
    return model.eval()


@functools.cache
def cache_name() -> str:
    """The keyword argument by which models take a cache, `past_key_values` before transformers 5.24."""
    from transformers import LlamaModel

    return "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def own_device() -> dict:
    """The device map of a process among several: all on the device that accelerate has for it."""
    from accelerate import PartialState

    return {"": PartialState().device}


def leave_processes() -> None:
    """Part from the other processes, if any, at the end of a command.

    A thread of the process group that lets go of a tensor while the interpreter ends aborts the process
    (pytorch/pytorch#190489), and the launcher then reports a run as failed that has written everything.
    """
    from accelerate import PartialState

    PartialState().destroy_process_group()


class Loaded(NamedTuple):
    """What [`load`] finds. `package_layers`: the package's own three lists, whatever is replaced now."""

    model: Any
    processor: Any
    package_layers: tuple[list[int], list[int], list[int]]


def load(
    base: str,
    replaced_layers: str | None = None,
    dtype: str = "auto",
    device_map: str | None = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    image_aspect_ratio: str = "base",
) -> Loaded:
    """The model and processor of a folder or Hub id.

    The layers are those of `replaced_layers` (see [`parse_layers`]), else the package's own, else, for a plain LLaVA
    checkpoint, those of the environment variable REPLACED_LAYERS, else none. Without a device map the model goes to
    [`own_device`]. The processor is put right and perhaps pads, see [`write_processor`].

    Raises:
        ShortVError: if there is no such model, or no library to quantise it.
        ValueError: if the layers do not fit it.
    """
    folder = find_checkpoint(base)
    config = read_config(folder)
    if replaced_layers is None and config["model_type"] not in MODEL_TYPES.values():
        replaced_layers = os.environ.get(LAYERS_VARIABLE)
    layers = None if replaced_layers is None else parse_layers(replaced_layers, base)
    if layers is not None:
        package_config(config, replaced_layers=layers)  # checks them before the weights are read
    processor = load_processor(folder, image_aspect_ratio=image_aspect_ratio)
    model = load_model(folder, load_in_4bit, load_in_8bit, dtype=dtype, device_map=device_map or own_device())
    if layers is not None:
        model.set_replaced_layers(layers)
    return Loaded(model, processor, tuple(config.get(key, []) for key in LAYER_LISTS))
