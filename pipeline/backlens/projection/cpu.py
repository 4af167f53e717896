"""Loops that read memory once, compiled for CPUs by numba.

As PyTorch operations the same work is a dozen passes over the scores; those run on GPUs and where numba is missing.
`benchmarks/project.py` compares the two.

Shapes: R rows, V tile, D d_model, P pairs.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numba import njit

ONE, ZERO = np.float32(1), np.float32(0)

COLUMNS = 32
"""Columns per block of a row's scores; a column is a group."""

STRETCH, TOGETHER = 1024, 32
"""Scores of a mix that are summed at once, and mixes that are summed before they are screened."""

LEAST_ROOM = 2**14
"""Number of pairs that there is room for when `screen` begins."""


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile at the first call, to run without the GIL, and cache on disk for the next process where possible."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            found: Any = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder for its cache
            return njit(nogil=True, **options)(function)
        save = found._cache.save_overload

        def save_if_possible(*compilation: Any) -> None:
            with suppress(OSError):  # a full disk would end the computation
                save(*compilation)

        found._cache.save_overload = save_if_possible
        return found

    return decorate


@compiled()
def _fold(values, columns, low, high, top, bottom, above, not_below):
    """Write each column's largest and smallest score, and its number of scores above `high` and not below `low`.

    Column g has scores g, g + columns, g + 2 columns … of the block; neighbours are in different columns, so that the
    inner loops become vector instructions.
    """
    for g in range(columns):
        top[g] = values[g]
        bottom[g] = values[g]
        above[g] = ZERO
        not_below[g] = ZERO
    each = len(values) // columns
    for j in range(0, each - 3, 4):
        a, b = values[j * columns : (j + 1) * columns], values[(j + 1) * columns : (j + 2) * columns]
        c, d = values[(j + 2) * columns : (j + 3) * columns], values[(j + 3) * columns : (j + 4) * columns]
        for g in range(columns):
            w, x, y, z = a[g], b[g], c[g], d[g]
            top[g] = _larger(top[g], _larger(_larger(w, x), _larger(y, z)))
            bottom[g] = _smaller(bottom[g], _smaller(_smaller(w, x), _smaller(y, z)))
            above[g] += (_one(w > high) + _one(x > high)) + (_one(y > high) + _one(z > high))
            not_below[g] += (_one(w >= low) + _one(x >= low)) + (_one(y >= low) + _one(z >= low))
    for i in range(each // 4 * 4 * columns, each * columns):
        g, w = i % columns, values[i]
        top[g] = _larger(top[g], w)
        bottom[g] = _smaller(bottom[g], w)
        above[g] += _one(w > high)
        not_below[g] += _one(w >= low)


@compiled()
def _first_and_step(g, groups, each):
    """Return the index of group g's first score in a row, and the distance between its scores."""
    block = g // COLUMNS * COLUMNS
    return block * each + g - block, min(COLUMNS, groups - block)


@compiled()
def _larger(a, b):
    return a if a > b else b


@compiled()
def _smaller(a, b):
    return a if a < b else b


@compiled()
def _one(condition):
    return ONE if condition else ZERO


@compiled()
def _raise(bounds, peaks, error):
    """Keep the k largest of `bounds` and peaks − error, in any order; return the smallest of them."""
    place = np.argmin(bounds)
    for g in range(len(peaks)):
        lower = peaks[g] - error
        if lower > bounds[place]:
            bounds[place] = lower
            place = np.argmin(bounds)
    return bounds[place]


@compiled()
def _screen_row(values, r, start, limits, watched, bounds, above, held, candidates, uppers, doubts, peaks):
    """Screen a row's scores for one tile; overwrites `peaks`."""
    groups, found = peaks.shape[1], held[0]
    each = len(values) // groups
    low, high, error = limits[0, r], limits[1, r], limits[2, r]
    top, bottom, over, not_below = peaks[0], peaks[1], peaks[2], peaks[3]
    for first in range(0, groups, COLUMNS):
        part = slice(first, min(first + COLUMNS, groups))
        block = values[part.start * each : part.stop * each]
        _fold(block, part.stop - first, low, high, top[part], bottom[part], over[part], not_below[part])
    if watched[0, r]:
        _count(values, r, start, low, high, over, not_below, above, held, doubts)
    for side in range(2):
        if not watched[1 + side, r]:
            continue
        sign = ONE
        if side == 1:
            sign = -ONE
            for g in range(groups):
                top[g] = -bottom[g]
        highest = top[0]
        for g in range(groups):
            highest = _larger(highest, top[g])
        least = np.min(bounds[side, r])
        if highest - error > least:
            least = _raise(bounds[side, r], top, error)
        least -= error
        for g in range(groups if highest >= least else 0):
            if top[g] >= least:
                i, step = _first_and_step(g, groups, each)
                for _ in range(each):
                    if sign * values[i] >= least:
                        candidates[0, found] = side * len(above) + r
                        candidates[1, found] = start + i
                        uppers[found] = sign * values[i] + error
                        found += 1
                    i += step
    held[0] = found


@compiled()
def _count(values, r, start, low, high, over, not_below, above, held, doubts):
    """Add the number of tokens above the target, and write down those in doubt."""
    groups, doubtful = len(over), held[1]
    each = len(values) // groups
    certain = possible = ZERO
    for g in range(groups):
        certain += over[g]
        possible += not_below[g]
    above[r] += np.int64(certain)
    for g in range(groups if possible > certain else 0):
        if not_below[g] > over[g]:
            i, step = _first_and_step(g, groups, each)
            for _ in range(each):
                # written in any case: a branch that the processor mispredicts costs more
                doubts[0, doubtful] = r
                doubts[1, doubtful] = start + i
                doubtful += np.int64((values[i] >= low) & (values[i] <= high))
                i += step
    held[1] = doubtful


@compiled()
def screen(
    scores, first, row, start, groups, limits, watched, bounds, above, held, candidates, uppers, doubts
):
    """Screen one tile of the rows from `first` on in one pass; see `candidates.Candidates.add`.

    Begins with the tile's row `row`, and returns the row to continue with when there may be no room for its pairs.
    Writes to `candidates` and `uppers` from held[0] on, and to `doubts` from held[1] on, and updates `held`.
    """
    width = scores.shape[1]
    peaks = np.empty((4, groups), np.float32)
    for i in range(row, len(scores)):
        if held[0] + 2 * width > candidates.shape[1] or held[1] + width >= doubts.shape[1]:
            return i
        r = first + i
        if watched[0, r] or watched[1, r] or watched[2, r]:
            _screen_row(
                scores[i], r, start, limits, watched, bounds, above, held, candidates, uppers, doubts, peaks
            )
    return len(scores)


@compiled(fastmath={"contract"})
def _mix(mixes, base, first, out):
    """out[k] = Σ mixes[k, t] · base[first + t], four terms at a time, in stretches that stay in a core's cache."""
    count = mixes.shape[1]
    for start in range(0, out.shape[1], STRETCH):
        part = slice(start, min(start + STRETCH, out.shape[1]))
        for k in range(len(mixes)):
            mine, sums = mixes[k], out[k][part]
            for v in range(len(sums)):
                sums[v] = ZERO
            for t in range(0, count - 3, 4):
                a, b, c, d = mine[t], mine[t + 1], mine[t + 2], mine[t + 3]
                w, x = base[first + t][part], base[first + t + 1][part]
                y, z = base[first + t + 2][part], base[first + t + 3][part]
                for v in range(len(sums)):
                    sums[v] += (a * w[v] + b * x[v]) + (c * y[v] + d * z[v])
            for t in range(count // 4 * 4, count):
                a, w = mine[t], base[first + t][part]
                for v in range(len(sums)):
                    sums[v] += a * w[v]


@compiled()
def screen_mixes(
    mixes,
    base,
    constant,
    first,
    row,
    start,
    groups,
    limits,
    watched,
    bounds,
    above,
    held,
    candidates,
    uppers,
    doubts,
):
    """Screen mixes (prompt, mix, term) of a tile's base rows; their scores stay in a core's cache.

    `base` has the prompts' terms, one after the other, without the constant; `constant` is empty if there is none.
    The other arguments are those of `screen`.
    """
    width = base.shape[1]
    prompts, each, count = mixes.shape
    scores = np.empty((min(each, TOGETHER), width), np.float32)
    while row < prompts * each:
        prompt, mix = row // each, row % each
        some = min(TOGETHER, each - mix)
        _mix(mixes[prompt][mix : mix + some], base, prompt * count, scores)
        for k in range(some):
            mine = scores[k]
            for v in range(len(constant)):
                mine[v] += constant[v]
        done = screen(
            scores[:some], first + row, 0, start, groups, limits, watched, bounds, above, held, candidates, uppers,
            doubts,
        )  # fmt: skip
        row += done
        if done < some:
            break
    return row


@compiled(fastmath={"reassoc", "contract"})
def dots(wide, unembedding, rows, ids, products, first, stop):
    """Compute products[p] = wide[rows[p]] · unembedding[ids[p]] in float64, for pairs first to stop.

    The order of the sum is unspecified, but the same for every pair.
    """
    for p in range(first, stop):
        mine, theirs = wide[rows[p]], unembedding[ids[p]]
        total = 0.0
        for d in range(len(mine)):
            total += mine[d] * np.float64(theirs[d])
        products[p] = total


@compiled()
def first_of_rows(rows, ids, scores, first_ids, first_scores, held):
    """Insert each pair into its row's list of the largest scores, ordered as in `topk.py`.

    `held` is the number of filled places of each list.
    """
    k = first_ids.shape[1]
    for p in range(len(rows)):
        row, token, score = rows[p], ids[p], scores[p]
        mine, theirs = first_scores[row], first_ids[row]
        place = held[row]
        if place == k:
            place -= 1
            if not (score > mine[place] or (score == mine[place] and token < theirs[place])):
                continue
        else:
            held[row] += 1
        while place > 0 and (
            score > mine[place - 1] or (score == mine[place - 1] and token < theirs[place - 1])
        ):
            mine[place], theirs[place] = mine[place - 1], theirs[place - 1]
            place -= 1
        mine[place], theirs[place] = score, token
