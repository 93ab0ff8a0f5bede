"""Train the embedded LLaVA from scratch: `python -m shortv_llava.examples.shapes_llava.train --work training`.

1. Vision tower and projector are aligned with the word embeddings: the visual token of a patch becomes similar to the
   words for what the patch shows. Attention can then find an object by similarity to the question's words.
2. A few layers of the language model are trained on questions and answers, with the loss on the answers only. With all
   twelve layers at once, the model learns late or never to look for the object that a question names.
3. The other layers are added, at first without any effect, and all layers are trained.

An interrupted run continues where it stopped: the number of a step is the seed of its pictures.
"""

import json
import os
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from shortv_llava.chat.prompts import CAPTION_PROMPT, CHAT_SYSTEM
from shortv_llava.checkpoint.chat_templates import FORMATS
from shortv_llava.examples.shapes_llava import CHECKPOINT, shapes

PATCH = 12  # pixels; 96 / 12 = 8, squared = 64 visual tokens
ALIGNMENT = {"steps": 1600, "lr": 1e-3}
SHALLOW = {"steps": 800, "lr": 1e-3}
TRAINING = {"steps": 500, "lr": 6e-4}
FIRST_LAYERS = (0, 3, 6, 9)
PICTURES = 20  # a step; for alignment more
ALIGNMENT_PICTURES = 64
QUESTIONS = 12  # about a picture
CONVERSATIONS = 0.2  # share of rows that are conversations; in others no question attends to another
KIND_WEIGHTS = (2, 1, 1, 1, 2)  # how often each of shapes.KINDS is asked
SAMPLES = 60  # for calibration and tests
IGNORED = -100  # label of tokens without loss
BOS, EOS, IMAGE, PAD, UNKNOWN = "<s>", "</s>", "<image>", "<pad>", "<unk>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt on the questions, with Llama's special tokens and LLaVA's two after them."""
    corpus = [CHAT_SYSTEM, "USER: \n ASSISTANT:", CAPTION_PROMPT]
    for index in range(2000):
        rng = random.Random(f"tokenizer/{index}")
        scene = shapes.make_scene(rng)
        corpus += [shapes.caption(scene)]
        corpus += [
            f" {part}" for question in shapes.ask_several(scene, 3, rng) for part in (question.text, question.answer)
        ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=[UNKNOWN, BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_processor() -> LlavaProcessor:
    side = {"height": shapes.IMAGE_SIZE, "width": shapes.IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": shapes.IMAGE_SIZE}, crop_size=side),
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=FORMATS["llava_v1"],
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        initializer_range=0.05,  # the usual 0.02 is for wider models
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=shapes.IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=192,
    )
    image_token = tokenizer.convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(shapes.IMAGE_SIZE // PATCH) ** 2,
    )
    return LlavaForConditionalGeneration(config)


def pixels(scenes: list[shapes.Scene], processor: CLIPImageProcessor) -> torch.Tensor:
    """(batch, 3, 96, 96), float32."""
    return processor([shapes.draw(scene) for scene in scenes], return_tensors="pt")["pixel_values"]


def patch_words(scene: shapes.Scene) -> list[list[float]]:
    """For each patch in reading order, which of shapes.WORDS describe the object whose disc contains its centre."""
    side, found = shapes.IMAGE_SIZE // PATCH, []
    for row in range(side):
        for column in range(side):
            x, y = (column + 0.5) * PATCH, (row + 0.5) * PATCH
            inside = [o.words for o in scene.objects if (o.center[0] - x) ** 2 + (o.center[1] - y) ** 2 < o.radius**2]
            found.append([float(any(word in words for words in inside)) for word in shapes.WORDS])
    return found


class Row(NamedTuple):
    """Questions and answers about one picture, one list item a token."""

    input_ids: list[int]
    labels: list[int]  # the answers; IGNORED elsewhere
    position_ids: list[int]
    segments: list[int]  # all later tokens attend to segment 0; to other segments only their own tokens

    def add(self, tokens: list[int], position: int, segment: int, learn: bool = False) -> int:
        """Append tokens with positions from `position` on; returns the position after them."""
        self.input_ids.extend(tokens)
        self.labels.extend(tokens if learn else [IGNORED] * len(tokens))
        self.position_ids.extend(range(position, position + len(tokens)))
        self.segments.extend([segment] * len(tokens))
        return position + len(tokens)


def collate(rows: Sequence[Row], pad_token: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` and `position_ids` (B, S), and `attention_mask` (B, 1, S, S), boolean, by the segments."""
    length = max(len(row.input_ids) for row in rows)
    fill = Row(pad_token, IGNORED, 0, -1)
    columns = [
        torch.tensor([tokens + [value] * (length - len(tokens)) for tokens in column])
        for column, value in zip(zip(*rows), fill)
    ]
    batch = Row(*columns)._asdict()
    segments = batch.pop("segments")
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    batch["attention_mask"] = (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    return batch


class Conversations:
    """Batches of questions about pictures: as conversations, or each question independently.

    Earlier questions of a conversation reveal what is in the picture. Trained only on conversations, a model learns to
    guess from them and never looks for the object that a question names.
    """

    def __init__(self, processor: LlavaProcessor, image_tokens: int):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.encode = lru_cache(maxsize=None)(lambda text: self.tokenizer.encode(text, add_special_tokens=False))
        self.image_tokens = image_tokens

    def questions(self, scene: shapes.Scene, rng: random.Random) -> list[tuple[str, str]]:
        asked = shapes.ask_several(scene, QUESTIONS, rng, KIND_WEIGHTS)
        turns = [(question.text, question.answer) for question in asked]
        if rng.random() < 0.25:
            turns[rng.randrange(len(turns))] = (CAPTION_PROMPT, shapes.caption(scene))
        return turns

    def row(self, turns: list[tuple[str, str]], conversation: bool) -> Row:
        prefix = [
            self.tokenizer.bos_token_id,
            *self.encode(f"{CHAT_SYSTEM} USER: "),
            *self.encode(IMAGE) * self.image_tokens,
        ]
        row = Row([], [], [], [])
        start = row.add(prefix, 0, 0)
        for number, (question, answer) in enumerate(turns):
            opening = "USER: " if conversation and number else "\n"
            segment = 0 if conversation else number + 1
            end = row.add(self.encode(f"{opening}{question} ASSISTANT:"), start, segment)
            end = row.add(self.encode(f" {answer}{EOS}"), end, segment, learn=True)
            if conversation:
                start = end
        return row

    def batch(self, seed: str) -> dict[str, torch.Tensor]:
        """Inputs and labels of a step."""
        rng = random.Random(seed)
        scenes = [shapes.make_scene(rng) for _ in range(PICTURES)]
        rows = [self.row(self.questions(scene, rng), rng.random() < CONVERSATIONS) for scene in scenes]
        return collate(rows, self.tokenizer.pad_token_id) | {
            "pixel_values": pixels(scenes, self.processor.image_processor)
        }


def run(
    name: str,
    modules: nn.ModuleDict,
    loss_of,
    work: Path,
    steps: int,
    lr: float,
    save_every: int = 200,
    saved=None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Train `modules` with `loss_of(step) -> loss`, continuing from the last state in `work`.

    Args:
        save_every: steps between two saved states.
        saved: called with the number of finished steps and the running mean of the loss, before a state is saved.
        dtype: of autocast; float32 for none.
    """
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    parts = {"modules": modules, "optimizer": optimizer, "schedule": schedule}
    state_file, start = work / f"{name}.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        start = state.pop("step")
        for key, part in parts.items():
            part.load_state_dict(state[key])
    average, device = None, next(modules.parameters()).device.type
    for step in (progress := tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=30)):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            if saved is not None:
                saved(step + 1, average)
            unfinished = state_file.with_suffix(".tmp")
            torch.save({"step": step + 1} | {key: part.state_dict() for key, part in parts.items()}, unfinished)
            os.replace(unfinished, state_file)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the checkpoint in the format of llava-hf's: bfloat16, with the Hub's tensor names."""
    names = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.vision_model.": "vision_tower.vision_model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = next(prefix for prefix in names if name.startswith(prefix))
        tensors[names[old] + name.removeprefix(old)] = tensor.to(torch.bfloat16).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    weights.unlink(missing_ok=True)  # packages may be hard-linked to it
    save_file(tensors, weights, metadata={"format": "pt"})
    model.config.architectures, model.config.dtype = ["LlavaForConditionalGeneration"], torch.bfloat16
    model.config.save_pretrained(folder)
    text = model.config.text_config
    GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    ).save_pretrained(folder)
    processor.save_pretrained(folder)
    # transformers 4 and 5 write different files. Keep what both read: the image processor's settings in a separate
    # file, the class name that both know for a tokenizer that is all in tokenizer.json, special tokens by name.
    processor.image_processor.save_pretrained(folder)
    _edit(folder / "processor_config.json", lambda settings: settings.pop("image_processor", None))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": IMAGE}}
    _edit(folder / "tokenizer_config.json", lambda settings: settings.update(names))


def _edit(path: Path, change) -> None:
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def train(work: Path = Path("training"), output: Path = CHECKPOINT, seed: int = 0) -> None:
    """Train the checkpoint (about half an hour on two cores); state is kept in WORK, the result written to OUTPUT."""
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    processor = make_processor()
    model = make_model(processor.tokenizer)
    words = torch.tensor([processor.tokenizer.encode(f" {word}", add_special_tokens=False) for word in shapes.WORDS])
    embeddings = model.get_input_embeddings()

    def alignment_loss(step: int) -> torch.Tensor:
        rng = random.Random(f"alignment/{step}")
        scenes = [shapes.make_scene(rng) for _ in range(ALIGNMENT_PICTURES)]
        states = model.model.vision_tower(
            pixels(scenes, processor.image_processor), output_hidden_states=True
        ).hidden_states
        tokens = model.model.multi_modal_projector(states[model.config.vision_feature_layer][:, 1:])
        likeness = tokens @ embeddings(words[:, 0]).T  # (batch, patches, words)
        shown = torch.tensor([patch_words(scene) for scene in scenes])
        return nn.functional.binary_cross_entropy_with_logits(likeness.float(), shown)

    aligned = nn.ModuleDict(
        {"vision": model.model.vision_tower, "projector": model.model.multi_modal_projector, "embeddings": embeddings}
    )
    run("alignment", aligned, alignment_loss, work, **ALIGNMENT)
    with torch.no_grad():
        model.lm_head.weight.copy_(embeddings.weight)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)  # stage 1 has trained it; it stays fixed from here

    conversations = Conversations(processor, model.config.image_seq_length)
    language_model, whole = model.model.language_model, nn.ModuleDict({"model": model})
    all_layers = language_model.layers
    for number, layer in enumerate(all_layers):
        if number not in FIRST_LAYERS:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                nn.init.zeros_(last.weight)
    language_model.layers = nn.ModuleList(all_layers[number] for number in FIRST_LAYERS)
    run("shallow", whole, lambda step: model(**conversations.batch(f"shallow/{step}")).loss, work, **SHALLOW)
    language_model.layers = all_layers
    run("training", whole, lambda step: model(**conversations.batch(f"training/{step}")).loss, work, **TRAINING)
    save(model, processor, output)
    samples = [(scene, [question]) for scene, question in shapes.held_out(SAMPLES, seed="samples")]
    shapes.write_questions(output.parent / "samples", samples)


if __name__ == "__main__":
    typer.run(train)
