"""Servers in processes of their own, which cannot import this repository or reach out."""

import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Code that runs first. An editable installation makes the repository importable by a finder in `sys.meta_path`.
WITHOUT_REPOSITORY = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""
WITHOUT_NETWORK = """
import socket

def guarded(function, host_of):
    def call(*arguments, **settings):
        host = host_of(*arguments)
        if host not in (None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0"):
            print("REACHED OUT:", host, flush=True)
            raise OSError(f"no network: {host}")
        return function(*arguments, **settings)
    return call

def peer(sock, address, *rest):
    return address[0] if isinstance(address, tuple) else None

socket.getaddrinfo = guarded(socket.getaddrinfo, lambda host, *rest: host)
socket.socket.connect = guarded(socket.socket.connect, peer)
socket.socket.connect_ex = guarded(socket.socket.connect_ex, peer)
"""


@contextmanager
def running(code: str, *arguments, ready: str, seconds: float = 300, **settings) -> Iterator[tuple[str, list[str]]]:
    """Run Python code that serves, until the block ends.

    Args:
        code: has `arguments` in `sys.argv[1:]`.
        ready: regex; the server is up once a line of its output has it.
        seconds: to wait for that at most.
        settings: of `subprocess.Popen`.

    Yields:
        The first group of `ready`, and the lines of the server's output, which grow.
    """
    command = [sys.executable, "-u", "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)
    log, found = [], queue.Queue()

    def read():
        for line in process.stdout:
            log.append(line)
            if match := re.search(ready, line):
                found.put(match[1])
        found.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        try:
            address = found.get(timeout=seconds)
        except queue.Empty:
            address = None
        assert address, "the server did not come up:\n" + "".join(log)
        yield address, log
    finally:
        process.terminate()
        process.wait()
        reader.join()
