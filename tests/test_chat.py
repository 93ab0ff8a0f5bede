"""The terminal chat: answers from the kept cache against those of the whole conversation prefilled anew."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import closing

import pytest
import tiny
import torch
from conftest import REPLACED_LAYERS
from jinja2 import TemplateError
from PIL import Image

from shortv_llava import cli
from shortv_llava.chat.conversation import Conversation
from shortv_llava.chat.prompts import CHAT_SYSTEM
from shortv_llava.chat.terminal import Terminal
from shortv_llava.checkpoint.chat_templates import FORMATS
from shortv_llava.checkpoint.loading import load
from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava import CHECKPOINT

IMAGES = CHECKPOINT.parent / "samples" / "images"
IMAGE_TOKENS = 64
# As in the llava-hf repositories: no system sentence, no end token, a space after each text.
LLAVA_HF_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def embedded():
    loaded = load(str(CHECKPOINT), dtype="float32")
    return loaded.model, loaded.processor


@pytest.fixture
def model_and_processor(embedded, monkeypatch):
    model, processor = embedded
    monkeypatch.setattr(processor, "chat_template", FORMATS["llava_v1"])
    model.set_replaced_layers(REPLACED_LAYERS)
    return embedded


@pytest.fixture
def conversation(model_and_processor):
    return Conversation(*model_and_processor, max_new_tokens=8)


def picture(number: int) -> Image.Image:
    return Image.open(IMAGES / f"{number:03}.png").convert("RGB")


def ask(conversation, question, *images) -> str:
    for image in images:
        conversation.attach(image, "picture.png")
    return "".join(conversation.ask(question))


def prefilled_anew(conversation, *images):
    """The last answer from nothing but transformers: the conversation up to there rendered, prefilled and generated."""
    model, processor, messages = conversation.model, conversation.processor, conversation.messages()
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    inputs = processor(text=prompt, images=list(images) or None, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=conversation.max_new_tokens, do_sample=False)
    cache = model(**inputs, use_cache=True).past_key_values
    answer = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip(), [(layer.keys, layer.values) for layer in cache.layers]


def assert_as_prefilled_anew(conversation, *images):
    answer, fresh = prefilled_anew(conversation, *images)
    assert conversation.turns[-1].answer.strip() == answer
    for kept, (keys, values) in zip(conversation.cache.layers, fresh, strict=True):
        length = min(kept.keys.shape[2], keys.shape[2])
        torch.testing.assert_close(kept.keys[:, :, :length], keys[:, :, :length], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kept.values[:, :, :length], values[:, :, :length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["embedded", "llava-hf template", "LLaVA-NeXT"])
def test_five_turns_with_two_images(model_and_processor, kind):
    model, processor = tiny.next_model() if kind == "LLaVA-NeXT" else model_and_processor
    if kind == "llava-hf template":
        processor.chat_template = LLAVA_HF_CHAT_TEMPLATE
    model.set_replaced_layers([1, 2] if kind == "LLaVA-NeXT" else REPLACED_LAYERS)
    conversation = Conversation(model, processor, max_new_tokens=8)
    seen = []
    for question, new in (
        ("Is there a red star?", [picture(0)]),
        ("What color is the square?", []),
        ("How many objects are there?", [picture(1).resize((96, 50))]),
        ("And in the first picture?", []),
        ("Where is the cross?", []),
    ):
        seen += new
        ask(conversation, question, *new)
        assert_as_prefilled_anew(conversation, *seen)
        assert bool(conversation.turns[-1].visual_tokens) == bool(new)
    assert len(conversation.turns) == 5


def test_two_images_in_one_turn(conversation):
    ask(conversation, "Hello")
    ask(conversation, "Are they the same?", picture(0), picture(1))
    assert_as_prefilled_anew(conversation, picture(0), picture(1))
    assert conversation.turns[-1].visual_tokens == 2 * IMAGE_TOKENS

    model, processor = tiny.next_model()  # images of different numbers of patches
    conversation = Conversation(model, processor, max_new_tokens=4)
    images = picture(0), picture(1).resize((96, 40))
    ask(conversation, "Are they the same?", *images)
    assert_as_prefilled_anew(conversation, *images)


def test_a_turn_prefills_its_own_tokens_alone(conversation):
    ask(conversation, "Is there a red star?", picture(0))
    assert conversation.turns[0].visual_tokens == IMAGE_TOKENS
    for new in ([], [picture(1)], []):
        question = "What color is the square?"
        assert conversation.turns[-1].stop == "end"
        ask(conversation, question, *new)
        own = "</s>USER: " + "<image>\n" * len(new) + question + " ASSISTANT:"
        own_ids = conversation.processor.tokenizer(own, add_special_tokens=False)["input_ids"]
        assert conversation.turns[-1].visual_tokens == len(new) * IMAGE_TOKENS
        assert conversation.turns[-1].text_tokens == len(own_ids) - len(new)


def test_text_alone(conversation):
    ask(conversation, "Hello")
    ask(conversation, "What color is the square?")
    assert_as_prefilled_anew(conversation)
    assert all(turn.visual_tokens == 0 for turn in conversation.turns)


def test_undo_keeps_the_images_of_the_question(conversation):
    ask(conversation, "Is there a red star?", picture(0))
    ask(conversation, "What color is the square?", picture(1))
    conversation.undo()
    ask(conversation, "How many objects are there?")
    assert_as_prefilled_anew(conversation, picture(0), picture(1))
    assert conversation.turns[-1].visual_tokens == 0  # the picture stands where it stood before

    conversation.undo()
    conversation.pending = []
    ask(conversation, "How many objects are there?", picture(2))
    assert_as_prefilled_anew(conversation, picture(0), picture(2))
    assert conversation.turns[-1].visual_tokens == IMAGE_TOKENS

    assert [turn.question for turn in (conversation.undo(), conversation.undo())] == [
        "How many objects are there?",
        "Is there a red star?",
    ]
    assert conversation.undo() is None


def test_reset_forgets_the_images(conversation):
    ask(conversation, "Is there a red star?", picture(0))
    conversation.attach(picture(1), "picture.png")
    conversation.reset()
    ask(conversation, "Is there a red star?")
    assert_as_prefilled_anew(conversation)
    assert conversation.turns[0].visual_tokens == 0


def test_other_layers_from_the_next_turn_on(conversation):
    ask(conversation, "Is there a red star?", picture(0))
    conversation.set_layers([])
    ask(conversation, "What color is the square?")
    assert_as_prefilled_anew(conversation, picture(0))
    assert [turn.visual_tokens for turn in conversation.turns] == [IMAGE_TOKENS, IMAGE_TOKENS]
    assert [turn.num_replaced_layers for turn in conversation.turns] == [len(REPLACED_LAYERS), 0]
    with pytest.raises(ValueError, match="99"):
        conversation.set_layers([99])


@pytest.mark.parametrize("passes", [1, 2])
def test_interrupted(conversation, passes):
    """Within the first forward pass, which reads the question, or the second, after one token of the answer."""
    ask(conversation, "Is there a red star?", picture(0))
    conversation.attach(picture(1), "picture.png")
    remaining = [passes]

    def interrupt(*args):
        remaining[0] -= 1
        if remaining[0] == 0:
            raise KeyboardInterrupt

    layer = conversation.model.model.language_model.layers[5]
    with layer.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        list(conversation.ask("How many objects are there?"))

    if passes == 1:
        assert len(conversation.turns) == 1 and len(conversation.pending) == 1
    else:
        assert conversation.turns[1].stop == "interrupted" and conversation.turns[1].new_tokens == 1
        assert conversation.pending == []
    ask(conversation, "What color is the square?")
    assert_as_prefilled_anew(conversation, picture(0), picture(1))


def test_stopped_by_the_reader(conversation):
    with closing(conversation.ask("Is there a red star?")) as pieces:
        first = next(pieces)
    assert conversation.turns[0].answer == first and conversation.turns[0].stop == "interrupted"
    ask(conversation, "What color is the square?")
    assert_as_prefilled_anew(conversation)


def test_context_is_never_exceeded(conversation):
    ask(conversation, "Is there a red star?", picture(0))
    conversation.attach(picture(1), "picture.png")
    with pytest.raises(ShortVError, match="2048; /reset"):
        ask(conversation, "word " * 3000)
    assert len(conversation.turns) == 1 and len(conversation.pending) == 1
    ask(conversation, "What color is the square?")
    assert_as_prefilled_anew(conversation, picture(0), picture(1))


def test_answer_stops_where_the_context_ends(conversation):
    ask(conversation, "Hello")
    conversation.end_tokens, conversation.max_length = set(), conversation.turns[0].text_tokens + 3
    for max_new_tokens, stop, new_tokens in ((8, "context", 3), (2, "length", 2)):
        conversation.reset()
        conversation.max_new_tokens = max_new_tokens
        ask(conversation, "Hello")
        assert (conversation.turns[0].stop, conversation.turns[0].new_tokens) == (stop, new_tokens)


@pytest.mark.parametrize("cut, pieces", [(0, ["n", "é"]), (1, ["n", "\ufffd"])])
def test_half_a_character_waits_for_the_rest(conversation, monkeypatch, cut, pieces):
    tokens = conversation.processor.tokenizer("né", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 3
    conversation.max_new_tokens = len(tokens) - cut
    remaining = iter(tokens)
    monkeypatch.setattr(conversation, "_choose", lambda logits: next(remaining))
    assert list(conversation.ask("Hello")) == pieces


def test_image_mark_in_a_question(conversation):
    with pytest.raises(ShortVError, match="/image adds an image"):
        ask(conversation, "<image> Is there a red star?")
    assert conversation.turns == []


def test_sampling(model_and_processor):
    def answers(seed):
        conversation = Conversation(*model_and_processor, max_new_tokens=8, temperature=2.0, top_p=0.95, seed=seed)
        return [ask(conversation, "Is there a red star?", picture(0)), ask(conversation, "Where?")]

    assert answers(1) == answers(1)
    assert len({tuple(answers(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("template", [FORMATS["vicuna_v1"], LLAVA_HF_CHAT_TEMPLATE])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_system_sentence(model_and_processor, template, system):
    model, processor = model_and_processor
    processor.chat_template = template
    conversation = Conversation(model, processor, system, max_new_tokens=2)
    ask(conversation, "Hello")
    prompt = processor.tokenizer(f"{system or CHAT_SYSTEM} USER: Hello ASSISTANT:")["input_ids"]
    assert conversation.cached[: len(prompt)] == prompt


def test_no_place_for_a_system_sentence(model_and_processor):
    model, processor = model_and_processor
    processor.chat_template = "{% for message in messages if message['role'] == 'user' %}Q:{% endfor %}A:"
    Conversation(model, processor)
    with pytest.raises(ShortVError, match="--system"):
        Conversation(model, processor, "Be brief.")


@pytest.mark.parametrize(
    "packaged, option, variable, layers",
    [
        (True, None, None, REPLACED_LAYERS),
        (True, None, "3,2", REPLACED_LAYERS),
        (True, "5", "3,2", [5]),
        (True, "none", None, []),
        (False, None, None, []),
        (False, None, "3, 2", [3, 2]),
        (False, "5", "3,2", [5]),
        (False, "none", "3,2", []),
    ],
)
def test_where_layers_come_from(package_folder, monkeypatch, packaged, option, variable, layers):
    monkeypatch.delenv("REPLACED_LAYERS", raising=False)
    if variable is not None:
        monkeypatch.setenv("REPLACED_LAYERS", variable)
    loaded = load(str(package_folder if packaged else CHECKPOINT), option)
    assert loaded.model.config.replaced_layers == layers
    assert loaded.package_layers == ((REPLACED_LAYERS if packaged else []), [], [])


def type_in(monkeypatch, *lines, terminal=False):
    stdin = io.StringIO("".join(f"{line}\n" for line in lines))
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)


def test_script(conversation, monkeypatch, capsys, tmp_path):
    photo, saved = tmp_path / "a photo.png", tmp_path / "chat.json"
    picture(0).save(photo)
    type_in(
        monkeypatch,
        f"/image '{photo}'",
        "Is there a red star?",
        "",
        "/layers 3,2",
        "What color is the square?",
        "/layers package",
        "/layers",
        f"/save {saved}",
        "/stats",
        "/help",
        "/exit",
        "never asked",
    )
    Terminal(conversation, "shapes", ([1], [5], [])).run()
    out, err = capsys.readouterr()
    first, second = (turn.answer for turn in conversation.turns)
    own = "1 of 12 layers replaced [1], attention alone in [5]"
    lines = out.splitlines()
    assert lines[:5] == [first, "2 of 12 layers replaced [3, 2]", second, own, own]
    assert [line.split()[:4] for line in lines[6:8]] == [
        [str(number), str(turn.visual_tokens), "+", str(turn.text_tokens)]
        for number, turn in enumerate(conversation.turns, start=1)
    ]
    assert max(map(len, lines)) < 80
    for name in "image undo reset layers stats save help exit".split():
        assert f"/{name}" in out
    assert err == f"(wrote {saved})\n"
    messages = json.loads(saved.read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == [
        {"type": "image", "path": str(photo)},
        {"type": "text", "text": "Is there a red star?"},
    ]
    assert messages[3]["content"] == [{"type": "text", "text": second}]


def test_undo_in_the_terminal(conversation, monkeypatch, capsys):
    type_in(monkeypatch, f"/image {IMAGES / '000.png'}", "Hello", "/undo", "/undo", "Hello", "/reset")
    Terminal(conversation, "shapes").run()
    assert "(took back: Hello)\n(dropped what waited for the next question)\n" in capsys.readouterr().err
    assert conversation.turns == [] and conversation.pending == []


@pytest.mark.parametrize(
    "line, reason",
    [
        ("/nothing", "no command /nothing"),
        ("/image", "needs a file or URL"),
        ("/image nowhere.png", "nowhere.png: no such image"),
        ("/undo", "nothing to take back"),
        ("/layers 99", "99 is no layer id"),
        ("/layers 1;2", "separated by commas"),
        ("/layers published", "no layers are published"),
        ("/save", "needs a file name"),
        ("/save /nowhere/chat.json", "/nowhere/chat.json"),
        (f"/save {CHECKPOINT / 'config.json'}", "exists already"),
        ("word " * 3000, "/reset"),
    ],
)
def test_bad_lines_end_a_script_and_not_a_chat(conversation, monkeypatch, capsys, line, reason):
    type_in(monkeypatch, line, "Hello")
    with pytest.raises((ShortVError, ValueError, OSError), match=reason):
        Terminal(conversation, "shapes").run()
    assert conversation.turns == []

    capsys.readouterr()
    type_in(monkeypatch, line, "Hello", terminal=True)
    Terminal(conversation, "shapes").run()
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and reason in errors[0]
    assert [turn.question for turn in conversation.turns] == ["Hello"]


def test_a_person_at_the_terminal(conversation, monkeypatch, capsys):
    type_in(monkeypatch, "", f"/image {IMAGES / '000.png'}", "Hello", terminal=True)
    asked, interrupted = conversation.ask, []

    def ask_interrupted_once(question):
        if not interrupted:
            interrupted.append(question)
            raise KeyboardInterrupt
        return asked(question)

    monkeypatch.setattr(conversation, "ask", ask_interrupted_once)
    Terminal(conversation, "shapes").run()
    out, err = capsys.readouterr()
    assert out == "> > [1 image] > [1 image] > \n"
    assert err.startswith(f"shapes: 7 of 12 layers replaced {REPLACED_LAYERS}; float32 on cpu\n")
    assert "(ask something" in err and "(stopped)" in err


def test_interrupted_at_the_prompt(conversation, monkeypatch, capsys):
    lines = iter([KeyboardInterrupt, "Hello", EOFError])

    def read(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    type_in(monkeypatch, terminal=True)
    Terminal(conversation, "shapes").run()
    assert "(/exit or Ctrl-D leaves)" in capsys.readouterr().err
    assert len(conversation.turns) == 1


def test_interrupted_script_ends(conversation, monkeypatch):
    type_in(monkeypatch, "Hello")
    monkeypatch.setattr(conversation, "ask", lambda question: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(ShortVError, match="interrupted"):
        Terminal(conversation, "shapes").run()


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["shortv", "chat", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.parametrize("error", [TemplateError("roles must alternate"), KeyError("roles must alternate")])
def test_any_error_of_a_turn_leaves_the_chat_open(conversation, monkeypatch, capsys, error):
    def fail(question):
        raise error

    monkeypatch.setattr(conversation, "ask", fail)
    type_in(monkeypatch, "What is it?", "/exit", terminal=True)
    Terminal(conversation, "shapes").run()
    assert "roles must alternate" in capsys.readouterr().err


def test_command_fails_with_one_line(monkeypatch, capsys, tmp_path):
    without_tokenizer = tmp_path / "model"
    shutil.copytree(CHECKPOINT, without_tokenizer, ignore=shutil.ignore_patterns("tokenizer*"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments, reason in (
        ([tmp_path / "nowhere"], "no such folder"),
        ([without_tokenizer], "has no tokenizer"),
        ([CHECKPOINT, "--image", "nowhere.png"], "nowhere.png: no such image"),
        ([CHECKPOINT, "--replaced-layers", "99"], "99 is no layer id"),
        ([CHECKPOINT, "--load-in-4bit"], "pip install bitsandbytes"),
        ([CHECKPOINT, "--load-in-8bit"], "pip install bitsandbytes"),
    ):
        assert command(monkeypatch, *arguments) == 1
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and err[0].startswith("shortv: error: ") and reason in err[0]
    for arguments in (["--load-in-4bit", "--load-in-8bit"], ["--temperature", "-1"], ["--max-new-tokens", "0"]):
        assert command(monkeypatch, CHECKPOINT, *arguments) == 2


def test_piped_session(package_folder, conversation):
    expected = [
        ask(conversation, "Is there a red star?", picture(0)),
        ask(conversation, "What color is the square?"),
        ask(conversation, "How many objects are there?", picture(1)),
    ]
    script = "Is there a red star?\nWhat color is the square?\n\n"
    script += f"/image {IMAGES / '001.png'}\nHow many objects are there?\n/stats\n/nothing\n"
    options = ["--image", IMAGES / "000.png", "--dtype", "float32", "--max-new-tokens", "8"]
    result = subprocess.run(
        [sys.executable, "-m", "shortv_llava.cli", "chat", package_folder, *options],
        input=script,
        capture_output=True,
        text=True,
        env=os.environ | {"REPLACED_LAYERS": "3"},  # the package's own count
    )
    assert result.returncode == 1
    assert "/nothing" in result.stderr.splitlines()[-1]
    answers, table = result.stdout.splitlines()[:3], result.stdout.splitlines()[4:]
    assert answers == expected
    assert [line.split()[1] for line in table] == [str(IMAGE_TOKENS), "0", str(IMAGE_TOKENS)]
    assert [line.split()[-1] for line in table] == [str(len(REPLACED_LAYERS))] * 3


def test_a_pipe_that_is_no_utf_8_is_told(conversation, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe hi\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(ShortVError, match="standard input is no UTF-8"):
        Terminal(conversation, "package").run()
