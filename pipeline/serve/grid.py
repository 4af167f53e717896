"""A prompt's heatmap as a table: layers by positions, in each cell what is said there and how loudly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.plot.heatmap import DECADES, SHIFTS
from pipeline.serve.asked import Row

LEVELS = 10
"""Steps of the colour scale: a page may not style single cells, so each step is a class."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer at one position."""

    row: Row
    level: int
    """Of the colour scale, by the logarithm of the VJP's norm; -1: exactly zero."""

    @property
    def top(self) -> str | None:
        return (self.row["top_tokens"] or [None])[0]

    @property
    def bottom(self) -> str | None:
        return (self.row["bottom_tokens"] or [None])[0]


@dataclass(frozen=True, slots=True)
class Line:
    """The cells of a layer by position; None where the run has no row, as under `--positions last`."""

    layer: int
    cells: Sequence[Cell | None]


@dataclass(frozen=True, slots=True)
class Grid:
    """A prompt's heatmap of one module."""

    module: str
    tokens: Sequence[str]
    lines: Sequence[Line]
    """The last layer first."""
    largest: float
    has_experts: bool

    @property
    def kind(self) -> str:
        """The paper's word for the projected vector."""
        return kind_of(self.module)

    @property
    def has_gaps(self) -> bool:
        return any(cell is None for line in self.lines for cell in line.cells)


def kind_of(module: str) -> str:
    """The paper's word for what is projected of a module."""
    return "shift δ" if module in SHIFTS else "imprint x"


def make_grid(module: str, tokens: Sequence[str], rows: Sequence[Row]) -> Grid:
    """The grid of one module's rows. Of experts, the one with the largest VJP at a position speaks there."""
    loudest: dict[tuple[int, int], Row] = {}
    for row in rows:
        place = row["layer"], row["position"]
        if place not in loudest or row["vjp_norm"] > loudest[place]["vjp_norm"]:
            loudest[place] = row
    largest = max((row["vjp_norm"] for row in loudest.values()), default=0.0)
    cells = {place: Cell(row, _level(row["vjp_norm"], largest)) for place, row in loudest.items()}
    layers = sorted({layer for layer, _ in cells}, reverse=True)
    lines = [Line(layer, [cells.get((layer, p)) for p in range(len(tokens))]) for layer in layers]
    has_experts = any(row["expert"] is not None for row in rows)
    return Grid(module, tokens, lines, largest, has_experts)


def _level(norm: float, largest: float) -> int:
    if not norm:
        return -1
    strength = 1 + math.log10(norm / largest) / DECADES
    return round(max(strength, 0.0) * (LEVELS - 1))
