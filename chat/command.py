"""`shortv chat`: its options, and the terminal or web page."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from shortv_llava.commands import (
    DEVICE_MAP,
    Dtype,
    In4Bit,
    In8Bit,
    ReplacedLayers,
    Temperature,
    TopP,
    check_bits,
    loading,
)
from shortv_llava.errors import ShortVError


@dataclass(frozen=True)
class ChatOptions:
    """The options of `shortv chat`."""

    model: Annotated[str, typer.Argument(help="Package or LLaVA checkpoint: a folder or a Hub id.")]
    image: Annotated[
        list[str] | None, typer.Option(help="Picture for the first question, a file or URL. Repeat it for several.")
    ] = None
    system: Annotated[
        str | None, typer.Option(help="System sentence of the prompt; by default the model's own, such as Vicuna's.")
    ] = None
    replaced_layers: ReplacedLayers = None
    temperature: Temperature = 0
    top_p: TopP = 1
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of an answer.")] = 512
    web: Annotated[
        bool,
        typer.Option(
            "--web", help="Show a web page instead, with the dense model beside; it needs `pip install gradio`."
        ),
    ] = False
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling; by default a new one.")
    ] = None
    dtype: Dtype = "auto"
    device_map: Annotated[str, typer.Option(help=DEVICE_MAP)] = "auto"
    load_in_4bit: In4Bit = False
    load_in_8bit: In8Bit = False

    def check(self) -> None:
        """Raises a usage error or [`ShortVError`] for wrong options, before anything is loaded."""
        check_bits(self.load_in_4bit, self.load_in_8bit)
        terminal_only = {
            "--image": self.image,
            "--system": self.system,
            "--temperature": self.temperature,
            "--top-p": self.top_p != 1,
            "--seed": self.seed is not None,
        }
        for option, given in terminal_only.items():
            if self.web and given:
                raise typer.BadParameter("is for the terminal; leave it out with --web", param_hint=option)
        from shortv_llava.checkpoint.published import parse_layers
        from shortv_llava.checkpoint.source import check_name

        check_name(self.model)
        if self.replaced_layers is not None:
            parse_layers(self.replaced_layers, self.model)
        if self.web and find_spec("gradio") is None:
            raise ShortVError("--web needs gradio: pip install gradio")

    def load(self):
        from shortv_llava.checkpoint.loading import load

        return load(self.model, self.replaced_layers, self.dtype, self.device_map, self.load_in_4bit, self.load_in_8bit)


def run(options: ChatOptions) -> None:
    """Chat until the user leaves."""
    (_show_page if options.web else _talk)(options)


def _show_page(options: ChatOptions) -> None:
    with loading(options.model):
        from shortv_llava.chat.web import show

    loaded = options.load()
    show(loaded.model, loaded.processor, Path(options.model).name, options.max_new_tokens)


def _talk(options: ChatOptions) -> None:
    from shortv_llava.chat.images import load_image

    images = [(load_image(source), source) for source in options.image or ()]
    with loading(options.model):
        from shortv_llava.chat.conversation import Conversation
        from shortv_llava.chat.terminal import Terminal

    loaded = options.load()
    settings = options.system, options.max_new_tokens, options.temperature, options.top_p, options.seed
    conversation = Conversation(loaded.model, loaded.processor, *settings)
    for picture, source in images:
        conversation.attach(picture, source)
    Terminal(conversation, options.model, loaded.package_layers).run()
