"""Line figures: the target's rank through the layers of a prompt, and curves over all prompts.

Figures of an edit sweep: S by layer and learning rate, methods side by side, and many edits at once.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from backlens.atlas import Atlas
from backlens.editing.compare import TrialScore, best_trials
from backlens.errors import BacklensError
from backlens.figures.canvas import shown
from backlens.figures.heatmap import token_texts
from backlens.terms import WRITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASSES = {
    "last": ("last position", "#c2410c"),
    "subject_last": ("subject, last token", "#1d4ed8"),
    "subject_first": ("subject, first token", "#0e7490"),
    "other": ("other positions", "#9ca3af"),
}
PANEL = (4.6, 3.2)
"""Inches of one panel."""

Points = Mapping[int, float]
"""A value by layer."""


def draw_ranks(atlas: Atlas, prompt_id: int, modules: Sequence[str], is_vector: bool) -> "Figure":
    """One panel a module, one line a position: the last one and the subject's ends."""
    (prompt,) = atlas.prompt(prompt_id).to_pylist()
    texts = token_texts(atlas, prompt["token_ids"])
    vocabulary = atlas.sql("SELECT count(*) AS n FROM vocab").to_pylist()[0]["n"]
    figure, panels = _panels(1, len(modules))
    for axes, module in zip(panels[0], modules, strict=True):
        rows = atlas.by_prompt(prompt_id, module=module).to_pylist()
        for name, position in _positions(prompt).items():
            points = _ranks(rows, position, module, vocabulary)
            token = shown(texts[position], is_vector, longest=20)
            _line(axes, points, CLASSES[name][1], f"{CLASSES[name][0]}: {token}")
        _rank_axis(axes, module)
        _finish(axes, module)
    title = shown(f"{prompt['prompt']} → {prompt['target']}", is_vector, longest=50 * len(modules))
    figure.suptitle(title, fontsize=11, weight="bold", parse_math=False)
    return figure


def draw_curves(atlas: Atlas, modules: Sequence[str]) -> "Figure":
    """A column a module; from above: the size of δ, the target's rank, the entropy of what is said."""
    rows = atlas.layer_curves().to_pylist()
    figure, panels = _panels(3, len(modules))
    for column, module in enumerate(modules):
        of_module = [row for row in rows if row["module"] == module]
        if not of_module:
            raise BacklensError(f"plot: {atlas.snapshot.directory} has no rows of {module}")
        sizes, ranks, entropies = (panel[column] for panel in panels)
        # An update writes the bottom of δ, so that is the side whose tokens matter there.
        spoken = "bottom_entropy" if module in WRITES else "top_entropy"
        for name, (label, colour) in CLASSES.items():
            of_class = [row for row in of_module if row["position_class"] == name]
            _line(sizes, _positive(_means(of_class, "vjp_norm")), colour, label)
            _line(ranks, _means(of_class, "target_rank"), colour, label)
            _line(entropies, _means(of_class, spoken), colour, label)
        sizes.set_yscale("log")
        for axes, label in (
            (sizes, "mean ‖δ‖"),
            (ranks, "mean rank of the target"),
            (entropies, f"entropy of the {spoken.removesuffix('_entropy')} token (bits)"),
        ):
            axes.set_ylabel(label)
            _finish(axes, module)
    note = "all prompts of the run"
    if atlas.snapshot.shards < atlas.snapshot.record.plan.shards:
        note = f"{atlas.snapshot.shards} of {atlas.snapshot.record.plan.shards} shards of the run"
    figure.suptitle(f"By layer and kind of position, {note}", fontsize=11, weight="bold")
    return figure


def _positions(prompt: Mapping[str, Any]) -> dict[str, int]:
    """The positions worth a line, by class; a subject of one token has one."""
    positions = {"last": prompt["n_tokens"] - 1}
    if prompt["subject_start"] is not None:
        positions["subject_last"] = prompt["subject_end"] - 1
        positions["subject_first"] = prompt["subject_start"]
    first_names: dict[int, str] = {}
    for name, position in positions.items():
        first_names.setdefault(position, name)
    return {name: position for position, name in first_names.items()}


def _ranks(rows: Sequence[Mapping[str, Any]], position: int, module: str, vocabulary: int) -> Points:
    """Of the expert with the largest VJP, where there are experts."""
    loudest: dict[int, tuple[float, int]] = {}
    for row in rows:
        if row["position"] == position and row["target_rank"] is not None:
            standing = loudest.get(row["layer"])
            if standing is None or row["vjp_norm"] > standing[0]:
                loudest[row["layer"]] = (row["vjp_norm"], row["target_rank"])
    return {
        layer: float(vocabulary - 1 - rank if module in WRITES else rank)
        for layer, (_, rank) in loudest.items()
    }


def _rank_axis(axes: "Axes", module: str) -> None:
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=-0.2)
    axes.set_ylabel(
        "tokens below the target\n(0: what an update writes)" if module in WRITES else "rank of the target"
    )


def _means(rows: Sequence[Mapping[str, Any]], column: str) -> Points:
    """By layer, over experts by how many positions each has; what is null is left out, not zero."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        if row[column] is not None:
            sums[row["layer"]][0] += row[column] * row["positions"]
            sums[row["layer"]][1] += row["positions"]
    return {layer: total / weight for layer, (total, weight) in sums.items()}


def _positive(points: Points) -> Points:
    """What a logarithmic axis can show."""
    return {layer: value for layer, value in points.items() if value > 0}


def _line(axes: "Axes", points: Points, colour: str, label: str) -> None:
    if points:
        layers = sorted(points)
        values = [points[layer] for layer in layers]
        axes.plot(layers, values, color=colour, label=label, marker="o", markersize=3, linewidth=1.4)


def _finish(axes: "Axes", module: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(f"{module} ({'shift δ' if module in WRITES else 'imprint x'})", fontsize=9)
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
