"""A conversation about pictures, with a KV cache that is kept between turns."""

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from PIL import Image
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from shortv_llava.chat.prompts import (
    TOKEN_TYPES,
    chat_system,
    has_three_positions,
    picture_mark,
    process,
    visual_tokens,
)
from shortv_llava.checkpoint.loading import cache_name
from shortv_llava.errors import ShortVError

PER_TOKEN = ("input_ids", "attention_mask", *TOKEN_TYPES)  # inputs with an entry for each token


class RopePositions(NamedTuple):
    """Positions of a prompt's tokens (3, 1, S), time, height, width, and how far text behind it is from its place."""

    prompt: torch.Tensor
    delta: int

    def of(self, start: int, number: int) -> torch.Tensor:
        """(3, 1, number), of tokens of the prompt or behind it."""
        behind = torch.arange(start, start + number).expand(3, 1, -1) + self.delta
        return behind if start >= self.prompt.shape[2] else self.prompt[:, :, start : start + number]


def rope_positions(model, inputs) -> RopePositions | None:
    """Positions of a prompt, for models whose visual tokens have three."""
    if not has_three_positions(model):
        return None
    taken = inspect.signature(model.model.get_rope_index).parameters
    positions, delta = model.model.get_rope_index(**{name: inputs[name] for name in taken if name in inputs})
    return RopePositions(positions, int(delta))


@dataclass(eq=False)  # compared by identity: a file attached twice is two pictures
class Picture:
    """An image and the number of its visual tokens."""

    source: str
    image: Image.Image
    num_tokens: int


@dataclass
class Turn:
    """A question, its answer, and what they took."""

    question: str
    pictures: list[Picture]
    answer: str = ""
    stop: str = "interrupted"  # or why the answer ended: "end", "length" (limit), "context" (full)
    visual_tokens: int = 0  # prefilled in this turn; as for text, tokens in the cache do not count
    text_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    decoding_seconds: float = 0.0  # from the first new token to the last
    cache_bytes: int = 0
    num_replaced_layers: int = 0


class Conversation:
    """Turns of a chat with a ShortV model, with the KV cache kept between turns.

    Each turn renders and tokenises the whole conversation, so answers equal those of a conversation prefilled from the
    start. Only the tokens after the longest prefix that is in the cache are computed. The decoding loop is ours,
    because `generate` of transformers 4 passes images to the model only while the cache is empty.

    Args:
        system (`str`, *optional*): the system sentence; by default the chat template's, for Vicuna that of LLaVA's
            chat.
        temperature (`float`): 0 takes the likeliest token each time.
        seed (`int`, *optional*): seed of the sampling.

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
        self.cached: list[int | Picture] = []  # tokens in the cache, see `_sequence`

        self.system = chat_system(processor) if system is None else system
        if self.system is not None and self.system not in self._render([Turn("", [])]):
            raise ShortVError("the model's chat template has no place for a system sentence; leave --system out")

    def attach(self, image: Image.Image, source: str) -> None:
        """Attach an image to the next question. `source` is its file or URL."""
        ids = process(self.processor, [picture_mark(self.processor)], [image])["input_ids"]
        num_tokens = int(visual_tokens(self.model.config, ids).sum())
        self.pending = [*self.pending, Picture(source, image, num_tokens)]

    def ask(self, question: str) -> Iterator[str]:
        """Stream the answer. If the iterator is closed early or interrupted, the answer so far is kept.

        Raises:
            ShortVError: if the conversation would be longer than the model's context; the conversation is unchanged.
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
                # Text that ends with an incomplete character waits for the rest.
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
        """Remove the last turn, if any. Its pictures go to the front of those pending for the next question."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.pending = [*turn.pictures, *self.pending]
        return turn

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self.turns, self.pending = [], []

    def set_layers(self, replaced_layers: Sequence[int] = (), attention: Sequence[int] = (), ffn: Sequence[int] = ()):
        """Set the replaced layers from the next question on, see [`ShortVConfigMixin.set_replaced_layers`].

        Raises:
            ValueError: if the layers do not fit the model.
        """
        self.model.set_replaced_layers(replaced_layers, attention, ffn)
        self.cached = []  # the cache was computed with the old layers

    def messages(self) -> list[dict]:
        """The conversation in the format of chat templates and servers."""
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
        """The prompt with one entry a token: its id, or the picture for each of a picture's visual tokens."""
        prompt, mark = self._render(turns), picture_mark(self.processor)
        self.pictures = pictures = [picture for turn in turns for picture in turn.pictures]
        if (places := prompt.count(mark)) != len(pictures):
            raise ShortVError(
                f"{places} times {mark} for {len(pictures)} images; leave {mark} out of questions, /image adds an image"
            )
        self.inputs = process(self.processor, [prompt], [picture.image for picture in pictures])
        self.positions = rope_positions(self.model, self.inputs)
        ids = self.inputs["input_ids"][0]
        visual = visual_tokens(self.model.config, ids).tolist()
        remaining = chain.from_iterable([picture] * picture.num_tokens for picture in pictures)
        return [next(remaining) if is_visual else token for token, is_visual in zip(ids.tolist(), visual)]

    def _keep_common(self, sequence: list[int | Picture]) -> list[int | Picture]:
        """Cut the cache to its longest common prefix with the sequence. Returns the rest, at least one token."""
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
        """Add tokens to the cache. Returns the logits `(1, vocabulary)` after the last token."""
        image_token, start = self.model.config.image_token_id, len(self.cached)
        inputs = {"input_ids": torch.tensor([[image_token if isinstance(e, Picture) else e for e in entries]])}
        pictures = list(dict.fromkeys(entry for entry in entries if isinstance(entry, Picture)))
        if pictures:
            found = self.inputs  # of the whole prompt
            if pictures != self.pictures:  # some are in the cache
                marks = picture_mark(self.processor) * len(pictures)
                found = process(self.processor, [marks], [picture.image for picture in pictures])
            inputs |= {name: value for name, value in found.items() if name not in PER_TOKEN}
        if "token_type_ids" in self.inputs and start < self.inputs["input_ids"].shape[1]:  # in Gemma 3's prompt
            inputs["token_type_ids"] = self.inputs["token_type_ids"][:, : start + len(entries)]
        if self.positions is not None:
            inputs["position_ids"] = self.positions.of(start, len(entries))
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        output = self.model(**inputs, **{cache_name(): self.cache}, use_cache=True, logits_to_keep=1)
        self.cached += entries  # only after the pass: `_keep_common` cuts off what an interrupted pass left
        return output.logits[:, -1].float()

    def _choose(self, logits: torch.Tensor) -> int:
        if self.warpers is None:
            return int(logits.argmax())
        return int(torch.multinomial(self.warpers(None, logits).softmax(dim=-1).cpu(), 1, generator=self.generator))
