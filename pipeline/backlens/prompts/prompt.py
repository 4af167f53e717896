"""What one line of the input becomes: a prompt to process, or a rejection that says why not.

The input cut into shards: contiguous ranges of records, the unit of work and of commit.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from backlens.errors import BacklensError
from backlens.prompts.subject import SubjectPlace, find_subject


@dataclass(frozen=True, slots=True)
class Prompt:
    """One (prompt, target) pair as the user wrote it, before tokenization."""

    prompt_id: int
    """Ordinal in the input, from 0. Rejected records count too, so ids are stable when a line is mended."""
    prompt: str
    target: str
    where: str
    """Where it came from, for messages: `prompts.jsonl:17`."""
    id: str | None = None
    subject: str | None = None
    relation: str | None = None
    meta: str | None = None
    """The input's other columns, as a JSON object."""
    slot: SubjectPlace | None = None
    """Where a template had its `{}`, with the subject in it now."""

    def subject_place(self) -> SubjectPlace | None:
        """Where `prompt` names the subject."""
        return self.slot or (None if self.subject is None else find_subject(self.prompt, self.subject))


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that could not be processed: one row of the `failures` table."""

    prompt_id: int
    stage: str
    """`read`, `tokenize` or `compute`."""
    error: str
    """A short, stable code such as `missing-field`."""
    message: str
    """One line: where, what, and what to do."""
    absent: str | None = None
    """The field that the record does not have at all, if that is why: the mark of a column with another name."""


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
