"""Prefill throughput in vLLM against its stock LLaVA: `python -m shortv_llava.benchmarks.vllm_prefill`.

Both engines run in this process with random weights and take turns; the figure is the median of the paired ratios. The
vision tower is one narrow layer, so that the language model's prefill is what is timed. No request finds anything in a
cache.
"""

import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from shortv_llava import ShortVLlavaConfig
from shortv_llava.benchmarks.prefill import PATCH, PrefillSpeed, make_pair, make_processor
from shortv_llava.flops import flops_ratio
from shortv_llava.package import OWN_KEYS, write_package

TEXT_BEFORE_IMAGE = 35


def write_checkpoints(folder: Path, width: int, num_layers: int, image_side: int, layers: list[int]) -> list[Path]:
    """A stock LLaVA and a package of it, both without weights."""
    with torch.device("meta"):
        model, _ = make_pair(width, num_layers, image_side)
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
                "prompt_token_ids": [*text[:TEXT_BEFORE_IMAGE], image_token, *text[TEXT_BEFORE_IMAGE:]],
                "multi_modal_data": {"image": Image.fromarray(pixels)},
            }
        )
    return prompts


def main(
    width: Annotated[int, typer.Option(help="Hidden size.")] = 1024,
    num_layers: int = 16,
    text_tokens: int = 64,
    image_side: Annotated[int, typer.Option(help="Visual tokens are its square.")] = 24,
    fraction: Annotated[float, typer.Option(help="Of the layers, from the last on, are replaced.")] = 0.6,
    pairs: int = 7,
    batch: Annotated[int, typer.Option(help="Requests at once, prefilled in one step.")] = 4,
    eager: Annotated[bool, typer.Option("--eager", help="Neither engine compiles.")] = False,
) -> None:
    """Compare prefill with stock vLLM's."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import SamplingParams

    layers = list(range(num_layers))[num_layers - round(fraction * num_layers) :]
    tokens = text_tokens + image_side**2
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = write_checkpoints(Path(folder), width, num_layers, image_side, layers)
        config = ShortVLlavaConfig.from_pretrained(ours)
        engines = [make_engine(path, batch, tokens, eager) for path in (stock, ours)]

    def seconds(engine) -> float:
        prompts = make_prompts(batch, text_tokens, config.image_token_id, image_side)
        start = time.perf_counter()
        engine.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start

    for _ in range(2):
        for engine in engines:
            seconds(engine)
    timed = []
    for _ in range(pairs):
        times = {index: seconds(engines[index]) for index in random.sample((0, 1), 2)}
        timed.append((times[0], times[1]))
    stock_times, our_times = zip(*timed)
    speed = PrefillSpeed(
        bound=1 / flops_ratio(config, text_tokens, image_side**2),
        speed_up=statistics.median(a / b for a, b in timed),
        stock_seconds=statistics.median(stock_times),
        seconds=statistics.median(our_times),
    )
    print(
        f"{len(layers)} of {num_layers} layers replaced, {batch} requests of {tokens} tokens: "
        f"{batch * tokens / speed.stock_seconds:.0f} -> {batch * tokens / speed.seconds:.0f} tokens/s, "
        f"{speed.speed_up:.3f}x of at most {speed.bound:.3f}x ({speed.share_of_bound:.3f})"
    )


if __name__ == "__main__":
    typer.run(main)
