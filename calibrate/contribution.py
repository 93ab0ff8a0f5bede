"""Layer Contribution (LC) scores, exactly and with shared work.

LC of layer i for a set X of tokens (ShortV, section 3.1): freeze X in layer i alone and take the KL divergence between
the next-token distributions at the prompt's last position, of the original model M and of that variant M_i.

All variants share the layers before their own. So the layers are run once, over a stack of states: the original's and,
behind it, one variant's for each layer passed. Layer i turns the original and the variants of the layers before into
their next states; the new variant is the original's output with the rows of X put back to its input. That makes
L + L(L-1)/2 layer passes for L layers in place of L(L+1), and each layer's weights are used once a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from shortv_llava.modeling_shortv_llava import SHORTV_LAYERS, FrozenTokens

Tokens = Literal["visual", "text", "all"]
Direction = Literal["release", "paper"]


@torch.no_grad()
def layer_contribution(model, inputs, tokens: Tokens = "visual", direction: Direction = "release") -> torch.Tensor:
    """LC score of every layer, mean over the batch: float64 of shape `(num_layers,)`, in nats.

    Args:
        model: a LLaVA or LLaVA-NeXT for conditional generation, plain or ShortV; scored with no layer frozen.
        inputs: a processor's output, with images; rows may be padded on either side.
        tokens: the set X to freeze: visual tokens, the others, or all.
        direction: `release` for KL(M_i || M), which the authors' code computes and their published layers come from;
            `paper` for KL(M || M_i), as their paper writes it.
    """
    return sample_contributions(model, inputs, tokens, direction).mean(dim=0)


@torch.no_grad()
def sample_contributions(model, inputs, tokens: Tokens = "visual", direction: Direction = "release") -> torch.Tensor:
    """As [`layer_contribution`], for every row of the batch: float64 of shape `(B, num_layers)`."""
    decoder = model.model.language_model
    with _shortv_layers(decoder.layers):
        states, calls = _layer_calls(model, inputs)
        frozen = _token_set(model, inputs, tokens).to(states.device)
        last = _last_positions(inputs, states)
        stack = states.unsqueeze(0)  # (variants, B, S, h), the original first
        for index, (layer, call) in enumerate(zip(decoder.layers, calls)):
            if index == len(decoder.layers) - 1:  # of its outputs, only those of the last positions are read
                unread = torch.ones_like(frozen).scatter(1, last[:, None], False)
                call = call | {"frozen_tokens": _repeat(unread, len(stack), index)}
            outputs = layer(stack.flatten(0, 1), **_repeated(call, len(stack))).view_as(stack)
            variant = torch.where(frozen.unsqueeze(-1), stack[0], outputs[0])
            stack = torch.cat([outputs, variant.unsqueeze(0)])
    rows = torch.arange(len(last), device=last.device)
    logits = model.lm_head(decoder.norm(stack[:, rows, last]))
    return _divergence(logits[0], logits[1:], direction).T


def _divergence(original: torch.Tensor, variants: torch.Tensor, direction: Direction) -> torch.Tensor:
    """KL between logits (B, vocabulary) and (L, B, vocabulary), in float64: (L, B)."""
    p, q = original.double().log_softmax(-1), variants.double().log_softmax(-1)
    if direction == "release":
        return (q.exp() * (q - p)).sum(-1)
    if direction == "paper":
        return (p.exp() * (p - q)).sum(-1)
    raise ValueError(f"direction must be 'release' or 'paper', got {direction!r}")


def _token_set(model, inputs, tokens: Tokens) -> torch.Tensor:
    """(B, S), true for the tokens to freeze."""
    visual = inputs["input_ids"] == model.config.image_token_id
    if tokens == "visual":
        return visual
    if tokens == "text":
        return ~visual
    if tokens == "all":
        return torch.ones_like(visual)
    raise ValueError(f"tokens must be 'visual', 'text' or 'all', got {tokens!r}")


def _last_positions(inputs, states: torch.Tensor) -> torch.Tensor:
    """(B,), index of each row's last token that is no padding."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.full(states.shape[:1], states.shape[1] - 1, device=states.device)
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask).argmax(dim=1).to(states.device)


def _layer_calls(model, inputs) -> tuple[torch.Tensor, list[dict]]:
    """What the language model would call its layers with: states (B, S, h) before the first, keyword arguments of each."""
    layers = model.model.language_model.layers
    calls = []

    def recorder(hidden_states, **kwargs):
        kwargs.pop("frozen_tokens", None)
        calls.append(kwargs)
        return hidden_states

    before = [vars(layer).get("forward") for layer in layers]
    states = []
    handle = layers[0].register_forward_pre_hook(lambda layer, args: states.append(args[0]))
    try:
        for layer in layers:
            layer.forward = recorder
        model.model(**inputs, use_cache=False)
    finally:
        handle.remove()
        for layer, forward in zip(layers, before):
            del layer.forward
            if forward is not None:  # accelerate's, which brings an offloaded layer's weights
                layer.forward = forward
    return states[0], calls


def _repeat(unread: torch.Tensor, times: int, layer: int) -> FrozenTokens:
    """`unread` (B, S) frozen in `layer` alone, for a stack of `times` batches."""
    return FrozenTokens(unread.repeat(times, 1), frozenset([layer]), frozenset([layer]), keep_apart=False)


def _repeated(value, times: int):
    """Arguments of a layer for a stack of `times` batches; those of one row serve all."""
    if isinstance(value, dict):
        return {key: _repeated(item, times) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_repeated(item, times) for item in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] > 1:
        return value.repeat(times, *[1] * (value.dim() - 1))
    return value


@contextmanager
def dense(model) -> Iterator[None]:
    """Freeze nothing for a while; a plain LLaVA never does."""
    config = model.config
    if not hasattr(config, "set_replaced_layers"):
        yield
        return
    before = config.replaced_layers, config.replaced_attention_layers, config.replaced_ffn_layers
    config.set_replaced_layers()
    try:
        yield
    finally:
        config.set_replaced_layers(*before)


@contextmanager
def _shortv_layers(layers) -> Iterator[None]:
    """Let the layers of a plain LLaVA take frozen tokens for a while."""
    before = [layer.__class__ for layer in layers]
    try:
        for layer in layers:
            layer.__class__ = SHORTV_LAYERS.get(layer.__class__, layer.__class__)
        yield
    finally:
        for layer, stock in zip(layers, before):
            layer.__class__ = stock


@torch.no_grad()
def cosine_distance(model, inputs) -> torch.Tensor:
    """How far each layer turns visual hidden states: 1 - cosine of its input and output, mean over visual tokens.

    The paper's alternative to LC for choosing layers (section 4.4), float64 of shape `(num_layers,)`.
    """
    visual = inputs["input_ids"] == model.config.image_token_id
    distances = []

    def measure(layer, args, output):
        before, after = (states[visual.to(states.device)].double() for states in (args[0], output))
        distances.append(1 - torch.cosine_similarity(before, after, dim=-1).mean().cpu())

    handles = [layer.register_forward_hook(measure) for layer in model.model.language_model.layers]
    try:
        with dense(model):
            model.model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(distances)
