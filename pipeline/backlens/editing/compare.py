"""Comparison of a sweep's trials: scores with bootstrap intervals over cases, and the best trial per method."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from backlens.editing.evaluate import KINDS
from backlens.errors import BacklensError
from backlens.store.directory import Directory
from backlens.store.run_record import load_run
from backlens.store.status import read_table

RESAMPLES = 1000
LEVEL = 95
"""Share of the resamples in an interval, in percent."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over cases (or a score of means) with the interval of 95 % of its bootstrap resamples; 0 to 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f}–{100 * self.high:.1f})"


@dataclass(frozen=True, slots=True)
class TrialScore:
    """Figures of one trial over its cases."""

    method: str
    layer: int
    lr: float | None
    at_once: int
    cases: int
    efficacy: Interval
    paraphrase: Interval
    neighbourhood: Interval
    score: Interval
    """S: the harmonic mean of the three; 0 if one of them is 0."""
    untouched: float | None
    perplexity: float | None
    seconds: float
    """Mean seconds per case, for the edit and its evaluation."""


def trial_scores(out: str) -> list[TrialScore]:
    """Scores of every trial that has cases with all three figures, in the order of the grid.

    Raises BacklensError if there are none.
    """
    directory = Directory.at(out)
    load_run(directory, "sweep")
    rows = read_table(directory, "edits")
    if not rows.num_rows:
        raise BacklensError(f"{out}: holds no edits yet; the same `backlens edit sweep` goes on with it")
    trials = np.asarray(rows["trial"])
    scores = [_score(rows.filter(pa.array(trials == trial))) for trial in np.unique(trials)]
    found = [score for score in scores if score is not None]
    if not found:
        raise BacklensError(f"{out}: no case has efficacy, paraphrase and neighbourhood figures to compare")
    return found


def best_trials(scores: Sequence[TrialScore]) -> list[TrialScore]:
    """The trial with the highest S, per method and number of edits at once."""
    best: dict[tuple[str, int], TrialScore] = {}
    for each in scores:
        key = each.method, each.at_once
        if key not in best or each.score.value > best[key].score.value:
            best[key] = each
    return list(best.values())


def _score(rows: pa.Table) -> TrialScore | None:
    figures = np.stack([rows[kind].to_numpy().astype(float) for kind in KINDS])  # (kind, case)
    figures = figures[:, ~np.isnan(figures).any(0)]
    if not figures.size:
        return None
    drawn = np.random.default_rng(0).integers(0, figures.shape[1], (RESAMPLES, figures.shape[1]))
    resampled = np.stack([kind[drawn].mean(-1) for kind in figures])  # (kind, resample)
    efficacy, paraphrase, neighbourhood = (
        _interval(kind.mean(), again) for kind, again in zip(figures, resampled, strict=True)
    )
    first = rows.slice(0, 1).to_pylist()[0]
    return TrialScore(
        first["method"],
        first["layer"],
        first["lr"],
        first["at_once"],
        figures.shape[1],
        efficacy,
        paraphrase,
        neighbourhood,
        _interval(_harmonic(figures.mean(-1)[:, None])[0], _harmonic(resampled)),
        _mean(rows, "untouched"),
        _mean(rows, "perplexity"),
        float(np.mean(rows["seconds_edit"].to_numpy() + rows["seconds_evaluate"].to_numpy())),
    )


def _harmonic(values: np.ndarray) -> np.ndarray:
    """Harmonic mean over kinds; 0 if one of them is 0."""
    with np.errstate(divide="ignore"):
        return len(values) / (1 / values).sum(0)


def _interval(value: float, resampled: np.ndarray) -> Interval:
    edge = (100 - LEVEL) / 2
    low, high = np.percentile(resampled, [edge, 100 - edge])
    return Interval(float(value), float(low), float(high))


def _mean(rows: pa.Table, column: str) -> float | None:
    values = [each for each in rows[column].to_pylist() if each is not None]
    return sum(values) / len(values) if values else None
