"""Checkpoints in LLaVA's original layout, made of stock models, and what is read of a conversion."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, processors
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)

from shortv_llava import (
    ShortVLlavaForConditionalGeneration,
    ShortVLlavaNextForConditionalGeneration,
    ShortVLlavaNextVideoForConditionalGeneration,
    ShortVLlavaOnevisionForConditionalGeneration,
)
from shortv_llava.checkpoint.conversion import convert
from shortv_llava.errors import ShortVError

PINPOINTS = [[28, 56], [56, 28], [84, 28], [56, 56]]  # (width, height), as LLaVA writes them
CLASSES = {
    "llava": ShortVLlavaForConditionalGeneration,
    "llava_next": ShortVLlavaNextForConditionalGeneration,
    "llava_next_video": ShortVLlavaNextVideoForConditionalGeneration,
    "llava_onevision": ShortVLlavaOnevisionForConditionalGeneration,
}
STOCK = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_next_video": LlavaNextVideoForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}
# What config.json says of images, by the family that follows from it.
IMAGE_SETTINGS = {
    "llava": {},
    "llava_next": {"image_aspect_ratio": "anyres"},
    "llava_next_video": {"image_aspect_ratio": "anyres", "mm_resampler_type": "spatial_pool"},
    "llava_onevision": {"image_aspect_ratio": "anyres_max_9"},
}
BACKBONES = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}


def stock_model(family: str, backbone: str = "llama", dtype=torch.float32, siglip=False, **text):
    """A stock model whose weights an original checkpoint is made of."""
    config = tiny.config_dict("llava" if family == "llava" else "llava_next", backbone, **text)
    if family != "llava":
        config["image_grid_pinpoints"] = [[height, width] for width, height in PINPOINTS]
    if siglip:
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
        sizes = {key: getattr(config["vision_config"], key) for key in keys}
        config["vision_config"] = SiglipVisionConfig(**sizes, patch_size=14, vision_use_head=False)
        config |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    elif family == "llava_onevision":
        config |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    torch.manual_seed(0)
    return STOCK[family](STOCK[family].config_class(**config)).eval().to(dtype)


def original_tensors(model) -> dict[str, torch.Tensor]:
    """The weights of a stock model under LLaVA's names, vision tower included."""
    inner, tower = model.model, "model.vision_tower.vision_tower.vision_model."
    tensors = {f"model.{name}": tensor for name, tensor in inner.language_model.state_dict().items()}
    for name, tensor in inner.multi_modal_projector.state_dict().items():
        number = {"linear_1": 0, "linear_2": 2}[name.split(".")[0]]
        tensors[f"model.mm_projector.{number}.{name.split('.')[1]}"] = tensor
    for name, tensor in inner.vision_tower.state_dict().items():
        tensors[tower + name.removeprefix("vision_model.")] = tensor
    if hasattr(inner, "image_newline"):
        tensors["model.image_newline"] = inner.image_newline.detach()
    tensors["lm_head.weight"] = model.lm_head.weight.detach()
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # saved by old versions
    return {name: tensor.clone() for name, tensor in (tensors | rotary).items()}


def save_original(folder: Path, tensors: dict, num_shards: int = 1, suffix: str = "safetensors") -> None:
    stem, save = {"safetensors": ("model", save_file), "bin": ("pytorch_model", torch.save)}[suffix]
    if num_shards == 1:
        return save(tensors, folder / f"{stem}.{suffix}")
    names, weight_map = sorted(tensors), {}
    for number in range(num_shards):
        shard = f"{stem}-{number + 1:05d}-of-{num_shards:05d}.{suffix}"
        part = names[number::num_shards]
        save({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_config(folder: Path, model, model_type: str = "llava_llama", **settings) -> None:
    text, keys = model.config.text_config, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    keys += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act")
    family = model.config.model_type
    tiled = {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    content = {
        "model_type": model_type,
        **{key: getattr(text, key) for key in keys},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        **{"mm_vision_tower": str(folder / "tower"), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"},
        "mm_projector_type": "mlp2x_gelu",
        **(tiled if family != "llava" else {}),
        **IMAGE_SETTINGS[family],
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(content))


def save_tower(folder: Path, model, weights: bool = True) -> None:
    """A CLIPVisionModel folder as the Hub's old ones: preprocessor sizes are plain numbers."""
    folder.mkdir()
    model.config.vision_config.to_json_file(folder / "config.json", use_diff=False)
    settings = {"crop_size": 28, "size": 28, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    settings |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if weights:
        state = model.model.vision_tower.state_dict()
        tensors = {f"vision_model.{name.removeprefix('vision_model.')}": state[name].clone() for name in state}
        save_file(tensors, folder / "model.safetensors")


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of single characters with Llama's special tokens that fills the vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:,? \n'"
    vocabulary = ["<unk>", "<s>", "</s>", *letters]
    vocabulary += [f"<0x{number:02X}>" for number in range(vocab_size - len(vocabulary))]
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(vocabulary[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "padding_side": "right", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def converted_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an output, which its index must name truly."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {shard: load_file(folder / shard) for shard in set(index["weight_map"].values())}
    assert {path.name for path in folder.glob("*.safetensors")} == shards.keys()
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def load(folder: Path, model_class, **kwargs):
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def fails(source: Path, output: Path, *words: str, **kwargs) -> None:
    """Conversion ends in one line that has `words` in it."""
    with pytest.raises(ShortVError) as caught:
        convert(source, output, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
