"""Accuracy, divergence and Layer Contribution on held-out pictures, with all questions about a picture in one row."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from shortv_llava.calibrate import Granularity, Tokens
from shortv_llava.calibrate.contribution import contributions, divergence
from shortv_llava.calibrate.samples import Sample
from shortv_llava.examples.shapes_llava.shapes import Question
from shortv_llava.examples.smol_llava import scenes
from shortv_llava.examples.smol_llava.packing import IGNORED, Packer, answer_states
from shortv_llava.modeling_shortv_llava import Correction

Asked = Sequence[tuple[scenes.Scene, Sequence[Question]]]


class Reading(NamedTuple):
    """A model's results, one entry a question, in the order of [`Meter.questions`]."""

    right: torch.Tensor  # (N,), whether the greedy answer is the expected one, word for word
    logits: torch.Tensor  # (N, vocabulary), float32, of the token after the prompt

    def kl(self, original: "Reading") -> torch.Tensor:
        """(N,), KL(self || original), as the LC scores' default direction."""
        rows = zip(original.logits.split(100), self.logits.split(100))
        return torch.cat([divergence(p, q[None], "release")[0] for p, q in rows]).cpu()

    def agrees(self, original: "Reading") -> torch.Tensor:
        """(N,), whether the likeliest token is the original's."""
        return (self.logits.argmax(-1) == original.logits.argmax(-1)).cpu()


class Meter:
    """Reads a model's answers to questions about pictures, packed.

    A greedy answer is the expected one if each token of the expected answer is the likeliest after those before, so one
    pass over prompt and expected answer is enough.

    Attributes:
        questions: all questions.
        pictures (N,): index of each question's picture.
    """

    def __init__(self, packer: Packer, asked: Asked, rows: int = 4):
        asked = sorted(asked, key=lambda entry: len(packer.row(entry[1]).input_ids))
        self.questions = [question for _, questions in asked for question in questions]
        self.pictures = torch.tensor([number for number, (_, questions) in enumerate(asked) for _ in questions])
        self.batches = []
        for start in range(0, len(asked), rows):
            pictures, questions = zip(*asked[start : start + rows])
            lengths = [len(packer.encode(packer.answer(q))) for several in questions for q in several]
            self.batches.append((packer.batch([packer.row(several) for several in questions], pictures), lengths))

    @torch.no_grad()
    def read(self, model, frozen: Callable[[dict], torch.Tensor] | None = None) -> Reading:
        """Answers of a model, plain or with frozen layers.

        Args:
            frozen: returns the tokens (B, S) of a batch to freeze instead of the visual tokens.
        """
        right, logits = [], []
        for batch, lengths in self.batches:
            states, labels = answer_states(model, batch, frozen and frozen(batch))
            found = model.lm_head(states)
            hits = (found.argmax(-1) == labels).split(lengths)
            right += [bool(hit.all()) for hit in hits]
            firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
            logits.append(found[firsts.to(found.device)].float())
        return Reading(torch.tensor(right), torch.cat(logits))

    def scores(
        self,
        model,
        tokens: Sequence[Tokens] = ("visual",),
        granularity: Granularity = "layer",
        corrections: Mapping[int, Correction] | None = None,
    ) -> torch.Tensor:
        """LC scores of the questions, float64 (sets of tokens, N, units); see [`contributions`]."""
        found = []
        for batch, _ in self.batches:
            learnt = batch["labels"] != IGNORED
            ends = (~learnt[:, :-1] & learnt[:, 1:]).nonzero(as_tuple=True)  # of the prompts
            inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
            scores = contributions(model, inputs, tokens, granularity=granularity, read=ends, corrections=corrections)
            found.append(scores.cpu())
        return torch.cat(found, dim=1)

    def accuracy(self, right: torch.Tensor) -> dict[str, float]:
        """Percent correct for each kind of question, and for all questions as `all`."""
        kinds = list(dict.fromkeys(question.kind for question in self.questions))
        kinds.sort(key=lambda kind: scenes.KINDS.index(kind) if kind in scenes.KINDS else len(scenes.KINDS))
        found = {}
        for kind in kinds:
            found[kind] = right[[question.kind == kind for question in self.questions]].float().mean().item()
        return {kind: 100 * value for kind, value in (found | {"all": right.float().mean().item()}).items()}

    def error(self, values: torch.Tensor) -> float:
        """Standard error of the mean of (N,) values, resampling pictures (200 times)."""
        values, generator = values.double(), torch.Generator().manual_seed(0)
        number = int(self.pictures[-1]) + 1
        sums = torch.zeros(number, dtype=torch.double).index_add(0, self.pictures, values)
        counts = torch.zeros(number, dtype=torch.double).index_add(0, self.pictures, torch.ones_like(values))
        drawn = torch.randint(number, (200, number), generator=generator)
        return (sums[drawn].sum(1) / counts[drawn].sum(1)).std().item()


def samples_of(asked: Asked) -> list[Sample]:
    """The questions as calibration samples."""
    flat = [(scene, question) for scene, questions in asked for question in questions]
    return [Sample(str(i), scenes.draw(scene), q.text, q.answer) for i, (scene, q) in enumerate(flat)]


@torch.no_grad()
def token_norms(model, packer: Packer, pictures: Sequence[scenes.Scene]) -> dict[str, float]:
    """Median norm of the projected tokens and of the word embeddings."""
    pixels = packer.pixels(pictures).to(model.device)
    features = model.model.vision_tower(pixels.to(model.model.vision_tower.dtype), output_hidden_states=True)
    visual = model.model.multi_modal_projector(features.hidden_states[model.config.vision_feature_layer][:, 1:])
    words = model.get_input_embeddings().weight[: packer.processor.image_token_id].float()
    return {
        name: statistics.median(rows.float().norm(dim=-1).flatten().tolist())
        for name, rows in (("visual", visual), ("words", words))
    }
