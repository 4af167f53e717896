"""The declared tables: documented, stable through Parquet, and described in docs/tables.md."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from docs import write_tables as document

from backlens.store.tables import SCHEMA_VERSION, TABLES, Table, declared_table, factors_table

KEYS = ["prompt_id", "layer", "module", "expert"]
PROJECTION = ["top_ids", "top_scores", "bottom_ids", "bottom_scores", "target_score", "target_rank"]


def example_value(data_type: pa.DataType):
    if isinstance(data_type, pa.ListType):
        return [example_value(data_type.value_type)] * 2
    if isinstance(data_type, pa.DictionaryType):
        return "mlp.down"
    if pa.types.is_integer(data_type):
        return 3
    if pa.types.is_floating(data_type):
        return 0.5
    return b"\xe2\x96" if pa.types.is_binary(data_type) else " Paris"


def example_rows(table: Table) -> pa.Table:
    """Two rows: one with every value, one with null in every column that allows it."""
    columns = {
        column.name: [
            example_value(column.type),
            None if column.nullable else example_value(column.type),
        ]
        for column in table.columns
    }
    return pa.table(columns, schema=table.schema)


@pytest.mark.parametrize(
    "table", [*TABLES.values(), factors_table(pa.float16())], ids=lambda table: table.name
)
def test_a_schema_survives_a_parquet_round_trip(table: Table, tmp_path: Path):
    rows = example_rows(table)
    pq.write_table(rows, tmp_path / "table.parquet", row_group_size=1)
    back = pq.read_table(tmp_path / "table.parquet")
    assert back.schema.equals(table.schema, check_metadata=True)
    assert str(back.schema) == str(table.schema)  # list item names too, which `equals` does not compare
    assert back.to_pylist() == rows.to_pylist()


def test_the_tables_are_those_of_the_design():
    assert list(TABLES) == ["vocab", "prompts", "layers", "neurons", "tokens", "factors", "failures", "edits"]
    assert TABLES["layers"].schema.names == [*KEYS, "rank", "grad_norm", "singular_values", *PROJECTION]
    assert TABLES["neurons"].schema.names == [*KEYS, "neuron", "grad_norm", "main_position", *PROJECTION]
    assert TABLES["tokens"].schema.names == [
        *KEYS,
        "position",
        "token_id",
        "input_norm",
        "vjp_norm",
        *PROJECTION,
    ]
    assert TABLES["neurons"].sorted_by == ("layer", "module", "prompt_id", "neuron")


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_every_column_is_documented_and_every_sort_column_exists(table: Table):
    assert set(table.sorted_by) <= set(table.schema.names)
    for column in table.columns:
        assert column.doc.endswith(".")
        assert not column.nullable or "null" in column.doc, f"{table.name}.{column.name}: say what null means"


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_the_metadata_name_the_table_the_version_and_the_signs(table: Table):
    metadata = table.schema.metadata
    assert metadata[b"backlens.schema_version"] == str(SCHEMA_VERSION).encode()
    assert metadata[b"backlens.table"] == table.name.encode()
    assert b"neither negated nor scaled" in metadata[b"backlens.sign_convention"]


def test_list_items_are_never_null():
    lists = [
        column.type for table in TABLES.values() for column in table.columns if pa.types.is_list(column.type)
    ]
    assert lists
    assert not any(list_type.value_field.nullable for list_type in lists)


def test_factors_take_the_value_type_of_their_data():
    assert (
        declared_table("factors", factors_table(pa.float16()).schema).schema.field("x").type.value_type
        == pa.float16()
    )
    assert declared_table("factors", factors_table().schema) == TABLES["factors"]
    with pytest.raises(ValueError, match="float16 or float32"):
        factors_table(pa.float64())


def test_the_documentation_is_current():
    assert document.main(["--check"]) == 0, "run: python -m docs.write_tables"


def test_check_tells_a_stale_page_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(document, "DOCUMENT", tmp_path / "tables.md")
    assert document.main(["--check"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert document.main([]) == 0
    assert document.main(["--check"]) == 0
