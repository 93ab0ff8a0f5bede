"""Original LLaVA checkpoints to the Hugging Face layout: a plan over tensors, carried out one shard at a time.

The original layout (liuhaotian/llava-v1.5-7b and its kin) is a language model's checkpoint with `model.mm_projector`,
`model.image_newline` and sometimes `model.vision_tower` among its tensors; otherwise `mm_vision_tower` in config.json
names the CLIP tower. Every name, shape and dtype is checked before the first byte is written; weights go from source
to output unchanged, but for new rows of the embeddings and a separate tower's dtype, and no model is ever in memory.
"""

import ast
import contextlib
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from shortv_llava.chat_templates import FORMATS, format_of
from shortv_llava.errors import ShortVError

BACKBONES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
SINGLE_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors names them
EMBEDDINGS, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
VISION_PREFIX = "vision_tower.vision_model."
PAD_VOCABULARY_TO = 64  # as the llava-hf checkpoints

# What a text configuration takes over from LLaVA's flat one; the rest of that is LLaVA's own or training's.
REQUIRED_TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_TEXT_KEYS = (
    *("head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_scaling"),
    *("attention_bias", "attention_dropout", "mlp_bias", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("sliding_window", "use_sliding_window", "max_window_layers"),
)
VISION_KEYS = (
    *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout"),
    *("initializer_range", "initializer_factor"),
)


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    read: Callable[[], torch.Tensor]


class SpecialTokens(NamedTuple):
    """The token that stands for an image, and padding, which a source without tokenizer may lack."""

    image: str
    image_id: int
    pad_id: int | None


class PlannedTensor(NamedTuple):
    """Where a tensor of the output comes from."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def is_original(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint in the original LLaVA layout, by its config.json.

    Raises:
        ShortVError: if config.json is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    return "mm_vision_tower" in config and "vision_config" not in config  # model_type "llava" is both layouts' name


def convert(
    source: Path, output: Path, vision_tower: Path | str | None = None, image_token_id: int | None = None
) -> list[str]:
    """Write the original checkpoint `source` into the folder `output` in the layout of the llava-hf checkpoints.

    Peak memory is the largest shard of the source and at most 200 MB more.

    Args:
        source: folder with config.json, weights (.safetensors or .bin, sharded or not) and perhaps a tokenizer.
        output: a folder of the caller's own; on an error it may be left half written.
        vision_tower: folder or Hub id of the CLIP tower; by default what config.json calls `mm_vision_tower`. Where the
            checkpoint holds the tower's weights, only the configuration is taken from here.
        image_token_id: a token of the vocabulary that stands for an image; then no tokens are added. By default
            `<image>` and `<pad>` are, and the embeddings grow to a multiple of 64 rows.

    Returns:
        What the user should know of the result, one line each; empty when the output is complete.

    Raises:
        ShortVError: if the source is no such checkpoint, is damaged, incomplete or holds anything but tensors, or if
            the vision tower cannot be had.
    """
    source, output, notes = Path(source), Path(output), []
    config = read_json(source / "config.json")
    backbone, family = backbone_of(source, config), family_of(source, config)
    text_config = text_config_of(source, config, backbone)

    plan = plan_tensors(weight_files(source), lambda name: checkpoint_target(name, family))
    tower_inside = any(target.startswith(VISION_PREFIX) for target in plan)
    tower = tower_folder(source, vision_tower or config["mm_vision_tower"], with_weights=not tower_inside)
    vision_config = vision_config_of(tower)
    if not tower_inside:
        plan |= plan_tensors(weight_files(tower), tower_target)
    if config.get("tie_word_embeddings") and LM_HEAD not in plan and EMBEDDINGS in plan:
        plan[LM_HEAD] = plan[EMBEDDINGS]  # written out: transformers 4 and 5 do not agree on how LLaVA is tied
    check_plan(source, plan, expected_shapes(source, text_config, vision_config, family))
    model_config = model_config_of(source, config, family, text_config, vision_config)
    vocab_size = text_config["vocab_size"]
    if image_token_id is not None and not 0 <= image_token_id < vocab_size:
        raise ShortVError(f"{source}: image token {image_token_id} is not in its vocabulary, 0 to {vocab_size - 1}")

    output.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(source, output, text_config, image_token_id, notes)
    if image_token_id is None:
        rows = max(vocab_size, tokens.image_id + 1, tokens.pad_id + 1)
        text_config["vocab_size"] = -(-rows // PAD_VOCABULARY_TO) * PAD_VOCABULARY_TO
    text_config["pad_token_id"] = model_config["pad_token_id"] = tokens.pad_id
    model_config["image_token_index"] = tokens.image_id
    model_config["torch_dtype"] = str(DTYPES[plan[EMBEDDINGS].dtype]).removeprefix("torch.")
    write_json(output / "config.json", model_config)
    write_generation_config(source, output, model_config)
    write_processor(tower, output, model_config, tokens.image, notes)
    write_weights(output, plan, num_new_rows=text_config["vocab_size"] - vocab_size)
    return notes


# Reading


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShortVError(f"{path}: cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ShortVError(f"{path}: holds no JSON object")
    return content


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weight_index(folder: Path) -> Path | None:
    """The index of the weights that transformers loads; None where they are a single file, or none."""
    for name in SINGLE_WEIGHT_FILES:
        if (folder / name).is_file():
            return None
        if (index := folder / f"{name}.index.json").is_file():
            return index
    return None


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers loads from a checkpoint folder, each shard once."""
    if index := weight_index(folder):
        shards = listed_shards(index)
        for shard in shards:
            if not shard.is_file():
                raise ShortVError(f"{index}: the shard {shard.name} is missing; get the file again")
        return shards
    for name in SINGLE_WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise ShortVError(f"{folder}: no weights, neither model.safetensors nor pytorch_model.bin nor the index of either")


def listed_shards(index: Path) -> list[Path]:
    """The files that an index of weights names, beside it, whether they are there or not."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ShortVError(f"{index}: has no weight_map; get the file again")
    for shard in weight_map.values():
        # No resolving: the files of a Hub cache are links to elsewhere.
        if not isinstance(shard, str) or shard in ("", "..") or Path(shard).name != shard:
            raise ShortVError(f"{index}: refused, the shard {shard!r} is no file name in that folder")
    return [index.with_name(shard) for shard in dict.fromkeys(weight_map.values())]


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of one weight file by name; they can be read until the context ends."""
    with open(path, "rb") as file:
        beginning = file.read(64).lstrip().lower()
    if beginning.startswith(b"version https://git-lfs"):
        raise ShortVError(f"{path}: is git-lfs's pointer to a file, not the file; run `git lfs pull` in its folder")
    if beginning.startswith((b"<!doctype", b"<html")):
        raise ShortVError(f"{path}: is a web page, no weights; download the file again")
    if path.suffix == ".bin":
        yield {
            name: StoredTensor(tuple(tensor.shape), dtype_name(tensor.dtype), lambda tensor=tensor: tensor)
            for name, tensor in load_bin(path).items()
        }
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            slices = {name: file.get_slice(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ShortVError(f"{path}: damaged or incomplete ({first_line(error)}); get the file again") from error
        yield {
            name: StoredTensor(tuple(part.get_shape()), part.get_dtype(), lambda name=name: file.get_tensor(name))
            for name, part in slices.items()
        }


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file, mapped into memory; nothing that a pickle may carry is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ShortVError(f"{path}: refused, it holds more than tensors; nothing in it was executed") from error
    except (OSError, RuntimeError, ValueError, EOFError, LookupError) as error:
        raise ShortVError(f"{path}: damaged or no PyTorch file ({first_line(error)}); get the file again") from error
    if not isinstance(content, dict):
        raise ShortVError(f"{path}: refused, it holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_cpu or tensor.layout is not torch.strided:
            raise ShortVError(f"{path}: refused, it holds more than tensors: {name!r} is none")
    return content


def dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


# The plan: which tensor of which file becomes which tensor of the output


def plan_tensors(files: list[Path], target_of: Callable[[str], str | None]) -> dict[str, PlannedTensor]:
    """Plan of all tensors in `files` by their names in the output; `target_of` gives None for those to leave out."""
    plan = {}
    for file in files:
        with open_shard(file) as stored:
            for name, tensor in stored.items():
                target = target_of(name)
                if target is None:
                    continue
                if target in plan:
                    raise ShortVError(f"{file}: the tensor {name} is also in {plan[target].file}; keep the right one")
                plan[target] = PlannedTensor(file, name, tensor.shape, tensor.dtype)
    return plan


def checkpoint_target(name: str, family: str) -> str | None:
    """Name in the output of a tensor of the original checkpoint."""
    if name.endswith((".rotary_emb.inv_freq", ".position_ids")):  # constants that old versions saved
        return None
    if name == "model.image_newline":
        return "image_newline" if family == "llava_next" else None  # LLaVA reads it for tiled images alone
    if name.startswith("model.vision_tower.vision_tower."):
        return vision_target(name.removeprefix("model.vision_tower.vision_tower."))
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        if name.startswith(f"model.mm_projector.{number}."):
            return name.replace(f"model.mm_projector.{number}", f"multi_modal_projector.{layer}")
    return f"language_model.{name}"


def tower_target(name: str) -> str | None:
    """Name in the output of a tensor of a CLIPVisionModel, or of a CLIPModel, whose text half is left out."""
    others = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    return None if name.startswith(others) or name.endswith(".position_ids") else vision_target(name)


def vision_target(name: str) -> str:
    return VISION_PREFIX + name.removeprefix("vision_model.")  # transformers 5 saves a tower without it


def expected_shapes(source: Path, text_config: dict, vision_config: dict, family: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor the output must have, before the vocabulary grows: from models without storage."""
    try:
        with torch.device("meta"):
            language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text_config)).state_dict()
            vision = CLIPVisionModel(CLIPVisionConfig(**vision_config)).state_dict()
    except Exception as error:  # a nonsensical number fails in ways that differ by version
        reason = first_line(error)
        raise ShortVError(f"{source}: its config.json or the vision tower's fits no model ({reason})") from error
    hidden, vision_hidden = text_config["hidden_size"], vision_config["hidden_size"]
    return {
        **{f"language_model.{name}": tuple(tensor.shape) for name, tensor in language.items()},
        **{vision_target(name): tuple(tensor.shape) for name, tensor in vision.items()},
        "multi_modal_projector.linear_1.weight": (hidden, vision_hidden),
        "multi_modal_projector.linear_1.bias": (hidden,),
        "multi_modal_projector.linear_2.weight": (hidden, hidden),
        "multi_modal_projector.linear_2.bias": (hidden,),
        **({"image_newline": (hidden,)} if family == "llava_next" else {}),
    }


def check_plan(source: Path, plan: dict[str, PlannedTensor], expected: dict[str, tuple[int, ...]]) -> None:
    for target, tensor in plan.items():
        if target not in expected:
            raise ShortVError(f"{tensor.file}: the tensor {tensor.name} has no place in the model of config.json")
        if tensor.shape != expected[target]:
            shapes = f"{tensor.shape}, by the configuration it must be {expected[target]}"
            raise ShortVError(f"{tensor.file}: the tensor {tensor.name} has the shape {shapes}")
        if tensor.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ShortVError(f"{tensor.file}: the tensor {tensor.name} is {tensor.dtype}; it must be one of {known}")
    missing = [target for target in expected if target not in plan]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ShortVError(f"{source}: nothing in it becomes the tensor {missing[0]}{more}; get its weights again")


# Writing weights


def write_weights(output: Path, plan: dict[str, PlannedTensor], num_new_rows: int) -> None:
    """Write one shard for each source file, and their index. All tensors take the embeddings' dtype."""
    dtype = plan[EMBEDDINGS].dtype  # LLaVA too casts a separate tower to the language model's dtype
    new_rows = {}
    if num_new_rows:
        with open_shard(plan[EMBEDDINGS].file) as stored:
            drawn = draw_rows(stored[plan[EMBEDDINGS].name].read(), 2 * num_new_rows)
        new_rows = {EMBEDDINGS: drawn[:num_new_rows], LM_HEAD: drawn[num_new_rows:]}

    files = list(dict.fromkeys(tensor.file for tensor in plan.values()))
    weight_map, total_size = {}, 0
    for number, file in enumerate(tqdm(files, desc="Converting", unit="shard", disable=None), start=1):
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with open_shard(file) as stored:
            tensors = {target: stored[tensor.name] for target, tensor in plan.items() if tensor.file == file}
            total_size += write_shard(output / shard, dtype, tensors, new_rows)
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(output / "model.safetensors.index.json", index)


def write_shard(path: Path, dtype: str, tensors: dict[str, StoredTensor], new_rows: dict[str, torch.Tensor]) -> int:
    """Write a safetensors file, one tensor in memory at a time, and return the bytes of its tensors.

    The library's own function takes tensors already cast and grown, which would be a shard's copy in memory.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        shape = [*tensor.shape]
        if name in new_rows:
            shape[0] += len(new_rows[name])
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            for part in (tensor.read(), new_rows.get(name)):
                if part is not None:
                    file.write(part.detach().to(DTYPES[dtype]).flatten().view(torch.uint8).numpy())
    return end


def draw_rows(embeddings: torch.Tensor, number: int) -> torch.Tensor:
    """Draw rows for new tokens: normal, with the mean of `embeddings` (V, h) and 1e-5 of their covariance.

    A draw is mean + sqrt(1e-5 / V) * sum over i of z_i (embedding_i - mean), z standard normal: the covariance matrix
    itself is never needed. Returns (number, h), float64, the same on every call.
    """
    vocab_size = len(embeddings)
    draws = torch.randn(number, vocab_size, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(embeddings.shape[1], dtype=torch.float64)
    mixed = torch.zeros(number, embeddings.shape[1], dtype=torch.float64)
    for rows, factors in zip(embeddings.detach().split(1024), draws.split(1024, dim=1)):
        rows, factors = rows.double(), factors.double()
        total += rows.sum(dim=0)
        mixed += factors @ rows
    mean = total / vocab_size
    return mean + (1e-5 / vocab_size) ** 0.5 * (mixed - draws.double().sum(dim=1, keepdim=True) * mean)


# The vision tower


def tower_folder(source: Path, tower: Path | str | None, with_weights: bool) -> Path:
    """The tower's folder, from the Hub if it is no local one; without weights unless they are wanted."""
    if not tower or not isinstance(tower, (str, Path)):
        raise ShortVError(f"{source}: its config.json names no vision tower; pass --vision-tower DIR")
    if Path(tower).is_dir():
        return Path(tower)
    if not isinstance(tower, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", tower):
        raise ShortVError(f"{tower}: no such vision tower; pass --vision-tower DIR, the folder of a CLIP model")
    patterns = [["config.json", "preprocessor_config.json"]]
    if with_weights:  # one format, not both
        patterns += [["model*.safetensors", "model*.safetensors.index.json"], ["pytorch_model*.bin*"]]
    for allowed in patterns:
        try:
            folder = Path(huggingface_hub.snapshot_download(tower, allow_patterns=allowed))
        except Exception as error:  # the client's errors have no common class across its versions
            reason = first_line(error)
            raise ShortVError(f"{tower}: not to be had from the Hub ({reason}); pass --vision-tower DIR") from error
        if any(folder.glob("model*.safetensors")):
            break
    return folder


def vision_config_of(tower: Path) -> dict:
    config = read_json(tower / "config.json")
    if config.get("model_type") == "clip":
        config = {"model_type": "clip_vision_model", **config.get("vision_config", {})}
    if config.get("model_type") != "clip_vision_model":
        raise ShortVError(f"{tower}: the vision tower must be a CLIP model, this is {config.get('model_type')!r}")
    defaults = CLIPVisionConfig()
    return {
        "model_type": "clip_vision_model",
        **{key: config.get(key, getattr(defaults, key)) for key in VISION_KEYS},
    }


# Configurations


def family_of(source: Path, config: dict) -> str:
    """The model type of the output, llava or llava_next, by what LLaVA does with an image."""
    aspect_ratio, merge_type = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type") or "flat"
    if config.get("mm_use_im_start_end"):
        raise ShortVError(f"{source}: mm_use_im_start_end is set, as by LLaVA 1.0; only 1.5 and 1.6 are supported")
    if aspect_ratio in (None, "square", "pad"):
        return "llava"
    if aspect_ratio == "anyres" and merge_type == "spatial_unpad":
        return "llava_next"
    setting = f"image_aspect_ratio {aspect_ratio!r} with mm_patch_merge_type {merge_type!r}"
    raise ShortVError(f"{source}: {setting} is neither LLaVA 1.5's nor 1.6's; only those are supported")


def backbone_of(source: Path, config: dict) -> str:
    model_type = config.get("model_type")
    if not is_original(source) or model_type not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise ShortVError(f"{source}: no original LLaVA checkpoint (model_type {model_type!r}; supported: {known})")
    return BACKBONES[model_type]


def text_config_of(source: Path, config: dict, backbone: str) -> dict:
    """Plain keys that transformers 4 and 5 both read."""
    missing = [key for key in REQUIRED_TEXT_KEYS if key not in config]
    if missing:
        raise ShortVError(f"{source}: its config.json does not give {', '.join(missing)}")
    return {
        "model_type": backbone,
        **{key: config[key] for key in (*REQUIRED_TEXT_KEYS, *OPTIONAL_TEXT_KEYS) if key in config},
        # Configurations from before these keys; the classes' defaults differ from what was meant.
        "num_key_value_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "rope_theta": config.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
    }


def model_config_of(source: Path, config: dict, family: str, text_config: dict, vision_config: dict) -> dict:
    """The configuration of the whole model, but for its special tokens and dtype."""
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise ShortVError(f"{source}: mm_vision_select_feature is {feature!r}; only patch and cls_patch are known")
    num_patches = (vision_config["image_size"] // vision_config["patch_size"]) ** 2
    model_config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "image_seq_length": num_patches + (feature == "cls_patch"),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if feature == "patch" else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "text_config": text_config,
        "vision_config": vision_config,
    }
    if family == "llava_next":
        model_config["image_grid_pinpoints"] = grid_pinpoints(source, config)
    return model_config


def grid_pinpoints(source: Path, config: dict) -> list[list[int]]:
    """(height, width) of every tiling; LLaVA gives (width, height), sometimes as the text of a Python list."""
    pinpoints = config.get("image_grid_pinpoints")
    try:
        pinpoints = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return [[int(height), int(width)] for width, height in pinpoints]
    except (ValueError, TypeError, SyntaxError) as error:
        raise ShortVError(f"{source}: image_grid_pinpoints {pinpoints!r} is no list of pairs") from error


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_generation_config(source: Path, output: Path, model_config: dict) -> None:
    """The tokens that begin, end and pad; how to sample is left to the user."""
    path = source / "generation_config.json"
    given = model_config["text_config"] | (read_json(path) if path.is_file() else {})
    tokens = {key: given[key] for key in ("bos_token_id", "eos_token_id") if key in given}
    write_json(output / "generation_config.json", {**tokens, "pad_token_id": model_config["pad_token_id"]})


# Tokenizer and image processor


def write_tokenizer(
    source: Path, output: Path, text_config: dict, image_token_id: int | None, notes: list[str]
) -> SpecialTokens:
    """Write the tokenizer with its chat template, unless the source has none."""
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        notes.append(f"{source}: has no tokenizer, so the output has none and takes only token ids")
        if image_token_id is not None:
            return SpecialTokens("<image>", image_token_id, text_config.get("pad_token_id"))
        return SpecialTokens("<image>", text_config["vocab_size"], text_config["vocab_size"] + 1)

    # AutoTokenizer would rebuild a tokenizer.json by its class, each version of transformers in its own way.
    ready = (source / "tokenizer.json").is_file()
    try:
        if ready:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        else:
            # LLaVA tokenizes the text after an image by itself, so with a leading space; that is what `legacy` does.
            backbone = AutoConfig.for_model(text_config["model_type"])
            tokenizer = AutoTokenizer.from_pretrained(source, config=backbone, legacy=True, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # broken files and missing libraries fail in ways that differ by version
        hint = "get tokenizer.json again" if ready else "try pip install sentencepiece protobuf"
        raise ShortVError(f"{source}: its tokenizer cannot be read ({first_line(error)}); {hint}") from error
    if image_token_id is None:
        image_token = "<image>"
        tokenizer.add_tokens(AddedToken(image_token, special=True, normalized=False), special_tokens=True)
        if tokenizer.pad_token in (None, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token):
            tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    else:
        image_token = tokenizer.convert_ids_to_tokens(image_token_id)
        if image_token is None:
            raise ShortVError(f"{source}: its tokenizer has no token {image_token_id} to stand for an image")

    template = FORMATS[format_of(text_config["model_type"], tokenizer.get_vocab())]
    (output / "chat_template.jinja").write_text(template.replace("<image>", image_token), encoding="utf-8")
    (output / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it stands
            **{name: token for name, token in special.items() if token is not None},
            "model_max_length": tokenizer.model_max_length,
            "padding_side": "left",  # as generation in batches needs it
            "clean_up_tokenization_spaces": False,
        },
    )
    return SpecialTokens(image_token, tokenizer.convert_tokens_to_ids(image_token), tokenizer.pad_token_id)


def write_processor(tower: Path, output: Path, model_config: dict, image_token: str, notes: list[str]) -> None:
    """Write the image processor, by the tower's own settings, and what LLaVA's processor adds."""
    size = model_config["vision_config"]["image_size"]
    settings = {
        **{"do_resize": True, "size": {"shortest_edge": size}, "resample": 3},
        **{"do_center_crop": True, "crop_size": {"height": size, "width": size}},
        **{"do_rescale": True, "rescale_factor": 1 / 255},
        **{"do_normalize": True, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD},
        "do_convert_rgb": True,
    }
    path = tower / "preprocessor_config.json"
    if path.is_file():
        settings |= {key: value for key, value in read_json(path).items() if key in settings}
    else:
        notes.append(f"{tower}: has no preprocessor_config.json; the image processor got CLIP's usual settings")
    if isinstance(settings["size"], int):  # as CLIP's first configurations
        settings["size"] = {"shortest_edge": settings["size"]}
    if isinstance(settings["crop_size"], int):
        settings["crop_size"] = dict.fromkeys(("height", "width"), settings["crop_size"])
    processor, image_processor = "LlavaProcessor", "CLIPImageProcessor"
    if model_config["model_type"] == "llava_next":
        processor, image_processor = "LlavaNextProcessor", "LlavaNextImageProcessor"
        settings |= {"do_pad": True, "image_grid_pinpoints": model_config["image_grid_pinpoints"]}
    write_json(output / "preprocessor_config.json", {"image_processor_type": image_processor, **settings})
    write_json(
        output / "processor_config.json",
        {
            "processor_class": processor,
            "image_token": image_token,
            "patch_size": model_config["vision_config"]["patch_size"],
            "vision_feature_select_strategy": model_config["vision_feature_select_strategy"],
            "num_additional_image_tokens": 1,  # CLIP's class token
        },
    )
