"""torch.compile of the forward pass and of decoding, by a backend that runs graphs as they are."""

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model):
    counter = CompileCounter()
    return torch.compile(model.forward, backend=counter), counter


@pytest.mark.slow
@torch.no_grad()
def test_the_forward_pass_breaks_where_visual_tokens_are_located():
    """LLaVA itself breaks where it counts placeholders."""
    stock, ours = tiny.pair()
    ours.set_replaced_layers([3, 2], attention=[0])
    inputs = tiny.batch(stock, "llava", ["tttIttttt", "ttIttttttt"])
    graphs = {}
    for model in (stock, ours):
        torch.compiler.reset()
        forward, counter = compiled(model)
        torch.testing.assert_close(forward(**inputs).logits, model(**inputs).logits, **tiny.CLOSE)
        graphs[model] = counter.frame_count
    assert graphs[ours] <= graphs[stock] + 3  # the break lies within three nested forward functions


@pytest.mark.slow
@torch.no_grad()
def test_other_prompts_need_no_end_of_compilations():
    stock, ours = tiny.pair()
    ours.set_replaced_layers([3, 2, 1])
    forward, counter = compiled(ours)
    seen = []
    for length in range(3, 9):
        inputs = tiny.batch(stock, "llava", ["tttI" + "t" * length])
        torch.testing.assert_close(forward(**inputs).logits, ours(**inputs).logits, **tiny.CLOSE)
        seen.append(counter.frame_count)
    assert seen[-1] == seen[-3]


@pytest.mark.parametrize("layout", [["tttIttt"], ["tttttt"]], ids=["image", "text"])
@torch.no_grad()
def test_no_compilation_a_token(layout):
    stock, ours = tiny.pair()
    ours.set_replaced_layers([3, 2], ffn=[0])
    inputs = tiny.batch(stock, "llava", layout)
    length = inputs["input_ids"].shape[1]
    frames = {}
    for model in (stock, ours):
        torch.compiler.reset()
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 8)
        model(**inputs, past_key_values=cache)
        forward, counter = compiled(model)
        for step in range(6):
            position = torch.tensor([length + step])
            forward(
                input_ids=torch.tensor([[5]]),
                past_key_values=cache,
                position_ids=position[None],
                cache_position=position,
            )
            frames.setdefault(model, []).append(counter.frame_count)
    assert frames[ours] == frames[stock]
    assert frames[ours][-1] == frames[ours][1]
