"""ShortV vision-language models as a Hugging Face Hub package."""

from importlib import import_module

LLAVA_FAMILIES = {  # by model type of the stock model
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "vipllava": "VipLlava",
    "llava_onevision": "LlavaOnevision",
    "llava_next_video": "LlavaNextVideo",
}
OTHER_FAMILIES = {  # each with a file of its own, `modeling_shortv_<model type>.py`
    "gemma3": "Gemma3",
    "idefics3": "Idefics3",
    "internvl": "InternVL",
    "mistral3": "Mistral3",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen2_vl": "Qwen2VL",
    "qwen3_vl": "Qwen3VL",
    "smolvlm": "SmolVLM",
}
FAMILIES = LLAVA_FAMILIES | OTHER_FAMILIES
_EXPORTS = {}
for _type, _family in FAMILIES.items():
    _files = "configuration_shortv_llava", "modeling_shortv_llava"
    if _type in OTHER_FAMILIES:
        _files = (f"modeling_shortv_{_type}",) * 2
    _EXPORTS[f"ShortV{_family}Config"], _EXPORTS[f"ShortV{_family}ForConditionalGeneration"] = _files
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    # Imported on first use: the commands' --help must not wait for torch and transformers.
    if name in _EXPORTS:
        return getattr(import_module(f"shortv_llava.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
