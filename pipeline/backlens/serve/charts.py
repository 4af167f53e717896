"""The geometry of small charts; `templates/_parts.html` writes them as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from backlens.heatmap import Points

WIDTH, HEIGHT = 330, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 10, 24

Scale = Literal["linear", "log", "rank"]


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a line, in pixels, with its tooltip."""

    x: float
    y: float
    tooltip: str


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    label: str
    style: int
    """The number of the line style in the style sheet."""
    dots: Sequence[Dot]

    @property
    def path(self) -> str:
        return " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in self.dots)


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis, in pixels."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A line chart over layers."""

    title: str
    series: Sequence[Series]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    width: int = WIDTH
    height: int = HEIGHT


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram, in pixels, with its tooltip."""

    x: float
    y: float
    width: float
    height: float
    tooltip: str


@dataclass(frozen=True, slots=True)
class Bars:
    """A histogram."""

    title: str
    bars: Sequence[Bar]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    width: int = WIDTH
    height: int = HEIGHT


def line_chart(title: str, lines: Sequence[tuple[str, Points]], scale: Scale) -> Chart:
    """A chart of the lines that have points. The scale `log` leaves out values of 0, the scale `rank` keeps them."""
    drawn = [
        (style, label, {x: y for x, y in points.items() if scale != "log" or y > 0})
        for style, (label, points) in enumerate(lines)
    ]
    drawn = [(style, label, points) for style, label, points in drawn if points]
    values = [y for *_, points in drawn for y in points.values()]
    layers = sorted({x for *_, points in drawn for x in points})
    if not values:
        return Chart(title, [], [], [])
    low, high = _ends(values, scale)

    def at(x: float, y: float) -> tuple[float, float]:
        return _across(x, layers[0], layers[-1]), _up(
            _scaled(y, scale), _scaled(low, scale), _scaled(high, scale)
        )

    series = [
        Series(label, style, [Dot(*at(x, y), f"layer {x}: {y:.4g}") for x, y in sorted(points.items())])
        for style, label, points in drawn
    ]
    x_ticks = [Tick(at(x, low)[0], str(x)) for x in _some(layers, 9)]
    y_ticks = [
        Tick(at(layers[0], y)[1], f"{y:,.0f}" if y >= 1000 else f"{y:.3g}") for y in _marks(low, high, scale)
    ]
    return Chart(title, series, x_ticks, y_ticks)


def histogram(title: str, counts: Sequence[tuple[float, float, int]]) -> Bars:
    """A histogram from 0 on; each bar is (from, to, count)."""
    if not counts:
        return Bars(title, [], [], [])
    right, most = max(end for _, end, _ in counts), max(count for *_, count in counts)
    bars = []
    for start, end, count in counts:
        x, y = _across(start, 0.0, right), _up(count, 0, most)
        tooltip = f"{count} prompts with a norm from {start:.3g} to {end:.3g}"
        bars.append(Bar(x + 0.5, y, _across(end, 0.0, right) - x - 1, HEIGHT - BOTTOM - y, tooltip))
    x_ticks = [Tick(_across(right * part / 4, 0.0, right), f"{right * part / 4:.2g}") for part in range(5)]
    return Bars(title, bars, x_ticks, [Tick(_up(y, 0, most), str(y)) for y in sorted({0, most})])


def _across(x: float, low: float, high: float) -> float:
    share = (x - low) / (high - low) if high > low else 0.5
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _up(y: float, low: float, high: float) -> float:
    share = (y - low) / (high - low) if high > low else 0.5
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _scaled(y: float, scale: Scale) -> float:
    if scale == "linear":
        return y
    return math.log10(y) if scale == "log" else math.log10(1 + y)


def _ends(values: Sequence[float], scale: Scale) -> tuple[float, float]:
    low, high = min(values), max(values)
    if scale == "log":
        return 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
    return 0.0, high or 1.0


def _marks(low: float, high: float, scale: Scale) -> list[float]:
    if scale == "log":
        first, last = round(math.log10(low)), round(math.log10(high))
        return [10.0**power for power in _some(range(first, last + 1), 5)]
    if scale == "rank":
        powers = [10.0**power for power in range(math.floor(math.log10(max(high, 1.0))) + 1)]
        return [0.0, *powers]
    return [high * part / 4 for part in range(5)]


def _some(items: Sequence[int], most: int) -> list[int]:
    step = -(-len(items) // most)
    return list(items[::step])
