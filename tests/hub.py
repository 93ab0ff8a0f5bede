"""A Hugging Face Hub on this machine: the HTTP API that `huggingface_hub` speaks, on 127.0.0.1 and in memory.

    with Hub() as hub:
        hub.add_repo("org/base", {"config.json": b"{}", "model.safetensors": b"..."})
        api = HfApi(endpoint=hub.url, token=hub.token)

The client is the installed one. None of its code is replaced, it is configured: inside the `with` block this process
has the server as HF_ENDPOINT, is online, and has Xet off; a subprocess gets the same by the environment `hub.env(...)`.

Only models, Spaces and collections of them exist; the id of a Space is "spaces/alice/page" here. Large files move over
LFS, as to any client without Xet, and live behind a second port: like the storage hosts of the real Hub it is another
origin, which gets signed links and no token.
"""

import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import secrets
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import NamedTuple
from unittest import mock
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

import yaml
from huggingface_hub import constants, file_download, hf_api, utils

_close_sessions = getattr(utils, "close_session", None) or utils.reset_sessions

EPOCH = datetime(2024, 1, 1, tzinfo=timezone.utc)
LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.jpeg *.jpg *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy "
    "*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.png *.pt *.pth *.rar *.safetensors *.tar *.tar.* *.tflite *.tgz "
    "*.wasm *.webp *.xz *.zip *.zst *tfevents*"
).split()
LFS_THRESHOLD = 10 * 2**20
SPACE_COLORS = set("red yellow green blue indigo purple pink gray".split())
SPACE_SDKS = set("docker gradio static".split())
LICENSES = set(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc intel-research h-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma unknown other".split()
)
PIPELINE_TAGS = set(
    "any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition "
    "depth-estimation document-question-answering feature-extraction fill-mask image-classification "
    "image-feature-extraction image-segmentation image-text-to-image image-text-to-text image-text-to-video "
    "image-to-3d image-to-image image-to-text image-to-video keypoint-detection mask-generation object-detection "
    "question-answering reinforcement-learning robotics sentence-similarity summarization table-question-answering "
    "tabular-classification tabular-regression text-classification text-generation text-ranking text-to-3d "
    "text-to-audio text-to-image text-to-speech text-to-video time-series-forecasting token-classification "
    "translation unconditional-image-generation video-classification video-text-to-text video-to-video "
    "visual-document-retrieval visual-question-answering voice-activity-detection zero-shot-classification "
    "zero-shot-image-classification zero-shot-object-detection other".split()
)
CARD = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(\r?\n|\Z)", re.DOTALL | re.MULTILINE)
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


class HubError(Exception):
    """An answer other than success; `code` is the `X-Error-Code` from which the client picks its exception."""

    def __init__(self, status, message, code=None, headers=None):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class User:
    """Who a token stands for: `role` is the token's ("read" or "write"), `orgs` those the user may write to."""

    name: str
    role: str = "write"
    orgs: tuple = ()

    def owns(self, repo_id):
        """Whether the repository is in a namespace of the user."""
        return repo_id.removeprefix("spaces/").split("/")[0] in (self.name, *self.orgs)


@dataclass(frozen=True)
class File:
    """One version of a file: a git blob, or with `lfs` a large file that git knows by a pointer."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self):
        """The LFS object id."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self):
        """What git stores in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self):
        """The git blob id."""
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self):
        """The content's id in HTTP headers and in the answer to a preupload."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A commit; `files` are all files at that point, path to `File`."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: MappingProxyType


@dataclass
class Repo:
    """A repository. `refs` are full git names ("refs/heads/main", "refs/tags/v1", "refs/pr/1") to commit ids."""

    id: str
    private: bool = False
    region: str = "us"
    xet: bool = True
    refs: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    lfs: dict = field(default_factory=dict)

    def resolve(self, revision):
        """The commit that a branch, tag, pull request or commit id (seven characters or more) names."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def ref(self, revision):
        """The full name of the branch or pull request that `revision` is."""
        return revision if revision.startswith("refs/") else f"refs/heads/{revision}"

    def commit(self, ref, parent, files, title, message="", author=""):
        """Add a commit with exactly `files` and move `ref` to it, the one step in which a branch changes."""
        # Ids and dates count commits instead of reading a clock, so the same history always gets the same ids.
        date = (EPOCH + timedelta(seconds=len(self.commits))).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        parent = parent.oid if parent else None
        tree = sorted((path, file.oid) for path, file in files.items())
        oid = hashlib.sha1(repr((self.id, parent, title, message, author, date, tree)).encode()).hexdigest()
        self.lfs.update((file.sha256, file.data) for file in files.values() if file.lfs)
        self.commits[oid] = Commit(oid, parent, title, message, author, date, MappingProxyType(dict(files)))
        self.refs[ref] = oid
        return self.commits[oid]

    def describe(self, path, file):
        """A file as the tree and paths-info endpoints list it."""
        info = {"type": "file", "path": path, "oid": file.oid, "size": len(file.data)}
        if file.lfs:
            info["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
            if self.xet:  # any 64 hexadecimal digits, as long as they are not the sha256
                info["xetHash"] = hashlib.sha256(b"xet" + file.sha256.encode()).hexdigest()
        return info


@dataclass
class Fault:
    """Something that goes wrong on purpose; `hits` counts how often it has."""

    endpoint: str
    path: str = ""
    times: int | None = 1
    skip: int = 0
    error: HubError | None = None
    cut: str | None = None
    seconds: float = 0
    hits: int = 0

    def strikes(self, endpoint, path):
        """Count a request; whether the fault is for it."""
        if not re.fullmatch(self.endpoint, endpoint) or not re.search(self.path, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        self.hits += 1
        return True


class Call(NamedTuple):
    """A request that the server has answered; a connection cut without an answer has status 0."""

    endpoint: str | None
    method: str
    path: str
    status: int


class Request(NamedTuple):
    """What an endpoint gets to see."""

    method: str
    url: str
    query: dict
    headers: dict
    body: bytes
    user: User | None

    def json(self):
        """The body, decoded."""
        return json.loads(self.body)


class Reply(NamedTuple):
    """An answer; `source`, (repo id, path), marks the body as a file's content."""

    status: int = 200
    body: bytes = b""
    headers: dict = MappingProxyType({})
    source: tuple | None = None


class Hub:
    """The server, running inside a `with` block.

    Args:
        tokens (`dict[str, User]`, *optional*): who is known. By default `hub.token`, of user "alice" who may also write
            to "acme", and `hub.read_token`, hers as well but for reading only.
        page_size (`int`): entries in one page of a listing.

    Attributes:
        url (`str`): the endpoint to give to the client.
        collections (`dict[str, list[str]]`): the repositories' ids by slug; fill it to make one.
        requests (`list[Call]`): every request answered, in order.
        served (`Counter`): bytes of file content sent, by (repo id, path).
        received_bytes (`int`): bytes received as LFS uploads, those of failed uploads included.
        faults (`list[Fault]`): clear it to heal the server.
    """

    token, read_token = "hf_alice_write", "hf_alice_read"

    def __init__(self, tokens=None, page_size=1000):
        self.tokens = tokens or {
            self.token: User("alice", "write", ("acme",)),
            self.read_token: User("alice", "read", ("acme",)),
        }
        self.page_size = page_size
        self.requests, self.faults, self.served, self.received_bytes = [], [], Counter(), 0
        self._settings = contextlib.ExitStack()
        self._repos, self._signature = {}, secrets.token_hex(8)
        self.collections = {}  # slug to the ids in it, as those of repositories
        self._lock, self._closed, self._failures = threading.RLock(), threading.Event(), []

    def __enter__(self):
        self._servers = [_Server(self) for _ in range(2)]
        self.url, self._storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        # What `env` sets, for this process: the client has read its environment already, so the values go where it
        # keeps them. Xet has to be off as clients since 2.0 never ask the server whether it speaks it.
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for place, name, value in [
            (constants, "ENDPOINT", self.url),
            (constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
            (file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template),  # read by clients before 1.0
            (hf_api.api, "endpoint", self.url),
            (constants, "HF_HUB_DISABLE_XET", True),
            (constants, "HF_HUB_OFFLINE", False),
        ]:
            self._settings.enter_context(mock.patch.object(place, name, value, create=True))
        _close_sessions()  # before 1.0 a session remembers whether it was made offline
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, exc_type, exc, traceback):
        self._settings.close()
        _close_sessions()
        self._closed.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        if self._failures and exc_type is None:
            raise RuntimeError("the test server itself failed") from self._failures[0]

    def env(self, home, token=None):
        """The environment of a subprocess whose client talks to this server: `home` is its HF_HOME."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        env.update(HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
        return env | ({"HF_TOKEN": token} if token else {})

    def add_repo(self, repo_id, files=None, *, private=False, region="us", xet=True):
        """Create a repository with one commit of `files` (path to bytes) and return the commit's id.

        Large files can be copied server-side to repositories of the same `region` only, and, the client insists, only
        if they are in Xet storage.
        """
        with self._lock:
            self._repos[repo_id] = Repo(repo_id, private, region, xet)
            return self.commit(repo_id, files or {}, "initial commit")

    def commit(self, repo_id, files, title="Update", revision="main", author="somebody"):
        """Commit as somebody else would: `files` are path to bytes, or to None to delete. Returns the commit's id."""
        with self._lock:
            repo = self._repos[repo_id]
            parent = repo.resolve(revision) if repo.refs else None
            content = dict(parent.files) if parent else {}
            for path, data in files.items():
                if data is None:
                    del content[path]
                else:
                    content[path] = File(data, is_lfs(path, data, len(data)))
            return repo.commit(repo.ref(revision), parent, content, title, author=author).oid

    def lose(self, repo_id, path):
        """Lose the stored content of a large file: it is still listed, but can be neither downloaded nor copied."""
        with self._lock:
            repo = self._repos[repo_id]
            del repo.lfs[repo.resolve("main").files[path].sha256]

    def files(self, repo_id, revision="main"):
        """The content of a repository: path to bytes."""
        return {path: file.data for path, file in self._repos[repo_id].resolve(revision).files.items()}

    def commits(self, repo_id, revision="main"):
        """The commits of a revision, newest first."""
        repo = self._repos[repo_id]
        history = [repo.resolve(revision)]
        while history[-1].parent:
            history.append(repo.commits[history[-1].parent])
        return history

    def refs(self, repo_id):
        """Branches, tags and pull requests: full git name to commit id. It differs after any change that is visible."""
        return dict(self._repos[repo_id].refs)

    def repos(self):
        """The ids of all repositories."""
        return sorted(self._repos)

    @property
    def served_bytes(self):
        """Bytes of file content sent, all files together."""
        return self.served.total()

    def fail(self, endpoint, status=500, message="Something went wrong", *, code=None, headers=None, **when):
        """Answer with an error, and do nothing else.

        Args:
            endpoint (`str`): regex for the whole name of an endpoint; the names are the keys of `ENDPOINTS`.
            status (`int`), message (`str`): the answer's.
            code (`str`, *optional*): its `X-Error-Code`, such as "GatedRepo".
            headers (`dict`, *optional*): further headers, such as `Retry-After`.
            when: `times` it happens (1; None for always), requests to `skip` first, a regex to find in the `path`.
        """
        return self._plan(endpoint, error=HubError(status, message, code, headers), **when)

    def cut(self, endpoint, side="request", **when):
        """Cut the connection, halfway through the `side`: a "request" has no effect, a "response" comes after it."""
        return self._plan(endpoint, cut=side, **when)

    def delay(self, endpoint, seconds, **when):
        """Answer late. A client that waits is let go when the server closes."""
        return self._plan(endpoint, seconds=seconds, **when)

    def _plan(self, endpoint, **fault):
        if not any(re.fullmatch(endpoint, name) for name in ENDPOINTS):
            raise ValueError(f"no endpoint is named {endpoint!r}")
        self.faults.append(Fault(endpoint, **fault))
        return self.faults[-1]

    def _fault(self, endpoint, path):
        with self._lock:
            return next((fault for fault in self.faults if endpoint and fault.strikes(endpoint, path)), None)

    def _user(self, headers):
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        if scheme and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _readable(self, request, repo_id):
        repo = self._repos.get(repo_id)
        if repo is None or (repo.private and not (request.user and request.user.owns(repo_id))):
            # Like the real one, the Hub does not tell what is missing from what is private.
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, request, repo_id, pull_request=False):
        repo = self._readable(request, repo_id)
        if request.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if request.user.role != "write" or not (pull_request or request.user.owns(repo_id)):
            raise HubError(403, "You must use a write token of someone who may write to this repository")
        return repo


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a client may hold its connection longer than the server lives
    request_queue_size = 64

    def __init__(self, hub):
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Keep test output quiet."""

    def _handle(self):
        self.close_connection = True
        with contextlib.suppress(ConnectionError):  # the client may go away
            self._answer(self.server.hub)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _answer(self, hub):
        url = urlsplit(self.path)
        endpoint, function, match = next(
            (
                (name, function, match)
                for name, (method, pattern, function) in ENDPOINTS.items()
                if self.command in method and (match := pattern.fullmatch(url.path))
            ),
            (None, None, None),
        )
        call = Call(endpoint, self.command, unquote(url.path), 0)
        fault = hub._fault(endpoint, call.path)
        cut = fault.cut if fault else None
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size // 2 if cut == "request" else size)
        if endpoint == "lfs_upload":
            with hub._lock:
                hub.received_bytes += len(body)
        if fault and fault.seconds:
            hub._closed.wait(fault.seconds)
        if cut == "request" or hub._closed.is_set():
            hub.requests.append(call)
            return self._cut()
        with hub._lock:
            try:
                if fault and fault.error:
                    raise fault.error
                if function is None:
                    raise HubError(404, "Sorry, we can't find the page you are looking for.")
                user = None if endpoint in STORAGE else hub._user(self.headers)
                arguments = {key: unquote(value or "") for key, value in match.groupdict().items()}
                request = Request(self.command, self.path, dict(parse_qsl(url.query)), self.headers, body, user)
                reply = function(hub, request, **arguments)
            except HubError as error:
                reply = _json({"error": str(error)}, error.status, error.headers)
            except Exception as error:
                hub._failures.append(error)
                reply = _json({"error": repr(error)}, 500)
            hub.requests.append(call._replace(status=0 if cut else reply.status))
        self._send(hub, reply, half=cut == "response")

    def _send(self, hub, reply, half):
        if half and not reply.body:
            return self._cut()
        self.send_response(reply.status)
        for key, value in {"Content-Length": len(reply.body), **reply.headers, "Connection": "close"}.items():
            self.send_header(key, str(value))
        self.end_headers()
        body = reply.body[: len(reply.body) // 2] if half else reply.body
        if self.command != "HEAD":
            if reply.source:
                with hub._lock:
                    hub.served[reply.source] += len(body)
            self.wfile.write(body)
        if half:
            self._cut()

    def _cut(self):
        self.connection.shutdown(socket.SHUT_RDWR)


ENDPOINTS = {}
STORAGE = ("lfs_upload", "lfs_download")  # signed links, without a token
REPO, REVISION = r"(?P<repo_id>(?:spaces/)?[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
API = f"/api/(?=models/|spaces/)(?:models/)?{REPO}"


def _endpoint(method, path):
    def register(function):
        ENDPOINTS[function.__name__.removeprefix("_")] = (method.split(), re.compile(path), function)
        return function

    return register


def _json(content, status=200, headers=None):
    return Reply(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


def _page(hub, request, items):
    """One page of a listing, with a link to the next."""
    start = int(request.query.get("cursor", 0))
    end, headers = start + hub.page_size, {}
    if end < len(items):
        path = urlsplit(request.url).path
        headers["Link"] = f'<{hub.url}{path}?{urlencode({**request.query, "cursor": end})}>; rel="next"'
    return _json(items[start:end], headers=headers)


def _content(request, data, source, headers):
    """A file's content, or the range of it that was asked for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if wanted is None:
        return Reply(200, data, headers, source)
    first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
    if first > last:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Reply(206, data[first : last + 1], headers, source)


def is_lfs(path, sample, size):
    """Whether the Hub keeps a file in LFS: by its name, its size, or because the start of it is binary."""
    by_name = any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in LFS_PATTERNS)
    return bool(size) and (by_name or size > LFS_THRESHOLD or b"\0" in sample[:512])


def check_card(content):
    """Validate the metadata of a README.md: (errors, warnings), lists of messages."""
    block = CARD.match(content)
    try:
        data = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ['"metadata" must be an object'], []
    errors, warnings = [], []

    def check(key, valid, complaint, many=True):
        value = data.get(key)
        for item in value if many and isinstance(value, list) else [] if value is None else [value]:
            if not (isinstance(item, str) and valid(item)):
                errors.append(f'"{key}" with value {json.dumps(item, default=str)} {complaint}')

    relations = ("adapter", "finetune", "merge", "quantized")
    check("license", LICENSES.__contains__, f"is not valid, it must be one of {sorted(LICENSES)}")
    check("base_model", REPO_ID.fullmatch, "is not valid. Use a model id from https://hf.co/models.")
    check("base_model_relation", relations.__contains__, f"must be one of {list(relations)}", many=False)
    check("datasets", REPO_ID.fullmatch, "is not valid. Use a dataset id from https://hf.co/datasets.")
    check("language", re.compile("[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code").fullmatch, "must be an ISO 639 code")
    for key in ("tags", "metrics"):
        check(key, str.strip, "must be a string")
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        check(key, str.strip, "must be a string", many=False)
    check("models", REPO_ID.fullmatch, "is not valid. Use a model id from https://hf.co/models.")
    check("sdk", SPACE_SDKS.__contains__, f"must be one of {sorted(SPACE_SDKS)}", many=False)
    for key in ("colorFrom", "colorTo"):
        check(key, SPACE_COLORS.__contains__, f"must be one of {sorted(SPACE_COLORS)}", many=False)
    for key in ("tags", "model-index"):
        if not isinstance(data.get(key, []), list):
            errors.append(f'"{key}" must be an array')
    if isinstance(tag := data.get("pipeline_tag"), str) and tag not in PIPELINE_TAGS:
        warnings.append(f'"pipeline_tag" {tag!r} is not in the official list {sorted(PIPELINE_TAGS)}')
    return errors, warnings


@_endpoint("GET", "/api/whoami-v2")
def _whoami(hub, request):
    user = request.user
    if user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": "write"} for org in user.orgs]
    token = {"type": "access_token", "accessToken": {"displayName": user.role, "role": user.role}}
    return _json({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": token})


@_endpoint("POST", "/api/validate-yaml")
def _validate_yaml(hub, request):
    errors, warnings = check_card(request.json()["content"])
    messages = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return _json(messages, 400 if errors else 200)


@_endpoint("POST", "/api/repos/create")
def _create_repo(hub, request):
    wanted, user = request.json(), request.user
    if user is None:
        raise HubError(401, "Invalid username or password.")
    kind = wanted.get("type") or "model"
    if kind not in ("model", "space"):
        raise HubError(400, "This Hub has models and Spaces only")
    repo_id = f"{'spaces/' * (kind == 'space')}{wanted.get('organization') or user.name}/{wanted['name']}"
    if user.role != "write" or not user.owns(repo_id):
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{repo_id}"')
    link = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
    if repo_id in hub.repos():
        return _json({"error": f"You already created this {kind} repo", **link}, 409)
    attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
    private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
    files = {".gitattributes": attributes.encode()}
    if kind == "space":
        if wanted.get("sdk") not in SPACE_SDKS:
            raise HubError(400, f"sdk must be one of {sorted(SPACE_SDKS)}")
        files["README.md"] = f"---\ntitle: {wanted['name']}\nsdk: {wanted['sdk']}\n---\n".encode()
    hub.add_repo(repo_id, files, private=private, region=wanted.get("region") or "us")
    return _json(link)


@_endpoint("DELETE", "/api/repos/delete")
def _delete_repo(hub, request):
    wanted = request.json()
    repo = hub._writable(request, f"{wanted.get('organization') or getattr(request.user, 'name', '')}/{wanted['name']}")
    del hub._repos[repo.id]
    return _json({})


@_endpoint("GET", f"{API}(/revision/{REVISION})?")
def _repo_info(hub, request, repo_id, revision):
    repo = hub._readable(request, repo_id)
    commit, name = repo.resolve(revision or "main"), repo_id.removeprefix("spaces/")
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    for sibling in siblings if request.query.get("blobs") else ():
        file = commit.files[sibling["rfilename"]]
        sibling.update(size=len(file.data), blobId=file.oid)
        if file.lfs:
            sibling["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    readme = commit.files["README.md"].data.decode() if "README.md" in commit.files else ""
    block = CARD.match(readme)
    card = (block and not check_card(readme)[0] and yaml.safe_load(block[1])) or {}
    return _json(
        {
            **{"id": name, "modelId": name, "author": name.split("/")[0], "sha": commit.oid},
            **{"createdAt": hub.commits(repo_id)[-1].date, "lastModified": commit.date},
            **{"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0},
            **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
            **{"tags": card.get("tags", []), "cardData": card, "siblings": siblings},
        }
    )


@_endpoint("GET", f"{API}/tree/{REVISION}(/(?P<folder>.+))?")
def _tree(hub, request, repo_id, revision, folder):
    repo = hub._readable(request, repo_id)
    recursive, entries = request.query.get("recursive", "").lower() == "true", {}
    for path, file in repo.resolve(revision).files.items():
        if folder and not path.startswith(f"{folder}/"):
            continue
        start = len(folder) + 1 if folder else 0
        for end in (start + at for at, char in enumerate(path[start:]) if char == "/"):
            oid = hashlib.sha1(path[:end].encode()).hexdigest()
            entries[path[:end]] = {"type": "directory", "path": path[:end], "oid": oid, "size": 0}
            if not recursive:
                break
        if recursive or "/" not in path[start:]:
            entries[path] = repo.describe(path, file)
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return _page(hub, request, [entries[path] for path in sorted(entries)])


@_endpoint("POST", f"{API}/paths-info/{REVISION}")
def _paths_info(hub, request, repo_id, revision):
    repo = hub._readable(request, repo_id)
    files = repo.resolve(revision).files
    paths = parse_qs(request.body.decode()).get("paths", [])
    return _json([repo.describe(path, files[path]) for path in paths if path in files])


@_endpoint("GET", f"{API}/refs")
def _refs(hub, request, repo_id):
    groups = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    refs = hub._readable(request, repo_id).refs
    listing = {
        group: [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in refs.items()
            if ref.startswith(prefix)
        ]
        for group, prefix in groups.items()
    }
    return _json({**listing, "converts": []})


@_endpoint("GET", f"{API}/xet-(read|write)-token/{REVISION}")
def _xet_token(hub, request, repo_id, revision):
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


COLLECTION = r"/api/collections/(?P<slug>[^/]+/[^/]+)"


def _collection(hub, slug):
    if slug not in hub.collections:
        raise HubError(404, "Collection not found")
    items = [
        {"_id": f"{number:024x}", "id": name.removeprefix("spaces/"), "position": number}
        | {"type": "space" if name.startswith("spaces/") else "model"}
        for number, name in enumerate(hub.collections[slug])
    ]
    about = {"slug": slug, "title": slug.split("/")[1], "owner": {"name": slug.split("/")[0]}, "private": False}
    about |= {"lastUpdated": "2024-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0}
    return _json({**about, "items": items})


@_endpoint("GET", COLLECTION)
def _get_collection(hub, request, slug):
    return _collection(hub, slug)


@_endpoint("POST", f"{COLLECTION}/items")
def _add_to_collection(hub, request, slug):
    user, item = request.user, request.json()["item"]
    if user is None or user.role != "write" or not user.owns(slug):
        raise HubError(403, "You don't have the rights to change this collection")
    repo_id = f"{'spaces/' * (item['type'] == 'space')}{item['id']}"
    answer = _collection(hub, slug)
    hub._readable(request, repo_id)
    if repo_id in hub.collections[slug]:
        raise HubError(409, "Item already exists in collection")
    hub.collections[slug].append(repo_id)
    return answer


@_endpoint("GET", f"{API}/commits/{REVISION}")
def _commits(hub, request, repo_id, revision):
    hub._readable(request, repo_id)
    history = [
        {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
        for c in hub.commits(repo_id, revision)
    ]
    return _page(hub, request, history)


@_endpoint("POST DELETE", f"{API}/(?P<kind>branch|tag)/{REVISION}")
def _ref(hub, request, repo_id, kind, revision):
    repo = hub._writable(request, repo_id)
    wanted = request.json() if request.body else {}
    prefix = {"branch": "refs/heads/", "tag": "refs/tags/"}[kind]
    if request.method == "DELETE":
        if repo.refs.pop(prefix + revision, None) is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return _json({})
    # The revision in the address is the new branch, but what the new tag points to.
    name, start = (revision, wanted.get("startingPoint", "main")) if kind == "branch" else (wanted["tag"], revision)
    if prefix + name in repo.refs:
        raise HubError(409, f"Reference already exists: {prefix}{name}")
    repo.refs[prefix + name] = repo.resolve(start).oid
    return _json({})


@_endpoint("POST", f"{API}/preupload/{REVISION}")
def _preupload(hub, request, repo_id, revision):
    repo = hub._writable(request, repo_id, pull_request="create_pr" in request.query)
    present, answers = repo.resolve(revision).files, []
    for file in request.json()["files"]:
        mode = "lfs" if is_lfs(file["path"], base64.b64decode(file["sample"]), file["size"]) else "regular"
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        if file["path"] in present:
            answers[-1]["oid"] = present[file["path"]].etag
    return _json({"files": answers})


@_endpoint("POST", f"/{REPO}.git/info/lfs/objects/batch")
def _lfs_batch(hub, request, repo_id):
    wanted = request.json()
    repo = hub._writable(request, repo_id, pull_request="ref" not in wanted)  # the client names none for a new one
    objects = [{"oid": item["oid"], "size": item["size"]} for item in wanted["objects"]]
    for item in objects:
        if item["oid"] not in repo.lfs:
            upload = f"{hub._storage}/lfs/{repo_id}/{item['oid']}?signature={hub._signature}"
            verify = f"{hub.url}/{repo_id}.git/info/lfs/verify"
            item["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
    return _json({"transfer": "basic", "objects": objects})


def _check_link(hub, request):
    if "Authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed: a token was sent to the storage host")
    if request.query.get("signature") != hub._signature:
        raise HubError(403, "The signature does not match")


@_endpoint("PUT", f"/lfs/{REPO}/(?P<oid>[0-9a-f]+)")
def _lfs_upload(hub, request, repo_id, oid):
    _check_link(hub, request)
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The content does not match its checksum")
    hub._repos[repo_id].lfs[oid] = request.body
    return Reply()


@_endpoint("GET HEAD", f"/lfs/{REPO}/(?P<oid>[0-9a-f]+)")
def _lfs_download(hub, request, repo_id, oid):
    _check_link(hub, request)
    data = hub._repos[repo_id].lfs.get(oid)
    if data is None:
        raise HubError(404, "The object does not exist")
    return _content(request, data, (repo_id, request.query["filename"]), {"ETag": f'"{oid}"'})


@_endpoint("POST", f"/{REPO}.git/info/lfs/verify")
def _lfs_verify(hub, request, repo_id):
    wanted = request.json()
    data = hub._writable(request, repo_id, pull_request=True).lfs.get(wanted["oid"])
    if data is None or len(data) != wanted["size"]:
        raise HubError(404, "The object was not uploaded")
    return _json({})


@_endpoint("POST", f"{API}/lfs-files/duplicate")
def _lfs_duplicate(hub, request, repo_id):
    wanted, source = request.json(), hub._readable(request, repo_id)
    target = hub._writable(request, wanted["target"]["name"])
    if source.region != target.region:
        raise HubError(400, f"Files cannot be copied across storage regions ({source.region} to {target.region})")
    known = [file["sha256"] for file in wanted["files"] if file["sha256"] in source.lfs]
    target.lfs.update((oid, source.lfs[oid]) for oid in known)
    missing = [file["sha256"] for file in wanted["files"] if file["sha256"] not in source.lfs]
    return _json({"success": known, "failed": [{"sha256": oid, "error": "not found"} for oid in missing]})


@_endpoint("POST", f"{API}/commit/{REVISION}")
def _commit(hub, request, repo_id, revision):
    create_pr = "create_pr" in request.query
    repo = hub._writable(request, repo_id, create_pr)
    parent = repo.resolve(revision)
    header, *operations = (json.loads(line) for line in request.body.splitlines())
    header, ref = header["value"], repo.ref(revision)
    if create_pr:
        parent = repo.resolve(header.get("parentCommit", revision))
        ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.refs) + 1}"
    elif ref not in repo.refs:
        raise HubError(404, f"Not a branch: {revision}", "RevisionNotFound")
    elif not parent.oid.startswith(header.get("parentCommit", "")):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for operation in operations:
        _apply(repo, files, operation["key"], **operation["value"])
    errors = check_card(files["README.md"].data.decode())[0] if "README.md" in files else []
    if errors:
        raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    for path, file in files.items():
        if re.fullmatch(r"\.eval_results/[^/]+\.ya?ml", path) and not _are_results(file.data):
            raise HubError(400, f"Invalid evaluation results in {path}")
    oid = repo.commit(ref, parent, files, header["summary"], header.get("description", ""), request.user.name).oid
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo_id}/commit/{oid}", "hookOutput": ""}
    if create_pr:
        answer["pullRequestUrl"] = f"{hub.url}/{repo_id}/discussions/{ref.split('/')[-1]}"
    return _json(answer)


def _are_results(content):
    """Whether a file has the form of https://huggingface.co/docs/hub/eval-results."""
    known = {"dataset", "value", "verifyToken", "date", "source", "notes"}
    return all(
        {"dataset", "value"} <= entry.keys() <= known
        and {"id", "task_id"} <= entry["dataset"].keys() <= {"id", "task_id", "revision"}
        and isinstance(entry["value"], int | float)
        and "url" in entry.get("source", {"url"})
        for entry in yaml.safe_load(content)
    )


def _apply(repo, files, key, path, content="", oid=None, **_):
    """One line of a commit, done to `files`."""
    if key == "file":
        files[path] = File(base64.b64decode(content))
    elif key == "lfsFile":
        if oid not in repo.lfs:
            raise HubError(400, f"LFS pointer of {path} points to a file that does not exist")
        files[path] = File(repo.lfs[oid], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        folder = f"{path.rstrip('/')}/"
        gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(folder))]
        if not gone:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"Unknown operation: {key}")


@_endpoint("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
def _resolve(hub, request, repo_id, revision, path):
    repo = hub._readable(request, repo_id)
    commit = repo.resolve(revision)
    headers, file = {"X-Repo-Commit": commit.oid}, commit.files.get(path)
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers["ETag"] = f'"{file.etag}"'
    if not file.lfs:
        return _content(request, file.data, (repo_id, path), headers)
    query = urlencode({"filename": path, "signature": hub._signature})
    headers["Location"] = f"{hub._storage}/lfs/{quote(repo_id)}/{file.sha256}?{query}"
    return Reply(302, b"", {**headers, "X-Linked-Etag": headers["ETag"], "X-Linked-Size": len(file.data)})
