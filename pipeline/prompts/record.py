"""What one line of the input becomes: a prompt to process, or a rejection that says why not."""

from dataclasses import dataclass


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
