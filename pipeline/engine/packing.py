"""Prompts of a shard packed into batches: sorted by length, up to a token budget, with little padding."""

from collections import deque
from collections.abc import Callable, Collection, Sequence

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
