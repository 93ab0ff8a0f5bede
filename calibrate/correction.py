"""Corrections of frozen visual tokens, fitted in closed form: no gradients, each layer's weights used once.

A frozen token's update is nearly a linear function of its normed state. So ridge regression on the states of some
pictures gives a linear map that approximates the update. Its rank is cut so that it costs little compared with keys and
values.

Two passes run through the layers in parallel: the dense model's, and that of the model with layers replaced, in which
earlier replaced layers are already corrected. In a replaced layer X are the visual states after the layer without its
correction, A the normed states, and T the dense model's states after the layer. T - X is regressed on A. So each
correction also reduces the error that earlier layers have left.
"""

import base64
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce

from shortv_llava.calibrate.contribution import (
    RowBudget,
    add_between,
    layer_calls,
    run_layer,
    token_set,
    weights_in_place,
    without_corrections,
)
from shortv_llava.checkpoint.loading import text_decoder
from shortv_llava.configuration_shortv_llava import CORRECTION
from shortv_llava.modeling_shortv_llava import Correction

RIDGE = 0.01  # as a share of the mean diagonal of A'A


class Factors(NamedTuple):
    """Weights of a [`Correction`], float32 or float64, on the CPU: (r, h), (h, r) and (h,)."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor


class Regression:
    """Ridge regression with intercept of D on A, from rows added in parts; the sums are float64.

    Args:
        size: size h of the rows of A and D.
    """

    def __init__(self, size: int, device: torch.device):
        # The last column of A is ones.
        self.inner = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=device)  # A'A
        self.cross = torch.zeros(size + 1, size, dtype=torch.float64, device=device)  # A'D

    def add(self, a: torch.Tensor, d: torch.Tensor) -> None:
        """Add rows (n, h). Products are computed in float32 or finer: most GPUs are slow in float64."""
        dtype = torch.promote_types(a.dtype, torch.float32)
        a = torch.cat([a.to(dtype), a.new_ones(len(a), 1, dtype=dtype)], dim=1)
        self.inner += a.T @ a
        self.cross += a.T @ d.to(dtype)

    def share(self) -> None:
        """Add up the sums of all processes."""
        self.inner, self.cross = reduce([self.inner, self.cross], reduction="sum")

    def solve(self, rank: int, ridge: float = RIDGE) -> Factors:
        """Reduced-rank regression: the best approximation of the fitted values with that rank, as maps down and up."""
        count = self.inner[-1, -1]
        mean_a, mean_d = self.inner[-1, :-1] / count, self.cross[-1] / count
        inner = self.inner[:-1, :-1] - count * torch.outer(mean_a, mean_a)
        cross = self.cross[:-1] - count * torch.outer(mean_a, mean_d)
        damping = (ridge * inner.diagonal().mean()).clamp(min=torch.finfo(inner.dtype).tiny)
        root = torch.linalg.cholesky(inner + damping * torch.eye(len(inner), device=inner.device))
        whole = torch.cholesky_solve(cross, root)  # (h, h), from A to D
        down, up = cut_to_rank(whole, inner, rank)
        return Factors(*(part.cpu().contiguous() for part in (down, up, mean_d - up @ (down @ mean_a))))


def cut_to_rank(whole: torch.Tensor, inner: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps down (r, h) and up (h, r) whose fitted values are nearest to those of `whole` W (h, h), given A'A (h, h)."""
    # Right singular vectors of the fitted values A W are eigenvectors of W'A'AW.
    up = torch.linalg.eigh(whole.T @ inner @ whole).eigenvectors[:, -rank:]
    return (whole @ up).T, up


class FitSample:
    """The data of a sample or batch for a fit: states before the first layer, on the CPU, and the layers' arguments.

    Args:
        model: a ShortV model.
        inputs: a processor's output with images.
        keep: keep the dense model's visual states of all layers, (V, h) each, so that further fits need no dense pass.
        folder: keep states in temporary files in this folder, if memory is too small for them.
    """

    @torch.no_grad()
    def __init__(self, model, inputs, keep: bool = False, folder: Path | None = None):
        states, self.calls, self.added = layer_calls(model, inputs)
        self.device, self.visual = states.device, token_set(model, inputs, "visual").cpu()
        self.folder, self.first, self.targets, self.keep = folder, stored(states, folder), [], keep

    def run(self, layer, states: torch.Tensor, budget: RowBudget, blocks: tuple[str, ...] = ()) -> torch.Tensor:
        """Run a layer on states (B, S, h), with visual tokens skipping the `blocks`."""
        frozen, index = self.visual if blocks else None, layer.self_attn.layer_idx
        states = add_between(states.to(self.device), self.added[index])
        states = run_layer(layer, states, self.calls[index], len(self.visual), budget, frozen, blocks)
        return stored(states, self.folder)


def stored(states: torch.Tensor, folder: Path | None) -> torch.Tensor:
    """A tensor on the CPU, in memory or in a nameless file in `folder`, which lives as long as the tensor."""
    if folder is None:
        return states.cpu()
    with tempfile.TemporaryFile(dir=folder) as file:
        mapped = np.memmap(file, dtype=np.uint8, mode="w+", shape=states.nbytes)
    return torch.from_numpy(mapped).view(states.dtype).view(states.shape).copy_(states)


def layers_to_correct(config) -> list[int]:
    """Layers whose FFN is frozen, with or without their attention, except the last layer, whose outputs for visual
    tokens are not used."""
    last = config.text_config.num_hidden_layers - 1
    return sorted(config.frozen_layers()[1] - {last})


@torch.no_grad()
def fit_corrections(
    model,
    samples: Sequence[FitSample],
    rank: int,
    alone: bool = False,
    ridge: float = RIDGE,
    budget: RowBudget | None = None,
    once: Callable[[int, Callable[[], Factors]], Factors] = lambda layer, fit: fit(),
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[int, Factors]:
    """Corrections of all layers whose FFN is frozen in a ShortV model, with or without their attention.

    The last layer gets none, because its outputs for visual tokens are not used. The fit ignores the model's own
    corrections and keeps them. With several processes, each passes its own samples, and all get the same result.

    Args:
        samples: samples to fit on.
        rank: rank of the maps, at most the hidden size h.
        alone: fit every layer on the dense model's states, as if no other layer were replaced.
        ridge: value added to the diagonal of A'A, as a share of the diagonal's mean.
        once: `once(layer, fit)` returns a layer's result, from a journal if it has one, else from `fit()`.
        progress: wraps the iteration over the layers.

    Raises:
        ValueError: if there is no sample, or no visual token in any.
    """
    state, budget = PartialState(), budget or RowBudget()
    layers = text_decoder(model).layers
    attention_layers, ffn_layers = model.config.frozen_layers()
    to_correct, found = layers_to_correct(model.config), {}
    with without_corrections(model):
        streams = [Stream(sample, alone) for sample in samples]
        for index, layer in progress(list(enumerate(layers))):
            blocks = {"attention": index in attention_layers, "ffn": index in ffn_layers}
            blocks = tuple(name for name, frozen in blocks.items() if frozen)
            fits, norm = index in to_correct, layer.input_layernorm if "attention" in blocks else layer.ffn_norm
            with weights_in_place(layer):
                weight = layer.input_layernorm.weight
                regression = Regression(model.config.text_config.hidden_size, weight.device) if fits else None
                for stream in streams:
                    stream.advance(layer, budget, blocks)
                    if fits:
                        x, t = (rows.to(weight.device) for rows in (stream.rows, stream.target))
                        regression.add(norm(x), t.to(torch.promote_types(t.dtype, torch.float32)) - x)
                if not fits:
                    continue

                def fit(regression=regression):
                    regression.share()
                    if regression.inner[-1, -1] == 0:
                        raise ValueError("corrections need samples with visual tokens")
                    return Factors(*broadcast([part.to(state.device) for part in regression.solve(rank, ridge)]))

                found[index] = Factors(*(part.cpu() for part in once(index, fit)))
                if not alone:
                    correction = make_correction(found[index], weight)
                    for stream in streams:
                        x = stream.rows.to(weight.device)
                        stream.rows = x + correction(norm(x))
    return found


class Stream:
    """States of one sample between two layers, in the dense model and in the model with layers replaced."""

    def __init__(self, sample: FitSample, alone: bool):
        self.sample, self.alone = sample, alone
        self.dense = self.states = sample.first  # (B, S, h), the same tensor as long as nothing is replaced
        self.target = None  # (V, h), the dense model's states after the layer

    def advance(self, layer, budget: RowBudget, blocks: tuple[str, ...]) -> None:
        sample, index, before = self.sample, layer.self_attn.layer_idx, self.dense
        if index < len(sample.targets) and not self.alone:
            self.target = sample.targets[index]
            self.states = sample.run(layer, self.states, budget, blocks)
            return
        self.dense = sample.run(layer, before, budget)
        self.target = self.dense[sample.visual]
        if sample.keep and index == len(sample.targets):
            sample.targets.append(self.target)
        if self.alone:
            self.states = before
        same = self.states is before and not blocks
        self.states = self.dense if same else sample.run(layer, self.states, budget, blocks)

    @property
    def rows(self) -> torch.Tensor:
        """(V, h), the visual states."""
        return self.states[self.sample.visual]

    @rows.setter
    def rows(self, rows: torch.Tensor) -> None:
        self.states[self.sample.visual] = rows.to(self.states)


def make_correction(factors: Factors, like: torch.Tensor) -> Correction:
    """The module with these weights, on the device and in the dtype of a tensor."""
    rank, size = factors.down.shape
    correction = Correction(size, rank).to(like)
    with torch.no_grad():
        for weight, value in zip((correction.down.weight, correction.up.weight, correction.up.bias), factors):
            weight.copy_(value)
    return correction.eval()


def correction_tensors(corrections: dict[int, Factors], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of the corrections, with names relative to the language model, see [`put_corrections`]."""
    return {
        f"layers.{layer}.correction.{name}": part.to(dtype)
        for layer, factors in corrections.items()
        for name, part in zip(("down.weight", "up.weight", "up.bias"), factors)
    }


def set_corrections(model, corrections: dict[int, Factors]) -> None:
    """Replace a ShortV model's corrections by these."""
    layers, config = text_decoder(model).layers, model.config
    for layer in layers:
        layer._modules.pop("correction", None)
    for name in CORRECTION:
        vars(config).pop(name, None)
    for index, factors in corrections.items():
        norm = layers[index].input_layernorm
        device = norm._hf_hook.execution_device if norm.weight.is_meta else norm.weight.device  # of offloaded layers
        layers[index].correction = make_correction(factors, torch.empty(0, dtype=norm.weight.dtype, device=device))
        config.correction_rank = len(factors.down)
    if corrections:
        config.corrected_layers = list(corrections)


@contextmanager
def corrected(model, corrections: dict[int, Factors]) -> Iterator[None]:
    """Replace a ShortV model's corrections by these within the context."""
    config = vars(model.config)
    own = {name: config[name] for name in CORRECTION if name in config}
    with without_corrections(model):
        set_corrections(model, corrections)
        try:
            yield
        finally:
            set_corrections(model, {})
            config.update(own)


def packed(factors: Factors) -> list:
    """Factors as entries of a journal: the float32 values of each tensor, and its shape."""
    parts = [part.float().contiguous() for part in factors]
    return [[base64.b64encode(part.numpy().tobytes()).decode(), list(part.shape)] for part in parts]


def unpacked(parts: list) -> Factors:
    """The inverse of [`packed`]."""
    return Factors(
        *(torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.float32).view(shape) for data, shape in parts)
    )
