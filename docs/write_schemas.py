"""Write `schemas/`, the published contract of the tables, from the package's declarations.

`python -m docs.write_schemas` writes one JSON file per table (the Arrow schema in Arrow's own JSON form, and the text
of every column) and one SQL file (DDL, in standard types and DuckDB's lists). `--check` writes nothing and exits 1 if a
file is not current.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from backlens.atlas.tables import ATLAS_TABLES, ATLAS_VERSION
from backlens.store.tables import SCHEMA_VERSION, SIGN_CONVENTION, TABLES, Table

FOLDER = Path(__file__).resolve().parents[1] / "schemas"

SQL_TYPES = {
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float16(): "FLOAT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.bool_(): "BOOLEAN",
}


def contract() -> dict[str, str]:
    """The content of every file, by its path in `schemas/`."""
    files: dict[str, str] = {}
    for folder, version, tables in (("", SCHEMA_VERSION, TABLES), ("atlas/", ATLAS_VERSION, ATLAS_TABLES)):
        for table in tables.values():
            files[f"{folder}{table.name}.json"] = as_json(table, version)
            files[f"{folder}{table.name}.sql"] = as_ddl(table)
    return files


def as_json(table: Table, version: int) -> str:
    described = {
        "table": table.name,
        "schema_version": version,
        "doc": table.doc,
        "row_per": table.row_per,
        "sorted_by": table.sorted_by,
        "sign_convention": SIGN_CONVENTION,
        "columns": [{"name": column.name, "doc": column.doc} for column in table.columns],
        "arrow": {"fields": [_field(field) for field in table.schema]},
    }
    return json.dumps(described, indent=2, ensure_ascii=False) + "\n"


def _field(field: pa.Field) -> dict[str, Any]:
    """A field in the JSON form of Arrow's integration tests."""
    described: dict[str, Any] = {"name": field.name, "nullable": field.nullable}
    data_type = field.type
    if isinstance(data_type, pa.DictionaryType):
        described |= {
            "type": _type(data_type.value_type),
            "dictionary": {"id": 0, "indexType": _type(data_type.index_type), "isOrdered": data_type.ordered},
        }
        data_type = data_type.value_type
    else:
        described["type"] = _type(data_type)
    children = [data_type.value_field] if isinstance(data_type, pa.ListType) else []
    return described | {"children": [_field(child) for child in children]}


def _type(data_type: pa.DataType) -> dict[str, Any]:
    if isinstance(data_type, pa.ListType):
        return {"name": "list"}
    if pa.types.is_integer(data_type):
        signed = pa.types.is_signed_integer(data_type)
        return {"name": "int", "bitWidth": data_type.bit_width, "isSigned": signed}
    if pa.types.is_floating(data_type):
        precision = {16: "HALF", 32: "SINGLE", 64: "DOUBLE"}[data_type.bit_width]
        return {"name": "floatingpoint", "precision": precision}
    names = {pa.string(): "utf8", pa.binary(): "binary", pa.bool_(): "bool"}
    return {"name": names[data_type]}


def as_ddl(table: Table) -> str:
    """`CREATE TABLE`, with the text of the table and of every column as comments."""
    width = max(len(column.name) for column in table.columns)
    lines = [f"-- {table.doc}", f"-- One row per {table.row_per}.", f"CREATE TABLE {table.name} ("]
    for number, column in enumerate(table.columns, 1):
        null = "" if column.nullable else " NOT NULL"
        comma = "," if number < len(table.columns) else ""
        lines += [f"    -- {column.doc}", f"    {column.name:<{width}} {sql_type(column.type)}{null}{comma}"]
    return "\n".join([*lines, ");", ""])


def sql_type(data_type: pa.DataType) -> str:
    if isinstance(data_type, pa.ListType):
        return f"{sql_type(data_type.value_type)}[]"
    if isinstance(data_type, pa.DictionaryType):
        return sql_type(data_type.value_type)
    return SQL_TYPES[data_type]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.write_schemas", description="Write schemas/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not current")
    check = parser.parse_args(arguments).check
    wanted = contract()
    there = {
        str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.*") if path.suffix in (".json", ".sql")
    }
    if check:
        stale = [
            name
            for name, content in wanted.items()
            if name not in there or (FOLDER / name).read_text(encoding="utf-8") != content
        ]
        stale += sorted(there - wanted.keys())
        if stale:
            sys.stderr.write(f"schemas/ is not current ({', '.join(stale)}); run: make docs\n")
        return 1 if stale else 0
    for name in there - wanted.keys():
        (FOLDER / name).unlink()
    for name, content in wanted.items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
