"""Exact top-k, bottom-k, target score and target rank of many vectors through the lens.

All vectors of a group are projected together, a tile of the vocabulary at a time. A pass in float32 with a proven
error (`screening.py`) settles nearly every token: those certainly outside a list, and those certainly above or
below the target. The few others are scored again as scores are defined, in float64 rounded to float32; so lists and
ranks are those of a full sort of these scores, and do not depend on how the work was cut. Rows that leave too many
tokens in doubt (all scores equal, lengths near overflow) are scored over the whole vocabulary that way.

Order is total: by score, then by smaller token id.

Shapes: B prompts, T positions, K mixes a prompt, R rows screened, V vocabulary, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.lanes import Lanes, lanes, parts
from pipeline.lens import Lens
from pipeline.screening import Exact, Precision, Prepared, Run, Screen, Spread, prepare
from pipeline.selection import GROUP, Extremes, extremes, first_of_rows
from pipeline.sieve import PAIRS, Sieve, compiled_for

__all__ = ["GROUP", "Selection", "Vectors", "extremes", "project"]

BLOCK = 1024
"""Narrowest tile."""

SMALL = 2048
"""Vocabularies up to this size are scored in float64 at once."""

ROWS, WIDTH = 256, 8192
"""Rows and tokens scored in float64 at once."""

MIXED_ROWS = 2**14
"""Rows taken at once where mixes are not stored: each needs a share of the room for pairs."""

MANY = 2000
"""Tokens in doubt from which scoring a row's whole vocabulary is the cheaper way."""


@dataclass(frozen=True)
class Vectors:
    """Vectors to project: some of a batch's residual-side vectors, and mixes of each prompt's."""

    residual: Float[Tensor, "prompt position d_model"]
    scale: Float[Tensor, "prompt position"]
    """s(v) of each residual vector."""
    wanted: Bool[Tensor, "prompt position"]
    """Residual vectors that are to be projected for themselves."""
    mixes: Float[Tensor, "prompt mix position"]
    """Coefficients of the mixed vectors over their prompt's positions."""
    mix_scale: Float[Tensor, "prompt mix"]
    mix_wanted: Bool[Tensor, "prompt mix"]

    def to(self, device: torch.device) -> "Vectors":
        return Vectors(*(getattr(self, name).to(device) for name in Vectors.__dataclass_fields__))

    def __getitem__(self, prompts: slice) -> "Vectors":
        return Vectors(*(getattr(self, name)[prompts] for name in Vectors.__dataclass_fields__))


@dataclass(frozen=True)
class Selection:
    """What is kept of each vector's scores."""

    top_ids: Int[Tensor, "vector k"]
    top_scores: Float[Tensor, "vector k"]
    bottom_ids: Int[Tensor, "vector k"]
    bottom_scores: Float[Tensor, "vector k"]
    target_score: Float[Tensor, " vector"]
    target_rank: Int[Tensor, " vector"]
    """Tokens with a strictly larger score."""

    def __getitem__(self, rows: Tensor | slice) -> "Selection":
        return Selection(*(getattr(self, name)[rows] for name in Selection.__dataclass_fields__))


def project(
    vectors: Vectors,
    lens: Lens,
    targets: Int[Tensor, " prompt"],
    k: int,
    tile_bytes: int | None = None,
    prepared: Prepared | None = None,
    precision: Precision = "float32",
) -> tuple[Selection, Selection]:
    """Project the wanted residual vectors and mixes; each selection's rows are in (prompt, position | mix) order.

    `tile_bytes` bounds the scores that a lane holds at once; the default suits a CPU's cache or a GPU's memory. Prompts
    are taken a few at a time where they have too many rows for that (every neuron as a mix).
    `prepared` is `prepare(lens)`, looked up when it is not given. `precision` is that of the products which screen:
    the result is the same. bfloat16 is for GPUs, whose tensor cores multiply it many times as fast.
    """
    prepared = prepared or prepare(lens)
    device = lens.unembedding.device
    if tile_bytes is None:
        tile_bytes = 2**30 if device.type == "cuda" else 2**21
    targets = lens.rows(targets)
    rows = vectors.residual.shape[1] + vectors.mixes.shape[1]
    size = max(1, MIXED_ROWS // rows if compiled_for(device) else tile_bytes // (4 * BLOCK * rows))
    found = []
    with lanes(device) as side_by_side:
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            spread = spread_of(vectors[part], lens, targets[part])
            sweep = _Sweep(spread, lens, k, side_by_side)
            if lens.vocabulary > SMALL:
                sweep.screen(Screen(spread, lens, prepared, precision), tile_bytes)
            own = int(spread.wanted[: len(spread.base)].sum())
            selection = sweep.selection()
            found.append((selection[:own], selection[own:]))
    own, mixed = zip(*found, strict=True)
    return _with_tokens(_concatenated(own), lens), _with_tokens(_concatenated(mixed), lens)


def _with_tokens(found: Selection, lens: Lens) -> Selection:
    """From rows of the lens to token ids; both ascend together, so ties stay as they were settled."""
    return replace(found, top_ids=lens.tokens(found.top_ids), bottom_ids=lens.tokens(found.bottom_ids))


def _concatenated(parts: Sequence[Selection]) -> Selection:
    if len(parts) == 1:
        return parts[0]
    return Selection(
        *(torch.cat([getattr(p, name) for p in parts]) for name in Selection.__dataclass_fields__)
    )


def spread_of(vectors: Vectors, lens: Lens, targets: Int[Tensor, " prompt"]) -> Spread:
    """The rows of a batch: residual vectors that are wanted or mixed, then every mix.

    Base rows carry their own s(v). A mix Σ aᵢ vᵢ then has the coefficients aᵢ · s(mix) / s(vᵢ), so that no pass over
    its scores is needed to scale them.
    """
    used = (vectors.wanted | (vectors.mixes != 0).any(1)) & (vectors.residual != 0).any(-1)
    wanted = vectors.wanted & used
    scale = vectors.scale.double()
    base = lens.linear(vectors.residual[used].double()) * scale[used][:, None]
    ratio_BKT = vectors.mix_scale.double()[..., None] / scale[:, None]
    keep = used[:, None] & vectors.mix_wanted[..., None]
    mixes_BKT = (vectors.mixes * ratio_BKT).masked_fill(~keep, 0.0)
    runs = _runs(mixes_BKT, used)
    kept = vectors.mixes.shape[1]
    spread = Spread(
        base,
        runs,
        base,
        torch.cat([targets.repeat_interleave(used.sum(-1)), targets.repeat_interleave(kept)]),
        torch.cat([wanted[used], vectors.mix_wanted.flatten()]),
    )
    wide = torch.cat([base, *(part.flatten(0, 1) for part in spread.mixed(base))])
    return Spread(base, runs, wide, spread.targets, spread.wanted)


def _runs(mixes_BKT: Tensor, used: Bool[Tensor, "prompt position"]) -> list[Run]:
    if not mixes_BKT.shape[1]:
        return []
    counts, lengths = used.sum(-1).unique_consecutive(return_counts=True)
    runs, prompt, row = [], 0, 0
    for count, length in zip(counts.tolist(), lengths.tolist(), strict=True):
        some = slice(prompt, prompt + length)
        mixes = mixes_BKT[some].mT[used[some]].unflatten(0, (length, count)).mT.contiguous()
        runs.append(Run(slice(row, row + length * count), mixes))
        prompt, row = prompt + length, row + length * count
    return runs


class _Sweep:
    """One pass over the vocabulary, and what it leaves in doubt settled."""

    def __init__(self, spread: Spread, lens: Lens, k: int, lanes: Lanes) -> None:
        self._spread, self._lens, self._k, self._lanes = spread, lens, k, lanes
        self._exact = Exact(spread, lens, lanes)
        every = torch.arange(len(spread.targets), device=spread.targets.device)
        self._target_score = self._exact.of_pairs(every, spread.targets)
        self._screened = torch.zeros_like(spread.wanted)
        self._sieve = self._sieve_for(torch.zeros_like(self._target_score), PAIRS)

    def _sieve_for(self, error: Float[Tensor, " row"], room: int) -> Sieve:
        return Sieve(self._target_score, self._screened, error.double(), self._k, room)

    def screen(self, screen: Screen, tile_bytes: int) -> None:
        """Score every token approximately: count, and collect what the error leaves in doubt."""
        self._screened = self._spread.wanted & screen.sound()
        if not self._screened.any():
            return
        shares = _shares(self._lens.vocabulary, self._lanes.count)
        held = self._spread.base if compiled_for(self._screened.device) else self._screened
        widest = max(tile_bytes // (4 * len(held)) // BLOCK, 1) * BLOCK

        def sift(share: tuple[int, int]) -> Sieve:
            sieve = self._sieve_for(screen.error(*share), PAIRS // len(shares))
            for start, stop in _tiles(*share, widest):
                sieve.add(screen.tile(start, stop), start)
            return sieve

        self._sieve, *others = self._lanes.run([partial(sift, share) for share in shares])
        for other in others:
            self._sieve.join(other)

    def selection(self) -> Selection:
        """What is kept of the wanted rows."""
        settled, found = self._settled()
        rest = (self._spread.wanted & ~settled).nonzero().squeeze(-1)
        parts = [found, *(self._whole(rows) for rows in rest.split(ROWS) if len(rows))]
        rows = torch.cat([settled.nonzero().squeeze(-1), rest])
        return _concatenated(parts)[rows.argsort()]

    def _settled(self) -> tuple[Bool[Tensor, " row"], Selection]:
        """The rows that leave few tokens in doubt, after scoring these tokens as scores are defined."""
        rows = len(self._screened)
        doubtful, doubtful_ids = self._sieve.doubtful()
        places, ids = self._sieve.candidates()
        settled = self._screened & ~self._sieve.given_up()
        settled &= doubtful.bincount(minlength=rows) <= MANY
        settled &= (places.bincount(minlength=2 * rows) <= MANY).view(2, -1).all(0)
        if not settled.equal(self._screened):
            keep = settled[doubtful]
            doubtful, doubtful_ids = doubtful[keep], doubtful_ids[keep]
            keep = settled[places % rows]
            places, ids = places[keep], ids[keep]

        scores = self._exact.of_pairs(torch.cat([doubtful, places % rows]), torch.cat([doubtful_ids, ids]))
        above = scores[: len(doubtful)] > self._target_score[doubtful]
        rank = self._sieve.above + doubtful[above].bincount(minlength=rows)
        signed = scores[len(doubtful) :] * torch.where(places < rows, 1.0, -1.0)
        ids, signed = first_of_rows(places, ids, signed, self._k)
        top_ids, bottom_ids = ids.int().chunk(2)
        top, bottom = signed.chunk(2)
        done = settled.nonzero().squeeze(-1)
        return settled, Selection(
            top_ids, top, bottom_ids, -bottom, self._target_score[done], rank[done].int()
        )

    def _whole(self, rows: Int[Tensor, " row"]) -> Selection:
        """Rows scored over the whole vocabulary as scores are defined."""
        best, worst = Extremes(self._k, largest=True), Extremes(self._k, largest=False)
        targets, target_score = self._spread.targets[rows], self._target_score[rows]
        above = torch.zeros_like(targets)
        for start in range(0, self._lens.vocabulary, WIDTH):
            scores = self._exact.of_tile(rows, start, min(start + WIDTH, self._lens.vocabulary))
            # the target's score is one number wherever it is read, so the target is never above itself
            inside = ((targets >= start) & (targets < start + scores.shape[1])).nonzero().squeeze(-1)
            scores[inside, targets[inside] - start] = target_score[inside]
            above += (scores > target_score[:, None]).sum(-1)
            best.add(scores, start)
            worst.add(scores, start)
        return Selection(*best.sorted(), *worst.sorted(), target_score, above.int())


def _shares(vocabulary: int, count: int) -> list[tuple[int, int]]:
    """The vocabulary in about equal parts of whole groups, and the rest with the last."""
    found = [(GROUP * part.start, GROUP * part.stop) for part in parts(vocabulary // GROUP, count)]
    return [*found[:-1], (found[-1][0], vocabulary)]


def _tiles(first: int, last: int, widest: int) -> list[tuple[int, int]]:
    """Tiles of whole groups, and the rest."""
    whole = last // GROUP * GROUP
    tiles = [(start, min(start + widest, whole)) for start in range(first, whole, widest)]
    return [*tiles, (whole, last)] if whole < last else tiles
