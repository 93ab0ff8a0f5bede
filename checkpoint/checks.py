"""Checks of a folder's model before anything is copied or loaded: on the meta device, from the files' headers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shortv_llava import LLAVA_FAMILIES
from shortv_llava.chat.prompts import visual_tokens
from shortv_llava.checkpoint.config import class_of, config_object, read_config
from shortv_llava.checkpoint.processors import process_probe
from shortv_llava.errors import ShortVError, first_line, one_line
from shortv_llava.files.json_files import read_json

# Families whose vision tower can run on shapes alone; those of others read values of sizes and masks. So does Pixtral.
SHAPES_ALONE = (*LLAVA_FAMILIES, "gemma3", "internvl")
LOADING_FAULTS = {  # key of transformers' report: message
    "missing_keys": "{} missing keys in the weights",
    "unexpected_keys": "{} unexpected keys in the weights",
    "mismatched_keys": "its weights do not fit its config.json, {} by their shape",
}


def check_model(folder: Path, entries: dict, weights: bool = True):
    """Check, before anything is copied, that a checkpoint's model can be built and its weights fit it.

    Args:
        entries: entries of its config.json.
        weights: whether to check the weights too; only their headers are read.

    Returns:
        The model, on the meta device.

    Raises:
        ShortVError: if ShortV does not support the model, or a weight file is damaged or belongs to another model.
    """
    model = model_without_weights(folder, config_object(entries))
    if weights:
        check_weights(folder)
    return model


def check_weights(folder: Path) -> None:
    """Check by name and shape that the weights in a folder belong to the model that its config.json describes.

    Raises:
        ShortVError: if they do not, or a weight file is damaged.
    """
    import torch

    from shortv_llava.checkpoint.tensors import unpacked_shapes, weight_files

    entries = read_config(folder)
    quantisation = entries.pop("quantization_config", None) or {}
    if not isinstance(quantisation, dict):
        raise ShortVError(f"{folder}/config.json: quantization_config must be an object")
    config = config_object(entries)
    by_bitsandbytes = quantisation.get("quant_method") == "bitsandbytes"
    shapes = stored_shapes_of(folder)
    if by_bitsandbytes:
        shapes = unpacked_shapes(weight_files(folder), shapes)
    # Quantisation libraries load no weights onto the meta device, so the unquantised model loads these shapes.
    states = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with quiet():
        model, info = class_of(config.model_type).from_pretrained(
            None,
            config=config,
            state_dict=states,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    info["mismatched_keys"] = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    if quantisation and not by_bitsandbytes:
        # Other libraries replace a linear layer's weight by tensors of their own, or add some.
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        parts = {key for key in info["unexpected_keys"] if key.rpartition(".")[0] in linear}
        quantised = {f"{key.rpartition('.')[0]}.weight" for key in parts}
        info = {kind: set(info[kind]) - parts - quantised for kind in LOADING_FAULTS}
    check_loading(folder, info)


def stored_shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors by name, from the headers of its files.

    Raises:
        ShortVError: if a weight file is missing, is damaged, or holds something else than tensors.
    """
    from shortv_llava.checkpoint.tensors import stored_shapes, weight_files, weight_index

    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    shapes = stored_shapes(weight_files(folder))
    if index := weight_index(folder):  # transformers 4 does not check its entries
        missing = sorted(read_json(index)["weight_map"].keys() - shapes.keys())
        if missing:
            raise ShortVError(f"{index}: names {missing[0]}, which its file does not hold; get the files again")
    return shapes


def check_loading(folder: Path, info: dict) -> None:
    """Raises ShortVError if transformers reports missing or unexpected tensors, or tensors of another shape."""
    for kind, fault in LOADING_FAULTS.items():
        if info[kind]:
            first = sorted(map(str, info[kind]))[0]
            raise ShortVError(f"{folder}: {fault.format(len(info[kind]))}, such as {first}; get the files again")


def model_without_weights(folder: Path, config):
    """The model of `config`, the configuration of the checkpoint `folder`, on the meta device.

    Raises:
        ShortVError: if ShortV does not support the model.
    """
    import torch

    with quiet(), one_line(lambda error: f"{folder}: no model can be made of its config.json ({first_line(error)})"):
        with torch.device("meta"):
            return class_of(config.model_type)(config).eval()


def check_pictures(folder: Path, model, processor) -> None:
    """Check that the model accepts the processor's pixels, and makes as many visual tokens as the prompt has.

    Args:
        folder: the checkpoint, for the message.
        model: the model on the meta device, so that only shapes are computed.

    Raises:
        ShortVError: if it does not.
    """
    import torch

    family = model.config.model_type.removeprefix("shortv_")
    if family not in SHAPES_ALONE or model.config.vision_config.model_type == "pixtral":
        return
    inputs = process_probe(processor)
    num_tokens = int(visual_tokens(model.config, inputs["input_ids"]).sum())
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
    """Suppress progress bars and reports of transformers' loading; our own errors say what is wrong."""
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
