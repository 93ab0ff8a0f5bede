"""The local Hub, seen through the real client."""

import contextlib
import hashlib
import inspect
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    model_info,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from hub import ENDPOINTS, Hub, User

WEIGHTS = bytes(range(256)) * 64
FILES = {"config.json": b'{"model_type": "clip"}', "model.safetensors": WEIGHTS, "sub/deep/notes.txt": b"notes"}
README = b"---\nlicense: apache-2.0\npipeline_tag: image-text-to-text\nbase_model: org/base\ntags: [llava]\n---\n# Me\n"
GIT_ID = "6d71d5947a0a8a2ad1517d775879c0ba7ac762dc"  # of config.json, by `git hash-object`

cross_repo = pytest.mark.skipif(
    "src_repo_id" not in inspect.signature(CommitOperationCopy).parameters,
    reason="this huggingface_hub copies within one repository only",
)


@pytest.fixture
def hub():
    with Hub() as hub:
        hub.add_repo("org/base", FILES)
        hub.add_repo("alice/model", {"README.md": README})
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def naps(monkeypatch):
    """The client's waits between retries, not waited for."""
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


def add(**files):
    """Additions, from names with "__" for the dot."""
    return [CommitOperationAdd(name.replace("__", "."), data) for name, data in files.items()]


def run(hub, home, code, token=None):
    """Run code in a fresh interpreter whose HF_ENDPOINT is the hub, and decode the JSON it prints last."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=hub.env(home, token), capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_whoami(hub, api):
    me = api.whoami()
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("alice", ["acme"])
    assert me["auth"]["accessToken"]["role"] == "write"
    with pytest.raises(OSError, match="Invalid user token"):  # before 1.0 a plain HTTP error
        api.whoami(token="hf_nobody")


def test_tokens_are_configurable():
    with Hub(tokens={"hf_bob": User("bob", orgs=("lab",))}) as hub:
        api = HfApi(endpoint=hub.url, token="hf_bob")
        assert api.create_repo("lab/model").repo_id == "lab/model"
        assert api.create_repo("solo").repo_id == "bob/solo"
        with pytest.raises(HfHubHTTPError, match="401"):
            api.create_repo("bob/other", token=hub.token)
        assert hub.repos() == ["bob/solo", "lab/model"]


def test_create_repo(hub, api):
    url = api.create_repo("alice/new", private=True)
    assert (url.repo_id, str(url)) == ("alice/new", f"{hub.url}/alice/new")
    assert list(hub.files("alice/new")) == [".gitattributes"]
    assert api.create_repo("alice/new", exist_ok=True).repo_id == "alice/new"
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo("alice/new")
    assert error.value.response.status_code == 409
    for repo_id, token in [("org/new", hub.token), ("alice/other", hub.read_token)]:
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo(repo_id, token=token)
    api.delete_repo("alice/new")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("alice/new")
    assert hub.repos() == ["alice/model", "org/base"]


def test_private_repo_needs_its_owner(hub, api, tmp_path):
    hub.add_repo("acme/secret", FILES, private=True)
    hub.add_repo("org/secret", FILES, private=True)
    assert api.model_info("acme/secret", token=hub.read_token).private
    path = api.hf_hub_download("acme/secret", "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    for repo_id, token in [("acme/secret", False), ("org/secret", hub.token), ("org/missing", hub.token)]:
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(repo_id, token=token)
        assert not api.repo_exists(repo_id, token=token)


@pytest.mark.parametrize(
    "repo_id, token, error",
    [("alice/model", False, RepositoryNotFoundError), ("alice/model", "hf_alice_read", HfHubHTTPError)]
    + [("org/base", None, HfHubHTTPError), ("alice/none", None, RepositoryNotFoundError)],
)
def test_writing_needs_a_write_token_of_the_owner(hub, api, repo_id, token, error):
    refs = hub.refs("alice/model"), hub.refs("org/base")
    with pytest.raises(error, match="401|403|404"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=repo_id, token=token)
    assert (hub.refs("alice/model"), hub.refs("org/base")) == refs


def test_upload_file_and_no_op(hub, api):
    info = api.upload_file(path_or_fileobj=b"text", path_in_repo="a/b.txt", repo_id="alice/model", commit_message="Add")
    assert hub.files("alice/model") == {"README.md": README, "a/b.txt": b"text"}
    (newest, oldest) = hub.commits("alice/model")
    assert (newest.oid, newest.title, newest.author, newest.parent) == (info.oid, "Add", "alice", oldest.oid)
    assert info.repo_url.repo_id == "alice/model"
    again = api.upload_file(path_or_fileobj=b"text", path_in_repo="a/b.txt", repo_id="alice/model")
    assert again.oid == info.oid and len(hub.commits("alice/model")) == 2
    assert hub.received_bytes == 0


def test_upload_folder_sends_large_files_once(hub, api, tmp_path):
    content = {**FILES, "empty.bin": b"", "image.png": b"PNG", "blob": b"\0binary"}
    for path, data in content.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    first = api.upload_folder(folder_path=tmp_path, repo_id="alice/model", delete_patterns="README.md")
    assert hub.files("alice/model") == content
    assert hub.received_bytes == len(WEIGHTS) + len(b"PNG") + len(b"\0binary")
    stored = api.list_repo_tree("alice/model", recursive=True)
    assert {file.path for file in stored if getattr(file, "lfs", None)} == {"model.safetensors", "image.png", "blob"}
    api.upload_folder(folder_path=tmp_path, repo_id="alice/model")
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="twin.safetensors", repo_id="alice/model")
    assert [commit.parent for commit in hub.commits("alice/model")][:1] == [first.oid]
    assert hub.received_bytes == len(WEIGHTS) + len(b"PNG") + len(b"\0binary")


def test_commit_adds_deletes_and_copies_in_one_step(hub, api):
    hub.add_repo("alice/all", FILES)
    operations = [
        *add(new__txt=b"new", config__json=b"{}"),
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationCopy("config.json", "old.json"),
        CommitOperationDelete("sub/"),
        CommitOperationDelete("model.safetensors"),
    ]
    info = api.create_commit("alice/all", operations, commit_message="Title", commit_description="More")
    content = {"new.txt": b"new", "config.json": b"{}", "old.json": FILES["config.json"], "copy.safetensors": WEIGHTS}
    assert hub.files("alice/all") == content
    assert (hub.received_bytes, hub.served["alice/all", "model.safetensors"]) == (0, 0)
    commits = api.list_repo_commits("alice/all")
    assert [(c.commit_id, c.title, c.message) for c in commits][0] == (info.oid, "Title", "More")
    assert len(commits) == len(hub.commits("alice/all")) == 2


@cross_repo
def test_copy_from_another_repo_moves_no_weights(hub, api):
    old = hub.refs("org/base")["refs/heads/main"]
    hub.commit("org/base", {"model.safetensors": b"\0newer", "config.json": None})
    copies = [
        CommitOperationCopy("model.safetensors", "new.safetensors", src_repo_id="org/base", src_repo_type="model"),
        CommitOperationCopy("config.json", "config.json", old, src_repo_id="org/base", src_repo_type="model"),
        CommitOperationCopy("model.safetensors", "old.safetensors", old, src_repo_id="org/base", src_repo_type="model"),
    ]
    api.create_commit("alice/model", copies, commit_message="Copy")
    content = {"new.safetensors": b"\0newer", "old.safetensors": WEIGHTS, "config.json": FILES["config.json"]}
    assert hub.files("alice/model") == {"README.md": README, **content}
    assert hub.received_bytes == 0
    assert hub.served == {("org/base", "config.json"): len(FILES["config.json"])}


@cross_repo
@pytest.mark.parametrize(
    "storage, error, message",
    [({"region": "eu"}, BadRequestError, "across storage regions"), ({"xet": False}, ValueError, "no xet hash")],
)
def test_copy_that_the_hub_refuses(hub, api, storage, error, message):
    hub.add_repo("org/elsewhere", FILES, **storage)
    refs = hub.refs("alice/model")
    source = {"src_repo_id": "org/elsewhere", "src_repo_type": "model"}
    copy = CommitOperationCopy("model.safetensors", "model.safetensors", **source)
    with pytest.raises(error, match=message):
        api.create_commit("alice/model", [copy, *add(x__txt=b"x")], commit_message="Copy")
    assert hub.refs("alice/model") == refs
    with pytest.raises(EntryNotFoundError, match="missing on repo"):
        api.create_commit("alice/model", [CommitOperationCopy("nothing", "x", **source)], commit_message="Copy")


@cross_repo
def test_copy_of_a_lost_file(hub, api, tmp_path):
    hub.lose("org/base", "model.safetensors")
    refs = hub.refs("alice/model")
    copy = CommitOperationCopy("model.safetensors", "x.safetensors", src_repo_id="org/base", src_repo_type="model")
    with pytest.raises(Exception, match="Failed to duplicate"):
        api.create_commit("alice/model", [copy], commit_message="Copy")
    assert hub.refs("alice/model") == refs
    with pytest.raises(HfHubHTTPError, match="404"):
        api.hf_hub_download("org/base", "model.safetensors", cache_dir=tmp_path)


def test_pull_request_leaves_main_alone(hub, api):
    main = hub.refs("org/base")["refs/heads/main"]
    info = api.create_commit("org/base", add(x__bin=b"\0x"), commit_message="Offer", create_pr=True)
    assert (info.pr_num, info.pr_revision, info.pr_url) == (1, "refs/pr/1", f"{hub.url}/org/base/discussions/1")
    assert hub.files("org/base") == FILES
    assert hub.files("org/base", "refs/pr/1") == {**FILES, "x.bin": b"\0x"}
    refs = api.list_repo_refs("org/base", include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.branches] == [("refs/heads/main", main)]
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", info.oid)]
    second = api.create_commit("org/base", add(y__txt=b"y"), commit_message="2", create_pr=True, parent_commit=main)
    assert second.pr_num == 2
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_commit("org/base", add(z__txt=b"z"), commit_message="3", create_pr=True, token=hub.read_token)
    hub.add_repo("alice/other")
    api.create_commit("alice/other", add(x__txt=b"1"), commit_message="1", create_pr=True)
    api.create_commit("alice/other", add(x__txt=b"2"), commit_message="2", revision="refs/pr/1")
    assert (hub.files("alice/other"), hub.files("alice/other", "refs/pr/1")) == ({}, {"x.txt": b"2"})


def test_parent_commit(hub, api):
    parent = api.model_info("alice/model").sha
    api.create_commit("alice/model", add(a__txt=b"a"), commit_message="1", parent_commit=parent)
    moved = hub.commit("alice/model", {"b.txt": b"b", "a.txt": None})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit("alice/model", add(c__txt=b"c"), commit_message="2", parent_commit=parent)
    assert error.value.response.status_code == 412
    assert hub.refs("alice/model") == {"refs/heads/main": moved}
    api.create_commit("alice/model", add(c__txt=b"c"), commit_message="2", parent_commit=moved[:7])
    assert set(hub.files("alice/model")) == {"README.md", "b.txt", "c.txt"}


@pytest.mark.parametrize(
    "operations, error",
    [
        (lambda: [*add(x__txt=b"x"), CommitOperationDelete("nothing.txt")], EntryNotFoundError),
        (lambda: [*add(x__txt=b"x"), CommitOperationCopy("nothing.bin", "y.bin")], EntryNotFoundError),
        (lambda: [*add(x__txt=b"x"), *add(README__md=b"---\nlicense: mine\n---\n")], ValueError),
    ],
)
def test_refused_commit_changes_nothing(hub, api, operations, error):
    refs = hub.refs("alice/model")
    with pytest.raises(error):
        api.create_commit("alice/model", operations(), commit_message="Bad")
    assert hub.refs("alice/model") == refs


def test_concurrent_commits_all_count(hub, api):
    def upload(n):
        api.create_commit("alice/model", [CommitOperationAdd(f"{n}.txt", b"x")], commit_message="Add")

    threads = [threading.Thread(target=upload, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(hub.files("alice/model")) == {"README.md", *(f"{n}.txt" for n in range(8))}
    assert len(hub.commits("alice/model")) == 9


def test_branches_and_tags(hub, api):
    first = api.model_info("alice/model").sha
    api.create_branch("alice/model", branch="dev/x")
    api.create_tag("alice/model", tag="v1")
    api.create_branch("alice/model", branch="dev/x", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_tag("alice/model", tag="v1")
    api.create_commit("alice/model", add(x__txt=b"x"), commit_message="Add", revision="dev/x")
    assert (set(hub.files("alice/model")), set(hub.files("alice/model", "dev/x"))) == (
        {"README.md"},
        {"README.md", "x.txt"},
    )
    assert api.model_info("alice/model", revision="v1").sha == first
    with pytest.raises(RevisionNotFoundError):
        api.create_commit("alice/model", add(y__txt=b"y"), commit_message="On a tag", revision="v1")
    api.delete_branch("alice/model", branch="dev/x")
    api.delete_tag("alice/model", tag="v1")
    assert hub.refs("alice/model") == {"refs/heads/main": first}
    with pytest.raises(RevisionNotFoundError):
        api.model_info("alice/model", revision="dev/x")
    assert api.revision_exists("alice/model", first) and not api.revision_exists("alice/model", "v1")


def test_model_info(hub, api):
    info = api.model_info("alice/model")
    assert (info.id, info.author, info.sha) == ("alice/model", "alice", hub.commits("alice/model")[0].oid)
    assert (info.pipeline_tag, info.tags, info.card_data.base_model) == ("image-text-to-text", ["llava"], "org/base")
    blobs = {file.rfilename: file for file in api.model_info("org/base", files_metadata=True).siblings}
    assert set(blobs) == set(FILES)
    lfs = next(file.lfs for file in api.list_repo_tree("org/base") if file.path == "model.safetensors")
    assert (blobs["model.safetensors"].size, blobs["model.safetensors"].lfs) == (len(WEIGHTS), lfs)
    assert blobs["config.json"].lfs is None


def test_tree_and_paths_info(hub, api):
    hub.page_size = 2
    recursive = list(api.list_repo_tree("org/base", recursive=True))
    paths = ["config.json", "model.safetensors", "sub", "sub/deep", "sub/deep/notes.txt"]
    assert [file.path for file in recursive] == paths
    assert len([call for call in hub.requests if call.endpoint == "tree"]) == 3
    assert [file.path for file in api.list_repo_tree("org/base")] == ["config.json", "model.safetensors", "sub"]
    assert [file.path for file in api.list_repo_tree("org/base", "sub")] == ["sub/deep"]
    weights, sha256 = recursive[1], hashlib.sha256(WEIGHTS).hexdigest()
    assert (weights.size, weights.lfs.size, weights.lfs.sha256) == (len(WEIGHTS), len(WEIGHTS), sha256)
    assert recursive[0].blob_id == GIT_ID
    assert api.get_paths_info("org/base", ["model.safetensors", "nothing"]) == [weights]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/base", "nothing"))


def test_metadata_of_regular_and_large_files(hub, api):
    sha = hub.commits("org/base")[0].oid
    regular = get_hf_file_metadata(hf_hub_url("org/base", "config.json", endpoint=hub.url), token=False)
    assert (regular.commit_hash, regular.size, regular.location) == (
        sha,
        len(FILES["config.json"]),
        f"{hub.url}/org/base/resolve/main/config.json",
    )
    large = get_hf_file_metadata(hf_hub_url("org/base", "model.safetensors", endpoint=hub.url), token=False)
    assert (large.commit_hash, large.size) == (sha, len(WEIGHTS))
    assert (regular.etag, large.etag) == (GIT_ID, hashlib.sha256(WEIGHTS).hexdigest())
    assert not large.location.startswith(hub.url) and large.xet_file_data is None
    assert api.file_exists("org/base", "config.json") and not api.file_exists("org/base", "nothing")
    assert hub.served_bytes == 0


def test_snapshot_download_into_an_empty_cache(hub, tmp_path):
    path = snapshot_download("org/base", endpoint=hub.url, cache_dir=tmp_path, token=False)
    assert {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()} == FILES
    assert Path(path).name == hub.commits("org/base")[0].oid
    assert hub.served == {("org/base", name): len(data) for name, data in FILES.items()}
    snapshot_download("org/base", endpoint=hub.url, cache_dir=tmp_path, token=False)
    assert hub.served_bytes == sum(map(len, FILES.values()))


def test_download_of_revisions(hub, api, tmp_path):
    old = hub.commits("org/base")[0].oid
    new = hub.commit("org/base", {"config.json": b"{}"})
    pull = api.create_commit("org/base", add(config__json=b"[]"), commit_message="Offer", create_pr=True)
    expected = {old: FILES["config.json"], new: b"{}", "main": b"{}", pull.pr_revision: b"[]"}
    for revision, data in expected.items():
        path = hf_hub_download("org/base", "config.json", revision=revision, endpoint=hub.url, cache_dir=tmp_path)
        assert Path(path).read_bytes() == data
    for revision, name, error in [("nope", "config.json", RevisionNotFoundError), (old, "nope", EntryNotFoundError)]:
        with pytest.raises(error):
            hf_hub_download("org/base", name, revision=revision, endpoint=hub.url, cache_dir=tmp_path)


def test_fault_500_on_commit(hub, api):
    refs = hub.refs("alice/model")
    fault = hub.fail("commit", 500, "Storage is down")
    with pytest.raises(HfHubHTTPError, match="Storage is down") as error:
        api.create_commit("alice/model", add(x__bin=b"\0x"), commit_message="Add")
    assert (error.value.response.status_code, fault.hits) == (500, 1)
    assert hub.refs("alice/model") == refs
    api.create_commit("alice/model", add(x__bin=b"\0x"), commit_message="Add")
    assert hub.files("alice/model")["x.bin"] == b"\0x"
    assert hub.received_bytes == 2  # the large file was there already


@pytest.mark.parametrize(
    "status, code, expected",
    [
        (400, None, BadRequestError),
        (401, "RepoNotFound", RepositoryNotFoundError),
        (403, None, HfHubHTTPError),
        (403, "GatedRepo", GatedRepoError),
        (404, "RevisionNotFound", RevisionNotFoundError),
        (404, "RepoNotFound", RepositoryNotFoundError),
        (409, None, HfHubHTTPError),
        (412, None, HfHubHTTPError),
        (429, None, HfHubHTTPError),
    ],
)
def test_fault_classes(hub, api, status, code, expected):
    refs = hub.refs("alice/model")
    hub.fail("commit", status, "Not today", code=code)
    with pytest.raises(expected, match="Not today") as error:
        api.create_commit("alice/model", add(x__txt=b"x"), commit_message="Add")
    assert (type(error.value), error.value.response.status_code) == (expected, status)
    assert hub.refs("alice/model") == refs


def test_fault_429_with_retry_after(hub, api, naps):
    hub.fail("preupload", 429, "Slow down", headers={"Retry-After": "7"})
    try:
        api.create_commit("alice/model", add(x__txt=b"x"), commit_message="Add")
    except HfHubHTTPError as error:  # clients before 1.0 leave the waiting to the caller
        assert (error.response.status_code, error.response.headers["Retry-After"], naps) == (429, "7", [])
    else:
        assert naps == [8] and "x.txt" in hub.files("alice/model")


def test_connection_cut_during_lfs_upload(hub, api, naps):
    refs = hub.refs("alice/model")
    hub.cut("lfs_upload", times=None)
    with pytest.raises(Exception) as error:
        api.create_commit("alice/model", add(model__safetensors=WEIGHTS), commit_message="Add")
    assert isinstance(error.value, RuntimeError) and "model.safetensors" in str(error.value)
    assert naps and hub.refs("alice/model") == refs
    hub.faults.clear()
    hub.cut("lfs_upload")
    sent = hub.received_bytes
    api.create_commit("alice/model", add(model__safetensors=WEIGHTS), commit_message="Add")
    assert hub.files("alice/model")["model.safetensors"] == WEIGHTS
    assert hub.received_bytes - sent == len(WEIGHTS) // 2 + len(WEIGHTS)
    hub.cut("lfs_upload", "response")
    api.create_commit("alice/model", add(other__safetensors=b"\0"), commit_message="Add")
    assert hub.received_bytes - sent == len(WEIGHTS) // 2 + len(WEIGHTS) + 2


def test_connection_cut_after_commit(hub, api):
    hub.cut("commit", "response")
    with pytest.raises(Exception, match="(?i)connection|peer|disconnect"):
        api.create_commit("alice/model", add(x__txt=b"x"), commit_message="Add")
    assert hub.files("alice/model")["x.txt"] == b"x"
    info = api.create_commit("alice/model", add(x__txt=b"x"), commit_message="Add")
    assert info.oid == hub.commits("alice/model")[0].oid and len(hub.commits("alice/model")) == 2


def test_connection_cut_during_download(hub, api, naps, tmp_path):
    hub.cut("lfs_download", "response")
    with contextlib.suppress(OSError):  # clients before 1.0 do not try again by themselves
        api.hf_hub_download("org/base", "model.safetensors", cache_dir=tmp_path)
    path = api.hf_hub_download("org/base", "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    assert hub.served["org/base", "model.safetensors"] > len(WEIGHTS)
    assert [call.status for call in hub.requests if call.endpoint == "lfs_download"][0] == 0


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_ranges(hub, path):
    url, size = hf_hub_url("org/base", path), len(FILES[path])
    for start, end, wanted in [(5, 14, "bytes=5-14"), (size - 3, size - 1, f"bytes={size - 3}-")]:
        hub.served.clear()
        response = get_session().get(url, headers={"Range": wanted})
        assert (response.status_code, response.content) == (206, FILES[path][start : end + 1])
        assert response.headers["Content-Range"] == f"bytes {start}-{end}/{size}"
        assert hub.served_bytes == end + 1 - start
    assert get_session().get(url, headers={"Range": f"bytes={size}-"}).status_code == 416


def test_slow_answer(hub, api, naps, tmp_path):
    path = api.hf_hub_download("org/base", "config.json", cache_dir=tmp_path)
    hub.delay("repo_info|resolve", 600, times=2)
    with pytest.raises(Exception, match="(?i)timed out"):
        api.model_info("org/base", timeout=0.05)
    assert api.hf_hub_download("org/base", "config.json", cache_dir=tmp_path, etag_timeout=0.05) == path
    late = hub.delay("repo_info", 0.01)
    assert api.model_info("org/base").id == "org/base" and late.hits == 1


def test_this_process_is_configured_as_long_as_the_server_runs(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    outside = dict(vars(constants))
    with Hub() as hub:
        hub.add_repo("org/base", FILES)
        assert HfApi().list_repo_files("org/base", token=False) == sorted(FILES)
        assert model_info("org/base", token=False).sha == hub.commits("org/base")[0].oid
        assert get_hf_file_metadata(hf_hub_url("org/base", "config.json")).etag == GIT_ID
    assert vars(constants) == outside
    with pytest.raises(OSError, match="offline"):
        HfApi(endpoint=hub.url).model_info("org/base", token=False)


def send(method, url, body=b"", token=None):
    """The status of an answer to a request that the client would not send."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return urlopen(Request(url, body or None, headers, method=method)).status
    except HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "operation",
    [
        {"key": "lfsFile", "value": {"path": "x.bin", "oid": "0" * 64}},
        {"key": "file", "value": {"path": "README.md", "content": "LS0tCmxpY2Vuc2U6IG1pbmUKLS0tCg=="}},
        {"key": "renamedFile", "value": {"path": "README.md"}},
    ],
)
def test_malformed_commits_are_refused(hub, operation):
    refs = hub.refs("alice/model")
    body = b"\n".join(json.dumps(line).encode() for line in [{"key": "header", "value": {"summary": "x"}}, operation])
    assert send("POST", f"{hub.url}/api/models/alice/model/commit/main", body, hub.token) == 400
    assert hub.refs("alice/model") == refs


def test_storage_takes_signed_links_only(hub, api):
    link = get_hf_file_metadata(hf_hub_url("org/base", "model.safetensors")).location
    other = link.replace(hashlib.sha256(WEIGHTS).hexdigest(), "0" * 64)
    assert send("GET", link) == 200
    assert send("GET", link, token=hub.token) == 400
    assert send("GET", link.split("?")[0]) == 403
    assert send("GET", other) == 404
    assert send("PUT", other, b"not what was promised") == 400
    verify = json.dumps({"oid": "0" * 64, "size": 1}).encode()
    assert send("POST", f"{hub.url}/alice/model.git/info/lfs/verify", verify, hub.token) == 404


def test_other_refusals(hub, api):
    assert send("GET", f"{hub.url}/api/whoami-v2") == 401
    assert send("GET", f"{hub.url}/nothing/here/at/all") == 404
    with pytest.raises(HfHubHTTPError, match="401"):
        api.create_repo("alice/new", token=False)
    with pytest.raises(BadRequestError, match="models and Spaces only"):
        api.create_repo("alice/new", repo_type="dataset")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("alice/model", tag="v0")


def test_a_failure_of_the_server_is_not_silent():
    with pytest.raises(RuntimeError, match="itself failed"), Hub() as hub:
        assert get_session().post(f"{hub.url}/api/validate-yaml", json={}).status_code == 500


def test_fault_scope(hub, api):
    with pytest.raises(ValueError, match="no endpoint"):
        hub.fail("comit")
    assert {"commit", "preupload", "lfs_batch", "lfs_upload", "lfs_duplicate", "resolve"} <= set(ENDPOINTS)
    fault = hub.fail("tree|refs", 403, skip=1, times=2, path="org/base")
    outcomes = []
    for repo_id in ["alice/model", "org/base", "org/base", "org/base", "org/base"]:
        try:
            outcomes.append(len(api.list_repo_refs(repo_id).branches))
        except HfHubHTTPError:
            outcomes.append("refused")
    assert outcomes == [1, 1, "refused", "refused", 1] and fault.hits == 2


@pytest.mark.parametrize(
    "yaml, complaint",
    [
        ("license: MIT", "license"),
        ("base_model: [org/base, 'not a model']", "base_model"),
        ("base_model: 3", "base_model"),
        ("pipeline_tag: [image-text-to-text]", "pipeline_tag"),
        ("base_model_relation: copy", "base_model_relation"),
        ("tags: llava", "tags"),
        ("license: [mit\n", "YAML"),
        ("just text", "object"),
    ],
)
def test_invalid_card_is_refused(hub, api, yaml, complaint):
    refs = hub.refs("alice/model")
    with pytest.raises(ValueError, match=complaint):
        api.create_commit("alice/model", add(README__md=f"---\n{yaml}\n---\n".encode()), commit_message="Card")
    assert hub.refs("alice/model") == refs


@pytest.mark.parametrize("readme", [b"# No metadata\n", b"---\n---\n", b"---\npipeline_tag: sorcery\n---\n"])
def test_card_with_warnings_is_accepted(hub, api, readme):
    with pytest.warns(UserWarning, match="metadata in README.md"):
        api.create_commit("alice/model", add(README__md=readme), commit_message="Card")
    assert hub.files("alice/model")["README.md"] == readme


@pytest.mark.skipif(
    "huggingface.co" in inspect.getsource(ModelCard.validate), reason="this ModelCard.validate ignores HF_ENDPOINT"
)
def test_model_card_through_hf_endpoint(hub, tmp_path):
    code = """
import json
from huggingface_hub import ModelCard
card, complaint = ModelCard.load("alice/model"), None
card.validate()
url = card.push_to_hub("alice/card", create_pr=True)
card.data.license = "mine"
try:
    card.validate()
except ValueError as error:
    complaint = str(error)
print(json.dumps([card.data.base_model, complaint, url]))
"""
    hub.add_repo("alice/card")
    base_model, complaint, url = run(hub, tmp_path, code, hub.token)
    assert base_model == "org/base"
    assert "license" in json.loads(complaint)["errors"][0]["message"]
    assert hub.files("alice/card", "refs/pr/1")["README.md"].startswith(b"---\nlicense: apache-2.0\n")
    assert hub.files("alice/card") == {} and hub.refs("alice/card")["refs/pr/1"] in url


def test_transformers_through_hf_endpoint(hub, tmp_path):
    config = {"model_type": "clip_vision_model", "hidden_size": 48}
    hub.add_repo("org/config", {"config.json": json.dumps(config).encode()}, private=True)
    hub.add_repo("acme/config", {"config.json": json.dumps(config).encode()}, private=True)
    code = """
import json
from transformers import AutoConfig
print(json.dumps([AutoConfig.from_pretrained("acme/config", revision="main").to_dict()["hidden_size"]]))
"""
    assert run(hub, tmp_path, code, hub.read_token) == [48]
    assert hub.served == {("acme/config", "config.json"): len(json.dumps(config))}
