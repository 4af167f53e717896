"""What approximate scores settle, and which tokens they leave in doubt.

Scores come a tile of the vocabulary at a time and are known to within an error. A token is certainly above the
target, certainly not, or in doubt; and it is certainly outside a row's list of the k largest, or a candidate.

Shapes: R rows, V scores of a tile.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.selection import GROUP

try:
    from pipeline import kernels
except ImportError:  # without numba
    kernels = None

PAIRS = 2**21
"""Pairs held at once, unless said otherwise. Rows with more than their share are given up (`Pairs.crowded`)."""


class Pairs:
    """(row, token) pairs collected tile after tile, with a number each; rows that collect too many give up."""

    def __init__(self, rows: int, device: torch.device, room: int) -> None:
        self._room = room
        self.crowded: Bool[Tensor, " row"] = torch.zeros(rows, dtype=torch.bool, device=device)
        """Rows that had more than their share of the room: what is held of them is not complete."""
        none = torch.zeros(0, dtype=torch.long, device=device)
        self._parts = [(none, none, none.float())]
        self._held = 0

    def add(self, rows: Int[Tensor, " pair"], ids: Int[Tensor, " pair"], values: Tensor) -> None:
        self._parts.append((rows, ids, values))
        self._held += len(rows)

    def join(self, other: "Pairs") -> None:
        self.crowded |= other.crowded
        self._parts += other._parts
        self._held += other._held

    def full(self) -> bool:
        return self._held > self._room

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
        share = max(self._room // (2 * len(self.crowded)), GROUP)
        self.crowded |= rows.bincount(minlength=len(self.crowded)) > share
        self._parts = [(rows, ids, values)]
        self._parts = [self.take()]
        self._held = len(self._parts[0][0])


class Sieve:
    """Counts what is certainly above each row's target, and collects tokens in doubt and candidates for its lists.

    If k tokens certainly score at least b, a token that certainly scores below b is not among the k largest; every
    other one is a candidate. The k largest lower bounds of *group maxima* are those of k different tokens, so b is
    found without sorting scores; it only grows, so a token is judged by the b of its own tile and again by the last.
    The bottom of a list is the top of the negated row: rows, then the same rows negated, are `places`.
    """

    def __init__(
        self,
        target_score: Float[Tensor, " row"],
        screened: Bool[Tensor, " row"],
        k: int,
        room: int = PAIRS,
    ) -> None:
        """`room` is how many pairs of each kind to hold at once."""
        rows, device = len(target_score), target_score.device
        self.above: Int[Tensor, " row"] = torch.zeros(rows, dtype=torch.long, device=device)
        """Tokens that are certainly above the target."""
        self._target, self._screened = target_score.double(), screened
        self._doubtful = Pairs(rows, device, room)
        self._candidates = Pairs(2 * rows, device, room)
        self._bounds = torch.full((2 * rows, k), -torch.inf, device=device)

    def add(
        self,
        scores: Float[Tensor, "row tile"],
        error: Float[Tensor, " row"],
        start: int,
        spare: Float[Tensor, "row tile"],
    ) -> None:
        """Take a tile that begins at token `start`; `spare` is written over."""
        error32 = _up(error)
        low, high = -_up(error - self._target), _up(error + self._target)
        counting = self._screened & ~self._doubtful.crowded
        listing = self._screened.repeat(2) & ~self._candidates.crowded
        if kernels and scores.device.type == "cpu":
            self._sift(scores, start, low, high, error32, counting, listing)
        else:
            groups = (len(scores), -1, min(GROUP, scores.shape[1]))
            self._count(scores.view(groups), spare.view(groups), low, high, counting, start)
            self._collect(scores.view(groups), error32, listing, start)
        if self._doubtful.full():
            self._doubtful.compact()
        if self._candidates.full():
            self._candidates.compact(self._bounds.amin(-1))

    def join(self, other: "Sieve") -> None:
        """Take what another sieve for the same rows found in other tiles."""
        self.above += other.above
        self._doubtful.join(other._doubtful)
        self._candidates.join(other._candidates)
        bounds = torch.cat([self._bounds, other._bounds], dim=-1)
        self._bounds = bounds.topk(self._bounds.shape[1], sorted=False).values

    def given_up(self) -> Bool[Tensor, " row"]:
        """Rows of which not every pair was kept."""
        return self._doubtful.crowded | self._candidates.crowded.view(2, -1).any(0)

    def doubtful(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Rows and tokens that may be above the target and may not."""
        rows, ids, _ = self._doubtful.take()
        return rows, ids

    def candidates(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Places and tokens that may be among the k largest."""
        places, ids, _ = self._candidates.take(self._bounds.amin(-1))
        return places, ids

    def _count(
        self,
        groups: Float[Tensor, "row group value"],
        spare: Float[Tensor, "row group value"],
        low: Tensor,
        high: Tensor,
        counting: Tensor,
        start: int,
    ) -> None:
        _, count, width = groups.shape
        low, high = (torch.where(counting, bound, torch.nan)[:, None] for bound in (low, high))
        # a comparison that answers in float32 is several times as fast as one that answers in booleans
        above = torch.gt(groups, high[..., None], out=spare).sum(-1)
        self.above += above.sum(-1).long()
        not_below = torch.ge(groups, low[..., None], out=spare).sum(-1)
        rows, chosen = (not_below > above).nonzero(as_tuple=True)
        values = groups.view(-1, width).index_select(0, rows * count + chosen)
        hits, offsets = ((values >= low[rows]) & (values <= high[rows])).nonzero(as_tuple=True)
        self._doubtful.add(rows[hits], chosen[hits] * width + offsets + start, values[hits, offsets])

    def _collect(
        self, groups: Float[Tensor, "row group value"], error: Tensor, listing: Tensor, start: int
    ) -> None:
        rows, count, width = groups.shape
        peaks = torch.cat([groups.amax(-1), -groups.amin(-1)])
        error = error.repeat(2)
        lower = torch.cat([self._bounds, peaks - error[:, None]], dim=-1)
        self._bounds = lower.topk(self._bounds.shape[1], sorted=False).values
        least = torch.where(listing, self._bounds.amin(-1) - error, torch.inf)
        places, chosen = (peaks >= least[:, None]).nonzero(as_tuple=True)
        values = groups.view(-1, width).index_select(0, places % rows * count + chosen)
        values *= torch.where(places < rows, 1.0, -1.0)[:, None]
        hits, offsets = (values >= least[places][:, None]).nonzero(as_tuple=True)
        places = places[hits]
        ids = chosen[hits] * width + offsets + start
        self._candidates.add(places, ids, values[hits, offsets] + error[places])

    def _sift(self, scores: Float[Tensor, "row tile"], start: int, *state: Tensor) -> None:
        """`_count` and `_collect` in one pass."""
        assert kernels
        sift, groups = kernels.sift, max(scores.shape[1] // GROUP, 1)
        room = max(kernels.CAPACITY, 2 * scores.shape[1] + 1)
        arrays = [tensor.numpy() for tensor in (*state, self._bounds, self.above)]
        source = scores.numpy()

        places, place_ids, rows, row_ids = torch.empty(4, room, dtype=torch.long)
        uppers = torch.empty(room)
        out = [part.numpy() for part in (places, place_ids, uppers, rows, row_ids)]
        first = 0
        while first < len(source):
            first, found, doubtful = sift(source, start, groups, *arrays, first, *out)
            self._candidates.add(*(part[:found].clone() for part in (places, place_ids, uppers)))
            self._doubtful.add(rows[:doubtful].clone(), row_ids[:doubtful].clone(), torch.zeros(doubtful))


def _up(values: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Float32 numbers no smaller than float64 ones."""
    rounded = values.float()
    return rounded.nextafter(torch.full_like(rounded, torch.inf))
