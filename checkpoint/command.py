"""`shortv package`: its options, and making the package."""

from dataclasses import dataclass
from typing import Annotated

import typer

from shortv_llava.commands import (
    AspectRatio,
    BaseModel,
    BaseWeights,
    ChatTemplate,
    License,
    Output,
    Overwrite,
    VisionTower,
)
from shortv_llava.errors import ShortVError

OWN = "own"


@dataclass(frozen=True)
class PackageOptions:
    """The options of `shortv package`."""

    base: Annotated[str, typer.Argument(help="Checkpoint of a supported family: a folder or a Hub id.")]
    output: Output
    layers: Annotated[
        str,
        typer.Option(
            help="Layers to replace: ids from 0, as `31,29,30`, `published` (the paper's for this model), "
            "`published:NAME` (for another), `none`, or `own` (those of a package, with its corrections)."
        ),
    ] = "published"
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Leave the weights out, to publish with `shortv push --weights-from`.")
    ] = False
    base_model: BaseModel = None
    license: License = None
    vision_tower: VisionTower = None
    base_weights: BaseWeights = None
    chat_template: ChatTemplate = None
    image_aspect_ratio: Annotated[
        AspectRatio,
        typer.Option(help="`pad`: the package pads pictures to squares as LLaVA-1.5; `base`: it does as its base."),
    ] = "base"
    overwrite: Overwrite = False

    def check(self) -> None:
        """Raises [`ShortVError`] for wrong options, before anything is fetched or loaded."""
        from shortv_llava.checkpoint.package import check_output
        from shortv_llava.checkpoint.processors import read_template
        from shortv_llava.checkpoint.published import parse_layers
        from shortv_llava.checkpoint.source import check_name

        if self.layers != OWN:
            parse_layers(self.layers, self.base)
        if self.chat_template is not None:
            read_template(self.chat_template)
        check_name(self.base)
        check_output(self.output, self.overwrite)


def run(options: PackageOptions) -> None:
    """Make the package, and say so."""
    from shortv_llava.checkpoint.config import MODEL_TYPES, read_config
    from shortv_llava.checkpoint.conversion import must_convert
    from shortv_llava.checkpoint.package import BY_HAND, write_package
    from shortv_llava.checkpoint.published import parse_layers
    from shortv_llava.checkpoint.source import fetch_checkpoint
    from shortv_llava.hub.metadata import licence_hint

    weights = not options.no_weights
    base, settings = fetch_checkpoint(options.base, weights), {}
    if options.layers != OWN:
        settings = BY_HAND | {"replaced_layers": parse_layers(options.layers, options.base)}
    elif read_config(base)["model_type"] not in MODEL_TYPES.values():
        raise ShortVError(f"{options.base}: is no package and has no layers of its own; name them with --layers")
    write_package(
        base,
        options.output,
        options.overwrite,
        weights=weights,
        base_model=options.base_model,
        license=options.license,
        vision_tower=options.vision_tower,
        base_weights=options.base_weights,
        chat_template=options.chat_template,
        image_aspect_ratio=options.image_aspect_ratio,
        **settings,
    )
    layers = read_config(options.output)["replaced_layers"]
    hint = licence_hint(options.output)
    # What had to be converted is no package.
    if options.layers != OWN and not must_convert(base) and read_config(base).get("corrected_layers"):
        hint = f"; without the corrections of {options.base}, which --layers own keeps{hint}"
    typer.echo(f"wrote {options.output}: {len(layers)} layer{'s' * (len(layers) != 1)} replaced {layers}{hint}")
