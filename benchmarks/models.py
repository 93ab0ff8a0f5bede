"""Random models of given shapes, stock and ShortV with the same weights, and prompts for them."""

import os

import torch
from PIL import Image
from torch import nn
from transformers import Qwen2Config

from shortv_llava.benchmarks.sizes import Shape
from shortv_llava.checkpoint.config import class_of
from shortv_llava.checkpoint.loading import text_decoder
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
    """(stock, ours): random weights, shared.

    With a `correction_rank`, ours has corrections of all layers but the last, as after calibration.
    """
    config = make_config(shape, attention)
    if correction_rank:
        config.correction_rank = correction_rank
        config.corrected_layers = list(range(shape.num_layers - 1))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            ours_class = class_of(config.model_type)
            ours = ours_class(config).eval()
            stock = ours_class.__bases__[1](config).eval()
    finally:
        torch.set_default_dtype(before)
    shared = {name: tensor for name, tensor in ours.state_dict().items() if ".correction." not in name}
    stock.load_state_dict(shared, assign=True)
    return stock, ours


def make_config(shape: Shape, attention: str):
    """ShortV's configuration of a shape. The vision tower is CLIP-L for published shapes, else one layer."""
    num_heads = shape.width // shape.head_size
    text = {
        "vocab_size": 32064 if shape.published else 1000,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": shape.key_heads or num_heads,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    side = shape.image_side * PATCH
    if shape.family == "llava":
        text["model_type"], vision["model_type"] = "llama", "clip_vision_model"
        if shape.published:
            vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
            vision["num_attention_heads"] = 16
        vision |= {"image_size": side, "patch_size": PATCH}
    elif shape.family == "internvl":
        text["model_type"] = "qwen2"
        vision |= {"image_size": [2 * side] * 2, "patch_size": [PATCH] * 2}
    else:  # Qwen's
        sections = shape.head_size // 8
        rope = {"rope_type": "default", "rope_theta": 1e6}
        text["rope_parameters" if "rope_parameters" in Qwen2Config().to_dict() else "rope_scaling"] = rope | {
            "mrope_section": [2 * sections, sections, sections]
        }
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 1, "patch_size": PATCH}
        vision |= {"out_hidden_size": shape.width, "fullatt_block_indexes": [0]}
    settings = {"text_config": text, "vision_config": vision, "image_token_id": IMAGE_TOKEN}
    return class_of(f"shortv_{shape.family}", "Config")(**settings, attn_implementation=attention)


def fuse_norms(model) -> None:
    """Make each norm of the language model's layers one operation, with the same weight."""
    for layer in text_decoder(model).layers:
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
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family == "internvl":
        side *= 2  # it pools four patches into a token
    if shape.family == "qwen2_5_vl":  # and takes patches of two frames
        inputs["image_grid_thw"] = torch.tensor([[1, 2 * shape.image_side, 2 * shape.image_side]] * batch)
        inputs["pixel_values"] = torch.randn(batch * 4 * shape.visual_tokens, 6 * PATCH**2, dtype=model.dtype)
        if "mm_token_type_ids" in type(model).forward.__annotations__:  # not in transformers 4
            inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    else:
        inputs["pixel_values"] = torch.randn(batch * shape.tiles, 3, side, side, dtype=model.dtype)
    return {key: value.to(model.device) for key, value in inputs.items()}
