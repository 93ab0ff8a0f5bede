"""The core tests under several versions of Python, torch and transformers, as a Markdown table.

Each combination has its own environment, deleted after its run: up to 8 GB if the registry's torch is a CUDA build. The
table also names combinations that cannot be installed on this machine.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-matrix"
NEWEST = ""
# Python, torch, transformers: both ends of each range, every Python, and some transformers versions between.
COMBINATIONS = [
    ("3.10", "==2.6.0", "==4.57.6"),
    ("3.10", "==2.6.0", NEWEST),
    ("3.11", "==2.13.0", "==5.0.0"),
    ("3.11", "==2.13.0", NEWEST),
    ("3.12", NEWEST, "==4.57.6"),
    ("3.12", NEWEST, "==5.17.0"),
    ("3.13", NEWEST, NEWEST),
]
TESTS = [
    f"tests/test_{name}.py"
    for name in ("modeling", "reference", "remote_code", "configuration", "generation", "contribution")
]


class NotAvailable(Exception):
    pass


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)


def install(python: str, torch: str, transformers: str) -> Path:
    """The interpreter of a new environment."""
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    interpreter = shutil.which(f"python{python}")
    if interpreter is None or run(interpreter, "-m", "venv", ENVIRONMENT).returncode:
        raise NotAvailable(f"no Python {python}")
    interpreter = ENVIRONMENT / "bin/python"
    pip = interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"
    # torch is installed first and by name, so that pip takes its CPU build if there is one.
    for requirements in ([f"torch{torch}"], [f"transformers{transformers}", "pytest", "hypothesis", "--editable", "."]):
        done = run(*pip, *requirements)
        if done.returncode:
            raise NotAvailable((done.stderr.strip() or "pip failed").splitlines()[-1])
    return interpreter


def versions(interpreter: Path) -> list[str]:
    modules = "import platform, torch, transformers"
    done = run(
        interpreter,
        "-c",
        f"{modules}; print(platform.python_version(), torch.__version__, transformers.__version__)",
    )
    if done.returncode:
        raise NotAvailable(done.stderr.strip().splitlines()[-1])
    return done.stdout.split()[-3:]


def main() -> int:
    rows, bad = [], 0
    for combination in COMBINATIONS:
        print("Python {}, torch{}, transformers{}".format(*combination), file=sys.stderr, flush=True)
        row = [part.removeprefix("==") or "newest" for part in combination]
        try:
            interpreter = install(*combination)
            row = versions(interpreter)
            done = run(interpreter, "-m", "pytest", "-q", *TESTS)
            counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.strip().splitlines()[-1])
            rows.append([*row, ", ".join(counts) or "tests did not run"])
            if done.returncode:
                bad += 1
                print(done.stdout[-20_000:], done.stderr[-2_000:], file=sys.stderr)
        except NotAvailable as reason:
            rows.append([*row, f"not available here: {reason}"])
        finally:
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        print("  " + rows[-1][-1], file=sys.stderr, flush=True)
    for row in [["Python", "torch", "transformers", "core tests"], ["---"] * 4, *rows]:
        print(f"| {' | '.join(row)} |")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
