"""Commands of the example: `python -m shortv_llava.examples.smol_llava COMMAND`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from shortv_llava.errors import ShortVError
from shortv_llava.examples.smol_llava import scenes
from shortv_llava.examples.smol_llava.model import TRAINED

app = typer.Typer(no_args_is_help=True, add_completion=False)


TrainingDtype = Annotated[str, typer.Option("--dtype", help="`float32` where the processor has no bfloat16.")]


@app.command()
def train(
    work: Annotated[Path, typer.Option(help="For states; an interrupted run continues from them.")] = Path("training"),
    output: Annotated[Path, typer.Option(help="For what is trained and the log.")] = TRAINED,
    dtype: TrainingDtype = "bfloat16",
    seed: int = 0,
) -> None:
    """Train vision tower, projector and LoRA, then make the runs for comparison."""
    training(work, dtype, seed).run_all(output)


@app.command()
def train_numbers(
    work: Annotated[Path, typer.Option(help="For states; an interrupted run continues from them.")],
    output: Annotated[Path, typer.Option(help="For what is trained and the log.")],
    trained: Annotated[Path, typer.Option(help="Folder of what was trained, to continue from.")] = TRAINED,
    dtype: TrainingDtype = "bfloat16",
    seed: int = 0,
) -> None:
    """Train on, to read numbers that are written in the pictures."""
    training(work, dtype, seed, scenes.NUMBERS).read_numbers(trained, output)


@app.command()
def build(
    output: Annotated[Path, typer.Argument(help="The checkpoint folder to make.")],
    trained: Annotated[Path, typer.Option(help="Folder of what was trained.")] = TRAINED,
) -> None:
    """Assemble the LLaVA checkpoint from the language model's package and what was trained."""
    from shortv_llava.examples.smol_llava.language_model import load_language_model
    from shortv_llava.examples.smol_llava.model import build as assemble

    assemble(output, *load_language_model(), trained)


@app.command()
def questions(
    folder: Annotated[Path, typer.Argument(help="For questions.jsonl and images/.")],
    pictures: int = 250,
    number: Annotated[int, typer.Option("--questions", help="About each picture.")] = 8,
    seed: str = "held-out",
) -> None:
    """Write questions never trained on, for `shortv calibrate --data` and `shortv evaluate --questions`."""
    from shortv_llava.examples.shapes_llava.shapes import write_questions

    write_questions(folder, scenes.held_out(pictures, number, seed), scenes.draw)


Folder = Annotated[Path, typer.Argument(help="The checkpoint folder that `build` made.")]
Work = Annotated[Path, typer.Option(help="For scores and orders, which tables share.")]
Dtype = Annotated[str, typer.Option(help="Of the model: `float32` or `bfloat16`.")]
Pictures = Annotated[int, typer.Option(help="Held-out ones, ten questions about each.")]
Number = Annotated[int, typer.Option(help="Of layers frozen.")]
WORK = Path("evidence")


@app.command()
def accuracy(folder: Folder, pictures: Pictures = 200, dtype: Dtype = "bfloat16", work: Work = WORK) -> None:
    """Accuracy of the dense model by kind of question."""
    evidence(folder, work, dtype, pictures).accuracy()


@app.command()
def text(folder: Folder, dtype: Dtype = "bfloat16", work: Work = WORK) -> None:
    """Text-only prompts, beside the language model as it came."""
    from shortv_llava.examples.smol_llava.language_model import load_language_model

    evidence(folder, work, dtype, 1).text(load_language_model()[0])


@app.command()
def curves(folder: Folder, dtype: Dtype = "bfloat16", work: Work = WORK) -> None:
    """Layer Contribution of every layer, visual and text."""
    evidence(folder, work, dtype, 1).curves()


@app.command()
def layers(
    folder: Folder,
    pictures: Pictures = 25,
    dtype: Dtype = "bfloat16",
    work: Work = WORK,
    strategy: Annotated[list[str], typer.Option(help="Beside random layers; several.")] = ["LC", "greedy", "cosine"],  # noqa: B006
) -> None:
    """Numbers of layers frozen, chosen by LC, greedily, by cosine and at random."""
    evidence(folder, work, dtype, pictures).layers(strategy)


@app.command()
def corrections(
    folder: Folder,
    pictures: Pictures = 40,
    dtype: Dtype = "float32",
    work: Work = WORK,
    strategy: Annotated[list[str], typer.Option(help="Several.")] = ["LC", "corrected LC"],  # noqa: B006
    number: Annotated[list[int], typer.Option(help="Of layers frozen; several.")] = [6, 12, 18, 24, 27, 28, 30],  # noqa: B006
    rank: Annotated[list[int], typer.Option(help="Several; 0 for none.")] = [0, 8, 16, 64, 256, 576],  # noqa: B006
) -> None:
    """Numbers of layers frozen, plain and corrected. What is found is kept; the command continues and repeats."""
    evidence(folder, work, dtype, pictures).corrections(strategy, number, rank)


@app.command()
def fits(
    folder: Folder,
    pictures: Pictures = 10,
    dtype: Dtype = "float32",
    work: Work = WORK,
    number: Number = 24,
    rank: int = 64,
    photographs: Annotated[Path | None, typer.Option(help="Folder of pictures to fit on, too.")] = None,
) -> None:
    """Ways to fit the corrections of one choice of layers."""
    evidence(folder, work, dtype, pictures).fits(number, rank, photographs)


@app.command()
def corrected_blocks(
    folder: Folder, pictures: Pictures = 40, dtype: Dtype = "float32", work: Work = WORK, rank: int = 64
) -> None:
    """FFNs frozen alone, plain and corrected."""
    evidence(folder, work, dtype, pictures).corrected_blocks(rank)


@app.command()
def kinds(
    folder: Folder,
    pictures: Pictures = 100,
    dtype: Dtype = "float32",
    work: Work = WORK,
    number: Number = 24,
    rank: int = 64,
    numbers: Annotated[bool, typer.Option(help="Written in the pictures; for what `train-numbers` trained.")] = False,
) -> None:
    """Kinds of question apart: what corrections mend."""
    evidence(folder, work, dtype, pictures, scenes.NUMBERS * numbers).kinds(number, rank)


@app.command()
def blocks(
    folder: Folder,
    pictures: Pictures = 25,
    dtype: Dtype = "bfloat16",
    work: Work = WORK,
    strategy: Annotated[list[str], typer.Option(help="Several.")] = ["LC", "greedy"],  # noqa: B006
    pairs: Annotated[int, typer.Option(help="Prefills timed of each model.")] = 7,
) -> None:
    """Whole layers against blocks at equal FLOPs."""
    evidence(folder, work, dtype, pictures).blocks(strategy, pairs)


@app.command()
def tokens(folder: Folder, pictures: Pictures = 25, dtype: Dtype = "bfloat16", work: Work = WORK) -> None:
    """Freezing text, all, or as many random tokens instead."""
    evidence(folder, work, dtype, pictures).tokens()


@app.command()
def calibration(folder: Folder, pictures: Pictures = 25, dtype: Dtype = "bfloat16", work: Work = WORK) -> None:
    """Calibration with few and with many samples."""
    evidence(folder, work, dtype, pictures).calibration()


@app.command()
def ingredients(
    folder: Folder,
    pictures: Pictures = 25,
    dtype: Dtype = "bfloat16",
    work: Work = WORK,
    scale: Annotated[list[int], typer.Option(help="Of the projected tokens; several.")] = [1, 4],  # noqa: B006
) -> None:
    """Layer Contribution with tokens of other norms, and with poor and rich pictures."""
    evidence(folder, work, dtype, pictures).ingredients(scale)


@app.command()
def log(trained: Annotated[Path, typer.Option(help="Folder of what was trained.")] = TRAINED) -> None:
    """Layer Contribution and accuracy along the training."""
    from shortv_llava.examples.smol_llava.evidence import print_log

    print_log(trained / "training.jsonl")


def training(work: Path, dtype: str, seed: int, numbers: int = 0):
    import torch

    from shortv_llava.examples.smol_llava.language_model import load_language_model
    from shortv_llava.examples.smol_llava.train import Training

    torch.manual_seed(seed)
    language_model, tokenizer = load_language_model()
    return Training(work, language_model.to(getattr(torch, dtype)), tokenizer, numbers)


def evidence(folder: Path, work: Path, dtype: str, pictures: int, numbers: int = 0):
    import torch
    from transformers.utils import logging

    from shortv_llava.examples.smol_llava.evidence import Evidence

    logging.disable_progress_bar()
    torch.manual_seed(0)
    return Evidence(folder, work, dtype, pictures, numbers=numbers)


def main() -> None:
    """Run a command; a failure that the user can mend is one line."""
    try:
        app()
    except ShortVError as error:
        typer.echo(f"smol_llava: error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
