"""Sources of calibration samples, and the model inputs of a sample."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from shortv_llava.chat.images import check_sides, open_image
from shortv_llava.chat.prompts import CAPTION_PROMPT, SHORT_ANSWER_PROMPT, check_length, make_prompt, process
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.questions import read_questions
from shortv_llava.evaluation.sources import Table, stream
from shortv_llava.files.digests import digest

NAMED = ("gqa", "flickr30k", "shapes")
GQA, FLICKR30K = "lmms-lab-encoder/GQA", "lmms-lab-encoder/flickr30k"


class Sample(NamedTuple):
    """A question about a picture; `answer` is empty if it is unknown."""

    id: str
    image: Path | Image.Image
    question: str
    answer: str = ""


def check_sources(sources: Sequence[str], images: Path | None) -> None:
    """Raises [`ShortVError`] if a source of [`load_samples`] cannot exist, or is there twice."""
    for source in sources:
        if source not in NAMED and images is None:
            raise ShortVError(f"{source}: a file of questions needs the folder of its pictures, --images DIR")
        if source not in NAMED and not Path(source).is_file():
            raise ShortVError(f"{source}: no such file of questions, and none of {', '.join(NAMED)}")
    names = source_names(sources)
    if twice := [source for source, name in zip(sources, names) if names.count(name) > 1]:
        raise ShortVError(f"{twice[0]}: is given twice as a source of samples")


def source_names(sources: Sequence[str]) -> list[str]:
    """Names of sources: a file's own, with as many of its folders as tell it from the other sources."""
    paths = [(source,) if source in NAMED else Path(source).resolve().parts for source in sources]

    def name(path: tuple[str, ...]) -> str:
        others = [other for other in paths if other != path]
        tell = (n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others))
        return "/".join(path[-next(tell, len(path)) :])

    return list(map(name, paths))


def load_samples(
    sources: Sequence[str], images: Path | None, number: int, seed: int | None, at_most: bool = False
) -> dict[str, list[Sample]]:
    """`number` samples from each source, by [`source_names`]; with `at_most`, all samples of a source that has fewer.

    Args:
        sources: `gqa`, `flickr30k`, `shapes` (the embedded set), or a file of questions in LLaVA's format.
        images: folder of the pictures that question files name.
        seed: seed of the random draw; None takes the first samples.

    Raises:
        ShortVError: if a source cannot be read or holds fewer samples.
    """
    check_sources(sources, images)
    named = {"gqa": gqa_samples, "flickr30k": flickr30k_samples}
    samples = {}
    for source, name in zip(sources, source_names(sources)):
        if source in named:
            found = named[source](number, seed)
        elif source == "shapes":
            found = embedded_samples()
        else:
            found = question_samples(Path(source), images)
        drawn = draw(found, min(number, len(found)) if at_most else number, seed, name)
        samples[name] = [sample._replace(id=f"{name}/{sample.id}") for sample in drawn]
    return samples


def fit_samples(
    sources: Sequence[str], images: Path | None, number: int, seed: int | None, held_out: Sequence[Sample]
) -> list[Sample]:
    """Up to `number` samples from each source, without the pictures of held-out samples.

    Args:
        sources, images, seed: as for [`load_samples`].

    Raises:
        ShortVError: if a source cannot be read.
    """
    apart = {_picture(sample) for sample in held_out}
    found = load_samples(sources, images, number + len(held_out), seed, at_most=True)
    return [
        sample
        for several in found.values()
        for sample in [sample for sample in several if _picture(sample) not in apart][:number]
    ]


def samples_digest(samples: Sequence[Sample]) -> str:
    """A digest of the samples' pictures, questions and answers."""

    def parts(sample: Sample) -> tuple[bytes, bytes, bytes]:
        picture = sample.image.tobytes() if isinstance(sample.image, Image.Image) else sample.image.read_bytes()
        return picture, sample.question.encode(), sample.answer.encode()

    return digest("".join(digest(part) for sample in samples for part in parts(sample)).encode())


def _picture(sample: Sample):
    return hash(sample.image.tobytes()) if isinstance(sample.image, Image.Image) else sample.image


def gqa_samples(number: int, seed: int | None, repository: str = GQA) -> list[Sample]:
    """Samples of GQA's balanced testdev split. All questions are read, but pictures only until all drawn are found."""
    questions = list(stream(Table(repository, "testdev", "testdev_balanced_instructions")))
    number = min(number, len(questions))
    drawn = questions[:number] if seed is None else random.Random(seed).sample(questions, number)
    wanted, pictures = {row["imageId"] for row in drawn}, {}
    for row in stream(Table(repository, "testdev", "testdev_balanced_images")):
        if row["id"] in wanted:
            pictures[row["id"]] = row["image"]
        if len(pictures) == len(wanted):
            break
    for row in drawn:
        if row["imageId"] not in pictures:
            raise ShortVError(f"{repository}: question {row['id']} names picture {row['imageId']}, which is not there")
    return [
        Sample(row["id"], pictures[row["imageId"]], f"{row['question']}\n{SHORT_ANSWER_PROMPT}", row["answer"])
        for row in drawn
    ]


def flickr30k_samples(number: int, seed: int | None, repository: str = FLICKR30K) -> list[Sample]:
    """Samples of Flickr30K's test split, streamed, and shuffled if there is a seed."""
    rows = stream(Table(repository, "test"), shuffle_seed=seed, take=number)
    return [Sample(str(row["img_id"]), row["image"], CAPTION_PROMPT, row["caption"][0]) for row in rows]


def question_samples(path: Path, images: Path) -> list[Sample]:
    """Samples from a file in LLaVA's question format, see [`read_questions`]."""
    samples = []
    for question in read_questions(path, images):
        if not question.images:
            raise ShortVError(f"{path}: question {question.id!r} is about no picture; leave it out of calibration")
        answer = question.reference or ""
        answer = answer if isinstance(answer, str) else answer[0]
        samples.append(Sample(str(question.id), question.images[0], question.text, answer))
    return samples


def embedded_samples() -> list[Sample]:
    """The fixed samples that come with the embedded checkpoint."""
    folder = Path(__file__).parents[1] / "examples" / "shapes_llava" / "samples"
    return question_samples(folder / "questions.jsonl", folder / "images")


def draw(samples: Sequence[Sample], number: int, seed: int | None, name: str = "the data") -> list[Sample]:
    """`number` random samples, the same for the same seed; without a seed the first ones. A larger draw begins with
    the samples of a smaller one.

    Raises:
        ShortVError: if there are fewer samples.
    """
    if number > len(samples):
        raise ShortVError(
            f"{number} samples were asked for, {name} holds {len(samples)}; lower --samples or --held-out"
        )
    shuffled = list(samples) if seed is None else random.Random(seed).sample(list(samples), len(samples))
    return shuffled[:number]


def make_inputs(processor, samples: Sequence[Sample], config=None, answered: bool = False):
    """Model inputs (a processor's output, on the CPU) for a batch of samples, with their answers if `answered`.

    Raises:
        ShortVError: if a picture cannot be read, or a sample is longer than the model's context, by its `config`.
    """
    prompts = [make_prompt(processor, sample.question) for sample in samples]
    inputs = process(
        processor,
        [f"{prompt} {s.answer}" if answered else prompt for prompt, s in zip(prompts, samples)],
        [_open(sample) for sample in samples],
    )
    if config is not None:
        for sample, length in zip(samples, inputs["attention_mask"].sum(dim=1).tolist()):
            check_length(config, length, f"sample {sample.id}")
    return inputs


def _open(sample: Sample) -> Image.Image:
    if not isinstance(sample.image, Image.Image):
        return open_image(sample.image)
    check_sides(sample.image, f"sample {sample.id}, its picture")
    return sample.image.convert("RGB")
