"""Prompts from a file, an object store or a data set: each record in order, as a `Prompt` or a `Rejected`.

JSON Lines, CSV, Parquet and data sets are streamed, so that an input of any length takes the same memory.
JSON arrays, as CounterFact and zsRE are, are loaded whole.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

from pipeline.config import PromptFields, PromptFormat
from pipeline.prompts.facts import array_rows, counterfact_prompts, zsre_prompts
from pipeline.prompts.fields import Row, prompts_from_columns
from pipeline.prompts.formats import detect, require
from pipeline.prompts.lines import csv_rows, jsonl_rows
from pipeline.prompts.record import Prompt, Rejected
from pipeline.prompts.source import Source
from pipeline.prompts.tables import dataset_rows, parquet_rows

Reader = Callable[[Source, PromptFields], Iterator[Prompt | Rejected]]


def read_prompts(
    source: str, format: PromptFormat, fields: PromptFields, limit: int | None
) -> Iterator[Prompt | Rejected]:
    """The first `limit` records (None: all). `prompt_id` is a record's ordinal, rejected records included.

    A source that is missing or of unknown format is refused here, before the first record is asked for; one
    that is broken as a whole, when the reading gets there. Both are a `BacklensError`.
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
