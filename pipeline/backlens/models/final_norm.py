"""The final norm as an affine map up to one scalar per vector, read off the module's own outputs."""

import copy
import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backlens.errors import BacklensError

TOLERANCE = 1e-5
"""Largest relative difference allowed between the affine form and the norm, and between lens and float32 logits."""


@dataclass(frozen=True)
class Norm:
    """A final norm as an affine map up to one scalar per vector; float32."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    eps: float
    centred: bool
    normalizing: bool = True
    """False for the identity, in a model that has no final norm."""

    def scale(
        self, squared_norm: Float[Tensor, "*batch"], squared_centred: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """s(v) from ‖v‖² and ‖C v‖²."""
        if not self.normalizing:
            return torch.ones_like(squared_norm)
        return (squared_centred / len(self.weight) + self.eps).rsqrt()

    def unit_scale(
        self, squared_norm: Float[Tensor, "*batch"], squared_centred: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """s(v / ‖v‖) / ‖v‖, under one root so that tiny vectors keep their precision."""
        smallest = torch.finfo(squared_norm.dtype).tiny
        if not self.normalizing:
            return squared_norm.clamp_min(smallest).rsqrt()
        return (squared_centred / len(self.weight) + self.eps * squared_norm).clamp_min(smallest).rsqrt()

    def to(self, device: torch.device) -> "Norm":
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def centre(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors

    def __call__(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        centred = self.centre(vectors)
        scale = self.scale(vectors.square().sum(-1), centred.square().sum(-1))
        return scale[..., None] * centred * self.weight + self.bias


@torch.no_grad()
def probe_norm(module: nn.Module, d_model: int, device: torch.device) -> Norm:
    """Read w, b, ε and the kind off the module's outputs on chosen inputs, then verify on random ones.

    Raises BacklensError if the found form differs from the module by more than TOLERANCE anywhere.
    """
    module = copy.deepcopy(module).float().eval()
    balanced = _balanced(d_model).to(device)
    size = float(balanced.square().mean().sqrt())
    bias = module(torch.zeros(d_model, device=device))
    # At this length ε vanishes; the difference of the two signs cancels b instead of rounding it into w.
    large = 2.0**20
    weight = (module(balanced * large) - module(-balanced * large)) / 2 * size / balanced
    uniform = module(torch.full_like(balanced, large)) - bias
    centred = bool(uniform.abs().max() < 1e-3 * weight.abs().max())
    norm = Norm(weight, bias, _probe_eps(module, weight, bias, balanced), centred)
    _verify_norm(norm, module, d_model, device)
    return norm


def _balanced(d_model: int) -> Float[Tensor, " d_model"]:
    """No entry zero and mean zero, so that centring changes nothing: 1, −1, 1, … (an odd width ends 2, −1, −1)."""
    balanced = torch.ones(d_model)
    balanced[1::2] = -1
    if d_model % 2:
        balanced[-3:] = torch.tensor([2.0, -1.0, -1.0])
    return balanced


def _probe_eps(module: nn.Module, weight: Tensor, bias: Tensor, balanced: Tensor) -> float:
    """ε from the size t at which the output is nearest to 1/√2 of its limit, where it is best determined.

    There the module answers t / sqrt(t² m + ε) per unit of w ∘ balanced, with m the mean square of `balanced`.
    """
    strongest = int((weight * balanced).abs().argmax())
    unit = float((weight * balanced)[strongest])
    mean_square = float(balanced.square().mean())
    nearest, eps = math.inf, 0.0
    for exponent in range(-40, 8):
        t = 2.0**exponent
        response = float((module(balanced * t) - module(-balanced * t))[strongest]) / (2 * unit)
        distance = abs(response * mean_square**0.5 - 0.5**0.5)
        if response > 0 and distance < nearest:
            nearest, eps = distance, t * t * (1 / response**2 - mean_square)
    # ε is a short decimal in every configuration, and the estimate is good to about six digits
    return float(f"{max(eps, 0.0):.5g}")


def _verify_norm(norm: Norm, module: nn.Module, d_model: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-24, 25, 4):
        vectors = (torch.randn(8, d_model, generator=generator) * 2.0**exponent).to(device)
        vectors[4:] += vectors[4:].std()
        expected = module(vectors)
        error = float((norm(vectors) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not error <= TOLERANCE:
            raise BacklensError(
                f"model: the final norm ({type(module).__name__}) is not affine up to a scalar per vector "
                f"(relative error {error:.1e} at vectors of size 2^{exponent}); the lens cannot be exact for it"
            )
