"""Tensors in weight files: read without executing anything, planned by name, and written one shard at a time.

A plan gives the source of every tensor of an output. The whole plan is checked before the first byte is written. No
model is loaded into memory.
"""

import contextlib
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from shortv_llava.errors import ShortVError, first_line
from shortv_llava.files.json_files import read_json, write_json

SINGLE_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors names them
CONSTANTS = (".rotary_emb.inv_freq", ".position_ids")  # saved by old versions, computed by later ones
QUANT_STATE = ".quant_state.bitsandbytes__"  # in the name of the tensor with a 4-bit weight's shape before packing
MERGED_ROWS = 512  # rows of a weight merged at a time, to limit the float32 copy


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    read: Callable[[], torch.Tensor]


class LowRankUpdate(NamedTuple):
    """LoRA's update of a weight (out, in): scaling * up (out, r) @ down (r, in); the transpose if `transposed`."""

    file: Path
    down: str
    up: str
    scaling: float
    transposed: bool


class PlannedTensor(NamedTuple):
    """Where a tensor of the output comes from, and the dtype it is written in."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    update: LowRankUpdate | None = None


# Reading


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint's weights, by the names of its files."""
    return any((folder / f"{name}{suffix}").is_file() for name in SINGLE_WEIGHT_FILES for suffix in ("", ".index.json"))


def weight_index(folder: Path) -> Path | None:
    """The index of the weights that transformers loads; None if there is a single weight file or none."""
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
    """The files in its folder that an index of weights names, whether they exist or not."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ShortVError(f"{index}: has no weight_map; get the file again")
    for shard in weight_map.values():
        # Paths are not resolved: the files of a Hub cache are links to other folders.
        if not isinstance(shard, str) or shard in ("", "..") or Path(shard).name != shard:
            raise ShortVError(f"{index}: refused, the shard {shard!r} is no file name in that folder")
    return [index.with_name(shard) for shard in dict.fromkeys(weight_map.values())]


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of one weight file by name, readable until the context ends."""
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


def stored_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in `files` by name, from their headers, which must fit the files' sizes.

    Raises:
        ShortVError: if a file is damaged, holds no tensors, or holds other data than tensors.
    """
    shapes = {}
    for path in files:
        with open_shard(path) as stored:
            if not stored:
                raise ShortVError(f"{path}: holds no tensors; get the file again")
            shapes |= {name: tensor.shape for name, tensor in stored.items()}
    return shapes


def unpacked_shapes(files: list[Path], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """`shapes` with the unquantised shapes of weights that bitsandbytes packed, without its further tensors.

    Raises:
        ShortVError: if a part is missing or of another size.
    """
    states, integers, bits = {}, [], {}
    for path in files:
        with open_shard(path) as stored:
            for name, tensor in stored.items():
                bits[name] = int((re.search(r"\d+", tensor.dtype) or "8")[0])
                if QUANT_STATE in name:
                    states[name] = path, tensor.read().flatten().tolist()
                elif tensor.dtype in ("I8", "torch.int8"):
                    integers.append(name)
    unpacked = dict(shapes)

    def take(name: str, count: int, size: int = 1) -> None:
        found = unpacked.pop(name, None)
        if found is None or math.prod(found) * size != count:
            raise ShortVError(f"{files[0].parent}: {name} is missing or of another size; quantise the model again")

    for name in integers:
        take(f"{name.removesuffix('weight')}SCB", shapes[name][0] if shapes[name] else 1)
        unpacked.pop(f"{name.removesuffix('weight')}weight_format", None)
    for name, (path, content) in states.items():
        weight = name.partition(QUANT_STATE)[0]
        try:
            state = json.loads(bytes(content))
            shape = torch.Size(state["shape"])
            blocks = -(-shape.numel() // state["blocksize"])
            nested = -(-blocks // state["nested_blocksize"]) if "nested_blocksize" in state else None
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise ShortVError(f"{path}: {name} cannot be read ({error!r}); quantise the model again") from error
        take(weight, -(-shape.numel() // 2), bits.get(weight, 8) // 8)
        take(f"{weight}.absmax", blocks)
        take(f"{weight}.quant_map", 16)
        if nested is not None:
            take(f"{weight}.nested_absmax", nested)
            take(f"{weight}.nested_quant_map", 256)
        del unpacked[name]
        unpacked[weight] = shape
    return unpacked


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file, memory-mapped; code in the pickle is not executed."""
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


# Planning


def plan_tensors(files: list[Path], target_of: Callable[[str], str | None] = str) -> dict[str, PlannedTensor]:
    """Plan of all tensors in `files` by their names in the output.

    Args:
        target_of: maps a tensor's name to its name in the output, None to leave it out; by default names are kept.

    Raises:
        ShortVError: if a file is damaged, holds other data than tensors, or two tensors get one name.
    """
    plan = {}
    for file in files:
        with open_shard(file) as stored:
            for name, tensor in stored.items():
                target = None if name.endswith(CONSTANTS) else target_of(name)
                if target is None:
                    continue
                if target in plan:
                    raise ShortVError(f"{file}: the tensor {name} is also in {plan[target].file}; keep the right one")
                plan[target] = PlannedTensor(file, name, tensor.shape, tensor.dtype)
    return plan


def check_dtypes(plan: dict[str, PlannedTensor]) -> None:
    for tensor in plan.values():
        if tensor.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ShortVError(f"{tensor.file}: the tensor {tensor.name} is {tensor.dtype}; it must be one of {known}")


# Writing


def write_weights(
    output: Path, plan: dict[str, PlannedTensor], new_rows: dict[str, torch.Tensor], description: str
) -> None:
    """Write one shard for each source file, and their index.

    Args:
        plan: the plan, with names, shapes and dtypes already checked.
        new_rows: rows to append to tensors, by their names in the plan.
        description: text of the progress bar.
    """
    files = list(dict.fromkeys(tensor.file for tensor in plan.values()))
    weight_map, total_size = {}, 0
    for number, file in enumerate(tqdm(files, desc=description, unit="shard", disable=None), start=1):
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        planned = {target: tensor for target, tensor in plan.items() if tensor.file == file}
        with open_shard(file) as stored:
            total_size += write_shard(output / shard, planned, stored, new_rows)
        weight_map |= dict.fromkeys(planned, shard)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(output / "model.safetensors.index.json", index)


def write_shard(
    path: Path,
    planned: dict[str, PlannedTensor],
    stored: dict[str, StoredTensor],
    new_rows: dict[str, torch.Tensor],
) -> int:
    """Write a safetensors file, one tensor in memory at a time, and return the size of its tensors in bytes.

    The library's own function needs all tensors cast and enlarged beforehand, a copy of the whole shard in memory.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in planned.items():
        shape = [*tensor.shape]
        if name in new_rows:
            shape[0] += len(new_rows[name])
        begin, end = end, end + math.prod(shape) * DTYPES[tensor.dtype].itemsize
        header[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in planned.items():
            weight = stored[tensor.name].read().detach()
            parts = [weight] if tensor.update is None else merged(weight, tensor.update)
            for part in (*parts, *([new_rows[name]] if name in new_rows else [])):
                file.write(part.to(DTYPES[tensor.dtype]).flatten().view(torch.uint8).numpy())
    return end


def merged(weight: torch.Tensor, update: LowRankUpdate) -> Iterator[torch.Tensor]:
    """The rows of a weight (out, in) with its update, in float32, MERGED_ROWS at a time."""
    # Opened again for each weight, so that pages of the file that were read before are released.
    with open_shard(update.file) as stored:
        down, up = (stored[name].read().detach().float() for name in (update.down, update.up))
    if update.transposed:
        down, up = up.T, down.T
    for rows, factors in zip(weight.split(MERGED_ROWS), up.split(MERGED_ROWS)):
        yield rows.float() + (factors @ down) * update.scaling
