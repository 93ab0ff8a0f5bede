"""Stock LLaVA and ShortV behind vLLM's server under load.

The models have random weights. vLLM's own benchmark client sends random images to both running servers in turns.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from shortv_llava.benchmarks.models import PATCH
from shortv_llava.benchmarks.sizes import Shape
from shortv_llava.benchmarks.vllm_prefill import write_checkpoints

CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""  # `vllm bench serve`, for builds of another name too, whose `vllm` command does not start


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_server(stack: ExitStack, folder: Path, log) -> int:
    """Start `shortv serve`, which runs until the stack closes. Returns its port."""
    port = free_port()
    command = [sys.executable, "-m", "shortv_llava.cli", "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--load-format", "dummy", "--max-model-len", "1024", "--max-num-seqs", "8"]
    command += ["--enforce-eager", "--dtype", "auto" if "CUDA_VISIBLE_DEVICES" in os.environ else "float32"]
    server = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
    stack.callback(server.terminate)
    return port


def ask(folder: Path, port: int, requests: int, concurrency: int, image_side: int, results: Path, log) -> dict:
    """Run the client once. Returns its measurements."""
    side = image_side * PATCH
    options = {
        "backend": "openai-chat",
        "base-url": f"http://127.0.0.1:{port}",
        "endpoint": "/v1/chat/completions",
        "model": folder.name,
        "tokenizer": folder,
        "dataset-name": "random-mm",
        "num-prompts": requests,
        "max-concurrency": concurrency,
        "random-input-len": 24,  # plus 40 of the chat template
        "random-output-len": 8,
        "random-mm-base-items-per-request": 1,
        "random-mm-num-mm-items-range-ratio": 0,
        "random-mm-limit-mm-per-prompt": json.dumps({"image": 1}),
        "random-mm-bucket-config": f"{{({side}, {side}, 1): 1.0}}",
        "seed": int.from_bytes(os.urandom(2)),  # new images each time, so that none is in a cache
        "ready-check-timeout-sec": 200,
        "percentile-metrics": "ttft",
        "metric-percentiles": "50,99",
        "result-dir": results,
        "result-filename": "result.json",
    }
    command = [sys.executable, "-c", CLIENT, "--ignore-eos", "--save-result"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True, stdout=log, stderr=log)
    return json.loads((results / "result.json").read_text())


def run(shape: Shape, fraction: float, requests: int, rounds: int, concurrency: int, log: Path) -> None:
    """Load a stock and a ShortV server in turns."""
    num_layers, image_side = shape.num_layers, shape.image_side
    layers = shape.layers(round(fraction * num_layers))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        output = stack.enter_context(open(log, "w"))
        checkpoints = write_checkpoints(folder, shape, layers)
        ports = [start_server(stack, checkpoint, output) for checkpoint in checkpoints]
        for checkpoint, port in zip(checkpoints, ports):
            ask(checkpoint, port, 2, 1, image_side, folder, output)  # waits for the server, and warms it up
        measured = [[], []]
        for _ in range(rounds):
            for index in (0, 1):
                measured[index].append(
                    ask(checkpoints[index], ports[index], requests, concurrency, image_side, folder, output)
                )
    print(f"{rounds} x {requests} requests, {concurrency} at once; {len(layers)} of {num_layers} layers replaced")
    for name, runs in zip(("stock", "ShortV"), measured):
        rate, p50, p99 = (
            statistics.mean(run[key] for run in runs) for key in ("request_throughput", "p50_ttft_ms", "p99_ttft_ms")
        )
        failed = rounds * requests - sum(run["completed"] for run in runs)
        print(
            f"{name:6}: {rate:.3f} requests/s, time to first token {p50 / 1000:.2f} s (p50), {p99 / 1000:.2f} s (p99), "
            f"{failed} failed"
        )
