"""One prompt by layer and position: the cells of its heatmap and the target's rank through the layers.

Notebooks, figures and the explorer draw what is computed here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from backlens.display import visible
from backlens.terms import WRITES

DECADES = 3.0
"""Powers of ten that the colour scale spans; smaller norms are as pale as its lower end."""
LEVELS = 10
"""Steps of the colour scale of pages: their style sheet has one class per step."""
POSITION_CLASSES = {
    "last": "last position",
    "subject_last": "subject, last token",
    "subject_first": "subject, first token",
    "other": "other positions",
}
"""Labels of the values of `layer_curves.position_class`."""

Points = Mapping[int, float]
"""A value per layer."""


@dataclass(frozen=True, slots=True)
class HeatmapCell:
    """One layer at one position."""

    layer: int
    position: int
    row: Mapping[str, Any]
    """The row of `tokens`, with texts; of an exact zero the lists are null."""

    @property
    def norm(self) -> float:
        """L2 norm of the VJP δ."""
        return self.row["vjp_norm"]

    @property
    def top(self) -> str | None:
        """The token with the highest lens score."""
        return (self.row["top_tokens"] or [None])[0]

    @property
    def bottom(self) -> str | None:
        """The token with the lowest lens score."""
        return (self.row["bottom_tokens"] or [None])[0]


@dataclass(frozen=True, slots=True)
class HeatmapLine:
    """The cells of a layer by position; None where there is no row."""

    layer: int
    cells: Sequence[HeatmapCell | None]


@dataclass(frozen=True, slots=True)
class RankLine:
    """The target's rank by layer at one position."""

    position_class: str
    token: str
    points: Points


@dataclass(frozen=True, slots=True)
class Heatmap:
    """The heatmap of one prompt and module.

    Where a block has experts, a cell shows the expert with the largest VJP at that position. Modules that write to the
    residual stream show promoted and suppressed tokens (the bottom and the top of δ), the others the top and the
    bottom of x.
    """

    prompt: str
    target: str
    target_token: str
    module: str
    tokens: Sequence[str]
    """The prompt's tokens, by position."""
    cells: Mapping[tuple[int, int], HeatmapCell]
    """By layer and position."""
    positions: Mapping[str, int]
    """The positions of rank lines, by position class: the last one and the ends of the subject."""
    vocabulary: int
    """Number of tokens that ranks are over."""
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
    def raw_sides(self) -> tuple[str, str]:
        """The lists of a cell's two tokens in the tables, that of the upper token first."""
        return ("bottom", "top") if self.module in WRITES else ("top", "bottom")

    @property
    def sides(self) -> tuple[str, str]:
        """The names of a cell's two tokens, the upper one first."""
        first, second = self.raw_sides
        return shown_side(self.module, first), shown_side(self.module, second)

    def pair(self, cell: HeatmapCell) -> tuple[str | None, str | None]:
        """A cell's two tokens, in the order of `sides`."""
        return (cell.bottom, cell.top) if self.module in WRITES else (cell.top, cell.bottom)

    def rank(self, cell: HeatmapCell) -> float | None:
        """The target's rank, 0 = most promoted (for modules that read: highest score); None for a zero vector."""
        return shown_rank(self.module, cell.row["target_rank"], self.vocabulary)

    @property
    def rank_lines(self) -> Sequence[RankLine]:
        """The target's rank by layer, one line per position of `positions`."""
        return [
            RankLine(name, self.tokens[position], self._ranks(position))
            for name, position in self.positions.items()
        ]

    def _ranks(self, position: int) -> Points:
        cells = (self.cells.get((layer, position)) for layer in self.layers)
        ranks = {cell.layer: self.rank(cell) for cell in cells if cell is not None}
        return {layer: rank for layer, rank in ranks.items() if rank is not None}

    @property
    def texts(self) -> Iterator[str | None]:
        """Every text that is shown."""
        yield from (self.prompt, self.target, *self.tokens)
        for cell in self.cells.values():
            yield from (cell.top, cell.bottom)

    @property
    def lines(self) -> Sequence[HeatmapLine]:
        """The rows from above: the last layer first."""
        places = range(len(self.tokens))
        return [
            HeatmapLine(layer, [self.cells.get((layer, position)) for position in places])
            for layer in reversed(self.layers)
        ]

    @property
    def has_gaps(self) -> bool:
        """True if some positions have no row, as under `--positions last`."""
        return len(self.cells) < len(self.layers) * len(self.tokens)

    def level(self, cell: HeatmapCell) -> int:
        """The step of a colour scale of LEVELS steps; −1 for an exact zero."""
        strength = self.strength(cell)
        return -1 if strength is None else round(strength * (LEVELS - 1))

    def strength(self, cell: HeatmapCell) -> float | None:
        """The place of a cell's norm on the logarithmic colour scale, 0 to 1; None for an exact zero."""
        if not cell.norm:
            return None
        return max(1 + math.log10(cell.norm / self.largest) / DECADES, 0.0)

    def save(self, path: str) -> None:
        """Write the figure to a file, in the format of its suffix: .html, or .png, .svg and .pdf (extra `plot`).

        Raises BacklensError for another suffix, or if matplotlib is not installed.
        """
        if path.lower().endswith((".html", ".htm")):
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"{PAGE}<title>{escape(self.prompt)}</title>{self._repr_html_()}")
            return
        from backlens.figures.heatmap import save_heatmap

        save_heatmap(self, path)

    def _repr_html_(self) -> str:
        """A static table without script, style sheet or network, for light and dark pages."""
        head = "".join(
            f'<th style="{HEAD}; vertical-align: bottom"><bdi>{escape(visible(token))}</bdi></th>'
            for token in self.tokens
        )
        lines = "".join(
            f'<tr><th style="{HEAD}">{line.layer}</th>{"".join(map(self._cell, line.cells))}</tr>'
            for line in self.lines
        )
        title = escape(f"{visible(self.prompt)} → {visible(self.target)}")
        return (
            f'<figure style="margin: 0"><figcaption style="text-align: left"><b><bdi>{title}</bdi></b><br>'
            f"<small>{self._legend()}</small></figcaption>"
            '<div style="overflow-x: auto"><table style="border-collapse: separate; border-spacing: 1px; '
            f'font-size: 11px; line-height: 1.3; margin: 4px 0">'
            f'<thead><tr><th style="{HEAD}">layer</th>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
            f"<small>{self._scale()}</small></figure>"
        )

    def _legend(self) -> str:
        if self.module in WRITES:
            cell = (
                "the token that a step of gradient descent promotes most, and below it the one that it suppresses "
                "most (the bottom and the top of δ)"
            )
        else:
            cell = (
                "the token with the highest lens score of the input x, and below it the one with the lowest"
            )
        expert = " Of a block's experts, the one with the largest δ is shown." if self.has_experts else ""
        gaps = " Empty cells: positions that were not projected." if self.has_gaps else ""
        return (
            f"{self.module} ({self.kind}). Rows: layers; columns: tokens of the prompt. Each cell: {cell}. "
            f"Bold: the target <bdi>{escape(visible(self.target_token))}</bdi>.{expert}{gaps}"
        )

    def _scale(self) -> str:
        """The colour scale with its ends."""
        steps = "".join(
            f'<span style="display: inline-block; width: 1.6em; height: 0.8em; {_colour(step / 5)}"></span>'
            for step in range(6)
        )
        low, high = self.largest / 10**DECADES, self.largest
        return f"Colour: norm of δ, logarithmic. ≤ {low:.2g} {steps} {high:.2g}. 0: δ is exactly zero."

    def _cell(self, cell: HeatmapCell | None) -> str:
        if cell is None:
            return f'<td style="{CELL}"></td>'
        strength = self.strength(cell)
        place = f"layer {cell.layer}, position {cell.position}"
        if strength is None:
            return f'<td style="{CELL}; opacity: 0.6" title="{place}: δ is exactly zero">0</td>'
        first, second = (f"<bdi>{self._token(text)}</bdi>" for text in self.pair(cell))
        expert = "" if cell.row["expert"] is None else f", expert {cell.row['expert']}"
        title = f"{place}{expert}: norm of δ {cell.norm:.3g}, {self._rank_text(cell)}"
        letters = "#fff" if strength > 0.85 else "#222"
        return (
            f'<td style="{CELL}; {_colour(strength)}; color: {letters}" title="{title}">{first}<br>'
            f'<span style="opacity: 0.85">{second}</span></td>'
        )

    def _rank_text(self, cell: HeatmapCell) -> str:
        rank = self.rank(cell)
        if rank is None:
            return "no rank of the target"
        end = "most promoted" if self.module in WRITES else "highest score"
        return f"rank of the target {rank:,} (0 = {end})"

    def _token(self, text: str | None) -> str:
        shown = escape(visible(text or ""))
        return f"<b>{shown}</b>" if text == self.target_token else shown


PAGE = (
    '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<meta name="color-scheme" content="light dark"><body style="font-family: sans-serif">'
)
HEAD = "padding: 2px 5px; text-align: center; font-weight: normal; background: none"
CELL = "padding: 1px 4px; text-align: center; white-space: nowrap; border: 0"


def _colour(strength: float) -> str:
    """The colour of a cell, the same on light and on dark pages, with letters of its own."""
    red, green, blue = 255 - 50 * strength, 247 - 160 * strength, 225 - 205 * strength
    return f"background: rgb({red:.0f},{green:.0f},{blue:.0f})"


def kind_of(module: str) -> str:
    """The paper's word for the vector of a module that is projected."""
    return "shift δ" if module in WRITES else "imprint x"


def default_module(modules: Sequence[str]) -> str:
    """The module that is shown where none is named."""
    return "mlp.down" if "mlp.down" in modules or not modules else modules[0]


def shown_rank(module: str, rank: float | None, vocabulary: int) -> float | None:
    """A raw rank of a position's vector as people read it.

    Modules that write count from the promoted end (the bottom of δ), the others from the top of x.
    """
    return vocabulary - 1 - rank if rank is not None and module in WRITES else rank


def shown_side(module: str, side: str, is_neuron: bool = False) -> str:
    """The name of a `top` or `bottom` list as people read it.

    The lists of neurons, and of positions of modules that write, have a promoted and a suppressed side.
    """
    names = {"bottom": "promoted", "top": "suppressed"}
    return names[side] if is_neuron or module in WRITES else side


def make_heatmap(
    prompt: Mapping[str, Any],
    module: str,
    rows: Sequence[Mapping[str, Any]],
    tokens: Sequence[str],
    target_token: str,
    vocabulary: int,
) -> Heatmap:
    """The heatmap of one module.

    `prompt` is the row of `prompts`, `rows` the prompt's rows of `tokens` with texts, `tokens` the texts of its tokens,
    `vocabulary` the number of tokens that ranks are over.
    """
    loudest: dict[tuple[int, int], HeatmapCell] = {}
    for row in rows:
        place = row["layer"], row["position"]
        if place not in loudest or row["vjp_norm"] > loudest[place].norm:
            loudest[place] = HeatmapCell(*place, row)
    return Heatmap(
        prompt=prompt["prompt"],
        target=prompt["target"],
        target_token=target_token,
        module=module,
        tokens=tokens,
        cells=loudest,
        positions=_named_positions(prompt),
        vocabulary=vocabulary,
        has_experts=any(row["expert"] is not None for row in rows),
    )


def _named_positions(prompt: Mapping[str, Any]) -> dict[str, int]:
    """The last position and the subject's ends, by position class; a subject of one token has one line."""
    positions = {"last": prompt["n_tokens"] - 1}
    if prompt["subject_start"] is not None:
        positions |= {"subject_last": prompt["subject_end"] - 1, "subject_first": prompt["subject_start"]}
    names: dict[int, str] = {}
    for name, position in positions.items():
        names.setdefault(position, name)
    return {name: position for position, name in names.items()}


@dataclass(frozen=True, slots=True)
class LayerCurves:
    """The means of one module over all prompts: one line per position class."""

    norms: Mapping[str, Points]
    """Mean L2 norm of δ."""
    ranks: Mapping[str, Points]
    """Mean rank of the target, counted as `shown_rank` does."""
    entropies: Mapping[str, Points]
    """Entropy of the first promoted token, in bits; of the first top token for modules that read."""


def make_layer_curves(rows: Sequence[Mapping[str, Any]], module: str, vocabulary: int) -> LayerCurves:
    """The curves of a module from the rows of `layer_curves`."""
    of_module = [row for row in rows if row["module"] == module]
    ranks: dict[str, Points] = _means(of_module, "target_rank")
    if module in WRITES:
        ranks = {
            name: {layer: vocabulary - 1 - mean for layer, mean in points.items()}
            for name, points in ranks.items()
        }
    side = "bottom" if module in WRITES else "top"
    return LayerCurves(_means(of_module, "vjp_norm"), ranks, _means(of_module, f"{side}_entropy"))


def _means(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, Points]:
    """By position class and layer: the mean over experts, weighted by their positions; nulls are left out."""
    sums: dict[tuple[str, int], tuple[float, float]] = {}
    for row in rows:
        if row[column] is not None:
            key = row["position_class"], row["layer"]
            total, weight = sums.get(key, (0.0, 0.0))
            sums[key] = total + row[column] * row["positions"], weight + row["positions"]
    means: dict[str, Points] = {}
    for name in POSITION_CLASSES:
        means[name] = {layer: total / weight for (of, layer), (total, weight) in sums.items() if of == name}
    return means
