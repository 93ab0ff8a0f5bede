"""Tiny models of the families outside LLaVA's, by their true configurations, and inputs with pictures for them."""

import functools

import tiny
import torch
import transformers

import shortv_llava
from shortv_llava.modeling_shortv_llava import Correction

V5 = not transformers.__version__.startswith("4.")
IMAGE, VIDEO, VISION_START = range(tiny.IMAGE_TOKEN, tiny.IMAGE_TOKEN + 3)
TEXT = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIGLIP = VISION | {"image_size": 56, "patch_size": 14}
IDEFICS3 = {"text_config": TEXT | {"model_type": "llama"}, "vision_config": SIGLIP, "scale_factor": 2}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10_000.0}
QWEN_TOKENS = {"video_token_id": VIDEO, "vision_start_token_id": VISION_START}


def mrope(**settings) -> dict:
    return {"rope_parameters" if V5 else "rope_scaling": MROPE | settings}


QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
SETTINGS = {
    "InternVL": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": VISION | {"image_size": [56, 56], "patch_size": [14, 14]},
    },
    "InternVL3.5": {
        "text_config": TEXT | {"model_type": "qwen3", "head_dim": 8},
        "vision_config": VISION | {"image_size": [56, 56], "patch_size": [14, 14]},
    },
    "Mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        "vision_config": SIGLIP | {"model_type": "pixtral", "head_dim": 8},
        "vision_feature_layer": -1,
    },
    "Idefics3": IDEFICS3,
    "SmolVLM": IDEFICS3,
    "Qwen2VL": {
        "text_config": TEXT | mrope(),
        "vision_config": QWEN_VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "Qwen2_5_VL": {
        "text_config": TEXT | mrope(),
        "vision_config": QWEN_VISION
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 8}
        | {"fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
    },
    "Qwen3VL": {
        "text_config": TEXT | {"head_dim": 8} | mrope(mrope_interleaved=True),
        "vision_config": QWEN_VISION
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
        | {"deepstack_visual_indexes": [0, 1]},
        **QWEN_TOKENS,
    },
    "Gemma3": {
        "text_config": TEXT
        | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": SIGLIP | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
    },
}
FAMILIES = tuple(SETTINGS)
TOKENS_PER_IMAGE = 4
PICTURES_IN_A_ROW = ("Idefics3", "SmolVLM")  # pixel values have a dimension for the row
QWEN = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")  # know videos


def class_name(family: str) -> str:
    return "InternVL" if family == "InternVL3.5" else family


def fill_projector(model) -> None:
    """Gemma 3's projector is zero in a new model."""
    for name, weight in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):
            torch.nn.init.normal_(weight)


@functools.cache
def pair(family: str, attn_implementation: str = "sdpa", correction_rank: int = 0, num_hidden_layers: int = 4):
    """(stock model, ShortV model) with the same weights, float64; with a rank, both have corrections in all layers."""
    settings = SETTINGS[family] | {"image_token_id": IMAGE, "attn_implementation": attn_implementation}
    text = settings["text_config"] | {"num_hidden_layers": num_hidden_layers}
    if "layer_types" in text:
        text["layer_types"] = (text["layer_types"] * num_hidden_layers)[:num_hidden_layers]
    settings["text_config"], name = text, class_name(family)
    torch.manual_seed(0)
    stock_config = getattr(transformers, f"{name}Config")(**settings)
    stock = getattr(transformers, f"{name}ForConditionalGeneration")(stock_config).double().eval()
    fill_projector(stock)
    for parameter, weight in stock.named_parameters():
        if parameter.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    correction = {}
    if correction_rank:
        layers = tiny.decoder(stock).layers
        correction = {"correction_rank": correction_rank, "corrected_layers": list(range(len(layers)))}
        for layer in layers:
            layer.correction = Correction(TEXT["hidden_size"], correction_rank).double().eval()
    ours_class = getattr(shortv_llava, f"ShortV{name}ForConditionalGeneration")
    ours = ours_class(ours_class.config_class(**settings, **correction)).double().eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def pixels(family: str, row_counts: list[int], generator: torch.Generator) -> dict:
    """Pictures of all rows, each of as many visual tokens."""

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    number = sum(row_counts)
    if family in QWEN:
        patches = random(number * 16, 3 * 2 * 4 * 4)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * number)}
    if family in PICTURES_IN_A_ROW:
        values = torch.zeros(len(row_counts), max(row_counts), 3, 56, 56, dtype=torch.float64)  # zeros are no picture
        for row, count in enumerate(row_counts):
            values[row, :count] = random(count, 3, 56, 56)
        return {"pixel_values": values, "pixel_attention_mask": torch.ones(*values.shape[:2], 56, 56, dtype=torch.long)}
    sizes = {"image_sizes": torch.tensor([[56, 56]] * number)} if family == "Mistral3" else {}
    return {"pixel_values": random(number, 3, 56, 56), **sizes}


def batch(family: str, layout: list[str], side: str = "left", seed: int = 0) -> dict:
    """Model inputs for rows such as "ttIttV": `t` a random text token, `I` an image, `V` a video of Qwen's."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in layout:
        ids = []
        for letter in row:
            text = int(torch.randint(3, tiny.IMAGE_TOKEN, (), generator=generator))
            if letter != "t" and family in QWEN and ids and ids[-1] not in (IMAGE, VIDEO):
                ids[-1] = VISION_START  # by which transformers 4 counts pictures
            ids += [text] if letter == "t" else [IMAGE if letter == "I" else VIDEO] * TOKENS_PER_IMAGE
        rows.append(ids)
    longest = max(map(len, rows))

    def padded(row, filler):
        rest = [filler] * (longest - len(row))
        return rest + row if side == "left" else row + rest

    inputs = {
        "input_ids": torch.tensor([padded(row, 0) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row), 0) for row in rows]),
    }
    counts = [row.count("I") for row in layout]
    if sum(counts):
        inputs |= pixels(family, counts, generator)
    if videos := sum(row.count("V") for row in layout):
        video = pixels(family, [videos], generator)
        inputs |= {"pixel_values_videos": video["pixel_values"], "video_grid_thw": video["image_grid_thw"]}
    types = (inputs["input_ids"] == IMAGE) + 2 * (inputs["input_ids"] == VIDEO)
    if family in QWEN and V5:
        inputs["mm_token_type_ids"] = types
    if family == "Gemma3":
        inputs["token_type_ids"] = types
    return inputs


def visual(inputs: dict) -> torch.Tensor:
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
