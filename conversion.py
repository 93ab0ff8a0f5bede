"""Original LLaVA checkpoints to the Hugging Face layout: a plan over tensors, carried out one shard at a time.

The original layout (liuhaotian/llava-v1.5-7b and its kin) is a language model's checkpoint with `model.mm_projector`,
`model.image_newline` and sometimes `model.vision_tower` among its tensors; otherwise `mm_vision_tower` in config.json
names the CLIP tower. Every name, shape and dtype is checked before the first byte is written; weights go from source
to output unchanged, but for new rows of the embeddings and a separate tower's dtype, and no model is ever in memory.
"""

import ast
import contextlib
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from shortv_llava.errors import ShortVError
from shortv_llava.prompts import VICUNA_CHAT_TEMPLATE

BACKBONES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
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

CONTENT_MACRO = (
    "{%- macro content_of(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)
MISTRAL_CHAT_TEMPLATE = CONTENT_MACRO + (
    "{%- set system = '' -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = '<<SYS>>\\n' + content_of(messages[0]['content']) + '\\n<</SYS>>\\n\\n' -%}"
    "{%- set messages = messages[1:] -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '[INST] ' + (system if loop.first else '') + content_of(message['content']) + ' [/INST]' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ ' ' + content_of(message['content']) + ' </s>' }}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
QWEN_CHAT_TEMPLATE = CONTENT_MACRO + (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ content_of(message['content']) + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ content_of(message['content']) + '<|im_end|>' }}{%- endif -%}"
    "{{ '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
CHAT_TEMPLATES = {"llama": VICUNA_CHAT_TEMPLATE, "mistral": MISTRAL_CHAT_TEMPLATE, "qwen2": QWEN_CHAT_TEMPLATE}


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    read: Callable[[], torch.Tensor]


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

    Peak memory is the largest shard of the source and at most 200 MB.

    Args:
        source: folder with config.json, weights (.safetensors or .bin, sharded or not) and the tokenizer, if there is one.
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
    family, backbone = family_of(source, config), backbone_of(source, config)
    text_config = text_config_of(source, config, backbone)

    plan = plan_tensors(weight_files(source), lambda name: checkpoint_target(name, family))
    tower_inside = any(target.startswith(VISION_PREFIX) for target in plan)
    tower = tower_folder(source, vision_tower or config.get("mm_vision_tower"), with_weights=not tower_inside)
    vision_config = vision_config_of(tower)
    if not tower_inside:
        plan |= plan_tensors(weight_files(tower), tower_target)
    if config.get("tie_word_embeddings") and LM_HEAD not in plan and EMBEDDINGS in plan:
        plan[LM_HEAD] = plan[EMBEDDINGS]  # written out: LLaVA's classes do not agree on where tying is configured
    check_plan(source, plan, expected_shapes(source, text_config, vision_config, family))

    vocab_size = text_config["vocab_size"]
    if image_token_id is not None and not 0 <= image_token_id < vocab_size:
        raise ShortVError(f"image token id {image_token_id} is not in the vocabulary of {source}, 0 to {vocab_size - 1}")
    output.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(source, output, text_config, image_token_id, notes)
    if image_token_id is None:
        rows = max(vocab_size, tokens.image_id + 1, tokens.pad_id + 1)
        text_config["vocab_size"] = -(-rows // PAD_VOCABULARY_TO) * PAD_VOCABULARY_TO
    write_weights(output, plan, text_config["vocab_size"] - vocab_size)

    write_json(output / "config.json", model_config)
    write_generation_config(source, output, model_config)
    write_processor(tower, output, model_config, tokens.image, notes)
    return notes


# Reading


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShortVError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ShortVError(f"{path} holds no JSON object")
    return content


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, safetensors before .bin, each shard once."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ShortVError(f"{index} names no shards: it has no weight_map; get the file again")
            shards = list(dict.fromkeys(weight_map.values()))
            for shard in shards:
                # No resolving: the files of a Hub cache are links to elsewhere.
                if not isinstance(shard, str) or shard in ("", "..") or Path(shard).name != shard:
                    raise ShortVError(f"{index} names the shard {shard!r}, which is no file name in that folder; refused")
                if not (folder / shard).is_file():
                    raise ShortVError(f"the shard {shard} named by {index} is missing; get the file again")
            return [folder / shard for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    raise ShortVError(f"no weights in {folder}: neither model.safetensors nor pytorch_model.bin, nor an index of shards")


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of one weight file by name; they can be read until the context ends."""
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
            raise ShortVError(f"{path} is damaged or incomplete ({first_line(error)}); get the file again") from error
        yield {
            name: StoredTensor(tuple(part.get_shape()), part.get_dtype(), lambda name=name: file.get_tensor(name))
            for name, part in slices.items()
        }


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file, mapped into memory; nothing that a pickle may carry is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ShortVError(f"{path} holds more than tensors: refused, nothing in it was executed") from error
    except (OSError, RuntimeError, ValueError, EOFError, LookupError) as error:
        raise ShortVError(f"{path} is damaged or no PyTorch file ({first_line(error)}); get the file again") from error
    if not isinstance(content, dict):
        raise ShortVError(f"{path} holds a {type(content).__name__}, not tensors by name: refused")
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_cpu or tensor.layout is not torch.strided:
            raise ShortVError(f"{path} holds more than tensors, {name!r} is none: refused")
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
                    raise ShortVError(f"the tensor {name} is in {file} and in {plan[target].file}; one of them is stale")
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
        raise ShortVError(f"the configuration of {source} or its vision tower fits no model: {first_line(error)}") from error
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
            raise ShortVError(f"the tensor {tensor.name} in {tensor.file} has no place in the model of {source}/config.json")
        if tensor.shape != expected[target]:
            raise ShortVError(
                f"the tensor {tensor.name} in {tensor.file} has the shape {tensor.shape}; "
                f"by the configurations it must be {expected[target]}"
            )
        if tensor.dtype not in DTYPES:
            raise ShortVError(
                f"the tensor {tensor.name} in {tensor.file} is {tensor.dtype}; only {', '.join(DTYPES)} can be converted"
            )
    missing = [target for target in expected if target not in plan]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ShortVError(f"{source} is incomplete: nothing becomes the tensor {missing[0]}{more}; get its weights again")


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
        shapes = {}
        for target, tensor in plan.items():
            if tensor.file == file:
                grown = num_new_rows if target in new_rows else 0
                shapes[target] = (tensor.shape[0] + grown, *tensor.shape[1:])
        with open_shard(file) as stored:

            def parts(target, stored=stored):
                yield stored[plan[target].name].read()
                if target in new_rows:
                    yield new_rows[target]

            total_size += write_shard(output / shard, dtype, shapes, parts)
        weight_map |= dict.fromkeys(shapes, shard)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(output / "model.safetensors.index.json", index)


def write_shard(
    path: Path, dtype: str, shapes: dict[str, tuple[int, ...]], parts: Callable[[str], Iterator[torch.Tensor]]
) -> int:
    """Write a safetensors file one tensor at a time, where the library would hold all of them; returns bytes of data.

    `parts` gives the tensors whose concatenation along the first dimension is the named one.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in shapes:
            for part in parts(name):
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
    if not tower:
        raise ShortVError(f"{source}/config.json names no mm_vision_tower; pass --vision-tower DIR")
    if Path(tower).is_dir():
        return Path(tower)
    if not isinstance(tower, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", tower):
        raise ShortVError(f"no vision tower at {tower}; pass --vision-tower DIR, a CLIP model's folder")
    patterns = [["config.json", "preprocessor_config.json"]]
    if with_weights:  # one format, not both
        patterns += [["model*.safetensors", "model*.safetensors.index.json"], ["pytorch_model*.bin*"]]
    for allowed in patterns:
        try:
            folder = Path(huggingface_hub.snapshot_download(tower, allow_patterns=allowed))
        except Exception as error:  # the client's errors have no common class across its versions
            raise ShortVError(
                f"cannot get the vision tower {tower} from the Hub ({first_line(error)}); pass --vision-tower DIR"
            ) from error
        if any(folder.glob("model*.safetensors")):
            break
    return folder


def vision_config_of(tower: Path) -> dict:
    config = read_json(tower / "config.json")
    if config.get("model_type") == "clip":
        config = {"model_type": "clip_vision_model", **config.get("vision_config", {})}
    if config.get("model_type") != "clip_vision_model":
        raise ShortVError(f"the vision tower {tower} is a {config.get('model_type')} model; it must be a CLIP model")
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
        raise ShortVError(f"{source} marks images with start and end tokens, as LLaVA 1.0; only 1.5 and 1.6 are supported")
    if aspect_ratio in (None, "square", "pad"):
        return "llava"
    if aspect_ratio == "anyres" and merge_type == "spatial_unpad":
        return "llava_next"
    raise ShortVError(f"{source}: images as {aspect_ratio!r}, merged as {merge_type!r}, are neither LLaVA 1.5's nor 1.6's")


def backbone_of(source: Path, config: dict) -> str:
    model_type = config.get("model_type")
    if not is_original(source) or model_type not in BACKBONES:
        raise ShortVError(f"{source} is no original LLaVA checkpoint of type {', '.join(BACKBONES)}: its type is {model_type}")
    return BACKBONES[model_type]


def text_config_of(source: Path, config: dict, backbone: str) -> dict:
    """Plain keys that transformers 4 and 5 both read."""
    missing = [key for key in REQUIRED_TEXT_KEYS if key not in config]
    if missing:
        raise ShortVError(f"{source}/config.json does not give {', '.join(missing)}")
    return {
        "model_type": backbone,
        **{key: config[key] for key in (*REQUIRED_TEXT_KEYS, *OPTIONAL_TEXT_KEYS) if key in config},
        # Configurations from before these keys; the classes' defaults differ from what was meant.
        "num_key_value_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "rope_theta": config.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
    }


def strategy_of(source: Path, config: dict) -> str:
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise ShortVError(f"{source}/config.json: mm_vision_select_feature is {feature!r}, not patch or cls_patch")
    return "default" if feature == "patch" else "full"


def grid_pinpoints(source: Path, config: dict) -> list[list[int]]:
    """(height, width) of every tiling; LLaVA gives (width, height), sometimes as the text of a Python list."""
    pinpoints = config.get("image_grid_pinpoints")
    try:
        pinpoints = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return [[int(height), int(width)] for width, height in pinpoints]
    except (ValueError, TypeError, SyntaxError) as error:
        raise ShortVError(f"{source}/config.json: image_grid_pinpoints is no list of pairs: {pinpoints!r}") from error


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
