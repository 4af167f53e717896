"""What an input holds, from one pass over it: how much work it is, and a hash of its content."""

import hashlib
import json
from dataclasses import dataclass

from pipeline.config import PromptFields, PromptFormat
from pipeline.prompts.read import read_prompts
from pipeline.prompts.record import Prompt, Rejected
from pipeline.prompts.source import Source


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


def survey(source: str, format: PromptFormat, fields: PromptFields, limit: int | None) -> Survey:
    records = rejected = characters = 0
    first_rejected: Rejected | None = None
    digest = hashlib.sha256()
    name = Source(source).name
    for record in read_prompts(source, format, fields, limit):
        records += 1
        digest.update(_canonical(record, name))
        if isinstance(record, Rejected):
            rejected += 1
            first_rejected = first_rejected or record
        else:
            characters += len(record.prompt) + len(record.target)
    return Survey(records, rejected, first_rejected, characters, digest.hexdigest())


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
        case Rejected():
            _, _, problem = record.message.removeprefix(name).partition(": ")
            content = [record.error, problem]
    return json.dumps(content, allow_nan=False).encode("ascii") + b"\n"
