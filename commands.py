"""Shared by commands: common options, options as one dataclass, and the spinner while libraries are loaded."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import typer

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
DeviceMap = Annotated[
    str | None, typer.Option(help=f"{DEVICE_MAP} By default on one GPU, or the CPU if there is none.")
]
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


def takes(options: type) -> Callable[[Callable], Callable]:
    """Decorator: the fields of a dataclass become a command's parameters; the command gets them as one value."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**given):
            command(options(**given))

        run.__signature__ = inspect.signature(options)
        run.__annotations__ = get_type_hints(options, include_extras=True)
        return run

    return decorate


def check_bits(load_in_4bit: bool, load_in_8bit: bool) -> None:
    """Raises a usage error if both are set."""
    if load_in_4bit and load_in_8bit:
        raise typer.BadParameter("4 or 8 bit, not both", param_hint="--load-in-4bit")


@contextmanager
def loading(what: str | Path) -> Iterator[None]:
    """A spinner on standard error while options are checked and libraries imported; none if it is not a terminal."""
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    settings = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with Live(Spinner("dots", f"loading {what} …"), console=Console(stderr=True), **settings):
        yield
