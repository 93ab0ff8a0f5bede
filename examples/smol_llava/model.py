"""A LLaVA-1.5 on a pretrained language model: its construction, its trained parts, and the finished folder."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava.train import save
from shortv_llava.examples.smol_llava.language_model import CHAT_TEMPLATE
from shortv_llava.examples.smol_llava.scenes import IMAGE_SIZE
from shortv_llava.files.outputs import replacing_file

IMAGE = "<image>"
PATCH = 16  # pixels; 128 / 16 = 8, squared = 64 visual tokens
VISUAL_TOKENS = (IMAGE_SIZE // PATCH) ** 2
RANK = 16
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINED = Path(__file__).parent / "trained"
WEIGHTS = "trained.safetensors"


class Adapter(nn.Module):
    """LoRA: a low-rank update of a linear layer, added to its output by a hook; zero at first."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, linear.in_features) / RANK**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), in the dtype of the states."""
        return states @ self.down.to(states.dtype).T @ self.up.to(states.dtype).T

    @torch.no_grad()
    def merge(self, linear: nn.Linear) -> None:
        linear.weight.copy_(linear.weight.float() + self.up.float() @ self.down.float())


def make_processor(tokenizer) -> LlavaProcessor:
    """The processor for a language model's tokenizer, to which the image token is added."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.padding_side = "left"
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def make_llava(language_model, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """LLaVA with this language model, in its dtype, and a vision tower and projector from scratch, float32.

    The head is a copy of the word embeddings, not tied to them: LLaVA's checkpoints have both tensors. The vocabulary
    is padded to a multiple of 64.
    """
    language_model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    language_model.config.tie_word_embeddings = False
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=192,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language_model.config,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,  # the tower is small, so all its layers are used
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    language_model.model.requires_grad_(False)
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.model.language_model.to(language_model.dtype)
    model.lm_head.to(language_model.dtype)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    for part in (model.model.language_model, model.lm_head):
        part.requires_grad_(False)
    return model


def attach_adapters(model: LlavaForConditionalGeneration) -> nn.ModuleDict:
    """LoRA on every linear layer of the language model's decoder, by the layer's name with `/` for dots."""
    adapters = nn.ModuleDict()
    for name, linear in model.model.language_model.named_modules():
        if name.endswith(ADAPTED):
            adapter = adapters[name.replace(".", "/")] = Adapter(linear)
            linear.register_forward_hook(lambda _, args, output, adapter=adapter: output + adapter(args[0]))
    return adapters


def detach_adapters(model: LlavaForConditionalGeneration, adapters: nn.ModuleDict, merge: bool) -> None:
    """Remove the adapters; with `merge`, first add their updates to the weights."""
    for name, adapter in adapters.items():
        linear = model.model.language_model.get_submodule(name.replace("/", "."))
        if merge:
            adapter.merge(linear)
        linear._forward_hooks.clear()


def trained_parts(model: LlavaForConditionalGeneration, adapters: nn.ModuleDict | None = None) -> nn.ModuleDict:
    """All trained modules; in stage 2 with adapters."""
    parts = {"vision": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    return nn.ModuleDict(parts if adapters is None else parts | {"adapters": adapters})


def save_trained(parts: nn.ModuleDict, folder: Path) -> None:
    """Write the trained tensors, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in parts.state_dict().items()
        if tensor.is_floating_point()
    }
    with replacing_file(folder / WEIGHTS) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})


def build(output: Path, language_model, tokenizer, trained: Path = TRAINED) -> None:
    """Assemble the checkpoint folder, with llava-hf's layout, from the language model and the trained tensors.

    Raises:
        ShortVError: if trained tensors are missing.
    """
    weights = trained / WEIGHTS
    if not weights.is_file():
        raise ShortVError(f"{weights}: not there; train first, or give the folder that holds it")
    processor = make_processor(tokenizer)
    model = make_llava(language_model, processor)
    adapters = attach_adapters(model)
    found = trained_parts(model, adapters).load_state_dict(load_file(weights), strict=False)
    missing = [name for name in found.missing_keys if not name.endswith("position_ids")]  # which are not saved
    if missing or found.unexpected_keys:
        other = [*missing, *found.unexpected_keys]
        raise ShortVError(f"{weights}: {len(other)} tensors missing or of another model, as {other[0]}; train anew")
    detach_adapters(model, adapters, merge=True)
    save(model, processor, output)
