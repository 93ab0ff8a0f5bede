"""Many questions about one picture, prefilled once or for each: `python -m shortv_llava.benchmarks.shared_prefix`.

Random weights answer with random tokens, so every answer is given the same number of them; GQA's are about two.
"""

import statistics
import time
from typing import Annotated

import typer
from PIL import Image

from shortv_llava.benchmarks.prefill import PATCH, make_pair
from shortv_llava.checkpoints import CHECKPOINT
from shortv_llava.evaluation.answering import Answerer
from shortv_llava.evaluation.questions import Question
from shortv_llava.flops import flops_ratio
from shortv_llava.package import load_processor
from shortv_llava.prompts import SHORT_ANSWER_PROMPT


def main(
    questions: Annotated[int, typer.Option(help="About the picture.")] = 32,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 1024,
    num_layers: int = 16,
    image_side: Annotated[int, typer.Option(help="Visual tokens are its square.")] = 24,
    fraction: Annotated[float, typer.Option(help="Of the layers, from the last on, are replaced.")] = 0.6,
    new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 2,
    batch_size: int = 16,
    pairs: int = 3,
) -> None:
    """Compare the time of all answers."""
    _, model = make_pair(width, num_layers, image_side)
    processor = load_processor(CHECKPOINT)
    side = image_side * PATCH
    processor.patch_size = PATCH
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    model.config.image_token_id = processor.image_token_id
    picture = Image.effect_noise((side, side), 64).convert("RGB")
    asked = [
        Question(number, f"How many objects are left of number {number}?\n{SHORT_ANSWER_PROMPT}", (picture,), "picture")
        for number in range(questions)
    ]

    def timed(shared_prefix: bool) -> float:
        answerer = Answerer(model, processor, batch_size, new_tokens, shared_prefix)
        answerer.generation["min_new_tokens"] = new_tokens
        start = time.perf_counter()
        for batch in answerer.batches(asked):
            answerer.answer(batch)
        return time.perf_counter() - start

    for layers in ([], list(range(num_layers))[num_layers - round(fraction * num_layers) :]):
        model.set_replaced_layers(layers)
        times = [(timed(False), timed(True)) for _ in range(pairs)]
        print(
            f"{len(layers)} of {num_layers} layers replaced (FLOPs {flops_ratio(model.config):.2f}), {questions} "
            f"questions: each prefilled {statistics.median(a for a, _ in times):.1f} s, shared "
            f"{statistics.median(b for _, b in times):.1f} s: {statistics.median(a / b for a, b in times):.2f}x"
        )


if __name__ == "__main__":
    typer.run(main)
