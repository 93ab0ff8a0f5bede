"""FastV and VTW: masks against a model that drops, alone and in uneven batches, in the prompt and in generation."""

import math

import pytest
import tiny
import torch

from shortv_llava.checkpoint.loading import cache_name
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.dropping import dropped
from shortv_llava.evaluation.hiding import hidden, last_row_attention
from shortv_llava.evaluation.methods import Dropping, Method, check_layers, parse_methods

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
    mask, rows = inputs["attention_mask"], torch.arange(len(ends))
    last = (mask * torch.arange(mask.shape[1])).argmax(dim=1)
    last = last.clamp(max=output.logits.shape[1] - 1)  # there are fewer rows where tokens were dropped
    logits = [output.logits[rows, last][:, None]]
    for number in range(continuation.shape[1]):
        mask = torch.cat([mask, torch.ones_like(ends)], dim=1)
        cache = {cache_name(): output[cache_name()]}
        tokens = {"input_ids": continuation[:, number : number + 1], "position_ids": ends + number}
        output = model(**tokens, attention_mask=mask, **cache, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention's softmax computes in float32; that of float64 models keeps float64."""
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: scores.softmax(dim))


@pytest.mark.parametrize(
    "attention, padding_side, replaced, dropping",
    [
        ("sdpa", "left", [], Dropping(2, 0.5)),
        ("sdpa", "left", [], Dropping(2, 1.0)),
        ("sdpa", "right", [3, 1], Dropping(2, 0.5)),  # its score comes from a replaced layer
        ("sdpa", "both", [0, 1, 2, 3], Dropping(1, 0.3)),
        ("eager", "left", [], Dropping(1, 0.3)),
        ("eager", "left", [3, 1], Dropping(2, 1.0)),
        ("eager", "right", [3, 1], Dropping(2, 0.5)),
    ],
)
def test_rows_of_any_batch_are_as_dropped_alone(attention, padding_side, replaced, dropping, exact_softmax):
    continuation = torch.randint(3, 80, (len(ROWS), 2), generator=torch.Generator().manual_seed(1))
    for model in models(attention, replaced):
        inputs = tiny.batch(model, "llava", ROWS, padding_side)
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


@pytest.mark.parametrize("replaced", [[], [1]])
@pytest.mark.parametrize("backbone", ["llama", "qwen2", *tiny.OTHER_BACKBONES])
def test_the_score_is_the_last_rows_attention(backbone, replaced, exact_softmax):
    settings = tiny.OTHER_BACKBONES.get(backbone, {})
    model = tiny.pair(backbone=backbone, attn_implementation="eager", **settings)[1]
    model.set_replaced_layers(replaced)
    inputs = tiny.batch(model, "llava", ROWS, "right")
    last, rows = inputs["attention_mask"].sum(dim=1) - 1, torch.arange(len(ROWS))

    def compare(attention, args, kwargs, output):
        score = last_row_attention(attention, last, **kwargs)
        torch.testing.assert_close(score, output[1][rows, :, last].mean(dim=1), **tiny.CLOSE)
        compared.append(True)

    compared = []
    handle = model.model.language_model.layers[1].self_attn.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    assert compared


@pytest.mark.parametrize("backbone", tiny.OTHER_BACKBONES)
def test_other_backbones_and_families(backbone):
    model = tiny.pair("llava_next", backbone, **tiny.OTHER_BACKBONES[backbone])[1]
    model.set_replaced_layers([3, 1])
    inputs, logits = tiny.batch(model, "llava_next", ["ttItIttt"]), []
    for drop in (hidden, dropped):
        with drop(model, Dropping(2, 0.5)), torch.no_grad():
            logits.append(model(**inputs).logits[:, -1])
    torch.testing.assert_close(*logits, **tiny.CLOSE)


def test_as_many_tokens_are_kept_as_fastv_keeps():
    (model, *_) = models("sdpa", [])
    inputs = tiny.batch(model, "llava", ["tItttt"])
    visual, lengths = int((inputs["input_ids"] == tiny.IMAGE_TOKEN).sum()), []
    with dropped(model, Dropping(2, 0.3)), torch.no_grad():
        cache = model(**inputs, use_cache=True)[cache_name()]
    lengths = [cache.get_seq_length(layer) for layer in range(tiny.LAYERS)]
    assert lengths == [5 + visual] * 2 + [5 + round(0.7 * visual)] * 2
    assert Dropping(2, 0.3).visual_tokens(visual, tiny.LAYERS) == [length - 5 for length in lengths]
    assert [Dropping(2, share).kept(577) for share in (0.5, 0.25, 1.0)] == [288, 433, 0]


def test_generates_as_with_one_token_after_another():
    (model, *_) = models("sdpa", [3, 1])
    inputs = tiny.batch(model, "llava", ROWS)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with hidden(model, Dropping(2, 0.5)):
        tokens = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        logits = forced(model, inputs, tokens[:, :-1])
    logits[..., tiny.END_TOKEN] = -math.inf  # so that five come
    assert torch.equal(tokens, logits.argmax(dim=-1))
    assert not torch.equal(tokens, model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :])


def test_what_it_cannot_do_is_said(monkeypatch):
    (model, *_) = models("sdpa", [])
    inputs = tiny.batch(model, "llava", ["tItttt"])
    with hidden(model, Dropping(2, 0.5)), torch.no_grad():
        cache = {cache_name(): model(**inputs, use_cache=True)[cache_name()]}
        with pytest.raises(ValueError, match="on top of a cache"):
            model(**inputs | {"attention_mask": None}, **cache)
    monkeypatch.setattr(model.config.text_config, "_attn_implementation", "flex_attention")
    with pytest.raises(ShortVError, match="not 'flex_attention'"), hidden(model, Dropping(2, 0.5)):
        pass
    monkeypatch.undo()
    with torch.no_grad():  # nothing is left behind
        after = model(**inputs).logits
    torch.testing.assert_close(after, tiny.pair()[0](**inputs).logits, **tiny.CLOSE)


def test_methods_are_read():
    assert parse_methods("shortv, fastv:2:0.5,vtw:3,shortv+fastv:2:.25") == [
        Method("shortv", True, None),
        Method("fastv-2-0.5", False, Dropping(2, 0.5)),
        Method("vtw-3", False, Dropping(3, 1.0)),
        Method("shortv+fastv-2-0.25", True, Dropping(2, 0.25)),
    ]


@pytest.mark.parametrize(
    "given, words",
    [
        ("", "'' is none of"),
        ("fastv", "'fastv' is none of"),
        ("vtw:2:0.5", "'vtw:2:0.5' is none of"),
        ("shortv+", "is none of"),
        ("fastv:2:0.5+shortv", "is none of"),
        ("shortv+vtw:1+vtw:2", "is none of"),
        ("fastv:two:0.5", "something else than numbers"),
        ("fastv:0:0.5", "K of 'fastv:0:0.5' .*at least 1"),
        ("vtw:4", "vtw-4: K .*at most 3"),
        ("fastv:2:50", "R of 'fastv:2:50' .*at most 1"),
        ("fastv:2:nan", "R of"),
        ("vtw:2,shortv,vtw:2", "vtw-2 stands there twice"),
    ],
)
def test_bad_methods(given, words):
    with pytest.raises(ShortVError, match=words.replace("+", r"\+")):
        check_layers(parse_methods(given), 4)
