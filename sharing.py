"""Work that several processes share, as accelerate starts them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object


def shared(work: Callable[[Any], Any], items: Sequence) -> Iterator[Any]:
    """`work(item)` for each item, in their order; processes take items in turns, and all of them get every result."""
    state = PartialState()
    for start in range(0, len(items), state.num_processes):
        own = start + state.process_index
        found = [work(item) for item in items[own : own + 1]]
        yield from gather_object(found) if state.num_processes > 1 else found
