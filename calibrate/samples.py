"""Where calibration prompts come from, and how a sample becomes model inputs."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shortv_llava.errors import ShortVError
from shortv_llava.images import open_image
from shortv_llava.prompts import VICUNA_SYSTEM

EMBEDDED = "shapes"


class Sample(NamedTuple):
    """A question about a picture; `answer` is empty where none is known."""

    id: str
    image: Path
    question: str
    answer: str = ""


def read_questions(path: Path, images: Path) -> list[Sample]:
    """Samples from LLaVA's question format: a JSON object a line with `question_id`, `image`, `text`, perhaps `answer`.

    Raises:
        ShortVError: if a file is missing, a line is no such object, or an image lies outside the folder `images`.
    """
    if not images.is_dir():
        raise ShortVError(f"{images}: no such folder of images")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ShortVError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ShortVError(f"{where}: is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ShortVError(f"{where}: must be a JSON object")
        for key in ("image", "text"):
            if not isinstance(entry.get(key), str) or not entry[key]:
                raise ShortVError(f"{where}: needs a text {key!r}")
        image = images / entry["image"]
        if not image.resolve().is_relative_to(images.resolve()):
            raise ShortVError(f"{where}: image {entry['image']!r} lies outside {images}")
        if not image.is_file():
            raise ShortVError(f"{where}: there is no image {image}")
        question = entry["text"].replace("<image>", "").strip()
        samples.append(Sample(str(entry.get("question_id", number)), image, question, str(entry.get("answer", ""))))
    if not samples:
        raise ShortVError(f"{path}: holds no questions")
    return samples


def embedded_samples() -> list[Sample]:
    """The fixed samples that come with the embedded checkpoint."""
    folder = Path(__file__).parents[1] / "checkpoints" / "samples"
    return read_questions(folder / "questions.jsonl", folder / "images")


def draw(samples: Sequence[Sample], number: int, seed: int) -> list[Sample]:
    """`number` of the samples at random, the same for the same seed.

    Raises:
        ShortVError: if there are fewer.
    """
    if number > len(samples):
        raise ShortVError(f"{number} samples were asked for, there are {len(samples)}; lower --samples")
    return random.Random(seed).sample(list(samples), number)


def make_prompt(processor, question: str, num_images: int = 1) -> str:
    """The prompt of a first turn, up to where the answer begins.

    Vicuna's system sentence is put in front where the chat template leaves it out, as those of llava-hf do.
    """
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{VICUNA_SYSTEM} {prompt}" if prompt.startswith("USER:") else prompt


def make_inputs(processor, samples: Sequence[Sample]):
    """Model inputs (a processor's output, on the CPU) for a batch of samples."""
    return processor(
        text=[make_prompt(processor, sample.question) for sample in samples],
        images=[open_image(sample.image) for sample in samples],
        padding=True,
        return_tensors="pt",
    )
