"""Peak memory of converting an original LLaVA and of merging a LoRA into it, on random weights of any size."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from shortv_llava.checkpoint.tensors import PlannedTensor, StoredTensor, write_shard
from shortv_llava.files.json_files import write_json

PROGRAM = """if True:
    import sys, time
    from pathlib import Path
    from shortv_llava.checkpoint.conversion import convert

    def memory(kind):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) * 1024

    before, begin = memory("VmRSS"), time.monotonic()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    print(memory("VmHWM") - before, time.monotonic() - begin)
"""
GB = 1e9


def run(
    hidden: int,
    intermediate: int,
    layers: int,
    vocabulary: int,
    first_shard: float,
    rank: int,
    folder: Path | None,
) -> None:
    """Print both peaks.

    Memory-mapped files count: the pages read of a shard are resident until the next shard is opened.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        original, adapter, output = (Path(temporary, name) for name in ("llava-original", "llava-lora", "output"))
        text = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
        text |= {"vocab_size": vocabulary, "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128}
        largest = make_original(original, text, first_shard * GB)
        make_adapter(adapter, original, text, rank)
        for name, source in (("converted", original), ("merged", adapter)):
            command = [sys.executable, "-c", PROGRAM, source, output]
            peak, seconds = map(
                float, subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            )
            written = sum(path.stat().st_size for path in output.iterdir())
            shutil.rmtree(output)
            print(
                f"{name} {written / GB:.2f} GB in {seconds:.0f} s; peak {peak / GB:.3f} GB, "
                f"largest shard {largest / GB:.3f} GB, beyond it {(peak - largest) / 1e6:.0f} MB"
            )


def make_original(folder: Path, text: dict, first_shard: float) -> int:
    """Write a LLaVA-1.5 with random half-precision weights and a separate tower. Returns the largest shard's bytes."""
    folder.mkdir()
    hidden = text["hidden_size"]
    width = hidden // 4  # a 7B's is CLIP-L
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = CLIPVisionConfig(**sizes, image_size=336, patch_size=14)
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **text)).state_dict()
        tower = CLIPVisionModel(vision).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in language.items()}
    for number, columns in ((0, width), (2, hidden)):
        shapes |= {
            f"model.mm_projector.{number}.weight": (hidden, columns),
            f"model.mm_projector.{number}.bias": (hidden,),
        }
    shards, size = ([], []), 0
    for name, shape in shapes.items():
        size += 2 * torch.Size(shape).numel()
        shards[size > first_shard].append(name)
    weight_map, largest = {}, 0
    for number, names in enumerate(filter(None, shards), start=1):
        shard = f"model-{number}.safetensors"
        largest = max(largest, write_random(folder / shard, {name: shapes[name] for name in names}, "F16"))
        weight_map |= dict.fromkeys(names, shard)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    images = {"mm_vision_tower": str(folder / "tower"), "image_aspect_ratio": "pad"}
    write_json(folder / "config.json", {"model_type": "llava_llama", **text, **images})
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps(vision.to_dict()))
    write_random(folder / "tower" / "model.safetensors", {name: tuple(t.shape) for name, t in tower.items()}, "F16")
    return largest


def make_adapter(folder: Path, base: Path, text: dict, rank: int) -> None:
    """A LoRA on all linear layers of the language model, in LLaVA's layout."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    hidden, intermediate = text["hidden_size"], text["intermediate_size"]
    sides = dict.fromkeys((f"self_attn.{letter}_proj" for letter in "qkvo"), (hidden, hidden))
    sides |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    sides |= {"mlp.down_proj": (hidden, intermediate)}
    shapes = {}
    for layer in range(text["num_hidden_layers"]):
        for module, (rows, columns) in sides.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            shapes |= {f"{name}.lora_A.weight": (rank, columns), f"{name}.lora_B.weight": (rows, rank)}
    write_random(folder / "adapter_model.safetensors", shapes, "F32")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": str(base)}
    write_json(folder / "adapter_config.json", settings)


def write_random(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    """Write a file of normally distributed values, the same in every tensor. Returns its size in bytes."""
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    numbers = torch.randn(1 << 20).half().repeat(-(-largest // (1 << 20)))

    def stored(shape):
        return StoredTensor(shape, dtype, lambda: numbers[: torch.Size(shape).numel()].view(shape))

    planned = {name: PlannedTensor(path, name, shape, dtype) for name, shape in shapes.items()}
    write_shard(path, planned, {name: stored(shape) for name, shape in shapes.items()}, {})
    return path.stat().st_size
