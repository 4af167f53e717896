"""Line figures: the target's rank through the layers of a prompt, means over all prompts, and edit sweeps."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from backlens.editing.compare import TrialScore, best_trials
from backlens.figures import shown
from backlens.heatmap import POSITION_CLASSES, Heatmap, LayerCurves, Points, kind_of
from backlens.terms import WRITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASS_COLOURS = {
    "last": "#c2410c",
    "subject_last": "#1d4ed8",
    "subject_first": "#0e7490",
    "other": "#9ca3af",
}
PANEL = (4.6, 3.2)
"""Inches of one panel."""


def draw_ranks(heatmaps: Sequence[Heatmap], is_vector: bool) -> "Figure":
    """One panel per module of a prompt, one line per position: the last one and the subject's ends."""
    figure, panels = _panels(1, len(heatmaps))
    for axes, heatmap in zip(panels[0], heatmaps, strict=True):
        for line in heatmap.rank_lines:
            token = shown(line.token, is_vector, longest=20)
            label = f"{POSITION_CLASSES[line.position_class]}: {token}"
            _line(axes, line.points, CLASS_COLOURS[line.position_class], label)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=-0.2)
        axes.set_ylabel(f"rank of the target\n(0: {_first(heatmap.module)})")
        _finish(axes, heatmap.module)
    first = heatmaps[0]
    title = shown(f"{first.prompt} → {first.target}", is_vector, longest=50 * len(heatmaps))
    figure.suptitle(title, fontsize=11, weight="bold", parse_math=False)
    return figure


def draw_curves(curves: Mapping[str, LayerCurves], note: str) -> "Figure":
    """One column per module; from above: the norm of δ, the target's rank, the entropy of the first token."""
    figure, panels = _panels(3, len(curves))
    for column, (module, of_module) in enumerate(curves.items()):
        side = "promoted" if module in WRITES else "top"
        rows = (
            ("mean norm of δ", {name: _positive(points) for name, points in of_module.norms.items()}),
            (f"mean rank of the target\n(0: {_first(module)})", of_module.ranks),
            (f"entropy of the {side} token (bits)", of_module.entropies),
        )
        for row, (label, lines) in enumerate(rows):
            axes = panels[row][column]
            for name, points in lines.items():
                _line(axes, points, CLASS_COLOURS[name], POSITION_CLASSES[name])
            axes.set_ylabel(label)
            _finish(axes, module)
        panels[0][column].set_yscale("log")
    figure.suptitle(f"By layer and kind of position, {note}", fontsize=11, weight="bold")
    return figure


def _first(module: str) -> str:
    """The meaning of rank 0."""
    return "most promoted" if module in WRITES else "highest score"


def _positive(points: Points) -> Points:
    """The points that a logarithmic axis can show."""
    return {layer: value for layer, value in points.items() if value > 0}


def _line(axes: "Axes", points: Points, colour: str, label: str) -> None:
    if points:
        layers = sorted(points)
        values = [points[layer] for layer in layers]
        axes.plot(layers, values, color=colour, label=label, marker="o", markersize=3, linewidth=1.4)


def _finish(axes: "Axes", module: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(f"{module} ({kind_of(module)})", fontsize=9)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e5e7eb", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        for text in axes.legend(handles, labels, fontsize=7, frameon=False).get_texts():
            text.set_parse_math(False)


def _panels(rows: int, columns: int) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, PANEL[0] * columns), PANEL[1] * rows + 0.4), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


SCORE_COLOURS = {
    "efficacy": "#c2410c",
    "paraphrase": "#1d4ed8",
    "neighbourhood": "#0e7490",
    "score": "#374151",
}


def draw_edits(scores: Sequence[TrialScore]) -> "Figure":
    """Figures of an edit sweep.

    One panel per method with its score S by layer and learning rate, one with the best trial per method, and, if cases
    were edited together, one with the scores by number of edits.
    """
    from matplotlib.figure import Figure

    least = min(each.at_once for each in scores)
    single = [each for each in scores if each.at_once == least]
    methods = list(dict.fromkeys(each.method for each in single))
    counts = sorted({each.at_once for each in scores})
    panels = len(methods) + 1 + (len(counts) > 1)
    figure = Figure(figsize=(4.8 * panels, 4.2), layout="constrained")
    axes: Any = figure.subplots(1, panels, squeeze=False)[0]
    for panel, method in zip(axes, methods, strict=False):
        _heat_map(panel, method, [each for each in single if each.method == method])
    _methods(axes[len(methods)], best_trials(single))
    if len(counts) > 1:
        _curves(axes[-1], scores, counts)
    return figure


def _heat_map(axes: "Axes", method: str, scores: Sequence[TrialScore]) -> None:
    layers = sorted({each.layer for each in scores})
    rates = sorted({each.lr for each in scores}, key=lambda rate: -1.0 if rate is None else rate)
    cells = np.full((len(rates), len(layers)), np.nan)
    for each in scores:
        cells[rates.index(each.lr), layers.index(each.layer)] = 100 * each.score.value
    axes.imshow(cells, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            dark = "white" if value > 60 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=dark)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(rates)), ["default" if rate is None else f"{rate:g}" for rate in rates])
    axes.set_xlabel("layer")
    axes.set_ylabel("learning rate η")
    axes.set_title(f"{method}: score S", fontsize=10)


def _methods(axes: "Axes", best: Sequence[TrialScore]) -> None:
    width = 0.8 / len(SCORE_COLOURS)
    for number, (figure, colour) in enumerate(SCORE_COLOURS.items()):
        found = [getattr(each, figure) for each in best]
        values = [100 * each.value for each in found]
        errors = [
            [max(0.0, 100 * (each.value - each.low)) for each in found],
            [max(0.0, 100 * (each.high - each.value)) for each in found],
        ]
        places = np.arange(len(best)) + (number - 1.5) * width
        axes.bar(places, values, width, yerr=errors, color=colour, label=figure, error_kw={"lw": 0.8})
    labels = [f"{each.method}\nlayer {each.layer}" for each in best]
    axes.set_xticks(range(len(best)), labels, fontsize=7)
    axes.set_ylim(0, 105)
    axes.set_title("each method's best trial, 95 % intervals", fontsize=10)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)


def _curves(axes: "Axes", scores: Sequence[TrialScore], counts: Sequence[int]) -> None:
    best = {(each.method, each.at_once): each for each in best_trials(scores)}
    methods = dict.fromkeys(each.method for each in scores)
    for style, method in zip(cycle(("-", "--", ":", "-.")), methods, strict=False):
        there = [best[method, count] for count in counts if (method, count) in best]
        for figure, colour in SCORE_COLOURS.items():
            values = [100 * getattr(each, figure).value for each in there]
            axes.plot([each.at_once for each in there], values, style, color=colour, marker="o", markersize=3)
        spared = [(each.at_once, 100 * each.untouched) for each in there if each.untouched is not None]
        axes.plot(*zip(*spared, strict=True), style, color="black") if spared else None
    axes.set_xscale("log")
    axes.set_ylim(0, 105)
    axes.set_xlabel("edits at once (black: untouched facts)")
    axes.set_title("many edits", fontsize=10)
