"""The README.md of a run directory: a dataset card that Hugging Face `datasets` and its viewer understand."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.plain import json_text
from pipeline.store.commit import ShardCommit
from schemas.tables import SCHEMA_VERSION, SIGN_CONVENTION, TABLES


def dataset_card(
    model: Mapping[str, Any], config: Mapping[str, Any], commits: Sequence[ShardCommit], status: str
) -> str:
    """The whole card; its numbers are those of the committed shards."""
    rows = count_rows(commits)
    name = str(model.get("name") or config.get("model") or "a language model")
    return "\n".join(
        [*_front_matter(name, rows), *_introduction(name, rows, status), *_table_list(rows), *_USE]
    )


def count_rows(commits: Sequence[ShardCommit]) -> dict[str, int]:
    """Rows by table over all shards."""
    rows: dict[str, int] = {}
    for commit in commits:
        for table, count in commit.rows.items():
            rows[table] = rows.get(table, 0) + count
    return rows


def _front_matter(name: str, rows: Mapping[str, int]) -> list[str]:
    # A JSON string is a YAML string, which spares the store a YAML library.
    tables = [table for table in TABLES if table == "vocab" or table in rows]
    configs = [
        line
        for table in tables
        for line in (
            f"  - config_name: {table}",
            *(["    default: true"] if table == "prompts" else []),
            "    data_files:",
            "      - split: train",
            f"        path: {json_text(table + '/*.parquet')}",
        )
    ]
    return [
        "---",
        f"pretty_name: {json_text(f'Backward Lens of {name}')}",
        "tags:",
        "  - backlens",
        "  - interpretability",
        "  - gradients",
        "configs:",
        *configs,
        "---",
        "",
    ]


def _introduction(name: str, rows: Mapping[str, int], status: str) -> list[str]:
    prompts, failures = rows.get("prompts", 0), rows.get("failures", 0)
    progress = (
        [] if status == "done" else ["This run is not complete: the numbers are those of its start.", ""]
    )
    return [
        f"# Backward Lens of {name}",
        "",
        f"Gradients of {name} for {prompts:,} prompts and their targets, projected to its vocabulary with",
        f"`backlens` (the Backward Lens, arXiv 2402.12865); {failures:,} more prompts failed.",
        "Tables hold token ids; their text is in `vocab`. `run.json` says how the run was made, and",
        "`backlens run config.yaml` makes it again.",
        "",
        *progress,
        SIGN_CONVENTION,
        "",
    ]


def _table_list(rows: Mapping[str, int]) -> list[str]:
    lines = ["| table | rows | one row per |", "|---|---|---|"]
    lines += [
        f"| `{table}` | {rows[table]:,} | {TABLES[table].row_per} |" for table in TABLES if table in rows
    ]
    return [*lines, f"| `vocab` | | {TABLES['vocab'].row_per} |", "", f"Schema version {SCHEMA_VERSION}.", ""]


_USE = [
    "```python",
    "from datasets import load_dataset",
    "",
    'neurons = load_dataset(".", "neurons", split="train")',
    "```",
    "",
]
