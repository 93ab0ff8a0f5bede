"""LC scores with shared work against a full pass for each.

The other side is what the definition says and the authors' code does: the model once as it is and once for every layer,
with the visual tokens put back there to what they were. Both sides take turns in one process.
"""

import statistics
import time

import torch

from shortv_llava.benchmarks.models import ImageSide, Width, make_inputs, make_pair, scaled
from shortv_llava.calibrate.contribution import divergence, layer_contribution


@torch.no_grad()
def one_pass_each(model, inputs) -> torch.Tensor:
    """LC scores of a stock LLaVA by L + 1 full passes: float64 of shape `(num_layers,)`."""
    visual = (inputs["input_ids"] == model.config.image_token_id).unsqueeze(-1)

    def logits() -> torch.Tensor:
        return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]

    original, variants = logits(), []
    for layer in model.model.language_model.layers:
        handle = layer.register_forward_hook(lambda layer, args, output: torch.where(visual, args[0], output))
        variants.append(logits())
        handle.remove()
    return divergence(original, torch.stack(variants), "release").mean(dim=1)


def main(
    width: Width = 1024,
    num_layers: int = 16,
    text_tokens: int = 64,
    image_side: ImageSide = 24,
    pairs: int = 3,
) -> None:
    """Compare the time of one sample's scores."""
    shape = scaled(width, num_layers, image_side)
    stock, ours = make_pair(shape)
    inputs = make_inputs(ours, shape, text_tokens)

    def timed(compute) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        scores = compute().cpu()
        return time.perf_counter() - start, scores

    times = []
    for _ in range(pairs):
        each, expected = timed(lambda: one_pass_each(stock, inputs))
        shared, scores = timed(lambda: layer_contribution(ours, inputs))
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-3)
        times.append((each, shared))
    layer_passes = num_layers * (num_layers + 1), num_layers + num_layers * (num_layers - 1) // 2
    print(
        f"{num_layers + 1} full passes {statistics.median(a for a, _ in times):.2f} s, shared "
        f"{statistics.median(b for _, b in times):.2f} s: {statistics.median(a / b for a, b in times):.3f}x, median of "
        f"{pairs}; layer passes {layer_passes[0]} / {layer_passes[1]} = {layer_passes[0] / layer_passes[1]:.3f}"
    )
