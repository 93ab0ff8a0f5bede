"""LC scores with shared layer passes, compared with one full pass for each layer.

The other side follows the definition and the authors' code: one pass of the original model and one for every layer, in
which the layer's outputs for visual tokens are replaced by its inputs. Both sides run in turns in one process.
"""

import statistics
import time

import torch

from shortv_llava.benchmarks.models import make_inputs, make_pair
from shortv_llava.benchmarks.sizes import Shape
from shortv_llava.calibrate.contribution import divergence, layer_contribution
from shortv_llava.chat.prompts import visual_tokens
from shortv_llava.checkpoint.loading import text_decoder


@torch.no_grad()
def one_pass_each(model, inputs) -> torch.Tensor:
    """LC scores of a stock LLaVA by L + 1 full passes: float64 of shape `(num_layers,)`."""
    visual = visual_tokens(model.config, inputs["input_ids"]).unsqueeze(-1)

    def logits() -> torch.Tensor:
        return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]

    original, variants = logits(), []
    for layer in text_decoder(model).layers:
        handle = layer.register_forward_hook(lambda layer, args, output: torch.where(visual, args[0], output))
        variants.append(logits())
        handle.remove()
    return divergence(original, torch.stack(variants), "release").mean(dim=1)


def run(shape: Shape, text_tokens: int, pairs: int) -> None:
    """Compare the time of one sample's scores."""
    num_layers = shape.num_layers
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
