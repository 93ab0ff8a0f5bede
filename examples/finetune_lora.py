"""Recover accuracy that freezing costs by LoRA: `python -m shortv_llava.examples.finetune_lora`.

With `--only corrections` no weight of the model is trained: corrections of the same rank are fitted in closed form,
then trained.

Visual tokens are frozen in the 80 percent of the embedded checkpoint's layers that matter most. The model is fine-tuned
on questions about new pictures from its training distribution. For your own checkpoint and data, replace
`Conversations`: any batch with `labels` works.
"""

from typing import Annotated

import torch
import typer
from peft import LoraConfig, get_peft_model
from tqdm import trange
from transformers import get_cosine_schedule_with_warmup

from shortv_llava.calibrate import layer_contribution
from shortv_llava.calibrate.correction import FitSample, fit_corrections, set_corrections
from shortv_llava.calibrate.samples import draw, embedded_samples, make_inputs
from shortv_llava.calibrate.selection import number_of_layers
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.examples.shapes_llava import CHECKPOINT, shapes
from shortv_llava.examples.shapes_llava.evaluate import accuracy, caption_accuracy
from shortv_llava.examples.shapes_llava.train import Conversations
from shortv_llava.flops import lowest


def layers_that_matter(model, processor, fraction: float) -> list[int]:
    """The `fraction` of the layers with the highest LC scores, which calibration would not replace."""
    scores = layer_contribution(model, make_inputs(processor, draw(embedded_samples(), 20, seed=0)))
    return lowest((-scores).tolist(), number_of_layers(len(scores), fraction))


def with_lora(model, rank: int):
    """The model with LoRA on every linear layer of its language model, for training."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r".*language_model.*_proj")
    return get_peft_model(model, config).train()


def with_corrections(model, processor, rank: int):
    """The model with corrections fitted on the embedded pictures; only the corrections are trainable."""
    samples = [FitSample(model, make_inputs(processor, [sample])) for sample in embedded_samples()]
    set_corrections(model, fit_corrections(model, samples, rank))
    model.requires_grad_(False)
    for layer in model.config.corrected_layers:
        model.model.language_model.layers[layer].correction.requires_grad_(True)
    return model.train()


def train(model, processor, steps: int, lr: float) -> None:
    """Train a model's trainable parameters, on new pictures from its training distribution."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    data = Conversations(processor, model.config.image_seq_length)
    for step in (bar := trange(steps, desc="training", mininterval=5)):
        loss = model(**data.batch(f"lora/{step}")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def main(
    fraction: Annotated[float, typer.Option(help="Of the layers to replace.")] = 0.8,
    steps: Annotated[int, typer.Option(help="Of training, 20 pictures with 12 questions each.")] = 100,
    rank: Annotated[int, typer.Option(help="Of the LoRA matrices, or of the corrections.")] = 16,
    only: Annotated[str | None, typer.Option(help="`corrections`: train these in place of LoRA.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    questions: Annotated[int, typer.Option(help="Held-out questions with a short answer.")] = 500,
    captions: Annotated[int, typer.Option(help="Held-out captions.")] = 100,
    seed: int = 0,
) -> None:
    """Print accuracy before and after, and the dense model's."""
    if only not in (None, "corrections"):
        raise typer.BadParameter("is corrections, or left out", param_hint="--only")
    torch.manual_seed(seed)
    model, processor = load_model(CHECKPOINT, dtype=torch.float32), load_processor(CHECKPOINT)
    asked = shapes.held_out(questions)
    scenes = [scene for scene, _ in shapes.held_out(captions, seed="held-out captions")]

    def report(name: str) -> None:
        scores = accuracy(model, processor, asked) | {"captions": caption_accuracy(model, processor, scenes)}
        print(f"{name:<24}" + "  ".join(f"{kind} {score:.1f}" for kind, score in scores.items()))

    report("dense")
    layers = layers_that_matter(model, processor, fraction)
    model.set_replaced_layers(layers)
    print(f"replaced layers: {layers}")
    report("ShortV")
    if only == "corrections":
        model = with_corrections(model, processor, rank)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        print(f"trainable params: {trained:,}")
        report("corrected, fitted")
    else:
        model = with_lora(model, rank)
        model.print_trainable_parameters()
    train(model, processor, steps, lr)
    model = (model if only else model.merge_and_unload()).eval()
    report("corrected, trained" if only else "ShortV, after LoRA")


if __name__ == "__main__":
    typer.run(main)
