"""The record of a run (`run.json`), and the decision to create, resume or refuse a directory. Also the dataset card.

`run.json` is written before every other file, so a directory with files but without `run.json` is not a run directory.
A resumed run keeps the plan that it was made with, and its fingerprint must be the same.

The card (`README.md`) describes the directory for readers, and for Hugging Face `datasets` and its viewer.
"""

import json
import os
import platform
import posixpath
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

from backlens.errors import BacklensError
from backlens.printable import json_text
from backlens.store.commit import COMMITS, VOCAB_FILE, ShardCommit, committed
from backlens.store.directory import Directory, is_temporary
from backlens.store.lock import LOCK_FILE
from backlens.store.tables import SCHEMA_VERSION, SIGN_CONVENTION, TABLES


def dataset_card(
    model: Mapping[str, Any],
    config: Mapping[str, Any],
    commits: Sequence[ShardCommit],
    status: str,
    kind: Literal["run", "sweep"] = "run",
    has_vocab: bool = True,
) -> str:
    """The whole card, with the numbers of the committed shards. It offers tables with rows only."""
    rows = count_rows(commits)
    name = str(model.get("name") or config.get("model") or "a language model")
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
            *_use(offered, without_rows=[table for table in TABLES if rows.get(table) == 0]),
        ]
    )


def count_rows(commits: Sequence[ShardCommit]) -> dict[str, int]:
    """Number of rows by table over all shards."""
    rows: dict[str, int] = {}
    for commit in commits:
        for table, count in commit.rows.items():
            rows[table] = rows.get(table, 0) + count
    return rows


def _front_matter(title: str, offered: Sequence[str]) -> list[str]:
    # A JSON string is a YAML string too, so no YAML library is needed.
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
        "The tables hold token ids; their texts are in `vocab`. `run.json` records the options of the run, and",
        "`backlens run config.yaml` in this folder runs it again.",
        "",
        SIGN_CONVENTION,
    ]


def _about_edits(name: str, rows: Mapping[str, int]) -> list[str]:
    return [
        f"{rows.get('edits', 0):,} edits of facts in {name}, each evaluated by itself: a sweep of methods, layers and",
        "rates with `backlens edit sweep`. `run.json` records its options.",
    ]


def _table_list(rows: Mapping[str, int], has_vocab: bool) -> list[str]:
    lines = ["| table | rows | one row per |", "|---|---|---|"]
    lines += [
        f"| `{table}` | {rows[table]:,} | {TABLES[table].row_per} |" for table in TABLES if table in rows
    ]
    vocab = [f"| `vocab` | | {TABLES['vocab'].row_per} |"] if has_vocab else []
    return [*lines, *vocab, "", f"Schema version {SCHEMA_VERSION}.", ""]


def _use(offered: Sequence[str], without_rows: Sequence[str]) -> list[str]:
    """Lines of Python that load a table with `datasets` in this folder, and the tables that they cannot load."""
    if not offered:
        return []
    table = next((name for name in ("neurons", "tokens", "edits") if name in offered), offered[0])
    others = [f"`{name}`" for name in offered if name != table]
    empty = [f"`{name}`" for name in without_rows]
    return [
        "```python",
        "import os",
        "from datasets import load_dataset",
        "",
        'folder = os.path.abspath(".")  # this folder by its full path: `datasets` refuses the name "."',
        f'{table} = load_dataset(folder, "{table}", split="train")',
        "```",
        "",
        *(
            [f"The other tables with rows are {', '.join(others)}; load them in the same way.", ""]
            if others
            else []
        ),
        *(
            [
                f"These tables have no rows, and `datasets` cannot load a table without rows: {', '.join(empty)}.",
                "",
            ]
            if empty
            else []
        ),
    ]


PACKAGES = ("backlens", "torch", "transformers", "pyarrow", "ray")


@cache
def package_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def made_with_others(made: Collection[Mapping[str, str]]) -> str | None:
    """One line if some shards were made with other package versions than the present ones; `made` has one per shard."""
    now = package_versions()
    others = [with_ for with_ in made if dict(with_) != now]
    if not others:
        return None
    names = {name: version for name, version in now.items() if any(w.get(name) != version for w in others)}
    before = {name: sorted({w.get(name, "none") for w in others} - {now[name]}) for name in names}
    changes = ", ".join(f"{name} {' and '.join(before[name])} (now {names[name]})" for name in names)
    shards = "1 shard was" if len(others) == 1 else f"{len(others):,} shards were"
    return f"{shards} made with other versions: {changes}; numbers may differ; _commits/ has each shard's"


RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"

FingerprintValue = str | int | float | bool | None
Kind = Literal["run", "sweep"]

CALLED: Mapping[Kind, str] = {"run": "a run", "sweep": "an edit sweep"}
GIVE: Mapping[Kind | None, str] = {
    "run": "give the --out of a `backlens run`",
    "sweep": "give the directory of a `backlens edit sweep`",
    None: "give the --out of a `backlens run`, or the directory of a `backlens edit sweep`",
}


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Division of the prompts: shard s holds `shard_prompts` of them, from prompt s × shard_prompts on."""

    prompts: int
    shards: int
    shard_prompts: int


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The content of `run.json`."""

    config: Mapping[str, Any]
    """The resolved configuration."""
    fingerprint: Mapping[str, FingerprintValue]
    """Everything that changes results, by name."""
    plan: ShardPlan
    model: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the model: layers, modules, width, vocabulary size, revision, weight hash."""
    versions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    status: Literal["running", "done"] = "running"
    created_at: str = ""
    finished_at: str | None = None

    @property
    def kind(self) -> Kind:
        """`sweep` for an edit sweep, whose only table is `edits`; else `run`."""
        return "sweep" if "edits" in self.fingerprint else "run"

    def to_json(self) -> bytes:
        return (json_text(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, where: str) -> "RunRecord":
        try:
            fields = json.loads(content)
            fields["plan"] = ShardPlan(**fields["plan"])
            record = cls(**fields)
            _check_types(record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BacklensError(
                f"{where}: not a record that this backlens can read ({error}); copy it again"
            ) from error
        if record.schema_version > SCHEMA_VERSION:
            raise BacklensError(
                f"{where}: its tables are of schema version {record.schema_version}, this backlens reads up to "
                f"{SCHEMA_VERSION}; use a newer one"
            )
        return record


def _check_types(record: RunRecord) -> None:
    """Raise TypeError for values that would cause an error elsewhere."""
    for name in ("config", "fingerprint", "model", "versions"):
        if not isinstance(getattr(record, name), dict):
            raise TypeError(f"{name} is no object")
    for number in (*asdict(record.plan).values(), record.schema_version):
        if not isinstance(number, int):
            raise TypeError(f"{number!r} is no whole number")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """An opened run directory."""

    directory: Directory
    record: RunRecord
    """The record in the directory. A resumed run has the plan that it was made with: use this one."""
    resumed: bool


def open_run(
    directory: Directory,
    fingerprint: Mapping[str, FingerprintValue],
    *,
    config: Mapping[str, Any],
    config_yaml: str,
    plan: ShardPlan,
    model: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> RunDirectory:
    """Create the run, or resume one with the same fingerprint. The caller holds the DriverLock.

    Raises BacklensError for a directory with other files, and for a run with another fingerprint.
    """
    given = RunRecord(
        config=config,
        fingerprint=fingerprint,
        plan=plan,
        model=dict(model or {}),
        versions=dict(versions or {}),
        created_at=_now(),
    )
    current = find_run(directory)
    if current is None:
        _refuse_foreign_files(directory)
        record = given
    else:
        _refuse_differences(directory, current, given)
        record = replace(given, plan=current.plan, created_at=current.created_at)
        if current.status == "done" and len(committed(directory)) == current.plan.shards:
            record = replace(record, status="done", finished_at=current.finished_at)
    directory.makedirs()
    directory.write_atomically(RUN_FILE, record.to_json())
    directory.write_atomically(CONFIG_FILE, config_yaml.encode())
    _write_card(directory, record)
    return RunDirectory(directory, record, resumed=current is not None)


def finish(run: RunDirectory) -> RunDirectory:
    """Mark the run as done and write the dataset card with the final numbers."""
    record = replace(run.record, status="done", finished_at=_now())
    _write_card(run.directory, record)
    run.directory.write_atomically(RUN_FILE, record.to_json())
    return replace(run, record=record)


def load_run(directory: Directory, kind: Kind | None = None) -> RunRecord:
    """The record of the run in this directory. Raises BacklensError if there is none, or if it is not of this kind."""
    record = find_run(directory)
    if record is None:
        raise BacklensError(
            f"out: {directory} is not a run directory ({_instead_of_a_run(directory)}); {GIVE[kind]}"
        )
    if kind is not None:
        refuse_other_kind(directory, record, kind)
    return record


def refuse_other_kind(directory: Directory, record: RunRecord, kind: Kind) -> None:
    """Raise BacklensError for a sweep where a run is needed, or a run where a sweep is needed."""
    if record.kind == kind:
        return
    instead = f" (of a sweep: backlens query {directory} --sql, backlens plot edits {directory})"
    raise BacklensError(
        f"out: {directory} is {CALLED[record.kind]}, and this needs {CALLED[kind]}; {GIVE[kind]}"
        f"{instead if record.kind == 'sweep' else ''}"
    )


def _instead_of_a_run(directory: Directory) -> str:
    if not directory.exists():
        return "there is no such directory"
    if directory.is_local and os.path.isfile(directory.path()):
        return "it is a file"
    names = directory.names()
    if not names:
        return "it is empty"
    if COMMITS in names or posixpath.dirname(VOCAB_FILE) in names:
        return f"its {RUN_FILE} is missing; copy that too"
    return f"it has no {RUN_FILE}"


def find_run(directory: Directory) -> RunRecord | None:
    """The record of the run in this directory, or None."""
    if not directory.exists(RUN_FILE):
        return None
    return RunRecord.from_json(directory.read(RUN_FILE), where=f"{directory}/{RUN_FILE}")


def _refuse_foreign_files(directory: Directory) -> None:
    foreign = [name for name in directory.names() if name != LOCK_FILE and not is_temporary(name)]
    if foreign:
        raise BacklensError(
            f"out: {directory} is not empty and is not a run directory "
            f"(it holds {foreign[0]!r}, and no {RUN_FILE}); choose another --out"
        )


def _refuse_differences(directory: Directory, current: RunRecord, given: RunRecord) -> None:
    if current.kind != given.kind:
        raise BacklensError(
            f"out: {directory} is {CALLED[current.kind]}, and this makes {CALLED[given.kind]}; "
            "choose another directory"
        )
    before = {"schema version": current.schema_version, **current.fingerprint}
    now = {"schema version": given.schema_version, **given.fingerprint}
    differing = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    if differing:
        raise BacklensError(
            f"out: {directory} was made with {_named(before, differing)}, this run has "
            f"{_named(now, differing)}; use another --out, or the same options"
        )


def _named(parts: Mapping[str, FingerprintValue], names: list[str]) -> str:
    """`top-k 10 and dtype float32`"""
    phrases = [
        f"no {_flag(name)}" if parts.get(name) is None else f"{_flag(name)} {parts[name]}" for name in names
    ]
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _write_card(directory: Directory, record: RunRecord) -> None:
    commits = list(committed(directory).values())
    has_vocab = record.kind == "run" and directory.exists(VOCAB_FILE)
    card = dataset_card(record.model, record.config, commits, record.status, record.kind, has_vocab)
    directory.write_atomically(CARD_FILE, card.encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
