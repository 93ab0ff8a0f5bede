"""ShortV vision-language models as a Hugging Face Hub package."""

from importlib import import_module

_EXPORTS = {
    "ShortVLlavaConfig": "configuration_shortv_llava",
    "ShortVLlavaNextConfig": "configuration_shortv_llava",
    "ShortVLlavaModel": "modeling_shortv_llava",
    "ShortVLlavaNextModel": "modeling_shortv_llava",
    "ShortVLlavaForConditionalGeneration": "modeling_shortv_llava",
    "ShortVLlavaNextForConditionalGeneration": "modeling_shortv_llava",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    # Imported on use: the commands' --help must not wait for torch and transformers.
    if name in _EXPORTS:
        return getattr(import_module(f"shortv_llava.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
