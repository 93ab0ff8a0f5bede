"""Seconds and memory of fitting corrections, measured on one shape and computed for another by operations."""

import time

import torch

from shortv_llava.benchmarks.models import make_inputs, make_pair
from shortv_llava.benchmarks.sizes import Shape, find_shape
from shortv_llava.calibrate.correction import FitSample, Regression, fit_corrections
from shortv_llava.flops import prefill_flops


def sweep_operations(text_config, shape: Shape, text_tokens: int, number: int) -> int:
    """Operations of one picture's two passes, with `number` layers replaced, and of its part of the fits' sums."""
    tokens, layers = (text_tokens, shape.visual_tokens), range(number)
    sums = 4 * shape.visual_tokens * shape.width**2
    return prefill_flops(text_config, *tokens) + prefill_flops(text_config, *tokens, layers, layers) + number * sums


def solve_seconds(size: int, rank: int, device: str) -> float:
    """Seconds of one layer's closed-form solution, given the sums."""
    regression = Regression(size, torch.device(device))
    regression.add(torch.randn(2 * size, size, device=device), torch.randn(2 * size, size, device=device))
    begin = time.perf_counter()
    regression.solve(rank)
    return time.perf_counter() - begin


def run(
    model: str,
    wanted: str,
    layers: float,
    rank: int,
    pictures: int,
    samples: int,
    text_tokens: int,
    device: str,
) -> None:
    """Time a fit on a model with random weights in float32, and print the time for another shape at the same rate."""
    shape, other = find_shape(model), find_shape(wanted)
    _, ours = make_pair(shape, device)
    number = round(layers * shape.num_layers)
    ours.set_replaced_layers(shape.layers(number))
    fit_samples = [FitSample(ours, make_inputs(ours, shape, text_tokens)) for _ in range(pictures)]
    begin = time.perf_counter()
    fit_corrections(ours, fit_samples, rank)
    seconds = time.perf_counter() - begin
    closed_form = number * solve_seconds(shape.width, rank, device)
    operations = pictures * sweep_operations(ours.config.text_config, shape, text_tokens, number)
    rate = operations / (seconds - closed_form)
    print(
        f"{model}, {number} of {shape.num_layers} layers, {pictures} picture{'s' * (pictures != 1)}: {seconds:.1f} s, "
        f"of these {closed_form:.1f} s for the closed form; {rate / 1e9:.0f} GFLOP/s"
    )

    text_config = make_pair(other, "meta")[1].config.text_config
    number = round(layers * other.num_layers)
    sweeps = samples * sweep_operations(text_config, other, text_tokens, number)
    closed_form = number * solve_seconds(other.width, rank, device)
    states = samples * 3 * (text_tokens + other.visual_tokens) * other.width * 2
    print(
        f"{wanted}, {number} of {other.num_layers} layers, {samples} pictures: {sweeps / 1e12:.0f} TFLOP, "
        f"{sweeps / rate / 60:.1f} minutes at this rate, {closed_form / 60:.1f} more for the closed form (measured); "
        f"{states / 1e9:.1f} GB of states in half precision, in memory or on disk, and "
        f"{2 * other.width**2 * 8 / 1e9:.2f} GB of sums, beside one layer's weights"
    )
