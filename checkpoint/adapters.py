"""LoRA adapters, LLaVA's and PEFT's: merging their tensors into the plan of the checkpoint they were trained on."""

import re
from collections.abc import Callable
from pathlib import Path

from shortv_llava.checkpoint.source import fetch_part
from shortv_llava.checkpoint.tensors import LowRankUpdate, PlannedTensor, check_dtypes, has_weights, plan_tensors
from shortv_llava.errors import ShortVError
from shortv_llava.files.json_files import read_json

# Parts that PEFT, LLaVA and versions of transformers add to a tensor's name. The name is unique without them.
WRAPPERS = {"base_model", "base_layer", "default", "language_model", "model", "modules_to_save", "vision_model"}
# Values of `init_lora_weights` that do not change the base's weights; the adapter would lack such a change.
INITIAL_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal")


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter and no weights of its own."""
    return (Path(folder) / "adapter_config.json").is_file() and not has_weights(Path(folder))


def plain_name(name: str) -> str:
    """Name of a tensor without WRAPPERS, such as `layers.0.self_attn.q_proj.weight`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def base_folder(adapter: Path, base: Path | str | None) -> Path:
    """The folder of an adapter's base: `base`, a folder or Hub id; by default the base that the adapter names.

    Raises:
        ShortVError: if the adapter names no base, the base cannot be fetched, or it is an adapter itself.
    """
    base = base or read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    folder = fetch_part(adapter, base, "base model", "pass --base-weights DIR|HUB_ID")
    if is_adapter(folder):
        raise ShortVError(f"{folder}: is an adapter itself; merge it into its base first")
    return folder


def with_adapter(
    plan: dict[str, PlannedTensor], adapter: Path, target_of: Callable[[str], str]
) -> dict[str, PlannedTensor]:
    """The plan of a base with an adapter merged into it.

    LoRA's pairs become updates of their weights. Tensors that were trained as a whole (the projector,
    `modules_to_save`, biases) replace the base's tensors, in the base's dtype, or are added if the base has none.

    Args:
        target_of: maps the adapter's name of a tensor to its name in the plan.

    Raises:
        ShortVError: if the adapter is no LoRA adapter, is incomplete, or does not fit the base.
    """
    settings = read_json(adapter / "adapter_config.json")
    check_settings(adapter, settings)
    tensors = {}
    for file in adapter_files(adapter):
        tensors |= {(file, name): tensor for name, tensor in plan_tensors([file], lambda name: name).items()}
    check_dtypes(tensors)

    plan, pairs = dict(plan), {}
    for (file, name), tensor in tensors.items():
        part = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.default)?(\.weight)?", name)
        if part:
            pairs.setdefault(part[1], {})[part[3]] = tensor
            continue
        target = target_of(name)
        base = plan.get(target)
        if base is not None and base.shape != tensor.shape:
            raise ShortVError(f"{file}: the tensor {name} has the shape {tensor.shape}, its base's is {base.shape}")
        plan[target] = tensor._replace(dtype=base.dtype) if base is not None else tensor
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            have, lack = ("A", "B") if "A" in pair else ("B", "A")
            raise ShortVError(f"{pair[have].file}: {pair[have].name} has no lora_{lack} beside it; get the file again")
        target = target_of(f"{module}.weight")
        if target not in plan:
            raise ShortVError(f"{pair['A'].file}: {pair['A'].name} finds no weight in the base it is merged into")
        plan[target] = plan[target]._replace(update=low_rank_update(module, pair, plan[target], settings))
    return plan


def check_settings(adapter: Path, settings: dict) -> None:
    """Refuse adapters that are not merged by LoRA's formula."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ShortVError(f"{adapter}: its peft_type is {kind!r}; only LORA can be merged")
    if settings.get("use_dora"):
        raise ShortVError(f"{adapter}: is a DoRA adapter (use_dora); merge it with PEFT and give the result")
    initial = settings.get("init_lora_weights")
    if initial not in INITIAL_WEIGHTS:
        reason = f"init_lora_weights {initial!r} changes the base's weights"
        raise ShortVError(f"{adapter}: {reason}; merge it with PEFT and give the result")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(key) or {}, dict):
            raise ShortVError(f"{adapter}: its {key} is no object")


def adapter_files(adapter: Path) -> list[Path]:
    names = ("adapter_model.safetensors", "adapter_model.bin")
    weights = [adapter / name for name in names if (adapter / name).is_file()][:1]
    if not weights:
        raise ShortVError(f"{adapter}: has an adapter_config.json but neither {' nor '.join(names)}; get it again")
    trained = adapter / "non_lora_trainables.bin"  # LLaVA's, the projector
    return [*weights, *([trained] if trained.is_file() else [])]


def low_rank_update(
    module: str, pair: dict[str, PlannedTensor], weight: PlannedTensor, settings: dict
) -> LowRankUpdate:
    """PEFT's formula: B A times alpha / r, or alpha / sqrt(r) with `use_rslora`.

    Args:
        module: the adapter's name of the updated module.
        pair: "A" (r, in) and "B" (out, r); for an embedding (r, vocabulary) and (h, r).
        weight: (out, in); for an embedding (vocabulary, h).
    """
    down, up = pair["A"], pair["B"]
    rank = by_pattern(module, settings, "rank_pattern", "r")
    alpha = by_pattern(module, settings, "alpha_pattern", "lora_alpha")
    transposed = "lora_embedding_" in down.name  # never by fan_in_fan_out, for all layers of LLaVA are torch's linear
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise ShortVError(f"{down.file}: {down.name} and its lora_B are no matrices; only linear layers can be merged")
    if down.shape[0] != rank or up.shape[1] != rank:
        found = f"{down.shape} and lora_B {up.shape}"
        raise ShortVError(
            f"{down.file}: {down.name} has the shape {found}, by adapter_config.json their rank is {rank}"
        )
    shape = (up.shape[0], down.shape[1])
    if (shape[::-1] if transposed else shape) != weight.shape:
        raise ShortVError(f"{down.file}: {down.name} and its lora_B give {shape}, the base's weight is {weight.shape}")
    scaling = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return LowRankUpdate(down.file, down.name, up.name, scaling, transposed)


def by_pattern(module: str, settings: dict, patterns: str, default: str) -> float:
    """A number of adapter_config.json: the value of the first of `patterns` that matches the module, else `default`."""
    name = re.sub(r"^base_model\.model\.", "", module)
    values = settings.get(patterns) or {}
    try:
        pattern = next((pattern for pattern in values if re.match(rf"(.*\.)?({pattern})$", name)), None)
    except re.error as error:
        raise ShortVError(f"adapter_config.json: {patterns} has what is no regular expression ({error})") from error
    value = settings.get(default) if pattern is None else values[pattern]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise ShortVError(f"adapter_config.json: {default} must be a positive number, is {value!r} for {name}")
    return value
