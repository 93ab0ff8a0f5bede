"""Measurements of the benchmarks: both sides in turns in one process, medians, quartiles, peak memory."""

import ctypes
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from shortv_llava.files.outputs import replacing_file

WARM_UP = 2  # pairs that are not counted


class Comparison(NamedTuple):
    """Seconds of both sides (medians), and the ratio stock / ours of each pair: median and quartiles."""

    stock: float
    ours: float
    ratio: float
    quartiles: tuple[float, float]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(
    stock: Callable[[], object],
    ours: Callable[[], object],
    pairs: int,
    device,
    warm_up: int = WARM_UP,
    progress: Callable[[], object] = lambda: None,
) -> Comparison:
    """Time `pairs` runs of each side, in random order. `progress` is called after every pair, warm-up included."""
    timed = []
    for number in range(warm_up + pairs):
        times = {}
        for side, work in random.sample([("stock", stock), ("ours", ours)], 2):
            times[side] = seconds(work, device)
        progress()
        if number >= warm_up:
            timed.append((times["stock"], times["ours"]))
    ratios = [a / b for a, b in timed]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if pairs > 1 else ratios * 3
    medians = (statistics.median(times) for times in zip(*timed))
    return Comparison(*medians, statistics.median(ratios), (quartiles[0], quartiles[2]))


def compare_memory(stock: Callable[[], object], ours: Callable[[], object], device) -> dict[str, float] | None:
    """Peak bytes of each side, None if the system does not report them. On a CPU the median of five runs in turns,
    because a single run depends on the state of the heap; on a GPU one run, which is exact."""
    if device.type != "cuda" and not sys.platform.startswith("linux"):
        return None
    gc.collect()
    runs = 1 if device.type == "cuda" else 5
    peaks = [(_peak_memory(stock, device), _peak_memory(ours, device)) for _ in range(runs)]
    return dict(zip(("stock", "ours"), map(statistics.median, zip(*peaks))))


def _peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of the GPU or the process during `work`, minus the bytes in use before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier would count as in use
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _process_memory("VmRSS")
    work()
    return _process_memory("VmHWM") - before


def _process_memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def machine() -> dict:
    """The machine and library versions of the measurement."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {"device": device, "date": time.strftime("%Y-%m-%d"), "python": platform.python_version()} | packages | {
        "MKL_NUM_STRIPES": os.environ["MKL_NUM_STRIPES"]
    }  # fmt: skip


def write_json(path: Path, results: list[dict]) -> None:
    """Write the machine and the results, to compare machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as unfinished:
        unfinished.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
