"""The web page, asked by Gradio's own client, and the Space that shows it."""

import os
import re
import subprocess
import sys

import pytest
from command import shortv_here
from conftest import REPLACED_LAYERS
from huggingface_hub import HfApi, SpaceCard, snapshot_download
from PIL import Image
from server import WITHOUT_NETWORK, WITHOUT_REPOSITORY, running

from hub import Hub
from shortv_llava.chat.prompts import CAPTION_PROMPT
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.package import write_package
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.flops import flops_ratio
from shortv_llava.hub.push import SPACE_FILES, push, push_space

IMAGE = CHECKPOINT.parent / "samples" / "images" / "000.png"
QUESTION = CAPTION_PROMPT
REPO = "alice/shapes-shortv"
SPACE = f"spaces/{REPO}"
READY = r"Running on local URL:\s+(http://127\.0\.0\.1:\d+)"


@pytest.fixture(scope="module")
def gradio_client():
    pytest.importorskip("gradio", reason="the extra `web` is not installed")
    return pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return os.environ | {"HF_HOME": str(home), "GRADIO_TEMP_DIR": str(home)}


@pytest.fixture(scope="module")
def page(gradio_client, package_folder, environment, tmp_path_factory):
    """The page's address, and the log of `shortv chat --web`."""
    code = WITHOUT_NETWORK + "from shortv_llava.cli import main\nmain()"
    arguments = ("chat", package_folder, "--web", "--dtype", "float32", "--max-new-tokens", 12)
    with running(code, *arguments, ready=READY, env=environment, cwd=tmp_path_factory.mktemp("cwd")) as (url, log):
        yield url, log


@pytest.fixture(scope="module")
def model_and_processor(package_folder):
    return load_model(package_folder, dtype="float32"), load_processor(package_folder)


class Visitor:
    """Somebody with the page open."""

    def __init__(self, gradio_client, url):
        self.client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
        self.picture = gradio_client.handle_file(str(IMAGE))

    def ask(self, question, number=7, compare=True, picture=True):
        """(chat, figures) of ShortV and, if it was asked, of the dense model; a chat is a list of (role, text)."""
        picture = self.picture if picture else None
        _, *chats, shortv, dense = self.client.predict(picture, question, number, compare, api_name="/ask")
        sides = zip(chats if compare else chats[:1], (shortv, dense))
        return [([(m["role"], m["content"][0]["text"]) for m in chat], figures) for chat, figures in sides]


@pytest.fixture
def visitor(gradio_client, page):
    return Visitor(gradio_client, page[0])


def generated(model_and_processor, *turns: str, layers=REPLACED_LAYERS) -> tuple[str, str]:
    """What `generate` answers to the last of `turns` (questions and answers), and the prefill's FLOPs ratio."""
    model, processor = model_and_processor
    model.set_replaced_layers(layers)
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in zip(["user", "assistant"] * len(turns), turns)
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=Image.open(IMAGE), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    ratio = flops_ratio(model.config, inputs["input_ids"].shape[1] - visual, visual)
    return processor.decode(tokens, skip_special_tokens=True).strip(), f"{ratio:.0%}"


@pytest.mark.slow
def test_both_answers_with_their_figures_over_two_turns(visitor, page, model_and_processor):
    turns = {side: [] for side in (0, 1)}
    for question in (QUESTION, "How many objects are there?"):
        answers = visitor.ask(question)
        for side, layers in enumerate((REPLACED_LAYERS, [])):
            expected, ratio = generated(model_and_processor, *turns[side], question, layers=layers)
            turns[side] += [question, expected]
            chat, figures = answers[side]
            assert chat == list(zip(["user", "assistant"] * 2, turns[side]))
            assert f"**{ratio}**" in figures and re.search(r"First token after \*\*\d+\.\d{3} s\*\*", figures)
    assert "**100%**" in answers[1][1] and "**100%**" not in answers[0][1]
    assert not any("REACHED OUT" in line or "Traceback" in line for line in page[1])


@pytest.mark.slow
def test_slider_and_switch(visitor, model_and_processor):
    (chat, figures), (dense_chat, _) = visitor.ask(QUESTION, number=0)
    assert chat == dense_chat and "**100%**" in figures
    visitor.client.predict(api_name="/start_anew")
    [(chat, figures)] = visitor.ask(QUESTION, number=3, compare=False)
    expected, ratio = generated(model_and_processor, QUESTION, layers=REPLACED_LAYERS[:3])
    assert chat == [("user", QUESTION), ("assistant", expected)] and f"**{ratio}**" in figures


@pytest.mark.slow
def test_without_a_picture_nothing_is_frozen(visitor):
    (chat, figures), (dense_chat, _) = visitor.ask("What is a star?", picture=False)
    assert chat == dense_chat and "**100%**" in figures


@pytest.fixture(scope="module")
def asked(gradio_client, model_and_processor):
    """A function that gives all that the page shows after a question."""
    from shortv_llava.chat.web import DENSE, SHORTV, build

    image_data = pytest.importorskip("gradio").data_classes.ImageData
    page = build(*model_and_processor, "x", 2)
    ask = next(fn.fn for fn in page.fns.values() if fn.api_name == "ask")
    preprocess = next(block for block in page.blocks.values() if block.get_block_name() == "image").preprocess
    chats = {SHORTV: [], DENSE: []}

    def ask_page(question, file=IMAGE):
        picture = preprocess(image_data(path=str(file))) if file else None
        return [list(update.values()) for update in ask(picture, question, 3, True, chats)]

    return ask_page


def test_an_empty_question_does_nothing(asked):
    """Gradio's word for that, without which it empties all that the page shows."""
    assert asked(" \n ") == [["update"]]


@pytest.mark.parametrize("question, words", [("<image> and?", "<image>"), ("word " * 3000, "new conversation")])
def test_questions_that_cannot_be_answered_say_why_under_the_answers(asked, question, words):
    *_, message, box = asked(question)[-1]
    assert words in message.replace("\\<", "<") and "<image>" not in message.replace("\\<", "") and box == question


@pytest.mark.parametrize(
    "data, words",
    [
        (b"no picture", "known format"),
        (IMAGE.read_bytes()[:300], "broken image"),
        (None, "no such image"),
        ((8000, 1), "too narrow"),
    ],
)
def test_broken_pictures_say_why_under_the_answers(asked, tmp_path, data, words):
    path = tmp_path / "a.png"
    if isinstance(data, tuple):
        Image.new("RGB", data).save(path)
    elif data is not None:
        path.write_bytes(data)
    [[message, box]] = asked(QUESTION, path)
    assert message.startswith("a.png: ") and words in message and box == QUESTION


def test_the_question_is_shown_at_once_and_nothing_covers_the_answers(asked, model_and_processor):
    from shortv_llava.chat.web import build

    [shown, figures, box], *others = asked(QUESTION)
    assert box == "" and all("" not in update for update in others)  # what is typed meanwhile is kept
    assert shown == [{"role": "user", "content": QUESTION}] and figures == "…"
    functions = {fn.api_name: fn.show_progress for fn in build(*model_and_processor, "x", 2).fns.values()}
    assert functions["ask"] == functions["start_anew"] == "hidden"


def test_frozen_blocks_stay_beside_the_slider(gradio_client, model_and_processor):
    from shortv_llava.chat.web import DENSE, SHORTV, build

    model, processor = model_and_processor
    model.set_replaced_layers([11, 3], ffn=[5, 6])
    ask = next(fn.fn for fn in build(model, processor, "x", 2).fns.values() if fn.api_name == "ask")
    for _ in ask(str(IMAGE), QUESTION, 1, False, {SHORTV: [], DENSE: []}):
        assert model.config.frozen_layers() == ({11}, {11, 5, 6})
    for _ in ask(str(IMAGE), QUESTION, 1, True, {SHORTV: [], DENSE: []}):
        pass
    assert model.config.frozen_layers() == (set(), set())


@pytest.mark.parametrize("option", [("--image", IMAGE), ("--system", "Hi"), ("--temperature", 1), ("--seed", 0)])
def test_options_of_the_terminal_are_refused(package_folder, option):
    done = shortv_here("chat", package_folder, "--web", *option)
    assert done.returncode == 2 and option[0] in done.stderr and "Traceback" not in done.stderr


def test_without_gradio_it_says_what_to_install(package_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = shortv_here("chat", package_folder, "--web")
    assert done.returncode == 1 and re.fullmatch(r"shortv: error: --web .*install gradio.*\n", done.stderr)


# The Space


@pytest.fixture
def folder(tmp_path):
    write_package(CHECKPOINT, tmp_path / "package", replaced_layers=REPLACED_LAYERS)
    return tmp_path / "package"


def push_both(hub, folder, home, *options):
    """The command in a process of its own, whose HF_ENDPOINT is the hub."""
    command = [sys.executable, "-m", "shortv_llava.cli", "push", str(folder), REPO, "--license", "mit", "--space"]
    env = hub.env(home / "home", Hub.token)
    return subprocess.run([*command, *options], capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_pushed_beside_the_model_in_one_commit(hub, folder, tmp_path):
    done = push_both(hub, folder, tmp_path, "--dry-run")
    assert done.returncode == 0 and "app.py" in done.stdout and hub.repos() == []
    done = push_both(hub, folder, tmp_path, "--private")
    assert done.returncode == 0, done.stderr
    assert hub.repos() == [REPO, SPACE] and "app.py" not in hub.files(REPO)
    assert HfApi(endpoint=hub.url, token=hub.token).repo_info(REPO, repo_type="space").private
    assert len(hub.commits(SPACE)) == 2  # the Hub makes the first one itself
    files = hub.files(SPACE)
    assert set(files) == {".gitattributes", "README.md", "requirements.txt", *SPACE_FILES}
    card = SpaceCard(files["README.md"].decode())
    assert (card.data.sdk, card.data.app_file, card.data.models) == ("gradio", "app.py", [REPO])
    refs = hub.refs(SPACE)
    done = push_both(hub, folder, tmp_path)
    assert done.returncode == 0 and f"{SPACE}: nothing has changed" in done.stdout
    assert hub.refs(SPACE) == refs


@pytest.mark.slow
def test_the_space_runs_as_it_is(hub, gradio_client, folder, tmp_path, model_and_processor):
    push(folder, REPO, license="mit")
    push_space(REPO)
    space = snapshot_download(REPO, repo_type="space", local_dir=tmp_path / "space")
    start = "import runpy\nsys.path.insert(0, sys.argv[1])\nrunpy.run_path(sys.argv[1] + '/app.py', None, '__main__')"
    code = WITHOUT_REPOSITORY + WITHOUT_NETWORK + start
    env = hub.env(tmp_path / "home") | {"GRADIO_TEMP_DIR": str(tmp_path / "home")}
    with running(code, space, ready=READY, cwd=tmp_path, env=env) as (url, log):
        (chat, _), (dense_chat, _) = Visitor(gradio_client, url).ask(QUESTION)
    assert [role for role, _ in chat + dense_chat] == ["user", "assistant"] * 2
    assert not any("REACHED OUT" in line or "Traceback" in line for line in log)


def test_what_else_is_in_the_space_is_kept(hub):
    readme = "---\ntitle: Mine\nemoji: 🐱\nmodels: org/base\n---\nRead me.\n"
    hub.add_repo(SPACE, {"README.md": readme.encode(), "x": b"1"})
    changes, _ = push_space(REPO, message="Page")
    assert {change.path: change.action for change in changes} == {
        **dict.fromkeys(SPACE_FILES, "add"),
        "requirements.txt": "add",
        "README.md": "update",
    }
    card = SpaceCard(hub.files(SPACE)["README.md"].decode())
    assert (card.data.title, card.data.models, card.text) == ("Mine", [REPO, "org/base"], "Read me.\n")
    assert hub.files(SPACE)["x"] == b"1" and hub.commits(SPACE)[0].title == "Page"
    assert push_space(REPO) == ([], None)


def test_refusals(hub, folder, tmp_path):
    for option in ("--create-pr", "--revision=draft"):
        done = push_both(hub, folder, tmp_path, option)
        assert done.returncode == 2 and "--space" in done.stderr and hub.repos() == []
    hub.add_repo(SPACE)
    with pytest.raises(ShortVError, match=f"{SPACE}: is public already"):
        push_space(REPO, private=True)
    refs = hub.refs(SPACE)
    hub.fail("commit", 403, "No")
    with pytest.raises(ShortVError, match=f"{SPACE}: no permission"):
        push_space(REPO)
    assert hub.refs(SPACE) == refs


def test_the_space_asks_for_the_gradio_that_is_tested(gradio_client):
    import gradio

    from shortv_llava.hub.push import GRADIO_VERSION

    assert gradio.__version__ == GRADIO_VERSION
