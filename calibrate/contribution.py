"""Layer Contribution (LC) scores, exact, with layer passes shared between variants.

LC of layer i for a set X of tokens (ShortV, section 3.1): freeze X in layer i alone and take the KL divergence between
the next-token distributions at the prompt's last position, of the original model M and of that variant M_i.

Variant M_i equals the original before layer i. So each layer runs once, on a stack of states: the original's and those
of the variants of all earlier layers. Variant M_i joins the stack after layer i: its states are the original's output,
with the rows of X replaced by the layer's input. That makes L + L(L-1)/2 layer passes for L layers instead of L(L+1),
and each layer's weights are used once a batch.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from shortv_llava.calibrate import Direction, Granularity, Tokens
from shortv_llava.chat.prompts import visual_tokens
from shortv_llava.checkpoint.loading import text_decoder
from shortv_llava.modeling_shortv_llava import SHORTV_LAYERS, Correction, FrozenTokens


def layer_contribution(model, inputs, tokens: Tokens = "visual", direction: Direction = "release") -> torch.Tensor:
    """LC score of every layer, mean over the batch: float64 of shape `(num_layers,)`, in nats.

    Args:
        model: a LLaVA or LLaVA-NeXT for conditional generation, plain or ShortV; its own frozen layers are ignored.
        inputs: a processor's output, with images; rows may be padded on either side.
        tokens: the set X to freeze: visual tokens, the others, or all.
        direction: `release` for KL(M_i || M), as in the authors' code, which gave the published layers; `paper` for
            KL(M || M_i), as in the paper.
    """
    return contributions(model, inputs, [tokens], direction)[0].mean(dim=0)


class RowBudget:
    """Number of rows of the stack that a layer takes at once; permanently halved each time memory runs out."""

    def __init__(self, rows: int | None = None):
        self.rows = rows or 1 << 30


@torch.no_grad()
def contributions(
    model,
    inputs,
    tokens: Sequence[Tokens] = ("visual",),
    direction: Direction = "release",
    granularity: Granularity = "layer",
    budget: RowBudget | None = None,
    read: tuple[torch.Tensor, torch.Tensor] | None = None,
    corrections: Mapping[int, Correction] | None = None,
) -> torch.Tensor:
    """LC scores of every row of the batch for several sets of tokens, which share the original's pass.

    Args:
        read: rows (N,) and positions (N,) where next-token distributions are compared; by default every row's last
            token, N = B.
        corrections: corrections by layer id, for one more set of scores: the first set of tokens, corrected in layers
            where it skips the FFN.

    Returns:
        float64 of shape `(len(tokens), N, num_layers)`, or `(len(tokens), N, 2 * num_layers)` with granularity `block`:
        the attention blocks of all layers, then the FFN blocks. With corrections `len(tokens) + 1`.
    """
    decoder = text_decoder(model)
    budget = budget or RowBudget()
    with _shortv_layers(decoder.layers), without_corrections(model):
        stack, calls, added = layer_calls(model, inputs)  # (variants * B, S, h), the original first
        batch = len(stack)
        sets = [token_set(model, inputs, kind) for kind in tokens]
        rows, positions = read or (torch.arange(batch), last_tokens(inputs["input_ids"], inputs.get("attention_mask")))
        unread = torch.ones_like(sets[0])
        unread[rows.to(unread.device), positions.to(unread.device)] = False
        for index, (layer, call) in enumerate(zip(decoder.layers, calls)):
            stack = add_between(stack, added[index])
            before = stack[:batch]
            with weights_in_place(layer):
                # Only some of the last layer's outputs are read.
                final = unread if index == len(decoder.layers) - 1 else None
                outputs = run_layer(layer, stack, call, batch, budget, final)
                variants = []
                for number, frozen in enumerate([*sets, sets[0]] if corrections else sets):
                    if granularity == "layer":
                        kept, norm = [before.to(outputs.device)], layer.input_layernorm
                    else:
                        kept = [
                            run_layer(layer, before, call, batch, budget, frozen, (name,))
                            for name in ("attention", "ffn")
                        ]
                        norm = layer.ffn_norm
                    if number == len(sets) and index in corrections:
                        kept[-1] = kept[-1] + corrections[index](norm(kept[-1]))
                    mask = frozen.unsqueeze(-1).to(outputs.device)
                    variants += [torch.where(mask, states, outputs[:batch]) for states in kept]
            stack = torch.cat([outputs, *variants])
    states = stack.unflatten(0, (-1, batch))[:, rows.to(stack.device), positions.to(stack.device)]
    logits = model.lm_head(decoder.norm(states))
    scores = divergence(logits[0], logits[1:], direction)  # (layers * sets * blocks, N)
    # Equal states have equal distributions, even if a matrix product rounds their rows differently.
    scores = scores.masked_fill((states[1:] == states[0]).all(dim=-1), 0)
    scores = scores.view(len(decoder.layers), len(sets) + bool(corrections), -1, len(rows))
    return scores.permute(1, 3, 2, 0).flatten(2)


@torch.no_grad()
def cosine_distance(model, inputs) -> torch.Tensor:
    """How far each layer turns visual hidden states: 1 - cosine of its input and output, mean over visual tokens.

    The paper's alternative to LC for choosing layers (section 4.4), float64 of shape `(num_layers,)`.
    """
    visual = token_set(model, inputs, "visual")
    distances = []

    def measure(layer, args, output):
        before, after = (states[visual.to(states.device)].double() for states in (args[0], output))
        distances.append(1 - torch.cosine_similarity(before, after, dim=-1).mean().cpu())

    handles = [layer.register_forward_hook(measure) for layer in text_decoder(model).layers]
    try:
        with dense(model):
            model.model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(distances)


@contextmanager
def dense(model) -> Iterator[None]:
    """Freeze nothing within the context; a plain LLaVA never freezes anything."""
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


def divergence(original: torch.Tensor, variants: torch.Tensor, direction: Direction) -> torch.Tensor:
    """KL between logits (B, vocabulary) and (variants, B, vocabulary), in float64: (variants, B)."""
    p, q = original.double().log_softmax(-1), variants.double().log_softmax(-1)
    if direction == "release":
        return (q.exp() * (q - p)).sum(-1)
    if direction == "paper":
        return (p.exp() * (p - q)).sum(-1)
    raise ValueError(f"direction must be 'release' or 'paper', got {direction!r}")


def token_set(model, inputs, tokens: Tokens) -> torch.Tensor:
    """(B, S), true for the tokens to freeze."""
    visual = visual_tokens(model.config, inputs["input_ids"])
    if tokens == "visual":
        return visual
    if tokens == "text":
        return ~visual
    if tokens == "all":
        return torch.ones_like(visual)
    raise ValueError(f"tokens must be 'visual', 'text' or 'all', got {tokens!r}")


def last_tokens(tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B,), index of the last token of each row (B, S) that is not padding."""
    if attention_mask is None:
        attention_mask = torch.ones_like(tokens)
    return (torch.arange(tokens.shape[1], device=tokens.device) * attention_mask).argmax(dim=1)


def layer_calls(model, inputs) -> tuple[torch.Tensor, list[dict], list[torch.Tensor | None]]:
    """What the language model calls its layers with: states (B, S, h) of the first, keywords of each, and what is added
    to the states before each, (B, S, h) or None. Qwen3-VL adds features of pictures after its first layers."""
    layers = text_decoder(model).layers
    states, calls = [], []

    def recorder(hidden_states, **kwargs):
        kwargs.pop("frozen_tokens", None)
        states.append(hidden_states)
        calls.append(kwargs)
        nothing = torch.zeros_like(hidden_states)  # so that the next layer gets what is added alone
        return (nothing,) if getattr(layers[0], "in_tuple", False) else nothing

    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = recorder
        model.model(**inputs, use_cache=False)
    finally:
        for layer, forward in zip(layers, before):
            del layer.forward
            if forward is not None:  # accelerate's, which loads an offloaded layer's weights
                layer.forward = forward
    return states[0], calls, [None, *(more if more.any() else None for more in states[1:])]


def add_between(states: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
    """States (variants * B, S, h) with what is added to those of a batch (B, S, h) before a layer."""
    return states if added is None else states + added.to(states.device).repeat(len(states) // len(added), 1, 1)


def run_layer(layer, stack, call, batch, budget, frozen=None, blocks=("attention", "ffn")) -> torch.Tensor:
    """Run the layer on the stack (variants * B, S, h), as many rows at once as memory allows.

    Args:
        call: keyword arguments of the layer for one batch.
        frozen: (B, S), tokens that skip the `blocks`; their outputs must not be read.
    """
    outputs, start = [], 0
    while start < len(stack):
        rows = torch.arange(start, min(start + budget.rows, len(stack))) % batch
        try:
            if frozen is not None:
                layer_id = {layer.self_attn.layer_idx}
                chosen = (layer_id if block in blocks else frozenset() for block in ("attention", "ffn"))
                tokens = FrozenTokens(frozen[rows.to(frozen.device)].to(stack.device), *chosen)
                call = call | {"frozen_tokens": tokens}
            output = layer(stack[start : start + len(rows)], **_of_rows(call, rows, batch))
            outputs.append(output[0] if isinstance(output, tuple) else output)
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or len(rows) == 1:
                raise
            budget.rows = len(rows) // 2
            clear_device_cache(garbage_collection=True)
        else:
            start += len(rows)
    return torch.cat(outputs)


def _of_rows(value, rows: torch.Tensor, batch: int, axis: int = 0):
    """A layer's argument for these rows of the batch; unchanged if it has no rows.

    Args:
        axis: dimension of the rows. In rotary rows it is the third from the end: Qwen2-VL's in transformers 4 are
            (3, B, S, d).
    """
    if isinstance(value, dict):
        return {
            key: _of_rows(item, rows, batch, -3 if key.startswith("position_embeddings") else 0)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return tuple(_of_rows(item, rows, batch, axis) for item in value)
    if batch > 1 and isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[axis] == batch:
        return value.index_select(axis, rows.to(value.device))
    return value


@contextmanager
def without_corrections(model) -> Iterator[None]:
    """Disable all corrections within the context."""
    layers = text_decoder(model).layers
    kept = [(layer, layer._modules.pop("correction")) for layer in layers if "correction" in layer._modules]
    try:
        yield
    finally:
        for layer, correction in kept:
            layer.correction = correction


@contextmanager
def _shortv_layers(layers) -> Iterator[None]:
    """Make the layers of a plain LLaVA accept frozen tokens within the context."""
    before = []
    try:
        for layer in layers:
            for module, shortv in zip((layer, layer.self_attn), SHORTV_LAYERS.get(type(layer), ())):
                # Transformers 4 (recording hidden states) and accelerate store the stock class's method in the module.
                kept = {name: vars(module)[name] for name in ("forward", "_old_forward") if name in vars(module)}
                methods = {name: method for name, method in kept.items() if inspect.ismethod(method)}
                before.append((module, module.__class__, methods))
                module.__class__ = shortv
                vars(module).update(dict.fromkeys(methods, MethodType(shortv.forward, module)))
        yield
    finally:
        for module, stock, methods in before:
            module.__class__ = stock
            vars(module).update(methods)


@contextmanager
def weights_in_place(layer) -> Iterator[None]:
    """Load the weights of a layer that accelerate offloads once, not for every call of its modules."""
    offloaded = [m for m in layer.modules() if getattr(getattr(m, "_hf_hook", None), "offload", False)]
    for module in offloaded:
        module._hf_hook.pre_forward(module)
        module._hf_hook.offload = False
    try:
        yield
    finally:
        for module in offloaded:
            module._hf_hook.offload = True
            module._hf_hook.post_forward(module, None)
