"""The config.json of checkpoints and of packages."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import shortv_llava
from shortv_llava.errors import ShortVError
from shortv_llava.files.json_files import read_json

MODEL_TYPES = {stock: f"shortv_{stock}" for stock in shortv_llava.FAMILIES}
# Vision-language models that the method does not fit, by model type, and why.
UNFIT = {
    ("mllama",): "text sees pictures through cross attention, and there are no visual tokens in its layers",
    ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "qwen3_next"): (
        "some of its layers are recurrent, where text reads visual tokens only through states that these update"
    ),
    ("gemma3n", "gemma4", "gemma4_unified"): (
        "its last layers take keys and values from earlier ones, so visual tokens are hardly computed in them"
    ),
    ("deepseek_vl_v2", "kimi_vl", "kimi_k25", "glm4v_moe_lite"): (
        "its keys and values are made from a latent (multi-head latent attention), which is not supported"
    ),
}
# The configuration's lists of layers, and the part of a layer that each freezes.
LAYER_LISTS = {"replaced_layers": "layer", "replaced_attention_layers": "attention", "replaced_ffn_layers": "FFN"}
OWN_KEYS = (*LAYER_LISTS, "lc_scores", "calibration", "auto_map")  # of config.json, beyond its base's
CORRECTION = ("correction_rank", "corrected_layers")  # further keys of a package with corrections
UNFIT_CORRECTIONS = "the corrections were fitted for the package's own layers; with others they can harm"


def read_config(folder: Path) -> dict:
    """The entries of config.json of a checkpoint or package, unchanged.

    Raises:
        ShortVError: if there is no config.json, or it describes another kind of model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ShortVError(f"{folder}: no checkpoint, there is no config.json in it")
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type not in (*MODEL_TYPES, *MODEL_TYPES.values()):
        unfit = next((why for names, why in UNFIT.items() if model_type in names), None)
        why = unfit or f"supported are {', '.join(MODEL_TYPES)}, and packages of these"
        raise ShortVError(f"{folder}: ShortV does not fit model_type {model_type!r}: {why}")
    return config


def own_type(entries: dict) -> str:
    """ShortV's model type for a config.json's entries, of a plain LLaVA or of a package."""
    return MODEL_TYPES.get(entries["model_type"], entries["model_type"])


def class_of(model_type: str, kind: str = "ForConditionalGeneration") -> type:
    """The model class of one of ShortV's model types, or with `kind` Config its configuration's."""
    family = shortv_llava.FAMILIES[model_type.removeprefix("shortv_")]
    return getattr(shortv_llava, f"ShortV{family}{kind}")


def config_object(entries: dict):
    """The ShortV configuration of a config.json's entries; those of a stock model have no frozen layers.

    Raises:
        ValueError: if the layers or scores do not fit the model.
    """
    model_type = own_type(entries)
    entries = copy.deepcopy(entries | {"model_type": model_type})  # from_dict changes them
    return class_of(model_type, "Config").from_dict(entries)


def has_unfit_corrections(config, fitted: Iterable[Sequence[int]], frozen: Iterable[Sequence[int]]) -> bool:
    """Whether corrections of a model act while other layers are frozen than those they were fitted for.

    Args:
        fitted, frozen: the configuration's three lists, of the package and now.
    """

    def frozen_layers(lists: Iterable[Sequence[int]]) -> tuple[frozenset[int], frozenset[int]]:
        other = copy.copy(config)
        other.set_replaced_layers(*lists)
        return other.frozen_layers()

    package, now = frozen_layers(fitted), frozen_layers(frozen)
    return package != now and not now[1].isdisjoint(config.corrected_layers)


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
