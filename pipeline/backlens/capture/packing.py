"""How much memory there is, what a batch took of it, and giving it back.

How much memory there is for another copy of a model.

What an error of a batch means: too little memory, a device that is gone, or a prompt that cannot be computed.

Prompts of a shard packed into batches: sorted by length, up to a token budget, with little padding.

How many tokens a batch may have: what was asked for, or what the first small batches show to fit.
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
    """Return what a batch freed.

    glibc keeps freed blocks for later allocations, and between batches of different shapes they fit ever worse:
    without this, a run of 2,000 prompts peaked at 2.5 times the memory of one of 200. Other C libraries have no
    such call and need none.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_all() -> None:
    """Return what can be had back at all: before something is tried again that did not fit."""
    gc.collect()
    release_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class MemoryGauge:
    """What one batch took of each place's memory, and what there was; bytes.

    Of a GPU, what PyTorch's allocator handed out at most. Of main memory an upper bound: the process's peak, which
    may be that of an earlier moment, above what it held when the batch began. Nothing where the system does not tell.
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
        """Taken and available, by place."""
        for gpu, before, free in zip(self._gpus, self._before, self._free, strict=True):
            yield torch.cuda.max_memory_allocated(gpu) - before, free
        resident, available = self._main
        if not self._gpus and resident is not None and available is not None:
            yield resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident, available


def available_memory() -> int | None:
    """Main memory that this process can have before the machine or its container runs out; None if nobody says."""
    rooms: list[int] = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        rooms.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):  # "max" is no limit
        limit = int((CGROUP / "memory.max").read_text())
        rooms.append(limit - int((CGROUP / "memory.current").read_text()))
    return max(0, min(rooms)) if rooms else None


def _resident() -> int | None:
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return None


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; in a container, what its limit leaves.

    Where the system does not say how much is free, half of what it has.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    stated = [free for free in (_of_the_system(), _of_the_container()) if free is not None]
    return min(stated, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _of_the_system() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_the_container() -> int | None:
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if not limit or not used or not limit[0].isdecimal():
        return None
    return max(0, int(limit[0]) - int(used[0]))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("ascii").splitlines()
    except OSError:
        return []


def give_back_memory() -> None:
    """After a model was dropped: its modules refer to each other, and only a collection frees them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_freed_memory()


PROMPT_ERRORS = (RuntimeError, IndexError, ValueError, ArithmeticError, MemoryError, MatrixMissed)
"""What torch and models raise over what they are given; and a model that passes a matrix by for some prompts."""


class DeviceLost(Interrupted):
    """Nothing works on the device any more, as far as this process is concerned."""


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_NO_DEVICE = ("cuda error", "device-side assert", "hip error", "ecc error", "unspecified launch failure")
_DEVICE_ERRORS = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device or of this machine; a smaller batch may fit."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether it ends the use of the device by this process."""
    if is_out_of_memory(error):
        return False
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_DEVICE)
    return isinstance(error, _DEVICE_ERRORS) or said


WASTE = 0.1
"""Largest share of padding in a batch."""


class Packer:
    """Hands out the prompts of a shard in batches, shortest first; a batch that failed comes back.

    A batch's padded size (longest × count) stays within its budget, and no more than a tenth of it is padding. A single
    prompt may exceed the budget by itself.
    """

    def __init__(self, lengths: Sequence[int], alone: Collection[int] = ()) -> None:
        """`lengths` of the prompts; those whose indices are in `alone` are handed out first, one at a time."""
        self._lengths = lengths
        self._pieces = [[index] for index in sorted(alone, reverse=True)]
        others = (index for index in range(len(lengths)) if index not in alone)
        self._waiting = deque(sorted(others, key=lambda index: (lengths[index], index)))

    def __bool__(self) -> bool:
        """Whether there is another batch."""
        return bool(self._pieces or self._waiting)

    def take(self, budget: Callable[[int], int]) -> list[int]:
        """The indices of the next batch, ascending in length; `budget` is in tokens for a batch of that length."""
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
        """Hand out this batch again, as the budget is by then."""
        self._waiting.extendleft(reversed(batch))

    def halve(self, batch: list[int]) -> None:
        """Hand out this batch's two halves next."""
        middle = len(batch) // 2
        self._pieces += [batch[middle:], batch[:middle]]


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """All batches of prompts of these lengths, for one budget."""
    packer = Packer(lengths)
    batches: list[list[int]] = []
    while packer:
        batches.append(packer.take(lambda _: budget))
    return batches


ON_CPU = 256
"""Tokens that keep a CPU busy; more are no faster, and what a backward pass keeps of each takes memory."""
ON_GPU = 8192
SHARE = 0.6
"""Of the memory there is, what a batch is let have: estimates err, and the next shard's rows are there too."""


def most_tokens(asked: int | Literal["auto"], device: str) -> int:
    """The largest budget on a type of device."""
    return (ON_CPU if device == "cpu" else ON_GPU) if asked == "auto" else asked


class TokenBudget:
    """The budget of one worker, which learns from its batches.

    `auto` begins with an eighth of what suits the device. What a batch took, for each of its tokens, bounds what a
    larger one of that length takes, since some of it does not grow with tokens; tokens of longer prompts are taken to
    need more in proportion, as in attention. Where a batch does not fit after all, half of it is the budget from
    then on.
    """

    def __init__(self, asked: int | Literal["auto"], device: torch.device) -> None:
        self.most = most_tokens(asked, device.type)
        """Tokens that no batch exceeds."""
        self._learns = asked == "auto"
        self._fits: tuple[float, int] | None = None
        """Tokens that would have fit, and the length of the prompts of the batch that says so."""

    def at(self, length: int) -> int:
        """Tokens for a batch of prompts of this length, padding included."""
        if not self._learns:
            return self.most
        if self._fits is None:
            return max(1, self.most // 8)
        tokens, measured = self._fits
        return max(1, min(self.most, int(tokens * min(1.0, measured / length))))

    def learn(self, gauge: MemoryGauge, count: int, length: int) -> None:
        """Take in what a batch of `count` prompts, padded to `length`, took of the memory."""
        shares = [SHARE * free / max(taken, 1) for taken, free in gauge.taken()]
        if self._learns:
            self._fits = (min(shares, default=1.0) * count * length, length)

    def halve(self, tokens: int) -> None:
        """A batch of so many tokens did not fit."""
        self.most = max(1, min(self.most, tokens) // 2)
