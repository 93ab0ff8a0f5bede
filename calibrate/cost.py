"""The cost of freezing: the model with several layers or blocks frozen, compared with the dense model."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch

from shortv_llava.calibrate import Direction
from shortv_llava.calibrate.contribution import dense, divergence
from shortv_llava.calibrate.correction import Factors, corrected
from shortv_llava.calibrate.samples import Sample, make_inputs
from shortv_llava.checkpoint.config import LAYER_LISTS


class Cost(NamedTuple):
    """Means over samples."""

    kl: float  # divergence of the next-token distributions at the prompt's end, nats
    kl_interval: float | None  # half the width of its 95% interval; None for a single sample
    agreement: float  # share of samples with the dense model's most likely next token
    nll_change: float | None  # change of the answer's negative log-likelihood, nats a token; None without answers


class CostMeter:
    """Measures frozen configurations of one model on a fixed set of samples; the dense model runs once.

    Args:
        model: a ShortV model.
        samples: prompts, with answers if known.
        direction: direction of the divergence, as for the scores.
    """

    @torch.no_grad()
    def __init__(self, model, processor, samples: Sequence[Sample], direction: Direction = "release"):
        self.model, self.direction, self.prompts = model, direction, []
        for sample in samples:
            prompt = make_inputs(processor, [sample], model.config)
            inputs, length = prompt, prompt["input_ids"].shape[1]
            if sample.answer:
                answered = make_inputs(processor, [sample], model.config, answered=True)
                if torch.equal(answered["input_ids"][:, :length], prompt["input_ids"]):
                    inputs = answered
            inputs = inputs.to(model.device)
            with dense(model):
                self.prompts.append((inputs, length, *self._read(inputs, length)))

    def _read(self, inputs, length: int) -> tuple[torch.Tensor, float | None]:
        """Logits (vocabulary,) at the prompt's end, and the answer's negative log-likelihood a token."""
        logits = self.model(**inputs, use_cache=False).logits[0, length - 1 :]
        answer = inputs["input_ids"][0, length:]
        if not len(answer):
            return logits[0], None
        log_probabilities = logits[:-1].double().log_softmax(-1)
        return logits[0].clone(), -log_probabilities.gather(1, answer[:, None]).mean().item()

    @torch.no_grad()
    def measure(self, frozen: dict[str, list[int]], corrections: dict[int, Factors] | None = None) -> Cost:
        """Cost of freezing `frozen`: the configuration's lists by name. The model's own corrections are disabled."""
        divergences, agreed, changes = [], [], []
        with dense(self.model), corrected(self.model, corrections or {}):
            self.model.set_replaced_layers(*(frozen[name] for name in LAYER_LISTS))
            for inputs, length, logits, nll in self.prompts:
                now, nll_now = self._read(inputs, length)
                divergences.append(divergence(logits[None], now[None, None], self.direction).item())
                agreed.append(bool(now.argmax() == logits.argmax()))
                if nll is not None:
                    changes.append(nll_now - nll)
        several = len(divergences) > 1
        return Cost(
            kl=statistics.mean(divergences),
            kl_interval=1.96 * statistics.stdev(divergences) / math.sqrt(len(divergences)) if several else None,
            agreement=statistics.mean(agreed),
            nll_change=statistics.mean(changes) if changes else None,
        )
