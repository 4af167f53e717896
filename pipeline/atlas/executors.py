"""The two ways to build pieces: in this process, or as Ray tasks on the cores of a cluster."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from pipeline.atlas.piece import WEIGHT_TABLES, Files, Piece, Work, build_pieces
from pipeline.store.parquet import FileRecord

Made = tuple[Piece, dict[str, FileRecord]]


class Executor(Protocol):
    """Builds pieces that do not read each other's files; yields each when it is done, in any order."""

    def build(self, work: Work, pieces: Sequence[Piece], files: Files) -> Iterator[Made]: ...

    def stop(self) -> None: ...


class LocalExecutor:
    """One piece after the other; DuckDB uses every core for each."""

    def build(self, work: Work, pieces: Sequence[Piece], files: Files) -> Iterator[Made]:
        return build_pieces(work, pieces, files)

    def stop(self) -> None:
        """Nothing outlives `build`."""


class RayExecutor:
    """Tasks of one core. They hold nothing that is not in their files, so Ray itself may try a lost one again."""

    def __init__(self, address: str | None) -> None:
        from pipeline.engine.before_ray import keep_deaths_quiet

        keep_deaths_quiet()
        import ray

        from pipeline.engine.session import connect

        connect(address)
        self._ray = ray
        self._cores = int(ray.cluster_resources().get("CPU", 1))

    def build(self, work: Work, pieces: Sequence[Piece], files: Files) -> Iterator[Made]:
        from pipeline.engine.session import errors_as_ours

        task = self._ray.remote(_built).options(num_cpus=1)
        shared = self._ray.put((replace(work, threads=1), files))
        running = [task.remote(shared, group) for group in _groups(pieces, self._cores)]
        while running:
            done, running = self._ray.wait(running)
            with errors_as_ours():
                yield from self._ray.get(done[0])

    def stop(self) -> None:
        self._ray.shutdown()


def _built(shared: tuple[Work, Files], pieces: Sequence[Piece]) -> list[Made]:
    return list(build_pieces(shared[0], pieces, shared[1]))


def _groups(pieces: Sequence[Piece], cores: int) -> list[list[Piece]]:
    """A task each; but as many as there are cores share those that need the model, which a task loads once."""
    weights = [piece for piece in pieces if piece.tables == WEIGHT_TABLES]
    others = [[piece] for piece in pieces if piece.tables != WEIGHT_TABLES]
    return [*others, *(group for start in range(cores) if (group := weights[start::cores]))]
