"""A thread for each device, for work that has to wait for that device: whoever hands it over goes on at once.

Each thread does its pieces one after the other, in the order in which they were handed over. They need no CUDA events.
A thread that never chose a stream uses its device's default stream, and so does the backward pass, whose operations run
on the streams of the forward pass. So a piece's kernels are in one stream with those that made its tensors, and behind
them, because they are launched later. For the same reason the allocator may give a tensor's memory away as soon as
either thread lets go of it. Copies between devices wait for both devices' streams by themselves.
"""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

Piece = Callable[[], None]
HandOver = Callable[[torch.device, Piece], None]
"""Takes a piece of work for a device; raises the error of an earlier one."""


@contextmanager
def device_threads(devices: Collection[torch.device]) -> Iterator[HandOver]:
    """At its end it waits for all pieces. After the first error, a piece's or the body's, no piece is begun any more;
    the body is told of a piece's error by the next `HandOver`, or at its end."""
    for device in devices:
        # PyTorch loads its linear algebra at the first call; two threads' first calls at once fail (its issue 90613).
        torch.linalg.eigh(torch.eye(2, device=device))
    threads = {device: ThreadPoolExecutor(1, thread_name_prefix=f"project-{device}") for device in devices}
    errors: list[BaseException] = []

    def run(piece: Piece) -> None:
        try:
            if not errors:
                piece()
        except BaseException as error:  # noqa: BLE001 - raised again by whoever handed the piece over
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
    """A `HandOver` that does the piece itself."""
    piece()
