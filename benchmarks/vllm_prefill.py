"""Prefill throughput in vLLM against its stock LLaVA.

Both engines run in this process with random weights and take turns; the figure is the median of the paired ratios. The
vision tower is one narrow layer, so the time is that of the language model's prefill. Nothing is in a prefix cache.
"""

import functools
import json
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image

from shortv_llava import ShortVLlavaConfig
from shortv_llava.benchmarks.measure import compare
from shortv_llava.benchmarks.models import BEFORE_IMAGE, PATCH, make_pair, make_processor
from shortv_llava.benchmarks.sizes import Shape
from shortv_llava.checkpoint.config import OWN_KEYS
from shortv_llava.checkpoint.package import write_package
from shortv_llava.flops import flops_ratio


def write_checkpoints(folder: Path, shape: Shape, layers: list[int]) -> list[Path]:
    """A stock LLaVA and a package of it, both without weights."""
    model, _ = make_pair(shape, "meta")
    make_processor(model).save_pretrained(folder / "stock")
    config = {key: value for key, value in model.config.to_dict().items() if key not in OWN_KEYS}
    config |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    (folder / "stock" / "config.json").write_text(json.dumps(config))
    write_package(folder / "stock", folder / "package", weights=False, replaced_layers=layers)
    return [folder / "stock", folder / "package"]


def make_engine(folder: Path, batch: int, tokens: int, eager: bool):
    from vllm import LLM

    return LLM(
        str(folder),
        load_format="dummy",
        dtype="float32" if not torch.cuda.is_available() else "bfloat16",
        enforce_eager=eager,
        max_model_len=tokens + 1,
        max_num_seqs=batch,
        max_num_batched_tokens=batch * tokens,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        gpu_memory_utilization=0.4,  # two engines on one device
        disable_log_stats=True,
    )


def make_prompts(batch: int, text_tokens: int, image_token: int, image_side: int) -> list[dict]:
    """Requests of random text around a random image."""
    side = image_side * PATCH
    prompts = []
    for _ in range(batch):
        text = torch.randint(3, image_token - 1, (text_tokens,)).tolist()
        pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8).numpy()
        prompts.append(
            {
                "prompt_token_ids": [*text[:BEFORE_IMAGE], image_token, *text[BEFORE_IMAGE:]],
                "multi_modal_data": {"image": Image.fromarray(pixels)},
            }
        )
    return prompts


def run(shape: Shape, text_tokens: int, fraction: float, pairs: int, batch: int, eager: bool) -> None:
    """Compare prefill with stock vLLM's."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import SamplingParams

    num_layers, image_side = shape.num_layers, shape.image_side
    layers = shape.layers(round(fraction * num_layers))
    tokens = text_tokens + image_side**2
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = write_checkpoints(Path(folder), shape, layers)
        config = ShortVLlavaConfig.from_pretrained(ours)
        engines = [make_engine(path, batch, tokens, eager) for path in (stock, ours)]

    def prefill(engine) -> None:
        prompts = make_prompts(batch, text_tokens, config.image_token_id, image_side)
        engine.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)

    found = compare(*(functools.partial(prefill, engine) for engine in engines), pairs, torch.device("cpu"))
    bound = 1 / flops_ratio(config, text_tokens, image_side**2)
    print(
        f"{len(layers)} of {num_layers} layers replaced, {batch} requests of {tokens} tokens: "
        f"{batch * tokens / found.stock:.0f} -> {batch * tokens / found.ours:.0f} tokens/s, "
        f"{found.ratio:.3f}x of at most {bound:.3f}x ({found.ratio / bound:.3f})"
    )
