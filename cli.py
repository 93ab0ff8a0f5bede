"""The `shortv` command."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn, get_args

import typer

from shortv_llava.calibrate import Direction, Granularity, Strategy, Tokens

# Without Rich's tables, which cut names and texts at 80 columns.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the package that the output folder holds.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Precision of the weights; `auto` for the checkpoint's own."),
]
AspectRatio = Literal["pad", "base"]
Output = Annotated[Path, typer.Option(help="Package folder to make.")]
Temperature = Annotated[
    float, typer.Option(min=0, help="Temperature of the sampling; 0 takes the likeliest token each time.")
]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens that make up this probability.")
]
DEVICE_MAP = "Where the model goes, as in transformers: `auto`, `cpu`, `cuda:1`."
In4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="Load the weights in 4 bit, by bitsandbytes.")]
In8Bit = Annotated[bool, typer.Option("--load-in-8bit", help="Load the weights in 8 bit, by bitsandbytes.")]
BaseModel = Annotated[
    str | None, typer.Option(help="Hub id of the base, for the model card; for a base that is a local folder.")
]
License = Annotated[
    str | None, typer.Option(help="Licence of the weights, as `llama2`, for a base that does not tell it.")
]
VisionTower = Annotated[
    str | None,
    typer.Option(
        help="Vision tower of an original LLaVA checkpoint, a folder or Hub id; by default the one that its "
        "config.json names."
    ),
]
BaseWeights = Annotated[
    str | None,
    typer.Option(
        help="Base model of a LoRA adapter, a folder or Hub id; by default the one that its adapter_config.json names."
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        help="Chat template: a file, or one of LLaVA's prompt formats, as `vicuna_v1`; for a base that has none, or "
        "one that takes no pictures."
    ),
]
ShownAspectRatio = Annotated[
    AspectRatio,
    typer.Option(
        "--image-aspect-ratio",
        help="`pad`: pictures are padded to squares where the base's processor would crop them, as LLaVA-1.5 is tuned "
        "and evaluated; `base`: they are cropped.",
    ),
]
ReplacedLayers = Annotated[
    str | None,
    typer.Option(
        help="Layers to replace instead of the package's own: ids from 0, as `31,29,30`, `none`, `published` (the "
        "paper's for this model) or `published:NAME` (for another). By default a plain checkpoint takes those of the "
        "environment variable REPLACED_LAYERS."
    ),
]


def _show_version(asked_for: bool) -> None:
    if asked_for:
        typer.echo(f"shortv-llava {metadata.version('shortv-llava')}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Publish and run ShortV vision-language models: LLaVA with visual tokens frozen in ineffective layers."""


@app.command()
def package(
    base: Annotated[str, typer.Argument(help="LLaVA checkpoint: a folder or a Hub id.")],
    output: Output,
    layers: Annotated[
        str,
        typer.Option(
            help="Layers to replace: ids from 0, as `31,29,30`, `published` (the paper's for this model), "
            "`published:NAME` (for another) or `none`."
        ),
    ] = "published",
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Leave the weights out, to publish with `shortv push --weights-from`.")
    ] = False,
    base_model: BaseModel = None,
    license: License = None,
    vision_tower: VisionTower = None,
    base_weights: BaseWeights = None,
    chat_template: ChatTemplate = None,
    image_aspect_ratio: Annotated[
        AspectRatio,
        typer.Option(help="`pad`: the package pads pictures to squares as LLaVA-1.5; `base`: it does as its base."),
    ] = "base",
    overwrite: Overwrite = False,
) -> None:
    """Make a package folder from a checkpoint and known layers.

    A checkpoint in the original LLaVA layout is converted, and a LoRA adapter is merged, one weight file at a time.

    Examples:

        shortv package llava-hf/llava-1.5-7b-hf --output llava-1.5-7b-shortv

        shortv package ./tuned --layers published:llava-1.5-7b --output out

        shortv package liuhaotian/llava-v1.6-vicuna-7b --output my-shortv

        shortv package ./lora --base-weights lmsys/vicuna-7b-v1.5 --output lora
    """
    with loading(base):
        from shortv_llava.checkpoint.package import BY_HAND, check_output, write_package
        from shortv_llava.checkpoint.processors import read_template
        from shortv_llava.checkpoint.published import parse_layers
        from shortv_llava.checkpoint.source import check_name, fetch_checkpoint

        replaced_layers = parse_layers(layers, base)
        if chat_template is not None:
            read_template(chat_template)
        check_name(base)
        check_output(output, overwrite)
        import shortv_llava.modeling_shortv_llava  # noqa: F401, takes seconds

    write_package(
        fetch_checkpoint(base, weights=not no_weights),
        output,
        overwrite,
        weights=not no_weights,
        base_model=base_model,
        license=license,
        vision_tower=vision_tower,
        base_weights=base_weights,
        chat_template=chat_template,
        image_aspect_ratio=image_aspect_ratio,
        replaced_layers=replaced_layers,
        **BY_HAND,
    )
    number = f"{len(replaced_layers)} layer{'s' * (len(replaced_layers) != 1)}"
    typer.echo(f"wrote {output}: {number} replaced {replaced_layers}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Package folder.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, `owner/name`; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[
        str | None, typer.Option(help="First line of the commit message; by default it tells what is pushed.")
    ] = None,
    license: License = None,
    weights_from: Annotated[
        str | None,
        typer.Option(
            help="Repository to copy the weights from, on the Hub itself: `owner/name` or `owner/name@revision`."
        ),
    ] = None,
    tag: Annotated[
        str | None, typer.Option(help="New tag for this version, as `v1.0`, which the card's snippets load.")
    ] = None,
    collection: Annotated[
        str | None, typer.Option(help="Collection to put it into, `owner/title-0123456789abcdef`.")
    ] = None,
    space: Annotated[
        bool, typer.Option("--space", help="Publish the page of `shortv chat --web` too, as a Space of the same id.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
) -> None:
    """Check a package folder and publish it on the Hub.

    All changes are one commit. There is none where nothing has changed.

    Examples:

        shortv push my-shortv me/my-shortv --dry-run

        shortv push my-shortv me/my-shortv --weights-from me/my-base

        shortv push my-shortv me/my-shortv --tag v1.0 --space
    """
    if tag and create_pr:
        raise typer.BadParameter("a pull request gets none; leave out --create-pr", param_hint="--tag")
    if space and (revision or create_pr):
        raise typer.BadParameter("shows what main holds; leave out --revision and --create-pr", param_hint="--space")

    with loading(folder):
        from shortv_llava.hub.push import check_options, push_space
        from shortv_llava.hub.push import push as run

        where = {"revision": revision, "tag": tag, "collection": collection, "weights_from": weights_from}
        check_options(folder, repo_id, **where, dry_run=dry_run)
        import shortv_llava.modeling_shortv_llava  # noqa: F401, takes seconds

    pushed = run(
        folder,
        repo_id,
        **where,
        private=private,
        create_pr=create_pr,
        message=message,
        license=license,
        space=space,
        dry_run=dry_run,
    )
    _report(repo_id, pushed, dry_run, tag, collection)
    if space:
        options = {"private": private, "message": message, "collection": collection, "dry_run": dry_run}
        _report(f"spaces/{repo_id}", push_space(repo_id, **options), dry_run, None, collection)


def _check_bits(load_in_4bit: bool, load_in_8bit: bool) -> None:
    if load_in_4bit and load_in_8bit:
        raise typer.BadParameter("4 or 8 bit, not both", param_hint="--load-in-4bit")


@contextmanager
def loading(what: str | Path) -> Iterator[None]:
    """A spinner on standard error while options are checked and libraries imported; none where that is no terminal."""
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    settings = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with Live(Spinner("dots", f"loading {what} …"), console=Console(stderr=True), **settings):
        yield


def _report(name: str, pushed, dry_run: bool, tag: str | None, collection: str | None) -> None:
    from tqdm import tqdm

    for change in pushed.changes:
        typer.echo(f"{change.action:6} {tqdm.format_sizeof(change.size, 'B'):>8} {change.path}")
    if not pushed.changes:
        typer.echo(f"{name}: nothing has changed, so nothing was committed")
    else:
        typer.echo(f"{name}: nothing was changed, this was a dry run" if dry_run else f"committed: {pushed.url}")
    for done, what in (("tagged", tag), ("in the collection", collection)):
        if what:
            typer.echo(f"{'would be ' * dry_run}{done}: {what}")


@app.command()
def calibrate(
    base: Annotated[str, typer.Argument(help="LLaVA checkpoint: a folder or a Hub id.")],
    output: Output,
    data: Annotated[
        list[str],
        typer.Option(
            help="Source of samples: `gqa`, `flickr30k` (both from the Hub), `shapes` (embedded) or a file of "
            "questions in LLaVA's JSONL. Repeat it, or separate by commas, to mix several."
        ),
    ] = ["gqa", "flickr30k"],  # noqa: B006
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures that JSONL files name.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples from each source to choose layers with.")] = 20,
    held_out: Annotated[int, typer.Option(min=1, help="Further samples from each source to measure the cost on.")] = 10,
    draw: Annotated[
        Literal["random", "first"],
        typer.Option(help="Which samples are taken: `random`, as in the paper, or the `first` ones, as in its code."),
    ] = "random",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw, of random layers and of the bootstrap.")] = 0,
    tokens: Annotated[
        list[str],
        typer.Option(
            help="Tokens that are frozen for the scores: `visual`, `text` or `all`; of several the first chooses."
        ),
    ] = ["visual"],  # noqa: B006
    direction: Annotated[
        Direction,
        typer.Option(
            help="Direction of the KL divergence. `release`: KL(variant || model), as the published layers were found; "
            "`paper`: the reverse."
        ),
    ] = "release",
    strategy: Annotated[
        Strategy | None,
        typer.Option(
            help="How layers are chosen. `lc`: lowest LC; `corrected-lc`: lowest LC with a correction of the layer; "
            "`greedy`: what adds least divergence to what is frozen already; `cosine`: what turns visual tokens' "
            "states least; `random`. By default `corrected-lc`, without corrections `lc`."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Replace and correct these layers without scoring: ids, `published` or `published:NAME`."),
    ] = None,
    correction_rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rank of the linear maps that stand in for frozen updates; 0 for none, as in the paper. By default "
            "64, or an eighth of the hidden size if that is less.",
        ),
    ] = None,
    correction_samples: Annotated[
        int,
        typer.Option(min=1, help="Samples from each source to fit corrections on, none about a held-out picture."),
    ] = 200,
    granularity: Annotated[
        Literal[Granularity, "auto"],
        typer.Option(
            help="What is frozen as one: a whole `layer`, a `block` (attention or FFN alone), or the better of both "
            "(`auto`)."
        ),
    ] = "layer",
    num_layers: Annotated[int | None, typer.Option(help="Budget: number of layers to replace.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Budget: share of the layers to replace; 0.6 if no budget is given.")
    ] = None,
    flops_ratio: Annotated[
        float | None, typer.Option(help="Budget: share of the prefill's FLOPs that is left, as 0.5.")
    ] = None,
    max_divergence: Annotated[
        float | None, typer.Option(help="Budget: KL divergence on held-out samples to stay under, in nats.")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Variants that run at once, fewer in less memory; by default what fits.")
    ] = None,
    base_model: BaseModel = None,
    license: License = None,
    vision_tower: VisionTower = None,
    base_weights: BaseWeights = None,
    chat_template: ChatTemplate = None,
    image_aspect_ratio: ShownAspectRatio = "pad",
    dtype: Dtype = "auto",
    device_map: Annotated[
        str | None, typer.Option(help=f"{DEVICE_MAP} By default on one GPU, or the CPU if there is none.")
    ] = None,
    load_in_4bit: In4Bit = False,
    load_in_8bit: In8Bit = False,
    overwrite: Overwrite = False,
) -> None:
    """Find the layers to freeze, and make the package.

    Layers are scored by Layer Contribution (LC): the KL divergence of the next token when visual tokens are frozen in
    that layer alone. Those of lowest score are replaced, and corrections are fitted for them. Give one budget at most.
    The same command continues an interrupted run.

    For several GPUs: `accelerate launch -m shortv_llava.calibrate BASE …`

    Examples:

        shortv calibrate llava-hf/llava-1.5-7b-hf --output llava-1.5-7b-shortv

        shortv calibrate ./tuned --data mine.jsonl --images photos --output out

        shortv calibrate ./tuned --data shapes --fraction 0.8 --output out
    """
    with loading(base):
        from dataclasses import replace

        from shortv_llava.calibrate.samples import check_sources, fit_samples, load_samples
        from shortv_llava.calibrate.selection import Choice
        from shortv_llava.checkpoint.config import config_object, package_config, read_config
        from shortv_llava.checkpoint.loading import load_model
        from shortv_llava.checkpoint.package import check_output
        from shortv_llava.checkpoint.processors import load_processor, pads, read_template
        from shortv_llava.checkpoint.published import parse_layers
        from shortv_llava.checkpoint.source import check_name, find_checkpoint
        from shortv_llava.errors import ShortVError
        from shortv_llava.processes import leave_processes, own_device

        data, tokens = ([part for entry in entries for part in entry.split(",")] for entries in (data, tokens))
        for value in tokens:
            if value not in get_args(Tokens):
                raise typer.BadParameter(f"{' or '.join(get_args(Tokens))}, not {value!r}", param_hint="--tokens")
        _check_bits(load_in_4bit, load_in_8bit)
        given = None if layers is None else tuple(parse_layers(layers, base))
        budget = num_layers, fraction, flops_ratio, max_divergence
        rank = 1 if correction_rank is None else correction_rank  # for now: the default is the model's
        choice = Choice(strategy, granularity, *budget, seed, rank or None, given)
        choice.check()
        check_sources(data, images)
        if chat_template is not None:
            read_template(chat_template)
        check_name(base)
        check_output(output, overwrite)

        from accelerate import PartialState

        from shortv_llava.calibrate.run import calibrate as run

    folder = find_checkpoint(base, vision_tower, base_weights)
    entries = read_config(folder)
    text_config = config_object(entries).text_config
    rank = min(64, text_config.hidden_size // 8) if correction_rank is None else correction_rank
    package_config(entries, replaced_layers=list(given or ()))  # checks them before the long work
    choice = replace(choice, correction_rank=rank or None)
    choice.check(text_config.num_hidden_layers)
    draw_seed = None if draw == "first" else seed
    drawn = load_samples(data, images, samples + held_out, draw_seed)
    groups = [drawn[start : start + samples + held_out] for start in range(0, len(drawn), samples + held_out)]
    held_out_samples = [sample for group in groups for sample in group[samples:]]
    fit_on = fit_samples(data, images, correction_samples, draw_seed, held_out_samples) if rank else []
    if rank and not fit_on:
        found = "every picture is a held-out one, and none is left to fit corrections on"
        if correction_rank is not None or strategy == "corrected-lc":
            raise ShortVError(f"{found}; give more pictures, or --correction-rank 0")
        PartialState().print(f"without corrections: {found}")
        choice = replace(choice, correction_rank=None)
    processor = load_processor(folder, chat_template, image_aspect_ratio)
    model = load_model(folder, load_in_4bit, load_in_8bit, dtype=dtype, device_map=device_map or own_device())
    settings = {
        "base": base if not Path(base).is_dir() else Path(base).resolve().name,
        "data": [Path(source).name for source in data],
        "draw": draw,
        "load_in_4bit": load_in_4bit,
        "load_in_8bit": load_in_8bit,
        "image_aspect_ratio": "pad" if pads(processor) else "base",
    }
    result = run(
        folder,
        model,
        processor,
        [sample for group in groups for sample in group[:samples]],
        held_out_samples,
        output,
        choice,
        settings,
        tokens,
        direction,
        max_rows,
        overwrite,
        chat_template,
        fit_on,
        base_model,
        license,
    )
    frozen = "; ".join(f"{name} {layers}" for name, layers in result.frozen.items() if layers)
    corrected = f"; {len(result.corrections)} corrected" if result.corrections else ""
    PartialState().print(f"wrote {output}: {frozen}{corrected}")
    leave_processes()


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Package or LLaVA checkpoint: a folder or a Hub id.")],
    image: Annotated[
        list[str] | None, typer.Option(help="Picture for the first question, a file or URL. Repeat it for several.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System sentence of the prompt; by default the model's own, such as Vicuna's.")
    ] = None,
    replaced_layers: ReplacedLayers = None,
    temperature: Temperature = 0,
    top_p: TopP = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of an answer.")] = 512,
    web: Annotated[
        bool,
        typer.Option(
            "--web", help="Show a web page instead, with the dense model beside; it needs `pip install gradio`."
        ),
    ] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling; by default a new one.")
    ] = None,
    dtype: Dtype = "auto",
    device_map: Annotated[str, typer.Option(help=DEVICE_MAP)] = "auto",
    load_in_4bit: In4Bit = False,
    load_in_8bit: In8Bit = False,
) -> None:
    """Talk with a model about pictures.

    Lines from a pipe are answered one by one.

    Examples:

        shortv chat llava-1.5-7b-shortv --image photo.jpg

        shortv chat llava-hf/llava-1.5-7b-hf --replaced-layers 31,29,30

        shortv chat llava-1.5-7b-shortv --web

        echo "What is this?" | shortv chat llava-1.5-7b-shortv --image photo.jpg
    """
    _check_bits(load_in_4bit, load_in_8bit)
    terminal_only = {
        "--image": image,
        "--system": system,
        "--temperature": temperature,
        "--top-p": top_p != 1,
        "--seed": seed is not None,
    }
    for option, given in terminal_only.items():
        if web and given:
            raise typer.BadParameter("is for the terminal; leave it out with --web", param_hint=option)

    from shortv_llava.chat.images import load_image
    from shortv_llava.checkpoint.loading import load
    from shortv_llava.checkpoint.published import parse_layers
    from shortv_llava.checkpoint.source import check_name
    from shortv_llava.errors import ShortVError

    check_name(model)
    if replaced_layers is not None:
        parse_layers(replaced_layers, model)
    if web:
        if find_spec("gradio") is None:
            raise ShortVError("--web needs gradio: pip install gradio")
        with loading(model):
            from shortv_llava.chat.web import show

        loaded = load(model, replaced_layers, dtype, device_map, load_in_4bit, load_in_8bit)
        return show(loaded.model, loaded.processor, Path(model).name, max_new_tokens)

    images = [(load_image(source), source) for source in image or ()]
    with loading(model):
        from shortv_llava.chat.conversation import Conversation
        from shortv_llava.chat.terminal import Terminal

    loaded = load(model, replaced_layers, dtype, device_map, load_in_4bit, load_in_8bit)
    conversation = Conversation(loaded.model, loaded.processor, system, max_new_tokens, temperature, top_p, seed)
    for picture, source in images:
        conversation.attach(picture, source)
    Terminal(conversation, model, loaded.package_layers).run()


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Package or LLaVA checkpoint: a folder or a Hub id.")],
    output: Annotated[
        Path, typer.Option(help="Folder for answers and results; the same command continues an interrupted run there.")
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Benchmark of LLaVA's, as `gqa`; `shortv evaluate MODEL --task help --output .` lists them."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the task's data, laid out as LLaVA's playground/data/eval; by default the Hub's."),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="File of your own questions in LLaVA's JSONL, instead of --task.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures that they name.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric to score their answers with, as `gqa` or `vqa_accuracy`.")
    ] = None,
    lmms_tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lmms-eval, which must be installed, separated by commas, instead of --task."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further tasks of lmms-eval, laid out as its own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most samples of each of lmms-eval's tasks; by default all.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Evaluate the dense model too.")] = False,
    sweep: Annotated[
        str | None, typer.Option(help="Numbers of replaced layers to compare with the dense model, as `8,16,24`.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Ways to save visual tokens, separated by commas: `shortv`, `fastv:K:R` (from layer K on a share R of "
            "them is gone), `vtw:K` (all are), `shortv+fastv:K:R`, `shortv+vtw:K`. Several are compared with the dense "
            "model."
        ),
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Package folder whose model card gets the result.")] = None,
    replaced_layers: ReplacedLayers = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that run at once.")] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most new tokens of an answer; by default the task's own, or 128.")
    ] = None,
    temperature: Temperature = 0,
    top_p: TopP = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    shared_prefix: Annotated[
        bool, typer.Option(help="Prefill a picture once for all questions about it, or anew for each.")
    ] = True,
    image_aspect_ratio: Annotated[
        AspectRatio | None,
        typer.Option(help="As of `shortv calibrate`; by default `pad`, but `base` for Q-Bench, as in LLaVA's scripts."),
    ] = None,
    dtype: Dtype = "auto",
    device_map: Annotated[
        str | None, typer.Option(help=f"{DEVICE_MAP} By default on one GPU, or the CPU if there is none.")
    ] = None,
    load_in_4bit: In4Bit = False,
    load_in_8bit: In8Bit = False,
) -> None:
    """Answer questions, score the answers, and compare models.

    The questions are a benchmark's or your own, the models a package's and its dense one.

    For several GPUs: `accelerate launch -m shortv_llava.evaluation MODEL …`

    Examples:

        shortv evaluate my-shortv --task gqa --compare --output gqa

        shortv evaluate my-shortv --task pope --sweep 8,16,24 --output pope

        shortv evaluate my-shortv --questions q.jsonl --images photos --output q

        shortv evaluate my-shortv --task gqa --method shortv,vtw:16 --output gqa

        shortv evaluate my-shortv --lmms-tasks docvqa_val,ocrbench --output lmms
    """
    given = locals()
    if task == "help":
        from shortv_llava.evaluation.tasks import TASKS

        typer.echo("\n".join(sorted(TASKS)))
        raise typer.Exit
    with loading(model):
        from shortv_llava.evaluation.command import EvaluationOptions, run
        from shortv_llava.processes import leave_processes

        _check_bits(load_in_4bit, load_in_8bit)
        options = EvaluationOptions(**given)
        options.check()
        import shortv_llava.evaluation.run  # noqa: F401, takes seconds

    run(options)
    leave_processes()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure speed and memory on random weights.

    Examples:

        shortv bench prefill

        shortv bench decoding --help
    """
    from shortv_llava.benchmarks.command import app as benchmarks

    benchmarks(args=context.args, prog_name="shortv bench")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    package: Annotated[str, typer.Argument(help="Package: a folder or a Hub id.")],
) -> None:
    """Serve a package with vLLM, behind OpenAI's API. Further options are those of `vllm serve`.

    Examples:

        shortv serve llava-1.5-7b-shortv

        shortv serve llava-1.5-7b-shortv --port 8001 --tensor-parallel-size 2
    """
    with loading(package), suppress(ImportError):  # without it the next line says what to do
        import vllm  # noqa: F401, takes seconds

    from shortv_llava.serving.command import serve as run

    run(package, context.args)


@app.command()
def demo(
    output: Output = Path("demo-output"),
) -> None:
    """Go the whole way on the embedded checkpoint.

    Calibrate it, make the package, load it, answer questions and measure the speed.

    Example:

        shortv demo
    """
    with loading("the embedded checkpoint"):
        from shortv_llava.checkpoint.package import check_output

        check_output(output, overwrite=True)

        from shortv_llava.examples.demo import run

    run(output)


def main(*command: str) -> None:
    """Run the command line; every failure a user can cause is one line and exit code 1."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _repeat
    verbose = "--verbose" in sys.argv
    arguments = [*command, *(argument for argument in sys.argv[1:] if argument != "--verbose")]
    try:
        app(args=arguments, prog_name="shortv")
    except KeyboardInterrupt:
        _stop(signal.SIGINT, arguments)
    except Terminated:
        _stop(signal.SIGTERM, arguments)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # how Typer takes Ctrl-C, without a word
            _stop(signal.SIGINT, arguments)
        raise
    except Exception as error:
        if verbose:
            raise
        sys.exit(_fail(str(error).strip() or type(error).__name__))
    finally:  # what comes while the interpreter ends would be a traceback
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(number: signal.Signals, arguments: list[str]) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _fail("interrupted" + "; the same command continues" * (arguments[:1] in (["calibrate"], ["evaluate"])))
    sys.exit(128 + number)


class Terminated(BaseException):
    """SIGTERM: a command cleans up as after Ctrl-C."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _repeat(ignored) -> None:
    """Send a signal again that came where Python ignores exceptions, as in a `__del__`; show others as ever."""
    number = {Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(ignored.exc_type)
    if number is None:
        sys.__unraisablehook__(ignored)
    else:
        timer = threading.Timer(0.05, os.kill, [os.getpid(), number])
        timer.daemon = True
        timer.start()


def _fail(message: str) -> int:
    line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in " ".join(message.split()))
    if len(line) > 1000:  # such as the name of a file of 5,000 letters
        line = f"{line[:500]} … {line[-400:]}"
    typer.echo(f"shortv: error: {line}", err=True)
    return 1


if __name__ == "__main__":
    main()
