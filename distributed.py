"""Work with several processes that accelerate starts."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any


def shared(work: Callable[[Any], Any], items: Sequence) -> Iterator[Any]:
    """`work(item)` for each item, in order. The items are divided among processes; every process gets all results."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    for start in range(0, len(items), state.num_processes):
        own = start + state.process_index
        found = [work(item) for item in items[own : own + 1]]
        yield from gather_object(found) if state.num_processes > 1 else found


def own_device() -> dict:
    """The device map of one of several processes: all modules on the device that accelerate assigns to it."""
    from accelerate import PartialState

    return {"": PartialState().device}


def leave_processes() -> None:
    """Leave the process group, if any, at the end of a command.

    If a thread of the process group releases a tensor while the interpreter ends, the process aborts
    (pytorch/pytorch#190489), and the launcher reports a complete run as failed.
    """
    from accelerate import PartialState

    PartialState().destroy_process_group()
