"""The `shortv` command."""

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the package that the output folder holds.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.")]


@app.callback()
def options(verbose: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    """Publish and run ShortV vision-language models: LLaVA with visual tokens frozen in ineffective layers."""


@app.command()
def package(
    base: Annotated[str, typer.Argument(help="LLaVA checkpoint: a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="The package folder to make.")],
    layers: Annotated[
        str, typer.Option(help="`published`, `published:NAME`, `none`, or ids separated by commas, as `31,29,30`.")
    ] = "published",
    overwrite: Overwrite = False,
) -> None:
    """Make a package folder from a checkpoint and layers that are known already.

    Examples:

        shortv package llava-hf/llava-1.5-7b-hf --output llava-1.5-7b-shortv

        shortv package ./my-finetune --layers published:llava-1.5-7b --output my-finetune-shortv
    """
    from shortv_llava.package import check_output, find_checkpoint, parse_layers, write_package

    replaced_layers = parse_layers(layers, base)
    check_output(output, overwrite)
    write_package(find_checkpoint(base), output, overwrite, replaced_layers=replaced_layers)
    typer.echo(f"wrote {output}: {len(replaced_layers)} layers replaced {replaced_layers}")


@app.command()
def calibrate(
    base: Annotated[str, typer.Argument(help="LLaVA checkpoint: a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="The package folder to make.")],
    data: Annotated[str, typer.Option(help="`shapes` (embedded), or a file of questions in LLaVA's JSONL.")] = "shapes",
    images: Annotated[Optional[Path], typer.Option(help="Folder of the images that the questions name.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to draw.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    num_layers: Annotated[
        Optional[int], typer.Option(min=0, help="Layers to replace; about 60 percent if not given.")
    ] = None,
    direction: Annotated[
        str, typer.Option(help="`release`: KL(variant || model), as published layers were found; `paper`: the reverse.")
    ] = "release",
    dtype: Dtype = "auto",
    device_map: Annotated[Optional[str], typer.Option(help="As in transformers, for example `auto`.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compute LC scores and make the package that replaces the layers of lowest score.

    Examples:

        shortv calibrate llava-hf/llava-1.5-7b-hf --data questions.jsonl --images images --output llava-1.5-7b-shortv

        shortv calibrate ./my-finetune --num-layers 16 --output my-finetune-shortv
    """
    from shortv_llava.calibrate.samples import EMBEDDED, draw, embedded_samples, read_questions
    from shortv_llava.package import check_output, find_checkpoint, read_config

    if direction not in ("release", "paper"):
        raise typer.BadParameter(f"release or paper, not {direction!r}", param_hint="--direction")
    if (data == EMBEDDED) == (images is not None):
        raise typer.BadParameter("give --images DIR with a file of questions, and with that alone", param_hint="--data")
    check_output(output, overwrite)
    drawn = draw(embedded_samples() if data == EMBEDDED else read_questions(Path(data), images), samples, seed)
    folder = find_checkpoint(base)
    total = read_config(folder).get("text_config", {}).get("num_hidden_layers", 32)  # Llama's default is left out of files
    if num_layers is not None and num_layers > total:
        raise typer.BadParameter(f"the model has {total} layers", param_hint="--num-layers")

    from rich.console import Console

    from shortv_llava.calibrate.report import score_table
    from shortv_llava.calibrate.run import calibrate as run
    from shortv_llava.package import load_model, load_processor

    processor = load_processor(folder)
    model = load_model(folder, dtype=dtype, device_map=device_map)
    result = run(folder, model, processor, drawn, output, data, seed, num_layers, direction, overwrite)
    Console().print(score_table(result.lc_scores, result.replaced_layers))
    typer.echo(f"wrote {output}: {len(result.replaced_layers)} layers replaced {result.replaced_layers}")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Package or LLaVA checkpoint: a folder or a Hub id.")],
    image: Annotated[
        Optional[list[str]], typer.Option(help="File or URL for the first question; once for each image.")
    ] = None,
    system: Annotated[
        Optional[str], typer.Option(help="System sentence; if not given the model's own, such as Vicuna's.")
    ] = None,
    replaced_layers: Annotated[
        Optional[str],
        typer.Option(
            help="Layers to replace instead of the package's own: ids as `31,29,30`, `none`, `published` or "
            "`published:NAME`. Without this option a plain checkpoint takes those of the environment variable "
            "REPLACED_LAYERS."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this total.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    seed: Annotated[Optional[int], typer.Option(help="Of the sampling.")] = None,
    dtype: Dtype = "auto",
    device_map: Annotated[str, typer.Option(help="As in transformers: `auto`, `cpu`, `cuda:1`.")] = "auto",
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Needs bitsandbytes.")] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Needs bitsandbytes.")] = False,
) -> None:
    """Talk with a model about images. Lines from a pipe are answered one by one.

    Examples:

        shortv chat llava-1.5-7b-shortv --image photo.jpg

        REPLACED_LAYERS=31,29,30 shortv chat llava-hf/llava-1.5-7b-hf --load-in-4bit

        echo "What is this?" | shortv chat llava-1.5-7b-shortv --image https://llava-vl.github.io/static/images/view.jpg
    """
    if load_in_4bit and load_in_8bit:
        raise typer.BadParameter("4 or 8 bit, not both", param_hint="--load-in-4bit")

    from shortv_llava.chat import Conversation, Terminal, load
    from shortv_llava.images import load_image

    images = [(load_image(source), source) for source in image or ()]
    loaded = load(model, replaced_layers, dtype, device_map, load_in_4bit, load_in_8bit)
    conversation = Conversation(loaded.model, loaded.processor, system, max_new_tokens, temperature, top_p, seed)
    for picture, source in images:
        conversation.attach(picture, source)
    Terminal(conversation, model, loaded.package_layers).run()


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The package folder to make.")] = Path("demo-output"),
) -> None:
    """The whole way on the embedded checkpoint: calibrate, package, load, answer, measure.

    Example:

        shortv demo
    """
    from shortv_llava.demo import run

    run(output)


def main(*command: str) -> None:
    """Run the command line; every failure a user can cause is one line and exit code 1."""
    verbose = "--verbose" in sys.argv
    arguments = [*command, *(argument for argument in sys.argv[1:] if argument != "--verbose")]
    try:
        app(args=arguments, prog_name="shortv")
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; nothing was written"))
    except Exception as error:
        if verbose:
            raise
        sys.exit(_fail(str(error).strip() or type(error).__name__))


def _fail(message: str) -> int:
    typer.echo(f"shortv: error: {' '.join(message.split())}", err=True)
    return 1


if __name__ == "__main__":
    main()
