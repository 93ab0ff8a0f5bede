"""FastV and VTW: masks against a model that drops, alone and in uneven batches, in the prompt and in generation."""

import math

import pytest
import tiny
import torch

from shortv_llava.benchmarks.dropping import dropped
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.methods import Dropping, Method, hidden, last_row_attention, parse_methods
from shortv_llava.package import cache_name

METHODS = [Dropping(2, 0.5), Dropping(1, 0.3), Dropping(2, 1.0)]
ROWS = ["ttIttt", "ttIttttttItt", "ttttt", "Ittttttt"]  # one picture, two, none, at the beginning


def models(attention: str, replaced: list[int]) -> list:
    """Stock and ShortV, or ShortV alone where layers are replaced."""
    stock, ours = tiny.pair(attn_implementation=attention)
    ours.set_replaced_layers(replaced)
    return [ours] if replaced else [stock, ours]


def alone(inputs: dict, row: int, layout: list[str]) -> dict:
    """One row of a batch without its padding."""
    mask, first = inputs["attention_mask"][row].bool(), sum(text.count("I") for text in layout[:row])
    found = {"input_ids": inputs["input_ids"][row][mask][None]}
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    if number := layout[row].count("I"):
        found["pixel_values"] = inputs["pixel_values"][first : first + number]
    return found


def positions(inputs: dict) -> torch.Tensor:
    return (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)


@torch.no_grad()
def forced(model, inputs: dict, continuation: torch.Tensor) -> torch.Tensor:
    """Logits (B, 1 + N, vocabulary) at the prompt's end, then of N tokens given one by one."""
    ends = inputs["attention_mask"].sum(dim=1, keepdim=True)
    output = model(**inputs, position_ids=positions(inputs), use_cache=True)
    logits, mask = [output.logits[:, -1:]], inputs["attention_mask"]
    for number in range(continuation.shape[1]):
        mask = torch.cat([mask, torch.ones_like(ends)], dim=1)
        cache = {cache_name(): output[cache_name()]}
        tokens = {"input_ids": continuation[:, number : number + 1], "position_ids": ends + number}
        output = model(**tokens, attention_mask=mask, **cache, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("dropping", METHODS)
@pytest.mark.parametrize("replaced", [[], [3, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_any_batch_are_as_dropped_alone(attention, replaced, dropping):
    continuation = torch.randint(3, 80, (len(ROWS), 3), generator=torch.Generator().manual_seed(1))
    for model in models(attention, replaced):
        inputs = tiny.batch(model, "llava", ROWS)
        with hidden(model, dropping):
            batched = forced(model, inputs, continuation)
        dense = forced(model, inputs, continuation)
        for row, text in enumerate(ROWS):
            prompt, rest = alone(inputs, row, ROWS), continuation[row : row + 1]
            with hidden(model, dropping):
                torch.testing.assert_close(batched[row : row + 1], forced(model, prompt, rest), **tiny.CLOSE)
            with dropped(model, dropping):
                torch.testing.assert_close(batched[row : row + 1], forced(model, prompt, rest), **tiny.CLOSE)
            gap = (batched[row] - dense[row]).abs().max()
            assert gap > 1e-3 if "I" in text else gap < 1e-9
