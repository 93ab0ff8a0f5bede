"""Push package folders to the Hub: check the package, then make one commit; all changes land or none do."""

import copy
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    SpaceCard,
    SpaceCardData,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from shortv_llava.checkpoint.checks import check_model, quiet
from shortv_llava.checkpoint.config import MODEL_TYPES, OWN_KEYS, package_config, read_config
from shortv_llava.checkpoint.package import (
    CORRECTION_FILE,
    EVALUATION_FILE,
    ROOT,
    SHARD,
    WEIGHT_PATTERNS,
    code_files,
)
from shortv_llava.checkpoint.processors import files_like, outdated_files
from shortv_llava.checkpoint.source import CARD_FILE, INDEX_PATTERNS, split_revision
from shortv_llava.errors import ShortVError, first_line, one_line
from shortv_llava.hub.card import is_edited, make_card, warn_of_missing
from shortv_llava.hub.errors import hub_errors
from shortv_llava.hub.metadata import merged_metadata, read_card
from shortv_llava.hub.scores import eval_results_file, read_scores

try:
    from huggingface_hub.errors import FileDuplicationError
except ImportError:  # older clients do not copy between repositories
    FileDuplicationError = HfHubHTTPError

logger = logging.getLogger(__name__)

EVAL_RESULTS_FILE = ".eval_results/shortv.yaml"  # where the Hub looks for scores
# Reports that our commands write for a package. If only the repository has them, they belong to an older package.
REPORT_FILES = (EVALUATION_FILE, EVAL_RESULTS_FILE, "calibration.json", "lc_scores.png", "tradeoff.png")

# A Space: the web page, what it imports, and the libraries to install besides Gradio, which the Hub installs.
SPACE_FILES = {"app.py": "chat/web.py"} | {
    f"shortv_llava/{name}": name for name in ("errors.py", "flops.py", "chat/images.py", "chat/prompts.py")
}
SPACE_REQUIREMENTS = "accelerate>=1.0\npillow>=10\ntorch>=2.6\ntransformers>=4.57\n"
GRADIO_VERSION = "6.31.0"


class Change(NamedTuple):
    """What a commit does to one file: `add`, `update`, `copy` or `delete`; `size` of the file in bytes."""

    action: str
    path: str
    size: int


class Pushed(NamedTuple):
    """What a push did, or would do. `url` is the commit's or pull request's; None if there is none."""

    changes: list[Change]
    url: str | None


class Remote(NamedTuple):
    """A repository at a revision. If there is no repository, `commit` is None; a new branch starts from main.

    Args:
        branches: short and full names of branches, full names of pull requests.
        tags: commit by name of the tag.
    """

    commit: str | None
    private: bool
    has_revision: bool
    files: dict[str, RepoFile]
    branches: set[str]
    tags: dict[str, str]


class Source(NamedTuple):
    """The repository that the Hub copies weights from. `files`: its weight files, by their names in the package."""

    repo_id: str
    commit: str
    files: dict[str, RepoFile]


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    license: str | None = None,
    weights_from: str | None = None,
    tag: str | None = None,
    collection: str | None = None,
    space: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Bring the repository to the state of the package `folder`, in one commit; no commit if nothing changed.

    Files that only the repository has are kept, except for weights, which would be loaded in place of the new ones,
    and reports of `shortv calibrate` and `shortv evaluate`, which belong to an older package. After the commit every
    file is compared by hash.

    Args:
        private: make a new repository private.
        revision: branch to commit to; made from main if there is none.
        create_pr: open a pull request instead.
        message: first line of the commit.
        license: licence of the weights, if the base model names none.
        weights_from: `owner/name` or `owner/name@revision` that the Hub copies the weight files from.
        tag: a new tag for the commit, which the card's snippets load; not with `create_pr`.
        collection: slug of a collection to add the repository to.
        space: whether [`push_space`] follows. The card links the Space of the same id if it exists or `space` is set.
        dry_run: change nothing, only return the changes.

    Raises:
        ShortVError: if the folder is no complete package, or a request to the Hub fails. The repository is as before,
            or as the message says.
    """
    check_options(
        folder, repo_id, revision=revision, tag=tag, weights_from=weights_from, collection=collection, dry_run=dry_run
    )
    config = check_package(folder, with_weights=weights_from is None)
    print(f"{folder}: is complete; asking for what {repo_id} holds", flush=True)
    _check_online(repo_id)
    api = HfApi()
    with hub_errors(repo_id):
        remote = _remote(api, repo_id, revision)
        page = repo_id if space or api.repo_exists(repo_id, repo_type="space") else None
    _check_privacy(repo_id, private, remote)
    slug = _find_collection(api, collection)
    source = _source(api, weights_from, folder, config) if weights_from else None
    operations = _plan(folder, repo_id, remote, source, license, tag, page)
    changes = [_change(operation, remote, source) for operation in operations]
    if dry_run:
        return Pushed(changes, None)
    _make_place(api, repo_id, remote, private, None if create_pr else revision)
    frozen = len(config["replaced_layers"])
    message = message or f"ShortV package, {frozen} layer{'s' * (frozen != 1)} replaced"
    commit, url = _carry_out(api, repo_id, operations, source, remote.commit, message, revision, create_pr)
    _label(api, repo_id, commit, tag if tag not in remote.tags else None, slug)
    return Pushed(changes, url)


def _carry_out(
    api: HfApi,
    repo_id: str,
    operations: list,
    source: Source | None,
    parent: str | None,
    message: str,
    revision: str | None,
    create_pr: bool,
) -> tuple[str | None, str | None]:
    """Make the commit, if there is anything to change, and verify it. Returns its id and its URL."""
    if not operations:
        return parent, None
    settings = {
        "commit_message": message,
        "revision": revision,
        "create_pr": create_pr,
        "parent_commit": parent,  # the commit fails if another one was made meanwhile
    }
    info = _commit(api, repo_id, operations, source, settings)
    _check_arrived(api, repo_id, info.pr_revision if create_pr else info.oid, operations, source)
    return info.oid, info.pr_url if create_pr else info.commit_url


def _label(api: HfApi, repo_id: str, commit: str | None, tag: str | None, slug: str | None) -> None:
    """Tag the commit, and add the repository to the collection."""
    with hub_errors(repo_id):
        if tag:
            api.create_tag(repo_id, tag=tag, revision=commit)
    _put_into_collection(api, slug, repo_id, "model")


def _make_place(api: HfApi, repo_id: str, remote: Remote, private: bool, revision: str | None) -> None:
    """Create the repository and the branch to commit to, if they do not exist."""
    with hub_errors(repo_id):
        if remote.commit is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
        if revision and not remote.has_revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)


def check_options(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    tag: str | None = None,
    weights_from: str | None = None,
    collection: str | None = None,
    dry_run: bool = False,
) -> None:
    """Raises [`ShortVError`] if options, as for [`push`], are wrong: the checks that run before the long work."""
    _check_target(repo_id, revision, tag)
    if weights_from is not None:
        if "src_repo_id" not in {field.name for field in fields(CommitOperationCopy)}:
            installed = huggingface_hub.__version__
            raise ShortVError(f"--weights-from needs huggingface_hub 2.0 or newer, installed is {installed}; update it")
        _check_target(split_revision(weights_from)[0])
    if collection is not None:
        _slug(collection)
    _package_config(folder)  # a wrong folder is reported before a missing login
    if not dry_run:
        _check_access(repo_id)


def push_space(
    repo_id: str,
    *,
    private: bool = False,
    message: str | None = None,
    collection: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Make the Space `repo_id` show the model `repo_id`, in one commit; no commit if nothing changed.

    Files that only the Space has are kept. Of its README.md only the entries that the page needs are changed.

    Args:
        private, message, collection, dry_run: as for [`push`].

    Raises:
        ShortVError: if a request to the Hub fails. The Space is as before.
    """
    _check_target(repo_id)
    if not dry_run:
        _check_access(repo_id)
    _check_online(repo_id)
    api, name = HfApi(), f"spaces/{repo_id}"
    with hub_errors(name):
        remote = _remote(api, repo_id, None, "space")
    _check_privacy(name, private, remote)
    slug = _find_collection(api, collection)
    contents = {CARD_FILE: str(_space_card(repo_id, remote)).encode(), "requirements.txt": SPACE_REQUIREMENTS.encode()}
    contents |= {path: (ROOT / source).read_bytes() for path, source in SPACE_FILES.items()}
    operations = _changed([CommitOperationAdd(path, content) for path, content in contents.items()], remote)
    changes = [_change(operation, remote, None) for operation in operations]
    if dry_run:
        return Pushed(changes, None)
    with hub_errors(name):
        if remote.commit is None:
            api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        url = None
        if operations:
            url = api.create_commit(
                repo_id,
                operations,
                commit_message=message or "Web page of the ShortV model",
                repo_type="space",
                parent_commit=remote.commit,
            ).commit_url
    _put_into_collection(api, slug, repo_id, "space")
    return Pushed(changes, url)


def _space_card(repo_id: str, remote: Remote) -> SpaceCard:
    """The README.md of a Space: the Hub's settings, including the model that the page loads, and a text."""
    title = repo_id.split("/")[-1]
    known = {"title": title, "emoji": "🖼️", "colorFrom": "indigo", "colorTo": "green", "license": "apache-2.0"}
    text = f"# {title}\n\nTalk to [{repo_id}](https://huggingface.co/{repo_id}), with its dense model beside it.\n"
    if CARD_FILE in remote.files:
        with hub_errors(f"spaces/{repo_id}"):
            path = hf_hub_download(repo_id, CARD_FILE, revision=remote.commit, repo_type="space")
        existing = read_card(Path(path))
        known, text = existing.data.to_dict(), existing.text
    models = known.get("models") or []
    models = dict.fromkeys([repo_id, *([models] if isinstance(models, str) else models)])
    needed = {"sdk": "gradio", "sdk_version": GRADIO_VERSION, "app_file": "app.py", "models": list(models)}
    return SpaceCard(f"---\n{SpaceCardData(**known | needed).to_yaml()}\n---\n{text}")


# The folder


def check_package(folder: Path, with_weights: bool = True) -> dict:
    """Check that a package folder can be published, and return its config.json.

    Raises:
        ShortVError: if it is no package, or something in it is missing, damaged or does not fit.
    """
    config = _package_config(folder)
    with one_line(lambda error: f"{folder}: its config.json is not a package's ({first_line(error)})"):
        complete = package_config(config)
    wrong = [key for key in (*OWN_KEYS, "architectures") if config.get(key, "") != complete[key]]
    if wrong:
        raise ShortVError(f"{folder}: config.json lacks the right {', '.join(wrong)}; make the package again")
    for name in code_files(config["model_type"]):
        if not (folder / name).is_file():
            raise ShortVError(f"{folder}: {name} is missing; make the package again")
        if (folder / name).read_bytes() != (ROOT / name).read_bytes():
            logger.warning(f"{folder}: {name} differs from this version's; it is published as it is")
    if with_weights and not files_like(folder, WEIGHT_PATTERNS):
        raise ShortVError(f"{folder}: holds no weights; name the base model to copy them from with --weights-from")
    check_model(folder, config, with_weights)
    with quiet():
        try:
            with one_line(first_line):
                outdated = outdated_files(folder)
            if outdated:
                logger.warning(
                    f"{folder}: {', '.join(outdated)} should be otherwise; make the package again, by "
                    f"shortv package {folder} --layers own"
                )
        except ShortVError as error:
            logger.warning(f"{folder}: published without a working processor ({error})")
    return config


def _package_config(folder: Path) -> dict:
    config = read_config(folder)
    if config["model_type"] not in MODEL_TYPES.values():
        raise ShortVError(f"{folder}: is a plain LLaVA checkpoint; make a package of it with shortv package")
    return config


def _published_files(folder: Path) -> list[Path]:
    """All files but hidden ones and Python's caches."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
    )


def _check_target(repo_id: str, revision: str | None = None, tag: str | None = None) -> None:
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ShortVError(f"{repo_id}: no id of a repository; give owner/name")
    for option, name in (("--revision", revision), ("--tag", tag)):
        if name is None:
            continue
        if re.fullmatch("[0-9a-f]{40}", name):
            raise ShortVError(f"{option} {name}: is the id of a commit; give the name of a branch or tag")
        if not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", name) or ".." in name or name.endswith((".", ".lock")):
            raise ShortVError(f"{option} {name!r}: is no name for a branch or tag; use letters, digits, . _ and -")


def _check_online(repo_id: str) -> None:
    if constants.HF_HUB_OFFLINE:
        raise ShortVError(f"{repo_id}: HF_HUB_OFFLINE is set; unset it to publish, or to see what would change")


def _check_access(repo_id: str) -> None:
    _check_online(repo_id)
    if not huggingface_hub.get_token():
        raise ShortVError(f"{repo_id}: no token was found; run `hf auth login` or set HF_TOKEN")


def _check_privacy(name: str, private: bool, remote: Remote) -> None:
    if private and remote.commit and not remote.private:
        raise ShortVError(f"{name}: is public already; make it private in its settings, or leave out --private")


def _remote(api: HfApi, repo_id: str, revision: str | None, repo_type: str = "model") -> Remote:
    has_revision = True
    try:
        info = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
    except RevisionNotFoundError:
        info, has_revision = api.repo_info(repo_id, repo_type=repo_type), False
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return Remote(None, False, revision is None, {}, set(), {})
    refs = api.list_repo_refs(repo_id, repo_type=repo_type, include_pull_requests=True)
    branches = {name for ref in refs.branches for name in (ref.name, ref.ref)} | {ref.ref for ref in refs.pull_requests}
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if revision and has_revision and revision not in branches:
        kind = "a tag" if revision in tags else "a commit"
        raise ShortVError(f"{repo_id}: {revision} is {kind}, which stays as it is; give --revision a branch")
    return Remote(info.sha, info.private, has_revision, _files(api, repo_id, info.sha, repo_type), branches, tags)


def _files(api: HfApi, repo_id: str, commit: str, repo_type: str = "model") -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _source(api: HfApi, spec: str, folder: Path, config: dict) -> Source:
    """The weight files to copy; they must be this package's."""
    from shortv_llava.checkpoint.conversion import is_original
    from shortv_llava.checkpoint.tensors import SINGLE_WEIGHT_FILES, listed_shards, weight_index

    repo_id, revision = split_revision(spec)
    with hub_errors(spec):
        commit = api.repo_info(repo_id, revision=revision).sha
        files = _files(api, repo_id, commit)
        base = Path(hf_hub_download(repo_id, "config.json", revision=commit)).parent
    if is_original(base):
        raise ShortVError(f"{spec}: its layout is LLaVA's own, so copies do not fit; push without --weights-from")
    expected = read_config(base)
    for key in ("text_config", "vision_config", "image_token_index", "image_token_id"):
        if expected.get(key) != config.get(key):
            raise ShortVError(f"{spec}: its config.json has another {key} than {folder}; it is not this package's base")
    single = [name for name in SINGLE_WEIGHT_FILES if name in files]
    if index := weight_index(folder):
        names = sorted(path.name for path in listed_shards(index) if path.name != CORRECTION_FILE)
    else:
        names = single[:1]
    if names == [SHARD] and single:
        files[SHARD] = files[single[0]]
    missing = [name for name in names if name not in files or not files[name].lfs]
    if missing or not names:
        raise ShortVError(f"{spec}: has no {', '.join(missing) or 'weights'}; it is not this package's base")
    weights = {name: files[name] for name in names}
    for name, file in weights.items():
        path = folder / name
        if path.is_file() and not _same(CommitOperationAdd(name, path), file):
            raise ShortVError(f"{path}: is not the {name} of {spec}; push without --weights-from")
    return Source(repo_id, commit, weights)


def _plan(
    folder: Path,
    repo_id: str,
    remote: Remote,
    source: Source | None,
    license: str | None,
    tag: str | None,
    space: str | None,
) -> list:
    """The operations of the commit, those of the card first."""
    existing, known = _cards(folder, repo_id, remote, license, source)
    operations = list(_operations(folder, repo_id, remote, source))
    # If nothing else has changed, the snippets keep loading the tag that this commit has.
    tags = [name for name, commit in remote.tags.items() if commit == remote.commit and not operations]
    for name in [tag] if tag else [*tags, None]:
        card = make_card(folder, repo_id, existing, name, space, **known)
        if not card.data.license:
            raise ShortVError(f"{folder}: the licence of the weights is unknown; give it, as in --license llama2")
        if not (changed := _changed([CommitOperationAdd(CARD_FILE, str(card).encode())], remote)):
            break
    operations = [*changed, *operations]
    if tag in remote.branches or (tag in remote.tags and (operations or remote.tags[tag] != remote.commit)):
        raise ShortVError(f"{repo_id}: {tag} is there already, for something else; give --tag another name")
    return operations


def _cards(
    folder: Path, repo_id: str, remote: Remote, license: str | None, source: Source | None
) -> tuple[ModelCard | None, dict]:
    """The card to renew, and further metadata.

    Its text is the repository's, or the folder's if the folder's card was edited by hand. Its metadata are merged from
    both cards; the folder's win.
    """
    existing, theirs = read_card(folder / CARD_FILE), None
    if CARD_FILE in remote.files:
        with hub_errors(repo_id):
            path = hf_hub_download(repo_id, CARD_FILE, revision=remote.commit)
        theirs = read_card(Path(path), f"{repo_id}/{CARD_FILE}")
    if theirs and existing:
        before, after = theirs.data.license, existing.data.license
        if before and after and before != after and not license:
            logger.warning(f"{repo_id}: its license was {before}, and becomes {after} as in {folder}/{CARD_FILE}")
        metadata = merged_metadata(theirs.data, existing.data)
        existing = copy.copy(existing if is_edited(existing, folder) else theirs)
        existing.data = metadata
    existing = existing or theirs
    warn_of_missing(existing, f"{repo_id}/{CARD_FILE}")
    known = {"license": license}
    if source and not (existing and existing.data.base_model):
        known["base_model"] = source.repo_id
    return existing, known


def _operations(folder: Path, repo_id: str, remote: Remote, source: Source | None) -> Iterator:
    """The operations that bring the repository to the folder's state, without the card; none for unchanged files."""
    copied = source.files if source else {}
    kept = {CARD_FILE, *copied}
    for path in _published_files(folder):
        name = path.relative_to(folder).as_posix()
        is_base = name != CORRECTION_FILE and path in files_like(folder, WEIGHT_PATTERNS)
        if name in kept or (source and is_base):
            continue
        kept.add(name)
        yield from _changed([CommitOperationAdd(name, path)], remote)
    if results := eval_results_file(read_scores(folder), repo_id):
        kept.add(EVAL_RESULTS_FILE)
        yield from _changed([CommitOperationAdd(EVAL_RESULTS_FILE, results)], remote)
    for name, file in copied.items():
        if not _is_copy(remote.files.get(name), file):
            yield CommitOperationCopy(
                file.path, name, src_revision=source.commit, src_repo_id=source.repo_id, src_repo_type="model"
            )
    for name in sorted(remote.files.keys() - kept):
        is_weights = any(fnmatch(name, pattern) for pattern in (*WEIGHT_PATTERNS, *INDEX_PATTERNS)) and "/" not in name
        if is_weights or name in REPORT_FILES:
            yield CommitOperationDelete(name)


def _changed(additions: Iterable[CommitOperationAdd], remote: Remote) -> list[CommitOperationAdd]:
    return [one for one in additions if not _same(one, remote.files.get(one.path_in_repo))]


def _same(addition: CommitOperationAdd, file: RepoFile | None) -> bool:
    """Whether a local file equals the file on the Hub, by size and hash."""
    if file is None or file.size != addition.upload_info.size:
        return False
    if file.lfs:
        return addition.upload_info.sha256.hex() == file.lfs.sha256
    with addition.as_file() as content:
        return git_hash(content.read()) == file.blob_id


def _change(operation, remote: Remote, source: Source | None) -> Change:
    name = operation.path_in_repo
    if isinstance(operation, CommitOperationDelete):
        return Change("delete", name, remote.files[name].size)
    if isinstance(operation, CommitOperationCopy):
        return Change("copy", name, source.files[name].size)
    return Change("update" if name in remote.files else "add", name, operation.upload_info.size)


def _commit(api: HfApi, repo_id: str, operations: list, source: Source | None, settings: dict):
    """Make the commit. If the Hub refuses to copy weights, download and upload them."""
    with hub_errors(repo_id):
        try:
            return api.create_commit(repo_id, operations, **settings)
        except (HfHubHTTPError, FileDuplicationError, ValueError) as error:  # the last by the client in advance
            if source is None or not _copy_refused(error):
                raise
            reason = getattr(error, "server_message", None) or first_line(error)
    copies = [operation for operation in operations if isinstance(operation, CommitOperationCopy)]
    size = sum(source.files[operation.path_in_repo].size for operation in copies)
    logger.warning(f"the Hub does not copy from {source.repo_id} ({reason}): downloading and uploading {size:,} bytes")
    with hub_errors(source.repo_id):
        names = [operation.src_path_in_repo for operation in copies]
        weights = Path(snapshot_download(source.repo_id, revision=source.commit, allow_patterns=names))
    uploads = [
        CommitOperationAdd(operation.path_in_repo, weights / operation.src_path_in_repo)
        if isinstance(operation, CommitOperationCopy)
        else operation
        for operation in operations
    ]
    with hub_errors(repo_id):
        return api.create_commit(repo_id, uploads, **settings)


def _copy_refused(error: Exception) -> bool:
    """Whether the error says that the Hub, or its client, refuses to copy files from another repository."""
    if isinstance(error, HfHubHTTPError):
        refused = error.response.status_code in (400, 403, 404, 405, 501)
        return refused and "/lfs-files/duplicate" in str(error.response.url)
    return re.search("duplicate .*file", str(error)) is not None


def _check_arrived(api: HfApi, repo_id: str, revision: str, operations: list, source: Source | None) -> None:
    """Verify a commit: compare the files on the Hub by size and hash."""
    with hub_errors(repo_id):
        there = _files(api, repo_id, revision)
    for operation in operations:
        name = operation.path_in_repo
        if isinstance(operation, CommitOperationCopy):
            if not _is_copy(there.get(name), source.files[name]):
                raise ShortVError(f"{repo_id}: its {name} is not {source.repo_id}'s; push again without --weights-from")
        elif isinstance(operation, CommitOperationDelete):
            if name in there:
                raise ShortVError(f"{repo_id}: its {name} was to be deleted and is there; push again")
        elif not _same(operation, there.get(name)):
            raise ShortVError(f"{repo_id}: its {name} is not what was sent; push again")


def _is_copy(file: RepoFile | None, original: RepoFile) -> bool:
    return bool(file and file.lfs and file.lfs.sha256 == original.lfs.sha256)


def _find_collection(api: HfApi, collection: str | None) -> str | None:
    """The slug of an existing collection, from its slug or URL."""
    if collection is None:
        return None
    slug = _slug(collection)
    with hub_errors(f"collection {slug}"):
        return api.get_collection(slug).slug


def _slug(collection: str) -> str:
    slug = collection.rpartition("/collections/")[2]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", slug):
        raise ShortVError(f"{collection}: no collection; give the end of its address, owner/title-0123456789abcdef")
    return slug


def _put_into_collection(api: HfApi, slug: str | None, repo_id: str, kind: str) -> None:
    if slug:
        with hub_errors(f"collection {slug}"):
            api.add_collection_item(slug, repo_id, kind, exists_ok=True)
