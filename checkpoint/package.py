"""Package folders: their files, and how a package is made from a LLaVA checkpoint.

Weights are linked or copied unchanged, never loaded and saved again, so tensors keep the names that all engines know.
Only checkpoints in the original LLaVA layout are converted.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shortv_llava import OTHER_FAMILIES
from shortv_llava.checkpoint.checks import check_model, check_pictures, model_without_weights
from shortv_llava.checkpoint.config import CORRECTION, MODEL_TYPES, config_object, package_config, read_config
from shortv_llava.checkpoint.processors import copy_files, write_processor
from shortv_llava.checkpoint.source import CARD_FILE, OTHER_PATTERNS, TERMS_PATTERNS, convert_checkpoint
from shortv_llava.errors import ShortVError
from shortv_llava.files.json_files import read_json, write_json
from shortv_llava.files.outputs import check_folder, link_or_copy, replacing

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]  # of the files that are published unchanged
EVALUATION_FILE = "evaluation.json"  # scores, for the card
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
CORRECTION_FILE = "correction.safetensors"  # fitted corrections, beside the base's files
SHARD = "model-00001-of-00001.safetensors"  # new name of a base's single file: model.safetensors would hide an index
# Settings to reset if layers are given by hand: the old calibration does not describe these layers.
BY_HAND = {"replaced_attention_layers": [], "replaced_ffn_layers": [], "lc_scores": None, "calibration": None}
BY_HAND |= {"corrections": {}}


def code_files(model_type: str) -> list[str]:
    """Names of the code files of a package with one of ShortV's model types."""
    from transformers.dynamic_module_utils import get_relative_import_files

    family = model_type.removeprefix("shortv_")
    own = ROOT / f"modeling_shortv_{family if family in OTHER_FAMILIES else 'llava'}.py"
    return sorted({own.name, *(Path(name).name for name in get_relative_import_files(own))})


def check_output(output: Path, overwrite: bool, base: Path | None = None) -> None:
    """Before any work, refuse an output folder that must not or cannot be written, see [`check_folder`]."""
    try:
        is_package = read_config(output)["model_type"] in MODEL_TYPES.values()
    except (ShortVError, OSError):  # reported below
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

    Model and processor are checked before any weights are copied. Corrections of processor files are logged as
    warnings.

    Args:
        base: a checkpoint in the Hugging Face layout; one in the original LLaVA layout is converted, an adapter merged.
        weights: whether the package holds the weights; if not, `push` copies them from the base.
        base_model: Hub id of the base, for the model card; known for a folder of the Hub's cache.
        license: licence of the weights, for the model card, if the base names none.
        vision_tower, base_weights: as for [`find_checkpoint`].
        chat_template, image_aspect_ratio: settings of the package's processor, see [`write_processor`].
        corrections: tensors of fitted corrections, by name; they replace corrections of the base.
        write_more: writes further files into the temporary folder, before the model card is made.

    Raises:
        ShortVError: if the base is no supported checkpoint with weights (safetensors if there are corrections), could
            not answer, or the output must not be written.
        ValueError: if the layers do not fit the model.
        OSError: if writing fails; no output is left then.
    """
    from shortv_llava.hub.card import write_card
    from shortv_llava.hub.metadata import base_metadata

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
        copy_files(ROOT, staging, code_files(entries["model_type"]))
        if write_more is not None:
            write_more(staging)
        write_card(staging, output.resolve().name, card, **base_metadata(base, base_model, license))


def _checked(
    base: Path, output: Path, overwrite: bool, weights: bool, with_corrections: bool, settings: dict
) -> tuple[dict | None, Any, Any]:
    """Check [`write_package`]'s arguments before any long work.

    Returns:
        The entries of config.json, None for a checkpoint that must be converted; the card of the package that is
        replaced; the model on the meta device, None for a checkpoint that must be converted.
    """
    from shortv_llava.checkpoint.conversion import is_original, must_convert

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
    from shortv_llava.hub.metadata import read_card

    card = read_card(output / CARD_FILE)
    if card and card.data.eval_results:
        measured = ", ".join(dict.fromkeys(result.dataset_name for result in card.data.eval_results))
        logger.warning(f"{output}: scores on {measured} are left out, the package before had them; evaluate again")
        card.data.eval_results = card.data.model_name = None
    return card


def _put_processor(
    base: Path, source: Path, target: Path, model, chat_template: str | None, image_aspect_ratio: str
) -> None:
    """Write the processor of `source` into `target`, check it with the model, and log corrections of its files."""
    processor, notes = write_processor(source, target, model.config, chat_template, image_aspect_ratio)
    if processor is not None:
        check_pictures(base, model, processor)
    for note in notes:
        logger.warning(f"{base}: {note}")


def _put_weights(base: Path, target: Path, weights: bool) -> None:
    """Link or copy the weights of a checkpoint; without `weights` only their index."""
    from shortv_llava.checkpoint.tensors import weight_files, weight_index

    for path in weight_files(base) if weights else ():
        link_or_copy(path, target / path.name)
    if index := weight_index(base):
        shutil.copyfile(index, target / index.name)


def put_corrections(folder: Path, tensors: dict[str, Any]) -> None:
    """Add tensors to the weights of a folder, in a separate file and in the index.

    Args:
        tensors: by name relative to the language model, such as `layers.3.correction.up.bias`; the file's names begin
            as those of the folder's weights do.

    Raises:
        ShortVError: if the weights are not in safetensors files.
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
    (folder / CORRECTION_FILE).unlink(missing_ok=True)  # the base's corrections
    if tensors:
        known = "layers.0.input_layernorm.weight"  # of the language model alone
        before = next(name.removesuffix(known) for name in found["weight_map"] if name.endswith(known))
        tensors = {before + name: tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / CORRECTION_FILE, {"format": "pt"})
    kept = {name: file for name, file in found["weight_map"].items() if file != CORRECTION_FILE}
    found["weight_map"] = kept | dict.fromkeys(tensors, CORRECTION_FILE)
    found.get("metadata", {}).pop("total_size", None)  # the base's size
    write_json(index, found)
    if tensors:
        shutil.copymode(index, folder / CORRECTION_FILE)  # safetensors writes files that their owner alone can read
