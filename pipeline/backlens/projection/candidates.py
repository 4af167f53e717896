"""Candidates for top-k lists, and tokens in doubt about their side of the target, from approximate scores.

Scores come tile by tile of the vocabulary and have a known error. A token is certainly above the target, certainly
not, or in doubt; and it is certainly outside a row's list of the k largest, or a candidate for it.

Shapes: R rows, V scores of a tile.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backlens.projection import topk
from backlens.projection.scores import Tile
from backlens.projection.topk import GROUP

SMALLEST_GROUP = 4
PAIRS = 2**21
"""Default number of pairs held at once. Rows with more than their share are given up (`Pairs.crowded`)."""


def compiled_for(device: torch.device) -> bool:
    """Say whether a compiled pass screens the scores, which never stores those of mixes."""
    return topk.cpu is not None and device.type == "cpu"


def groups_of(width: int, k: int) -> int:
    """Number of groups of a tile's scores: more than k, so that those of the first tile already bound the lists."""
    if width % GROUP:
        return 1  # the end of the vocabulary
    size = GROUP
    while size > SMALLEST_GROUP and width // size < 2 * k:
        size //= 2
    return width // size


class Pairs:
    """(row, token) pairs with a value each, collected tile by tile; a row with too many of them is given up."""

    def __init__(self, rows: int, device: torch.device, room: int) -> None:
        self._room = room
        self.crowded: Bool[Tensor, " row"] = torch.zeros(rows, dtype=torch.bool, device=device)
        """Rows that had more than their share of the room; their pairs are not complete."""
        self.pairs: Int[Tensor, "2 pair"] = torch.zeros(2, 0, dtype=torch.long, device=device)
        """Rows and tokens; undefined from `held` on."""
        self.values: Float[Tensor, " pair"] = torch.zeros(0, device=device)
        self.held = 0

    def reserve(self, more: int) -> None:
        """Make room for `more` pairs behind those that are held."""
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
        """Return the pairs of rows that are not given up, without values below the row's `least`."""
        pairs, values = self.pairs[:, : self.held], self.values[: self.held]
        chosen = ~self.crowded[pairs[0]]
        if least is not None:
            chosen &= values >= least[pairs[0]]
        return pairs[:, chosen], values[chosen]

    def compact(self, least: Float[Tensor, " row"] | None = None) -> None:
        """Drop pairs below `least`, then the rows that still have more than their share."""
        self._replace(self.take(least))
        share = max(self._room // (2 * len(self.crowded)), GROUP)
        self.crowded |= self.pairs[0, : self.held].bincount(minlength=len(self.crowded)) > share
        self._replace(self.take())

    def _replace(self, found: tuple[Tensor, Tensor]) -> None:
        self.held = 0
        self.add(*found)


class Candidates:
    """Counts the tokens above each row's target, and collects tokens in doubt and candidates for its lists.

    If k tokens certainly score at least b, a token that certainly scores below b is not among the k largest; every
    other token is a candidate. The k largest lower bounds of *group maxima* are those of k different tokens, so b is
    found without sorting scores. It only grows, so each token is compared with the b of its own tile and with the last.
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
        """Screen the rows in `screened`. `error` bounds a score's error, in float64; `room` bounds the pairs held."""
        rows, device = len(target_score), target_score.device
        self.above: Int[Tensor, " row"] = torch.zeros(rows, dtype=torch.long, device=device)
        """Number of tokens that are certainly above the target."""
        self._k, target = k, target_score.double()
        self._limits = torch.stack([-_up(error - target), _up(error + target), _up(error)])
        """The lowest and the highest possible score of the target, and the error."""
        self._doubtful = Pairs(rows, device, room)
        self._candidates = Pairs(2 * rows, device, room)
        self._bounds = torch.full((2, rows, k), -torch.inf, device=device)
        self._watched = screened.repeat(3, 1)
        """Rows to count for, and to find the largest and the smallest scores of; without those given up."""

    def add(self, tile: Tile, start: int) -> None:
        """Take a tile that begins at token `start`; overwrites it."""
        if compiled_for(tile.base.device):
            self._screen_tile(tile, start)
            return
        for first, scores in tile.scores():
            groups = scores.view(len(scores), groups_of(scores.shape[1], self._k), -1)
            self._count(groups, first, start)
            self._collect(groups, first, start)
            self._make_room()

    def join(self, other: "Candidates") -> None:
        """Take in what others found for the same rows in other tiles."""
        self.above += other.above
        self._doubtful.join(other._doubtful)
        self._candidates.join(other._candidates)
        bounds = torch.cat([self._bounds, other._bounds], dim=-1)
        self._bounds = bounds.topk(self._bounds.shape[-1], sorted=False).values

    def given_up(self) -> Bool[Tensor, " row"]:
        """Find the rows whose pairs are not complete."""
        return self._doubtful.crowded | self._candidates.crowded.view(2, -1).any(0)

    def doubtful(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Return the rows and tokens that are in doubt about the target."""
        (rows, ids), _ = self._doubtful.take()
        return rows, ids

    def candidates(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Return the places and tokens that may be among the k largest."""
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
        # comparisons into float32 are several times as fast as those into booleans
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

    def _screen_tile(self, tile: Tile, start: int) -> None:
        """Do `_count` and `_collect` in one compiled pass."""
        assert topk.cpu
        base, first = tile.base.numpy(), len(tile.base)
        constant = np.zeros(0, np.float32) if tile.constant is None else tile.constant.numpy()
        for run in tile.runs:
            mixes = run.mixes.numpy()
            rows = mixes.shape[0] * mixes.shape[1]
            screen = partial(topk.cpu.screen_mixes, mixes, base[run.rows], constant, first)
            self._screen(screen, rows, start, base.shape[1])
            first += rows
        if tile.constant is not None:
            tile.base.add_(tile.constant)
        self._screen(partial(topk.cpu.screen, base, 0), len(base), start, base.shape[1])

    def _screen(self, screen: Callable[..., int], rows: int, start: int, width: int) -> None:
        assert topk.cpu
        candidates, doubtful = self._candidates, self._doubtful
        state = [part.numpy() for part in (self._limits, self._watched, self._bounds, self.above)]
        row, held = 0, np.empty(2, np.int64)
        while row < rows:
            for pairs in (candidates, doubtful):
                pairs.reserve(max(topk.cpu.LEAST_ROOM, 2 * width + 1))
            held[:] = candidates.held, doubtful.held
            out = [part.numpy() for part in (candidates.pairs, candidates.values, doubtful.pairs)]
            row = screen(row, start, groups_of(width, self._k), *state, held, *out)
            candidates.held, doubtful.held = held.tolist()
            self._make_room()


def _up(values: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Round float64 numbers up to float32."""
    rounded = values.float()
    return rounded.nextafter(torch.full_like(rounded, torch.inf))
