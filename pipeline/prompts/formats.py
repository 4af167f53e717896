"""Which format a source is in, judged by its name and, for `.json`, by how it begins."""

import json
from typing import get_args

from pipeline.config import PromptFormat
from pipeline.errors import BacklensError
from pipeline.prompts.facts import first_record
from pipeline.prompts.source import Source
from pipeline.prompts.tables import is_saved_dataset, looks_like_hub_id

_BY_SUFFIX: dict[str, PromptFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_NAMED = ", ".join(name for name in get_args(PromptFormat) if name != "auto")


def detect(source: Source) -> PromptFormat:
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
    """Refuse, before anything is read, a source that cannot be of the format the user named."""
    if format == "dataset":
        return
    if not source.exists():
        raise BacklensError(f"{source.url}: no such file; check the path given with --prompts")
    if source.is_directory():
        raise BacklensError(f"{source.url}: a directory; name a {format} file in it")


def _json_kind(source: Source) -> PromptFormat:
    """An array of records of one kind or another, or JSON Lines under this name."""
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
