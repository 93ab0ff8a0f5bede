"""One calibration: samples in, LC scores and the layers to replace out."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from shortv_llava.calibrate.contribution import Direction, layer_contribution
from shortv_llava.calibrate.samples import Sample, make_inputs
from shortv_llava.calibrate.selection import lowest, number_of_layers
from shortv_llava.errors import ShortVError
from shortv_llava.package import check_output, write_package


class Calibration(NamedTuple):
    """The mean visual LC score of every layer, and the layers chosen, in order of replacement."""

    lc_scores: list[float]
    replaced_layers: list[int]


def score_samples(model, processor, samples: Sequence[Sample], direction: Direction) -> torch.Tensor:
    """Visual LC scores, float64 of shape `(samples, num_layers)`.

    Raises:
        ShortVError: if a score is not finite; names the sample.
    """
    scores = []
    for sample in tqdm(samples, desc="LC scores", unit="sample"):
        inputs = make_inputs(processor, [sample]).to(model.device)
        scores.append(layer_contribution(model, inputs, direction=direction).cpu())
        if not scores[-1].isfinite().all():
            raise ShortVError(f"sample {sample.id}: LC scores are not finite; try another dtype or leave the sample out")
    return torch.stack(scores)


def calibrate(
    base: Path,
    model,
    processor,
    samples: Sequence[Sample],
    output: Path,
    data: str,
    seed: int,
    num_layers: int | None = None,
    direction: Direction = "release",
    overwrite: bool = False,
) -> Calibration:
    """Score the layers of `model`, loaded from `base`, and write `output`: the package that replaces the lowest ones.

    Raises:
        ShortVError: if the output must not be written, a sample cannot be read, or scores are not finite.
    """
    check_output(output, overwrite, base)
    scores = score_samples(model, processor, samples, direction).mean(dim=0).tolist()
    chosen = lowest(scores, number_of_layers(len(scores)) if num_layers is None else num_layers)
    settings = {
        "data": data,
        "samples": [sample.id for sample in samples],
        "seed": seed,
        "direction": direction,
        "granularity": "layer",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    write_package(base, output, overwrite, replaced_layers=chosen, lc_scores=scores, calibration=settings)
    return Calibration(scores, chosen)
