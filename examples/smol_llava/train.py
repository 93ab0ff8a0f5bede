"""Train the LLaVA: tower and projector aligned with the word embeddings, then LoRA on the language model.

1. Stage 1, alignment, without the language model: the target of a patch's projected token is the sum of the word
   embeddings for what the patch shows, with about a word's norm. Afterwards tower and projector are fixed.
2. Stage 2: LoRA on the language model, by the loss on answers, first on pictures of one object, then of more and more.
   Text-only turns with the original model's own answers are mixed in, so that it stays a language model.

Further runs examine what makes visual layers redundant: `frozen` continues to train tower and projector through the
frozen language model, for a short and a longer time; `scaled` does the same with projected tokens of several times the
norm.

Another training continues from what was trained, on pictures that have two written numbers each, and teaches it to
read them: alignment again, in which a patch's words are its digit, colour and place in the number, then LoRA.

An interrupted run continues where it stopped: the number of a step is the seed of its pictures. At milestones
Layer Contribution and accuracy are measured and written to a log.
"""

import json
import random
import shutil
from dataclasses import astuple
from functools import partial
from itertools import chain, product
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from shortv_llava.examples.shapes_llava.shapes import Question
from shortv_llava.examples.shapes_llava.train import run
from shortv_llava.examples.smol_llava import scenes
from shortv_llava.examples.smol_llava.measure import Meter, token_norms
from shortv_llava.examples.smol_llava.model import (
    PATCH,
    WEIGHTS,
    attach_adapters,
    detach_adapters,
    make_llava,
    make_processor,
    save_trained,
    trained_parts,
)
from shortv_llava.examples.smol_llava.packing import UNFINISHED, Packer, answer_states
from shortv_llava.examples.smol_llava.prompts import TRAINING_PROMPTS
from shortv_llava.files.json_lines import add_to_record, read_record
from shortv_llava.files.outputs import replacing_file

ALIGNMENT = {"steps": 600, "lr": 1e-3}
ALIGNMENT_PICTURES = 64  # a step
STAGE2 = {"steps": 500, "lr": 1e-3}
STAGE2_PICTURES = 3  # a step
ALONE, MORE = 80, 30  # steps of stage 2 with one object a picture; and steps before one more is allowed
FROZEN = {"steps": 50, "lr": 4e-4, "pictures": 3}
LONGER = {"steps": 80, "lr": 4e-4, "pictures": 2}
READ_ALIGNMENT = {"steps": 300, "lr": 1e-3}
READ_STAGE2 = {"steps": 200, "lr": 5e-4}
SCALE = 8  # factor of the projected tokens' norm in the run `scaled`
MILESTONES = 100  # steps of stage 2 between two milestones
SAVE_EVERY = 10
QUESTIONS = 12  # about each picture
CONVERSATIONS = 0.15  # share of rows that are conversations; in others no question attends to another
CAPTIONS = 0.3  # share of rows with a caption
TEXTS = 3  # prompts without a picture, in every fourth step of stage 2
ANSWER_TOKENS = 64
LC_SAMPLES = 12  # at milestones
NOTHING = "background"
WORDS = (*chain(*scenes.VALUES.values()), "top", "bottom", "left", "right", *scenes.ORDINALS, *"0123456789", NOTHING)


def patch_words(scene: scenes.Scene) -> list[tuple[str, ...]]:
    """The words for what each patch shows, in reading order."""
    side, times = scenes.IMAGE_SIZE // PATCH, scenes.CELL // PATCH
    objects = {item.cell: item for item in scene.objects}
    found = []
    for row, column in product(range(side), repeat=2):
        cell = row // times * scenes.GRID + column // times
        item = objects.get(cell)
        found.append(item.words if item else (NOTHING, *scenes.quadrant(cell).split()))
    for number in scene.numbers:
        for index, digit in enumerate(number.digits):
            column = number.column(index) // PATCH
            words = (digit, scenes.ORDINALS[index], number.color)
            for row in range(number.cell // scenes.GRID * times, (number.cell // scenes.GRID + 1) * times):
                found[row * side + column] = words
    return found


def patch_targets(scene: scenes.Scene, embeddings: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets of the projected tokens, (patches, h), and which patches show something, (patches,).

    Args:
        embeddings: embedding by word, (h,).
    """
    shown = patch_words(scene)
    # The embeddings are nearly orthogonal, so the sum divided by the root has about the norm of one embedding.
    targets = {words: sum(embeddings[word] for word in words) / len(words) ** 0.5 for words in set(shown)}
    return torch.stack([targets[words] for words in shown]), torch.tensor([NOTHING not in words for words in shown])


class Training:
    """The model and all training runs, with their states in the folder `work`.

    Args:
        language_model: in the dtype to train in.
        numbers: number of written numbers in every picture.
    """

    def __init__(self, work: Path, language_model, tokenizer, numbers: int = 0):
        self.work, self.log, self.numbers = work, work / "training.jsonl", numbers
        self.run = partial(run, dtype=language_model.dtype)
        work.mkdir(parents=True, exist_ok=True)
        self.processor = make_processor(tokenizer)
        self.packer = Packer(self.processor)
        self.texts = self.own_answers(language_model)
        self.model = make_llava(language_model, self.processor)
        if torch.cuda.is_available():
            self.model.cuda()
        self.parts = trained_parts(self.model)
        asked = scenes.held_out(40, 8, seed="milestones", numbers=numbers)
        self.meter = Meter(self.packer, asked)
        self.lc_meter = Meter(self.packer, [(scene, questions[:1]) for scene, questions in asked[:LC_SAMPLES]])
        self.pictures = [scene for scene, _ in asked]

    @torch.no_grad()
    def own_answers(self, language_model) -> list[Question]:
        """The language model's answers to the text-only prompts, truncated if long; cached in the folder."""
        kept = self.work / "answers.json"
        if kept.exists():
            return [Question(*entry) for entry in json.loads(kept.read_text())]
        prompts = [
            self.processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            for prompt in TRAINING_PROMPTS
        ]
        inputs = self.processor.tokenizer(prompts, padding=True, return_tensors="pt")
        tokens = language_model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers = self.processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
        end = self.packer.end
        texts = [
            Question("text" if end in answer else UNFINISHED, prompt, answer.split(end)[0])
            for prompt, answer in zip(TRAINING_PROMPTS, answers)
        ]
        with replacing_file(kept) as unfinished:
            unfinished.write_text(json.dumps([astuple(text) for text in texts]))
        return texts

    def run_all(self, output: Path) -> None:
        """Train the shipped weights, write them and the log to `output`, then make the runs for comparison."""
        self.align("alignment", **ALIGNMENT)
        self.milestone("alignment", ALIGNMENT["steps"], None)
        self.stage_2("stage 2", output, **STAGE2)
        self.through_language_model("frozen", **FROZEN)
        self.through_language_model("frozen, longer", **LONGER)
        self.restore("alignment")
        with torch.no_grad():
            for weight in self.model.model.multi_modal_projector.linear_2.parameters():
                weight.mul_(SCALE)
        self.through_language_model("scaled", **FROZEN)
        shutil.copyfile(self.log, output / self.log.name)

    def read_numbers(self, trained: Path, output: Path) -> None:
        """Continue from the weights in `trained`, with numbers in the pictures, and write the result to `output`."""
        adapters = attach_adapters(self.model)
        trained_parts(self.model, adapters).load_state_dict(load_file(trained / WEIGHTS), strict=False)
        detach_adapters(self.model, adapters, merge=False)
        self.align("alignment, numbers", **READ_ALIGNMENT)
        self.milestone("alignment, numbers", READ_ALIGNMENT["steps"], None)
        self.stage_2("stage 2, numbers", output, **READ_STAGE2, start=adapters.state_dict())

    def restore(self, name: str) -> None:
        """Restore the state at the end of a run of tower and projector."""
        self.parts.load_state_dict(torch.load(self.work / f"{name}.pt", weights_only=True)["modules"])

    def align(self, name: str, steps: int, lr: float) -> None:
        encode = partial(self.processor.tokenizer.encode, add_special_tokens=False)
        with torch.no_grad():
            table = self.model.get_input_embeddings().weight
            # The last token, because a digit is a token of its own after that of the space.
            embeddings = {word: table[encode(f" {word}")[-1]].float().cpu() for word in WORDS}

        def loss_of(step: int) -> torch.Tensor:
            rng = random.Random(f"{name}/{step}")
            pictures = [scenes.make_scene(rng, numbers=self.numbers) for _ in range(ALIGNMENT_PICTURES)]
            pixels = self.packer.pixels(pictures).to(self.model.device)
            states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            tokens = self.model.model.multi_modal_projector(states[self.model.config.vision_feature_layer][:, 1:])
            targets, shown = map(torch.stack, zip(*(patch_targets(scene, embeddings) for scene in pictures)))
            targets, shown = targets.to(tokens.device), shown.to(tokens.device)
            misses = (tokens.float() - targets).square().sum(-1) / targets.square().sum(-1)
            return misses[shown].mean() + 0.2 * misses[~shown].mean()

        self.run(name, self.parts, loss_of, self.work, steps, lr)

    def through_language_model(self, name: str, steps: int, lr: float, pictures: int) -> None:
        """Train tower and projector by the loss of the unchanged language model."""

        def saved(step: int, loss: float) -> None:
            if step == steps:
                self.milestone(name, step, loss)

        self.run(name, self.parts, partial(self.loss, name, pictures), self.work, steps, lr, SAVE_EVERY, saved)

    def stage_2(
        self, name: str, output: Path, steps: int, lr: float, start: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Train LoRA, from zero or from the adapters `start`."""
        adapters = attach_adapters(self.model).to(self.model.device)
        if start is not None:
            adapters.load_state_dict(start)
        parts = trained_parts(self.model, adapters)

        def loss_of(step: int) -> torch.Tensor:
            most = scenes.MAX_OBJECTS
            if start is None:
                most = 1 if step < ALONE else min(most, 2 + (step - ALONE) // MORE)
            return self.loss(name, STAGE2_PICTURES, step, most, texts=True)

        def saved(step: int, loss: float) -> None:
            if step % MILESTONES == 0:
                self.milestone(name, step, loss)
            save_trained(parts, output)
            shutil.copyfile(self.log, output / self.log.name)

        self.parts.requires_grad_(False)
        trained = nn.ModuleDict({"adapters": adapters})
        self.run(name, trained, loss_of, self.work, steps, lr, SAVE_EVERY, saved)
        detach_adapters(self.model, adapters, merge=False)
        self.parts.requires_grad_(True)

    def loss(
        self, name: str, number: int, step: int, most: int = scenes.MAX_OBJECTS, texts: bool = False
    ) -> torch.Tensor:
        """Cross-entropy of the answers in a step's conversations about a `number` of pictures of `most` objects."""
        rng = random.Random(f"{name}/{step}")
        pictures = [scenes.make_scene(rng, rng.randint(1, most), self.numbers) for _ in range(number)]
        rows = []
        for scene in pictures:
            questions = scenes.ask_several(scene, QUESTIONS, rng)
            if rng.random() < CAPTIONS:
                questions[rng.randrange(len(questions))] = scenes.caption(scene)
            rows.append(self.packer.row(questions, conversation=rng.random() < CONVERSATIONS))
        if texts and step % 4 == 3:
            rows.append(self.packer.row(rng.sample(self.texts, TEXTS), picture=False))
        states, labels = answer_states(self.model, self.packer.batch(rows, pictures))
        return nn.functional.cross_entropy(self.model.lm_head(states).float(), labels)

    def milestone(self, name: str, step: int, loss: float | None) -> None:
        """Measure and write a line of the log, unless it is already written."""
        if any((entry["run"], entry["step"]) == (name, step) for _, entry in read_record(self.log)):
            return
        entry = {
            "run": name,
            "step": step,
            "loss": loss,
            "accuracy": self.meter.accuracy(self.meter.read(self.model).right),
            "lc": self.lc_meter.scores(self.model)[0].mean(0).tolist(),
            "norms": token_norms(self.model, self.packer, self.pictures),
        }
        add_to_record(self.log, [entry])
        print(f"{name} {step}: loss {loss}, {entry['accuracy']}", flush=True)
