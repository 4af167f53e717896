"""Scores of many vectors, a tile of the vocabulary at a time, in float32 and with a proven error.

The score of a vector v for token t is s(v) · A v · u_t + c_t evaluated in float64 and rounded to float32: a number that
belongs to the pair alone, whatever is computed beside it. Products of matrices are done in float32, for speed;
they decide about nearly every token, because their distance from the score is bounded here (`ApproximateScores`).

Vectors that are sums of others (a neuron's gradient, a singular direction) are not multiplied with the unembedding:
their scores are the same sums of their terms' scores (see `lens.py`).

Shapes: B prompts, T positions used of a prompt, K mixes a prompt, U base rows, R rows in all, V tile, D d_model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from backlens.projection.lens import Lens

try:
    from backlens.projection import cpu as kernels
except ImportError:  # without numba
    kernels = None


Screening = Literal["float32", "bfloat16"]
"""What the products that screen are made of; scores are the same either way (see `ApproximateScores`)."""

ROUNDING = 2.0**-24
"""Unit roundoff of float32."""

FLOOR = 2.0**-48
"""Added to lengths in bounds: pays for everything that underflows (see `ApproximateScores`)."""

LONGEST = 2.0**48
"""Rows or unembedding rows longer than this are not screened: nothing may overflow."""

NARROWEST_CHUNK = 256
WIDE = 768 * 768
"""Rows are multiplied in chunks of about WIDE / D, whole up to D = 768. A product's error grows with its number of
terms, and what a token in doubt costs with D; but a chunk more is a pass over the scores more."""

AT_ONCE = 512
"""Pairs whose vectors are gathered together to be multiplied in float64; they should stay in a core's cache."""

FEW = 64
"""Mixes a prompt up to which a pair's score is one product of its own."""


@dataclass(frozen=True)
class Prepared:
    """What is computed once for a lens."""

    lengths: Float[Tensor, " vocabulary"]
    """‖u_t‖, in float64."""
    has_constant: bool

    @property
    def screens(self) -> bool:
        return float(self.lengths.max()) < LONGEST


_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def prepare(lens: Lens) -> Prepared:
    """Computed at the first call for an unembedding; later ones look it up."""
    found = _prepared.get(lens.unembedding)
    if found is None or found[0] is not lens.constant:
        lengths = torch.cat([part.double().norm(dim=-1) for part in lens.unembedding.split(4096)])
        found = lens.constant, Prepared(lengths, bool(lens.constant.any()))
        _prepared[lens.unembedding] = found
    return found[1]


@dataclass(frozen=True)
class MixBatch:
    """Consecutive prompts with the same number of base rows: their mixes are one batched product."""

    rows: slice
    """Base rows."""
    mixes: Float[Tensor, "prompt mix term"]
    """Coefficients over each prompt's base rows, in float64."""

    def terms(self, base: Shaped[Tensor, "base value"]) -> Shaped[Tensor, "prompt term value"]:
        """The values of each prompt's base rows."""
        return base[self.rows].unflatten(0, (self.mixes.shape[0], self.mixes.shape[2]))


@dataclass(frozen=True)
class ScoredRows:
    """The rows to score: base rows s(v) · A v, then `runs` of mixes of them, each prompt's own."""

    base: Float[Tensor, "base d_model"]
    """In float64."""
    runs: Sequence[MixBatch]
    wide: Float[Tensor, "row d_model"]
    """All rows, base and mixed, in float64."""
    targets: Int[Tensor, " row"]
    wanted: Bool[Tensor, " row"]

    def mixed(self, base: Float[Tensor, "base value"]) -> Iterator[Float[Tensor, "prompt mix value"]]:
        for run in self.runs:
            yield run.mixes.to(base.dtype) @ run.terms(base)

    def lengths(self) -> Float[Tensor, " row"]:
        """For a base row ‖w‖ (+ FLOOR), for a mix Σ |aᵢ| ‖wᵢ‖: the length that the row's error grows with."""
        base = self.base.norm(dim=-1, keepdim=True) + FLOOR
        parts = [run.mixes.abs() @ run.terms(base) + FLOOR for run in self.runs]
        return torch.cat([base, *(part.view(-1, 1) for part in parts)]).squeeze(-1)


@dataclass(frozen=True)
class Tile:
    """What the scores of all rows over a tile are made of, in float32."""

    base: Float[Tensor, "base tile"]
    """Products of the base rows."""
    runs: Sequence[MixBatch]
    constant: Float[Tensor, " tile"] | None
    """c, which every score has added; None for zeros."""

    def scores(self) -> Iterator[tuple[int, Float[Tensor, "some tile"]]]:
        """The scores of base rows, then of each run's mixes, with the first row of each part. Writes over `base`."""
        mixed = [torch.bmm(run.mixes, run.terms(self.base)).flatten(0, 1) for run in self.runs]
        first = 0
        for part in (self.base, *mixed):
            if self.constant is not None:
                part += self.constant
            yield first, part
            first += len(part)


class ApproximateScores:
    """Approximate scores of all rows over a tile, and how far they may be from the scores.

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
    x₁y₁ + x₁y₂ + x₂y₁. What is left out, x₂y₂ and the rests of x and y, is each at most 2⁻¹⁸ |x||y|. A product of two
    bfloat16 is exact in float32; tensor cores do not round sums to nearest, so they are allowed 4 u a term. One
    bfloat16 term alone (2⁻⁹ |x||y|, and again for y) would leave 2,400 tokens a row in doubt about their side of
    the target at GPT-2's shape, and a third of a trained model's vocabulary.
    """

    def __init__(
        self, spread: ScoredRows, lens: Lens, prepared: Prepared, screening: Screening = "float32"
    ) -> None:
        self._spread, self._lens, self._prepared = spread, lens, prepared
        self._halved = screening == "bfloat16"
        self._base = spread.base.float()
        self._runs = [MixBatch(run.rows, run.mixes.float()) for run in spread.runs]
        self._unit = _unit(
            lens.d_model, max((run.mixes.shape[-1] for run in spread.runs), default=0), self._halved
        )
        self._lengths = spread.lengths()

    def sound(self) -> Bool[Tensor, " row"]:
        """Rows of which nothing overflows."""
        fits = (self._lengths < LONGEST) & self._prepared.screens
        first = len(self._base)
        for run in self._spread.runs:
            prompts, kept, _ = run.mixes.shape
            # a row that overflows is not a number times zero, either
            terms = run.terms(fits[:, None]).flatten(1).all(-1)
            fits[first : first + prompts * kept] &= terms.repeat_interleave(kept)
            first += prompts * kept
        return fits

    def error(self, start: int, stop: int) -> Float[Tensor, " row"]:
        """A bound on |screened − score| over the tile, in float64."""
        longest = self._prepared.lengths[start:stop].max() + FLOOR
        constant = self._lens.constant[start:stop].abs().max().double()
        return self._unit * self._lengths * longest + 8.08 * ROUNDING * constant

    def tile(self, start: int, stop: int) -> "Tile":
        constant = self._lens.constant[start:stop] if self._prepared.has_constant else None
        return Tile(self._products(self._lens.tile(start, stop)), self._runs, constant)

    def _products(self, tile_VD: Tensor) -> Float[Tensor, "base tile"]:
        """The base rows' products, chunk by chunk."""
        pairs = [(self._base, tile_VD)]
        if self._halved:
            (x1, x2), (y1, y2) = _halves(self._base), _halves(tile_VD)
            pairs = [(x1, y1), (x1, y2), (x2, y1)]
        terms = _terms(tile_VD.shape[1])
        chunks = [slice(first, first + terms) for first in range(0, tile_VD.shape[1], terms)]
        first, *others = (_product(x[:, part], y[:, part]) for part in chunks for x, y in pairs)
        for product in others:
            first += product
        return first


def _terms(d_model: int) -> int:
    """Products summed by one matrix product."""
    return min(d_model, max(NARROWEST_CHUNK, WIDE // d_model))


def _unit(d_model: int, terms: int, halved: bool) -> float:
    """The bound on the error of a row, over its length and the unembedding row's."""
    summed = _terms(d_model)
    chunks = -(-d_model // summed)
    unit = ROUNDING * (summed + chunks + terms + 12)
    if halved:
        unit = ROUNDING * (4 * summed + 3 * chunks + terms + 12) + 3 * 2.0**-18
    elif torch.get_float32_matmul_precision() != "highest":
        unit += 2 * 2.0**-8  # TF32 and bfloat16 round what they multiply
    return 1.01 * unit


def _halves(values: Float[Tensor, "row d_model"]) -> tuple[Tensor, Tensor]:
    first = values.bfloat16()
    return first, (values - first.float()).bfloat16()


def _product(x: Float[Tensor, "row term"], y: Float[Tensor, "tile term"]) -> Float[Tensor, "row tile"]:
    """x yᵀ summed in float32; a CPU would round a product of bfloat16 back to it, so there they are widened."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x, y.mT, out_dtype=torch.float32)
    if x.device.type == "cpu" and _ONEDNN is not None:
        return _ONEDNN(x.float(), y.float(), None, "none", [], "")
    return torch.mm(x.float(), y.float().mT)


def _onednn_product() -> Callable[..., Tensor] | None:
    """oneDNN's float32 product, which PyTorch itself uses in compiled code; `mm` takes MKL's, at 1.4 times its time
    on some CPUs (`benchmarks/project.py`)."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN = _onednn_product()
