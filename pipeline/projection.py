"""Exact top-k, bottom-k, target score and target rank of many vectors through the lens.

All vectors of a group are projected together, a tile of the vocabulary at a time. Vectors that are sums of
others (a neuron's gradient, a singular direction) never meet the unembedding: their scores are the same sums of
their terms' scores (see `lens.py`).

Order is total: by score, then by smaller token id, so a list is the same however the work was cut.

Shapes: B prompts, T positions, K mixes a prompt, N rows selected, V vocabulary, D d_model.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.lens import Lens

GROUP = 64
"""Scores whose maximum is taken first: only the groups with the k + 1 largest maxima can hold the top k."""


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

    `tile_bytes` bounds the scores held at once; the default suits the cache of a CPU or the memory of a GPU.
    """
    used = vectors.wanted | (vectors.mixes != 0).any(1)
    base_UD = lens.linear(vectors.residual[used])
    spread = _Spread(vectors, used)
    rows = spread.rows
    targets_N = torch.cat(
        [targets.repeat_interleave(w.sum(-1)) for w in (vectors.wanted, vectors.mix_wanted)]
    )
    scale_N = torch.cat([vectors.scale[vectors.wanted], vectors.mix_scale[vectors.mix_wanted]])
    own_targets = targets.repeat_interleave(used.sum(-1))
    target_score = spread.apply((base_UD * lens.rows(own_targets)).sum(-1, keepdim=True)).squeeze(-1)
    target_score = target_score * scale_N + lens.constant[targets_N]

    best, worst = _Extremes(k, largest=True), _Extremes(k, largest=False)
    target_rank = torch.zeros_like(targets_N)
    width = _tile_width(rows + base_UD.shape[0], lens, tile_bytes)
    for start in range(0, lens.vocabulary, width):
        stop = min(start + width, lens.vocabulary)
        scores_NV = spread.apply(base_UD @ lens.tile(start, stop).mT)
        scores_NV.mul_(scale_N[:, None]).add_(lens.constant[start:stop])
        # The target's score, wherever it is read, is one number: no rounding can put the target above itself.
        inside = ((targets_N >= start) & (targets_N < stop)).nonzero().squeeze(-1)
        scores_NV[inside, targets_N[inside] - start] = target_score[inside]
        target_rank += (scores_NV > target_score[:, None]).sum(-1, dtype=torch.int32)
        best.add(scores_NV, start)
        worst.add(scores_NV, start)
    selection = Selection(*best.sorted(), *worst.sorted(), target_score, target_rank)
    return _split(selection, spread.own)


class _Spread:
    """From values of the used residual vectors to values of the wanted vectors and mixes."""

    def __init__(self, vectors: Vectors, used: Bool[Tensor, "prompt position"]) -> None:
        self._used = used
        self._wanted = vectors.wanted[used]
        self._mixes = vectors.mixes
        self._mix_wanted = vectors.mix_wanted
        self.own = int(vectors.wanted.sum())
        self.rows = self.own + int(vectors.mix_wanted.sum())

    def apply(self, values_UV: Float[Tensor, "used value"]) -> Float[Tensor, "vector value"]:
        if not self._mix_wanted.any():
            return values_UV[self._wanted]
        padded_BTV = values_UV.new_zeros(*self._used.shape, values_UV.shape[-1])
        padded_BTV[self._used] = values_UV
        mixed_BKV = self._mixes @ padded_BTV
        return torch.cat([values_UV[self._wanted], mixed_BKV[self._mix_wanted]])


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
        return ids[:, : self._k].int(), scores[:, : self._k]


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


def _tile_width(rows: int, lens: Lens, tile_bytes: int | None) -> int:
    if tile_bytes is None:
        tile_bytes = 2**30 if lens.unembedding.is_cuda else 2**25
    width = tile_bytes // (4 * max(rows, 1)) // GROUP * GROUP
    return max(min(width, lens.vocabulary), min(16 * GROUP, lens.vocabulary))


def _split(selection: Selection, own: int) -> tuple[Selection, Selection]:
    columns = [getattr(selection, name) for name in Selection.__dataclass_fields__]
    return Selection(*(c[:own] for c in columns)), Selection(*(c[own:] for c in columns))
