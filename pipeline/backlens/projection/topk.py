"""The largest and smallest of many scores, ordered by score, then by smaller token id.

Shapes: N rows, V scores of a tile.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

try:
    from backlens.projection import cpu
except ImportError:  # without numba
    cpu = None

GROUP = 64
"""Scores per group. Maxima of groups are compared first: only a group with a large one can hold one of the k."""


def extremes(
    scores: Float[Tensor, "vector tile"], k: int, largest: bool
) -> tuple[Float[Tensor, "vector k"], Int[Tensor, "vector k"]]:
    """Find the k largest (smallest) scores of each row, in order.

    Group maxima first: when the (k + 1)-th candidate is strictly below the k-th, no score outside the k + 1
    chosen groups can belong to the list. A row where they are equal is sorted whole, to break the tie by id.
    """
    width = scores.shape[-1]
    grouped = width // GROUP * GROUP
    if width <= k:
        ids = torch.arange(width, device=scores.device).expand_as(scores)
        return in_order(scores, ids, largest)
    if grouped // GROUP > 2 * (k + 1):
        groups = scores[:, :grouped].unflatten(-1, (-1, GROUP))
        peaks = groups.amax(-1) if largest else groups.amin(-1)
        chosen = peaks.topk(k + 1, largest=largest, sorted=False).indices
        offsets = torch.arange(GROUP, device=scores.device)
        ids = (chosen[..., None] * GROUP + offsets).flatten(1)
        rest = torch.arange(grouped, width, device=scores.device).expand(len(scores), -1)
        ids = torch.cat([ids, rest], dim=-1)
        candidates = scores.gather(-1, ids)
        values, places = candidates.topk(k + 1, largest=largest)
        ids = ids.gather(-1, places)
    else:
        values, ids = scores.topk(k + 1, largest=largest)
    tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(-1)
    values, ids = in_order(values[:, :k], ids[:, :k], largest)
    if len(tied):
        whole, order = scores[tied].sort(dim=-1, descending=largest, stable=True)
        values[tied], ids[tied] = whole[:, :k], order[:, :k]
    return values, ids


def in_order(
    scores: Float[Tensor, "vector value"], ids: Int[Tensor, "vector value"], largest: bool
) -> tuple[Float[Tensor, "vector value"], Int[Tensor, "vector value"]]:
    """Sort each row by score, then by id."""
    ids, by_id = ids.sort(dim=-1)
    scores, by_score = scores.gather(-1, by_id).sort(dim=-1, descending=largest, stable=True)
    return scores, ids.gather(-1, by_score)


def first_of_rows(
    rows: Int[Tensor, " pair"], ids: Int[Tensor, " pair"], scores: Float[Tensor, " pair"], k: int
) -> tuple[Int[Tensor, "row k"], Float[Tensor, "row k"]]:
    """Find the k largest scores of every row that occurs, in ascending order of rows.

    Every row has to occur at least k times.
    """
    if cpu and rows.device.type == "cpu":
        count = int(rows.max()) + 1 if len(rows) else 0
        first_ids, first_scores = ids.new_empty(count, k), scores.new_empty(count, k)
        held = rows.new_zeros(count)
        cpu.first_of_rows(*(tensor.numpy() for tensor in (rows, ids, scores, first_ids, first_scores, held)))
        return first_ids[held > 0], first_scores[held > 0]
    order = ids.argsort()
    order = order[scores[order].argsort(descending=True, stable=True)]
    order = order[rows[order].argsort(stable=True)]
    rows = rows[order]
    places = torch.arange(len(rows), device=rows.device)
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = rows[1:] != rows[:-1]
    first = order[places - torch.where(begins, places, 0).cummax(0).values < k]
    return ids[first].view(-1, k), scores[first].view(-1, k)


class Extremes:
    """Collects the k largest (or smallest) scores of every row, and their token ids, tile by tile."""

    def __init__(self, k: int, largest: bool) -> None:
        self._k = k
        self._largest = largest
        self._found: list[tuple[Tensor, Tensor]] = []

    def add(self, scores_NV: Float[Tensor, "vector tile"], start: int) -> None:
        """Take the scores of a tile that begins at token `start`."""
        scores, ids = extremes(scores_NV, min(self._k, scores_NV.shape[-1]), self._largest)
        self._found.append((scores, ids + start))

    def sorted(self) -> tuple[Int[Tensor, "vector k"], Float[Tensor, "vector k"]]:
        """Return token ids and scores, in order."""
        scores, ids = (torch.cat(parts, dim=-1) for parts in zip(*self._found, strict=True))
        scores, ids = in_order(scores, ids, self._largest)
        # copies: a slice would keep every tile's candidates alive as long as the rows
        return ids[:, : self._k].int(), scores[:, : self._k].clone()
