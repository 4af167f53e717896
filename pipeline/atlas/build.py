"""`backlens atlas`: derives the atlas tables of a run, piece by piece, in bounded memory.

A piece is a layer or a range of prompts, and then a range of tokens, or what a layer's weights say. Its files are
written under temporary names, renamed, and recorded in `atlas/_pieces/`; `atlas/manifest.json`, written last, lists the
files of all pieces. What a crash at any instant leaves:

    within a piece      temporary files, or final names without a record: nobody reads them; the next call
                        replaces them
    between pieces      recorded pieces: the next call keeps them if the run has the same commits
    after the manifest  an atlas; files of an older one are deleted then

The files' names carry the commits they were made from (`manifest.source_of`), so an atlas in use stays whole while
the next one is built beside it.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol

from pipeline.atlas.executors import Executor, LocalExecutor, RayExecutor
from pipeline.atlas.manifest import (
    ATLAS,
    MANIFEST,
    CutOff,
    Manifest,
    WeightRecord,
    find_manifest,
    source_of,
)
from pipeline.atlas.piece import (
    FACTS,
    LAYER_TABLES,
    PIECES,
    TOKEN_TABLES,
    WEIGHT_TABLES,
    Files,
    Piece,
    Work,
    connected,
    recorded,
    view,
)
from pipeline.atlas.snapshot import norm_floor
from pipeline.atlas.weights import NONE, NoWeights, WeightSource, find_weights
from pipeline.errors import BacklensError
from pipeline.store.commit import ShardCommit, committed
from pipeline.store.files import Directory, is_temporary
from pipeline.store.parquet import FileRecord
from pipeline.store.rundir import load_run
from pipeline.store.verify import losses
from schemas.atlas import ATLAS_TABLES, PROMPT_TABLES

LOCK = f"{ATLAS}/_build.lock"
MEMORY = "2GB"
TOKEN_PIECE_ROWS = 2**25
"""How many entries, of neurons or of positions, are sorted at a time."""
PROMPT_PIECE_ROWS = 2**19
"""The same of rows with their lists."""
ENTRIES = """
SELECT token_id, greatest(count(*) FILTER (of_neurons), count(*) FILTER (NOT of_neurons))
FROM (
    SELECT token_id, true AS of_neurons FROM neuron_topk
    UNION ALL SELECT unnest(top_ids), false FROM tokens
    UNION ALL SELECT unnest(bottom_ids), false FROM tokens
)
GROUP BY token_id ORDER BY token_id
"""


class Progress(Protocol):
    """Who watches a build."""

    def planned(self, text: str, pieces: int) -> None: ...

    def finished(self, piece: str, pieces: int, kept: bool) -> None:
        """A piece is done, of so many that are known by now; `kept`: a call before this one did it."""
        ...


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build an atlas. The tables are the same whatever is said, but for what the weights say."""

    memory: str = MEMORY
    """What DuckDB may use, in each process."""
    weights: str | None = None
    """Where the run's model is; `none` to leave out what its weights say; None for where the run found it."""
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    """A Ray cluster; None starts one on this machine."""


DEFAULTS = BuildOptions()


def build_atlas(
    out: str | Directory, progress: Progress | None = None, options: BuildOptions = DEFAULTS
) -> Manifest:
    """The atlas of the shards that are committed now; one that stands already is returned as it is.

    One that lacks what the weights say gets it, if the model is at hand now.
    """
    started = time.monotonic()
    directory = Directory.at(out)
    record = load_run(directory, "run")
    if not committed(directory):
        raise BacklensError(f"atlas: {directory} has no committed shard yet; let `backlens run` finish one")
    directory.makedirs(ATLAS)
    with directory.exclusively(LOCK):
        commits = committed(directory)
        standing, source = find_manifest(directory), source_of(commits, norm_floor(record))
        if standing is not None and standing.source == source:
            if standing.weights.digest is not None or options.weights == NONE:
                return standing
            weights = find_weights(directory, record, options.weights)
            if isinstance(weights, NoWeights):
                return standing
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
        work = Work(directory, facts, source, options.memory, model, norm_floor(record))
        plan = _plan_line(len(commits), record.plan.shards, standing)
        files = _build(work, commits.values(), options, progress, plan)
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


def _plan_line(shards: int, planned: int, standing: Manifest | None) -> str:
    of = (
        f"{shards:,} shards"
        if shards == planned
        else f"{shards:,} of {planned:,} shards (the run is not complete)"
    )
    if standing is None:
        return f"atlas of {of}"
    if standing.weights.digest is None and standing.shards == shards:
        return f"atlas of {of}: what the neurons' weights say is added"
    return f"atlas of {of}, in the place of one of {standing.shards:,} shards, which the run has left behind"


def _build(
    work: Work, commits: Iterable[ShardCommit], options: BuildOptions, progress: Progress | None, plan: str
) -> dict[str, list[FileRecord]]:
    """Every piece that is not recorded already; the files of all of them, by table."""
    files: dict[str, list[FileRecord]] = {table: [] for table in ATLAS_TABLES}
    layers = _layer_pieces(work)
    first = [*layers, *_prompt_pieces(commits)]
    if progress is not None:
        progress.planned(plan, len(first))
    with _executor(options) as executor:
        _build_some(work, first, files, executor, progress, len(first))
        rest = [*_token_pieces(work, files), *_weight_pieces(work, layers)]
        _build_some(work, rest, files, executor, progress, len(first) + len(rest))
    return files


def _build_some(
    work: Work,
    pieces: Sequence[Piece],
    files: dict[str, list[FileRecord]],
    executor: Callable[[], Executor],
    progress: Progress | None,
    known: int,
) -> None:
    """Pieces that do not read each other's files; they are added to `files` in their own order."""
    made = {piece: found for piece in pieces if (found := recorded(work, piece)) is not None}
    if progress is not None:
        for piece in made:
            progress.finished(piece.name, known, kept=True)
    left = [piece for piece in pieces if piece not in made]
    if left:
        for piece, built in executor().build(work, left, files):
            made[piece] = built
            if progress is not None:
                progress.finished(piece.name, known, kept=False)
    for piece in pieces:
        for table, record in made[piece].items():
            files[table].append(record)


@contextmanager
def _executor(options: BuildOptions) -> Iterator[Callable[[], Executor]]:
    """The executor, started when it is first asked for: a build that has nothing left to do needs no cluster."""
    started: list[Executor] = []

    def start() -> Executor:
        if not started:
            started.append(RayExecutor(options.address) if options.executor == "ray" else LocalExecutor())
        return started[0]

    try:
        yield start
    finally:
        for executor in started:
            executor.stop()


def _layer_pieces(work: Work) -> list[Piece]:
    of_tables = " UNION ".join(
        f"SELECT DISTINCT layer FROM {table}" for table in ("layers", "neurons", "tokens")
    )
    with connected(work) as opened:
        for table in FACTS:
            view(work, opened, table, work.facts[table])
        rows = opened.execute(f"SELECT layer FROM ({of_tables}) ORDER BY layer").fetchall()
    return [Piece(f"layer-{layer:06d}", LAYER_TABLES, "layer", layer, layer) for (layer,) in rows]


def _prompt_pieces(commits: Iterable[ShardCommit]) -> list[Piece]:
    """Shards that follow each other, with about as many rows together as are sorted at a time."""
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


def _weight_pieces(work: Work, layers: Sequence[Piece]) -> list[Piece]:
    if work.weights is None:
        return []
    return [Piece(f"weights-{p.first:06d}", WEIGHT_TABLES, "layer", p.first, p.last) for p in layers]


def _token_pieces(work: Work, files: Files) -> list[Piece]:
    """Ranges of tokens with about as many entries each as are sorted at a time."""
    with connected(work) as opened:
        view(work, opened, "neuron_topk", work.locations(files["neuron_topk"]))
        view(work, opened, "tokens", work.facts["tokens"])
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
    """What killed builds left: half-written files, and folders of spilled rows."""
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
    """The files and records of atlases that this one replaces."""
    for folder in (*(f"{ATLAS}/{table}" for table in ATLAS_TABLES), PIECES):
        for name in directory.names(folder):
            if source not in name and not is_temporary(name):
                directory.remove(f"{folder}/{name}")
