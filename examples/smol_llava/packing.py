"""Pack questions about one picture into one row. They share the prompt's prefix and do not attend to each other.

So the language model computes a picture once for all questions about it, in training and in measurements.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from shortv_llava.examples.shapes_llava.shapes import Question
from shortv_llava.examples.shapes_llava.train import IGNORED, Row, collate
from shortv_llava.examples.smol_llava import scenes
from shortv_llava.examples.smol_llava.model import VISUAL_TOKENS
from shortv_llava.modeling_shortv_llava import FrozenTokens

UNFINISHED = "unfinished"  # kind of question with a truncated answer: its end gets no loss


class Packer:
    """Makes rows of conversations in the chat template's format, and batches of rows."""

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.encode = lru_cache(maxsize=None)(lambda text: self.tokenizer.encode(text, add_special_tokens=False))
        mark = "\N{ASTERISM}"
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": mark}]}]
        prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
        before, self.closing = prompt.split(mark)
        self.opening, self.after_image = before.split(processor.image_token)
        answer = [{"role": "assistant", "content": ""}, turn[0]]
        again = processor.apply_chat_template([*turn, *answer]).split(mark)[1]
        self.next_turn = again.removeprefix(self.closing).removesuffix(processor.image_token + self.after_image)
        self.end = self.tokenizer.eos_token
        assert self.next_turn.startswith(self.end)

    def row(self, questions: Sequence[Question], picture: bool = True, conversation: bool = False) -> Row:
        """Questions and answers with one picture or none, independent of each other or as one `conversation`."""
        row = Row([], [], [], [])
        start = row.add(self.encode(self.opening), 0, 0)
        if picture:
            start = row.add([self.processor.image_token_id] * VISUAL_TOKENS, start, 0)
        before = self.after_image if picture else ""
        for number, question in enumerate(questions):
            segment = 0 if conversation else number + 1
            end = row.add(self.encode(f"{before}{question.text}{self.closing}"), start, segment)
            end = row.add(self.encode(self.answer(question)), end, segment, learn=True)
            if conversation:
                start, before = end, self.next_turn.removeprefix(self.end)
        return row

    def answer(self, question: Question) -> str:
        """The answer to learn. With a picture it begins with a space, like the words of the alignment."""
        space = " " if question.kind in (*scenes.KINDS, scenes.NUMBER, "caption") else ""
        return space + question.answer + (self.end if question.kind != UNFINISHED else "")

    def batch(self, rows: Sequence[Row], pictures: Sequence[scenes.Scene]) -> dict[str, torch.Tensor]:
        """Model inputs and labels.

        Args:
            pictures: pictures of the rows that have one, in the order of the rows.

        Returns:
            `input_ids`, `labels` and `position_ids` (B, S), `attention_mask` (B, 1, S, S), boolean, and `pixel_values`.
        """
        return self.rows(rows) | {"pixel_values": self.pixels(pictures)}

    def rows(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """As [`batch`], without pictures."""
        return collate(rows, self.tokenizer.pad_token_id)

    def pixels(self, pictures: Sequence[scenes.Scene]) -> torch.Tensor:
        """(pictures, 3, IMAGE_SIZE, IMAGE_SIZE), float32."""
        drawn = [scenes.draw(scene) for scene in pictures]
        return self.processor.image_processor(drawn, return_tensors="pt")["pixel_values"]


def answer_states(
    model, batch: dict[str, torch.Tensor], frozen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states (N, h) of the positions that predict a label, in the order of rows, and the labels (N,).

    Args:
        frozen: tokens (B, S) that a ShortV model's replaced layers freeze instead of the visual tokens.
    """
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    if frozen is not None:
        inputs["frozen_tokens"] = FrozenTokens(frozen.to(model.device), *model.config.frozen_layers())
    states = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:].to(model.device)
    learnt = labels != IGNORED
    return states[learnt], labels[learnt]
