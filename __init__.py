"""ShortV vision-language models as a Hugging Face Hub package."""

from importlib import import_module

_FAMILIES = ("Llava", "LlavaNext", "VipLlava", "LlavaOnevision", "LlavaNextVideo")
_EXPORTS = {"CONFIG_CLASSES": "configuration_shortv_llava", "MODEL_CLASSES": "modeling_shortv_llava"}
for _family in _FAMILIES:
    _EXPORTS[f"ShortV{_family}Config"] = "configuration_shortv_llava"
    _EXPORTS[f"ShortV{_family}ForConditionalGeneration"] = "modeling_shortv_llava"
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    # Imported on first use: the commands' --help must not wait for torch and transformers.
    if name in _EXPORTS:
        return getattr(import_module(f"shortv_llava.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
