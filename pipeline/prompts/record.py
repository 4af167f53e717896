"""What one line of the input becomes: a prompt to process, or a rejection that says why not."""

from dataclasses import dataclass

from pipeline.prompts.subject import SubjectPlace, find_subject


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
