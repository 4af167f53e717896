"""The largest and smallest of many scores, in a total order: by score, then by smaller token id.

`extremes` selects from scores that are held; `Candidates` from scores that pass by a tile at a time and are known
only to within an error.

Shapes: N rows, V scores of a tile.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GROUP = 64
"""Scores whose maximum is taken first: only groups with a large one can hold one of the top k."""

PAIRS = 2**21
"""Candidates held at once. Rows with more than their share are given up (`Candidates.crowded`)."""


def extremes(
    scores: Float[Tensor, "vector tile"], k: int, largest: bool
) -> tuple[Float[Tensor, "vector k"], Int[Tensor, "vector k"]]:
    """The k largest (smallest) scores of each row in the total order, exactly.

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
    """Each row sorted in the total order."""
    ids, by_id = ids.sort(dim=-1)
    scores, by_score = scores.gather(-1, by_id).sort(dim=-1, descending=largest, stable=True)
    return scores, ids.gather(-1, by_score)


def first_of_rows(
    rows: Int[Tensor, " pair"], ids: Int[Tensor, " pair"], scores: Float[Tensor, " pair"], k: int
) -> tuple[Int[Tensor, "row k"], Float[Tensor, "row k"]]:
    """The k largest scores of every row that occurs, rows ascending; every row occurs at least k times."""
    order = ids.argsort()
    order = order[scores[order].argsort(descending=True, stable=True)]
    order = order[rows[order].argsort(stable=True)]
    rows = rows[order]
    places = torch.arange(len(rows), device=rows.device)
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = rows[1:] != rows[:-1]
    kept = order[places - torch.where(begins, places, 0).cummax(0).values < k]
    return ids[kept].view(-1, k), scores[kept].view(-1, k)


class Pairs:
    """(row, token) pairs collected tile after tile, with a number each; rows that collect too many give up."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.crowded: Bool[Tensor, " row"] = torch.zeros(rows, dtype=torch.bool, device=device)
        """Rows that had more than their share of `PAIRS`: what is held of them is not complete."""
        none = torch.zeros(0, dtype=torch.long, device=device)
        self._parts = [(none, none, none.float())]
        self._held = 0

    def add(self, rows: Int[Tensor, " pair"], ids: Int[Tensor, " pair"], values: Tensor) -> None:
        self._parts.append((rows, ids, values))
        self._held += len(rows)

    def full(self) -> bool:
        return self._held > PAIRS

    def take(self, least: Float[Tensor, " row"] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs of the rows that have not given up, without those whose value is below the row's `least`."""
        rows, ids, values = (torch.cat(part) for part in zip(*self._parts, strict=True))
        keep = ~self.crowded[rows]
        if least is not None:
            keep &= values >= least[rows]
        return rows[keep], ids[keep], values[keep]

    def compact(self, least: Float[Tensor, " row"] | None = None) -> None:
        """Let go of pairs below `least`, then of the rows that still have more than their share."""
        rows, ids, values = self.take(least)
        share = max(PAIRS // (2 * len(self.crowded)), GROUP)
        self.crowded |= rows.bincount(minlength=len(self.crowded)) > share
        self._parts = [(rows, ids, values)]
        self._parts = [self.take()]
        self._held = len(self._parts[0][0])


class Candidates:
    """Every token that may be among a row's k largest scores, when scores are known to within an error.

    If k tokens certainly score at least b, a token that certainly scores below b is not among the k largest; every
    other one is a candidate. The k largest lower bounds of *group maxima* are those of k different tokens, so b is
    found without sorting scores; it only grows, so a token is judged by the b of its own tile and again by the last.
    """

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.pairs = Pairs(rows, device)
        self._bounds = torch.full((rows, k), -torch.inf, device=device)

    @property
    def bound(self) -> Float[Tensor, " row"]:
        return self._bounds.amin(-1)

    def raise_bound(self, peaks: Float[Tensor, "row group"], error: Float[Tensor, " row"]) -> None:
        lower = torch.cat([self._bounds, peaks - error[:, None]], dim=-1)
        self._bounds = lower.topk(self._bounds.shape[1], sorted=False).values

    def add(self, rows: Tensor, ids: Tensor, upper: Tensor) -> None:
        self.pairs.add(rows, ids, upper)
        if self.pairs.full():
            self.pairs.compact(self.bound)

    def take(self) -> tuple[Tensor, Tensor]:
        rows, ids, _ = self.pairs.take(self.bound)
        return rows, ids


class Extremes:
    """The k largest (or smallest) scores of every row so far, with their token ids."""

    def __init__(self, k: int, largest: bool) -> None:
        self._k = k
        self._largest = largest
        self._found: list[tuple[Tensor, Tensor]] = []

    def add(self, scores_NV: Float[Tensor, "vector tile"], start: int) -> None:
        scores, ids = extremes(scores_NV, min(self._k, scores_NV.shape[-1]), self._largest)
        self._found.append((scores, ids + start))

    def sorted(self) -> tuple[Int[Tensor, "vector k"], Float[Tensor, "vector k"]]:
        scores, ids = concatenated(self._found)
        scores, ids = in_order(scores, ids, self._largest)
        # copies: a slice would keep every tile's candidates alive as long as the rows
        return ids[:, : self._k].int(), scores[:, : self._k].clone()


def concatenated(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return first, second
