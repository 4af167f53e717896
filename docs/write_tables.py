"""Write `docs/tables.md`, the description of every table, from the declarations in the package.

`python -m docs.write_tables` writes it. `--check` writes nothing and exits 1 if the file is not current.
"""

import argparse
import sys
from pathlib import Path

import pyarrow as pa

from backlens.atlas.tables import ATLAS_TABLES
from backlens.store.tables import SCHEMA_VERSION, SIGN_CONVENTION, TABLES, Column, Table

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "tables.md"

ATLAS = """\
## The atlas

`backlens atlas OUT` derives these tables from the others and writes them under `OUT/atlas/`. It works in pieces: one
layer, or one range of tokens or prompts. Together these tables take about three times the bytes of the run's own: 50
million list entries of 514 MiB gave 1.6 GiB, of which the tables sorted by prompt (`prompt_tokens`, `prompt_neurons`,
in row groups of 8,192 rows) are 540 MiB. `atlas/manifest.json` is written last. It lists the files, and the digest of
the commits that they were made from: readers use these files only while the run has the same digest.
SQL (`backlens query --sql`) can read these tables without an atlas too: they are then derived for the query, except
`neuron_weights`, which needs the run's model.

The tables count list entries. An entry is a token in the top or bottom list of a kept neuron for one prompt. Only the
strongest neurons of a prompt are kept (`cut_off` in the manifest), so a neuron that is missing for a prompt is not
zero. A step subtracts the gradient, so bottom tokens are "promoted" and top tokens "suppressed".
"""

INTRODUCTION = """\
# Tables

*Written by `python -m docs.write_tables` from `pipeline/backlens/store/tables.py`; change it there.*
Schema version {version}.

## The run directory

A run writes one directory, at a local path or a URL such as `s3://bucket/run`:

```
OUT/
  run.json            resolved config, fingerprint, model facts, versions, schema version, status
  config.yaml         options of the run; `backlens run OUT/config.yaml` runs it again, wherever OUT is now
  README.md           dataset card, one configuration per table with rows
  vocab/part-0.parquet
  prompts/ layers/ neurons/ tokens/ failures/ [factors/]     part-<shard:06d>.parquet
  _commits/<shard:06d>.json    written last: the shard's files with rows, bytes and checksum
  atlas/              derived tables; `backlens atlas` can build them again
```

A shard is a contiguous range of prompts, with one file per table. Its rows count as soon as its record is in
`_commits`. During a run, or after one was killed, a table's folder can hold a file of a shard without a record: read
the files that the records list (`backlens query` does so), not a glob. Once `run.json` says `"status": "done"`, both
give the same files. Every input prompt is in exactly one of `prompts` and `failures`.

No file holds an absolute path of the machine that made it. `run.json` and `config.yaml` name the model and the prompts
relative to OUT or to the home folder, or by their last name; the absolute paths are in the cache of the user who ran it
(`~/.cache/backlens`). `backlens verify OUT` compares every committed file with its record.

`datasets` cannot load a table without rows, so the dataset card lists the tables with rows only. Inside OUT, give
`datasets` its absolute path: it refuses the name `"."` for any folder. A Parquet file without rows has no row group,
because `datasets` cannot read a row group of 0 rows.

Files are Parquet with zstd compression, in row groups of at most 131,072 rows, with a page index. Each file is sorted
as its table says and records this order (`sorting_columns`). The metadata of each file holds
`backlens.schema_version`, `backlens.sign_convention` and `backlens.table`.

## Signs

{signs}

The VJP δ is ∂L/∂(module output). For y = x W the gradient is G = Xᵀ Δ over the positions of a prompt. The residual
side of G is X for `mlp.up`, `mlp.gate`, `attn.q`, `attn.k` and `attn.v`, and Δ for `mlp.down` and `attn.o`.

## How to join

* The other tables hold ids. The texts are in `vocab` (by `token_id`) and in `prompts` (by `prompt_id`).
* `layers`, `neurons`, `tokens` and `factors` share the keys `prompt_id`, `layer`, `module`, `expert`.
  `expert` is null in dense blocks: join it with `IS NOT DISTINCT FROM`, because null = null is not true in SQL.
* `tokens` and `factors` have the same rows: join them on the keys and `position`. `neurons.main_position` joins
  `position` too.
* Unnest two lists in one SELECT to keep their pairs: `unnest(top_ids)` beside `unnest(top_scores)`.

```sql
SELECT n.layer, n.module, n.neuron, n.grad_norm, v.token
FROM neurons n JOIN vocab v ON v.token_id = n.top_ids[1]
WHERE n.prompt_id = 17 ORDER BY n.grad_norm DESC LIMIT 10
```
"""


def document() -> str:
    """The whole page."""
    introduction = INTRODUCTION.format(version=SCHEMA_VERSION, signs=SIGN_CONVENTION)
    facts = [section(table) for table in TABLES.values()]
    return "\n".join([introduction, *facts, ATLAS, *(section(table) for table in ATLAS_TABLES.values())])


def section(table: Table) -> str:
    """One table: what it is, what a row is, how rows are sorted, and its columns."""
    lines = [
        f"## `{table.name}`",
        "",
        table.doc,
        "",
        f"One row per {table.row_per}. Sorted by {', '.join(f'`{name}`' for name in table.sorted_by)}.",
        "",
        "| column | type | null | meaning |",
        "|---|---|---|---|",
        *(row(column) for column in table.columns),
        "",
    ]
    return "\n".join(lines)


def row(column: Column) -> str:
    null = "yes" if column.nullable else "no"
    meaning = column.doc.replace("|", "\\|")
    return f"| `{column.name}` | {type_name(column.type)} | {null} | {meaning} |"


def type_name(data_type: pa.DataType) -> str:
    """A type as users of Parquet know it: `list<float32>`, `string (dictionary)`."""
    if isinstance(data_type, pa.ListType):
        return f"list<{type_name(data_type.value_type)}>"
    if isinstance(data_type, pa.DictionaryType):
        return f"{type_name(data_type.value_type)} (dictionary)"
    floats = {pa.float16(): "float16", pa.float32(): "float32"}
    return floats.get(data_type, str(data_type))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.write_tables", description="Write docs/tables.md.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the file is not current"
    )
    check = parser.parse_args(arguments).check
    wanted = document()
    if not check:
        DOCUMENT.write_text(wanted, encoding="utf-8")
        return 0
    current = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else None
    if current == wanted:
        return 0
    sys.stderr.write(
        "docs/tables.md differs from pipeline/backlens/store/tables.py; run: python -m docs.write_tables\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
