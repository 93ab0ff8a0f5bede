"""Load models for the commands, from a folder or the Hub, in one process or several."""

import functools
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from shortv_llava.checkpoint.checks import check_weights
from shortv_llava.checkpoint.config import (
    LAYER_LISTS,
    MODEL_TYPES,
    UNFIT_CORRECTIONS,
    class_of,
    config_object,
    has_unfit_corrections,
    own_type,
    read_config,
)
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.checkpoint.published import parse_layers
from shortv_llava.checkpoint.source import find_checkpoint
from shortv_llava.distributed import own_device
from shortv_llava.errors import ShortVError

logger = logging.getLogger(__name__)

LAYERS_VARIABLE = "REPLACED_LAYERS"  # as in the authors' release


def load_model(folder: Path, load_in_4bit: bool = False, load_in_8bit: bool = False, **kwargs):
    """The ShortV model of a checkpoint or package folder; a plain LLaVA has no frozen layers.

    Args:
        load_in_4bit, load_in_8bit: quantise the language model through bitsandbytes, as the original code does.
        kwargs: arguments of `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        ShortVError: if the folder is no checkpoint or package, tensors are missing or unexpected, or bitsandbytes is
            missing.
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
    model_class = class_of(own_type(read_config(folder)))
    check_weights(folder)
    config = model_class.config_class.from_pretrained(folder)
    return model_class.from_pretrained(folder, config=config, **kwargs).eval()


def text_decoder(model):
    """The language model without its head, whose `layers` are decoder layers, of a ShortV or stock model."""
    decoder = model.get_decoder()
    return getattr(decoder, "text_model", decoder)  # Idefics3's and SmolVLM's in transformers 4


@functools.cache
def cache_name() -> str:
    """Name of the keyword argument for the cache, `past_key_values` before transformers 5.24."""
    from transformers import LlamaModel

    return "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class Loaded(NamedTuple):
    """What [`load`] returns.

    Args:
        package_layers: the package's own three lists of layers, even if others are replaced.
        folder: the folder that the model was loaded from.
    """

    model: Any
    processor: Any
    package_layers: tuple[list[int], list[int], list[int]]
    folder: Path


def load(
    base: str,
    replaced_layers: str | None = None,
    dtype: str = "auto",
    device_map: str | None = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    image_aspect_ratio: str = "base",
    check: Callable[[Any], object] = lambda config: None,
) -> Loaded:
    """The model and processor of a folder or Hub id.

    `replaced_layers` sets the layers (see [`parse_layers`]). By default they are the package's own; for a plain LLaVA
    checkpoint the environment variable REPLACED_LAYERS sets them, else there are none. Without a device map the model
    goes to [`own_device`]. The processor's files are corrected and it may pad, see [`write_processor`]. `check` gets
    the configuration with these layers before the weights are read, and may raise.

    Raises:
        ShortVError: if there is no such model, or the library to quantise it is missing.
        ValueError: if the layers do not fit the model.
    """
    folder = find_checkpoint(base)
    entries = read_config(folder)
    config = config_object(entries)
    package_layers = tuple(getattr(config, name) for name in LAYER_LISTS)
    if replaced_layers is None and entries["model_type"] not in MODEL_TYPES.values():
        replaced_layers = os.environ.get(LAYERS_VARIABLE) or None
    layers = None if replaced_layers is None else parse_layers(replaced_layers, base)
    if layers is not None:
        config.set_replaced_layers(layers)
    check(config)
    processor = load_processor(folder, image_aspect_ratio=image_aspect_ratio)
    model = load_model(folder, load_in_4bit, load_in_8bit, dtype=dtype, device_map=device_map or own_device())
    if layers is not None:
        model.set_replaced_layers(layers)
        if has_unfit_corrections(model.config, package_layers, (layers, (), ())):
            logger.warning(f"{base}: {UNFIT_CORRECTIONS}")
    return Loaded(model, processor, package_layers, folder)
