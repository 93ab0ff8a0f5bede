"""Small random LLaVA models in float64, inputs of every layout, and the oracle: the stock model with hooks.

Two correct orders of the same sums differ by 1e-13 in float64, in float32 by what the processor makes of them.
"""

import contextlib
import functools

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from shortv_llava import (
    ShortVLlavaConfig,
    ShortVLlavaForConditionalGeneration,
    ShortVLlavaNextConfig,
    ShortVLlavaNextForConditionalGeneration,
)
from shortv_llava.checkpoint.chat_templates import FORMATS
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.modeling_shortv_llava import Correction

LONG = "t" + "I" * 400 + "t" + "I" * 400 + "ttt"  # 3,205 tokens, text in one row, one row and three
IMAGE_TOKEN, PAD_TOKEN, END_TOKEN, VOCABULARY, LAYERS = 90, 0, 2, 96, 4
BACKBONES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
OTHER_BACKBONES = {
    "gemma": {"head_dim": 8},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 1.5},
    "qwen3": {"head_dim": 8},
}
CLASSES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration, ShortVLlavaConfig, ShortVLlavaForConditionalGeneration),
    "llava_next": (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        ShortVLlavaNextConfig,
        ShortVLlavaNextForConditionalGeneration,
    ),
}

CLOSE = {"atol": 1e-9, "rtol": 0}


def exact_norm(norm_class):
    """Stock norms compute in float32 whatever they are given; those of float64 models keep float64."""
    stock = norm_class.forward

    def forward(self, states):
        if states.dtype != torch.float64:
            return stock(self, states)
        epsilon = getattr(self, "variance_epsilon", None) or self.eps
        weight = 1 + self.weight if norm_class in (GemmaRMSNorm, Gemma3RMSNorm) else self.weight
        return weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)

    return forward


OWN_NORMS = {modeling_qwen2_vl: "Qwen2VLRMSNorm", modeling_qwen2_5_vl: "Qwen2_5_VLRMSNorm"}  # Qwen2's in transformers 4
for norm_class in (
    *(getattr(module, name) for module, name in OWN_NORMS.items() if hasattr(module, name)),
    GemmaRMSNorm, Gemma3RMSNorm, GraniteRMSNorm, LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm,
    Qwen3VLTextRMSNorm,
):  # fmt: skip
    norm_class.forward = exact_norm(norm_class)


def decoder(model):
    """The language model without its head; transformers 4 finds that of Idefics3 only half."""
    found = model.get_decoder()
    return getattr(found, "text_model", found)


def config_dict(family="llava", backbone="llama", kv_heads=2, attn_implementation="sdpa", **text) -> dict:
    others = {"gemma": GemmaConfig, "granite": GraniteConfig, "qwen3": Qwen3Config}
    text_config = (BACKBONES | others)[backbone](
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "bos_token_id": 1,
            "eos_token_id": END_TOKEN,
            "pad_token_id": PAD_TOKEN,
            "initializer_range": 0.2,
        }
        | text
    )
    vision_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        initializer_range=0.2,
    )
    extra = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]} if family == "llava_next" else {}
    return {
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_index": IMAGE_TOKEN,
        "attn_implementation": attn_implementation,
        **extra,
    }


@functools.cache
def pair(family="llava", backbone="llama", kv_heads=2, attn_implementation="sdpa", correction_rank=0, **text):
    """(stock model, ShortV model) with the same weights, float64.

    With a `correction_rank`, both have random corrections in all layers, which in the stock model only [`frozen`] sees.
    """
    stock_config, stock_class, our_config, our_class = CLASSES[family]
    torch.manual_seed(0)
    settings = (family, backbone, kv_heads, attn_implementation)
    stock = stock_class(stock_config(**config_dict(*settings, **text))).double().eval()
    for name, weight in stock.named_parameters():
        if name.endswith("norm.weight"):  # ones, as they begin, would hide that a layer takes another's
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    layers, correction = decoder(stock).layers, {}
    if correction_rank:
        correction = {"correction_rank": correction_rank, "corrected_layers": list(range(len(layers)))}
        for layer in layers:
            layer.correction = Correction(stock.config.text_config.hidden_size, correction_rank).double().eval()
    ours = our_class(our_config(**config_dict(*settings, **text), **correction)).double().eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def images(family: str, number: int, seed: int, same_size: bool) -> dict:
    """Inputs for `number` random images; LLaVA-NeXT's are of different sizes unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    if family == "llava":
        return {"pixel_values": torch.randn(number, 3, 28, 28, generator=generator, dtype=torch.float64)}
    sizes = [[(28, 56), (50, 20), (40, 45)][0 if same_size else index % 3] for index in range(number)]
    pixels = torch.randn(number, 5, 3, 28, 28, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def feature_lengths(model, inputs: dict) -> list[int]:
    """Visual tokens of each image."""
    with torch.no_grad():
        features = model.get_image_features(
            **inputs,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        )
    features = getattr(features, "pooler_output", features)
    return [len(feature) for feature in features]


def batch(model, family: str, layout: list[str], padding_side="left", seed: int = 0, same_size=False) -> dict:
    """Model inputs for rows such as "ttIttI": `t` a random text token, `I` an image."""
    generator = torch.Generator().manual_seed(seed)
    number = sum(row.count("I") for row in layout)
    inputs = images(family, number, seed, same_size) if number else {}
    lengths = iter(feature_lengths(model, inputs) if number else [])
    rows = []
    for row in layout:
        ids = []
        for letter in row:
            text = int(torch.randint(3, IMAGE_TOKEN, (), generator=generator))
            ids += [IMAGE_TOKEN] * next(lengths) if letter == "I" else [text]
        rows.append(ids)
    longest = max(map(len, rows))

    def padded(row, filler):
        rest = [filler] * (longest - len(row))
        before = {"left": len(rest), "right": 0, "both": len(rest) // 2}[padding_side]
        return rest[:before] + row + rest[before:]

    inputs["input_ids"] = torch.tensor([padded(row, PAD_TOKEN) for row in rows])
    inputs["attention_mask"] = torch.tensor([padded([1] * len(row), 0) for row in rows])
    return inputs


def root_mean_square(difference: torch.Tensor) -> float:
    return difference.float().square().mean().sqrt().item()


def freeze(model, layers=(), attention=(), ffn=()) -> None:
    """Set a ShortV model's lists from what [`frozen`] takes."""
    model.set_replaced_layers(layers, attention, ffn)


@contextlib.contextmanager
def frozen(stock, visual: torch.Tensor | None = None, layers=(), attention=(), ffn=()):
    """The oracle: hooks on the stock model zero the `visual` (batch, length) rows of what frozen blocks add.

    Where a layer has a correction, and its FFN is frozen, that is added to these rows.

    Left out, they are found anew in every forward pass that gets images, and no other is touched, as `generate` needs.
    """
    layers_of_stock = decoder(stock).layers
    find = visual is None

    def find_visual(module, args, kwargs):
        nonlocal visual
        visual = None
        kwargs = dict(zip(("input_ids", "pixel_values"), args)) | kwargs
        if kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs"):
            input_ids = kwargs.get("input_ids")
            if input_ids is not None:
                visual = input_ids == IMAGE_TOKEN
            else:
                placeholder = module.get_input_embeddings()(torch.tensor(IMAGE_TOKEN))
                visual = (kwargs["inputs_embeds"] == placeholder).all(-1)

    def zero_visual(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        if visual is not None and states.shape[:2] == visual.shape:
            states = states.masked_fill(visual.unsqueeze(-1), 0)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def add_correction(mlp, correction, block):
        seen = []

        def keep(module, args, kwargs):
            seen[:] = args or [kwargs["hidden_states"]]  # normed

        def add(module, args, output):
            if visual is None or output.shape[:2] != visual.shape:
                return output
            return output + correction(seen[0]) * visual.unsqueeze(-1)

        return [block.register_forward_pre_hook(keep, with_kwargs=True), mlp.register_forward_hook(add)]

    handles = [layers_of_stock[i].self_attn.register_forward_hook(zero_visual) for i in {*layers, *attention}]
    handles += [layers_of_stock[i].mlp.register_forward_hook(zero_visual) for i in {*layers, *ffn}]
    for i in {*layers, *ffn}:
        if hasattr(layers_of_stock[i], "correction"):
            block = layers_of_stock[i].self_attn if i in layers else layers_of_stock[i].mlp
            handles += add_correction(layers_of_stock[i].mlp, layers_of_stock[i].correction, block)
    if find:
        handles.append(stock.model.register_forward_pre_hook(find_visual, with_kwargs=True))
    try:
        yield stock
    finally:
        for handle in handles:
            handle.remove()


def next_model():
    """A random LLaVA-NeXT that speaks the embedded checkpoint's tokens, and its processor."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    settings = config_dict("llava_next", vocab_size=len(tokenizer)) | {"image_token_index": image_token}
    model = ShortVLlavaNextForConditionalGeneration(ShortVLlavaNextConfig(**settings)).eval()
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=settings["image_grid_pinpoints"],
    )
    processor = LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=FORMATS["vicuna_v1"],
    )
    return model, processor
