"""On the embedded checkpoint: `shortv calibrate` with corrections, loading by transformers alone, answers, speed."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from shortv_llava.benchmarks.models import make_pair
from shortv_llava.benchmarks.prefill import Setting, Variant, measure
from shortv_llava.benchmarks.sizes import SHAPES
from shortv_llava.calibrate import command
from shortv_llava.calibrate.command import MAX_RANK, CalibrationOptions, draw_samples
from shortv_llava.calibrate.selection import number_of_layers
from shortv_llava.chat.images import open_image
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.flops import flops_ratio

FRACTION = 0.8  # of the layers, with corrections
NUM_QUESTIONS = 6


def run(output: Path) -> None:
    """Make the package `output`, replacing an existing one, and show what it does."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = Console()
    given = {"data": ["shapes"], "samples": 40, "held_out": 20, "fraction": FRACTION, "dtype": "float32"}
    options = CalibrationOptions(str(CHECKPOINT), output, **given, overwrite=True)
    command.run(options)
    print()

    # From here on only the folder and transformers are used.
    trust = {"trust_remote_code": True, "dtype": torch.float32}
    shortv = AutoModelForImageTextToText.from_pretrained(output, **trust)
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    ask = pipeline("image-text-to-text", model=shortv, processor=processor)
    dense = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    ask_dense = pipeline("image-text-to-text", model=dense, processor=processor)

    table = Table(title="Answers", title_justify="left")
    for column in ("image", "question", "dense", "ShortV", "right"):
        table.add_column(column)
    for sample in draw_samples(options, fits=False).held_out[:NUM_QUESTIONS]:
        content = [{"type": "image", "image": open_image(sample.image)}, {"type": "text", "text": sample.question}]
        answers = [
            one(
                text=[{"role": "user", "content": content}],
                max_new_tokens=16,
                return_full_text=False,
                generate_kwargs={"do_sample": False},
            )[0]["generated_text"].strip()
            for one in (ask_dense, ask)
        ]
        table.add_row(sample.image.name, sample.question, *answers, sample.answer)
    console.print(table)

    console.print(
        f"FLOPs of a prefill with 64 text tokens and one image: {flops_ratio(shortv.config):.0%} of the dense model's"
    )
    console.print("prefill measured on two models with random weights, 16 layers of width 1024, 576 + 64 tokens:")
    shape, number = SHAPES["scaled"], number_of_layers(SHAPES["scaled"].num_layers, FRACTION)
    setting = Setting("scaled", correction_rank=MAX_RANK, pairs=3)
    variant = Variant((shape.layers(number), [], []))
    found = measure(*make_pair(shape, correction_rank=MAX_RANK), setting, variant, memory=False)
    speed = found["language_model"]
    console.print(
        f"{number} of {shape.num_layers} layers replaced and corrected: "
        f"{speed['stock']:.2f} s -> {speed['ours']:.2f} s, {speed['ratio']:.2f}x "
        f"(the FLOPs allow {found['bound']:.2f}x)"
    )
