"""The model `shortv_llava` of lmms-eval: requests become questions, and each picture is prefilled once."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import handle_arg_string
from PIL import Image
from tqdm import tqdm

from shortv_llava.chat.images import open_image
from shortv_llava.chat.prompts import make_prompt, picture_mark, process, tokenize
from shortv_llava.checkpoint.loading import load
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.answering import Answerer
from shortv_llava.evaluation.questions import Question, open_images

MAX_NEW_TOKENS = 1024  # if a task sets none, as for the harness's own LLaVA
FEWSHOT_DELIMITER = "\n\n"


class ShortVLlava(lmms):
    """A ShortV package, or a LLaVA checkpoint, for tasks about pictures and text.

    Pictures are read when a request is processed. They come before the text, unless the text has an `<image>` for each.

    Args:
        pretrained: folder or Hub id.
        replaced_layers, dtype, device_map, load_in_4bit, load_in_8bit, image_aspect_ratio: as for [`load`].
        device, batch_size: the harness's options.
        shared_prefix: whether to prefill a picture once for all requests about it in this process.

    Raises:
        ShortVError: if the model cannot be loaded, or the batch size is no number.
    """

    def __init__(
        self,
        pretrained: str,
        replaced_layers: str | int | None = None,
        dtype: str = "auto",
        device_map: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        shared_prefix: bool = True,
        image_aspect_ratio: str = "pad",
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) == 0:
            raise ShortVError(f"--batch_size takes a number of rows, not {batch_size!r}")
        self.batch_size, self.shared_prefix = int(batch_size), shared_prefix
        layers = None if replaced_layers is None else str(replaced_layers)  # a single layer arrives as a number
        loaded = load(pretrained, layers, dtype, device_map or device, load_in_4bit, load_in_8bit, image_aspect_ratio)
        self.model, self.processor, self.folder = loaded.model, loaded.processor, loaded.folder
        self.device = self.model.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "ShortVLlava":
        """The model that `--model_args` describes. Unlike in the harness's own parser, layers may contain commas.

        Raises:
            ShortVError: if the text is not `name=value,…`, or the constructor raises it.
        """
        arguments = {}
        for argument in filter(None, re.split(r",(?=\s*\w+=)", arg_string)):
            name, equals, value = argument.partition("=")
            if not equals:
                raise ShortVError(f"--model_args takes name=value, separated by commas, not {argument!r}")
            arguments[name.strip()] = handle_arg_string(value)
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**arguments, **given)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, in the order of the requests."""
        questions = self._questions(requests)
        return self._answer(questions, [request.args[1] for request in requests])

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds; after each round the task's `doc_to_text` gives the next question."""
        outputs: list[list[str]] = [[] for _ in requests]
        infos: list[Any] = [None] * len(requests)
        asked, finished_rounds = self._questions(requests), 0
        while asked:
            answers = self._answer(asked, [requests[question.id].args[1] for question in asked])
            finished_rounds += 1
            following = []
            for number, answer in zip([question.id for question in asked], answers):
                visuals, text, is_last, outputs[number], infos[number] = requests[number].args[3](
                    self._doc(requests[number]),
                    previous_output=[*outputs[number], answer],
                    round_idx=finished_rounds,
                    previous_round_info=infos[number],
                )
                if not is_last:
                    following.append(self._question(number, text, partial(_pictures, visuals)))
            asked = following
        return outputs

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """The mean loss of each continuation, and whether each of its tokens is the likeliest.

        Despite the method's name it is a loss, as in the harness's own LLaVA and as its multiple choice expects. Pairs
        are wrapped, because the harness converts a bare pair to a string and cannot score that.
        """
        continuations = [request.args[1] for request in requests]
        for number, request in enumerate(requests):
            if callable(continuations[number]):
                continuations[number] = continuations[number](self._doc(request))
        results = {}
        questions = sorted(self._questions(requests), key=lambda question: len(question.text))
        with self._progress(questions) as bar:
            for start in range(0, len(questions), self.batch_size):
                batch = questions[start : start + self.batch_size]
                found = self._score(batch, [continuations[question.id] for question in batch])
                results |= zip([question.id for question in batch], found)
                bar.update(len(batch))
        return [GenerationResult(results[number]) for number in range(len(requests))]

    def _score(self, batch: Sequence[Question], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """Mean loss of each continuation, which ends its row, and whether it is the likeliest."""
        prompts = [make_prompt(self.processor, question.text, len(question.images)) for question in batch]
        texts = [prompt + continuation for prompt, continuation in zip(prompts, continuations)]
        lengths = [
            len(whole) - len(os.path.commonprefix([beginning, whole]))
            for beginning, whole in zip(tokenize(self.processor, prompts), tokenize(self.processor, texts))
        ]
        pictures = [picture for question in batch for picture in open_images(question)]
        inputs = process(self.processor, texts, pictures, padding_side="left").to(self.device, self.model.dtype)
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        longest = max(lengths)
        output = self.model(**inputs, position_ids=positions, logits_to_keep=longest + 1)
        logits, targets = output.logits[:, :-1].float(), inputs["input_ids"][:, -longest:]  # of the last `longest`
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        hits = logits.argmax(dim=-1) == targets
        return [
            (loss[-length:].mean().item(), bool(hit[-length:].all()))
            for loss, hit, length in zip(losses, hits, lengths)
        ]

    def _answer(self, questions: Sequence[Question], settings: Sequence[dict]) -> list[str]:
        """Answers to questions, in their order, each by its own generation settings."""
        alike: dict[tuple, list[Question]] = {}
        for question, setting in zip(questions, settings):
            alike.setdefault(_generation(setting), []).append(question)
        answers = {}
        with self._progress(questions) as bar:
            for (max_new_tokens, temperature, top_p), group in alike.items():
                answerer = Answerer(
                    self.model, self.processor, self.batch_size, max_new_tokens, self.shared_prefix, temperature, top_p
                )
                for batch in answerer.batches(group):
                    # Drawn from the harness's --seed, so that repeats of a request in other batches differ.
                    answerer.seed = int(torch.randint(2**31, ()))
                    answers |= zip([question.id for question in batch], answerer.answer(batch).answers)
                    bar.update(len(batch))
        return [_until(answers[question.id], setting) for question, setting in zip(questions, settings)]

    def _progress(self, questions: Sequence[Question]) -> tqdm:
        return tqdm(total=len(questions), desc="questions", unit="q", disable=self.rank != 0)

    def _questions(self, requests: Sequence[Instance]) -> list[Question]:
        """The first question of each request, with the request's number as id."""
        with tqdm(requests, desc="pictures", disable=self.rank != 0) as bar:
            return [
                self._question(number, request.args[0], partial(self._request_pictures, request))
                for number, request in enumerate(bar)
            ]

    def _question(self, number: int, text: str, pictures: Callable[[], list[Image.Image]]) -> Question:
        """A question about pictures. They are read now for their digests, and again when they are needed."""
        found, token = pictures(), picture_mark(self.processor)
        is_placed = 0 < text.count(token) == len(found)
        if not is_placed:
            text = text.replace(token, "")
        images = tuple(partial(_picture, pictures, index) for index in range(len(found)))
        return Question(number, text, images, None if is_placed or not found else _digest(found))

    def _request_pictures(self, request: Instance) -> list[Image.Image]:
        return _pictures(request.args[2](self._doc(request)))

    def _doc(self, request: Instance) -> dict:
        *_, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]


def _pictures(visuals: Sequence | None) -> list[Image.Image]:
    """The pictures that a task's `doc_to_visual` returns: pictures, files of pictures, or nothing.

    Raises:
        ShortVError: if it returns anything else, such as a video.
    """
    pictures = []
    for visual in visuals or ():
        if isinstance(visual, str):
            pictures.append(open_image(Path(visual)))
        elif isinstance(visual, Image.Image):
            pictures.append(visual)
        elif visual is not None:
            raise ShortVError(f"this model takes pictures and text, but a task gives {type(visual).__name__}")
    return pictures


def _picture(pictures: Callable[[], list[Image.Image]], index: int) -> Image.Image:
    return pictures()[index]


def _digest(pictures: Sequence[Image.Image]) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(str(picture.size).encode())
        digest.update(picture.convert("RGB").tobytes())  # what the model sees
    return digest.hexdigest()


def _generation(settings: dict) -> tuple[int, float, float]:
    """Maximal number of new tokens, temperature and top_p of a task's `generation_kwargs`.

    Raises:
        ShortVError: if they ask for beams.
    """
    if (settings.get("num_beams") or 1) > 1:
        raise ShortVError("beam search is not supported; give --gen_kwargs num_beams=1")
    max_new_tokens, temperature = settings.get("max_new_tokens") or MAX_NEW_TOKENS, settings.get("temperature") or 0.0
    if temperature == 0 or settings.get("do_sample") is False:
        return max_new_tokens, 0.0, 1.0
    return max_new_tokens, temperature, settings.get("top_p") or 1.0


def _until(answer: str, settings: dict) -> str:
    """The answer up to the first of a task's stop strings."""
    stops = settings.get("until") or ()
    for stop in [stops] if isinstance(stops, str) else stops:
        # If a task names none, the harness passes its few-shot delimiter, which also separates LLaVA's paragraphs.
        if stop and stop != FEWSHOT_DELIMITER:
            answer = answer.split(stop)[0]
    return answer.strip()


MANIFEST = ModelManifest(
    model_id="shortv_llava", simple_class_path=f"{ShortVLlava.__module__}.{ShortVLlava.__qualname__}"
)
