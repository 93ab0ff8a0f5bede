"""What ShortV does to the embedded checkpoint: `python -m shortv_llava.checkpoints.evaluate`.

Accuracy on held-out questions, dense and with the layers chosen by LC, by cosine similarity and at random.
"""

import random
import statistics
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from shortv_llava.calibrate.contribution import cosine_distance, layer_contribution
from shortv_llava.calibrate.samples import embedded_samples, make_inputs, make_prompt
from shortv_llava.calibrate.selection import lowest, number_of_layers
from shortv_llava.checkpoints import CHECKPOINT, shapes
from shortv_llava.flops import flops_ratio
from shortv_llava.package import load_model, load_processor
from shortv_llava.prompts import CAPTION_PROMPT

BATCH = 50


@torch.no_grad()
def answers(model, processor, asked: Sequence[tuple[shapes.Scene, str]], max_new_tokens: int) -> list[str]:
    """Greedy answers to (scene, question) pairs."""
    found = []
    for start in range(0, len(asked), BATCH):
        scenes, questions = zip(*asked[start : start + BATCH])
        inputs = processor(
            text=[make_prompt(processor, question) for question in questions],
            images=[shapes.draw(scene) for scene in scenes],
            padding=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        decoded = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.strip() for text in decoded]
    return found


def accuracy(model, processor, questions: Sequence[tuple[shapes.Scene, shapes.Question]]) -> dict[str, float]:
    """Exact-match percentages: of each kind of question and, as `all`, of all."""
    given = answers(model, processor, [(scene, question.text) for scene, question in questions], 6)
    right = {kind: [] for kind in (*shapes.KINDS, "all")}
    for answer, (_, question) in zip(given, questions):
        right[question.kind].append(answer == question.answer)
        right["all"].append(answer == question.answer)
    return {kind: 100 * statistics.mean(hits) for kind, hits in right.items()}


def caption_accuracy(model, processor, scenes: Sequence[shapes.Scene]) -> float:
    """Percentage of captions that name every object, in reading order."""
    given = answers(model, processor, [(scene, CAPTION_PROMPT) for scene in scenes], 48)
    return 100 * statistics.mean(text == shapes.caption(scene) for text, scene in zip(given, scenes))


def main(
    questions: Annotated[int, typer.Option(help="Held-out questions with a short answer.")] = 1000,
    captions: Annotated[int, typer.Option(help="Held-out captions.")] = 200,
    seeds: Annotated[int, typer.Option(help="Random choices of layers.")] = 5,
) -> None:
    """Print the table of the README."""
    model, processor = load_model(CHECKPOINT, dtype=torch.float32), load_processor(CHECKPOINT)
    inputs = make_inputs(processor, embedded_samples())
    num_layers = model.config.text_config.num_hidden_layers
    number = number_of_layers(num_layers)
    choices = {
        "dense": [],
        "LC": lowest(layer_contribution(model, inputs).tolist(), number),
        "cosine": lowest(cosine_distance(model, inputs).tolist(), number),
    }
    for seed in range(seeds):
        choices[f"random, seed {seed}"] = random.Random(seed).sample(range(num_layers), number)

    asked = shapes.held_out(questions)
    scenes = [scene for scene, _ in shapes.held_out(captions, seed="held-out captions")]
    table = Table(title=f"{number} of {num_layers} layers replaced; percent right", title_justify="left")
    for column in ("layers", "FLOPs ratio", *shapes.KINDS, "all", "captions", "replaced"):
        table.add_column(column, justify="left" if column in ("layers", "replaced") else "right", overflow="fold")
    random_results = []
    for name, layers in tqdm(choices.items(), desc="choices"):
        model.set_replaced_layers(layers)
        scores = accuracy(model, processor, asked) | {"captions": caption_accuracy(model, processor, scenes)}
        cells = [f"{score:.1f}" for score in scores.values()]
        table.add_row(name, f"{flops_ratio(model.config):.2f}", *cells, ",".join(map(str, layers)))
        if name.startswith("random"):
            random_results.append(scores)
    if random_results:
        means = [f"{statistics.mean(scores[kind] for scores in random_results):.1f}" for kind in random_results[0]]
        table.add_row("random, mean", "", *means, "")
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
