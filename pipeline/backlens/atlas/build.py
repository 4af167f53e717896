"""`backlens atlas`: derive the atlas tables of a run piece by piece, in bounded memory.

Pieces are layers and ranges of prompts, then ranges of tokens and the weights of layers. They are built in this process
or by Ray tasks. The files of a piece are written under temporary names, renamed, and recorded in `atlas/_pieces/`;
`atlas/manifest.json`, written last, lists the files of all pieces. A crash leaves:

    within a piece      temporary files, or final names without a record: no reader sees them, the next call replaces
                        them
    between pieces      recorded pieces: the next call keeps them if the run has the same commits
    after the manifest  an atlas; the files of the previous one are deleted then

File names carry a digest of the commits (`manifest.source_of`), so the atlas in use stays whole during a build.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, Protocol

from backlens.atlas.database import norm_floor
from backlens.atlas.manifest import ATLAS, MANIFEST, CutOff, Manifest, WeightRecord, find_manifest, source_of
from backlens.atlas.neuron_weights import NONE, NoWeights, WeightSource, find_weights
from backlens.atlas.pieces import (
    FACTS,
    LAYER_TABLES,
    PIECES,
    TOKEN_TABLES,
    WEIGHT_TABLES,
    Files,
    Piece,
    PieceTask,
    build_pieces,
    connected,
    recorded,
    view,
)
from backlens.atlas.tables import ATLAS_TABLES, PROMPT_TABLES
from backlens.errors import BacklensError
from backlens.store.commit import ShardCommit, committed
from backlens.store.directory import Directory, is_temporary
from backlens.store.lock import exclusively
from backlens.store.parquet import FileRecord
from backlens.store.run_record import load_run
from backlens.store.status import losses

Made = tuple[Piece, dict[str, FileRecord]]


class PieceExecutor(Protocol):
    """Builds pieces that do not read each other's files, and yields each when it is done, in any order."""

    def build(self, task: PieceTask, pieces: Sequence[Piece], files: Files) -> Iterator[Made]: ...

    def stop(self) -> None: ...


class LocalPieces:
    """Builds one piece at a time; DuckDB uses all cores for it."""

    def build(self, task: PieceTask, pieces: Sequence[Piece], files: Files) -> Iterator[Made]:
        return build_pieces(task, pieces, files)

    def stop(self) -> None:
        """Do nothing: nothing outlives `build`."""


class RayPieces:
    """Builds pieces in Ray tasks of one core. All they make is in files, so Ray may repeat a lost task."""

    def __init__(self, address: str | None) -> None:
        from backlens.engine.executors import keep_deaths_quiet

        keep_deaths_quiet()
        import ray

        from backlens.engine.executors.ray_session import connect

        connect(address)
        self._ray = ray
        self._cores = int(ray.cluster_resources().get("CPU", 1))

    def build(self, task: PieceTask, pieces: Sequence[Piece], files: Files) -> Iterator[Made]:
        from backlens.engine.executors.ray_session import errors_as_ours

        remote = self._ray.remote(_built).options(num_cpus=1)
        shared = self._ray.put((replace(task, threads=1), files))
        running = [remote.remote(shared, group) for group in _groups(pieces, self._cores)]
        while running:
            done, running = self._ray.wait(running)
            with errors_as_ours():
                yield from self._ray.get(done[0])

    def stop(self) -> None:
        self._ray.shutdown()


def _built(shared: tuple[PieceTask, Files], pieces: Sequence[Piece]) -> list[Made]:
    return list(build_pieces(shared[0], pieces, shared[1]))


def _groups(pieces: Sequence[Piece], cores: int) -> list[list[Piece]]:
    """The pieces of each task: one alone, or a core's share of those that need the model, which a task loads once."""
    weights = [piece for piece in pieces if piece.tables == WEIGHT_TABLES]
    others = [[piece] for piece in pieces if piece.tables != WEIGHT_TABLES]
    return [*others, *(group for start in range(cores) if (group := weights[start::cores]))]


LOCK = f"{ATLAS}/_build.lock"
MEMORY = "2GB"
TOKEN_PIECE_ROWS = 2**25
"""List entries, of neurons or of positions, that are sorted at a time."""
PROMPT_PIECE_ROWS = 2**19
"""Rows with lists that are sorted at a time."""
ENTRIES = """
SELECT token_id, greatest(count(*) FILTER (of_neurons), count(*) FILTER (NOT of_neurons))
FROM (
    SELECT token_id, true AS of_neurons FROM neuron_topk
    UNION ALL SELECT unnest(top_ids), false FROM tokens
    UNION ALL SELECT unnest(bottom_ids), false FROM tokens
)
GROUP BY token_id ORDER BY token_id
"""


class BuildProgress(Protocol):
    """Receives the progress of a build."""

    def planned(self, text: str, pieces: int) -> None:
        """The build begins; `pieces` counts those of its first part."""
        ...

    def finished(self, piece: str, pieces: int, kept: bool) -> None:
        """A piece is done, of `pieces` known so far; `kept` if an earlier call built it."""
        ...


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of a build. Only `weights` changes the tables."""

    memory: str = MEMORY
    """Memory of DuckDB in each process."""
    weights: str | None = None
    """Path or hub id of the run's model; `none` leaves out `neuron_weights`; None looks where the run found it."""
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    """Address of a Ray cluster; None starts Ray on this machine."""


DEFAULTS = BuildOptions()


def build_atlas(
    out: str | Directory, progress: BuildProgress | None = None, options: BuildOptions = DEFAULTS
) -> Manifest:
    """Build the atlas of the shards that are committed now; an atlas of just these is returned as it is.

    `neuron_weights` is added to an atlas without it if the model can be read now. Raises BacklensError if there is no
    committed shard or a file is lost.
    """
    started = time.monotonic()
    directory = Directory.at(out)
    record = load_run(directory, "run")
    if not committed(directory):
        raise BacklensError(f"atlas: {directory} has no committed shard yet; let `backlens run` finish one")
    directory.makedirs(ATLAS)
    with exclusively(directory, LOCK):
        commits = committed(directory)
        present, source = find_manifest(directory), source_of(commits, norm_floor(record))
        if present is not None and present.source == source:
            if present.weights.digest is not None or options.weights == NONE:
                return present
            weights = find_weights(directory, record, options.weights)
            if isinstance(weights, NoWeights):
                return present
        else:
            weights = find_weights(directory, record, options.weights)
        for loss in losses(directory, commits.values(), FACTS):
            raise BacklensError(f"atlas: {loss}")
        _remove_leftovers(directory)
        facts = {
            table: [directory.location(commit.files[table].path) for commit in commits.values()]
            for table in FACTS
        }
        model = weights if isinstance(weights, WeightSource) else None
        task = PieceTask(directory, facts, source, options.memory, model, norm_floor(record))
        plan = _plan_line(len(commits), record.plan.shards, present)
        files = _build(task, commits.values(), options, progress, plan)
        manifest = Manifest(
            source=source,
            shards=len(commits),
            cut_off=CutOff.of(record.config),
            weights=_weight_record(weights),
            files=files,
            seconds=round(time.monotonic() - started, 3),
            written_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        directory.write_atomically(MANIFEST, manifest.to_json())
        _remove_others(directory, source)
        return manifest


def _weight_record(found: WeightSource | NoWeights) -> WeightRecord:
    if isinstance(found, NoWeights):
        return WeightRecord(None, found.reason)
    return WeightRecord(found.digest, f"of {found.model.path}")


def _plan_line(shards: int, planned: int, present: Manifest | None) -> str:
    of = (
        f"{shards:,} shards"
        if shards == planned
        else f"{shards:,} of {planned:,} shards (the run is not complete)"
    )
    if present is None:
        return f"atlas of {of}"
    if present.weights.digest is None and present.shards == shards:
        return f"atlas of {of}: neuron_weights is added"
    return f"atlas of {of}; replaces one of {present.shards:,} shards, which is out of date"


def _build(
    task: PieceTask,
    commits: Iterable[ShardCommit],
    options: BuildOptions,
    progress: BuildProgress | None,
    plan: str,
) -> dict[str, list[FileRecord]]:
    """Build the pieces that have no record; the files of all pieces, by table."""
    files: dict[str, list[FileRecord]] = {table: [] for table in ATLAS_TABLES}
    layers = _layer_pieces(task)
    first = [*layers, *_prompt_pieces(commits)]
    if progress is not None:
        progress.planned(plan, len(first))
    with _executor(options) as executor:
        _build_some(task, first, files, executor, progress, len(first))
        rest = [*_token_pieces(task, files), *_weight_pieces(task, layers)]
        _build_some(task, rest, files, executor, progress, len(first) + len(rest))
    return files


def _build_some(
    task: PieceTask,
    pieces: Sequence[Piece],
    files: dict[str, list[FileRecord]],
    executor: Callable[[], PieceExecutor],
    progress: BuildProgress | None,
    known: int,
) -> None:
    """Build pieces that do not read each other's files, and add their files to `files` in the order of the pieces."""
    made = {piece: found for piece in pieces if (found := recorded(task, piece)) is not None}
    if progress is not None:
        for piece in made:
            progress.finished(piece.name, known, kept=True)
    left = [piece for piece in pieces if piece not in made]
    if left:
        for piece, built in executor().build(task, left, files):
            made[piece] = built
            if progress is not None:
                progress.finished(piece.name, known, kept=False)
    for piece in pieces:
        for table, record in made[piece].items():
            files[table].append(record)


@contextmanager
def _executor(options: BuildOptions) -> Iterator[Callable[[], PieceExecutor]]:
    """A function that starts the executor on first use: a build with nothing left to do needs no cluster."""
    started: list[PieceExecutor] = []

    def start() -> PieceExecutor:
        if not started:
            started.append(RayPieces(options.address) if options.executor == "ray" else LocalPieces())
        return started[0]

    try:
        yield start
    finally:
        for executor in started:
            executor.stop()


def _layer_pieces(task: PieceTask) -> list[Piece]:
    of_tables = " UNION ".join(
        f"SELECT DISTINCT layer FROM {table}" for table in ("layers", "neurons", "tokens")
    )
    with connected(task) as opened:
        for table in FACTS:
            view(task, opened, table, task.facts[table])
        rows = opened.execute(f"SELECT layer FROM ({of_tables}) ORDER BY layer").fetchall()
    return [Piece(f"layer-{layer:06d}", LAYER_TABLES, "layer", layer, layer) for (layer,) in rows]


def _prompt_pieces(commits: Iterable[ShardCommit]) -> list[Piece]:
    """Ranges of consecutive shards with about `PROMPT_PIECE_ROWS` rows."""
    pieces: list[Piece] = []
    first, rows = None, 0
    ordered = sorted(commits, key=lambda commit: commit.first_prompt)
    for commit in ordered:
        first = commit.first_prompt if first is None else first
        rows += max(commit.rows["tokens"], commit.rows["neurons"])
        if rows >= PROMPT_PIECE_ROWS or commit is ordered[-1]:
            last = commit.first_prompt + commit.prompts - 1
            pieces.append(Piece(f"prompts-{first:09d}", PROMPT_TABLES, "prompt_id", first, last))
            first, rows = None, 0
    return pieces


def _weight_pieces(task: PieceTask, layers: Sequence[Piece]) -> list[Piece]:
    if task.weights is None:
        return []
    return [Piece(f"weights-{p.first:06d}", WEIGHT_TABLES, "layer", p.first, p.last) for p in layers]


def _token_pieces(task: PieceTask, files: Files) -> list[Piece]:
    """Ranges of tokens with about `TOKEN_PIECE_ROWS` entries."""
    with connected(task) as opened:
        view(task, opened, "neuron_topk", task.locations(files["neuron_topk"]))
        view(task, opened, "tokens", task.facts["tokens"])
        counts = opened.execute(ENTRIES).fetchall()
    pieces: list[Piece] = []
    first, rows = None, 0
    for token_id, count in counts:
        first = token_id if first is None else first
        rows += count
        if rows >= TOKEN_PIECE_ROWS or token_id == counts[-1][0]:
            pieces.append(Piece(f"tokens-{first:06d}", TOKEN_TABLES, "token_id", first, token_id))
            first, rows = None, 0
    return pieces


def _remove_leftovers(directory: Directory) -> None:
    """Remove half-written files and folders of spilled rows that killed builds have left."""
    if not directory.is_local:
        return
    for name in directory.names(ATLAS):
        if is_temporary(name):
            shutil.rmtree(directory.path(f"{ATLAS}/{name}"), ignore_errors=True)
    for folder in (*(f"{ATLAS}/{table}" for table in ATLAS_TABLES), ATLAS, PIECES):
        for name in directory.names(folder):
            if is_temporary(name):
                directory.remove(f"{folder}/{name}")


def _remove_others(directory: Directory, source: str) -> None:
    """Remove the files and records of older atlases."""
    for folder in (*(f"{ATLAS}/{table}" for table in ATLAS_TABLES), PIECES):
        for name in directory.names(folder):
            if source not in name and not is_temporary(name):
                directory.remove(f"{folder}/{name}")
