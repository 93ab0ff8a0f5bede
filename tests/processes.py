"""Scripts beside this file, run as two processes that talk through gloo."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def torchrun(script: str, *arguments, home: Path) -> str:
    """What the processes wrote to standard error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stderr


def leave() -> None:
    """End a script's process when all have come this far, without the interpreter's own end: a device mesh keeps its
    process group's threads, one of which may then abort the process (pytorch/pytorch#190489)."""
    torch.distributed.barrier()
    os._exit(0)
