"""Decoding after a prompt with an image, compared with the stock model; ShortV layers then run as stock layers."""

import torch
from transformers import DynamicCache, StaticCache

from shortv_llava.benchmarks.measure import compare
from shortv_llava.benchmarks.models import make_inputs, make_pair
from shortv_llava.benchmarks.sizes import find_shape
from shortv_llava.checkpoint.loading import cache_name


@torch.no_grad()
def run(model: str, tokens: int, compile: bool) -> None:
    """Time of a decoded token with a growing and with a static cache, 60% of the layers replaced."""
    shape, on_gpu = find_shape(model), torch.cuda.is_available()
    stock, ours = make_pair(shape, *(("cuda", torch.bfloat16) if on_gpu else ()))
    ours.set_replaced_layers(shape.layers(round(0.6 * shape.num_layers)))
    inputs, warm_up = make_inputs(ours, shape), 5
    length = inputs["input_ids"].shape[1]

    def steps(which, static: bool, compiled: bool):
        config = which.config.get_text_config()
        room = length + warm_up + tokens
        cache = StaticCache(config=config, max_cache_len=room) if static else DynamicCache(config=config)
        cached = {cache_name(): cache}
        which(**inputs, **cached, logits_to_keep=1)
        forward = torch.compile(which.forward) if compiled else which.forward
        positions = iter(torch.arange(length, room, device=ours.device))
        mask = torch.ones(1, room, dtype=torch.long, device=ours.device)
        token = inputs["input_ids"][:, :1]

        def step():
            position = next(positions)[None]
            seen = mask if static else mask[:, : cache.get_seq_length() + 1]
            positioned = {"position_ids": position[None], "cache_position": position}
            forward(input_ids=token, attention_mask=seen, logits_to_keep=1, **cached, **positioned)

        return step

    kinds = [("growing cache", False, False), ("static cache", True, False)]
    if compile:
        kinds.append(("static cache, torch.compile", True, True))
    for name, *kind in kinds:
        if on_gpu:  # else the first side would pay for the kernels' set-up at each new length
            rehearse = steps(stock, *kind)
            for _ in range(warm_up + tokens):
                rehearse()
        found = compare(steps(stock, *kind), steps(ours, *kind), tokens, ours.device, warm_up)
        low, high = found.quartiles
        print(
            f"{model}, {name}: a token in {1000 * found.stock:.2f} ms, ShortV {1000 * found.ours:.2f} ms, "
            f"{found.ratio:.3f}x (quartiles {low:.3f}-{high:.3f})"
        )
