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

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the package that the output folder holds.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="`auto` for the checkpoint's own.")
]
AspectRatio = Literal["pad", "base"]
BaseModel = Annotated[str | None, typer.Option(help="Hub id of a local base, for the model card.", show_default=False)]
License = Annotated[
    str | None, typer.Option(help="Licence of the weights, as the Hub names it, where the base does not tell.")
]
VisionTower = Annotated[
    str | None,
    typer.Option(help="Of an original LLaVA checkpoint, folder or Hub id; its config.json's if not given."),
]
BaseWeights = Annotated[
    str | None,
    typer.Option(help="Of a LoRA adapter, folder or Hub id; what its adapter_config.json names if not given."),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        help="A file or one of LLaVA's formats, as `vicuna_v1`; for bases whose own is missing or takes no pictures."
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
        help="Layers to replace instead of the package's own: ids as `31,29,30`, `none`, `published` or "
        "`published:NAME`. Without this option a plain checkpoint takes those of the environment variable "
        "REPLACED_LAYERS."
    ),
]


def _show_version(asked_for: bool) -> None:
    if asked_for:
        typer.echo(f"shortv-llava {metadata.version('shortv-llava')}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Publish and run ShortV vision-language models: LLaVA with visual tokens frozen in ineffective layers."""


@app.command()
def package(
    base: Annotated[str, typer.Argument(help="LLaVA checkpoint: a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="The package folder to make.")],
    layers: Annotated[
        str, typer.Option(help="`published`, `published:NAME`, `none`, or ids separated by commas, as `31,29,30`.")
    ] = "published",
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Fetch no weights; publish with `shortv push --weights-from`.")
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
    """Make a package folder from a checkpoint and layers that are known already.

    A checkpoint in the original LLaVA layout is converted, a LoRA adapter is merged, one shard at a time.

    Examples:

        shortv package llava-hf/llava-1.5-7b-hf --output llava-1.5-7b-shortv

        shortv package ./my-finetune --layers published:llava-1.5-7b --output my-finetune-shortv

        shortv package liuhaotian/llava-v1.6-vicuna-7b --output llava-next-7b-shortv

        shortv package ./my-lora --base-weights lmsys/vicuna-7b-v1.5 --layers published:llava-1.5-7b --output my-shortv
    """
    with _loading(base):
        from shortv_llava.package import (
            BY_HAND,
            check_name,
            check_output,
            fetch_checkpoint,
            parse_layers,
            write_package,
        )
        from shortv_llava.processors import read_template

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
    folder: Annotated[Path, typer.Argument(help="The package folder.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Repository, `owner/name`; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    license: License = None,
    weights_from: Annotated[
        str | None,
        typer.Option(help="`owner/name` or `owner/name@revision`: the Hub copies the weights from there."),
    ] = None,
    tag: Annotated[
        str | None, typer.Option(help="A new tag for this version, as `v1.0`, which the card's snippets load.")
    ] = None,
    collection: Annotated[
        str | None, typer.Option(help="Put it into this collection too, `owner/title-0123456789abcdef`.")
    ] = None,
    space: Annotated[
        bool, typer.Option("--space", help="Publish a Space of the same id too: the page of `shortv chat --web`.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
) -> None:
    """Publish a package folder on the Hub, checked first, in one commit; none where nothing has changed.

    Examples:

        shortv push llava-1.5-7b-shortv me/llava-1.5-7b-shortv --dry-run

        shortv push llava-1.5-7b-shortv me/llava-1.5-7b-shortv --weights-from llava-hf/llava-1.5-7b-hf

        shortv push llava-1.5-7b-shortv me/llava-1.5-7b-shortv --tag v1.0 --space
    """
    if tag and create_pr:
        raise typer.BadParameter("a pull request gets none; leave out --create-pr", param_hint="--tag")
    if space and (revision or create_pr):
        raise typer.BadParameter("shows what main holds; leave out --revision and --create-pr", param_hint="--space")

    with _loading(folder):
        from shortv_llava.push_to_hub import push as run
        from shortv_llava.push_to_hub import push_space

    pushed = run(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=message,
        license=license,
        weights_from=weights_from,
        tag=tag,
        collection=collection,
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
def _loading(what: str | Path) -> Iterator[None]:
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
    output: Annotated[Path, typer.Option(help="The package folder to make.")],
    data: Annotated[
        list[str],
        typer.Option(help="`gqa`, `flickr30k`, `shapes` (embedded) or a file in LLaVA's JSONL; several mix."),
    ] = ["gqa", "flickr30k"],  # noqa: B006
    images: Annotated[Path | None, typer.Option(help="Folder of the images that JSONL files name.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to choose with, from each source.")] = 20,
    held_out: Annotated[int, typer.Option(min=1, help="Samples to measure the cost on, from each source.")] = 10,
    draw: Annotated[
        Literal["random", "first"],
        typer.Option(
            help="`random`: samples are drawn at random, as in the paper; `first`: the first of each source, as in the "
            "release."
        ),
    ] = "random",
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, of random layers and of the bootstrap.")] = 0,
    tokens: Annotated[
        list[str], typer.Option(help="`visual`, `text` or `all`; several are scored at once, the first chooses.")
    ] = ["visual"],  # noqa: B006
    direction: Annotated[
        Direction,
        typer.Option(help="`release`: KL(variant || model), as published layers were found; `paper`: the reverse."),
    ] = "release",
    strategy: Annotated[
        Strategy | None,
        typer.Option(
            help="`corrected-lc` is LC with a correction of the layer; by default that, or `lc` without correction."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Replace and correct given layers, without scoring: `published`, `published:NAME` or ids."),
    ] = None,
    correction_rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rank of the linear maps that stand in for frozen updates; 64, or an eighth of the hidden size if "
            "that is less. 0 for none, as in the paper.",
        ),
    ] = None,
    correction_samples: Annotated[
        int,
        typer.Option(min=1, help="Samples to fit them on, from each source, about other pictures than held-out ones."),
    ] = 200,
    granularity: Annotated[
        Literal[Granularity, "auto"],
        typer.Option(help="`block`: attention and FFN apart; `auto`: the better of both."),
    ] = "layer",
    num_layers: Annotated[int | None, typer.Option(help="Layers to replace.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Of the layers to replace; 0.6 if no budget is given.")] = None,
    flops_ratio: Annotated[float | None, typer.Option(help="Replace until the prefill costs this share.")] = None,
    max_divergence: Annotated[
        float | None, typer.Option(help="Replace as much as keeps the KL on held-out samples under this.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Variants that run at once, for small memories.")] = None,
    base_model: BaseModel = None,
    license: License = None,
    vision_tower: VisionTower = None,
    base_weights: BaseWeights = None,
    chat_template: ChatTemplate = None,
    image_aspect_ratio: ShownAspectRatio = "pad",
    dtype: Dtype = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers, for example `auto`.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Through bitsandbytes.")] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Through bitsandbytes.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Compute LC scores, make the package that replaces the layers of lowest score, and fit corrections for them.

    Interrupted, the same command continues. Several GPUs: `accelerate launch -m shortv_llava.calibrate BASE …`

    Examples:

        shortv calibrate llava-hf/llava-1.5-7b-hf --output llava-1.5-7b-shortv

        shortv calibrate ./my-finetune --data questions.jsonl --images images --granularity auto --output my-shortv

        shortv calibrate llava-hf/llava-1.5-7b-hf --layers published --output llava-1.5-7b-shortv
    """
    with _loading(base):
        from dataclasses import replace

        from shortv_llava.calibrate.samples import check_sources, fit_samples, load_samples
        from shortv_llava.calibrate.selection import Choice
        from shortv_llava.errors import ShortVError
        from shortv_llava.package import (
            check_name,
            check_output,
            config_object,
            find_checkpoint,
            leave_processes,
            load_model,
            own_device,
            package_config,
            parse_layers,
            read_config,
        )
        from shortv_llava.processors import load_processor, pads, read_template

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
        list[str] | None, typer.Option(help="File or URL for the first question; once for each image.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System sentence; if not given the model's own, such as Vicuna's.")
    ] = None,
    replaced_layers: ReplacedLayers = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this total.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    web: Annotated[
        bool,
        typer.Option("--web", help="A web page instead, with the dense model beside; `pip install gradio` first."),
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = None,
    dtype: Dtype = "auto",
    device_map: Annotated[str, typer.Option(help="As in transformers: `auto`, `cpu`, `cuda:1`.")] = "auto",
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Needs bitsandbytes.")] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Needs bitsandbytes.")] = False,
) -> None:
    """Talk with a model about images. Lines from a pipe are answered one by one.

    Examples:

        shortv chat llava-1.5-7b-shortv --image photo.jpg

        REPLACED_LAYERS=31,29,30 shortv chat llava-hf/llava-1.5-7b-hf --load-in-4bit

        shortv chat llava-1.5-7b-shortv --web

        echo "What is this?" | shortv chat llava-1.5-7b-shortv --image https://llava-vl.github.io/static/images/view.jpg
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

    from shortv_llava.errors import ShortVError
    from shortv_llava.images import load_image
    from shortv_llava.package import check_name, load, parse_layers

    check_name(model)
    if replaced_layers is not None:
        parse_layers(replaced_layers, model)
    if web:
        if find_spec("gradio") is None:
            raise ShortVError("--web needs gradio: pip install gradio")
        with _loading(model):
            from shortv_llava.web import show

        loaded = load(model, replaced_layers, dtype, device_map, load_in_4bit, load_in_8bit)
        return show(loaded.model, loaded.processor, Path(model).name, max_new_tokens)

    images = [(load_image(source), source) for source in image or ()]
    with _loading(model):
        from shortv_llava.chat import Conversation, Terminal

    loaded = load(model, replaced_layers, dtype, device_map, load_in_4bit, load_in_8bit)
    conversation = Conversation(loaded.model, loaded.processor, system, max_new_tokens, temperature, top_p, seed)
    for picture, source in images:
        conversation.attach(picture, source)
    Terminal(conversation, model, loaded.package_layers).run()


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Package or LLaVA checkpoint: a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder for answers and results; an interrupted run continues there.")],
    task: Annotated[
        str | None,
        typer.Option(help="A benchmark of LLaVA's: `shortv evaluate MODEL --task help --output .` lists them."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The task's data, laid out as LLaVA's playground/data/eval; else from the Hub.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="Or your own questions, in LLaVA's JSONL.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images that they name.")] = None,
    metric: Annotated[str | None, typer.Option(help="Score your own questions' answers with this metric.")] = None,
    lmms_tasks: Annotated[
        str | None,
        typer.Option(help="Or tasks of lmms-eval, which must be installed, separated by commas."),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of other such tasks, as lmms-eval's own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of samples of each of lmms-eval's tasks.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="With the dense model beside.")] = False,
    sweep: Annotated[
        str | None, typer.Option(help="Compare numbers of replaced layers, as `8,16,24`, with the dense model.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Ways to save visual tokens, separated by commas: `shortv`, `fastv:K:R`, `vtw:K`, `shortv+fastv:K:R`, "
            "`shortv+vtw:K`. Of several, a table with the dense model."
        ),
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Package folder whose model card shall tell the results.")] = None,
    replaced_layers: ReplacedLayers = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in the model at once.")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; the task's own, or 128.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this total.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    shared_prefix: Annotated[
        bool, typer.Option(help="Prefill a picture once for all questions about it, or for each anew.")
    ] = True,
    image_aspect_ratio: Annotated[
        AspectRatio | None,
        typer.Option(help="As for calibrate; `pad` if not given, but for Q-Bench, as in LLaVA's scripts."),
    ] = None,
    dtype: Dtype = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers, for example `auto`.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Needs bitsandbytes.")] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Needs bitsandbytes.")] = False,
) -> None:
    """Answer a benchmark's questions or your own, score the answers, compare with the dense model.

    Several GPUs: `accelerate launch -m shortv_llava.evaluation MODEL …`

    Examples:

        shortv evaluate llava-1.5-7b-shortv --task gqa --compare --output results/gqa --card llava-1.5-7b-shortv

        shortv evaluate llava-1.5-7b-shortv --task pope --sweep 4,8,12,16,19,24,28 --output results/pope

        shortv evaluate llava-1.5-7b-shortv --questions mine.jsonl --images photos --output results/mine

        shortv evaluate llava-1.5-7b-shortv --task gqa --method shortv,fastv:2:0.5,vtw:16 --output results/methods

        shortv evaluate llava-1.5-7b-shortv --lmms-tasks docvqa_val,ocrbench,mmmu_val --compare --output results/text
    """
    given = locals()
    if task == "help":
        from shortv_llava.evaluation.tasks import TASKS

        typer.echo("\n".join(sorted(TASKS)))
        raise typer.Exit
    with _loading(model):
        from shortv_llava.evaluation.command import EvaluationOptions, run
        from shortv_llava.package import leave_processes

        _check_bits(load_in_4bit, load_in_8bit)
        options = EvaluationOptions(**given)
        options.check()
        import shortv_llava.evaluation.run  # noqa: F401, takes seconds

    run(options)
    leave_processes()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure speed and memory on random weights: prefill, decoding, calibration, shared prefixes, turns, vLLM.

    Examples:

        shortv bench prefill

        shortv bench decoding --help
    """
    with _loading("the benchmarks"):
        from shortv_llava.benchmarks.command import app as benchmarks

    benchmarks(args=context.args, prog_name="shortv bench")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    package: Annotated[str, typer.Argument(help="The package: a folder or a Hub id.", show_default=False)],
) -> None:
    """Serve a package with vLLM, behind OpenAI's API. Further options are those of `vllm serve`.

    Examples:

        shortv serve llava-1.5-7b-shortv

        shortv serve llava-1.5-7b-shortv --port 8001 --tensor-parallel-size 2
    """
    with _loading(package), suppress(ImportError):  # without it the next line says what to do
        import vllm  # noqa: F401, takes seconds

    from shortv_llava.serving.command import serve as run

    run(package, context.args)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The package folder to make.")] = Path("demo-output"),
) -> None:
    """The whole way on the embedded checkpoint: calibrate, package, load, answer, measure.

    Example:

        shortv demo
    """
    with _loading("the embedded checkpoint"):
        from shortv_llava.package import check_output

        check_output(output, overwrite=True)

        from shortv_llava.demo import run

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
