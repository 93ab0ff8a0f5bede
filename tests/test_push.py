"""Packages pushed to a local Hub by the real client: what arrives, what is moved, and what every failure leaves."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import Hub
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi, ModelCard, constants
from huggingface_hub.utils import _cache_assets
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from shortv_llava import push_to_hub
from shortv_llava.calibrate.samples import embedded_samples
from shortv_llava.checkpoints import CHECKPOINT
from shortv_llava.errors import ShortVError
from shortv_llava.package import SHARD, fetch_checkpoint, find_checkpoint, load_model, write_package
from shortv_llava.push_to_hub import push

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


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "package"
    write_package(CHECKPOINT, folder, base_model=BASE, replaced_layers=LAYERS)
    return folder


@pytest.fixture
def bare(hub, tmp_path) -> Path:
    """A package without weights, whose base is on the Hub."""
    write_package(fetch_checkpoint(BASE, weights=False), tmp_path / "bare", weights=False, replaced_layers=LAYERS)
    return tmp_path / "bare"


def shortv(hub, home, *arguments, token=Hub.token, **environment) -> subprocess.CompletedProcess:
    """The command in a process of its own, whose HF_ENDPOINT is the hub."""
    command = [sys.executable, "-m", "shortv_llava.cli", *map(str, arguments)]
    env = hub.env(home / "home", token) | {"OMP_NUM_THREADS": "1"} | environment
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
    done = subprocess.run(command, env=env | {"OMP_NUM_THREADS": "1"}, cwd=cwd, capture_output=True, text=True)
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


def test_dry_run(hub, folder, tmp_path):
    done = shortv(hub, tmp_path, "push", folder, REPO, "--license", "mit", "--dry-run", token=None)
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
    tensors = {f"language_model.model.layers.0.correction.{name}": part for name, part in parts.items()}
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


@pytest.mark.skipif(not copies.args[0], reason="this huggingface_hub can copy")
def test_an_older_client_says_which_one_is_needed(hub, bare):
    with fails("--weights-from needs huggingface_hub 2.0 or newer"):
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
    plan = push_to_hub._operations

    def raced(*arguments):
        hub.commit(REPO, {"generation_config.json": b'{"theirs": 1}'})
        return plan(*arguments)

    monkeypatch.setattr(push_to_hub, "_operations", raced)
    with fails("changed by someone else"):
        push(folder, REPO, license="mit")
    assert hub.files(REPO)["generation_config.json"] == b'{"theirs": 1}'
    monkeypatch.setattr(push_to_hub, "_operations", plan)
    push(folder, REPO, license="mit")
    assert hub.files(REPO)["generation_config.json"] == b"{}"


def test_the_command_says_it_in_one_line(hub, folder, tmp_path):
    hub.fail("commit", 500, "Storage is down", times=None)
    for environment, words in [
        ({"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, ["Storage is down", "run this again"]),
        ({"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE"]),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, ["check the connection"]),
    ]:
        done = shortv(hub, tmp_path, "push", folder, REPO, "--license", "mit", **environment)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert all(word in done.stderr for word in words)


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


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


def rename_tensor(path):
    tensors = load_file(path)
    tensors["other"] = tensors.pop(sorted(tensors)[3])
    os.unlink(path)  # it is a link to the checkpoint
    save_file(tensors, path, {"format": "pt"})


def reshape_tensor(path):
    tensors = load_file(path)
    tensors[sorted(tensors)[3]] = torch.zeros(3)
    os.unlink(path)
    save_file(tensors, path, {"format": "pt"})


def spoil_header(path):
    data = path.read_bytes()
    path.write_bytes((2**40).to_bytes(8, "little") + data[8:])


@pytest.mark.parametrize(
    "damage, word",
    [(shorten, "damaged"), (spoil_header, "damaged"), (rename_tensor, "missing keys"), (reshape_tensor, "do not fit")],
)
def test_damaged_weights_are_found_before_upload(hub, folder, damage, word):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(data)
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
    with fails("refused", "nothing in it was executed"):
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
    with fails("licence of the weights is unknown", "--license"):
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
    with Hub() as hub:
        for layout in ("hf", "original"):
            done = shortv(hub, tmp_path, "package", source / layout, *arguments, "--output", tmp_path / layout)
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


def test_an_original_checkpoint_from_the_hub(hub, reference, tmp_path):
    source, _, _ = reference
    files = {path.name: path.read_bytes() for path in (source / "original").iterdir()}
    card = b"---\nlicense: apache-2.0\n---\n"
    extra = {"README.md": card, "tokenizer.model": b"no tokenizer", "training_args.bin": b"no tensors"}
    hub.add_repo("org/original", files | extra)
    tower = {path.name: path.read_bytes() for path in (source / "vision_tower").iterdir()}
    hub.add_repo("openai/clip-vit-large-patch14-336", tower)
    done = shortv(hub, tmp_path, "package", "org/original", "--layers", "7", "--output", tmp_path / "out")
    assert done.returncode == 1 and "tokenizer cannot be read" in done.stderr  # it was fetched, and is none
    hub.commit("org/original", {"tokenizer.model": None})
    done = shortv(hub, tmp_path, "package", "org/original", "--layers", "7", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "has no tokenizer" in done.stderr and hub.served["org/original", "training_args.bin"] == 0
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.base_model, data.license) == ("org/original", "apache-2.0")


def test_offline_fails_fast(hub, tmp_path):
    for base in ("org/original", BASE):
        done = shortv(hub, tmp_path, "package", base, "--layers", "1", "--output", tmp_path / "out", HF_HUB_OFFLINE="1")
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert base in done.stderr and "HF_HUB_OFFLINE" in done.stderr
