"""Prompts of a shard packed into batches: sorted by length, up to a token budget, with little padding."""

from collections.abc import Sequence

WASTE = 0.1
"""Largest share of padding in a batch, unless the batch would be very small without it."""


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in batches, shortest first.

    A batch's padded size (longest × count) stays within `budget`, save for a single prompt that is longer by
    itself. A batch is also closed when the next prompt would make more than a tenth of it padding, once it has
    an eighth of the budget: below that, small batches would cost more than padding does.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        length = lengths[index]
        padded = length * (len(current) + 1)
        wasteful = padded - tokens - length > WASTE * padded and len(current) * length > budget // 8
        if current and (padded > budget or wasteful):
            batches.append(current)
            current, tokens = [], 0
        current.append(index)
        tokens += length
    return [*batches, current] if current else batches
