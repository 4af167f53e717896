"""Rows of Parquet files and of `datasets` data sets, read in Arrow batches, so that few rows are Python objects."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from backlens.errors import BacklensError
from backlens.prompts.fields import Row
from backlens.prompts.source import Source, one_line

_BATCH_ROWS = 1024
_MOST_SHOWN = 1 << 20
"""Limit on the elements and characters of a value that is shown as text."""
_NO_SUCH_VALUE = (
    ArithmeticError,
    ImportError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""Errors for values that Python cannot hold, from its dates, from time zone libraries, and from Arrow."""
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:/]+))??(:(?P<split>[^:/]+))?")
_SAVED_DATASET = ("state.json", "dataset_info.json", "dataset_dict.json")


def parquet_rows(source: Source) -> Iterator[Row]:
    """The rows of a Parquet file. Raises BacklensError where the file cannot be read, or names a column twice."""
    import pyarrow.parquet

    with source.open(decompress=False) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
        except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses
            raise BacklensError(
                f"{source.name}: not a readable Parquet file: {one_line(str(error))}"
            ) from error
        _refuse_repeated(file.schema_arrow.names, source)
        yield from _rows(_batches(source, file.iter_batches(_BATCH_ROWS)), source.name)


def dataset_rows(source: Source) -> Iterator[Row]:
    """The rows of a directory that `save_to_disk` wrote (memory-mapped), or of a data set on the hub (streamed)."""
    dataset = _saved_dataset(source) if source.exists() else _hub_dataset(source)
    batches = dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS)
    yield from _rows(_batches(source, batches), source.name)


def _refuse_repeated(columns: list[str], source: Source) -> None:
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise BacklensError(f"{source.name}: has the column {one_line(twice)!r} twice; rename one of them")


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
    """The batches. A failure to read one becomes a BacklensError with the row number."""
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


def _rows(batches: Iterable[Any], name: str) -> Iterator[Row]:
    import pyarrow

    prompt_id = 0
    for batch in batches:
        for part in batch.to_batches() if isinstance(batch, pyarrow.Table) else [batch]:
            names = part.schema.names
            for values in zip(*map(_values, part.columns), strict=True):
                yield Row(prompt_id, f"{name}[{prompt_id}]", dict(zip(names, values, strict=True)))
                prompt_id += 1


def _values(column: Any) -> list[Any]:
    """A column as Python objects. Only a column with a value that Python cannot hold is converted value by value."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values = column.to_pylist()
    except _NO_SUCH_VALUE:
        values = [_value(column, index) for index in range(len(column))]
    if pyarrow.types.is_fixed_size_binary(column.type):  # a UUID or a hash, some of which happen to be text
        return [value.hex() if isinstance(value, bytes) else value for value in values]
    return values


def _value(column: Any, index: int) -> Any:
    """One value: bytes for text that is not UTF-8, and Arrow's own text for a value that Python cannot hold.

    Such values are a date beyond the year 9999, an unknown time zone, and an object with one field twice.
    """
    import pyarrow

    one = column.slice(index, 1)
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError:
        types = pyarrow.types
        if any(
            is_text(one.type) for is_text in (types.is_string, types.is_large_string, types.is_string_view)
        ):
            return one[0].as_buffer().to_pybytes()
    except _NO_SUCH_VALUE:
        pass
    most = _MOST_SHOWN
    shown = one.to_string(window=most, container_window=most, element_size_limit=most, skip_new_lines=True)
    return one_line(shown[1:-1] if shown.startswith("[") else shown)
