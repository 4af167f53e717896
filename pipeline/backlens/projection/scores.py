"""Scores of many vectors: as they are defined, and in float32 with a proven error.

The score of a vector v for token t is s(v) · A v · u_t + c_t in float64, rounded to float32: a number that depends on
the pair alone. `ExactScores` computes it. `ApproximateScores` multiplies matrices in float32, for speed; its scores
decide about nearly every token, because their distance from the exact score is bounded.

Vectors that are sums of others (a neuron's gradient, a singular direction) are not multiplied with the unembedding:
their scores are the same sums of their terms' scores (see `lens.py`).

Shapes: B prompts, T positions used per prompt, K mixes per prompt, U base rows, R rows in all, V tile, D d_model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from backlens.projection import topk
from backlens.projection.lens import Lens
from backlens.projection.threads import CpuThreads, parts

Screening = Literal["float32", "bfloat16"]
"""Type of the products that pick tokens to be scored exactly; results do not depend on it."""

ROUNDING = 2.0**-24
"""Unit roundoff of float32."""

FLOOR = 2.0**-48
"""Added to lengths in bounds, to cover everything that underflows (see `ApproximateScores`)."""

LONGEST = 2.0**48
"""Rows and unembedding rows longer than this are not screened, so that nothing overflows."""

NARROWEST_CHUNK = 256
WIDE = 768 * 768
"""Rows are multiplied in chunks of about WIDE / D, whole up to D = 768. A product's error grows with its number of
terms, and the cost of a token in doubt with D; but each further chunk is a further pass over the scores."""

AT_ONCE = 512
"""Pairs whose vectors are gathered and multiplied in float64 together, so that they stay in a core's cache."""

FEW = 64
"""Up to this many mixes per prompt, each pair is scored by one product of its own."""


@dataclass(frozen=True)
class Prepared:
    """Values that are computed once per lens."""

    lengths: Float[Tensor, " vocabulary"]
    """‖u_t‖ in float64."""
    has_constant: bool

    @property
    def screens(self) -> bool:
        return float(self.lengths.max()) < LONGEST


_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def prepare(lens: Lens) -> Prepared:
    """Return the lens's `Prepared`, computed at the first call for its unembedding."""
    found = _prepared.get(lens.unembedding)
    if found is None or found[0] is not lens.constant:
        lengths = torch.cat([part.double().norm(dim=-1) for part in lens.unembedding.split(4096)])
        found = lens.constant, Prepared(lengths, bool(lens.constant.any()))
        _prepared[lens.unembedding] = found
    return found[1]


@dataclass(frozen=True)
class MixBatch:
    """The mixes of consecutive prompts with the same number of base rows: one batched product."""

    rows: slice
    """Base rows."""
    mixes: Float[Tensor, "prompt mix term"]
    """Coefficients over each prompt's base rows, in float64."""

    def terms(self, base: Shaped[Tensor, "base value"]) -> Shaped[Tensor, "prompt term value"]:
        """Cut values per base row into those of each prompt."""
        return base[self.rows].unflatten(0, (self.mixes.shape[0], self.mixes.shape[2]))


@dataclass(frozen=True)
class ScoredRows:
    """Rows to score: base rows s(v) · A v, then mixes of them, prompt by prompt."""

    base: Float[Tensor, "base d_model"]
    """Base rows in float64."""
    runs: Sequence[MixBatch]
    wide: Float[Tensor, "row d_model"]
    """All rows, base and mixed, in float64."""
    targets: Int[Tensor, " row"]
    wanted: Bool[Tensor, " row"]
    """False for base rows that are only terms of mixes, and for mixes that are zero."""

    def mixed(self, base: Float[Tensor, "base value"]) -> Iterator[Float[Tensor, "prompt mix value"]]:
        for run in self.runs:
            yield run.mixes.to(base.dtype) @ run.terms(base)

    def lengths(self) -> Float[Tensor, " row"]:
        """Lengths that errors are proportional to: ‖w‖ (+ FLOOR) of a base row, Σ |aᵢ| ‖wᵢ‖ of a mix."""
        base = self.base.norm(dim=-1, keepdim=True) + FLOOR
        parts = [run.mixes.abs() @ run.terms(base) + FLOOR for run in self.runs]
        return torch.cat([base, *(part.view(-1, 1) for part in parts)]).squeeze(-1)


@dataclass(frozen=True)
class Tile:
    """The parts of all rows' scores over a tile of the vocabulary, in float32."""

    base: Float[Tensor, "base tile"]
    """Products of the base rows and the tile."""
    runs: Sequence[MixBatch]
    constant: Float[Tensor, " tile"] | None
    """c, a term of every score; None if it is zero."""

    def scores(self) -> Iterator[tuple[int, Float[Tensor, "some tile"]]]:
        """Yield (first row, scores) of the base rows, then of each run's mixes. Overwrites `base`."""
        mixed = [torch.bmm(run.mixes, run.terms(self.base)).flatten(0, 1) for run in self.runs]
        first = 0
        for part in (self.base, *mixed):
            if self.constant is not None:
                part += self.constant
            yield first, part
            first += len(part)


class ExactScores:
    """Scores as they are defined: float64 products, rounded to float32 once."""

    def __init__(self, scored: ScoredRows, lens: Lens, threads: CpuThreads | None = None) -> None:
        self._scored, self._lens, self._threads = scored, lens, threads or CpuThreads()

    def of_pairs(self, rows: Int[Tensor, " pair"], ids: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """Score (row, token) pairs."""
        scored = self._scored
        if all(run.mixes.shape[1] <= FEW for run in scored.runs):
            return self._rounded(self._products(rows, ids), ids)
        products = scored.wide.new_empty(len(ids))
        own = (rows < len(scored.base)).nonzero().squeeze(-1)
        products[own] = self._products(rows[own], ids[own])
        first = len(scored.base)
        for run in scored.runs:
            for base, mixes in zip(run.terms(scored.base), run.mixes, strict=True):
                some = ((rows >= first) & (rows < first + len(mixes))).nonzero().squeeze(-1)
                products[some] = self._mixed_products(base, mixes, rows[some] - first, ids[some])
                first += len(mixes)
        return self._rounded(products, ids)

    def of_tile(self, rows: Int[Tensor, " some"], start: int, stop: int) -> Float[Tensor, "some tile"]:
        """Score some rows for a tile of the vocabulary."""
        tile = self._lens.unembedding[start:stop].double()
        return (self._scored.wide[rows] @ tile.mT + self._lens.constant[start:stop]).float()

    def _rounded(self, products: Float[Tensor, " pair"], ids: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        return (products + self._lens.constant[ids]).float()

    def _products(self, rows: Int[Tensor, " pair"], ids: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        wide, unembedding = self._scored.wide, self._lens.unembedding
        products = wide.new_empty(len(ids))
        if topk.cpu and wide.device.type == "cpu" and unembedding.dtype == torch.float32:
            arrays = [tensor.numpy() for tensor in (wide, unembedding, rows, ids, products)]
            some = parts(len(ids), self._threads.count if len(ids) > AT_ONCE else 1)
            self._threads.run([partial(topk.cpu.dots, *arrays, part.start, part.stop) for part in some])
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
        """Multiply each token with the few base rows of one prompt, whose many mixes share tokens."""
        tokens, places = ids.unique(return_inverse=True)
        values = [self._lens.unembedding[some].double() @ base.mT for some in tokens.split(AT_ONCE)]
        values_NT = torch.cat(values) if values else base.new_empty(0, len(base))
        products = base.new_empty(len(ids))
        for first in range(0, len(ids), 2**16):
            part = slice(first, first + 2**16)
            products[part] = (mixes[rows[part]] * values_NT[places[part]]).sum(-1)
        return products


class ApproximateScores:
    """Approximate scores of all rows over a tile, and a bound on their distance from the exact scores.

    With u = 2⁻²⁴ and x a base row rounded to float32, y an unembedding row:

    * A float32 product over n terms, in any order, fused or not, is within γₙ Σ|x||y| of x · y, γₙ = nu / (1 − nu)
      (Higham, *Accuracy and Stability*, §3.1). The width is cut into chunks of n; adding the chunks' results costs
      one more rounding for each. By Cauchy and Schwarz Σ|x||y| ≤ ‖x‖ ‖y‖.
    * Rounding the row to x: u ‖w‖ ‖y‖.
    * A mix Σ aᵢ wᵢ of T rows adds their errors times |aᵢ|, and γ_{T + 1} Σ |aᵢ| ‖wᵢ‖ ‖y‖ for its own products, its
      sums and the rounding of aᵢ.
    * Adding the constant, rounding the score itself to float32, and float32 arithmetic with this bound each cost
      at most u (‖w‖ ‖y‖ + |c|): eight of them are allowed for.
    * What underflows, or is flushed, is less than D · 2⁻¹²⁵ (1 + ‖x‖ + ‖y‖) for a product; FLOOR on both lengths
      makes the bound at least 2⁻²⁰ · 2⁻⁴⁸ times any of 2⁻⁴⁸, ‖x‖ and ‖y‖ (2⁻¹⁶ for D ≥ 256), which is more.

    Together |screened − score| ≤ u (n + chunks + T + 12) · length · ‖y‖ + 8 u |c|, with 1 % for the second-order terms
    and for this sum's own rounding.

    `bfloat16` replaces x by x₁ + x₂, the nearest bfloat16 and the nearest to the rest, y likewise, and multiplies
    x₁y₁ + x₁y₂ + x₂y₁. It leaves out x₂y₂ and the rests of x and y, each at most 2⁻¹⁸ |x||y|. A product of two
    bfloat16 is exact in float32; tensor cores do not round sums to nearest, so they are allowed 4 u per term.
    One bfloat16 term alone (2⁻⁹ |x||y|, and again for y) would leave 2,400 tokens per row in doubt at GPT-2's shape,
    and a third of a trained model's vocabulary.
    """

    def __init__(
        self, scored: ScoredRows, lens: Lens, prepared: Prepared, screening: Screening = "float32"
    ) -> None:
        self._scored, self._lens, self._prepared, self._screening = scored, lens, prepared, screening
        self._base = scored.base.float()
        self._runs = [MixBatch(run.rows, run.mixes.float()) for run in scored.runs]
        terms = max((run.mixes.shape[-1] for run in scored.runs), default=0)
        self._unit = _unit(lens.d_model, terms, screening)
        self._lengths = scored.lengths()

    def sound(self) -> Bool[Tensor, " row"]:
        """Find the rows that nothing overflows in."""
        fits = (self._lengths < LONGEST) & self._prepared.screens
        first = len(self._base)
        for run in self._scored.runs:
            prompts, mixes, _ = run.mixes.shape
            # an infinite term makes NaN of a mix even where its coefficient is zero
            terms = run.terms(fits[:, None]).flatten(1).all(-1)
            fits[first : first + prompts * mixes] &= terms.repeat_interleave(mixes)
            first += prompts * mixes
        return fits

    def error(self, start: int, stop: int) -> Float[Tensor, " row"]:
        """Bound |screened − score| over the tile, in float64."""
        longest = self._prepared.lengths[start:stop].max() + FLOOR
        constant = self._lens.constant[start:stop].abs().max().double()
        return self._unit * self._lengths * longest + 8.08 * ROUNDING * constant

    def tile(self, start: int, stop: int) -> Tile:
        constant = self._lens.constant[start:stop] if self._prepared.has_constant else None
        return Tile(self._products(self._lens.tile(start, stop)), self._runs, constant)

    def _products(self, tile_VD: Tensor) -> Float[Tensor, "base tile"]:
        """Multiply the base rows with a tile, chunk by chunk."""
        pairs = [(self._base, tile_VD)]
        if self._screening == "bfloat16":
            (x1, x2), (y1, y2) = _halves(self._base), _halves(tile_VD)
            pairs = [(x1, y1), (x1, y2), (x2, y1)]
        terms = _terms(tile_VD.shape[1])
        chunks = [slice(first, first + terms) for first in range(0, tile_VD.shape[1], terms)]
        first, *others = (_product(x[:, part], y[:, part]) for part in chunks for x, y in pairs)
        for product in others:
            first += product
        return first


def _terms(d_model: int) -> int:
    """Number of terms that one matrix product sums."""
    return min(d_model, max(NARROWEST_CHUNK, WIDE // d_model))


def _unit(d_model: int, terms: int, screening: Screening) -> float:
    """Bound the error of a row, per unit of its length and of the unembedding row's."""
    summed = _terms(d_model)
    chunks = -(-d_model // summed)
    unit = ROUNDING * (summed + chunks + terms + 12)
    if screening == "bfloat16":
        unit = ROUNDING * (4 * summed + 3 * chunks + terms + 12) + 3 * 2.0**-18
    elif torch.get_float32_matmul_precision() != "highest":
        unit += 2 * 2.0**-8  # TF32 and bfloat16 round what they multiply
    return 1.01 * unit


def _halves(values: Float[Tensor, "row d_model"]) -> tuple[Tensor, Tensor]:
    first = values.bfloat16()
    return first, (values - first.float()).bfloat16()


def _product(x: Float[Tensor, "row term"], y: Float[Tensor, "tile term"]) -> Float[Tensor, "row tile"]:
    """Compute x yᵀ with sums in float32; on a CPU bfloat16 is widened first, because its product would be bfloat16."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x, y.mT, out_dtype=torch.float32)
    if x.device.type == "cpu" and _ONEDNN is not None:
        return _ONEDNN(x.float(), y.float(), None, "none", [], "")
    return torch.mm(x.float(), y.float().mT)


def _onednn_product() -> Callable[..., Tensor] | None:
    """Find oneDNN's float32 product, which PyTorch uses in compiled code; `mm` calls MKL's, which takes 1.4 times as
    long on some CPUs (`benchmarks/project.py`)."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN = _onednn_product()
