"""Packages pushed to a local Hub by the real client: what arrives, what is moved, and what every failure leaves."""

import contextlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from command import shortv_here
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi, ModelCard, ModelCardData, constants
from huggingface_hub.utils import _cache_assets
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import BitsAndBytesConfig

from hub import Hub
from shortv_llava.calibrate.samples import embedded_samples
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.package import SHARD, write_package
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.checkpoint.source import fetch_checkpoint, find_checkpoint
from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.hub import push as pushing
from shortv_llava.hub.card import DESCRIPTION, make_card, record_score
from shortv_llava.hub.push import EVAL_RESULTS_FILE, check_package, push, push_space
from shortv_llava.hub.scores import Score

BASE, REPO = "org/base", "alice/shapes-shortv"
LAYERS = [11, 0, 10, 5]
WEIGHTS = "model.safetensors"
BASE_CARD = b"---\nlicense: llama2\nlanguage: en\ndatasets: org/conversations\n---\n# Base\n"

copies = pytest.mark.skipif(
    "src_repo_id" not in inspect.signature(CommitOperationCopy).parameters,
    reason="this huggingface_hub copies within one repository only",
)


def base_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()} | {"README.md": BASE_CARD}


@pytest.fixture
def hub(hub):
    hub.add_repo(BASE, base_files())
    return hub


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "package"
    write_package(CHECKPOINT, folder, base_model=BASE, replaced_layers=LAYERS)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A package of a test's own, its files no links to the checkpoint's."""
    return shutil.copytree(made, tmp_path / "package")


@pytest.fixture(scope="session")
def quantised(made, tmp_path_factory) -> Path:
    """What a user saves who has loaded a package in 4 bit."""
    pytest.importorskip("bitsandbytes")
    folder, settings = tmp_path_factory.mktemp("quantised") / "package", BitsAndBytesConfig(load_in_4bit=True)
    load_model(made, quantization_config=settings, device_map="cpu", dtype=torch.float32).save_pretrained(folder)
    load_processor(made).save_pretrained(folder)
    return folder


@pytest.fixture
def bare(hub, tmp_path) -> Path:
    """A package without weights, whose base is on the Hub."""
    write_package(fetch_checkpoint(BASE, weights=False), tmp_path / "bare", weights=False, replaced_layers=LAYERS)
    return tmp_path / "bare"


def shortv(hub, home, *arguments, token=Hub.token, **environment) -> subprocess.CompletedProcess:
    """The command in a process of its own, whose HF_ENDPOINT is the hub."""
    command = [sys.executable, "-m", "shortv_llava.cli", *map(str, arguments)]
    env = hub.env(home / "home", token) | environment
    return subprocess.run(command, capture_output=True, text=True, env=env)


def contents(folder: Path) -> dict[str, bytes]:
    """What the repository should hold of a folder, but for the card, which names the repository."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def remote(hub, repo_id=REPO, revision="main") -> dict[str, bytes]:
    files = hub.files(repo_id, revision)
    return {path: data for path, data in files.items() if path not in ("README.md", ".gitattributes")}


def fails(*words: str):
    """A ShortVError of one line with these words."""
    return pytest.raises(ShortVError, match=".*".join(words) + r"[^\n]*\Z")


ANSWER = """
import json, sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

where, picture, settings = sys.argv[1], Image.open(sys.argv[2]), json.loads(sys.argv[3])
settings = {"trust_remote_code": True, **settings}
messages = [{"role": "user", "content": [{"type": "image", "image": picture},
                                         {"type": "text", "text": "How many objects are there?"}]}]
processor = AutoProcessor.from_pretrained(where, **settings)
model = AutoModel.from_pretrained(where, dtype=torch.float32, **settings)
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=picture, return_tensors="pt")
logits = model(**inputs).logits[0, -1].tolist()
ask = pipeline("image-text-to-text", model=where, dtype=torch.float32, **settings)
answer = ask(text=messages, max_new_tokens=8, return_full_text=False, generate_kwargs={"do_sample": False})
print(json.dumps([type(model).__name__, model.config.replaced_layers, logits, answer[0]["generated_text"]]))
"""


def answer(where, env, cwd, **settings) -> list:
    """What a stranger gets: a fresh process, nothing but transformers, the picture and the question."""
    command = [sys.executable, "-c", ANSWER, str(where), str(embedded_samples()[0].image), json.dumps(settings)]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_pushed_then_used_by_a_stranger(hub, folder, tmp_path):
    done = shortv(hub, tmp_path, "push", folder, REPO, "--license", "apache-2.0", "--private", "--message", "First")
    assert done.returncode == 0, done.stderr
    assert hub.repos() == [REPO, BASE] and Hub.token not in done.stdout + done.stderr
    assert remote(hub) == contents(folder)
    newest, created = hub.commits(REPO)
    assert (newest.title, created.title) == ("First", "initial commit")
    assert shortv(hub, tmp_path, "push", folder, REPO, "--license", "apache-2.0").returncode == 0
    assert len(hub.commits(REPO)) == 2

    write_package(CHECKPOINT, folder, overwrite=True, replaced_layers=[1])
    push(folder, REPO, license="apache-2.0")
    expected = answer(folder, hub.env(tmp_path / "local") | {"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert expected[:2] == ["ShortVLlavaForConditionalGeneration", [1]]
    assert answer(REPO, hub.env(tmp_path / "fresh", Hub.read_token), tmp_path) == expected
    first = answer(REPO, hub.env(tmp_path / "fresh", Hub.read_token), tmp_path, revision=newest.oid)
    assert first[1] == LAYERS and first[2] != expected[2]

    hf = [Path(sys.executable).with_name("hf"), "download", REPO, "--local-dir", tmp_path / "got"]
    subprocess.run(list(map(str, hf)), env=hub.env(tmp_path / "third", Hub.read_token), check=True, capture_output=True)
    assert {path: data for path, data in remote(hub).items()} == contents(folder)
    assert (tmp_path / "got" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert answer(tmp_path / "got", hub.env(tmp_path / "fourth") | {"HF_HUB_OFFLINE": "1"}, tmp_path) == expected


def test_only_what_differs_is_committed(hub, folder):
    pushed = push(folder, REPO, license="mit")
    assert {change.path for change in pushed.changes} == {*contents(folder), "README.md"}
    assert {change.action for change in pushed.changes} == {"add"} and pushed.url.endswith(hub.commits(REPO)[0].oid)
    sent, refs = hub.received_bytes, hub.refs(REPO)
    assert push(folder, REPO, license="mit") == ([], None)
    assert (hub.refs(REPO), hub.received_bytes) == (refs, sent)
    (folder / "generation_config.json").write_text("{}")
    theirs = {"notes.txt": b"theirs", "a/b.safetensors": b"x"}
    hub.commit(REPO, theirs | {"model-00001-of-00002.safetensors": b"old shard"})
    assert [change[:2] for change in push(folder, REPO, license="mit").changes] == [
        ("update", "generation_config.json"),
        ("delete", "model-00001-of-00002.safetensors"),  # would be taken for a part of the model
    ]
    assert theirs.items() < hub.files(REPO).items() and hub.received_bytes == sent
    (folder / ".env").write_text("secret")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert push(folder, REPO, license="mit").changes == []


def test_dry_run(hub, folder, monkeypatch):
    with monkeypatch.context() as without_token:
        without_token.delenv("HF_TOKEN")
        without_token.setattr(constants, "HF_TOKEN_PATH", "nowhere")
        done = shortv_here("push", folder, REPO, "--license", "mit", "--dry-run")
    assert done.returncode == 0, done.stderr
    size = tqdm.format_sizeof((folder / WEIGHTS).stat().st_size, "B")
    assert f"add    {size:>8} {WEIGHTS}\n" in done.stdout and "dry run" in done.stdout
    assert hub.repos() == [BASE] and hub.received_bytes == 0
    push(folder, REPO, license="mit")
    refs = hub.refs(REPO)
    (folder / "LICENSE").write_text("MIT")
    changes, url = push(folder, REPO, license="mit", dry_run=True)
    assert [change[:2] for change in changes] == [("update", "README.md"), ("add", "LICENSE")] and url is None
    assert changes[1].size == 3 and hub.refs(REPO) == refs


@pytest.mark.parametrize(
    "offline, words", [(True, ["HF_HUB_OFFLINE", "what would change"]), (False, ["check the connection"])]
)
def test_a_dry_run_checks_the_folder_before_it_asks(hub, folder, monkeypatch, capsys, offline, words):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    hub.cut("repo_info", times=None)
    with fails(REPO, *words):
        push(folder, REPO, license="mit", dry_run=True)
    assert f"{folder}: is complete" in capsys.readouterr().out
    (folder / WEIGHTS).unlink()
    requests = len(hub.requests)
    with fails("no weights"):
        push(folder, REPO, license="mit", dry_run=True)
    assert len(hub.requests) == requests and not capsys.readouterr().out


def test_branch_and_pull_request(hub, folder):
    push(folder, REPO, license="mit")
    main = hub.refs(REPO)["refs/heads/main"]
    (folder / "generation_config.json").write_text("{}")
    assert push(folder, REPO, license="mit", revision="v2").url
    assert hub.refs(REPO)["refs/heads/main"] == main
    assert hub.files(REPO, "v2")["generation_config.json"] == b"{}"
    assert push(folder, REPO, license="mit", revision="v2").changes == []
    assert push(folder, REPO, license="mit", create_pr=True).url.endswith("/discussions/1")
    assert hub.refs(REPO)["refs/heads/main"] == main
    assert hub.files(REPO, "refs/pr/1")["generation_config.json"] == b"{}"
    assert push(folder, "acme/new", license="mit", revision="v1").url
    assert set(hub.files("acme/new")) == {".gitattributes"} and remote(hub, "acme/new", "v1") == contents(folder)
    assert push(folder, BASE, license="mit", create_pr=True).url.endswith("/discussions/1")  # not ours
    (folder / "generation_config.json").unlink()
    (folder / "notes.txt").write_text("new")
    push(folder, REPO, license="mit", revision="refs/pr/1")
    assert hub.files(REPO, "refs/pr/1")["notes.txt"] == b"new" and hub.refs(REPO)["refs/heads/main"] == main


def test_a_revision_that_is_no_branch(hub, folder):
    push(folder, REPO, license="mit", tag="v1.0")
    before, refs = hub.refs(REPO), len(hub.requests)
    with fails(REPO, "v1.0 is a tag", "--revision a branch"):
        push(folder, REPO, license="mit", revision="v1.0")
    with fails(REPO, "is a commit"):
        push(folder, REPO, license="mit", revision=before["refs/heads/main"][:8])
    refs = len(hub.requests)
    for revision in (before["refs/heads/main"], "0" * 40, "", "two words", "../x", "-x", "a..b", "a.lock"):
        with fails("--revision", "commit|is no name"):
            push(folder, "alice/new", license="mit", revision=revision)
    assert hub.refs(REPO) == before and len(hub.requests) == refs and "alice/new" not in hub.repos()


def test_tags_pin_the_snippets(hub, folder):
    def card(revision="main"):
        return hub.files(REPO, revision)["README.md"].decode()

    push(folder, REPO, license="mit", tag="v1.0")
    head = hub.refs(REPO)["refs/heads/main"]
    assert hub.refs(REPO)["refs/tags/v1.0"] == head and card().count(f'"{REPO}", revision="v1.0"') == 3
    assert push(folder, REPO, license="mit") == push(folder, REPO, license="mit", tag="v1.0") == ([], None)
    (folder / "generation_config.json").write_text("{}")
    with fails("v1.0 is there already", "another name"):
        push(folder, REPO, license="mit", tag="v1.0")
    with fails("main is there already"):
        push(folder, REPO, license="mit", tag="main")
    assert hub.refs(REPO)["refs/heads/main"] == head
    push(folder, REPO, license="mit", tag="v1.1", dry_run=True)
    assert "refs/tags/v1.1" not in hub.refs(REPO)
    hub.fail("ref", 500, times=None)
    with fails("failed .500", "again"):
        push(folder, REPO, license="mit", tag="v1.1")
    hub.faults.clear()
    assert push(folder, REPO, license="mit", tag="v1.1") == ([], None)
    assert hub.refs(REPO)["refs/tags/v1.1"] == hub.refs(REPO)["refs/heads/main"] and 'revision="v1.1"' in card()
    assert 'revision="v1.0"' in card("v1.0")
    (folder / "generation_config.json").write_text('{"a": 1}')
    push(folder, REPO, license="mit")  # what the tag has is another version now
    assert "revision=" not in card().split("## Limits")[0]


def test_collection_and_space(hub, folder):
    slug = "alice/fast-models-0123456789abcdef"
    with fails("collection", slug, "404"):
        push(folder, REPO, license="mit", collection=slug)
    with fails("no collection", "owner/title"):
        push(folder, REPO, license="mit", collection="Fast models")
    assert REPO not in hub.repos()
    hub.collections[slug] = []
    push(folder, REPO, license="mit", collection=slug, space=True)
    push_space(REPO, collection=f"{hub.url}/collections/{slug}")
    push(folder, REPO, license="mit", collection=slug)
    assert hub.collections[slug] == [REPO, f"spaces/{REPO}"] and len(hub.commits(REPO)) == 2
    assert f"[its Space](https://huggingface.co/spaces/{REPO})" in hub.files(REPO)["README.md"].decode()
    hub.collections["org/theirs-0"] = []
    with fails("org/theirs-0", "no permission"):
        push(folder, REPO, license="mit", collection="org/theirs-0")


# Cards


PUSHED = ModelCard.from_template(
    ModelCardData(library_name="transformers", tags=["mine"]), model_description=DESCRIPTION
)


@pytest.mark.parametrize(
    "readme",
    ["---\nlicense: llama2\ntags: [mine]\nlanguage: [fr]\n---\n", str(PUSHED)],
    ids=["website", "transformers"],
)
def test_a_repository_made_elsewhere_gets_the_whole_card(hub, folder, readme, caplog):
    hub.add_repo(REPO, {"README.md": readme.encode()})
    license = None if "license" in readme else "llama2"
    push(folder, REPO, license=license)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.text == make_card(folder, REPO, license="llama2", base_model=BASE).text and not caplog.text
    assert (card.data.license, card.data.tags[0], card.data.base_model) == ("llama2", "mine", BASE)
    assert card.data.language == (["fr"] if "language" in readme else None)
    assert push(folder, REPO, license=license) == ([], None)


def test_a_repository_with_a_page_of_its_own_keeps_it(hub, folder, caplog):
    hub.add_repo(REPO, {"README.md": b"---\nlicense: mit\n---\nA whole page."})
    push(folder, REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.text.strip() == "A whole page." and (card.data.license, card.data.base_model) == ("mit", BASE)
    assert caplog.text.count("\n") == 1 and f"{REPO}/README.md" in caplog.text and "<!-- shortv:" in caplog.text
    hub.commit(REPO, {"README.md": b"---\na: [\n---\n"})
    with fails(f"{REPO}/README.md", "metadata cannot be read"):
        push(folder, REPO, license="mit")


def test_a_folder_edited_by_hand_keeps_the_repositorys_metadata(hub, folder, caplog):
    hub.add_repo(REPO, {"README.md": b"---\nlicense: mit\ntags: [theirs]\nmetrics: [accuracy]\n---\n"})
    card = (folder / "README.md").read_text().replace("## Limits", "My words.\n\n## Limits")
    (folder / "README.md").write_text(card.replace("tags:\n", "license: llama2\ntags:\n- ours\n"))
    push(folder, REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert "My words." in card.text and card.data.metrics == ["accuracy"] and {"theirs", "ours"} < {*card.data.tags}
    assert card.data.license == "llama2" and re.search("license .*mit.* llama2", caplog.text)


SCORE = Score("gqa", "lmms-lab/GQA", "accuracy", 9, 60.9, (50.0, 70.0), 61.5, (51.0, 71.0), 99.0, (98.0, 100.0),
              "2026-11-27", None)  # fmt: skip


def test_results_where_the_hub_looks_for_them(hub, folder, caplog):
    (folder / "calibration.json").write_text("{}")
    (folder / "lc_scores.png").write_bytes(b"\x89PNG\0")
    (folder / "calibration.json").unlink()
    record_score(folder, SCORE)
    record_score(folder, SCORE._replace(data="mine", dataset=None))
    push(folder, REPO, license="mit")
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert [result.metric_value for result in card.data.eval_results] == [60.9, 60.9]
    assert card.data.eval_results[0].source_url == f"https://huggingface.co/{REPO}/blob/main/evaluation.json"
    if hasattr(huggingface_hub, "EvalResultEntry"):
        (entry,) = yaml.safe_load(hub.files(REPO)[EVAL_RESULTS_FILE])
        assert entry["dataset"] == {"id": "lmms-lab/GQA", "task_id": "gqa"} and entry["value"] == 60.9
        assert "9 questions" in entry["notes"] and "61.5" not in str(entry)
    else:
        assert EVAL_RESULTS_FILE not in hub.files(REPO) and "update it" in caplog.text
    assert push(folder, REPO, license="mit") == ([], None)
    write_package(CHECKPOINT, folder, overwrite=True, replaced_layers=[7])
    push(folder, REPO, license="mit")
    assert not {EVAL_RESULTS_FILE, "evaluation.json", "lc_scores.png"} & hub.files(REPO).keys()
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.eval_results is None


# Packages of packages, and quantised ones


def test_a_quantised_package_and_the_package_of_it(hub, quantised, tmp_path):
    push(quantised, REPO, license="mit")
    assert remote(hub) == contents(quantised)
    assert push(quantised, REPO, license="mit") == ([], None)
    write_package(quantised, tmp_path / "again", replaced_layers=[2], base_model=BASE, license="llama2")
    push(tmp_path / "again", "alice/again")
    card = ModelCard(hub.files("alice/again")["README.md"].decode())
    assert "quantised (bitsandbytes, 4 bit)" in card.text and "pillow bitsandbytes`" in card.text
    data = card.data
    assert (data.license, data.base_model, data.base_model_relation) == ("llama2", BASE, "quantized")
    model = load_model(tmp_path / "again", device_map="cpu", dtype=torch.float32)
    assert model.config.replaced_layers == [2] and model.is_loaded_in_4bit


def test_the_package_of_a_pushed_package(hub, folder, tmp_path):
    push(folder, REPO, license="llama2")
    write_package(find_checkpoint(REPO), tmp_path / "two", replaced_layers=[2])
    push(tmp_path / "two", "alice/two")
    card = ModelCard(hub.files("alice/two")["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == (BASE, "finetune", "llama2")
    assert "(ids from 0): 2." in card.text


def drop_part(tensors, name):
    del tensors[name]


def cut_part(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize("damage", [drop_part, cut_part])
@pytest.mark.parametrize("part", ["", ".absmax", ".quant_map", ".quant_state.bitsandbytes__fp4"])
def test_damaged_quantised_weights_are_found(quantised, tmp_path, part, damage):
    folder = shutil.copytree(quantised, tmp_path / "damaged")
    tensors = load_file(folder / WEIGHTS)
    damage(tensors, f"language_model.model.layers.3.mlp.up_proj.weight{part}")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with fails("layers.3.mlp.up_proj.weight"):
        check_package(folder)


def test_as_a_script(hub, folder, tmp_path):
    script = Path(__file__).parents[1] / "push_to_hub.py"
    command = [sys.executable, str(script), str(folder), REPO, "--license", "mit"]
    done = subprocess.run(command, env=hub.env(tmp_path / "home", Hub.token), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert remote(hub) == contents(folder)


# Weights that stay on the Hub


@pytest.mark.slow
@copies
def test_weights_never_come_through_this_machine(hub, tmp_path):
    bare, layers = tmp_path / "bare", ",".join(map(str, LAYERS))
    done = shortv(hub, tmp_path, "package", BASE, "--layers", layers, "--no-weights", "--output", bare)
    assert done.returncode == 0, done.stderr
    assert not list(bare.glob("*.safetensors")) and (bare / "tokenizer.json").is_file()
    done = shortv(hub, tmp_path, "push", bare, REPO, "--weights-from", BASE)
    assert done.returncode == 0, done.stderr
    assert hub.served[BASE, WEIGHTS] == hub.received_bytes == 0
    assert remote(hub) == contents(bare) | {WEIGHTS: base_files()[WEIGHTS]}
    assert len(hub.commits(REPO)) == 2
    again = shortv(hub, tmp_path, "push", bare, REPO, "--weights-from", BASE)
    assert "nothing has changed" in again.stdout and len(hub.commits(REPO)) == 2
    card = ModelCard(hub.files(REPO)["README.md"].decode()).data
    assert (card.base_model, card.license, card.language) == (BASE, "llama2", "en")

    local = tmp_path / "package"
    write_package(CHECKPOINT, local, replaced_layers=LAYERS)
    offline = hub.env(tmp_path / "local") | {"HF_HUB_OFFLINE": "1"}
    assert answer(REPO, hub.env(tmp_path / "fresh"), tmp_path) == answer(local, offline, tmp_path)


@copies
def test_weights_from_a_revision(hub, bare):
    old = hub.refs(BASE)["refs/heads/main"]
    hub.commit(BASE, {WEIGHTS: b"something newer"})
    assert [change for change in push(bare, REPO, weights_from=f"{BASE}@{old}", dry_run=True).changes][-1] == (
        "copy",
        WEIGHTS,
        len(base_files()[WEIGHTS]),
    )
    push(bare, REPO, weights_from=f"{BASE}@{old}")
    assert remote(hub)[WEIGHTS] == base_files()[WEIGHTS]
    with fails(f"{BASE}@gone", "no such revision"):
        push(bare, REPO, weights_from=f"{BASE}@gone")


@copies
def test_sharded_weights(hub, bare, tmp_path):
    tensors = load_file(CHECKPOINT / WEIGHTS)
    names, weight_map = sorted(tensors), {}
    shards = {f"model-0000{number + 1}-of-00002.safetensors": names[number::2] for number in range(2)}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    data = {shard: (tmp_path / shard).read_bytes() for shard in shards}
    hub.commit(BASE, {WEIGHTS: None, "model.safetensors.index.json": index, **data})
    write_package(find_checkpoint(BASE), tmp_path / "full", replaced_layers=LAYERS)
    with fails(BASE, "has no model.safetensors"):
        (bare / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
        push(bare, REPO, weights_from=BASE)
    hub.served.clear()
    push(tmp_path / "full", REPO, weights_from=BASE)  # a whole package too: its weights are the base's
    assert not any(name.endswith(".safetensors") for _, name in hub.served) and hub.received_bytes == 0
    assert remote(hub) == contents(tmp_path / "full")


@copies
def test_corrections_go_up_and_the_bases_single_file_is_copied(hub, tmp_path):
    parts = {"down.weight": torch.zeros(2, 192), "up.weight": torch.zeros(192, 2), "up.bias": torch.zeros(192)}
    tensors = {f"layers.0.correction.{name}": part for name, part in parts.items()}
    settings = {"replaced_layers": LAYERS, "correction_rank": 2, "corrected_layers": [0]}
    write_package(find_checkpoint(BASE), tmp_path / "corrected", corrections=tensors, **settings)
    hub.served.clear()
    pushed = push(tmp_path / "corrected", REPO, weights_from=BASE)
    assert [change.path for change in pushed.changes if change.action == "copy"] == [SHARD]
    assert not any(name.endswith(".safetensors") for _, name in hub.served)
    assert hub.received_bytes == (tmp_path / "corrected" / "correction.safetensors").stat().st_size
    assert remote(hub) == contents(tmp_path / "corrected")
    assert push(tmp_path / "corrected", REPO, weights_from=BASE).changes == []


@copies
@pytest.mark.parametrize("storage", [{"region": "eu"}, {"xet": False}])
def test_refused_copies_are_uploaded(hub, bare, caplog, storage):
    hub.add_repo("org/elsewhere", base_files(), **storage)
    push(bare, REPO, weights_from="org/elsewhere")
    size = len(base_files()[WEIGHTS])
    assert "does not copy from org/elsewhere" in caplog.text and f"{size:,} bytes" in caplog.text
    assert hub.served["org/elsewhere", WEIGHTS] == hub.received_bytes == size
    assert remote(hub)[WEIGHTS] == base_files()[WEIGHTS] and len(hub.commits(REPO)) == 2
    assert push(bare, REPO, weights_from="org/elsewhere").changes == []


@copies
def test_weights_of_another_model_are_refused(hub, bare, folder):
    other = json.loads(base_files()["config.json"])
    other["text_config"]["num_hidden_layers"] = 3
    hub.add_repo("org/other", {"config.json": json.dumps(other).encode(), WEIGHTS: b"\0"})
    hub.add_repo("org/original", {"config.json": b'{"model_type": "llava", "mm_vision_tower": "a/b"}', WEIGHTS: b"\0"})
    hub.add_repo("org/tuned", base_files() | {WEIGHTS: base_files()[WEIGHTS][:-1] + b"\1"})
    with fails("org/other", "another text_config"):
        push(bare, REPO, weights_from="org/other")
    with fails("org/original", "LLaVA's own"):
        push(bare, REPO, weights_from="org/original")
    with fails(WEIGHTS, "is not the", "org/tuned"):
        push(folder, REPO, license="mit", weights_from="org/tuned")
    with fails("org/none", "no such repository"):
        push(bare, REPO, weights_from="org/none")
    assert REPO not in hub.repos()


@copies
def test_weights_are_compared_after_the_copy(hub, bare, monkeypatch):
    commit = HfApi.create_commit

    def swapped(api, repo_id, operations, **settings):
        commit(api, repo_id, operations, **settings)
        return commit(api, repo_id, [CommitOperationAdd(WEIGHTS, b"something else")], commit_message="Swap")

    monkeypatch.setattr(HfApi, "create_commit", swapped)
    with fails(REPO, WEIGHTS, "is not org/base's"):
        push(bare, REPO, weights_from=BASE)


def test_what_arrived_is_compared(hub, folder, monkeypatch):
    commit = HfApi.create_commit

    def swapped(api, repo_id, operations, **settings):
        commit(api, repo_id, operations, **settings)
        return commit(api, repo_id, [CommitOperationAdd("config.json", b"{}")], commit_message="Swap")

    monkeypatch.setattr(HfApi, "create_commit", swapped)
    with fails(REPO, "config.json", "not what was sent"):
        push(folder, REPO, license="mit")


@pytest.mark.skipif(not copies.args[0], reason="this huggingface_hub can copy")
def test_an_older_client_says_which_one_is_needed(hub, bare):
    with fails("--weights-from", "huggingface_hub 2.0"):
        push(bare, REPO, weights_from=BASE)


# Failures


@pytest.mark.parametrize(
    "endpoint, fault, words",
    [
        ("commit", {"status": 500}, ["failed .500", "run this again"]),
        ("commit", {"status": 401}, ["token"]),
        ("commit", {"status": 403}, ["no permission", "may write"]),
        ("commit", {"status": 409}, ["changed by someone else", "again"]),
        ("commit", {"status": 412}, ["changed by someone else", "again"]),
        ("commit", {"status": 429, "headers": {"Retry-After": "7"}}, ["too many requests", "in 7 seconds"]),
        ("preupload", {"status": 403}, ["no permission", "may write"]),
        ("repo_info", {"status": 401, "skip": 0}, ["token"]),
        ("repo_info", {"status": 500}, ["failed .500", "again"]),
        ("tree", {"status": 429, "times": None}, ["too many requests", "again"]),
        ("create_repo", {"status": 500}, ["failed .500", "again"]),
        ("create_repo", {"status": 403}, ["token"]),
        ("lfs_batch", {"status": 500, "times": None}, ["failed .500", "again"]),
        ("lfs_upload", {"status": 500, "times": None}, ["failed .500", "again"]),
        ("lfs_verify", {"status": 404, "times": None}, ["refused .404|no such"]),
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_an_error_leaves_the_old_state_and_a_second_run_completes(hub, folder, endpoint, fault, words, new):
    if not new:
        if endpoint == "create_repo":
            pytest.skip("the repository exists")
        push(folder, REPO, license="mit")
        (folder / "extra.bin").write_bytes(b"\0extra")
    elif endpoint == "tree":
        pytest.skip("there is no tree yet")
    before = hub.files(REPO) if not new else {}
    planned = hub.fail(endpoint, message="Nope", **fault)
    with fails(REPO, *words):
        push(folder, REPO, license="mit")
    assert planned.hits and (hub.files(REPO) if REPO in hub.repos() else {}).keys() - {".gitattributes"} == (
        before.keys() - {".gitattributes"}
    )
    hub.faults.clear()
    push(folder, REPO, license="mit")
    assert remote(hub) == contents(folder)


@pytest.mark.parametrize("endpoint", ["repo_info", "create_repo", "preupload", "lfs_batch", "lfs_upload", "commit"])
@pytest.mark.parametrize("side", ["request", "response"])
def test_a_cut_connection_leaves_old_or_new_and_a_second_run_completes(hub, folder, endpoint, side):
    hub.cut(endpoint, side, times=None)
    with fails(REPO, "again"):
        push(folder, REPO, license="mit")
    there = remote(hub) if REPO in hub.repos() else {}
    assert there == (contents(folder) if (endpoint, side) == ("commit", "response") else {})
    hub.faults.clear()
    push(folder, REPO, license="mit")
    assert remote(hub) == contents(folder)
    assert len(hub.commits(REPO)) == 2  # where the first commit had arrived, there is no second


@copies
@pytest.mark.parametrize("fault, words", [({"status": 500}, "failed .500"), ({"status": 429}, "too many")])
def test_a_failing_copy_moves_no_weights(hub, bare, fault, words):
    hub.fail("lfs_duplicate", **fault)
    with fails(words, "again"):
        push(bare, REPO, weights_from=BASE)
    assert remote(hub) == {} and hub.served[BASE, WEIGHTS] == 0
    push(bare, REPO, weights_from=BASE)
    assert remote(hub)[WEIGHTS] == base_files()[WEIGHTS]


def test_a_commit_of_someone_else_in_between(hub, folder, monkeypatch):
    push(folder, REPO, license="mit")
    (folder / "generation_config.json").write_text("{}")
    plan = pushing._operations

    def raced(*arguments):
        hub.commit(REPO, {"generation_config.json": b'{"theirs": 1}'})
        return plan(*arguments)

    monkeypatch.setattr(pushing, "_operations", raced)
    with fails("changed by someone else"):
        push(folder, REPO, license="mit")
    assert hub.files(REPO)["generation_config.json"] == b'{"theirs": 1}'
    monkeypatch.setattr(pushing, "_operations", plan)
    push(folder, REPO, license="mit")
    assert hub.files(REPO)["generation_config.json"] == b"{}"


@pytest.mark.parametrize("status", [404, 501])
def test_a_hub_without_xet(hub, folder, monkeypatch, status):
    """Clients before 2.0 ask the Hub for a way of transfer first, and do not come to this."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.fail("xet_token", status, "No such thing", times=None)
    asks_first = huggingface_hub.__version__ < "2"
    with contextlib.nullcontext() if asks_first else fails(REPO, "HF_HUB_DISABLE_XET=1"):
        push(folder, REPO, license="mit")


@pytest.mark.parametrize("endpoint", ["commit", "lfs_batch", "create_repo"])
def test_a_hub_that_does_not_offer_it(hub, folder, endpoint):
    hub.fail(endpoint, 501, "Not implemented", times=None)
    with fails(REPO, "does not offer", "501: Not implemented", "HF_ENDPOINT"):
        push(folder, REPO, license="mit")


@copies
def test_a_hub_that_cannot_copy_gets_uploads(hub, bare, caplog):
    hub.fail("lfs_duplicate", 501, "Not implemented", times=None)
    push(bare, REPO, weights_from=BASE)
    assert "does not copy" in caplog.text and remote(hub)[WEIGHTS] == base_files()[WEIGHTS]


@copies
def test_a_file_that_the_hub_does_not_copy_is_uploaded(hub, bare, caplog, monkeypatch):
    commit = HfApi.create_commit

    def refused(api, repo_id, operations, **settings):
        if any(isinstance(operation, CommitOperationCopy) for operation in operations):
            raise pushing.FileDuplicationError(f"Failed to duplicate files from models/{BASE} to models/{REPO}")
        return commit(api, repo_id, operations, **settings)

    monkeypatch.setattr(HfApi, "create_commit", refused)
    push(bare, REPO, weights_from=BASE)
    assert "does not copy" in caplog.text and remote(hub)[WEIGHTS] == base_files()[WEIGHTS]


@pytest.mark.parametrize("offline, words", [(False, ["Storage is down", "run this again"]), (True, ["HF_HUB_OFFLINE"])])
def test_the_command_says_it_in_one_line(hub, folder, monkeypatch, offline, words):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    hub.fail("commit", 500, "Storage is down", times=None)
    done = shortv_here("push", folder, REPO, "--license", "mit")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("shortv: error:"), done.stderr
    assert all(word in done.stderr.splitlines()[-1] for word in words)


@pytest.mark.parametrize(
    "token, words", [("", "hf auth login"), ("hf_wrong", "token is not accepted"), (Hub.read_token, "token|permission")]
)
def test_token(hub, folder, monkeypatch, token, words):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    with fails(words) as failure:
        push(folder, REPO, license="mit")
    assert hub.repos() == [BASE] and (not token or token not in str(failure.value))


# Bad input


def test_a_wrong_folder_is_told_before_a_missing_login(tmp_path):
    with fails(f"{tmp_path}: no checkpoint"):
        push(tmp_path, REPO)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


def rename_tensor(path):
    tensors = load_file(path)
    tensors["other"] = tensors.pop(sorted(tensors)[3])
    save_file(tensors, path, {"format": "pt"})


def reshape_tensor(path):
    tensors = load_file(path)
    tensors[sorted(tensors)[3]] = torch.zeros(3)
    save_file(tensors, path, {"format": "pt"})


def spoil_header(path):
    data = path.read_bytes()
    path.write_bytes((2**40).to_bytes(8, "little") + data[8:])


@pytest.mark.parametrize(
    "damage, word",
    [(shorten, "damaged"), (spoil_header, "damaged"), (rename_tensor, "missing keys"), (reshape_tensor, "do not fit")],
)
def test_damaged_weights_are_found_before_upload(hub, folder, damage, word):
    damage(folder / WEIGHTS)
    with fails(word):
        push(folder, REPO, license="mit")
    assert hub.repos() == [BASE] and not hub.requests


def test_a_listed_shard_that_is_missing(hub, folder):
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    with fails("model-00001-of-00002.safetensors is missing"):
        push(folder, REPO, license="mit")


def test_a_bin_with_more_than_tensors(hub, folder):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(folder / "executed"),)

    (folder / WEIGHTS).unlink()
    torch.save({"weight": torch.zeros(1), "trap": Trap()}, folder / "pytorch_model.bin")
    with fails("refused", "nothing .*executed"):
        push(folder, REPO, license="mit")
    assert not (folder / "executed").exists()


def spoil_config(folder, **entries):
    """Change entries of config.json; those with None go."""
    config = json.loads((folder / "config.json").read_text()) | entries
    for key in [key for key in entries if config[key] is None]:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: shutil.rmtree(folder), ["no checkpoint"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["JSON"]),
        (lambda folder: spoil_config(folder, model_type="llava"), ["plain LLaVA", "shortv package"]),
        (lambda folder: spoil_config(folder, auto_map=None), ["auto_map"]),
        (lambda folder: spoil_config(folder, replaced_layers=[99]), ["99"]),
        (lambda folder: spoil_config(folder, architectures=["LlavaForConditionalGeneration"]), ["architectures"]),
        (lambda folder: (folder / "modeling_shortv_llava.py").unlink(), ["modeling_shortv_llava.py is missing"]),
        (lambda folder: (folder / WEIGHTS).unlink(), ["no weights", "--weights-from"]),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), ["README.md", "metadata"]),
    ],
)
def test_a_folder_that_is_no_complete_package(hub, folder, spoil, words):
    spoil(folder)
    with fails(*words):
        push(folder, REPO, license="mit")
    assert hub.repos() == [BASE]


def test_what_is_unusual_is_said(hub, folder, caplog):
    (folder / "modeling_shortv_llava.py").write_text("# mine\n" + (folder / "modeling_shortv_llava.py").read_text())
    (folder / "tokenizer_config.json").unlink()
    push(folder, REPO, license="mit")
    assert "modeling_shortv_llava.py differs" in caplog.text and "no tokenizer" in caplog.text


def test_licence(hub, folder):
    with fails("licence .*unknown", "--license"):
        push(folder, REPO)
    with fails(REPO, "license"):
        push(folder, REPO, license="my own")
    assert remote(hub) == {}


@pytest.mark.parametrize("repo_id, word", [("solo", "owner/name"), ("a/b/c", "no id"), ("alice/..", "no id")])
def test_wrong_repository_id(hub, folder, repo_id, word):
    with fails(word):
        push(folder, repo_id, license="mit")
    assert not hub.requests


def test_private_is_not_promised_in_vain(hub, folder):
    hub.add_repo(REPO)
    with fails(REPO, "is public already"):
        push(folder, REPO, license="mit", private=True)
    hub.add_repo("alice/secret", private=True)
    push(folder, "alice/secret", license="mit", private=True)


def test_a_card_edited_on_the_hub_is_kept(hub, folder):
    push(folder, REPO, license="mit")
    card = hub.files(REPO)["README.md"].decode()
    hub.commit(REPO, {"README.md": card.replace("## Limits", "## My notes\n\nMine.\n\n## Limits").encode()})
    write_package(CHECKPOINT, folder, overwrite=True, replaced_layers=[7])
    push(folder, REPO, license="mit")
    renewed = hub.files(REPO)["README.md"].decode()
    assert "## My notes\n\nMine." in renewed and "(ids from 0): 7." in renewed and "11, 0" not in renewed
    assert push(folder, REPO, license="mit").changes == []


# Original checkpoints


def test_both_layouts_give_the_same_package(reference, tmp_path):
    source, expected, description = reference
    layers = description["replaced_layers"]["few"]
    arguments = ["--layers", ",".join(map(str, layers)), "--vision-tower", source / "vision_tower"]
    for layout in ("hf", "original"):
        done = shortv_here("package", source / layout, *arguments, "--output", tmp_path / layout)
        assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob(".*"))
    configs = [json.loads((tmp_path / layout / "config.json").read_text()) for layout in ("hf", "original")]
    for key in ("model_type", "replaced_layers", "auto_map", "architectures", "vision_feature_layer"):
        assert configs[0][key] == configs[1][key]
    inputs = {key: expected[key].clone() for key in ("input_ids", "pixel_values")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    image_token = description["image_token_id"]
    for config, layout in zip(configs, ("hf", "original")):  # conversion adds a token for the image
        ids = expected["input_ids"].clone()
        ids[ids == image_token] = config["image_token_index"]
        model = load_model(tmp_path / layout, dtype=torch.float32)
        with torch.no_grad():
            logits = model(**inputs | {"input_ids": ids}).logits[0, :, :320]
        assert (logits - expected["logits_few"]).abs().max() < 1e-5


def test_an_original_checkpoint_wherever_one_is_taken(reference, tmp_path, monkeypatch):
    source, expected, _ = reference
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    folder = find_checkpoint(str(source / "original"), str(source / "vision_tower"))
    tensors, published = load_file(folder / "model-00001-of-00002.safetensors"), load_file(source / "hf" / WEIGHTS)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert torch.equal(tensors[name], published[name])
    write_package(folder, tmp_path / "package", replaced_layers=[7])
    assert load_model(tmp_path / "package", dtype=torch.float32).config.replaced_layers == [7]
    with pytest.raises(ValueError, match="99"):  # before the conversion
        write_package(source / "original", tmp_path / "other", vision_tower="none/at-all", replaced_layers=[99])
    with fails("--no-weights"):
        write_package(source / "original", tmp_path / "other", weights=False, replaced_layers=[7])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assets", "package"]


def test_an_original_checkpoint_from_the_hub(hub, reference, tmp_path, caplog):
    source, _, _ = reference
    files = {path.name: path.read_bytes() for path in (source / "original").iterdir()}
    card = b"---\nlicense: apache-2.0\n---\n"
    extra = {"README.md": card, "tokenizer.model": b"no tokenizer", "training_args.bin": b"no tensors"}
    hub.add_repo("org/original", files | extra)
    tower = {path.name: path.read_bytes() for path in (source / "vision_tower").iterdir()}
    hub.add_repo("openai/clip-vit-large-patch14-336", tower)
    done = shortv_here("package", "org/original", "--layers", "7", "--output", tmp_path / "out")
    assert done.returncode == 1 and "tokenizer cannot be read" in done.stderr  # it was fetched, and is none
    hub.commit("org/original", {"tokenizer.model": None})
    done = shortv_here("package", "org/original", "--layers", "7", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "has no tokenizer" in caplog.text and hub.served["org/original", "training_args.bin"] == 0
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.base_model, data.license) == ("org/original", "apache-2.0")


@pytest.mark.parametrize("base", ["org/original", BASE])
def test_offline_fails_fast(hub, tmp_path, monkeypatch, base):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = shortv_here("package", base, "--layers", "1", "--output", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert base in done.stderr and "HF_HUB_OFFLINE" in done.stderr and hub.requests == []
