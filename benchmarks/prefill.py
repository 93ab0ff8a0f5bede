"""Prefill speed against the stock model: `python -m shortv_llava.benchmarks.prefill`.

Both models hold the same random weights and take turns in one process; the figure is the median of the paired ratios.
The vision tower is one narrow layer, so that the language model's prefill is what is timed.
"""

import random
import statistics
import time
from typing import Annotated, NamedTuple

import torch
import typer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration

from shortv_llava import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
from shortv_llava.checkpoints import CHECKPOINT
from shortv_llava.flops import flops_ratio
from shortv_llava.package import load_processor

PATCH = 14
IMAGE_TOKEN = 999


class PrefillSpeed(NamedTuple):
    """One comparison: what the cost model allows and what was measured."""

    bound: float  # 1 / r
    speed_up: float  # median of stock time over ours, pair by pair
    stock_seconds: float  # median
    seconds: float  # median

    @property
    def share_of_bound(self) -> float:
        return self.speed_up / self.bound


def make_pair(width: int, num_layers: int, image_side: int):
    """(stock, ours): LLaVA-1.5 with random weights, Llama's proportions and `image_side`^2 visual tokens an image."""
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=8192,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=image_side * PATCH,
        patch_size=PATCH,
    )
    config = ShortVLlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    ours = ShortVLlavaForConditionalGeneration(config).eval()
    stock = LlavaForConditionalGeneration(config).eval()
    stock.load_state_dict(ours.state_dict(), assign=True)
    return stock, ours


def last_layers(num_layers: int, fraction: float) -> list[int]:
    return list(range(num_layers))[num_layers - round(fraction * num_layers) :]


def make_processor(model):
    """A processor for a model of [`make_pair`], which is told the image token, with the embedded checkpoint's words."""
    processor, side = load_processor(CHECKPOINT), model.config.vision_config.image_size
    processor.patch_size = PATCH
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    model.config.image_token_id = processor.image_token_id
    return processor


def make_inputs(model, text_tokens: int, batch: int = 1) -> dict:
    """A prompt whose image follows 35 text tokens, as LLaVA's does."""
    side = model.config.vision_config.image_size
    visual_tokens = (side // PATCH) ** 2
    text = torch.randint(3, IMAGE_TOKEN, (batch, text_tokens))
    image = torch.full((batch, visual_tokens), IMAGE_TOKEN)
    ids = torch.cat([text[:, :35], image, text[:, 35:]], dim=1)
    pixels = torch.randn(batch, 3, side, side, dtype=model.dtype)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    return {key: value.to(model.device) for key, value in inputs.items()}


@torch.no_grad()
def compare(stock, ours, inputs: dict, pairs: int) -> PrefillSpeed:
    """Time `pairs` prefills of each, in turns, after two to warm up."""

    def seconds(model) -> float:
        start = time.perf_counter()
        model(**inputs, use_cache=True, logits_to_keep=1)
        if inputs["input_ids"].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        seconds(stock), seconds(ours)
    timed = []
    for _ in range(pairs):
        order = random.sample((stock, ours), 2)
        times = {model: seconds(model) for model in order}
        timed.append((times[stock], times[ours]))
    visual = int((inputs["input_ids"][0] == ours.config.image_token_id).sum())
    ratio = flops_ratio(ours.config, inputs["input_ids"].shape[1] - visual, visual)
    stock_times, our_times = zip(*timed)
    return PrefillSpeed(
        bound=1 / ratio,
        speed_up=statistics.median(a / b for a, b in timed),
        stock_seconds=statistics.median(stock_times),
        seconds=statistics.median(our_times),
    )


def main(
    width: Annotated[int, typer.Option(help="Hidden size.")] = 1024,
    num_layers: int = 16,
    text_tokens: int = 64,
    image_side: Annotated[int, typer.Option(help="Visual tokens are its square.")] = 24,
    fraction: Annotated[float, typer.Option(help="Of the layers, from the last on, are replaced.")] = 0.6,
    pairs: int = 11,
    batch: int = 1,
) -> None:
    """Compare prefill with the stock model's."""
    stock, ours = make_pair(width, num_layers, image_side)
    ours.set_replaced_layers(last_layers(num_layers, fraction))
    speed = compare(stock, ours, make_inputs(ours, text_tokens, batch), pairs)
    print(
        f"{len(ours.config.replaced_layers)} of {num_layers} layers replaced: {speed.stock_seconds:.3f} s -> "
        f"{speed.seconds:.3f} s, {speed.speed_up:.3f}x of at most {speed.bound:.3f}x ({speed.share_of_bound:.3f})"
    )


if __name__ == "__main__":
    typer.run(main)
