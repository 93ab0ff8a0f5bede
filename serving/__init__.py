"""ShortV in vLLM: once this distribution is installed beside vLLM, `vllm serve` and `vllm.LLM` run packages."""

import re

from shortv_llava.errors import ShortVError

TESTED = ("0.32", "0.33")  # vLLM versions, end excluded: models.py builds on interfaces that are not public
ARCHITECTURES = ("ShortVLlavaForConditionalGeneration", "ShortVLlavaNextForConditionalGeneration")
MODEL_TYPES = ("shortv_llava", "shortv_llava_next")
BACKBONES = ("llama", "mistral", "qwen2")


def check_version(version: str) -> None:
    """Raises [`ShortVError`] if this vLLM version is outside the tested range."""
    found, first, end = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (version, *TESTED))
    if not first <= found < end:
        raise ShortVError(
            f"vLLM {version} is outside the range that ShortV packages are tested with, {TESTED[0]} to before "
            f"{TESTED[1]}: pip install 'vllm>={TESTED[0]},<{TESTED[1]}'"
        )


def check_package(config) -> None:
    """Raises [`ShortVError`] if vLLM cannot run the package of this configuration, `ValueError` for its layers."""
    if config.model_type not in MODEL_TYPES:
        raise _refusal(config.model_type)
    if config.text_config.model_type not in BACKBONES:
        raise ShortVError(
            f"text backbone {config.text_config.model_type!r} is not supported; those are: {', '.join(BACKBONES)}"
        )
    config.frozen_layers()


def register() -> None:
    """Register the packages' configurations and architectures with vLLM: the entry point `vllm.general_plugins`.

    vLLM calls this in each of its processes, for any model. A vLLM outside the tested range is therefore no error
    here. The error is raised when a package's configuration is read.
    """
    import vllm
    from transformers import AutoConfig, PretrainedConfig
    from vllm import ModelRegistry

    from shortv_llava import FAMILIES, ShortVLlavaConfig, ShortVLlavaNextConfig

    config_classes = ShortVLlavaConfig, ShortVLlavaNextConfig
    for model_type in {f"shortv_{family}" for family in FAMILIES}.difference(MODEL_TYPES):
        refusing = _refusing(PretrainedConfig, _refusal(model_type), model_type)
        AutoConfig.register(model_type, refusing, exist_ok=True)
    try:
        check_version(vllm.__version__)
    except ShortVError as error:
        config_classes = [_refusing(config_class, error) for config_class in config_classes]
    else:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from shortv_llava.serving.checks import EngineChecks

        for name in ARCHITECTURES:
            ModelRegistry.register_model(name, f"shortv_llava.serving.models:{name}")
            MODELS_CONFIG_MAP[name] = EngineChecks
    for config_class in config_classes:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _refusal(model_type: str) -> ShortVError:
    return ShortVError(f"vLLM runs packages of LLaVA and LLaVA-NeXT, not of {model_type}: use transformers serve")


def _refusing(config_class: type, error: ShortVError, model_type: str | None = None) -> type:
    def refuse(self, *args, **kwargs):
        raise error

    members = {"__init__": refuse, "model_type": model_type or config_class.model_type}
    return type(config_class.__name__, (config_class,), members)
