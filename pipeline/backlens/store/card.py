"""The README.md of a run directory: a dataset card that Hugging Face `datasets` and its viewer understand."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from backlens.printable import json_text
from backlens.store.commit import ShardCommit
from backlens.store.tables import SCHEMA_VERSION, SIGN_CONVENTION, TABLES


def dataset_card(
    model: Mapping[str, Any],
    config: Mapping[str, Any],
    commits: Sequence[ShardCommit],
    status: str,
    kind: Literal["run", "sweep"] = "run",
    has_vocab: bool = True,
) -> str:
    """The whole card; its numbers are those of the committed shards."""
    rows = count_rows(commits)
    name = str(model.get("name") or config.get("model") or "a language model")
    # `datasets` cannot load a split without rows, so a table without rows is not offered to it.
    offered = [table for table in TABLES if rows.get(table) or (table == "vocab" and has_vocab)]
    title = f"Edits of {name}" if kind == "sweep" else f"Backward Lens of {name}"
    about = _about_edits(name, rows) if kind == "sweep" else _about_gradients(name, rows)
    progress = (
        [] if status == "done" else ["This run is not complete: the numbers are those of its start.", ""]
    )
    return "\n".join(
        [
            *_front_matter(title, offered),
            *(f"# {title}", "", *about, "", *progress),
            *_table_list(rows, has_vocab),
            *_use(offered),
        ]
    )


def count_rows(commits: Sequence[ShardCommit]) -> dict[str, int]:
    """Rows by table over all shards."""
    rows: dict[str, int] = {}
    for commit in commits:
        for table, count in commit.rows.items():
            rows[table] = rows.get(table, 0) + count
    return rows


def _front_matter(title: str, offered: Sequence[str]) -> list[str]:
    # A JSON string is a YAML string, which spares the store a YAML library.
    configs = [
        line
        for table in offered
        for line in (
            f"  - config_name: {table}",
            *(["    default: true"] if table in ("prompts", "edits") else []),
            "    data_files:",
            "      - split: train",
            f"        path: {json_text(table + '/*.parquet')}",
        )
    ]
    return [
        "---",
        f"pretty_name: {json_text(title)}",
        "tags:",
        "  - backlens",
        "  - interpretability",
        "  - gradients",
        *(["configs:", *configs] if configs else []),
        "---",
        "",
    ]


def _about_gradients(name: str, rows: Mapping[str, int]) -> list[str]:
    prompts, failures = rows.get("prompts", 0), rows.get("failures", 0)
    return [
        f"Gradients of {name} for {prompts:,} prompts and their targets, projected to its vocabulary with",
        f"`backlens` (the Backward Lens, arXiv 2402.12865); {failures:,} more prompts failed.",
        "Tables hold token ids; their text is in `vocab`. `run.json` says how the run was made, and",
        "`backlens run config.yaml`, in this folder, makes it again.",
        "",
        SIGN_CONVENTION,
    ]


def _about_edits(name: str, rows: Mapping[str, int]) -> list[str]:
    return [
        f"{rows.get('edits', 0):,} edits of facts in {name}, each judged by itself: a sweep of methods, layers and",
        "rates with `backlens edit sweep`. `run.json` says how it was made.",
    ]


def _table_list(rows: Mapping[str, int], has_vocab: bool) -> list[str]:
    lines = ["| table | rows | one row per |", "|---|---|---|"]
    lines += [
        f"| `{table}` | {rows[table]:,} | {TABLES[table].row_per} |" for table in TABLES if table in rows
    ]
    vocab = [f"| `vocab` | | {TABLES['vocab'].row_per} |"] if has_vocab else []
    return [*lines, *vocab, "", f"Schema version {SCHEMA_VERSION}.", ""]


def _use(offered: Sequence[str]) -> list[str]:
    """How to load a table, in lines that work in this folder as they stand."""
    if not offered:
        return []
    table = next((name for name in ("neurons", "tokens", "edits") if name in offered), offered[0])
    others = [f"`{name}`" for name in offered if name != table]
    also = [f"In its place: {', '.join(others)}. A table without rows cannot be loaded so.", ""]
    return [
        "```python",
        "import os",
        "from datasets import load_dataset",
        "",
        'folder = os.path.abspath(".")  # this folder; "." itself is no name that `datasets` takes',
        f'{table} = load_dataset(folder, "{table}", split="train")',
        "```",
        "",
        *(also if others else []),
    ]
