"""Chat in a terminal: a conversation whose cache is kept between turns, and the commands around it."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from shortv_llava.errors import ShortVError
from shortv_llava.images import load_image
from shortv_llava.package import cache_name, parse_layers
from shortv_llava.prompts import chat_system, tokenize

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


@dataclass(eq=False)  # told apart by identity: a file attached twice is two pictures
class Picture:
    """An image as the model takes it."""

    source: str
    num_tokens: int
    inputs: dict[str, torch.Tensor]  # `pixel_values` and, for LLaVA-NeXT, `image_sizes`; of shape `(1, ...)`


@dataclass
class Turn:
    """A question, its answer, and what they took."""

    question: str
    pictures: list[Picture]
    answer: str = ""
    stop: str = "interrupted"  # or, where the answer ended by itself or at a limit: "end", "length", "context"
    visual_tokens: int = 0  # prefilled; as for the text, those found in the cache do not count
    text_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    decoding_seconds: float = 0.0  # from the first new token to the last
    cache_bytes: int = 0
    num_replaced_layers: int = 0


class Conversation:
    """Turns of a chat with a ShortV model, which computes nothing twice.

    Each turn renders and tokenises the whole conversation, so answers are those of a conversation prefilled anew; but
    only what follows the longest beginning that the cache holds already goes through the model. The decoding loop is
    ours, since `generate` of transformers 4 hands images to the model only while the cache is empty.

    Args:
        system (`str`, *optional*): the system sentence; if not given the chat template's own, for Vicuna that
            of LLaVA's chat.
        temperature (`float`): 0 takes the likeliest token each time.
        seed (`int`, *optional*): of the sampling.

    Raises:
        ShortVError: if the model's chat template has no place for a system sentence.
    """

    def __init__(
        self,
        model,
        processor,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.warpers = None
        if temperature > 0:
            self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        ends = model.generation_config.eos_token_id
        self.end_tokens = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.max_length = model.config.text_config.max_position_embeddings
        self.turns: list[Turn] = []
        self.pending: list[Picture] = []  # for the next question
        self.cache = DynamicCache()
        self.cached: list[int | Picture] = []  # what the cache holds, see `_sequence`

        self.system = chat_system(processor) if system is None else system
        if self.system is not None and self.system not in self._render([Turn("", [])]):
            raise ShortVError("the model's chat template has no place for a system sentence; leave --system out")

    def attach(self, image: Image.Image, source: str) -> None:
        """Let an image go with the next question. `source` is where it came from."""
        inputs = self.processor(text=self.processor.image_token, images=image, return_tensors="pt")
        num_tokens = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        kept = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
        self.pending = [*self.pending, Picture(source, num_tokens, kept)]

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece. Closed early or interrupted, what came of it stays as the answer.

        Raises:
            ShortVError: if the conversation would be longer than the model's context; it is left as it was.
        """
        began = time.perf_counter()
        turn = Turn(question, self.pending, num_replaced_layers=len(self.model.config.replaced_layers))
        sequence = self._sequence([*self.turns, turn])
        room = self.max_length - len(sequence)
        if room < 1:
            raise ShortVError(
                f"with this question the conversation has {len(sequence)} tokens, and the context of the model ends at"
                f" {self.max_length}; /reset starts anew, /undo takes back the last turn"
            )
        limit = min(self.max_new_tokens, room)
        new = self._keep_common(sequence)
        turn.visual_tokens = sum(isinstance(entry, Picture) for entry in new)
        turn.text_tokens = len(new) - turn.visual_tokens
        answer: list[int] = []
        try:
            while turn.stop == "interrupted":
                token = self._choose(self._forward(new))
                seconds = time.perf_counter() - began
                if not answer:
                    turn.first_token_seconds = seconds
                answer.append(token)
                turn.new_tokens, turn.decoding_seconds = len(answer), seconds - turn.first_token_seconds
                if token in self.end_tokens:
                    turn.stop = "end"
                elif len(answer) == limit:
                    turn.stop = "length" if limit < room else "context"
                text = self.processor.tokenizer.decode(
                    answer, skip_special_tokens=True, clean_up_tokenization_spaces=False
                ).lstrip()
                # Text that ends with half a character waits for the rest.
                if len(text) > len(turn.answer) and (turn.stop != "interrupted" or not text.endswith("\ufffd")):
                    piece, turn.answer = text[len(turn.answer) :], text
                    yield piece
                new = [token]
        finally:
            if answer:
                turn.cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
                self.turns.append(turn)
                self.pending = []

    def undo(self) -> Turn | None:
        """Take back the last turn, if any. Its pictures wait for the next question, before those that do already."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.pending = [*turn.pictures, *self.pending]
        return turn

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self.turns, self.pending = [], []

    def set_layers(self, replaced_layers: Sequence[int] = (), attention: Sequence[int] = (), ffn: Sequence[int] = ()):
        """Replace other layers from the next question on, see [`ShortVConfigMixin.set_replaced_layers`].

        Raises:
            ValueError: if they do not fit the model.
        """
        self.model.set_replaced_layers(replaced_layers, attention, ffn)
        self.cached = []  # was computed with the other layers

    def messages(self) -> list[dict]:
        """The conversation as chat templates and servers take it."""
        return self._messages(self.turns)

    def _messages(self, turns: Sequence[Turn]) -> list[dict]:
        def message(role: str, text: str, pictures: Sequence[Picture] = ()) -> dict:
            images = [{"type": "image", "url" if "://" in p.source else "path": p.source} for p in pictures]
            return {"role": role, "content": [*images, {"type": "text", "text": text}]}

        messages = [] if self.system is None else [message("system", self.system)]
        for turn in turns:
            messages += [message("user", turn.question, turn.pictures), message("assistant", turn.answer.strip())]
        return messages

    def _render(self, turns: Sequence[Turn]) -> str:
        """The prompt for the answer to the last turn."""
        return self.processor.apply_chat_template(self._messages(turns)[:-1], add_generation_prompt=True)

    def _sequence(self, turns: Sequence[Turn]) -> list[int | Picture]:
        """The prompt, an entry for each token the model sees: its id, or the picture for each of a picture's tokens."""
        [ids] = tokenize(self.processor, [self._render(turns)])
        pictures = [picture for turn in turns for picture in turn.pictures]
        places = ids.count(self.model.config.image_token_id)
        if places != len(pictures):
            mark = self.processor.image_token
            raise ShortVError(
                f"{places} times {mark} for {len(pictures)} images; leave {mark} out of questions, /image adds an image"
            )
        remaining, sequence = iter(pictures), []
        for token in ids:
            if token == self.model.config.image_token_id:
                picture = next(remaining)
                sequence += [picture] * picture.num_tokens
            else:
                sequence.append(token)
        return sequence

    def _keep_common(self, sequence: list[int | Picture]) -> list[int | Picture]:
        """Cut the cache to the longest beginning it shares with the sequence. Returns the rest, one token at least."""
        pairs = enumerate(zip(self.cached, sequence))
        shared = next((i for i, (old, new) in pairs if old != new), min(len(self.cached), len(sequence) - 1))
        if shared == 0:
            self.cache = DynamicCache()
        # Not `Cache.crop`: after an interrupted forward pass some layers are longer than others.
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :shared], layer.values[:, :, :shared]
        self.cached = self.cached[:shared]
        return sequence[shared:]

    @torch.no_grad()
    def _forward(self, entries: list[int | Picture]) -> torch.Tensor:
        """Add tokens to the cache. Returns the logits `(1, vocabulary)` that follow the last."""
        image_token = self.model.config.image_token_id
        pictures = list(dict.fromkeys(entry for entry in entries if isinstance(entry, Picture)))
        inputs = {"input_ids": torch.tensor([[image_token if isinstance(e, Picture) else e for e in entries]])}
        for key in pictures[0].inputs if pictures else ():  # padded, as LLaVA-NeXT cuts images into few or many patches
            inputs[key] = pad_sequence([picture.inputs[key][0] for picture in pictures], batch_first=True)
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        output = self.model(**inputs, **{cache_name(): self.cache}, use_cache=True, logits_to_keep=1)
        self.cached += entries  # only now: what an interruption leaves half done is cut off later
        return output.logits[:, -1].float()

    def _choose(self, logits: torch.Tensor) -> int:
        if self.warpers is None:
            return int(logits.argmax())
        return int(torch.multinomial(self.warpers(None, logits).softmax(dim=-1).cpu(), 1, generator=self.generator))


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
        """Until /exit or the end of input.

        Raises:
            Exception: that of the first line that fails, when input is no terminal.
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
            try:
                self.handle(line)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise ShortVError("interrupted") from None
                note("\n(stopped)")
            except Exception as error:
                if not self.interactive:
                    raise
                note(f"error: {' '.join(str(error).split()) or type(error).__name__}")

    def prompt(self) -> str:
        if not self.interactive:
            return ""
        number = len(self.conversation.pending)
        return f"[{number} image{'s' if number > 1 else ''}] > " if number else "> "

    def handle(self, line: str) -> None:
        """Answer a question or do a command."""
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
    """For the person at the terminal; never among the answers of a script."""
    print(text, file=sys.stderr, flush=True)
