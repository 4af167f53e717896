"""Work side by side on one CPU's cores, each piece in a thread of its own with PyTorch's own threads off.

Several products of one thread each use cores better than one product of several: nothing waits for the slowest
thread of each operation, and what is not a product is spread as well.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")


def lanes(device: torch.device) -> int:
    """How many pieces run at once: as many as PyTorch would use threads, one on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def in_lanes(pieces: Sequence[Callable[[], T]]) -> list[T]:
    """What the pieces return, in their order."""
    if len(pieces) == 1:
        return [pieces[0]()]
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(piece: Callable[[], T]) -> T:
        with torch.inference_mode(inference):
            return piece()

    # not kept from call to call: a pool's threads are gone in a forked process
    with ThreadPoolExecutor(len(pieces), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(run, pieces))
    torch.set_num_threads(threads)  # threads yet to come start with what was set last
    return found


def parts(count: int, pieces: int) -> list[slice]:
    """At most so many consecutive parts of `count` things, about equal, none of them empty."""
    pieces = max(1, min(pieces, count))
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    return [slice(first, stop) for first, stop in pairwise(edges)]
