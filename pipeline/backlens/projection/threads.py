"""Threads: several on one CPU for pieces of one projection, and one per device that projects beside the model.

Several products of one thread each use a CPU's cores better than one product of several threads: nothing waits for
the slowest thread of each operation, operations other than products run in parallel too, and PyTorch's own threads,
which spin for a while after each operation, are off.

A device's thread does its pieces one after the other, in the order in which they were handed over. They need no CUDA
events. A thread that never chose a stream uses its device's default stream, and so does the backward pass, whose
operations run on the streams of the forward pass. So a piece's kernels are in one stream with those that made its
tensors, and behind them, because they are launched later. For the same reason the allocator may give a tensor's memory
away as soon as either thread lets go of it. Copies between devices wait for both devices' streams by themselves.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class CpuThreads:
    """Number of pieces that run at once, and the threads for all but the first, which the caller runs."""

    count: int = 1
    others: ThreadPoolExecutor | None = None

    def run(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """Run the pieces; return their results in order."""
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
def cpu_threads(device: torch.device) -> Iterator[CpuThreads]:
    """Provide as many threads as PyTorch has, whose own are off meanwhile; one on a GPU.

    Threads do not outlive the call: a forked process would not have them.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield CpuThreads()
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads - 1) as others:
            yield CpuThreads(threads, others)
    finally:
        torch.set_num_threads(threads)


def parts(count: int, pieces: int) -> list[slice]:
    """Cut `count` things into at most `pieces` consecutive parts, about equal, none of them empty."""
    pieces = max(1, min(pieces, count))
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    return [slice(first, stop) for first, stop in pairwise(edges)]


Piece = Callable[[], None]
HandOver = Callable[[torch.device, Piece], None]
"""Takes a piece of work for a device; raises the error of an earlier piece."""


@contextmanager
def device_threads(devices: Collection[torch.device]) -> Iterator[HandOver]:
    """Provide a thread per device, and wait for all pieces at the end.

    After the first error, in a piece or in the body, no further piece begins; the next `HandOver`, or the end, raises
    a piece's error.
    """
    for device in devices:
        # PyTorch loads its linear algebra at the first call; two threads' first calls at once fail (its issue 90613).
        torch.linalg.eigh(torch.eye(2, device=device))
    threads = {device: ThreadPoolExecutor(1, thread_name_prefix=f"project-{device}") for device in devices}
    errors: list[BaseException] = []

    def run(piece: Piece) -> None:
        try:
            if not errors:
                piece()
        except BaseException as error:  # noqa: BLE001 - raised again by `hand_over`, or at the end
            errors.append(error)

    def hand_over(device: torch.device, piece: Piece) -> None:
        if errors:
            raise errors[0]
        threads[device].submit(run, piece)

    try:
        yield hand_over
    except BaseException as error:
        errors.append(error)
        raise
    finally:
        for thread in threads.values():
            thread.shutdown()
    if errors:
        raise errors[0]


def at_once(_device: torch.device, piece: Piece) -> None:
    """Do the piece in the caller's thread; a `HandOver`."""
    piece()
