"""The layout of written files, and the order of their rows."""

import hashlib
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backlens.store import parquet
from backlens.store.directory import Directory
from backlens.store.parquet import sort_rows, write_table
from backlens.store.tables import TABLES, Table, factors_table

ROWS = 300_000


def many_tokens() -> pa.Table:
    scores = pa.array([[0.5, 0.25]] * ROWS, TABLES["tokens"].schema.field("top_scores").type)
    ids = pa.array([[1, 2]] * ROWS, TABLES["tokens"].schema.field("top_ids").type)
    columns = {
        "prompt_id": range(ROWS),
        "layer": [0] * ROWS,
        "module": pa.array(["mlp.up"] * ROWS).dictionary_encode(),
        "expert": [None] * ROWS,
        "position": [0] * ROWS,
        "token_id": [1] * ROWS,
        "input_norm": [1.0] * ROWS,
        "vjp_norm": [1.0] * ROWS,
        "top_ids": ids,
        "top_scores": scores,
        "bottom_ids": ids,
        "bottom_scores": scores,
        "target_score": [1.0] * ROWS,
        "target_rank": [1] * ROWS,
    }
    return pa.table(columns, schema=TABLES["tokens"].schema)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_table(Directory.at(folder), "tokens.parquet", many_tokens(), TABLES["tokens"])
    return folder / "tokens.parquet"


def test_row_groups_have_131072_rows(written: Path):
    footer = pq.read_metadata(written)
    assert [footer.row_group(index).num_rows for index in range(3)] == [131_072, 131_072, ROWS - 262_144]


def test_the_footer_records_the_order(written: Path):
    group = pq.read_metadata(written).row_group(0)
    names = [group.column(sorting.column_index).path_in_schema for sorting in group.sorting_columns]
    assert names == ["layer", "module", "prompt_id", "position"]
    assert not any(sorting.descending or sorting.nulls_first for sorting in group.sorting_columns)


def test_floats_are_byte_stream_split_and_the_rest_has_dictionaries(written: Path):
    group = pq.read_metadata(written).row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    for column in columns:
        is_float = column.physical_type == "FLOAT"
        assert ("BYTE_STREAM_SPLIT" in column.encodings) == is_float, column.path_in_schema
        assert column.has_dictionary_page != is_float, column.path_in_schema
    assert sum(column.physical_type == "FLOAT" for column in columns) == 5


def test_files_have_a_page_index_and_statistics_of_scalars(written: Path):
    group = pq.read_metadata(written).row_group(1)
    columns = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    assert all(column.has_offset_index for column in columns.values())
    assert columns["prompt_id"].statistics.min == 131_072
    assert columns["module"].statistics.max == "mlp.up"
    assert not columns["top_ids.list.element"].is_stats_set


def test_the_schema_metadata_are_in_the_file(written: Path):
    assert pq.read_schema(written).equals(TABLES["tokens"].schema, check_metadata=True)


def test_the_record_describes_the_file(tmp_path: Path):
    record = write_table(
        Directory.at(tmp_path), "failures.parquet", TABLES["failures"].empty(), TABLES["failures"]
    )
    content = (tmp_path / "failures.parquet").read_bytes()
    assert record.bytes == len(content)
    assert record.checksum == "sha256:" + hashlib.sha256(content).hexdigest()
    assert (record.path, record.rows) == ("failures.parquet", 0)


def test_wide_rows_get_smaller_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 100_000)
    write_table(
        Directory.at(tmp_path), "factors.parquet", factor_rows(pa.float32()), factors_table(pa.float32())
    )
    footer = pq.read_metadata(tmp_path / "factors.parquet")
    assert max(footer.row_group(index).num_rows for index in range(footer.num_row_groups)) < 20


def factor_rows(value_type: pa.DataType) -> pa.Table:
    vector = [index / 4 for index in range(1000)]
    keys = {"prompt_id": 1, "layer": 0, "module": "mlp.up", "expert": None}
    rows = [keys | {"position": position, "x": vector, "delta": vector} for position in range(100)]
    return pa.Table.from_pylist(rows, schema=factors_table(value_type).schema)


@pytest.mark.parametrize("value_type", [pa.float16(), pa.float32()], ids=str)
def test_duckdb_reads_factors(tmp_path: Path, value_type: pa.DataType):
    rows = factor_rows(value_type)
    write_table(Directory.at(tmp_path), "factors.parquet", rows, factors_table(value_type))
    vectors = duckdb.read_parquet(str(tmp_path / "factors.parquet")).fetchall()
    assert [row[-1] for row in vectors] == rows.column("delta").to_pylist()


def test_rows_of_another_schema_are_a_defect(tmp_path: Path):
    table = TABLES["failures"]
    rows = table.empty().rename_columns(["prompt_id", "stage", "error", "text"])
    with pytest.raises(ValueError, match="differing: text"):
        write_table(Directory.at(tmp_path), "failures.parquet", rows, table)
    assert list(tmp_path.iterdir()) == []


def test_nulls_where_none_are_declared_are_a_defect(tmp_path: Path):
    table = TABLES["failures"]
    rows = pa.table({name: [1 if name == "prompt_id" else None] for name in table.schema.names}, table.schema)
    with pytest.raises(ValueError, match="1 nulls in column stage"):
        write_table(Directory.at(tmp_path), "failures.parquet", rows, table)


SMALL = Table(
    "small",
    "Sorted rows.",
    "row",
    ("layer", "module", "prompt_id"),
    (
        *TABLES["layers"].columns[:4],
        *(column for column in TABLES["layers"].columns if column.name == "rank"),
    ),
)
rows_in_any_order = st.lists(
    st.fixed_dictionaries(
        {
            "prompt_id": st.integers(0, 3),
            "layer": st.integers(0, 2),
            "module": st.sampled_from(["mlp.up", "mlp.down", "attn.o"]),
            "expert": st.none() | st.integers(0, 2),
            "rank": st.integers(0, 100),
        }
    )
)


def in_python(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Python's sort of the rows: stable, nulls last."""
    return sorted(
        rows,
        key=lambda row: (
            row["layer"],
            row["module"].encode(),
            row["prompt_id"],
            row["expert"] is None,
            row["expert"] or 0,
        ),
    )


@given(rows_in_any_order)
def test_rows_are_sorted_as_python_sorts_them(rows: list[dict[str, Any]]):
    assert sort_rows(pa.Table.from_pylist(rows, SMALL.schema), SMALL).to_pylist() == in_python(rows)


@given(rows_in_any_order, rows_in_any_order)
def test_rows_that_come_in_pieces_are_sorted_together(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
):
    pieces = pa.concat_tables([pa.Table.from_pylist(rows, SMALL.schema) for rows in (first, second)])
    assert sort_rows(pieces, SMALL).to_pylist() == in_python(first + second)


def test_sorted_rows_are_not_copied():
    rows = many_tokens()
    assert sort_rows(rows, TABLES["tokens"]) is rows


def test_lists_too_long_for_one_array_are_sorted_piece_by_piece(monkeypatch: pytest.MonkeyPatch):
    rows = factor_rows(pa.float16())
    backwards = pa.concat_tables([rows.slice(90 - 10 * piece, 10) for piece in range(10)])
    monkeypatch.setattr(parquet, "MOST_LIST_ITEMS", 1000)
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 30_000)
    assert sort_rows(backwards, factors_table(pa.float16())).to_pylist() == rows.to_pylist()
