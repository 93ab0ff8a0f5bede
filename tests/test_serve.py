"""`transformers serve` on a package folder, asked by the official client of OpenAI's API."""

import base64
import os
from contextlib import contextmanager

import pytest
import twins
from server import WITHOUT_NETWORK, WITHOUT_REPOSITORY, running

from shortv_llava.chat.prompts import CAPTION_PROMPT
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.package import write_package
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.examples.shapes_llava import CHECKPOINT

openai = pytest.importorskip("openai", reason="the extra `serve` is not installed")
pytest.importorskip("transformers.cli.serving", reason="this transformers cannot serve custom models")

IMAGES = CHECKPOINT.parent / "samples" / "images"
MAX_TOKENS = 12


@contextmanager
def serving(folder, home):
    """A client of a server of the package, and the server's log."""
    with running(
        WITHOUT_REPOSITORY + WITHOUT_NETWORK + "from transformers.cli.transformers import main\nmain()",
        *("serve", folder, "--trust-remote-code", "--dtype", "float32", "--device", "cpu"),
        *("--host", "127.0.0.1", "--port", 0),
        ready=r"running on (http://127\.0\.0\.1:\d+)",
        cwd=home,
        env=os.environ | {"HF_HOME": str(home), "PYTHONPATH": ""},
    ) as (url, log):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            yield client, log


@pytest.fixture(scope="module")
def server(package_folder, tmp_path_factory):
    with serving(package_folder, tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture(scope="module")
def model_and_processor(package_folder):
    return load_model(package_folder, dtype="float32"), load_processor(package_folder)


def user(text: str, *images: str) -> dict:
    """A message as the API takes it, images as data URLs."""
    urls = (f"data:image/png;base64,{base64.b64encode((IMAGES / name).read_bytes()).decode()}" for name in images)
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def generated(model_and_processor, messages: list[dict]) -> str:
    """What `generate` answers to the same conversation."""
    model, processor = model_and_processor
    conversation = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "url": part["image_url"]["url"]} if part["type"] == "image_url" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip()


def two_turns(first_answer: str) -> list[dict]:
    answer = {"role": "assistant", "content": [{"type": "text", "text": first_answer}]}
    return [user(CAPTION_PROMPT, "000.png"), answer, user("How many objects are there?")]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["one image", "two turns", "two images", "text alone"])
def test_answers_are_those_of_generate(server, model_and_processor, package_folder, kind, stream):
    client, _ = server
    messages = {
        "one image": [user(CAPTION_PROMPT, "000.png")],
        "two turns": two_turns(generated(model_and_processor, [user(CAPTION_PROMPT, "000.png")])),
        "two images": [user("Describe the images.", "000.png", "001.png")],
        "text alone": [user("What is a star?")],
    }[kind]
    settings = {"model": str(package_folder), "messages": messages, "max_tokens": MAX_TOKENS}
    if stream:
        chunks = client.chat.completions.create(**settings, stream=True)
        pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
        answer = "".join(pieces)
        assert len(pieces) >= len(answer.split())
    else:
        answer = client.chat.completions.create(**settings).choices[0].message.content
    assert answer.strip() == generated(model_and_processor, messages) != ""


@pytest.mark.slow
def test_the_log_has_no_complaints(server, package_folder):
    client, log = server
    client.chat.completions.create(model=str(package_folder), messages=[user("?", "000.png")], max_tokens=1)
    words = ("warn", "error", "traceback", "support", "initialized", "unexpected", "reached out")
    assert [line for line in log if any(word in line.lower() for word in words)] == []
    assert any("POST /v1/chat/completions" in line and "200" in line for line in log)


@pytest.mark.slow
@pytest.mark.parametrize("family", twins.with_processor())
def test_families_outside_llavas(family, tmp_path):
    package = tmp_path / "package"
    write_package(twins.write_twin(family, tmp_path / "base"), package, replaced_layers=[1, 2])
    loaded = load_model(package, dtype="float32"), load_processor(package)
    with serving(package, tmp_path) as (client, _):
        messages = [user("Is it a?", "000.png")]
        answer = client.chat.completions.create(model=str(package), messages=messages, max_tokens=MAX_TOKENS)
    assert answer.choices[0].message.content.strip() == generated(loaded, messages)
