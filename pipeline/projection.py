"""Exact top-k, bottom-k, target score and target rank of many vectors through the lens.

All vectors of a group are projected together, a tile of the vocabulary at a time. Vectors that are sums of
others (a neuron's gradient, a singular direction) never meet the unembedding: their scores are the same sums of
their terms' scores (see `lens.py`).

Order is total: by score, then by smaller token id, so a list is the same however the work was cut.

Shapes: B prompts, T positions, K mixes a prompt, N rows selected, V vocabulary, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.lens import Lens

GROUP = 64
"""Scores whose maximum is taken first: only the groups with the k + 1 largest maxima can hold the top k."""

BLOCK = 1024
"""Scores counted together (see `count_above`); tiles are whole blocks."""


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


def project(
    vectors: Vectors, lens: Lens, targets: Int[Tensor, " prompt"], k: int, tile_bytes: int | None = None
) -> tuple[Selection, Selection]:
    """Project the wanted residual vectors and mixes; each selection's rows are in (prompt, position | mix) order.

    `tile_bytes` bounds the scores held at once; the default suits the cache of a CPU or the memory of a GPU. Prompts
    are taken a few at a time where a tile of one block for all of them would be larger (every neuron as a mix).
    """
    if tile_bytes is None:
        tile_bytes = 2**30 if lens.unembedding.is_cuda else 2**25
    rows = vectors.residual.shape[1] + vectors.mixes.shape[1]
    size = max(1, tile_bytes // (4 * BLOCK * rows))
    parts = [
        _project_prompts(vectors[start : start + size], lens, targets[start : start + size], k, tile_bytes)
        for start in range(0, len(targets), size)
    ]
    own, mixed = zip(*parts, strict=True)
    return _concatenated(own), _concatenated(mixed)


def _project_prompts(
    vectors: Vectors, lens: Lens, targets: Int[Tensor, " prompt"], k: int, tile_bytes: int
) -> tuple[Selection, Selection]:
    spread = _Spread(vectors, lens)
    target_scores = spread.target_scores(lens, targets)
    sets = [
        _RowSet(targets.repeat_interleave(wanted.sum(-1)), scores, k)
        for wanted, scores in zip((vectors.wanted, vectors.mix_wanted), target_scores, strict=True)
    ]
    blocks = tile_bytes // (4 * max(spread.rows, 1)) // BLOCK
    width = min(max(blocks, 1) * BLOCK, lens.vocabulary)
    for start in range(0, lens.vocabulary, width):
        stop = min(start + width, lens.vocabulary)
        for rows, scores_NV in zip(sets, spread.tile(lens, start, stop), strict=True):
            rows.add(scores_NV, start)
    own, mixed = sets
    return own.selection(), mixed.selection()


def _concatenated(parts: Sequence[Selection]) -> Selection:
    if len(parts) == 1:
        return parts[0]
    return Selection(
        *(torch.cat([getattr(p, name) for p in parts]) for name in Selection.__dataclass_fields__)
    )


class _Spread:
    """Scores of the wanted vectors, a tile at a time, from one product with the unembedding.

    The product is of the residual vectors that are wanted or mixed, each with its own s(v). A mix Σ aᵢ vᵢ then has
    the coefficients aᵢ · s(mix) / s(vᵢ), so that no pass over its scores is needed to scale them.
    """

    def __init__(self, vectors: Vectors, lens: Lens) -> None:
        used = (vectors.wanted | (vectors.mixes != 0).any(1)) & (vectors.residual != 0).any(-1)
        self._used = used
        self._wanted = vectors.wanted[used]
        self._mix_wanted = vectors.mix_wanted
        self._base_UD = lens.linear(vectors.residual[used]) * vectors.scale[used][:, None]
        ratio_BKT = vectors.mix_scale[..., None] / vectors.scale[:, None]
        keep = used[:, None] & vectors.mix_wanted[..., None]
        self._mixes_BKT = (vectors.mixes * ratio_BKT).masked_fill(~keep, 0.0)
        self.rows = len(self._base_UD) + vectors.mix_wanted.numel()

    def tile(
        self, lens: Lens, start: int, stop: int
    ) -> tuple[Float[Tensor, "own tile"], Float[Tensor, "mix tile"]]:
        constant = lens.constant[start:stop]
        own_NV, mixed_MV = self._apply(self._base_UD @ lens.tile(start, stop).mT)
        return own_NV.add_(constant), mixed_MV.add_(constant)

    def target_scores(
        self, lens: Lens, targets: Int[Tensor, " prompt"]
    ) -> tuple[Float[Tensor, " own"], Float[Tensor, " mix"]]:
        """Each vector's score of its prompt's target."""
        own_targets = targets.repeat_interleave(self._used.sum(-1))
        scores = self._apply((self._base_UD * lens.rows(own_targets)).sum(-1, keepdim=True))
        constants = (
            lens.constant[own_targets[self._wanted]],
            lens.constant[targets].repeat_interleave(self._mix_wanted.sum(-1)),
        )
        own, mixed = (s.squeeze(-1) + c for s, c in zip(scores, constants, strict=True))
        return own, mixed

    def _apply(
        self, values_UV: Float[Tensor, "used value"]
    ) -> tuple[Float[Tensor, "own value"], Float[Tensor, "mix value"]]:
        if self._used.all():
            padded_BTV = values_UV.view(*self._used.shape, -1)
        else:
            padded_BTV = values_UV.new_zeros(*self._used.shape, values_UV.shape[-1])
            padded_BTV[self._used] = values_UV
        mixed_MV = (self._mixes_BKT @ padded_BTV).flatten(0, 1)
        return _rows(values_UV, self._wanted), _rows(mixed_MV, self._mix_wanted.flatten())


def _rows(values: Float[Tensor, "row value"], wanted: Bool[Tensor, " row"]) -> Float[Tensor, "wanted value"]:
    return values if wanted.all() else values[wanted]


class _RowSet:
    """What is kept of some vectors' scores, tile after tile."""

    def __init__(
        self, targets: Int[Tensor, " vector"], target_score: Float[Tensor, " vector"], k: int
    ) -> None:
        self._targets = targets
        self._target_score = target_score
        self._target_rank = torch.zeros_like(targets, dtype=torch.int32)
        self._best, self._worst = _Extremes(k, largest=True), _Extremes(k, largest=False)

    def add(self, scores_NV: Float[Tensor, "vector tile"], start: int) -> None:
        # The target's score, wherever it is read, is one number: no rounding can put the target above itself.
        inside = (
            ((self._targets >= start) & (self._targets < start + scores_NV.shape[1])).nonzero().squeeze(-1)
        )
        scores_NV[inside, self._targets[inside] - start] = self._target_score[inside]
        self._target_rank += count_above(scores_NV, self._target_score)
        self._best.add(scores_NV, start)
        self._worst.add(scores_NV, start)

    def selection(self) -> Selection:
        return Selection(*self._best.sorted(), *self._worst.sorted(), self._target_score, self._target_rank)


def count_above(
    scores: Float[Tensor, "vector tile"], thresholds: Float[Tensor, " vector"]
) -> Int[Tensor, " vector"]:
    """Scores strictly above each row's threshold.

    A sum of booleans converts every one of them to an integer first. Read as 64-bit words, eight are added at a
    time; a byte of the sum cannot overflow before 255 words.
    """
    above = scores > thresholds[:, None]
    blocks = above.shape[-1] // BLOCK
    whole = blocks * BLOCK
    blocked = above[:, :whole].unflatten(-1, (blocks, BLOCK)).contiguous()
    rest = above[:, whole:].sum(-1, dtype=torch.int32)
    words = blocked.view(torch.int64).sum(-1)
    return words.view(torch.uint8).sum(-1, dtype=torch.int32) + rest


class _Extremes:
    """The k largest (or smallest) scores of every row so far, with their token ids."""

    def __init__(self, k: int, largest: bool) -> None:
        self._k = k
        self._largest = largest
        self._found: list[tuple[Tensor, Tensor]] = []

    def add(self, scores_NV: Float[Tensor, "vector tile"], start: int) -> None:
        scores, ids = extremes(scores_NV, min(self._k, scores_NV.shape[-1]), self._largest)
        self._found.append((scores, ids + start))

    def sorted(self) -> tuple[Int[Tensor, "vector k"], Float[Tensor, "vector k"]]:
        scores, ids = (torch.cat(parts, dim=-1) for parts in zip(*self._found, strict=True))
        scores, ids = _in_order(scores, ids, self._largest)
        # copies: a slice would keep every tile's candidates alive as long as the rows
        return ids[:, : self._k].int(), scores[:, : self._k].clone()


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
        return _in_order(scores, ids, largest)
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
    values, ids = _in_order(values[:, :k], ids[:, :k], largest)
    if len(tied):
        whole, order = scores[tied].sort(dim=-1, descending=largest, stable=True)
        values[tied], ids[tied] = whole[:, :k], order[:, :k]
    return values, ids


def _in_order(scores: Tensor, ids: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    ids, by_id = ids.sort(dim=-1)
    scores, by_score = scores.gather(-1, by_id).sort(dim=-1, descending=largest, stable=True)
    return scores, ids.gather(-1, by_score)
