"""Random LLaVA models of given shapes, stock and ShortV with the same weights, and prompts for them."""

import os

import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration

from shortv_llava import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
from shortv_llava.benchmarks.sizes import Shape
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.examples.shapes_llava import CHECKPOINT

PATCH = 14
IMAGE_TOKEN = 999
BEFORE_IMAGE = 35  # text tokens before the image in LLaVA's prompts

# MKL splits a matrix product by rows; for a short text every thread then packs the whole weight matrix. This variable,
# read at the first product, makes it split by the weights instead, for both models.
os.environ.setdefault("MKL_NUM_STRIPES", str(torch.get_num_threads()))


def make_pair(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    correction_rank: int = 0,
):
    """(stock, ours): LLaVA-1.5 with random weights. The vision tower is CLIP-L for published shapes, else one layer.

    With a `correction_rank`, ours has corrections of all layers but the last, as after calibration.
    """
    text = LlamaConfig(
        vocab_size=32064 if shape.published else 1000,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.width // shape.head_size,
        num_key_value_heads=shape.width // shape.head_size,
        max_position_embeddings=8192,
    )
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    if shape.published:
        tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = CLIPVisionConfig(**tower, image_size=shape.image_side * PATCH, patch_size=PATCH)
    config = ShortVLlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, attn_implementation=attention
    )
    if correction_rank:
        config.correction_rank = correction_rank
        config.corrected_layers = list(range(shape.num_layers - 1))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            ours = ShortVLlavaForConditionalGeneration(config).eval()
            stock = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    shared = {name: tensor for name, tensor in ours.state_dict().items() if ".correction." not in name}
    stock.load_state_dict(shared, assign=True)
    return stock, ours


def fuse_norms(model) -> None:
    """Make each norm of the language model's layers one operation, with the same weight."""
    for layer in model.model.language_model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = getattr(layer, name)
            fused = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, device="meta")
            fused.weight = norm.weight
            setattr(layer, name, fused)


def make_processor(model):
    """A processor for a model of [`make_pair`], with the embedded checkpoint's tokenizer. Sets its image token."""
    processor, side = load_processor(CHECKPOINT), model.config.vision_config.image_size
    processor.patch_size = PATCH
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    model.config.image_token_id = processor.image_token_id
    return processor


def make_picture(model) -> Image.Image:
    """A picture of noise, of the model's image size."""
    side = model.config.vision_config.image_size
    return Image.effect_noise((side, side), 64).convert("RGB")


def make_inputs(model, shape: Shape, text_tokens: int = 64, batch: int = 1) -> dict:
    """A prompt whose image follows 35 text tokens, as LLaVA's does."""
    side = shape.image_side * PATCH
    text = torch.randint(3, IMAGE_TOKEN, (batch, text_tokens))
    image = torch.full((batch, shape.visual_tokens), IMAGE_TOKEN)
    ids = torch.cat([text[:, :BEFORE_IMAGE], image, text[:, BEFORE_IMAGE:]], dim=1)
    pixels = torch.randn(batch * shape.tiles, 3, side, side, dtype=model.dtype)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    return {key: value.to(model.device) for key, value in inputs.items()}
