"""Layer × position heatmaps: the lens tokens of every cell, and the norm of δ as its colour."""

from typing import TYPE_CHECKING, Literal

from backlens.figures import check_target, require_matplotlib, save, shown
from backlens.heatmap import DECADES, Heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL_WIDTH, CELL_HEIGHT = 1.0, 0.38
"""Inches per cell, however many there are: the figure grows and the letters stay readable."""
LEFT, RIGHT, TOP, BOTTOM = 0.75, 1.1, 1.0, 0.25
DARK = 0.6
"""Strength of a cell (0 to 1) from which its letters are white."""

Cells = Literal["tokens", "norms"]


def save_heatmap(heatmap: Heatmap, path: str) -> None:
    """Draw a heatmap to a file in the format of its suffix: .png, .svg or .pdf. Raises BacklensError for another."""
    require_matplotlib()
    target = check_target(path)
    save(draw_heatmap(heatmap, target.suffix.lower() == ".svg"), target)


def draw_heatmap(heatmap: Heatmap, is_vector: bool, cells: Cells = "tokens") -> "Figure":
    """The figure: layers upward, positions to the right; a cell shows its two tokens or the norm of δ."""
    from matplotlib.figure import Figure

    columns, rows = len(heatmap.tokens), len(heatmap.layers)
    width = max(7.0, LEFT + CELL_WIDTH * columns + RIGHT)
    height = TOP + CELL_HEIGHT * rows + BOTTOM
    figure = Figure(figsize=(width, height))
    box = (LEFT / width, BOTTOM / height, CELL_WIDTH * columns / width, CELL_HEIGHT * rows / height)
    axes = figure.add_axes(box)
    _colour(figure, axes, heatmap, (width, height))
    _write_cells(axes, heatmap, is_vector, cells)
    labels = [shown(token, is_vector) for token in heatmap.tokens]
    axes.set_xticks(range(columns), labels, fontsize=8, parse_math=False)
    axes.set_yticks(range(rows), [str(layer) for layer in heatmap.layers], fontsize=8)
    axes.set_ylabel("layer")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    _write_title(figure, heatmap, is_vector, cells, (width, height))
    return figure


def _colour(figure: "Figure", axes: "Axes", heatmap: Heatmap, size: tuple[float, float]) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm

    norms = np.full((len(heatmap.layers), len(heatmap.tokens)), np.nan)
    for cell in heatmap.cells.values():
        norms[heatmap.layers.index(cell.layer), cell.position] = cell.norm or np.nan
    most = heatmap.largest or 1.0
    scale = LogNorm(most * 10**-DECADES, most, clip=True)
    image = axes.imshow(norms, cmap="YlOrBr", norm=scale, origin="lower", aspect="auto")
    for edge in range(len(heatmap.tokens) + 1):
        axes.axvline(edge - 0.5, color="white", linewidth=0.8)
    for edge in range(len(heatmap.layers) + 1):
        axes.axhline(edge - 0.5, color="white", linewidth=0.8)
    width, height = size
    tall = min(CELL_HEIGHT * len(heatmap.layers), 4.0)
    bar = figure.add_axes(
        (
            (LEFT + CELL_WIDTH * len(heatmap.tokens) + 0.15) / width,
            BOTTOM / height,
            0.14 / width,
            tall / height,
        )
    )
    figure.colorbar(image, cax=bar).set_label("norm of δ", fontsize=8)
    bar.tick_params(labelsize=7)


def _write_cells(axes: "Axes", heatmap: Heatmap, is_vector: bool, cells: Cells) -> None:
    for cell in heatmap.cells.values():
        strength = heatmap.strength(cell) or 0.0
        x, y = cell.position, heatmap.layers.index(cell.layer)
        style = {"ha": "center", "color": "white" if strength > DARK else "#222222", "parse_math": False}
        if not cell.norm:
            axes.text(x, y, "0", va="center", fontsize=7, **{**style, "color": "#999999"})
        elif cells == "norms":
            axes.text(x, y, f"{cell.norm:.2g}", va="center", fontsize=8, **style)
        else:
            for token, height in zip(heatmap.pair(cell), (0.24, -0.24), strict=True):
                weight = "bold" if token == heatmap.target_token else "normal"
                text = shown(token, is_vector)
                axes.text(x, y + height, text, va="center", fontsize=7, weight=weight, **style)


def _write_title(
    figure: "Figure", heatmap: Heatmap, is_vector: bool, cells: Cells, size: tuple[float, float]
) -> None:
    width, height = size
    room = int(width * 11)
    title = shown(f"{heatmap.prompt} → {heatmap.target}", is_vector, longest=room)
    figure.text(0.15 / width, 1 - 0.28 / height, title, fontsize=11, weight="bold", parse_math=False)
    first, second = heatmap.sides
    what = "norm of δ" if cells == "norms" else f"{first} token, below it the {second} one (bold: the target)"
    of = f"{heatmap.module}, {heatmap.kind}: {what}"
    if heatmap.has_experts:
        of += "; expert with the largest δ"
    figure.text(
        0.15 / width, 1 - 0.52 / height, f"{of}; grey 0: δ is exactly zero", fontsize=8, color="#555555"
    )
