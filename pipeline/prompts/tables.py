"""Parquet files and `datasets` data sets, read in Arrow batches so that few rows are ever Python objects."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.errors import BacklensError
from pipeline.prompts.fields import Row, rejected
from pipeline.prompts.record import Rejected
from pipeline.prompts.source import Source, one_line

_BATCH_ROWS = 1024
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:/]+))??(:(?P<split>[^:/]+))?")
_SAVED_DATASET = ("state.json", "dataset_info.json", "dataset_dict.json")


def parquet_rows(source: Source) -> Iterator[Row | Rejected]:
    import pyarrow.parquet

    with source.open(decompress=False) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
        except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses
            raise BacklensError(
                f"{source.name}: not a readable Parquet file: {one_line(str(error))}"
            ) from error
        yield from _rows(_batches(source, file.iter_batches(_BATCH_ROWS)), source.name)


def dataset_rows(source: Source) -> Iterator[Row | Rejected]:
    """A directory written by `save_to_disk` (memory-mapped), or a data set on the hub (streamed)."""
    dataset = _saved_dataset(source) if source.exists() else _hub_dataset(source)
    batches = dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS)
    yield from _rows(_batches(source, batches), source.name)


def is_saved_dataset(source: Source) -> bool:
    return source.is_directory() and source.holds(*_SAVED_DATASET)


def looks_like_hub_id(source: Source) -> bool:
    return "/" in source.url and _HUB_ID.fullmatch(source.url) is not None


def _saved_dataset(source: Source) -> Any:
    import datasets

    if not is_saved_dataset(source):
        raise BacklensError(f"{source.url}: not a data set directory; write it with dataset.save_to_disk(…)")
    try:
        loaded = datasets.load_from_disk(source.url)
    except (OSError, ValueError, KeyError) as error:
        raise BacklensError(f"{source.url}: not a readable data set: {one_line(str(error))}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    choices = ", ".join(f"{source.url.rstrip('/')}/{split}" for split in loaded)
    raise BacklensError(f"{source.url}: holds several splits and none is 'train'; name one: {choices}")


def _hub_dataset(source: Source) -> Any:
    import datasets

    parts = _HUB_ID.fullmatch(source.url)
    if parts is None:
        raise BacklensError(f"{source.url}: no such directory, and no hub id (owner/name:config:split)")
    try:
        return datasets.load_dataset(
            parts["id"], name=parts["config"], split=parts["split"] or "train", streaming=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BacklensError(
            f"{source.url}: no such path, and not readable from the hub as owner/name:config:split: "
            f"{one_line(str(error))}"
        ) from error


def _batches(source: Source, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, with a failure between them said as a broken file and a row number."""
    rows = 0
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator, None)
        except (OSError, ValueError) as error:
            source.fail_at(f"[{rows}]", error)
        if batch is None:
            return
        rows += batch.num_rows
        yield batch


def _rows(batches: Iterable[Any], name: str) -> Iterator[Row | Rejected]:
    prompt_id = 0
    for batch in batches:
        for values in _values(batch):
            where = f"{name}[{prompt_id}]"
            if isinstance(values, UnicodeDecodeError):
                problem = (
                    f"byte {values.object[values.start]:#04x} in a text column is not UTF-8; rewrite the row"
                )
                yield rejected(prompt_id, where, "not-utf8", problem)
            else:
                yield Row(prompt_id, where, values)
            prompt_id += 1


def _values(batch: Any) -> list[dict[str, Any] | UnicodeDecodeError]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check text that it reads; find the rows one by one
        return [_single(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _single(row: Any) -> dict[str, Any] | UnicodeDecodeError:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error
