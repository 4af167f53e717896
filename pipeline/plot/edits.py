"""Figures of an edit sweep: S by layer and learning rate, methods side by side, and many edits at once."""

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.editing.compare import TrialScore, best_trials

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "efficacy": "#c2410c",
    "paraphrase": "#1d4ed8",
    "neighbourhood": "#0e7490",
    "score": "#374151",
}


def draw_edits(scores: Sequence[TrialScore]) -> "Figure":
    """A heat map for every method tried at several layers or rates, then the methods' best trials; and, where cases
    were edited together, those figures by how many."""
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
    width = 0.8 / len(COLOURS)
    for number, (figure, colour) in enumerate(COLOURS.items()):
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
        for figure, colour in COLOURS.items():
            values = [100 * getattr(each, figure).value for each in there]
            axes.plot([each.at_once for each in there], values, style, color=colour, marker="o", markersize=3)
        spared = [(each.at_once, 100 * each.untouched) for each in there if each.untouched is not None]
        axes.plot(*zip(*spared, strict=True), style, color="black") if spared else None
    axes.set_xscale("log")
    axes.set_ylim(0, 105)
    axes.set_xlabel("edits at once (black: untouched facts)")
    axes.set_title("many edits", fontsize=10)
