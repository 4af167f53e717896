"""Prompts of a shard packed into batches: sorted by length, up to a token budget, with little padding.

How many tokens a batch may have: what was asked for, or what the first small batches show to fit.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch

from backlens.capture.memory import MemoryGauge

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
