"""The input cut into shards: contiguous ranges of records, the unit of work and of commit."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.errors import BacklensError
from pipeline.prompts.record import Prompt, Rejected


@dataclass(frozen=True, slots=True)
class Shard:
    index: int
    records: tuple[Prompt | Rejected, ...]


def shards(records: Iterable[Prompt | Rejected], size: int) -> Iterator[Shard]:
    """Shard i holds records i·size to (i+1)·size − 1; only the last may hold fewer. One is held at a time."""
    if size < 1:
        raise BacklensError(f"--shard-prompts {size}: a shard holds at least one prompt; give 1 or more")
    return _cut(iter(records), size)


def _cut(records: Iterator[Prompt | Rejected], size: int) -> Iterator[Shard]:
    for index in itertools.count():
        taken = tuple(itertools.islice(records, size))
        if not taken:
            return
        yield Shard(index, taken)
