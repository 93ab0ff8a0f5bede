"""The command `shortv`, run in this process."""

import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from unittest.mock import patch

import pytest

from shortv_llava import cli


def shortv_here(*arguments) -> subprocess.CompletedProcess:
    """Where all is imported already that takes a command its first seconds."""
    command = ["shortv", *map(str, arguments)]
    with (
        redirect_stdout(StringIO()) as output,
        redirect_stderr(StringIO()) as errors,
        patch.object(sys, "argv", command),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return subprocess.CompletedProcess(command, ended.value.code, output.getvalue(), errors.getvalue())
