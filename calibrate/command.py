"""`shortv calibrate`: its options, samples and model, and the run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from shortv_llava.calibrate import Direction, Granularity, Strategy, Tokens
from shortv_llava.commands import (
    BaseModel,
    BaseWeights,
    ChatTemplate,
    DeviceMap,
    Dtype,
    In4Bit,
    In8Bit,
    License,
    Output,
    Overwrite,
    ShownAspectRatio,
    VisionTower,
    check_bits,
)
from shortv_llava.errors import ShortVError

MAX_RANK = 64  # default rank of corrections; an eighth of the hidden size if that is less


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of `shortv calibrate`."""

    base: Annotated[str, typer.Argument(help="Checkpoint of a supported family: a folder or a Hub id.")]
    output: Output
    data: Annotated[
        list[str],
        typer.Option(
            help="Source of samples: `gqa`, `flickr30k` (both from the Hub), `shapes` (embedded) or a file of "
            "questions in LLaVA's JSONL. Repeat it, or separate by commas, to mix several."
        ),
    ] = ("gqa", "flickr30k")
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures that JSONL files name.")] = None
    samples: Annotated[int, typer.Option(min=1, help="Samples from each source to choose layers with.")] = 20
    held_out: Annotated[int, typer.Option(min=1, help="Further samples from each source to measure the cost on.")] = 10
    draw: Annotated[
        Literal["random", "first"],
        typer.Option(help="Which samples are taken: `random`, as in the paper, or the `first` ones, as in its code."),
    ] = "random"
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw, of random layers and of the bootstrap.")] = 0
    tokens: Annotated[
        list[str],
        typer.Option(
            help="Tokens that are frozen for the scores: `visual`, `text` or `all`; of several the first chooses."
        ),
    ] = ("visual",)
    direction: Annotated[
        Direction,
        typer.Option(
            help="Direction of the KL divergence. `release`: KL(variant || model), as the published layers were found; "
            "`paper`: the reverse."
        ),
    ] = "release"
    strategy: Annotated[
        Strategy | None,
        typer.Option(
            help="How layers are chosen. `lc`: lowest LC; `corrected-lc`: lowest LC with a correction of the layer; "
            "`greedy`: what adds least divergence to what is frozen already; `cosine`: what turns visual tokens' "
            "states least; `random`. By default `corrected-lc`, without corrections `lc`."
        ),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(help="Replace and correct these layers without scoring: ids, `published` or `published:NAME`."),
    ] = None
    correction_rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rank of the linear maps that stand in for frozen updates; 0 for none, as in the paper. By default "
            "64, or an eighth of the hidden size if that is less.",
        ),
    ] = None
    correction_samples: Annotated[
        int,
        typer.Option(min=1, help="Samples from each source to fit corrections on, none about a held-out picture."),
    ] = 200
    granularity: Annotated[
        Literal[Granularity, "auto"],
        typer.Option(
            help="What is frozen as one: a whole `layer`, a `block` (attention or FFN alone), or the better of both "
            "(`auto`)."
        ),
    ] = "layer"
    num_layers: Annotated[int | None, typer.Option(help="Budget: number of layers to replace.")] = None
    fraction: Annotated[
        float | None, typer.Option(help="Budget: share of the layers to replace; 0.6 if no budget is given.")
    ] = None
    flops_ratio: Annotated[
        float | None, typer.Option(help="Budget: share of the prefill's FLOPs that is left, as 0.5.")
    ] = None
    max_divergence: Annotated[
        float | None, typer.Option(help="Budget: KL divergence on held-out samples to stay under, in nats.")
    ] = None
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Variants that run at once, fewer in less memory; by default what fits.")
    ] = None
    base_model: BaseModel = None
    license: License = None
    vision_tower: VisionTower = None
    base_weights: BaseWeights = None
    chat_template: ChatTemplate = None
    image_aspect_ratio: ShownAspectRatio = "pad"
    dtype: Dtype = "auto"
    device_map: DeviceMap = None
    load_in_4bit: In4Bit = False
    load_in_8bit: In8Bit = False
    overwrite: Overwrite = False

    def check(self) -> None:
        """Raises a usage error or [`ShortVError`] for wrong options, before anything is fetched or loaded."""
        from shortv_llava.calibrate.samples import check_sources
        from shortv_llava.checkpoint.package import check_output
        from shortv_llava.checkpoint.processors import read_template
        from shortv_llava.checkpoint.source import check_name

        for value in apart(self.tokens):
            if value not in get_args(Tokens):
                raise typer.BadParameter(f"{' or '.join(get_args(Tokens))}, not {value!r}", param_hint="--tokens")
        check_bits(self.load_in_4bit, self.load_in_8bit)
        self.choice(1 if self.correction_rank is None else self.correction_rank).check()
        check_sources(apart(self.data), self.images)
        if self.chat_template is not None:
            read_template(self.chat_template)
        check_name(self.base)
        check_output(self.output, self.overwrite)

    def choice(self, rank: int):
        """The [`Choice`] with corrections of rank `rank`; without corrections if it is 0."""
        from shortv_llava.calibrate.selection import Choice
        from shortv_llava.checkpoint.published import parse_layers

        given = None if self.layers is None else tuple(parse_layers(self.layers, self.base))
        budget = self.num_layers, self.fraction, self.flops_ratio, self.max_divergence
        return Choice(self.strategy, self.granularity, *budget, self.seed, rank or None, given)


def apart(entries: Sequence[str]) -> list[str]:
    """The values of an option that may be given several times and may hold several values separated by commas."""
    return [part for entry in entries for part in entry.split(",")]


@dataclass(frozen=True)
class Drawn:
    """Samples to choose layers with, to measure the cost on, and to fit corrections on."""

    samples: list
    held_out: list
    fit_on: list


def draw_samples(options: CalibrationOptions, fits: bool) -> Drawn:
    """All samples of a calibration. Samples to fit on are drawn only if `fits`, and without held-out pictures."""
    from shortv_llava.calibrate.samples import fit_samples, load_samples

    data, seed = apart(options.data), None if options.draw == "first" else options.seed
    number = options.samples + options.held_out
    groups = load_samples(data, options.images, number, seed).values()
    held_out = [sample for group in groups for sample in group[options.samples :]]
    fit_on = fit_samples(data, options.images, options.correction_samples, seed, held_out) if fits else []
    return Drawn([sample for group in groups for sample in group[: options.samples]], held_out, fit_on)


def run(options: CalibrationOptions) -> None:
    """Calibrate, and print what was written."""
    from accelerate import PartialState

    from shortv_llava.calibrate.run import calibrate
    from shortv_llava.calibrate.samples import source_names
    from shortv_llava.checkpoint.config import config_object, read_config
    from shortv_llava.checkpoint.loading import load_model
    from shortv_llava.checkpoint.processors import load_processor, pads
    from shortv_llava.checkpoint.source import find_checkpoint, model_name
    from shortv_llava.distributed import own_device
    from shortv_llava.hub.metadata import licence_hint

    folder = find_checkpoint(options.base, options.vision_tower, options.base_weights)
    entries = read_config(folder)
    config, rank = config_object(entries), options.correction_rank
    text_config = config.text_config
    choice = options.choice(min(MAX_RANK, text_config.hidden_size // 8) if rank is None else rank)
    # Both are checked here, before the long work.
    config.set_replaced_layers(choice.layers or ())
    config.corrected_layers, config.correction_rank = [], choice.correction_rank or 0
    choice.check(text_config.num_hidden_layers)
    drawn = draw_samples(options, fits=choice.correction_rank is not None)
    if choice.correction_rank and not drawn.fit_on:
        found = "every picture is a held-out one, and none is left to fit corrections on"
        if rank is not None or options.strategy == "corrected-lc":
            raise ShortVError(f"{found}; give more pictures, or --correction-rank 0")
        PartialState().print(f"without corrections: {found}")
        choice = replace(choice, correction_rank=None)
    processor = load_processor(folder, options.chat_template, options.image_aspect_ratio)
    placed = {"dtype": options.dtype, "device_map": options.device_map or own_device()}
    model = load_model(folder, options.load_in_4bit, options.load_in_8bit, **placed)
    settings = {
        "base": model_name(options.base),
        "data": source_names(apart(options.data)),
        "draw": options.draw,
        "load_in_4bit": options.load_in_4bit,
        "load_in_8bit": options.load_in_8bit,
        "image_aspect_ratio": "pad" if pads(processor) else "base",
    }
    result = calibrate(
        folder,
        model,
        processor,
        drawn.samples,
        drawn.held_out,
        options.output,
        choice,
        settings,
        apart(options.tokens),
        fit_on=drawn.fit_on,
        **{
            name: getattr(options, name)
            for name in ("direction", "max_rows", "overwrite", "chat_template", "base_model", "license")
        },
    )
    frozen = "; ".join(f"{name} {layers}" for name, layers in result.frozen.items() if layers)
    corrected = f"; {len(result.corrections)} corrected" if result.corrections else ""
    last = text_config.num_hidden_layers - 1
    if corrected and any(last in layers for layers in result.frozen.values()):
        corrected += f" (layer {last} needs no correction, because nothing reads its visual tokens)"
    PartialState().print(
        f"wrote {options.output}: {frozen or 'no layer replaced'}{corrected}{licence_hint(options.output)}"
    )
