"""`schemas/` is current, and usable without the package: by Arrow's JSON form and by a SQL database."""

import json
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from docs.write_schemas import FOLDER, main

from backlens.atlas.tables import ATLAS_TABLES
from backlens.store.tables import TABLES, Table

FILES = [*FOLDER.glob("*.json"), *(FOLDER / "atlas").glob("*.json")]
EVERY: dict[str, Table] = TABLES | ATLAS_TABLES


def read_type(described: dict, children: list[dict]) -> pa.DataType:
    """An Arrow type, read by the rules of Arrow's integration format alone."""
    match described["name"]:
        case "int":
            return getattr(pa, f"int{described['bitWidth']}")()
        case "floatingpoint":
            return {"HALF": pa.float16(), "SINGLE": pa.float32(), "DOUBLE": pa.float64()}[
                described["precision"]
            ]
        case "list":
            return pa.list_(read_field(children[0]))
        case name:
            return {"utf8": pa.string(), "binary": pa.binary(), "bool": pa.bool_()}[name]


def read_field(described: dict) -> pa.Field:
    value = read_type(described["type"], described["children"])
    if "dictionary" in described:
        value = pa.dictionary(read_type(described["dictionary"]["indexType"], []), value)
    return pa.field(described["name"], value, nullable=described["nullable"])


def test_the_files_are_current():
    assert main(["--check"]) == 0
    assert {file.stem for file in FILES} == EVERY.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_arrow_schema_is_the_tables_own(file: Path):
    described = json.loads(file.read_text("utf-8"))
    table = EVERY[file.stem]
    assert pa.schema([read_field(field) for field in described["arrow"]["fields"]]).equals(table.schema)
    assert {column["name"]: column["doc"] for column in described["columns"]} == {
        column.name: column.doc for column in table.columns
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_ddl_makes_a_table_that_takes_the_parquet_files(file: Path, tmp_path: Path):
    pq.write_table(EVERY[file.stem].empty(), tmp_path / "empty.parquet")
    with duckdb.connect() as database:
        database.execute(file.with_suffix(".sql").read_text("utf-8"))
        database.execute(f"INSERT INTO {file.stem} SELECT * FROM read_parquet('{tmp_path}/empty.parquet')")
        declared = database.execute(f"DESCRIBE {file.stem}").fetchall()
        stored = database.execute(
            f"DESCRIBE SELECT * FROM read_parquet('{tmp_path}/empty.parquet')"
        ).fetchall()
    assert [column[:2] for column in declared] == [column[:2] for column in stored]
    assert [column[2] == "YES" for column in declared] == [c.nullable for c in EVERY[file.stem].columns]
