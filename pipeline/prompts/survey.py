"""What an input holds, from one pass over it: how much work it is, and a hash of its content."""

import hashlib
import json
from dataclasses import dataclass

from pipeline.config import PromptFields, PromptFormat
from pipeline.errors import BacklensError
from pipeline.prompts.read import read_prompts
from pipeline.prompts.record import Prompt, Rejected
from pipeline.prompts.source import Source

FIRST = 1000
"""Records that are enough to see that a column has another name."""


@dataclass(frozen=True, slots=True)
class Survey:
    prompts: int
    """Records, rejected ones included: `prompt_id` runs from 0 to one less."""
    rejected: int
    first_rejected: Rejected | None
    characters: int
    """Of all prompts and targets."""
    digest: str
    """SHA-256 of every record in order: of what it says, not of the file or format it is written in."""
    subjects_absent: int = 0
    """Prompts that do not name the subject that is given with them."""
    subjects_repeated: int = 0
    """Prompts that name their subject in several places."""


def survey(source: str, format: PromptFormat, fields: PromptFields, limit: int | None) -> Survey:
    """Raises BacklensError where the source cannot be read, and where the first records all lack one field."""
    records = rejected = characters = subjects_absent = subjects_repeated = 0
    first_rejected: Rejected | None = None
    lacked: set[str | None] = set()
    digest = hashlib.sha256()
    name = Source(source).name
    for record in read_prompts(source, format, fields, limit):
        if records == FIRST:
            _refuse_lacking(lacked, first_rejected, name, f"the first {FIRST:,} records")
        records += 1
        digest.update(_canonical(record, name))
        if isinstance(record, Rejected):
            rejected += 1
            first_rejected = first_rejected or record
            lacked.add(record.absent)
            continue
        lacked.add(None)
        characters += len(record.prompt) + len(record.target)
        if record.subject is not None:
            place = record.subject_place()
            subjects_absent += place is None
            subjects_repeated += place is not None and place.others > 0
    _refuse_lacking(lacked, first_rejected, name, "every record")
    return Survey(
        records,
        rejected,
        first_rejected,
        characters,
        digest.hexdigest(),
        subjects_absent,
        subjects_repeated,
    )


def _refuse_lacking(lacked: set[str | None], first: Rejected | None, name: str, where: str) -> None:
    """Refuse an input of which all records so far lack the same field."""
    if first is not None and None not in lacked and len(lacked) == 1:
        _, _, problem = first.message.removeprefix(name).partition(": ")
        raise BacklensError(f"{name}: in {where}, {problem}")


def _canonical(record: Prompt | Rejected, name: str) -> bytes:
    """A record as one line of JSON, without its place in a file: two files of equal content hash alike."""
    match record:
        case Prompt():
            content = [
                record.prompt,
                record.target,
                record.subject,
                record.id,
                record.relation,
                record.meta,
            ]
            if record.slot is not None:  # it may be another place than the words alone would give
                content.append(str(record.slot.start))
        case Rejected():
            _, _, problem = record.message.removeprefix(name).partition(": ")
            content = [record.error, problem]
    return json.dumps(content, allow_nan=False).encode("ascii") + b"\n"
