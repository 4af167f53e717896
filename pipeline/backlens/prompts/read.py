"""Reading of prompts from a file, an object store or a data set: each record in order, as a `Prompt` or a `Rejected`.

The format follows from the name of the source, and for `.json` from its first record. JSON Lines, CSV, Parquet and data
sets are streamed, so that memory does not depend on the length of the input. JSON arrays, such as CounterFact and zsRE,
are loaded whole. `survey` reads an input once, to count its records and hash its content.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

from backlens.config import PromptFields, PromptFormat
from backlens.errors import BacklensError
from backlens.prompts.counterfact import array_rows, counterfact_prompts, first_record, zsre_prompts
from backlens.prompts.datasets import dataset_rows, is_saved_dataset, looks_like_hub_id, parquet_rows
from backlens.prompts.fields import Row, prompts_from_columns
from backlens.prompts.jsonl_csv import csv_rows, jsonl_rows
from backlens.prompts.prompt import Prompt, Rejected
from backlens.prompts.source import Source

_BY_SUFFIX: dict[str, PromptFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_NAMED = ", ".join(name for name in get_args(PromptFormat) if name != "auto")


def detect(source: Source) -> PromptFormat:
    """The format of a source. Raises BacklensError where it cannot be told."""
    suffix = source.suffix
    if not source.exists():
        if suffix not in _BY_SUFFIX and suffix != ".json" and looks_like_hub_id(source):
            return "dataset"
        raise BacklensError(f"{source.url}: no such file; check the path given with --prompts")
    if source.is_directory():
        if is_saved_dataset(source):
            return "dataset"
        raise BacklensError(
            f"{source.url}: a directory, but not one written by dataset.save_to_disk(…); name a file in it"
        )
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if suffix == ".json":
        return _json_kind(source)
    raise BacklensError(
        f"{source.url}: cannot tell the format from the name "
        f"(known: {', '.join(_BY_SUFFIX)}, .json, a data set directory or hub id); "
        f"say it with --format ({_NAMED})"
    )


def require(source: Source, format: PromptFormat) -> None:
    """Raise BacklensError, before anything is read, for a source that cannot have the format that the user named."""
    if format == "dataset":
        return
    if not source.exists():
        raise BacklensError(f"{source.url}: no such file; check the path given with --prompts")
    if source.is_directory():
        raise BacklensError(f"{source.url}: a directory; name a {format} file in it")


def _json_kind(source: Source) -> PromptFormat:
    """The format of a `.json` file: an array of records of one of three kinds, or JSON Lines."""
    lines = (line.strip() for line in source.lines())
    start = next((line for line in lines if line), b"")
    if start.startswith(b"{"):
        if _is_json(start):
            return "jsonl"
        raise BacklensError(
            f"{source.url}: begins with an object of several lines (or a broken line: then say --format jsonl); "
            'write an array of records, [{"prompt": …, "target": …}, …], or one record per line'
        )
    if not start.startswith(b"["):
        problem = "is empty" if not start else "neither a JSON array of records nor one record per line"
        raise BacklensError(f"{source.url}: {problem}; say the format with --format ({_NAMED})")
    record = first_record(source)
    if isinstance(record, dict):
        if "requested_rewrite" in record:
            return "counterfact"
        if "src" in record and ("answers" in record or "alt" in record):
            return "zsre"
    return "json"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


Reader = Callable[[Source, PromptFields], Iterator[Prompt | Rejected]]


def read_prompts(
    source: str, format: PromptFormat, fields: PromptFields, limit: int | None
) -> Iterator[Prompt | Rejected]:
    """The first `limit` records (None: all). `prompt_id` is a record's ordinal, rejected records included.

    Raises BacklensError: at once for a source that is missing or of unknown format, and during the reading for one that
    is broken as a whole.
    """
    place = Source(source)
    if format == "auto":
        format = detect(place)
    else:
        require(place, format)
    return itertools.islice(_READERS[format](place, fields), limit)


def _columns(rows: Callable[[Source], Iterable[Row | Rejected]]) -> Reader:
    return lambda source, fields: prompts_from_columns(rows(source), fields, source.name)


_READERS: dict[PromptFormat, Reader] = {
    "jsonl": _columns(jsonl_rows),
    "json": _columns(array_rows),
    "csv": _columns(csv_rows),
    "parquet": _columns(parquet_rows),
    "dataset": _columns(dataset_rows),
    "counterfact": counterfact_prompts,
    "zsre": zsre_prompts,
}


FIRST = 1000
"""Number of records that show that a column has another name."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Counts of an input, and a hash of its content."""

    prompts: int
    """Number of records, rejected ones included; `prompt_id` runs from 0 to one less."""
    rejected: int
    first_rejected: Rejected | None
    characters: int
    """Number of characters of all prompts and targets."""
    digest: str
    """SHA-256 of the content of every record in order; it does not depend on the file or its format."""
    subjects_absent: int = 0
    """Number of prompts that do not name their subject."""
    subjects_repeated: int = 0
    """Number of prompts that name their subject several times."""


def survey(source: str, format: PromptFormat, fields: PromptFields, limit: int | None) -> Survey:
    """Read an input once. Raises BacklensError if it cannot be read, or if all of its first records lack one field."""
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
    """Raise BacklensError if all records so far lack the same field."""
    if first is not None and None not in lacked and len(lacked) == 1:
        _, _, problem = first.message.removeprefix(name).partition(": ")
        raise BacklensError(f"{name}: in {where}, {problem}")


def _canonical(record: Prompt | Rejected, name: str) -> bytes:
    """A record as one line of JSON, without its place in a file, so that files of equal content have equal hashes."""
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
            if record.slot is not None:  # the place may differ from that of the words
                content.append(str(record.slot.start))
        case Rejected():
            _, _, problem = record.message.removeprefix(name).partition(": ")
            content = [record.error, problem]
    return json.dumps(content, allow_nan=False).encode("ascii") + b"\n"
