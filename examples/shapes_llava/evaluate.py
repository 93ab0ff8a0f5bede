"""Effect of ShortV on the embedded checkpoint: `python -m shortv_llava.examples.shapes_llava.evaluate`.

Every strategy chooses layers and blocks on the embedded samples. 40, 60 and 80 percent of the layers are frozen
(blocks: at the same FLOPs). Divergence, agreement and accuracy are measured on questions not used in training.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from shortv_llava.calibrate.contribution import contributions, cosine_distance
from shortv_llava.calibrate.cost import CostMeter
from shortv_llava.calibrate.samples import Sample, draw, embedded_samples, make_inputs
from shortv_llava.calibrate.selection import Units, number_of_layers
from shortv_llava.chat.prompts import CAPTION_PROMPT, make_prompt
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.examples.shapes_llava import CHECKPOINT, shapes

BATCH = 50
FRACTIONS = (0.4, 0.6, 0.8)


class Frozen(NamedTuple):
    """A choice to evaluate."""

    name: str
    lists: dict[str, list[int]]  # as in the configuration
    flops_ratio: float


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
    """Exact-match percentages for each kind of question, and for all questions as `all`."""
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


def choices(model, processor, fractions: Sequence[float], seeds: int) -> Iterator[Frozen]:
    """The dense model, then every strategy at every fraction of the layers."""
    samples = draw(embedded_samples(), 20, seed=0)
    inputs = make_inputs(processor, samples)
    meter = CostMeter(model, processor, samples)
    layers, blocks = (Units(model.config, granularity) for granularity in ("layer", "block"))

    def greedy(units: Units) -> list[int]:
        with tqdm(total=len(units) * (len(units) + 1) // 2, desc=f"greedy, {units.granularity}s") as bar:

            def divergence(candidate: tuple[int, ...]) -> float:
                bar.update()
                return meter.measure(units.frozen(candidate)).kl

            return units.order_greedily(divergence)

    lc = {
        u.granularity: contributions(model, inputs, granularity=u.granularity)[0].mean(0).tolist()
        for u in (layers, blocks)
    }
    orders = [
        ("layers by LC", layers, layers.order_by(lc["layer"])),
        ("layers, greedily", layers, greedy(layers)),
        ("layers by cosine", layers, layers.order_by(cosine_distance(model, inputs).tolist())),
        ("blocks by LC", blocks, blocks.order_by(lc["block"])),
        ("blocks, greedily", blocks, greedy(blocks)),
    ]
    orders += [(f"random layers, seed {seed}", layers, layers.order_at_random(seed)) for seed in range(seeds)]
    yield Frozen("dense", layers.frozen([]), 1.0)
    for fraction in fractions:
        target = layers.ratio_of_layers(number_of_layers(layers.num_layers, fraction))
        for name, units, order in orders:
            units_frozen = order[: units.reaching(order, target)]
            yield Frozen(f"{fraction:.0%} {name}", units.frozen(units_frozen), units.ratio(units_frozen))


def main(
    questions: Annotated[int, typer.Option(help="Held-out questions with a short answer.")] = 1000,
    captions: Annotated[int, typer.Option(help="Held-out captions.")] = 100,
    seeds: Annotated[int, typer.Option(help="Random choices of layers.")] = 5,
    fraction: Annotated[list[float], typer.Option(help="Of the layers to freeze; several.")] = list(FRACTIONS),  # noqa: B006,B008
) -> None:
    """Print the table of docs/evidence.md."""
    model, processor = load_model(CHECKPOINT, dtype=torch.float32), load_processor(CHECKPOINT)
    asked = shapes.held_out(questions)
    scenes = [scene for scene, _ in shapes.held_out(captions, seed="held-out captions")]
    prompts = [Sample(str(i), shapes.draw(scene), q.text, q.answer) for i, (scene, q) in enumerate(asked[:200])]
    meter = CostMeter(model, processor, prompts)

    columns = ("FLOPs ratio", "KL", "agreement", *shapes.KINDS, "all", "captions")
    table = Table("frozen", *columns, box=box.MARKDOWN)
    at_random = {share: [] for share in fraction}
    for choice in tqdm(list(choices(model, processor, fraction, seeds)), desc="choices"):
        cost = meter.measure(choice.lists)
        model.set_replaced_layers(*choice.lists.values())
        scores = accuracy(model, processor, asked) | {"captions": caption_accuracy(model, processor, scenes)}
        row = [choice.flops_ratio, cost.kl, 100 * cost.agreement, *scores.values()]
        if "random" in choice.name:
            rows = next(rows for share, rows in at_random.items() if choice.name.startswith(f"{share:.0%}"))
            rows.append(row)
            if len(rows) < seeds:
                continue
            row = [statistics.mean(column) for column in zip(*rows)]
            spread = statistics.stdev(row[-2] for row in rows) if seeds > 1 else 0
            choice = choice._replace(name=f"{choice.name.split(',')[0]}, mean of {seeds} (all: ± {spread:.1f})")
        table.add_row(choice.name, f"{row[0]:.2f}", f"{row[1]:.3f}", *(f"{value:.1f}" for value in row[2:]))
    Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
