"""`shortv bench`: the options of each benchmark, checked before the libraries that measure are imported."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from shortv_llava.benchmarks.sizes import SHAPES, check_layers_of, find_shape, scaled
from shortv_llava.commands import loading, takes
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.methods import Method, parse_methods
from shortv_llava.evaluation.scoring import check_metric
from shortv_llava.files.outputs import check_writable
from shortv_llava.flops import TEXT_TOKENS

app = typer.Typer(
    help="Measure speed and memory on random weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

NAMES = ", ".join(SHAPES)
LIBRARIES = "torch and transformers"  # shown while they are imported

Width = Annotated[int, typer.Option(min=64, help="Hidden size of the language model, a multiple of 64.")]
NumLayers = Annotated[int, typer.Option(min=1, help="Layers of the language model.")]
TextTokens = Annotated[int, typer.Option(min=1, help="Text tokens of a prompt.")]
ImageSide = Annotated[int, typer.Option(min=1, help="Side of a picture in visual tokens; 24 make 576 of them.")]
Fraction = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the layers that is replaced, from the last layer on.")
]
Pairs = Annotated[int, typer.Option(min=1, help="Timed pairs of runs, one of each side; their median is printed.")]


def _numbers(option: str, given: str, least: int) -> list[int]:
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        raise ShortVError(f"{option} {given}: give numbers separated by commas") from None
    if min(numbers) < least:
        raise ShortVError(f"{option} {given}: numbers start at {least}")
    return numbers


def _check_prefill(
    model: list[str] | None, numbers: Sequence[int], methods: Sequence[Method], cuda_graphs: bool
) -> None:
    # The default models are known only after importing torch. The deepest shape accepts whatever any of them does.
    check_layers_of(model or [max(SHAPES, key=lambda name: SHAPES[name].num_layers)], numbers, methods)
    if cuda_graphs and any(found.dropping for found in methods):
        raise ShortVError("--cuda-graphs: which tokens a method drops is only known in the pass; leave one of both out")


def _check_vllm() -> None:
    if find_spec("vllm") is None:
        raise ShortVError("this benchmark needs vLLM, in its own environment: pip install vllm")


@dataclass(frozen=True)
class PrefillOptions:
    """The options of `shortv bench prefill`."""

    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Shape of the model: {NAMES}. Repeat it for several. Default: the first two, on a GPU the next four."
        ),
    ] = None
    layers: Annotated[
        str | None, typer.Option(help="Numbers of replaced layers, as `8,16,19`; the paper's by default.")
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            help="Ways to save visual tokens, as of `shortv evaluate`: `shortv,fastv:2:0.5,vtw:16`. FastV and VTW drop "
            "them here."
        ),
    ] = None
    attention: Annotated[str, typer.Option(help="Attention implementations of transformers, as `sdpa,eager`.")] = "sdpa"
    batch: Annotated[str, typer.Option(help="Batch sizes, as `1,4,16`.")] = "1"
    text_tokens: TextTokens = TEXT_TOKENS
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs", help="Time both models as CUDA graphs too, without the host that starts kernels."
        ),
    ] = False
    fused_norms: Annotated[
        bool, typer.Option("--fused-norms", help="Run each norm as one kernel in both models, as `use_kernels=True`.")
    ] = False
    correction_rank: Annotated[
        int, typer.Option(min=0, help="Rank of the corrections of frozen tokens; 0 for none.")
    ] = 0
    pairs: Pairs = 11
    output: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for prefill.json and prefill.png.")] = (
        None
    )


@app.command()
@takes(PrefillOptions)
def prefill(options: PrefillOptions) -> None:
    """Prefill against the stock model: seconds and memory.

    It tells what share of the speed-up that the FLOPs allow is reached.

    Without a GPU the models are 1024 wide, in float32. With one they have the four published models' shapes, in
    bfloat16. Weights are random.

    Examples:

        shortv bench prefill

        shortv bench prefill --model llava-next-13b --layers 24 --batch 1,4,16

        shortv bench prefill --model llava-1.5-7b --method shortv,fastv:2:0.5
    """
    numbers = None if options.layers is None else _numbers("--layers", options.layers, 0)
    batches = _numbers("--batch", options.batch, 1)
    methods = [] if options.method is None else parse_methods(options.method)
    _check_prefill(options.model, numbers or (), methods, options.cuda_graphs)

    with loading(LIBRARIES):
        from shortv_llava.benchmarks.prefill import run

    names = "text_tokens", "cuda_graphs", "fused_norms", "correction_rank", "pairs", "output"
    given = {name: getattr(options, name) for name in names}
    run(options.model, numbers, methods, options.attention.split(","), batches, **given)


@app.command()
def methods(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Package with scores of all layers.")],
    questions: Annotated[Path, typer.Option(exists=True, help="Questions with answers, in LLaVA's JSONL.")],
    images: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of the pictures they name.")],
    corrected: Annotated[
        list[Path],
        typer.Option(
            exists=True, file_okay=False, help="Package with corrections for its layers. Repeat it for several."
        ),
    ] = [],  # noqa: B006
    metric: Annotated[str, typer.Option(help="What scores the answers, as of `shortv evaluate`.")] = "gqa",
    ratio: Annotated[
        list[float],
        typer.Option(min=0, max=1, help="FLOPs of a prefill, relative to the dense model. Repeat it for several."),
    ] = [0.75, 0.55, 0.45],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that run at once.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the model, as in torch: `float32`, `bfloat16`.")] = "float32",
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for answers.")] = Path("methods"),
) -> None:
    """Ways to save visual tokens, at equal FLOPs.

    ShortV plain and corrected, FastV, VTW, ShortV with FastV, and random layers answer the same questions. Where a
    method cannot come down to a ratio its row is missing. Interrupted, the same command continues.

    Example:

        shortv bench methods all --corrected best --questions q.jsonl --images i
    """
    check_metric(metric)
    check_writable(output)
    with loading(LIBRARIES):
        from shortv_llava.benchmarks.methods import run

    settings = {"dtype": dtype, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    run(model, corrected, questions, images, metric, ratio, **settings, output=output)


@app.command()
def decoding(
    model: Annotated[str, typer.Option(help=f"Shape of the model: {NAMES}.")] = "scaled",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that each model decodes, one by one.")] = 200,
    compile: Annotated[bool, typer.Option("--compile", help="Time a static cache with torch.compile too.")] = False,
) -> None:
    """Seconds of a decoded token against the stock model.

    The cache grows or is static; 60% of the layers are replaced.

    Example:

        shortv bench decoding --compile
    """
    find_shape(model)
    with loading(LIBRARIES):
        from shortv_llava.benchmarks.decoding import run

    run(model, tokens, compile)


@app.command()
def calibration(
    width: Width = 1024,
    num_layers: NumLayers = 16,
    text_tokens: TextTokens = TEXT_TOKENS,
    image_side: ImageSide = 24,
    pairs: Pairs = 3,
) -> None:
    """Seconds of LC scores, with shared work and without.

    Without, each layer's score of the one sample takes a full pass.

    Example:

        shortv bench calibration
    """
    shape = scaled(width, num_layers, image_side)
    with loading(LIBRARIES):
        from shortv_llava.benchmarks.calibration import run

    run(shape, text_tokens, pairs)


@app.command()
def shared_prefix(
    questions: Annotated[int, typer.Option(min=1, help="Questions about the one picture.")] = 32,
    width: Width = 1024,
    num_layers: NumLayers = 16,
    image_side: ImageSide = 24,
    fraction: Fraction = 0.6,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that run at once.")] = 16,
    pairs: Pairs = 3,
) -> None:
    """Seconds of answers, with a shared prefix and without.

    The picture is prefilled once, or anew for each question about it.

    Example:

        shortv bench shared-prefix --questions 8
    """
    shape = scaled(width, num_layers, image_side)
    with loading(LIBRARIES):
        from shortv_llava.benchmarks.shared_prefix import run

    run(shape, questions, fraction, new_tokens, batch_size, pairs)


@app.command()
def turns(
    width: Width = 1024,
    num_layers: NumLayers = 16,
    image_side: ImageSide = 24,
    fraction: Fraction = 0.6,
    conversations: Annotated[int, typer.Option(min=1, help="Timed conversations; their median is printed.")] = 5,
) -> None:
    """Seconds to the first token of a chat's two turns.

    They are measured dense and with replaced layers.

    Example:

        shortv bench turns
    """
    shape = scaled(width, num_layers, image_side)
    with loading(LIBRARIES):
        from shortv_llava.benchmarks.turns import run

    run(shape, fraction, conversations)


@app.command()
def conversion(
    hidden: Annotated[
        int, typer.Option(min=128, help="Hidden size of the language model; with the next three, a 7B's.")
    ] = 4096,
    intermediate: Annotated[int, typer.Option(min=1, help="Width of its FFN.")] = 11008,
    layers: Annotated[int, typer.Option(min=1, help="Its layers.")] = 32,
    vocabulary: Annotated[int, typer.Option(min=1, help="Its vocabulary.")] = 32000,
    first_shard: Annotated[
        float, typer.Option(min=0, help="Size of the first weight file, in GB; the second has the rest.")
    ] = 10.0,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA, on all linear layers, in float32.")] = 128,
    folder: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder with room for the weights twice; the system's for temporary files.",
        ),
    ] = None,
) -> None:
    """Peak memory of the conversion and of merging a LoRA.

    The checkpoint is in the original LLaVA layout. The largest weight file is told beside, for comparison.

    Example:

        shortv bench conversion --layers 4 --first-shard 1
    """
    if hidden % 128:
        raise ShortVError(f"--hidden {hidden}: give a multiple of 128, the size of a head")
    if not Path("/proc/self/status").exists():
        raise ShortVError("the peak memory of a process is read from /proc, which this system has not")
    with loading(LIBRARIES):
        from shortv_llava.benchmarks.conversion import run

    run(hidden, intermediate, layers, vocabulary, first_shard, rank, folder)


@app.command()
def correction_fit(
    model: Annotated[str, typer.Option(help=f"Shape that is measured: {NAMES}.")] = "scaled",
    wanted: Annotated[str, typer.Option("--for", help="Shape that is worked out, another of these.")] = "llava-1.5-7b",
    layers: Annotated[float, typer.Option(min=0, max=1, help="Share of the layers that is replaced.")] = 0.8,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the corrections.")] = 64,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures that are measured.")] = 8,
    samples: Annotated[int, typer.Option(min=1, help="Pictures that are worked out.")] = 200,
    text_tokens: TextTokens = TEXT_TOKENS,
    device: Annotated[str, typer.Option(help="Where it runs, as in torch: `cpu`, `cuda`.")] = "cpu",
) -> None:
    """Seconds and memory of fitting corrections.

    A fit on random weights in float32 is measured, and what one of another shape takes at that rate is worked out.

    Example:

        shortv bench correction-fit --for llava-next-7b
    """
    for name in (model, wanted):
        find_shape(name)
    with loading(LIBRARIES):
        from shortv_llava.benchmarks.correction_fit import run

    run(model, wanted, layers, rank, pictures, samples, text_tokens, device)


@app.command()
def vllm_prefill(
    width: Width = 1024,
    num_layers: NumLayers = 16,
    text_tokens: TextTokens = TEXT_TOKENS,
    image_side: ImageSide = 24,
    fraction: Fraction = 0.6,
    pairs: Pairs = 7,
    batch: Annotated[int, typer.Option(min=1, help="Requests at once, prefilled in one step.")] = 4,
    eager: Annotated[bool, typer.Option("--eager", help="Leave both engines uncompiled.")] = False,
) -> None:
    """Prefill in vLLM against its stock LLaVA.

    It tells prefilled tokens a second.

    Example:

        shortv bench vllm-prefill --eager
    """
    shape = scaled(width, num_layers, image_side)
    _check_vllm()
    with loading("vLLM"):
        from shortv_llava.benchmarks.vllm_prefill import run

    run(shape, text_tokens, fraction, pairs, batch, eager)


@app.command()
def vllm_load(
    width: Width = 1024,
    num_layers: NumLayers = 16,
    image_side: ImageSide = 24,
    fraction: Fraction = 0.6,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a round.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that each server gets, in turns.")] = 2,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 4,
    log: Annotated[Path, typer.Option(dir_okay=False, help="File for what servers and client say.")] = Path(os.devnull),
) -> None:
    """vLLM's server under load, against its stock LLaVA.

    It tells requests a second and the time to the first token.

    Example:

        shortv bench vllm-load --concurrency 8 --log servers.log
    """
    shape = scaled(width, num_layers, image_side)
    _check_vllm()
    with loading("vLLM"):
        from shortv_llava.benchmarks.vllm_load import run

    run(shape, fraction, requests, rounds, concurrency, log)


@app.command()
def faults(
    kills: Annotated[int, typer.Option(min=0, help="Kills of each command at random moments.")] = 50,
    at_end: Annotated[int, typer.Option(min=0, help="Kills of each command near its end.")] = 20,
    weights: Annotated[int, typer.Option(min=0, help="Weight files that are tampered with.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random moments and changes.")] = 0,
) -> None:
    """Commit faults, and count what they cost.

    It tells what is lost, half-written or ends in a traceback.

    Example:

        shortv bench faults --kills 5 --at-end 2 --weights 8
    """
    from shortv_llava.benchmarks.faults import run

    run(kills, at_end, weights, seed)
