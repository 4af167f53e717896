"""Norms, spectrum and neurons of a gradient, from its factors alone.

A gradient G = Xᵀ Δ is held as its residual side S (positions, d_model) and its other side O (positions, m):
(X, Δ) for modules that read the residual stream, (Δ, X) for those that write to it. With the Gram matrices
K_S = S Sᵀ and K_O = O Oᵀ, n × n for n positions, everything here is an n × n problem. Gram matrices are
float64: their eigenvalues are squares, and float32 would lose half the digits of small singular values.

Shapes: B prompts, T positions, D d_model, M neurons. Padding rows of both sides are zero. For an expert's matrix,
prompts and positions are those of its slots (`batch.Slots`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backlens.capture.batch import Slots
from backlens.capture.hooks import Gradient
from backlens.terms import READS


@dataclass(frozen=True)
class Factors:
    """One matrix's gradient for a batch: neuron j's gradient is Σ over positions of other[i, j] · residual[i]."""

    layer: int
    module: str
    expert: int | None
    residual: Float[Tensor, "prompt position d_model"]
    other: Float[Tensor, "prompt position neuron"]
    finite: Bool[Tensor, " prompt"]
    """True for prompts whose inputs and VJPs are all finite; the vectors of the others are zeros here."""

    @property
    def x(self) -> Float[Tensor, "prompt position d_in"]:
        return self.residual if self.module in READS else self.other

    @property
    def vjp(self) -> Float[Tensor, "prompt position d_out"]:
        return self.other if self.module in READS else self.residual


@dataclass(frozen=True)
class Spectrum:
    """Singular values of G and its leading left direction on the residual side."""

    values: Float[Tensor, "prompt value"]
    """In descending order; as many as there are padded positions (at most d_model), zeros behind a prompt's own."""
    rank: Int[Tensor, " prompt"]
    """Number of singular values above σ₁ · max(d_model, m) · ε of float32, as in `torch.linalg.matrix_rank`."""
    leading: Float[Tensor, "prompt position"]
    """The leading direction's coefficients over positions: length 1 in d_model, largest entry positive."""


def factors_of(gradients: Sequence[Gradient]) -> list[Factors]:
    """Make the factors of gradients that share their input: float32, with zeros at padding."""
    x, x_finite = masked(gradients[0].x, gradients[0].slots)
    found = []
    for gradient in gradients:
        vjp, vjp_finite = masked(gradient.vjp, gradient.slots)
        residual, other = (x, vjp) if gradient.module in READS else (vjp, x)
        finite = x_finite & vjp_finite
        found.append(Factors(gradient.layer, gradient.module, gradient.expert, residual, other, finite))
    return found


def masked(
    values: Float[Tensor, "prompt position width"], slots: Slots
) -> tuple[Float[Tensor, "prompt position width"], Bool[Tensor, " prompt"]]:
    """Return `values` in float32, and which prompts are finite.

    Padding is zero, and so is every entry of a prompt that has a non-finite entry at a real position.
    """
    values = values.float()
    if not slots.full:
        values = values.masked_fill(~slots.mask[..., None].to(values.device), 0.0)
    # amax and amin pass NaN on; `isfinite` of every entry takes ten times as long
    finite = values.flatten(1).amax(-1).isfinite() & values.flatten(1).amin(-1).isfinite()
    if values.is_cuda or not finite.all():  # reading `finite` would wait for a GPU
        values = values.masked_fill(~finite[:, None, None], 0.0)
    return values, finite


def gram(vectors: Float[Tensor, "prompt position width"]) -> Float[Tensor, "prompt position position"]:
    """Compute all inner products, in float64."""
    vectors = vectors.double()
    return vectors @ vectors.mT


def norms_of(gram: Float[Tensor, "prompt position position"]) -> Float[Tensor, "prompt position"]:
    """Read the lengths of the vectors off their Gram matrix, in float32."""
    return gram.diagonal(dim1=-2, dim2=-1).sqrt().float()


def spectrum(
    factors: Factors,
    residual_gram: Float[Tensor, "prompt position position"],
    other_gram: Float[Tensor, "prompt position position"],
) -> Spectrum:
    """Compute the singular values of G = Sᵀ O, from n × n matrices or, if smaller, d_model × d_model ones.

    With H Hᵀ = K_S, the non-zero eigenvalues of G Gᵀ = Sᵀ K_O S are those of M = Hᵀ K_O H, and an eigenvector w of M
    with value σ² gives the left direction u = Sᵀ a with a = K_O H w / σ², without division by small eigenvalues.
    H is S itself, or Q Λ^½ with K_S = Q Λ Qᵀ.
    """
    positions, d_model = factors.residual.shape[1:]
    if positions > d_model:
        half = factors.residual.double()
    else:
        eigenvalues, q = torch.linalg.eigh(residual_gram)
        half = q * eigenvalues.clamp_min(0).sqrt()[:, None, :]
    squares, vectors = torch.linalg.eigh(half.mT @ other_gram @ half)
    values = squares.flip(-1).clamp_min(0).sqrt()
    largest = values[:, :1]
    widest = max(factors.residual.shape[-1], factors.other.shape[-1])
    rank = ((values > largest * widest * torch.finfo(torch.float32).eps) & (largest > 0)).sum(-1)
    leading = (other_gram @ half @ vectors[..., -1:]).squeeze(-1) / largest.square().clamp_min(1e-300)
    return Spectrum(values.float(), rank, _sign_fixed(leading.float(), factors.residual))


def _sign_fixed(
    coefficients: Float[Tensor, "prompt position"], residual: Float[Tensor, "prompt position d_model"]
) -> Float[Tensor, "prompt position"]:
    direction = (coefficients[:, None] @ residual).squeeze(1)
    largest = direction.gather(-1, direction.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -coefficients, coefficients)


def frobenius(
    residual_gram: Float[Tensor, "prompt position position"],
    other_gram: Float[Tensor, "prompt position position"],
) -> Float[Tensor, " prompt"]:
    """Compute ‖G‖ as the root of Σ K_S ∘ K_O over pairs of positions, without a spectrum."""
    return (residual_gram * other_gram).sum((-1, -2)).clamp_min(0).sqrt().float()


def neuron_norms(
    other: Float[Tensor, "prompt position neuron"],
    residual_gram: Float[Tensor, "prompt position position"],
) -> Float[Tensor, "prompt neuron"]:
    """Compute ‖g_j‖ = sqrt(o_jᵀ K_S o_j) for every neuron j, with o_j its coefficients over positions."""
    other = other.double()
    return (other * (residual_gram @ other)).sum(-2).clamp_min(0).sqrt().float()


def main_positions(
    coefficients: Float[Tensor, "prompt neuron position"],
    residual_gram: Float[Tensor, "prompt position position"],
) -> Int[Tensor, "prompt neuron"]:
    """Find the position whose term other[i, j] · residual[i] is longest; the first one if several are."""
    lengths = residual_gram.diagonal(dim1=-2, dim2=-1).sqrt()
    return (coefficients.double().abs() * lengths[:, None]).argmax(-1)
