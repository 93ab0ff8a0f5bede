import os
import tempfile

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="huggingface-")  # leaves the caches and tokens of others alone
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in these tests may reach out
os.environ["OMP_NUM_THREADS"] = "1"  # in small models, threads on busy cores wait for each other longer than they work

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from transformers.utils import logging

from shortv_llava.checkpoint.package import write_package
from shortv_llava.examples.shapes_llava import CHECKPOINT

logging.disable_progress_bar()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which children of a job in the background would ignore

REPLACED_LAYERS = [11, 0, 10, 5, 8, 4, 1]


@pytest.fixture(scope="session", autouse=True)
def home():
    yield
    shutil.rmtree(os.environ["HF_HOME"])


@pytest.fixture
def hub(tmp_path):
    """A local Hub without repositories, whose token is in the environment."""
    from huggingface_hub import constants

    from hub import Hub

    # Not the test's own monkeypatch: that must be undone before the Hub's settings are.
    with pytest.MonkeyPatch.context() as patched, Hub() as hub:
        patched.setenv("HF_TOKEN", Hub.token)
        patched.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        patched.setattr(time, "sleep", lambda seconds: None)  # the client's waits between its own retries
        yield hub


@pytest.fixture(scope="session")
def package_folder(tmp_path_factory) -> Path:
    """The embedded checkpoint as a package with seven layers replaced."""
    folder = tmp_path_factory.mktemp("package") / "shapes-shortv"
    write_package(CHECKPOINT, folder, replaced_layers=REPLACED_LAYERS)
    return folder


@pytest.fixture(scope="session")
def reference():
    """The reference results beside the repository: folder, expected tensors, and their description."""
    from safetensors.torch import load_file

    folder = Path(__file__).parents[2] / "shared" / "reference" / "llava-1.5-tiny"
    if not folder.is_dir():
        pytest.skip("the reference results are not beside this checkout")
    return folder, load_file(folder / "expected.safetensors"), json.loads((folder / "expected.json").read_text())
