"""Work side by side on one CPU's cores, each piece in a thread of its own while PyTorch's own threads are off.

Several products of one thread each use cores better than one product of several: nothing waits for the slowest
thread of each operation, what is not a product is spread as well, and PyTorch's threads, which spin for a while after
each operation, take no time from those that work.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def lanes(device: torch.device) -> Iterator[int]:
    """How many pieces to run at once: as many as PyTorch has threads, which are off meanwhile; one on a GPU."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_lanes(pieces: Sequence[Callable[[], T]]) -> list[T]:
    """What the pieces return, in their order; called inside `lanes`."""
    if len(pieces) == 1:
        return [pieces[0]()]
    inference = torch.is_inference_mode_enabled()

    def run(piece: Callable[[], T]) -> T:
        with torch.inference_mode(inference):
            return piece()

    # not kept from call to call: a pool's threads are gone in a forked process
    with ThreadPoolExecutor(len(pieces)) as pool:
        return list(pool.map(run, pieces))


def parts(count: int, pieces: int) -> list[slice]:
    """At most so many consecutive parts of `count` things, about equal, none of them empty."""
    pieces = max(1, min(pieces, count))
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    return [slice(first, stop) for first, stop in pairwise(edges)]
