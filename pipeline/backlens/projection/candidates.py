"""What approximate scores settle, and which tokens they leave in doubt.

Scores come a tile of the vocabulary at a time and are known to within an error. A token is certainly above the
target, certainly not, or in doubt; and it is certainly outside a row's list of the k largest, or a candidate.

Shapes: R rows, V scores of a tile.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backlens.projection.float32_bound import Tile
from backlens.projection.topk import GROUP

try:
    from backlens.projection import cpu as kernels
except ImportError:  # without numba
    kernels = None


SMALLEST_GROUP = 4
PAIRS = 2**21
"""Pairs held at once, unless said otherwise. Rows with more than their share are given up (`Pairs.crowded`)."""


def compiled_for(device: torch.device) -> bool:
    """Whether scores are sifted in a compiled pass, in which mixes are never stored."""
    return kernels is not None and device.type == "cpu"


def groups_of(width: int, k: int) -> int:
    """How many groups a tile's scores are taken in: more than k, so that the first tile's already bound the lists."""
    if width % GROUP:
        return 1  # the vocabulary's rest
    size = GROUP
    while size > SMALLEST_GROUP and width // size < 2 * k:
        size //= 2
    return width // size


class Pairs:
    """(row, token) pairs collected tile after tile, with a number each; rows that collect too many give up."""

    def __init__(self, rows: int, device: torch.device, room: int) -> None:
        self._room = room
        self.crowded: Bool[Tensor, " row"] = torch.zeros(rows, dtype=torch.bool, device=device)
        """Rows that had more than their share of the room: what is held of them is not complete."""
        self.pairs: Int[Tensor, "2 pair"] = torch.zeros(2, 0, dtype=torch.long, device=device)
        """Rows and tokens; of no meaning from `held` on."""
        self.values: Float[Tensor, " pair"] = torch.zeros(0, device=device)
        self.held = 0

    def reserve(self, more: int) -> None:
        """Make sure that `more` pairs can be written behind those that are held."""
        size = len(self.values)
        if self.held + more > size:
            size = max(2 * size, self.held + more)
            pairs, values = self.pairs.new_empty(2, size), self.values.new_empty(size)
            pairs[:, : self.held], values[: self.held] = self.pairs[:, : self.held], self.values[: self.held]
            self.pairs, self.values = pairs, values

    def add(self, pairs: Int[Tensor, "2 pair"], values: Float[Tensor, " pair"]) -> None:
        self.reserve(len(values))
        part = slice(self.held, self.held + len(values))
        self.pairs[:, part], self.values[part] = pairs, values
        self.held = part.stop

    def join(self, other: "Pairs") -> None:
        self.crowded |= other.crowded
        self.add(other.pairs[:, : other.held], other.values[: other.held])

    def full(self) -> bool:
        return self.held > self._room

    def take(self, least: Float[Tensor, " row"] | None = None) -> tuple[Tensor, Tensor]:
        """All pairs of the rows that have not given up, without those whose value is below the row's `least`."""
        pairs, values = self.pairs[:, : self.held], self.values[: self.held]
        keep = ~self.crowded[pairs[0]]
        if least is not None:
            keep &= values >= least[pairs[0]]
        return pairs[:, keep], values[keep]

    def compact(self, least: Float[Tensor, " row"] | None = None) -> None:
        """Let go of pairs below `least`, then of the rows that still have more than their share."""
        self._keep(self.take(least))
        share = max(self._room // (2 * len(self.crowded)), GROUP)
        self.crowded |= self.pairs[0, : self.held].bincount(minlength=len(self.crowded)) > share
        self._keep(self.take())

    def _keep(self, found: tuple[Tensor, Tensor]) -> None:
        self.held = 0
        self.add(*found)


class Candidates:
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
        error: Float[Tensor, " row"],
        k: int,
        room: int = PAIRS,
    ) -> None:
        """`error` is how far a score may be off, in float64; `room` is how many pairs of each kind to hold at once."""
        rows, device = len(target_score), target_score.device
        self.above: Int[Tensor, " row"] = torch.zeros(rows, dtype=torch.long, device=device)
        """Tokens that are certainly above the target."""
        self._k, target = k, target_score.double()
        self._limits = torch.stack([-_up(error - target), _up(error + target), _up(error)])
        """The lowest and the highest score that may be the target's, and the error."""
        self._doubtful = Pairs(rows, device, room)
        self._candidates = Pairs(2 * rows, device, room)
        self._bounds = torch.full((2, rows, k), -torch.inf, device=device)
        self._watched = screened.repeat(3, 1)
        """Rows to count for, to list the largest of and the smallest: not those that have given up."""

    def add(self, tile: Tile, start: int) -> None:
        """Take a tile that begins at token `start`; it is written over."""
        if compiled_for(tile.base.device):
            self._sift_tile(tile, start)
            return
        for first, scores in tile.scores():
            groups = scores.view(len(scores), groups_of(scores.shape[1], self._k), -1)
            self._count(groups, first, start)
            self._collect(groups, first, start)
            self._make_room()

    def join(self, other: "Candidates") -> None:
        """Take what another sieve for the same rows found in other tiles."""
        self.above += other.above
        self._doubtful.join(other._doubtful)
        self._candidates.join(other._candidates)
        bounds = torch.cat([self._bounds, other._bounds], dim=-1)
        self._bounds = bounds.topk(self._bounds.shape[-1], sorted=False).values

    def given_up(self) -> Bool[Tensor, " row"]:
        """Rows of which not every pair was kept."""
        return self._doubtful.crowded | self._candidates.crowded.view(2, -1).any(0)

    def doubtful(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Rows and tokens that may be above the target and may not."""
        (rows, ids), _ = self._doubtful.take()
        return rows, ids

    def candidates(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Places and tokens that may be among the k largest."""
        (places, ids), _ = self._candidates.take(self._bounds.amin(-1).flatten())
        return places, ids

    def _make_room(self) -> None:
        if self._doubtful.full():
            self._doubtful.compact()
            self._watched[0] &= ~self._doubtful.crowded
        if self._candidates.full():
            self._candidates.compact(self._bounds.amin(-1).flatten())
            self._watched[1:] &= ~self._candidates.crowded.view(2, -1)

    def _count(self, groups: Float[Tensor, "some group value"], first: int, start: int) -> None:
        some, count, width = groups.shape
        part = slice(first, first + some)
        low, high = torch.where(self._watched[0, part], self._limits[:2, part], torch.nan)
        # a comparison that answers in float32 is several times as fast as one that answers in booleans
        spare = torch.empty_like(groups)
        above = torch.gt(groups, high[:, None, None], out=spare).sum(-1)
        self.above[part] += above.sum(-1).long()
        not_below = torch.ge(groups, low[:, None, None], out=spare).sum(-1)
        rows, chosen = (not_below > above).nonzero(as_tuple=True)
        values = groups.view(-1, width).index_select(0, rows * count + chosen)
        hits, offsets = ((values >= low[rows, None]) & (values <= high[rows, None])).nonzero(as_tuple=True)
        ids = chosen[hits] * width + offsets + start
        self._doubtful.add(torch.stack([rows[hits] + first, ids]), values[hits, offsets])

    def _collect(self, groups: Float[Tensor, "some group value"], first: int, start: int) -> None:
        some, count, width = groups.shape
        part = slice(first, first + some)
        peaks = torch.stack([groups.amax(-1), -groups.amin(-1)])
        error = self._limits[2, part]
        lower = torch.cat([self._bounds[:, part], peaks - error[:, None]], dim=-1)
        bounds = lower.topk(self._bounds.shape[-1], sorted=False).values
        self._bounds[:, part] = bounds
        least = torch.where(self._watched[1:, part], bounds.amin(-1) - error, torch.inf)
        sides, rows, chosen = (peaks >= least[..., None]).nonzero(as_tuple=True)
        values = groups.view(-1, width).index_select(0, rows * count + chosen)
        values *= torch.where(sides == 0, 1.0, -1.0)[:, None]
        hits, offsets = (values >= least[sides, rows][:, None]).nonzero(as_tuple=True)
        rows = rows[hits]
        places = sides[hits] * len(self.above) + rows + first
        ids = chosen[hits] * width + offsets + start
        self._candidates.add(torch.stack([places, ids]), values[hits, offsets] + error[rows])

    def _sift_tile(self, tile: Tile, start: int) -> None:
        """`_count` and `_collect` in one compiled pass."""
        assert kernels
        base, first = tile.base.numpy(), len(tile.base)
        constant = np.zeros(0, np.float32) if tile.constant is None else tile.constant.numpy()
        for run in tile.runs:
            mixes = run.mixes.numpy()
            rows = mixes.shape[0] * mixes.shape[1]
            sift = partial(kernels.sift_mixes, mixes, base[run.rows], constant, first)
            self._sift(sift, rows, start, base.shape[1])
            first += rows
        if tile.constant is not None:
            tile.base.add_(tile.constant)
        self._sift(partial(kernels.sift, base, 0), len(base), start, base.shape[1])

    def _sift(self, sift: Callable[..., int], rows: int, start: int, width: int) -> None:
        assert kernels
        candidates, doubtful = self._candidates, self._doubtful
        state = [part.numpy() for part in (self._limits, self._watched, self._bounds, self.above)]
        row, held = 0, np.empty(2, np.int64)
        while row < rows:
            for pairs in (candidates, doubtful):
                pairs.reserve(max(kernels.LEAST_ROOM, 2 * width + 1))
            held[:] = candidates.held, doubtful.held
            out = [part.numpy() for part in (candidates.pairs, candidates.values, doubtful.pairs)]
            row = sift(row, start, groups_of(width, self._k), *state, held, *out)
            candidates.held, doubtful.held = held.tolist()
            self._make_room()


def _up(values: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Float32 numbers no smaller than float64 ones."""
    rounded = values.float()
    return rounded.nextafter(torch.full_like(rounded, torch.inf))
