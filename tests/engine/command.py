"""The command line as a user runs it, and run directories as a reader sees them: Parquet listed by `_commits`."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BACKLENS = str(Path(sys.executable).parent / "backlens")
TIMEOUT = 300
QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

PEAK = """
import pathlib, sys
from backlens.cli.main import call

status = call(sys.argv[2:])
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
pathlib.Path(sys.argv[1]).write_text(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
sys.exit(status)
"""

KEYS = {
    "prompts": ("prompt_id",),
    "layers": ("layer", "module", "expert", "prompt_id"),
    "neurons": ("layer", "module", "expert", "prompt_id", "neuron"),
    "tokens": ("layer", "module", "expert", "prompt_id", "position"),
    "factors": ("layer", "module", "expert", "prompt_id", "position"),
    "failures": ("prompt_id",),
}
"""Columns whose values no two rows of a table share."""

TOLERANCE = 1e-4
"""Largest difference of a value, relative to the largest value of its row."""
TIE = 1e-5
"""Scores closer than this, relative to the largest of their row, may change places."""


@dataclass(frozen=True)
class Finished:
    """The exit status of a command, and its output."""

    status: int
    stdout: str
    stderr: str


def backlens(*arguments: object, timeout: float = TIMEOUT, folder: Path | None = None) -> Finished:
    """Run `backlens …` to its end."""
    return finish(start(*arguments, folder=folder), timeout)


def called(*arguments: object) -> Finished:
    """`backlens …` inside this process, for what does not depend on there being another: seconds are saved."""
    from backlens.cli.main import call

    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            status = call([str(argument) for argument in arguments])
        except SystemExit as leaving:
            status = leaving.code
    assert isinstance(status, int)
    return Finished(status, stdout.getvalue(), stderr.getvalue())


def start(*arguments: object, folder: Path | None = None) -> "subprocess.Popen[str]":
    """Start `backlens …`, in a folder, and leave it running."""
    return subprocess.Popen(
        [BACKLENS, *map(str, arguments)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def finish(process: "subprocess.Popen[str]", timeout: float = TIMEOUT) -> Finished:
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return Finished(process.returncode, stdout, stderr)


def peak_memory(*arguments: object, folder: Path) -> int:
    """Peak resident memory of `backlens …`, in KiB; `folder` is for its note of that.

    The process says it of itself: what its parent is told of it includes the parent's own size when it forked.
    """
    note = folder / "peak"
    command = [sys.executable, "-c", PEAK, note, *arguments]
    done = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(note.read_text())


def environment() -> dict[str, str]:
    """Environment of every command: one thread, no network, and no cluster of the caller."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | QUIET


def interrupt(process: "subprocess.Popen[str]", number: signal.Signals) -> Finished:
    process.send_signal(number)
    return finish(process)


def error_line(finished: Finished) -> str:
    """The one line that a command refused its arguments with."""
    lines = finished.stderr.splitlines()
    assert len(lines) == 1, f"expected one line, got:\n{finished.stderr}"
    assert lines[0].startswith("backlens: "), lines[0]
    assert "Traceback" not in finished.stdout
    return lines[0].removeprefix("backlens: ")


def wait_for(condition: Callable[[], Any], timeout: float = 120, every: float = 0.002) -> Any:
    """Poll until `condition` is true and return its value."""
    ends = time.monotonic() + timeout
    while time.monotonic() < ends:
        if value := condition():
            return value
        time.sleep(every)
    raise TimeoutError(f"not within {timeout} s: {condition}")


# A folder whose files have names of this project, of the standard library, and of a user's own files

HIDING = ("pipeline.py", "schemas.py", "pipeline/__init__.py", "test.py", "jobs.py")


def beside_hiding_files(folder: Path) -> Path:
    """Make a folder below `folder` with such files; a file that is imported leaves a mark in `folder`/imported."""
    marks, beside = folder / "imported", folder / "beside"
    marks.mkdir()
    for name in HIDING:
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        mark = marks / name.replace("/", "-")
        (beside / name).write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    return beside


def imported_beside(folder: Path) -> list[str]:
    return sorted(mark.name for mark in (folder / "imported").iterdir())


# Prompt files


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# Run directories


def commits(out: Path) -> dict[int, dict[str, Any]]:
    """The records in `_commits`, by shard."""
    return {
        int(path.stem): json.loads(path.read_bytes()) for path in sorted((out / "_commits").glob("*.json"))
    }


def count_commits(out: Path) -> int:
    return sum(1 for _ in (out / "_commits").glob("*.json"))


def read(out: Path, table: str) -> pa.Table:
    """A table's committed rows, sorted by its keys."""
    paths = [out / record["files"][table]["path"] for record in commits(out).values()]
    return in_order(pa.concat_tables([pq.ParquetFile(path).read() for path in paths]), table)


def in_order(rows: pa.Table, table: str) -> pa.Table:
    """Rows sorted by the table's keys, with module names as plain strings."""
    if "module" in rows.column_names:
        place = rows.column_names.index("module")
        rows = rows.set_column(place, "module", rows["module"].cast(pa.string()))
    return rows.sort_by([(key, "ascending") for key in KEYS[table]])


def renumbered(rows: pa.Table, table: str, numbers: dict[int, int]) -> pa.Table:
    """The same rows with other prompt ids."""
    ids = pa.array([numbers[number] for number in rows["prompt_id"].to_pylist()], pa.int64())
    return in_order(rows.set_column(rows.column_names.index("prompt_id"), "prompt_id", ids), table)


def tables_of(out: Path) -> list[str]:
    return sorted({table for record in commits(out).values() for table in record["files"]})


def assert_complete(out: Path, prompts: int) -> None:
    """The run is done, every file is the one that was committed, no row is there twice, and nothing is left over."""
    record = json.loads((out / "run.json").read_bytes())
    assert record["status"] == "done"
    assert sorted(commits(out)) == list(range(record["plan"]["shards"]))
    for commit in commits(out).values():
        for file in commit["files"].values():
            content = (out / file["path"]).read_bytes()
            assert file["checksum"] == f"sha256:{hashlib.sha256(content).hexdigest()}", file["path"]
            assert file["bytes"] == len(content)
    listed = {file["path"] for commit in commits(out).values() for file in commit["files"].values()}
    present = {str(path.relative_to(out)) for path in out.glob("*/part-*.parquet")}
    assert present == listed | {"vocab/part-0.parquet"}
    assert [path for path in out.rglob("*") if path.name.endswith(".tmp")] == []
    for table in tables_of(out):
        rows = read(out, table)
        assert rows.num_rows == len(set(_key_list(rows, table))), f"{table}: a row is there twice"
    seen = [*read(out, "prompts")["prompt_id"].to_pylist(), *read(out, "failures")["prompt_id"].to_pylist()]
    assert sorted(seen) == list(range(prompts))


def snapshot(out: Path) -> dict[str, tuple[int, str]]:
    """Every file with its time of change and a hash of its content."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }


def contents(found: dict[str, tuple[int, str]]) -> dict[str, str]:
    """A snapshot without its times."""
    return {name: digest for name, (_, digest) in found.items()}


# Comparing runs


def assert_same_run(left: Path, right: Path) -> None:
    """Both directories have the same tables, up to rounding."""
    assert tables_of(left) == tables_of(right)
    for table in tables_of(left):
        assert_same_rows(read(left, table), read(right, table), table)


def assert_same_rows(left: pa.Table, right: pa.Table, table: str) -> None:
    """Equal keys; floats within TOLERANCE of their row's largest; ids and ranks equal where scores are not tied."""
    assert left.schema.names == right.schema.names
    left, right = _common_rows(left, right, table)
    clear = _clear_rows(left, right, table)
    for name in left.schema.names:
        place = f"{table}.{name}"
        if name in ("top_ids", "top_scores", "bottom_ids", "bottom_scores", "target_score", "target_rank"):
            continue
        if pa.types.is_list(left.schema.field(name).type) and pa.types.is_floating(
            left[name].type.value_type
        ):
            _assert_close_lists(left[name], right[name], place)
        elif pa.types.is_floating(left.schema.field(name).type):
            _assert_close(
                _numbers(left[name]), _numbers(right[name]), _scale(left, right, table, name), place
            )
        elif name in ("rank", "main_position"):
            _assert_nearly_all(_numbers(left[name]) == _numbers(right[name]), place)
        else:
            assert left[name].to_pylist() == right[name].to_pylist(), place
    if "top_scores" in left.schema.names:
        _assert_same_projections(left, right, clear, table)


def _key_list(rows: pa.Table, table: str) -> list[tuple[Any, ...]]:
    return list(zip(*(rows[key].to_pylist() for key in KEYS[table]), strict=True))


def _common_rows(left: pa.Table, right: pa.Table, table: str) -> tuple[pa.Table, pa.Table]:
    """All rows; of `neurons` those in both, as neurons of nearly equal norm may change places at the cut."""
    keys, others = _key_list(left, table), _key_list(right, table)
    if keys == others or table != "neurons":
        assert keys == others, f"{table}: the rows are not the same ones"
        return left, right
    common = set(keys) & set(others)
    _assert_nearly_all(np.array([key in common for key in keys]), "neurons that are kept")
    assert len(keys) == len(others)
    return (
        left.filter(pa.array([key in common for key in keys])),
        right.filter(pa.array([key in common for key in others])),
    )


def _clear_rows(left: pa.Table, right: pa.Table, table: str) -> np.ndarray:
    """Rows whose projected vector is determined: not the leading direction of two nearly equal singular values."""
    if table != "layers":
        return np.ones(left.num_rows, dtype=bool)
    values = left["singular_values"].to_pylist()
    clear = np.array([len(v) < 2 or v[0] == 0 or v[1] < 0.98 * v[0] for v in values], dtype=bool)
    _assert_nearly_all(clear, "layers with a leading direction")
    return clear


def _assert_same_projections(left: pa.Table, right: pa.Table, clear: np.ndarray, table: str) -> None:
    there = np.array(left["top_ids"].is_valid())
    assert (there == np.array(right["top_ids"].is_valid())).all(), (
        f"{table}: a vector is zero in one run only"
    )
    keep = pa.array(there & clear)
    left, right = left.filter(keep), right.filter(keep)
    if not left.num_rows:
        return
    top, bottom = _matrix(left["top_scores"]), _matrix(left["bottom_scores"])
    scale = np.maximum(np.abs(top).max(1), np.abs(bottom).max(1))
    for side, ours in (("top", top), ("bottom", bottom)):
        theirs = _matrix(right[f"{side}_scores"])
        _assert_close(ours, theirs, scale[:, None], f"{table}.{side}_scores")
        _assert_same_ids(left, right, ours, scale, f"{side}_ids", table)
    _assert_close(
        _numbers(left["target_score"]), _numbers(right["target_score"]), scale, f"{table}.target_score"
    )
    _assert_nearly_all(
        _numbers(left["target_rank"]) == _numbers(right["target_rank"]), f"{table}.target_rank"
    )


def _assert_same_ids(
    left: pa.Table, right: pa.Table, scores: np.ndarray, scale: np.ndarray, name: str, table: str
) -> None:
    """Ids at each place are equal unless the score there is tied with a neighbour's, or is the list's last."""
    gaps = np.abs(np.diff(scores, axis=1)) <= TIE * scale[:, None]
    tied = np.zeros(scores.shape, dtype=bool)
    tied[:, 1:] |= gaps
    tied[:, :-1] |= gaps
    same = _matrix(left[name]) == _matrix(right[name])
    last = np.zeros_like(tied)
    last[:, -1] = True
    assert (same | tied | last).all(), f"{table}.{name}: {int((~(same | tied | last)).sum())} ids differ"
    _assert_nearly_all(same.all(1), f"{table}.{name}")


def _scale(left: pa.Table, right: pa.Table, table: str, name: str) -> np.ndarray:
    """Scale of the tolerance: the float itself; for norms of positions, the largest in their prompt and module."""
    values = np.maximum(np.abs(_numbers(left[name])), np.abs(_numbers(right[name])))
    if name not in ("vjp_norm", "grad_norm") or table == "layers":
        return values
    groups = list(zip(*(left[key].to_pylist() for key in ("prompt_id", "layer", "module")), strict=True))
    largest: dict[Any, float] = {}
    for group, value in zip(groups, values, strict=True):
        largest[group] = max(largest.get(group, 0.0), value)
    return np.array([largest[group] for group in groups])


def _assert_close(left: np.ndarray, right: np.ndarray, scale: np.ndarray, place: str) -> None:
    if left.size:
        worst = (np.abs(left - right) / np.maximum(scale, 1e-30)).max()
        assert worst <= TOLERANCE, f"{place}: {worst:.2e} apart"


def _assert_close_lists(left: pa.ChunkedArray, right: pa.ChunkedArray, place: str) -> None:
    for ours, theirs in zip(left.to_pylist(), right.to_pylist(), strict=True):
        a, b = np.array(ours, dtype=np.float64), np.array(theirs, dtype=np.float64)
        assert a.shape == b.shape, place
        _assert_close(a, b, np.abs(a).max(initial=0.0), place)


def _assert_nearly_all(same: np.ndarray, place: str) -> None:
    """All but the few rows that rounding decides."""
    excused = int((~same).sum())
    assert excused <= max(1, same.size // 500), f"{place}: {excused} of {same.size} differ"


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.float64)


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Lists of one length as rows."""
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)
