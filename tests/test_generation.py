"""`generate` as stock LLaVA does it, in every mode that it has: tokens and logits as of the stock model whose frozen
blocks are silenced by hooks in each forward pass that gets images."""

import copy
import threading

import pytest
import tiny
import torch
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM, TextIteratorStreamer
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.generation.streamers import BaseStreamer

from shortv_llava.examples.shapes_llava import CHECKPOINT

MODELS = [("llava", "llama"), ("llava", "qwen2"), ("llava_next", "mistral")]
FROZEN = {"layers": (3, 1), "attention": (2,), "ffn": (0,)}
ROWS = ["ttItt", "tIttttt", "Ittt"]  # of different lengths: padded on the left
LENGTH = 8
# All answers are of one length, and none holds a place for an image that nobody gave.
SETTINGS = {"max_new_tokens": LENGTH, "suppress_tokens": [tiny.END_TOKEN, tiny.IMAGE_TOKEN]}
WITH_LOGITS = {"return_dict_in_generate": True, "output_logits": True}


def pair(family="llava", backbone="llama", **text):
    """(stock model, ShortV model with frozen blocks)."""
    stock, ours = tiny.pair(family, backbone, **text)
    tiny.freeze(ours, **FROZEN)
    return stock, ours


def generate(model, inputs, **settings):
    """With the same random numbers for every model, and with the hooks on the stock one."""
    torch.manual_seed(0)
    inputs = {name: value.clone() for name, value in inputs.items()}
    if not hasattr(model, "set_replaced_layers"):
        with tiny.frozen(model, **FROZEN):
            return model.generate(**inputs, **SETTINGS | settings)
    return model.generate(**inputs, **SETTINGS | settings)


def assert_same(ours, stock, inputs, **settings):
    """Tokens and the logits of every step; returns the tokens."""
    expected = generate(stock, inputs, **settings, **WITH_LOGITS)
    actual = generate(ours, inputs, **settings, **WITH_LOGITS)
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(actual.logits) == len(expected.logits)
    for ours_logits, stock_logits in zip(actual.logits, expected.logits):
        torch.testing.assert_close(ours_logits, stock_logits, **tiny.CLOSE)
    return actual.sequences


METHODS = {
    "greedy": {},
    "greedy, no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "sampling, several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 3},
    "beam search, several sequences": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_methods(model, settings):
    stock, ours = pair(*model)
    inputs = tiny.batch(stock, model[0], ROWS, same_size=True)
    tokens = assert_same(ours, stock, inputs, **settings)
    ours.set_replaced_layers([])
    assert not torch.equal(generate(ours, inputs, **settings), tokens)  # what is compared above does depend on them


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_sampling_again_gives_the_same(model):
    _, ours = pair(*model)
    inputs = tiny.batch(ours, model[0], ROWS)
    first, again = (generate(ours, inputs, do_sample=True) for _ in range(2))
    assert torch.equal(first, again)
    assert len(generate(ours, inputs, do_sample=True, num_return_sequences=8).unique(dim=0)) > len(ROWS)


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_a_row_of_a_left_padded_batch_as_alone(model):
    _, ours = pair(*model)
    inputs = tiny.batch(ours, model[0], ROWS, same_size=True)
    together = generate(ours, inputs)[:, -LENGTH:]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        alone |= {name: alone[name][:, mask] for name in ("input_ids", "attention_mask")}
        assert torch.equal(generate(ours, alone)[0, -LENGTH:], together[row])


def draft(kind: str):
    """A small model that guesses: text alone, or a LLaVA that sees the image."""
    torch.manual_seed(1)
    if kind == "text":
        return LlamaForCausalLM(tiny.config_dict(num_hidden_layers=1)["text_config"]).eval()
    return tiny.CLASSES["llava"][1](tiny.CLASSES["llava"][0](**tiny.config_dict(num_hidden_layers=1))).eval()


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("kind", ["llava", "the model itself", "prompt lookup"])
def test_guessed_tokens(kind, do_sample):
    """A pass that checks guesses holds the prompt, its image and the first guesses."""
    stock, ours = pair()
    inputs = tiny.batch(stock, "llava", ["ttIttttttIttt"])
    if kind == "prompt lookup":
        guesses = {"prompt_lookup_num_tokens": 3}
    else:
        guesses = {"assistant_model": copy.deepcopy(ours) if kind == "the model itself" else draft(kind)}
    tokens = assert_same(ours, stock, inputs, do_sample=do_sample, **guesses)
    if not do_sample:
        assert torch.equal(tokens, generate(ours, inputs))


def outcome(model, inputs, **settings):
    """The tokens, or what is raised."""
    try:
        return generate(model, inputs, **settings).tolist()
    except Exception as error:
        return type(error), str(error).replace("ShortV", "")


def test_guesses_of_a_model_of_text():
    """Stock LLaVA of transformers 4 does not take one: it would be given the image."""
    stock, ours = pair()
    inputs = tiny.batch(stock, "llava", ["ttIttt"])
    expected, actual = (outcome(model, inputs, assistant_model=draft("text")) for model in (stock, ours))
    assert actual == expected
    if isinstance(actual, list):
        assert actual == generate(ours, inputs).tolist()


def test_prefill_in_chunks():
    """Chunks cut images apart: transformers 5 has encoded these before, 4 fails."""
    stock, ours = pair()
    inputs = tiny.batch(stock, "llava", ["ttIttt"])
    settings = {"prefill_chunk_size": 4}
    assert outcome(ours, inputs, **settings) == outcome(stock, inputs, **settings)


BACKBONES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),  # has a mask for each type of layer
    "all layers sliding": ("mistral", {"sliding_window": 6}),
    "two layers sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "window longer than the prompt": ("mistral", {"sliding_window": 100}),
}


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_caches(backbone, cache):
    name, text = backbone
    stock, ours = pair("llava", name, **text)
    inputs = tiny.batch(stock, "llava", ROWS)
    settings = {"cache_implementation": cache, "disable_compile": True}
    if cache.startswith("offloaded") and not torch.accelerator.is_available():
        # There is nothing to offload from, so stock refuses.
        assert outcome(ours, inputs, **settings) == outcome(stock, inputs, **settings)
    else:
        assert_same(ours, stock, inputs, **settings)


class RoundedLayer(QuantizedLayer):
    """Stock's quantised cache without a library that quantises."""

    def _quantize(self, tensor, axis):
        return tensor.to(torch.bfloat16)

    def _dequantize(self, quantised):
        return quantised.to(torch.float32)


def test_quantised_cache():
    stock, ours = pair()
    inputs = tiny.batch(stock, "llava", ROWS)
    results = []
    for model in (stock, ours):
        cache = Cache(layers=[RoundedLayer(residual_length=4) for _ in range(tiny.LAYERS)])
        results.append(generate(model, inputs, past_key_values=cache, **WITH_LOGITS))
    assert torch.equal(results[0].sequences, results[1].sequences)
    for stock_logits, ours_logits in zip(*(result.logits for result in results)):
        torch.testing.assert_close(ours_logits, stock_logits, atol=1e-2, rtol=0)  # rounding makes more of a difference


@pytest.mark.parametrize("backend", ["quanto", "hqq", "fp8"])
def test_quantised_cache_by_name(backend):
    """As far as stock LLaVA's transformers knows the name and finds the library."""
    stock, ours = pair()
    inputs = tiny.batch(stock, "llava", ROWS)
    expected, actual = (
        outcome(model, inputs, cache_implementation="quantized", cache_config={"backend": backend})
        for model in (stock, ours)
    )
    assert actual == expected


def image_first(model):
    """A prefix with an image, and two questions about it."""
    prefix = tiny.batch(model, "llava", ["ttItttt"])
    questions = [tiny.batch(model, "llava", ["tttt"], seed=seed)["input_ids"] for seed in (1, 2)]
    return prefix, questions


def prefilled(model, inputs):
    with torch.no_grad():
        if hasattr(model, "set_replaced_layers"):
            return model(**inputs, use_cache=True).past_key_values
        with tiny.frozen(model, **FROZEN):
            return model(**inputs, use_cache=True).past_key_values


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_questions_after_a_kept_prefix(backbone):
    """The image is prefilled once; each question goes on from a copy of the cache and sees no image itself."""
    name, text = backbone
    stock, ours = pair("llava", name, **text)
    prefix, questions = image_first(stock)
    stock_cache, ours_cache = (prefilled(model, prefix) for model in (stock, ours))
    for question in questions:
        ids = torch.cat([prefix["input_ids"], question], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = generate(stock, inputs, past_key_values=copy.deepcopy(stock_cache))
        actual = generate(ours, inputs, past_key_values=copy.deepcopy(ours_cache))
        assert torch.equal(actual, expected)
        assert torch.equal(actual, generate(ours, inputs | {"pixel_values": prefix["pixel_values"]}))


def test_questions_together_after_a_kept_prefix():
    stock, ours = pair()
    prefix, questions = image_first(stock)
    ids = torch.cat([torch.cat([prefix["input_ids"], question], dim=1) for question in questions])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    results = []
    for model in (stock, ours):
        cache = prefilled(model, prefix)
        cache.batch_repeat_interleave(len(questions))
        results.append(generate(model, inputs, past_key_values=cache))
    assert torch.equal(*results)


def test_a_second_turn_with_an_image_of_its_own():
    """`generate` twice with one cache, the second time with a new image."""
    stock, ours = pair()
    results = []
    for model in (stock, ours):
        first = tiny.batch(model, "llava", ["ttItt"])
        cache = DynamicCache(config=model.config)
        told = generate(model, first, past_key_values=cache)
        second = tiny.batch(model, "llava", ["tItt"], seed=1)
        ids = torch.cat([told, second["input_ids"]], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": second["pixel_values"]}
        results.append(outcome(model, inputs, past_key_values=cache))
    assert results[0] == results[1]


@torch.no_grad()
def test_chosen_logits():
    """`logits_to_keep` as positions; as a number it stands in test_modeling.py."""
    stock, ours = pair()
    inputs = tiny.batch(stock, "llava", ROWS)
    kept = torch.tensor([-1, -3])
    with tiny.frozen(stock, **FROZEN):
        expected = stock(**inputs, logits_to_keep=kept).logits
    torch.testing.assert_close(ours(**inputs, logits_to_keep=kept).logits, expected, **tiny.CLOSE)


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_streamed_tokens(do_sample):
    stock, ours = pair()
    inputs = tiny.batch(stock, "llava", ["ttIttt"])
    collectors = [Collector(), Collector()]
    results = [generate(m, inputs, do_sample=do_sample, streamer=c) for m, c in zip((stock, ours), collectors)]
    assert collectors[0].tokens == collectors[1].tokens == results[1][0].tolist()
    assert collectors[1].ended


def test_streamed_text():
    _, ours = pair()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    inputs = tiny.batch(ours, "llava", ["ttIttt"])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=generate, args=(ours, inputs), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(generate(ours, inputs)[0, -LENGTH:]) != ""


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_embeddings_in_place_of_ids(model, settings):
    """Image tokens are told by their embeddings. Only new tokens are returned."""
    stock, ours = pair(*model)
    inputs = tiny.batch(stock, model[0], ROWS, same_size=True)
    expected = generate(ours, inputs, **settings)[:, -LENGTH:]
    inputs["inputs_embeds"] = stock.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert torch.equal(assert_same(ours, stock, inputs, **settings), expected)


def test_embeddings_with_image_features_in_them():
    """Nothing tells image features among embeddings from text: as the dense model, all of whose tokens are computed."""
    stock, ours = pair()
    inputs = tiny.batch(stock, "llava", ["ttItt", "tIttt"])
    ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
    with torch.no_grad():
        features = stock.get_image_features(pixel_values=pixels)
        features = torch.cat(list(getattr(features, "pooler_output", features)))
        embeddings = stock.get_input_embeddings()(ids)
    inputs["inputs_embeds"] = embeddings.masked_scatter((ids == tiny.IMAGE_TOKEN)[:, :, None], features)
    assert torch.equal(generate(ours, inputs), stock.generate(**inputs, **SETTINGS))
