"""Prompts packed into batches that fit into memory, and what an error of a batch means.

A batch has a budget of tokens: as given, or learned from how much memory the first small batches took.
"""

import ctypes
import gc
import os
import resource
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from backlens.capture.hooks import MatrixMissed
from backlens.errors import Interrupted

CGROUP = Path("/sys/fs/cgroup")


def release_freed_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed blocks for later allocations, and between batches of different shapes they fit ever worse:
    without this, a run of 2,000 prompts peaked at 2.5 times the memory of one of 200. Other C libraries have no
    such call and need none.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_all() -> None:
    """Return all memory that nothing refers to, before another try or another model.

    A model's modules refer to each other, so only a garbage collection frees a dropped model.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_freed_memory()


class MemoryGauge:
    """Measures the bytes that one batch takes of each device, and the bytes that are available.

    On a GPU, PyTorch's allocator states the peak. In main memory the batch's share is an upper bound: the peak of the
    process, perhaps of an earlier moment, less what it held when the batch began.
    """

    def __init__(self) -> None:
        self._gpus = range(torch.cuda.device_count())
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        self._before = [torch.cuda.memory_allocated(gpu) for gpu in self._gpus]
        self._free = [
            torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - before
            for gpu, before in zip(self._gpus, self._before, strict=True)
        ]
        self._main = (_resident(), available_memory())

    def taken(self) -> Iterator[tuple[int, int]]:
        """Yield (taken, available) for each GPU, or for main memory if there is none and the system states it."""
        for gpu, before, free in zip(self._gpus, self._before, self._free, strict=True):
            yield torch.cuda.max_memory_allocated(gpu) - before, free
        resident, available = self._main
        if not self._gpus and resident is not None and available is not None:
            yield resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident, available


def available_memory() -> int | None:
    """Bytes of main memory before the machine or its container runs out; None if the system does not say."""
    limits: list[int] = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):  # "max" is no limit
        limit = int((CGROUP / "memory.max").read_text())
        limits.append(limit - int((CGROUP / "memory.current").read_text()))
    return max(0, min(limits)) if limits else None


def _resident() -> int | None:
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return None


def free_memory(device: torch.device) -> int:
    """Free bytes of a device; half of main memory where the system does not say how much of it is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = available_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if available is None else available


PROMPT_ERRORS = (RuntimeError, IndexError, ValueError, ArithmeticError, MemoryError, MatrixMissed)
"""Errors that a prompt may cause: what torch and models raise over their input, and a matrix that it misses."""


class DeviceLost(Interrupted):
    """This process can no longer use the device."""


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_NO_DEVICE = ("cuda error", "device-side assert", "hip error", "ecc error", "unspecified launch failure")
_DEVICE_ERRORS = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether a device or the machine ran out of memory, so that a smaller batch may fit."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Say whether this process can no longer use the device."""
    if is_out_of_memory(error):
        return False
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_DEVICE)
    return isinstance(error, _DEVICE_ERRORS) or said


WASTE = 0.1
"""Largest share of padding in a batch."""


class Packer:
    """Hands out the prompts of a shard in batches, shortest first, and takes a failed batch back.

    A batch's padded size (longest × count) stays within its budget, and at most a tenth of it is padding. A single
    prompt may exceed the budget.
    """

    def __init__(self, lengths: Sequence[int], alone: Collection[int] = ()) -> None:
        """Take the prompts' lengths in tokens; the prompts in `alone` (indices) are handed out first, one at a time."""
        self._lengths = lengths
        self._pieces = [[index] for index in sorted(alone, reverse=True)]
        others = (index for index in range(len(lengths)) if index not in alone)
        self._waiting = deque(sorted(others, key=lambda index: (lengths[index], index)))

    def __bool__(self) -> bool:
        """Say whether there is another batch."""
        return bool(self._pieces or self._waiting)

    def take(self, budget: Callable[[int], int]) -> list[int]:
        """Take the indices of the next batch, shortest first; `budget` gives the tokens for prompts of a length."""
        if self._pieces:
            return self._pieces.pop()
        batch = [self._waiting.popleft()]
        tokens = self._lengths[batch[0]]
        while self._waiting:
            length = self._lengths[self._waiting[0]]
            padded = length * (len(batch) + 1)
            if padded > budget(length) or padded - tokens - length > WASTE * padded:
                break
            batch.append(self._waiting.popleft())
            tokens += length
        return batch

    def put_back(self, batch: list[int]) -> None:
        """Hand out these prompts again, within the budget of that time."""
        self._waiting.extendleft(reversed(batch))

    def halve(self, batch: list[int]) -> None:
        """Hand out this batch's two halves next."""
        middle = len(batch) // 2
        self._pieces += [batch[middle:], batch[:middle]]


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack prompts of these lengths into batches of at most `budget` tokens."""
    packer = Packer(lengths)
    batches: list[list[int]] = []
    while packer:
        batches.append(packer.take(lambda _: budget))
    return batches


ON_CPU = 256
"""Tokens that keep a CPU busy; a larger batch is no faster and takes more memory."""
ON_GPU = 8192
SHARE = 0.6
"""Share of free memory that one batch may use: estimates err, and the shard's rows need memory too."""


def most_tokens(batch_tokens: int | Literal["auto"], device: str) -> int:
    """Return the largest number of tokens per batch on a type of device."""
    return (ON_CPU if device == "cpu" else ON_GPU) if batch_tokens == "auto" else batch_tokens


class TokenBudget:
    """The tokens that a worker's batches may have, learned from its batches.

    `auto` begins with an eighth of what suits the device. The memory per token of one batch bounds that of a larger
    batch of the same length, since part of it does not grow with tokens; tokens of longer prompts count in proportion
    to the length, as in attention. If a batch does not fit all the same, half of it becomes the budget.
    """

    def __init__(self, batch_tokens: int | Literal["auto"], device: torch.device) -> None:
        self.most = most_tokens(batch_tokens, device.type)
        """Largest number of tokens in any batch."""
        self._learns = batch_tokens == "auto"
        self._fits: tuple[float, int] | None = None
        """Tokens that would have fit, and the length of the measured batch's prompts."""

    def at(self, length: int) -> int:
        """Return the tokens for a batch of prompts of this length, padding included."""
        if not self._learns:
            return self.most
        if self._fits is None:
            return max(1, self.most // 8)
        tokens, measured = self._fits
        return max(1, min(self.most, int(tokens * min(1.0, measured / length))))

    def learn(self, gauge: MemoryGauge, count: int, length: int) -> None:
        """Learn from the memory that a batch of `count` prompts, padded to `length`, took."""
        shares = [SHARE * free / max(taken, 1) for taken, free in gauge.taken()]
        if self._learns:
            self._fits = (min(shares, default=1.0) * count * length, length)

    def halve(self, tokens: int) -> None:
        """Lower the budget, because a batch of `tokens` tokens did not fit."""
        self.most = max(1, min(self.most, tokens) // 2)
