"""Answer many questions in batches; the common prefix of prompts about one picture is prefilled once."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from shortv_llava.chat.prompts import (
    TOKEN_TYPES,
    TUNING_SYSTEM,
    check_length,
    has_three_positions,
    make_prompt,
    picture_mark,
    process,
    tokenize,
    visual_tokens,
)
from shortv_llava.checkpoint.loading import cache_name
from shortv_llava.checkpoint.processors import pads
from shortv_llava.evaluation.questions import Question, open_images


class Tokens(NamedTuple):
    """Numbers of tokens by kind."""

    visual: int
    text: int

    def __add__(self, other):
        return Tokens(*map(sum, zip(self, other)))


class Answered(NamedTuple):
    """Results of a batch.

    Args:
        answers: answers, stripped of white space.
        logits: logits of the token after each prompt, (number of answers, vocabulary), float32.
        prompted: number of tokens of all prompts.
        prefilled: number of prompt tokens that the model computed; equal to `prompted` without shared prefixes.
    """

    answers: list[str]
    logits: torch.Tensor
    prompted: Tokens
    prefilled: Tokens


def sliding_window(config) -> int | None:
    """Tokens that attention of some layer is limited to; None if there is no limit."""
    text, window = config.text_config, getattr(config.text_config, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    return window if types is None or "sliding_attention" in types else None


class _FirstLogits(LogitsProcessor):
    """Keeps the scores of a generation's first token, and changes nothing."""

    logits: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.logits is None:
            self.logits = scores.clone()
        return scores


class Answerer:
    """Answers batches of questions with a model.

    Prompts about the same picture share a prefix: system sentence, visual tokens, often the question's first words. The
    prefix is prefilled once, and its keys and values serve all questions about the picture.

    Args:
        batch_size: largest number of rows in a forward pass.
        max_new_tokens: limit for an answer.
        shared_prefix: whether to prefill a picture once; if not, once for each question about it.
        temperature: 0 takes the likeliest token each time.
        seed: seed of the sampling, for each batch.
        vicuna_system: see [`make_prompt`].

    Attributes:
        settings: settings that answers depend on, in addition to model, layers and question.
    """

    def __init__(
        self,
        model,
        processor,
        batch_size: int = 16,
        max_new_tokens: int = 128,
        shared_prefix: bool = True,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        vicuna_system: str = TUNING_SYSTEM,
    ):
        self.model, self.processor, self.batch_size, self.seed = model, processor, batch_size, seed
        self.vicuna_system = vicuna_system
        processor.tokenizer.padding_side = "left"
        self.has_three_positions = has_three_positions(model)
        question = "\N{ASTERISM}"
        prompt = make_prompt(processor, question, 1, vicuna_system)
        self.shared_prefix = shared_prefix and prompt.index(picture_mark(processor)) < prompt.index(question)
        self.generation = {"max_new_tokens": max_new_tokens, "do_sample": False, "temperature": None, "top_p": None}
        if temperature > 0:
            self.generation |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
        self.settings = {key: value for key, value in self.generation.items() if value is not None}
        self.settings |= {"dtype": str(model.dtype).removeprefix("torch.")}
        self.settings |= {"image_aspect_ratio": "pad" if pads(processor) else "base"}
        if temperature > 0:
            self.settings |= {"seed": seed}

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        """The questions in batches for [`Answerer.answer`]: those about one picture together, then by length.

        A batch has at most `batch_size` questions, or all those about one picture.
        """
        groups = [[questions[number] for number in group] for group in self._groups(questions)]
        batches: list[list[Question]] = []
        for group in sorted(groups, key=lambda group: max(len(question.text) for question in group)):
            if not batches or len(batches[-1]) + len(group) > self.batch_size:
                batches.append([])
            batches[-1] += group
        return batches

    def _groups(self, questions: Sequence[Question]) -> list[list[int]]:
        """Groups of indices of questions that can share a prefix."""
        groups: dict[object, list[int]] = {}
        for number, question in enumerate(questions):
            shares = self.shared_prefix and question.image_id is not None and len(question.images) == 1
            groups.setdefault((question.image_id, None) if shares else number, []).append(number)
        return list(groups.values())

    @torch.no_grad()
    def answer(self, batch: Sequence[Question]) -> Answered:
        """Answers to a batch, in its order.

        Raises:
            ShortVError: if a picture cannot be read.
        """
        torch.manual_seed(self.seed)
        groups = self._groups(batch)
        if len(groups) < len(batch):
            return self._answer_groups(batch, [self._prompt(question) for question in batch], groups)
        inputs = self.inputs(batch)
        for question, length in zip(batch, inputs["attention_mask"].sum(dim=1).tolist()):
            check_length(self.model.config, length, f"question {question.id!r}")
        visual = self._num_visual(inputs["input_ids"])
        tokens = Tokens(visual, int(inputs["attention_mask"].sum()) - visual)
        return Answered(*self._generate(inputs), tokens, tokens)

    def inputs(self, batch: Sequence[Question]):
        """Model inputs for a batch, each question with its own picture."""
        prompts = [self._prompt(question) for question in batch]
        return self._process(prompts, [picture for question in batch for picture in open_images(question)])

    def _answer_groups(self, batch: Sequence[Question], prompts: list[str], groups: list[list[int]]) -> Answered:
        """Answers to a batch; the common prefix of each group is prefilled once."""
        firsts = [group[0] for group in groups]
        inputs = self._process(
            [prompts[n] for n in firsts], [picture for n in firsts for picture in open_images(batch[n])]
        )
        beginnings, rests = [], []
        prompted = prefilled = Tokens(0, 0)
        for index, group in enumerate(groups):
            ids, mask = inputs["input_ids"][index], inputs["attention_mask"][index]
            visual, rows = self._num_visual(ids), [ids[mask.bool()].tolist()]
            if len(group) > 1:
                rows = self._rows_of_group(rows[0], [prompts[n] for n in group], batch[group[0]])
            for number, row in zip(group, rows):
                check_length(self.model.config, len(row), f"question {batch[number].id!r}")
            beginning = os.path.commonprefix([row[:-1] for row in rows])  # the last token gives the logits
            beginnings.append(beginning)
            rests += [(number, index, row[len(beginning) :]) for number, row in zip(group, rows)]
            total, repeated = sum(map(len, rows)), (len(group) - 1) * len(beginning)
            prompted += Tokens(visual * len(group), total - visual * len(group))
            prefilled += Tokens(visual, total - repeated - visual)

        inputs.update(self._pad(beginnings))
        for name in TOKEN_TYPES:
            if name in inputs:
                inputs[name] = visual_tokens(self.model.config, inputs["input_ids"]).long()
        if not self.has_three_positions:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache()
        self.model(**inputs, **{cache_name(): cache}, use_cache=True, logits_to_keep=1)
        deltas = self.model.model.rope_deltas if self.has_three_positions else None
        answers, logits = [""] * len(batch), [None] * len(batch)
        for part in self._parts(rests, inputs["input_ids"].shape[1]):
            numbers, indices, ids = zip(*part)
            indices, tail = torch.tensor(indices, device=self.model.device), self._pad(ids)

            def of_rows(states: torch.Tensor, indices=indices) -> torch.Tensor:
                # The cache copies the states, so one picture's states are only expanded here.
                return states[indices] if len(groups) > 1 else states.expand(len(indices), -1, -1, -1)

            copied = DynamicCache()
            for layer, states in enumerate(cache.layers):
                copied.update(of_rows(states.keys), of_rows(states.values), layer)
            joined = {key: torch.cat([inputs[key][indices], tail[key]], dim=1) for key in tail}
            if deltas is not None:  # `generate` goes on from these
                self.model.model.rope_deltas = deltas[indices]
            for number, answer, row in zip(numbers, *self._generate(joined, **{cache_name(): copied})):
                answers[number], logits[number] = answer, row
        return Answered(answers, torch.stack(logits), prompted, prefilled)

    def _parts(self, rests: list[tuple[int, int, list[int]]], num_before: int) -> Iterator[list]:
        """Rests of prompts (number, index of its beginning, ids) to answer together, behind `num_before` tokens.

        Shorter rests are padded behind their beginnings. A sliding window counts this padding, so where it could end
        within the prompt only rests of one length go together.
        """
        window, longest = sliding_window(self.model.config), max(len(ids) for _, _, ids in rests)
        alike = [rests]
        if window and num_before + longest + self.generation["max_new_tokens"] > window:
            by_length = {}
            for rest in rests:
                by_length.setdefault(len(rest[2]), []).append(rest)
            alike = by_length.values()
        for several in alike:
            for start in range(0, len(several), self.batch_size):
                yield several[start : start + self.batch_size]

    def _rows_of_group(self, first: list[int], prompts: list[str], question: Question) -> list[list[int]]:
        """Token ids of prompts about the question's one picture, the first of which has the ids `first`."""
        mark = self.processor.tokenizer.convert_tokens_to_ids(picture_mark(self.processor))
        behind = [ids[ids.index(mark) + 1 :] for ids in tokenize(self.processor, prompts)]
        beginning = first[: len(first) - len(behind[0])]
        if beginning + behind[0] == first:
            return [beginning + ids for ids in behind]
        # The text that the processor puts around the picture and what follows share a token.
        pictures = open_images(question)
        return [self._process([prompt], pictures)["input_ids"][0].tolist() for prompt in prompts]

    def _prompt(self, question: Question) -> str:
        return make_prompt(self.processor, question.text, len(question.images), self.vicuna_system)

    def _process(self, prompts: list[str], pictures: list):
        return process(self.processor, prompts, pictures).to(self.model.device, self.model.dtype)

    def _pad(self, ids: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Rows of token ids, padded on the left, with their mask."""
        padded = self.processor.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(self.model.device)
        return {key: padded[key] for key in ("input_ids", "attention_mask")}

    def _generate(self, inputs, **kwargs) -> tuple[list[str], torch.Tensor]:
        """Answers, and the logits of their first tokens."""
        first = _FirstLogits()
        kwargs |= {"logits_processor": LogitsProcessorList([first])} | self.generation
        tokens = self.model.generate(**inputs, **kwargs, pad_token_id=self.processor.tokenizer.pad_token_id)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)], first.logits

    def _num_visual(self, ids: torch.Tensor) -> int:
        return int(visual_tokens(self.model.config, ids).sum())
