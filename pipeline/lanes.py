"""Work side by side on one CPU's cores, each piece in a thread of its own while PyTorch's own threads are off.

Several products of one thread each use cores better than one product of several: nothing waits for the slowest
thread of each operation, what is not a product is spread as well, and PyTorch's threads, which spin for a while after
each operation, take no time from those that work.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Lanes:
    """How many pieces run at once, and the threads for all but the first, which the caller runs itself."""

    count: int = 1
    others: ThreadPoolExecutor | None = None

    def run(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """What the pieces return, in their order."""
        if self.others is None or len(pieces) == 1:
            return [piece() for piece in pieces]
        inference = torch.is_inference_mode_enabled()

        def there(piece: Callable[[], T]) -> T:
            with torch.inference_mode(inference):
                return piece()

        first, *rest = pieces
        waiting = [self.others.submit(there, piece) for piece in rest]
        return [first(), *(result.result() for result in waiting)]


@contextmanager
def lanes(device: torch.device) -> Iterator[Lanes]:
    """As many as PyTorch has threads, which are off meanwhile; one on a GPU.

    Threads are not kept from call to call: in a forked process they would be gone.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield Lanes()
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads - 1) as others:
            yield Lanes(threads, others)
    finally:
        torch.set_num_threads(threads)


def parts(count: int, pieces: int) -> list[slice]:
    """At most so many consecutive parts of `count` things, about equal, none of them empty."""
    pieces = max(1, min(pieces, count))
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    return [slice(first, stop) for first, stop in pairwise(edges)]
