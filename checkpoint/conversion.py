"""Convert original LLaVA checkpoints to the Hugging Face layout: plan all tensors, then write one shard at a time.

The original layout (liuhaotian/llava-v1.5-7b, lmms-lab/llava-onevision-qwen2-7b-ov and the like) is a language
model's checkpoint with `model.mm_projector`, `model.image_newline` and sometimes `model.vision_tower` among its
tensors. Without `model.vision_tower`, `mm_vision_tower` in config.json names the CLIP or SigLIP tower. LoRA adapters,
LLaVA's and PEFT's, are merged into their base. Every name, shape and dtype is checked before the first byte is
written. Weights are not changed, except for an adapter's updates, new rows of the embeddings and the dtype of a
separate tower.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from shortv_llava.checkpoint.adapters import base_folder, is_adapter, plain_name, with_adapter
from shortv_llava.checkpoint.chat_templates import FORMATS, format_of
from shortv_llava.checkpoint.processors import PROCESSOR_PATTERNS, copy_files
from shortv_llava.checkpoint.source import CARD_FILE, OTHER_PATTERNS, fetch_part
from shortv_llava.checkpoint.tensors import (
    DTYPES,
    PlannedTensor,
    check_dtypes,
    has_weights,
    open_shard,
    plan_tensors,
    weight_files,
    write_weights,
)
from shortv_llava.errors import ShortVError, first_line, one_line
from shortv_llava.files.json_files import read_json, write_json

BACKBONES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
TOWERS = {
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
}
# Tokens that stand for visual input, in the order in which the llava-hf checkpoints add them.
VISUAL_TOKENS = {"llava_next_video": ("<video>", "<image>"), "llava_onevision": ("<image>", "<video>")}
EMBEDDINGS, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
VISION_PREFIX = "vision_tower.vision_model."
PAD_VOCABULARY_TO = 64  # as the llava-hf checkpoints

# Keys that a text configuration takes from LLaVA's flat configuration; other keys are for LLaVA or for training.
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


class SpecialTokens(NamedTuple):
    """Ids of the image token, the video token (in families with videos) and the padding token."""

    image: int
    video: int | None
    pad: int


def is_original(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint in the original LLaVA layout, by its config.json.

    Raises:
        ShortVError: if config.json is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    return "mm_vision_tower" in config and "vision_config" not in config  # both layouts have model_type "llava"


def must_convert(folder: Path) -> bool:
    """Whether [`convert`] must make a checkpoint of `folder`: an original one, or an adapter in either layout.

    Raises:
        ShortVError: if its config.json is no JSON object.
    """
    return is_adapter(folder) or is_original(folder)


def convert(
    source: Path,
    output: Path,
    vision_tower: Path | str | None = None,
    base_weights: Path | str | None = None,
) -> list[str]:
    """Write the checkpoint `source` into the folder `output` in the layout of the llava-hf checkpoints.

    Peak memory is the largest shard of the source and at most 200 MB more. The tokens `<image>` and `<pad>` are added,
    and the embeddings grow to a multiple of 64 rows.

    Args:
        source: folder with config.json, weights (.safetensors or .bin, sharded or not) and optionally a tokenizer; or a
            LoRA adapter, LLaVA's with its config.json and `non_lora_trainables.bin` or PEFT's for either layout.
        output: a folder that the caller cleans up; on an error it may be left half written.
        vision_tower: folder or Hub id of the vision tower; by default `mm_vision_tower` of config.json. If the
            checkpoint holds the tower's weights, only the configuration is read from here.
        base_weights: folder or Hub id of an adapter's base, a LLaVA or a plain language model; by default the base
            that its adapter_config.json names.

    Returns:
        Notes for the user, one line each; empty when the output is complete.

    Raises:
        ShortVError: if the source is no such checkpoint, is damaged, incomplete or holds anything but tensors, or if
            the vision tower or the adapter's base cannot be fetched.
    """
    source, output, notes = Path(source), Path(output), []
    adapter = source if is_adapter(source) else None
    weights = base_folder(adapter, base_weights) if adapter else source
    if adapter and not is_original(source):
        if not is_original(weights):
            return merge(adapter, weights, output)
        source = weights
    config = read_json(source / "config.json")
    text_config = text_config_of(source, config, backbone_of(source, config))
    check_presence(source, weights)

    plan = plan_tensors(weight_files(weights), checkpoint_target)
    tower, vision_config = plan_tower(plan, source, vision_tower or config["mm_vision_tower"])
    family = family_of(source, config, vision_config, notes)
    dtype = plan[EMBEDDINGS].dtype if EMBEDDINGS in plan else None
    plan = complete_plan(plan, adapter, config, family)
    check_plan(source, plan, expected_shapes(source, text_config, vision_config, family))
    model_config = model_config_of(source, config, family, text_config, vision_config)

    output.mkdir(parents=True, exist_ok=True)
    num_new_rows = add_tokens(model_config, write_tokenizer(weights, output, text_config, family, notes))
    model_config["torch_dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    write_json(output / "config.json", model_config)
    write_generation_config(weights, output, model_config)
    write_processor(tower, output, model_config, config, notes)
    new_rows = draw_new_rows(plan[EMBEDDINGS], num_new_rows)
    # LLaVA too casts a separate tower to the language model's dtype.
    plan = {target: tensor._replace(dtype=dtype) for target, tensor in plan.items()}
    write_weights(output, plan, new_rows, "Converting")
    return notes


def merge(adapter: Path, base: Path, output: Path) -> list[str]:
    """Write a checkpoint in the Hugging Face layout, `base`, with the PEFT adapter of a folder merged into it.

    Tensors keep the base's names and dtypes. If the adapter has a processor, it replaces the base's. Returns and raises
    as [`convert`].
    """
    plan = plan_tensors(weight_files(base), lambda name: name)
    check_dtypes(plan)
    names = {}
    for name in plan:
        if names.setdefault(plain_name(name), name) != name:
            raise ShortVError(f"{base}: holds {name} and {names[plain_name(name)]}, one tensor under two names")
    # A name that is not found stays unchanged, and the check reports it.
    merged = with_adapter(plan, adapter, lambda name: names.get(plain_name(name), name))
    for target, tensor in merged.items():
        if target not in plan:
            raise ShortVError(f"{tensor.file}: the tensor {tensor.name} has no place in the base {base}")
    output.mkdir(parents=True, exist_ok=True)
    write_weights(output, merged, {}, "Merging")
    copy_files(base, output, ("config.json", CARD_FILE, *OTHER_PATTERNS, *PROCESSOR_PATTERNS))
    if any((adapter / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        copy_files(adapter, output, PROCESSOR_PATTERNS)  # a complete processor, used in training
    return []


def check_presence(source: Path, weights: Path) -> None:
    """Refuse a source without a language model, or an adapter's base in another layout.

    Args:
        source: folder of config.json, in the original layout.
        weights: folder of the language model: `source`, or an adapter's base.
    """
    if source == weights and (source / "mm_projector.bin").is_file() and not has_weights(source):
        what = "holds a projector alone (mm_projector.bin), as LLaVA's pretraining leaves it"
        raise ShortVError(f"{source}: {what}; the language model tuned with it is missing, give that checkpoint")
    base_config = weights / "config.json"
    if source != weights and base_config.is_file() and "vision_config" in read_json(base_config):
        needed = "a plain language model or a LLaVA in its original layout"
        raise ShortVError(f"{weights}: is in the Hugging Face layout; the adapter {source} needs {needed}")


# The plan: which tensor of which file becomes which tensor of the output


def checkpoint_target(name: str) -> str | None:
    """Name in the output of a tensor of the original checkpoint."""
    if name == "model.image_newline":
        return "image_newline"
    if name.startswith("model.vision_tower.vision_tower."):
        return vision_target(name.removeprefix("model.vision_tower.vision_tower."))
    name = name.replace("model.vision_resampler.mm_projector.", "model.mm_projector.")  # name in the first video models
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        if name.startswith(f"model.mm_projector.{number}."):
            return name.replace(f"model.mm_projector.{number}", f"multi_modal_projector.{layer}")
    return f"language_model.{name}"


def original_name(name: str) -> str:
    """Name in the original checkpoint of an adapter's tensor, without the prefixes that PEFT and LLaVA add."""
    name = plain_name(name)
    return name if name.startswith("lm_head.") else f"model.{name}"


def tower_target(name: str) -> str | None:
    """Name in the output of a vision model's tensor; None for the text half of CLIP or SigLIP, which is left out."""
    others = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
    return None if name.startswith(others) else vision_target(name)


def vision_target(name: str) -> str | None:
    name = name.removeprefix("vision_model.")  # transformers 5 saves a tower without it
    return None if name.startswith("head.") else VISION_PREFIX + name  # LLaVA does not use SigLIP's pooled output


def plan_tower(plan: dict[str, PlannedTensor], source: Path, vision_tower: Path | str | None) -> tuple[Path, dict]:
    """Put the vision tower's tensors into the plan, unless the checkpoint holds them.

    Returns:
        The tower's folder, and its configuration as LLaVA uses it.
    """
    inside = any(target.startswith(VISION_PREFIX) for target in plan)
    hint = "pass --vision-tower DIR, the folder of a CLIP or SigLIP model"
    tower = fetch_part(source, vision_tower, "vision tower", hint, weights=not inside)
    vision_config = vision_config_of(tower)
    if not inside:
        plan.update(plan_tensors(weight_files(tower), tower_target))
    if vision_config["model_type"] == "siglip_vision_model":
        drop_last_layer(plan, vision_config, inside)
    return tower, vision_config


def complete_plan(
    plan: dict[str, PlannedTensor], adapter: Path | None, config: dict, family: str
) -> dict[str, PlannedTensor]:
    """The plan with the adapter merged and a tied head written out, without tensors that the family does not read."""
    if adapter:
        plan = with_adapter(plan, adapter, lambda name: checkpoint_target(original_name(name)))
    if config.get("tie_word_embeddings") and LM_HEAD not in plan and EMBEDDINGS in plan:
        plan[LM_HEAD] = plan[EMBEDDINGS]  # written out: transformers 4 and 5 do not agree on how LLaVA is tied
    if family == "llava":
        plan.pop("image_newline", None)  # LLaVA reads it only for tiled images
    return plan


def drop_last_layer(plan: dict[str, PlannedTensor], vision_config: dict, tower_inside: bool) -> None:
    """Leave out SigLIP's last layer, as LLaVA does; in a checkpoint that holds the tower it is left out already."""
    last = vision_config["num_hidden_layers"] - 1
    targets = [target for target in plan if target.startswith(f"{VISION_PREFIX}encoder.layers.{last}.")]
    if not (targets and tower_inside):
        vision_config["num_hidden_layers"] = last
        for target in targets:
            del plan[target]


def expected_shapes(source: Path, text_config: dict, vision_config: dict, family: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor the output must have, before the vocabulary grows, from a model on the meta device."""
    with one_line(lambda error: f"{source}: its config.json or the vision tower's fits no model ({first_line(error)})"):
        with torch.device("meta"):
            language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text_config)).state_dict()
            config_class, model_class = TOWERS[vision_config["model_type"]]
            vision = model_class(config_class(**vision_config)).state_dict()
    hidden, vision_hidden = text_config["hidden_size"], vision_config["hidden_size"]
    return {
        **{f"language_model.{name}": tuple(tensor.shape) for name, tensor in language.items()},
        **{vision_target(name): tuple(tensor.shape) for name, tensor in vision.items()},
        "multi_modal_projector.linear_1.weight": (hidden, vision_hidden),
        "multi_modal_projector.linear_1.bias": (hidden,),
        "multi_modal_projector.linear_2.weight": (hidden, hidden),
        "multi_modal_projector.linear_2.bias": (hidden,),
        **({"image_newline": (hidden,)} if family != "llava" else {}),
    }


def check_plan(source: Path, plan: dict[str, PlannedTensor], expected: dict[str, tuple[int, ...]]) -> None:
    for target, tensor in plan.items():
        if target not in expected:
            raise ShortVError(f"{tensor.file}: the tensor {tensor.name} has no place in the model of config.json")
        if tensor.shape != expected[target]:
            shapes = f"{tensor.shape}, by the configuration it must be {expected[target]}"
            raise ShortVError(f"{tensor.file}: the tensor {tensor.name} has the shape {shapes}")
    check_dtypes(plan)
    missing = [target for target in expected if target not in plan]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ShortVError(f"{source}: nothing in it becomes the tensor {missing[0]}{more}; get its weights again")


def draw_new_rows(embeddings: PlannedTensor, number: int) -> dict[str, torch.Tensor]:
    """Rows of new tokens for the embeddings and the head, by name of the tensor; see [`draw_rows`]."""
    if not number:
        return {}
    with open_shard(embeddings.file) as stored:
        drawn = draw_rows(stored[embeddings.name].read(), 2 * number)
    return {EMBEDDINGS: drawn[:number], LM_HEAD: drawn[number:]}


def draw_rows(embeddings: torch.Tensor, number: int) -> torch.Tensor:
    """Draw rows for new tokens: normal, with the mean of `embeddings` (V, h) and 1e-5 of their covariance.

    A draw is mean + sqrt(1e-5 / V) * sum over i of z_i (embedding_i - mean), z standard normal, without computing the
    covariance matrix. Returns (number, h), float64, the same on every call.
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


def vision_config_of(tower: Path) -> dict:
    config = read_json(tower / "config.json")
    if config.get("model_type") in ("clip", "siglip"):
        config = config.get("vision_config", {}) | {"model_type": f"{config['model_type']}_vision_model"}
    model_type = config.get("model_type")
    if model_type not in TOWERS:
        raise ShortVError(f"{tower}: the vision tower must be a CLIP or SigLIP model, this is {model_type!r}")
    defaults = TOWERS[model_type][0]()
    return {
        "model_type": model_type,
        **{key: config.get(key, getattr(defaults, key)) for key in VISION_KEYS if hasattr(defaults, key)},
        **({"vision_use_head": False} if model_type == "siglip_vision_model" else {}),
    }


# Configurations


def family_of(source: Path, config: dict, vision_config: dict, notes: list[str]) -> str:
    """The model type of the output, by what LLaVA does with an image."""
    aspect_ratio, merge_type = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type") or "flat"
    if config.get("mm_use_im_start_end"):
        raise ShortVError(f"{source}: mm_use_im_start_end is set, as by LLaVA 1.0; only 1.5 and later are supported")
    if aspect_ratio in (None, "square", "pad"):
        return "llava"
    tiled = re.fullmatch(r"anyres(_max_\d+)?", str(aspect_ratio))
    if tiled and merge_type == "flat" and vision_config["model_type"] == "siglip_vision_model":
        # Interleave: its authors evaluate it, and llava-hf converted it, without tiles.
        notes.append(f"{source}: made for many images; each is resized as a whole and not tiled, as in its evaluation")
        return "llava"
    if tiled and merge_type == "spatial_unpad":
        if tiled[1]:
            position = config.get("mm_newline_position", "one_token")
            if position != "one_token":
                notes.append(f"{source}: newlines in videos (mm_newline_position {position!r}) become one at their end")
            return "llava_onevision"
        return "llava_next_video" if config.get("mm_resampler_type") == "spatial_pool" else "llava_next"
    setting = f"image_aspect_ratio {aspect_ratio!r} with mm_patch_merge_type {merge_type!r}"
    raise ShortVError(f"{source}: {setting} is none of LLaVA 1.5's to OneVision's; only those are supported")


def backbone_of(source: Path, config: dict) -> str:
    model_type = config.get("model_type")
    if not is_original(source) or model_type not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise ShortVError(f"{source}: no original LLaVA checkpoint (model_type {model_type!r}; supported: {known})")
    return BACKBONES[model_type]


def text_config_of(source: Path, config: dict, backbone: str) -> dict:
    """The text configuration, with keys that transformers 4 and 5 both read."""
    missing = [key for key in REQUIRED_TEXT_KEYS if key not in config]
    if missing:
        raise ShortVError(f"{source}: its config.json does not give {', '.join(missing)}")
    return {
        "model_type": backbone,
        **{key: config[key] for key in (*REQUIRED_TEXT_KEYS, *OPTIONAL_TEXT_KEYS) if key in config},
        # Older configurations lack these keys, and the classes' defaults differ from the values then.
        "num_key_value_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "rope_theta": config.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
    }


def model_config_of(source: Path, config: dict, family: str, text_config: dict, vision_config: dict) -> dict:
    """The configuration of the whole model, without its special tokens and dtype."""
    layer, feature = config.get("mm_vision_select_layer", -2), config.get("mm_vision_select_feature", "patch")
    if vision_config["model_type"] == "siglip_vision_model":
        layer, feature = -1, "cls_patch"  # LLaVA cut the tower for it; all patches, for there is no class token
    if feature not in ("patch", "cls_patch"):
        raise ShortVError(f"{source}: mm_vision_select_feature is {feature!r}; only patch and cls_patch are known")
    num_patches = (vision_config["image_size"] // vision_config["patch_size"]) ** 2
    has_class = vision_config["model_type"] == "clip_vision_model"
    model_config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "image_seq_length": num_patches + (has_class and feature == "cls_patch"),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default" if feature == "patch" else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "text_config": text_config,
        "vision_config": vision_config,
    }
    if family != "llava":
        model_config["image_grid_pinpoints"] = grid_pinpoints(source, config, vision_config["image_size"])
    if family == "llava_onevision":
        model_config["vision_aspect_ratio"] = config["image_aspect_ratio"]
    if family == "llava_next_video":
        mode, stride = config.get("mm_spatial_pool_mode", "average"), config.get("mm_spatial_pool_stride", 2)
        if mode not in ("average", "max") or not isinstance(stride, int) or stride < 1:
            raise ShortVError(f"{source}: mm_spatial_pool_mode {mode!r} with stride {stride!r} is not supported")
        model_config |= {"spatial_pool_mode": mode, "spatial_pool_stride": stride}
        side = vision_config["image_size"] // vision_config["patch_size"] // stride
        model_config["video_seq_length"] = side**2
    return model_config


def add_tokens(model_config: dict, tokens: SpecialTokens) -> int:
    """Set the special tokens in the configuration and enlarge the vocabulary. Returns the number of new rows."""
    text_config = model_config["text_config"]
    before = text_config["vocab_size"]
    rows = max(before, *(1 + number for number in tokens if number is not None))
    text_config["vocab_size"] = -(-rows // PAD_VOCABULARY_TO) * PAD_VOCABULARY_TO
    text_config["pad_token_id"] = model_config["pad_token_id"] = tokens.pad
    model_config["image_token_index"] = tokens.image
    if tokens.video is not None:
        model_config["video_token_index"] = tokens.video
    return text_config["vocab_size"] - before


def grid_pinpoints(source: Path, config: dict, image_size: int) -> list[list[int]]:
    """(height, width) of every tiling.

    LLaVA's configurations have (width, height), sometimes as the text of a Python list. A range such as
    `(1x1),...,(6x6)` stands for all tilings between, counted in tiles of `image_size`.
    """
    pinpoints = config.get("image_grid_pinpoints")
    try:
        tiles = re.findall(r"\((\d+)x(\d+)\)", pinpoints) if isinstance(pinpoints, str) else []
        if tiles:
            (first_width, first_height), (last_width, last_height) = [map(int, tiles[i]) for i in (0, -1)]
            widths, heights = range(first_width, last_width + 1), range(first_height, last_height + 1)
            return [[height * image_size, width * image_size] for width in widths for height in heights]
        pinpoints = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return [[int(height), int(width)] for width, height in pinpoints]
    except (ValueError, TypeError, SyntaxError) as error:
        raise ShortVError(f"{source}: image_grid_pinpoints {pinpoints!r} is no list of pairs") from error


def write_generation_config(source: Path, output: Path, model_config: dict) -> None:
    """Write the ids of begin, end and padding tokens; sampling settings are left to the user."""
    path = source / "generation_config.json"
    given = model_config["text_config"] | (read_json(path) if path.is_file() else {})
    tokens = {key: given[key] for key in ("bos_token_id", "eos_token_id") if key in given}
    write_json(output / "generation_config.json", {**tokens, "pad_token_id": model_config["pad_token_id"]})


# Tokenizer and image processor


def write_tokenizer(source: Path, output: Path, text_config: dict, family: str, notes: list[str]) -> SpecialTokens:
    """Write the tokenizer with its chat template, unless the source has none."""
    visual = VISUAL_TOKENS.get(family, ("<image>",))
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        notes.append(f"{source}: has no tokenizer, so the output has none and takes only token ids")
        ids = {token: number for number, token in enumerate((*visual, "<pad>"), start=text_config["vocab_size"])}
        return SpecialTokens(ids["<image>"], ids.get("<video>"), ids["<pad>"])

    # AutoTokenizer would rebuild a tokenizer.json by its class, and the result depends on transformers' version.
    ready = (source / "tokenizer.json").is_file()
    hint = "get tokenizer.json again" if ready else "try pip install sentencepiece protobuf"
    with one_line(lambda error: f"{source}: its tokenizer cannot be read ({first_line(error)}); {hint}"):
        if ready:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        else:
            # LLaVA tokenizes the text after an image separately, so with a leading space; `legacy` does the same.
            backbone = AutoConfig.for_model(text_config["model_type"])
            tokenizer = AutoTokenizer.from_pretrained(source, config=backbone, legacy=True, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    added = [AddedToken(token, special=True, normalized=False) for token in visual]
    tokenizer.add_tokens(added, special_tokens=True)
    if tokenizer.pad_token in (None, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})

    template = FORMATS[format_of(text_config["model_type"], tokenizer.get_vocab())]
    (output / "chat_template.jinja").write_text(template, encoding="utf-8")
    (output / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",  # uses tokenizer.json unchanged
            **{name: token for name, token in special.items() if token is not None},
            "model_max_length": tokenizer.model_max_length,
            "padding_side": "left",  # as generation in batches needs it
            "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token types otherwise
            "clean_up_tokenization_spaces": False,
        },
    )
    image, video = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<video>"))
    return SpecialTokens(image, video if "<video>" in visual else None, tokenizer.pad_token_id)


def write_processor(tower: Path, output: Path, model_config: dict, config: dict, notes: list[str]) -> None:
    """Write the settings of the image processor, of the video processor if there is one, and of LLaVA's processor."""
    family, vision_config = model_config["model_type"], model_config["vision_config"]
    siglip = vision_config["model_type"] == "siglip_vision_model"
    padded = family == "llava" and config.get("image_aspect_ratio") == "pad"
    images = image_settings(tower, vision_config, crop=not siglip or padded, notes=notes)
    videos = None
    if padded:
        # LlavaImageProcessor pads to a square in the mean colour, and then crops nothing despite `crop_size`.
        images |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    elif family == "llava":
        images["image_processor_type"] = "SiglipImageProcessor" if siglip else "CLIPImageProcessor"
    elif family == "llava_onevision":
        videos = images | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
        images |= {"image_processor_type": "LlavaOnevisionImageProcessor", "do_pad": True}
    else:
        if family == "llava_next_video":
            videos = images | {"video_processor_type": "LlavaNextVideoVideoProcessor"}
        images |= {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
    if family != "llava":
        images["image_grid_pinpoints"] = model_config["image_grid_pinpoints"]
    processor = {
        "processor_class": ARCHITECTURES[family].replace("ForConditionalGeneration", "Processor"),
        "image_token": "<image>",
        "vision_feature_select_strategy": model_config["vision_feature_select_strategy"],
    }
    if family == "llava_onevision":
        num_patches = (vision_config["image_size"] // vision_config["patch_size"]) ** 2
        processor["num_image_tokens"] = num_patches + (not siglip)
        processor["vision_aspect_ratio"] = model_config["vision_aspect_ratio"]
    else:
        processor["patch_size"] = vision_config["patch_size"]
        processor["num_additional_image_tokens"] = int(not siglip)  # CLIP's class token
    if videos is not None:
        processor["video_token"] = "<video>"
        write_json(output / "video_preprocessor_config.json", videos)
    write_json(output / "preprocessor_config.json", images)
    write_json(output / "processor_config.json", processor)


def image_settings(tower: Path, vision_config: dict, crop: bool, notes: list[str]) -> dict:
    """LLaVA's settings for preprocessing images: for CLIP the tower's settings, for SigLIP LLaVA's own.

    `crop`: resize the shorter side and crop the centre; else resize both sides.
    """
    side = vision_config["image_size"]
    square = {"height": side, "width": side}
    settings = {
        **{"do_resize": True, "size": {"shortest_edge": side} if crop else square, "resample": 3},
        **({"do_center_crop": True, "crop_size": square} if crop else {}),
        **{"do_rescale": True, "rescale_factor": 1 / 255},
        **{"do_normalize": True, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD},
        "do_convert_rgb": True,
    }
    path = tower / "preprocessor_config.json"
    if vision_config["model_type"] == "siglip_vision_model":
        settings["image_mean"] = settings["image_std"] = [0.5, 0.5, 0.5]
    elif path.is_file():
        settings |= {key: value for key, value in read_json(path).items() if key in settings}
    else:
        notes.append(f"{tower}: has no preprocessor_config.json; the image processor got CLIP's usual settings")
    if isinstance(settings["size"], int):  # as in CLIP's first configurations
        settings["size"] = {"shortest_edge": settings["size"]}
    if isinstance(settings.get("crop_size"), int):
        settings["crop_size"] = dict.fromkeys(("height", "width"), settings["crop_size"])
    return settings
