"""Scores as they are defined: float64 products, rounded to float32 once."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backlens.projection.float32_bound import AT_ONCE, FEW, ScoredRows
from backlens.projection.lens import Lens
from backlens.projection.threads import CpuThreads, parts

try:
    from backlens.projection import cpu as kernels
except ImportError:  # without numba
    kernels = None


class ExactScores:
    """Scores of pairs, as they are defined."""

    def __init__(self, spread: ScoredRows, lens: Lens, lanes: CpuThreads | None = None) -> None:
        self._spread, self._lens, self._lanes = spread, lens, lanes or CpuThreads()

    def of_pairs(self, rows: Int[Tensor, " pair"], ids: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        spread = self._spread
        if all(run.mixes.shape[1] <= FEW for run in spread.runs):
            return self._rounded(self._products(rows, ids), ids)
        products = spread.wide.new_empty(len(ids))
        own = (rows < len(spread.base)).nonzero().squeeze(-1)
        products[own] = self._products(rows[own], ids[own])
        first = len(spread.base)
        for run in spread.runs:
            for base, mixes in zip(run.terms(spread.base), run.mixes, strict=True):
                some = ((rows >= first) & (rows < first + len(mixes))).nonzero().squeeze(-1)
                products[some] = self._mixed_products(base, mixes, rows[some] - first, ids[some])
                first += len(mixes)
        return self._rounded(products, ids)

    def of_tile(self, rows: Int[Tensor, " some"], start: int, stop: int) -> Float[Tensor, "some tile"]:
        tile = self._lens.unembedding[start:stop].double()
        return (self._spread.wide[rows] @ tile.mT + self._lens.constant[start:stop]).float()

    def _rounded(self, products: Float[Tensor, " pair"], ids: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        return (products + self._lens.constant[ids]).float()

    def _products(self, rows: Int[Tensor, " pair"], ids: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        wide, unembedding = self._spread.wide, self._lens.unembedding
        products = wide.new_empty(len(ids))
        if kernels and wide.device.type == "cpu" and unembedding.dtype == torch.float32:
            arrays = [tensor.numpy() for tensor in (wide, unembedding, rows, ids, products)]
            some = parts(len(ids), self._lanes.count if len(ids) > AT_ONCE else 1)
            self._lanes.run([partial(kernels.dots, *arrays, part.start, part.stop) for part in some])
            return products
        mine = wide.new_empty(min(AT_ONCE, len(ids)), wide.shape[1])
        theirs, raw = torch.empty_like(mine), unembedding.new_empty(mine.shape)
        for first in range(0, len(ids), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            count = len(ids[part])
            torch.index_select(unembedding, 0, ids[part], out=raw[:count])
            torch.index_select(wide, 0, rows[part], out=mine[:count])
            theirs[:count].copy_(raw[:count])
            products[part] = mine[:count].mul_(theirs[:count]).sum(-1)
        return products

    def _mixed_products(
        self,
        base: Float[Tensor, "term d_model"],
        mixes: Float[Tensor, "mix term"],
        rows: Int[Tensor, " pair"],
        ids: Int[Tensor, " pair"],
    ) -> Float[Tensor, " pair"]:
        """Of many mixes of one prompt, whose pairs share tokens: each token is multiplied with the few base rows."""
        tokens, places = ids.unique(return_inverse=True)
        parts = [self._lens.unembedding[some].double() @ base.mT for some in tokens.split(AT_ONCE)]
        values_NT = torch.cat(parts) if parts else base.new_empty(0, len(base))
        products = base.new_empty(len(ids))
        for first in range(0, len(ids), 2**16):
            part = slice(first, first + 2**16)
            products[part] = (mixes[rows[part]] * values_NT[places[part]]).sum(-1)
        return products
