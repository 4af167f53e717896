"""What a sweep goes through: trials in order, and the cases of each in groups that are edited together."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from pipeline.editing.options import MethodName
from pipeline.editing.request import Request
from pipeline.errors import BacklensError

SHARD_CASES = 50


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of the grid."""

    index: int
    method: MethodName
    layer: int
    lr: float | None
    at_once: int


@dataclass(frozen=True, slots=True)
class Work:
    """One shard: a trial, and groups of cases. A worker is sent the cases with it, and reads no file of edits."""

    index: int
    trial: Trial
    groups: tuple[tuple[Request, ...], ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Methods × layers × rates × numbers of edits at once."""

    methods: tuple[MethodName, ...]
    layers: tuple[int, ...]
    rates: tuple[float | None, ...]
    at_once: tuple[int, ...]

    def trials(self) -> list[Trial]:
        points = product(self.methods, self.layers, self.rates, self.at_once)
        return [Trial(index, *point) for index, point in enumerate(points)]

    def shards(self, requests: Sequence[Request]) -> list[Work]:
        """Every trial's cases in groups of `at_once`; those left over that make no whole group are left out.

        Raises BacklensError where there are not enough for one.
        """
        work: list[Work] = []
        for trial in self.trials():
            size = trial.at_once
            if size > len(requests):
                raise BacklensError(f"--at-once {size}: there are {len(requests)} cases")
            starts = range(0, len(requests) - size + 1, size)
            groups = [tuple(requests[start : start + size]) for start in starts]
            step = max(1, SHARD_CASES // size)
            for first in range(0, len(groups), step):
                work.append(Work(len(work), trial, tuple(groups[first : first + step])))
        return work
