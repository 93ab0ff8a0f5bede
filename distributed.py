"""Several processes, as accelerate starts them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any


def shared(work: Callable[[Any], Any], items: Sequence) -> Iterator[Any]:
    """`work(item)` for each item, in their order; processes take items in turns, and all of them get every result."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    for start in range(0, len(items), state.num_processes):
        own = start + state.process_index
        found = [work(item) for item in items[own : own + 1]]
        yield from gather_object(found) if state.num_processes > 1 else found


def own_device() -> dict:
    """The device map of a process among several: all on the device that accelerate has for it."""
    from accelerate import PartialState

    return {"": PartialState().device}


def leave_processes() -> None:
    """Part from the other processes, if any, at the end of a command.

    A thread of the process group that lets go of a tensor while the interpreter ends aborts the process
    (pytorch/pytorch#190489), and the launcher then reports a run as failed that has written everything.
    """
    from accelerate import PartialState

    PartialState().destroy_process_group()
