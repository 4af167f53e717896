"""Rows of JSON Lines and CSV, read line by line: a bad line is rejected alone, and memory stays constant."""

import csv
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from backlens.errors import BacklensError
from backlens.prompts.fields import Row, rejected
from backlens.prompts.prompt import Rejected
from backlens.prompts.source import Source, one_line

# Longer than any prompt; it bounds how much text an unclosed quote can take in.
_LONGEST_CELL = 1 << 24


def jsonl_rows(source: Source) -> Iterator[Row | Rejected]:
    """One object per line. Lines of white space are not records, but they count in line numbers."""
    prompt_id = 0
    for number, line in enumerate(source.lines(), start=1):
        if line.strip():
            yield _parsed(line, prompt_id, f"{source.name}:{number}")
            prompt_id += 1


def _parsed(line: bytes, prompt_id: int, where: str) -> Row | Rejected:
    try:
        values = load_json(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        code, problem = "not-utf8", _not_utf8(line[error.start], error.start)
    except json.JSONDecodeError as error:
        code, problem = "broken-json", f"broken JSON at column {error.pos + 1}: {error.msg}; mend the line"
    except RecursionError:
        code, problem = "broken-json", "nested too deeply to be read; flatten it"
    except ValueError as error:  # a number of thousands of digits, a key that an object has twice
        code, problem = "broken-json", f"broken JSON: {error}"
    else:
        if isinstance(values, dict):
            return Row(prompt_id, where, values)
        code, problem = "not-an-object", 'not an object; write {"prompt": …, "target": …} on each line'
    return rejected(prompt_id, where, code, problem)


def load_json(text: str) -> Any:
    """Parse JSON as `json.loads` does, but raise ValueError for an object with one key twice, which is ambiguous."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice; remove one")
    return values


def csv_rows(source: Source) -> Iterator[Row | Rejected]:
    """One row per record below the header row; a quoted cell may span several lines."""
    # The limit belongs to the process, so it is only raised.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    # Bytes that are not UTF-8 become surrogates, so that their row can be named.
    text = (line.decode("utf-8", "surrogateescape") for line in source.lines())
    records = _csv_records(text, "\t" if source.suffix == ".tsv" else ",")
    first = next(records, None)
    if first is None:
        return
    header = _header(first, source)
    for prompt_id, record in enumerate(records):
        where = f"{source.name}:{record.line}"
        if problem := _problem(record, len(header)):
            yield rejected(prompt_id, where, *problem)
        else:
            yield Row(prompt_id, where, dict(zip(header, record.cells, strict=True)))


@dataclass(frozen=True, slots=True)
class _CsvRecord:
    line: int
    """First of the physical lines that the record spans."""
    cells: list[str]
    error: str | None = None


class _Lines:
    """Lines that can be read again, so that an unclosed quote does not take in the records after it."""

    def __init__(self, text: Iterator[str]) -> None:
        self._text = text
        self._waiting: deque[str] = deque()
        self._record: list[str] = []
        self.line = 1
        """Line number of the next record."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._text)
        self._record.append(line)
        return line

    def end_record(self, *, lines: int | None = None) -> None:
        """End the record after the first `lines` of the lines read (None: all); the others are read again."""
        lines = len(self._record) if lines is None else lines
        self._waiting.extendleft(reversed(self._record[lines:]))
        self._record.clear()
        self.line += lines


def _csv_records(text: Iterator[str], delimiter: str) -> Iterator[_CsvRecord]:
    """Blank lines are not records. A line that breaks the rules of quoting is one bad record."""
    lines = _Lines(text)
    # Strict: a stray quote is an error and does not change the text unnoticed.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = lines.line
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.end_record(lines=1)
            yield _CsvRecord(line, [], str(error))
            continue
        lines.end_record()
        if len(cells) > 1 or (cells and cells[0].strip()):
            yield _CsvRecord(line, cells)


def _problem(record: _CsvRecord, width: int) -> tuple[str, str] | None:
    if record.error:
        remedy = "close its quotes, and write a quote inside a cell twice"
        return "bad-row", f"not a CSV row ({record.error}); {remedy}"
    if escaped := _escaped_byte(record.cells):
        column, byte = escaped
        return "not-utf8", f"byte {byte:#04x} in column {column} is not UTF-8; save the file as UTF-8"
    if len(record.cells) != width:
        found = f"{len(record.cells)} columns, but the header has {width}"
        return "bad-row", f"{found}; put cells that hold the delimiter in quotes"
    return None


def _escaped_byte(cells: list[str]) -> tuple[int, int] | None:
    for column, cell in enumerate(cells, start=1):
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError as error:
            return column, ord(cell[error.start]) - 0xDC00
    return None


def _header(first: _CsvRecord, source: Source) -> list[str]:
    place = f"{source.name}:{first.line}"
    if problem := _problem(first, len(first.cells)):
        raise BacklensError(f"{place}: the header cannot be read: {problem[1]}")
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(first.cells, start=1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BacklensError(f"{place}: the header has {one_line(twice)!r} twice; rename one of the columns")
    return names


def _not_utf8(byte: int, offset: int) -> str:
    return f"byte {byte:#04x} at column {offset + 1} is not UTF-8; save the file as UTF-8"
