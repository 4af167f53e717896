"""Writers of prompt files in every format, and readers of them."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from backlens.config import PromptFields, PromptFormat
from backlens.prompts.prompt import Prompt, Rejected
from backlens.prompts.read import Survey, read_prompts, survey

PARIS = {"prompt": "The capital of France is", "target": " Paris"}
ROME = {"prompt": "The capital of Italy is", "target": " Rome", "subject": "Italy", "id": "q2"}


def read(
    path: Path | str,
    format: PromptFormat = "auto",
    fields: PromptFields = PromptFields(),  # noqa: B008
    limit: int | None = None,
) -> list[Prompt | Rejected]:
    return list(read_prompts(str(path), format, fields, limit))


def only_prompt(path: Path, fields: PromptFields = PromptFields()) -> Prompt:  # noqa: B008
    (record,) = read(path, fields=fields)
    assert isinstance(record, Prompt), record
    return record


def only_rejection(path: Path, fields: PromptFields = PromptFields()) -> Rejected:  # noqa: B008
    (record,) = read(path, fields=fields)
    assert isinstance(record, Rejected), record
    return record


def surveyed(path: Path, fields: PromptFields = PromptFields()) -> Survey:  # noqa: B008
    return survey(str(path), "auto", fields, None)


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def write_dataset(path: Path, records: list[dict[str, Any]]) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records).save_to_disk(str(path))
    return path
