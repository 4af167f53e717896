"""A prompt's layers by positions: what each layer's gradient says at each position, and how loudly."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from backlens.display import visible
from backlens.terms import WRITES

DECADES = 3.0
"""Norms this many powers of ten below the largest are as pale as the smallest."""
LEVELS = 10
"""Steps of the colour scale of pages, which may not style single cells: each step is a class."""


@dataclass(frozen=True, slots=True)
class HeatmapCell:
    """One layer at one position; an exact zero has no tokens."""

    layer: int
    position: int
    row: Mapping[str, Any]
    """The row of `tokens`, with texts."""

    @property
    def norm(self) -> float:
        """L2 norm of the VJP δ."""
        return self.row["vjp_norm"]

    @property
    def top(self) -> str | None:
        return (self.row["top_tokens"] or [None])[0]

    @property
    def bottom(self) -> str | None:
        return (self.row["bottom_tokens"] or [None])[0]


@dataclass(frozen=True, slots=True)
class HeatmapLine:
    """The cells of a layer by position; None where there is no row."""

    layer: int
    cells: Sequence[HeatmapCell | None]


@dataclass(frozen=True, slots=True)
class Heatmap:
    """One prompt and module. Where a block has experts, the one with the largest VJP at a position is shown there."""

    prompt: str
    target: str
    target_token: str
    module: str
    tokens: Sequence[str]
    cells: Mapping[tuple[int, int], HeatmapCell]
    """By layer and position."""
    has_experts: bool

    @property
    def layers(self) -> Sequence[int]:
        return sorted({layer for layer, _ in self.cells})

    @property
    def largest(self) -> float:
        """The largest norm of a δ."""
        return max((cell.norm for cell in self.cells.values()), default=0.0)

    @property
    def kind(self) -> str:
        """The paper's word for the projected vector."""
        return kind_of(self.module)

    @property
    def texts(self) -> Iterator[str | None]:
        """Every text that is shown."""
        yield from (self.prompt, self.target, *self.tokens)
        for cell in self.cells.values():
            yield from (cell.top, cell.bottom)

    @property
    def lines(self) -> Sequence["HeatmapLine"]:
        """The last layer first."""
        places = range(len(self.tokens))
        return [
            HeatmapLine(layer, [self.cells.get((layer, position)) for position in places])
            for layer in reversed(self.layers)
        ]

    @property
    def has_gaps(self) -> bool:
        """Whether some positions have no row, as under `--positions last`."""
        return len(self.cells) < len(self.layers) * len(self.tokens)

    def level(self, cell: HeatmapCell) -> int:
        """The step of a colour scale of LEVELS steps; −1 for an exact zero."""
        strength = self.strength(cell)
        return -1 if strength is None else round(strength * (LEVELS - 1))

    def strength(self, cell: HeatmapCell) -> float | None:
        """Where a cell's norm is on the logarithmic colour scale, 0 to 1; None for an exact zero."""
        if not cell.norm:
            return None
        return max(1 + math.log10(cell.norm / self.largest) / DECADES, 0.0)

    def save(self, path: str) -> None:
        """Write the figure to a file, in the format of its suffix: .html, or .png, .svg and .pdf (extra `plot`)."""
        if path.lower().endswith((".html", ".htm")):
            with open(path, "w", encoding="utf-8") as file:
                file.write(
                    f"<!doctype html><meta charset=utf-8><title>{escape(self.prompt)}</title>{self._repr_html_()}"
                )
            return
        from backlens.figures.heatmap import save_heatmap

        save_heatmap(self, path)

    def _repr_html_(self) -> str:
        """A static table without script, style sheet or network, for light and dark pages."""
        head = "".join(
            f'<th style="{HEAD}"><bdi>{escape(visible(token))}</bdi></th>' for token in self.tokens
        )
        lines = "".join(
            f'<tr><th style="{HEAD}">{line.layer}</th>{"".join(map(self._cell, line.cells))}</tr>'
            for line in self.lines
        )
        title = escape(f"{visible(self.prompt)} → {visible(self.target)}")
        shows = "promoted over suppressed token" if self.module in WRITES else "top over bottom token"
        note = (
            f"{self.module}, {self.kind}: {shows}; colour: norm of δ, logarithmic, up to {self.largest:.3g}"
        )
        if self.has_experts:
            note += "; the expert with the largest δ"
        return (
            f'<figure style="margin: 0"><figcaption><b><bdi>{title}</bdi></b><br><small>{note}</small></figcaption>'
            f'<div style="overflow-x: auto"><table style="border-collapse: collapse; font-size: 11px">'
            f'<thead><tr><th style="{HEAD}">layer</th>{head}</tr></thead><tbody>{lines}</tbody></table></div></figure>'
        )

    def _cell(self, cell: HeatmapCell | None) -> str:
        if cell is None:
            return "<td></td>"
        strength = self.strength(cell)
        if strength is None:
            return f'<td style="{CELL}; color: #999" title="δ is exactly zero">0</td>'
        first, second = (cell.bottom, cell.top) if self.module in WRITES else (cell.top, cell.bottom)
        texts = "<br>".join(f"<bdi>{self._token(text)}</bdi>" for text in (first, second))
        # Mixed with orange by hand, so that the letters stay readable on light and on dark pages alike.
        colour = f"background: rgb({255 - 50 * strength:.0f},{247 - 160 * strength:.0f},{225 - 205 * strength:.0f})"
        letters = "#fff" if strength > 0.85 else "#222"
        title = f"layer {cell.layer}, position {cell.position}: norm of δ {cell.norm:.3g}"
        return f'<td style="{CELL}; {colour}; color: {letters}" title="{title}">{texts}</td>'

    def _token(self, text: str | None) -> str:
        shown = escape(visible(text or ""))
        return f"<b>{shown}</b>" if text == self.target_token else shown


HEAD = "padding: 2px 5px; text-align: center; font-weight: normal"
CELL = "padding: 1px 4px; text-align: center; white-space: nowrap; border: 1px solid #fff"


def kind_of(module: str) -> str:
    """The paper's word for the vector of a module that is projected."""
    return "shift δ" if module in WRITES else "imprint x"


def make_heatmap(
    module: str,
    tokens: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    prompt: str,
    target: str,
    target_token: str,
) -> Heatmap:
    """The heatmap of one module from a prompt's rows of `tokens`, with texts; `tokens` are the prompt's."""
    loudest: dict[tuple[int, int], HeatmapCell] = {}
    for row in rows:
        place = row["layer"], row["position"]
        if place not in loudest or row["vjp_norm"] > loudest[place].norm:
            loudest[place] = HeatmapCell(*place, row)
    return Heatmap(
        prompt=prompt,
        target=target,
        target_token=target_token,
        module=module,
        tokens=tokens,
        cells=loudest,
        has_experts=any(row["expert"] is not None for row in rows),
    )
