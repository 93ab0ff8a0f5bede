"""Chat in a terminal: a conversation whose cache is kept between turns, and the commands around it."""

import json
import sys
from contextlib import closing, suppress
from pathlib import Path

from shortv_llava.chat.conversation import Conversation
from shortv_llava.chat.images import load_image
from shortv_llava.checkpoint.config import LAYER_LISTS, UNFIT_CORRECTIONS, has_unfit_corrections
from shortv_llava.checkpoint.published import parse_layers
from shortv_llava.errors import ShortVError, one_line

HELP = """\
/image FILE|URL  attach an image to the next question; several, one by one
/undo            take back the last question and answer; its images wait for
                 the next question, and once more drops them
/reset           start anew, without images
/layers IDS      replace these layers from now on: 31,29,30, none, package or
                 published; the next question prefills the conversation anew
/layers          show the layers that are replaced
/stats           what each turn took: tokens prefilled, time to first token,
                 tokens a second, cache, layers replaced
/save FILE       write the conversation as chat messages in JSON
/help            this text
/exit            leave, as does Ctrl-D
Anything else is a question. Ctrl-C stops an answer; what came of it stays."""


class Terminal:
    """Reads questions and commands from standard input until it ends; answers on standard output, notes on error.

    A person at a terminal gets a prompt and line editing, and goes on after an error. Lines from a pipe or file are
    a script: the first that fails ends it.

    Args:
        base (`str`): the model, as the user named it.
    """

    def __init__(self, conversation: Conversation, base: str, package_layers=((), (), ())):
        self.conversation, self.base, self.package_layers = conversation, base, package_layers
        self.interactive = sys.stdin.isatty()
        self.commands = {
            "image": self.image,
            "undo": self.undo,
            "reset": self.reset,
            "layers": self.layers,
            "stats": self.stats,
            "save": self.save,
            "help": self.help,
        }

    def run(self) -> None:
        """Read lines until /exit or the end of input.

        Raises:
            Exception: the error of the first line that fails, if input is no terminal.
        """
        if self.interactive:
            with suppress(ImportError):  # not on every platform
                import readline  # noqa: F401, line editing and history for `input`
            model = self.conversation.model
            note(f"{self.base}: {self.describe_layers()}; {str(model.dtype).removeprefix('torch.')} on {model.device}")
            note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                line = input(self.prompt()).strip()
                line.encode()  # bytes that are no UTF-8 come as surrogates, which no tokenizer takes
                if line == "/exit":
                    return
            except EOFError:
                if self.interactive:
                    print()
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise ShortVError("interrupted") from None
                note("\n(/exit or Ctrl-D leaves)")
                continue
            except UnicodeError:
                raise ShortVError("standard input is no UTF-8") from None
            try:
                with one_line(lambda error: " ".join(str(error).split()) or type(error).__name__):
                    self.handle(line)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise ShortVError("interrupted") from None
                note("\n(stopped)")
            except ShortVError as error:
                if not self.interactive:
                    raise
                note(f"error: {error}")

    def prompt(self) -> str:
        if not self.interactive:
            return ""
        number = len(self.conversation.pending)
        return f"[{number} image{'s' if number > 1 else ''}] > " if number else "> "

    def handle(self, line: str) -> None:
        """Answer a question or run a command."""
        if not line:
            if self.interactive:
                note("(ask something; /help lists the commands)")
        elif line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            if name not in self.commands:
                raise ShortVError(f"there is no command /{name}; /help lists them")
            self.commands[name](argument.strip())
        else:
            self.ask(line)

    def ask(self, question: str) -> None:
        with closing(self.conversation.ask(question)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print(flush=True)
        stop = self.conversation.turns[-1].stop
        if stop == "length":
            note(f"(cut after {self.conversation.max_new_tokens} tokens; --max-new-tokens allows more)")
        elif stop == "context":
            note(f"(cut: the context of {self.conversation.max_length} tokens is full; /reset starts anew)")

    def image(self, source: str) -> None:
        source = source.strip("'\"")
        if not source:
            raise ShortVError("/image needs a file or URL")
        self.conversation.attach(load_image(source), source)

    def undo(self, _: str) -> None:
        turn = self.conversation.undo()
        if turn is not None:
            note(f"(took back: {turn.question})")
        elif self.conversation.pending:
            self.conversation.pending = []
            note("(dropped what waited for the next question)")
        else:
            raise ShortVError("there is nothing to take back")

    def reset(self, _: str) -> None:
        self.conversation.reset()

    def layers(self, spec: str) -> None:
        if spec == "package":
            self.conversation.set_layers(*self.package_layers)
        elif spec:
            self.conversation.set_layers(parse_layers(spec, self.base))
        print(self.describe_layers(), flush=True)
        config = self.conversation.model.config
        if has_unfit_corrections(config, self.package_layers, (getattr(config, name) for name in LAYER_LISTS)):
            note(f"({UNFIT_CORRECTIONS})")

    def describe_layers(self) -> str:
        config = self.conversation.model.config
        parts = [f"{len(config.replaced_layers)} of {config.text_config.num_hidden_layers} layers replaced"]
        if config.replaced_layers:
            parts[0] += f" {config.replaced_layers}"
        for block, layers in (("attention", config.replaced_attention_layers), ("FFN", config.replaced_ffn_layers)):
            if layers:
                parts.append(f"{block} alone in {layers}")
        return ", ".join(parts)

    def stats(self, _: str) -> None:
        print("turn  prefilled visual+text  first token  tokens/s  cache MiB  layers replaced")
        for number, turn in enumerate(self.conversation.turns, start=1):
            prefilled = f"{turn.visual_tokens} + {turn.text_tokens}"
            rate = f"{(turn.new_tokens - 1) / turn.decoding_seconds:.1f}" if turn.new_tokens > 1 else "-"
            print(
                f"{number:4}  {prefilled:>21}  {turn.first_token_seconds:9.3f} s  {rate:>8}"
                f"  {turn.cache_bytes / 2**20:9.1f}  {turn.num_replaced_layers:15}"
            )
        sys.stdout.flush()

    def save(self, name: str) -> None:
        if not name:
            raise ShortVError("/save needs a file name")
        path = Path(name).expanduser()
        try:
            with open(path, "x", encoding="utf-8") as file:  # never over another file
                json.dump(self.conversation.messages(), file, indent=2, ensure_ascii=False)
                file.write("\n")
        except FileExistsError:
            raise ShortVError(f"{path}: exists already; give another name") from None
        note(f"(wrote {path})")

    def help(self, _: str) -> None:
        print(HELP, flush=True)


def note(text: str) -> None:
    """Print a note on standard error, so that it is never among the answers of a script."""
    print(text, file=sys.stderr, flush=True)
