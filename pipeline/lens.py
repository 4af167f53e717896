"""The lens: final norm, then unembedding, in the form lens(v) = s(v) · A v + c.

A norm is affine up to one scalar per vector, so scores of a *sum* of vectors follow from scores of its terms:
A v is linear, and only s(v) has to be known for the sum. That is what lets a neuron's projection come from the
projections of its prompt's positions (DESIGN §3).

With w, b, ε the norm's weight, bias and epsilon, C the centring of a LayerNorm (the identity for an RMSNorm),
U the unembedding and h its bias:

    A v = U (w ∘ C v)        c = U b + h        s(v) = (‖C v‖² / d + ε)^(-1/2)

A model without a final norm (OPT-350m) has w = 1, b = 0 and s(v) = 1; a linear map between norm and head is
folded into U, and a factor on the logits (Cohere, Granite) into U and h.

Which norm it is, and its w, b and ε, are read off the module's own outputs: class names say nothing certain
(Gemma's RMSNorm multiplies by 1 + w).
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import BacklensError
from pipeline.models.anatomy import Anatomy
from pipeline.models.structure import probe
from pipeline.models.vocabulary import index_of

Scaling = Literal["raw", "unit"]

TOLERANCE = 1e-5
"""Largest relative difference allowed between the affine form and the norm, and between lens and float32 logits."""

HALF_TOLERANCE = 3e-2
"""The same for logits of a model in bfloat16 or float16, which are rounded on their way."""


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


@dataclass(frozen=True)
class Lens:
    """Scores over the vocabulary for vectors of width d_model, before any logit soft-cap."""

    norm: Norm
    unembedding: Float[Tensor, "vocabulary d_model"]
    """U, the model's own parameter in its own dtype where nothing is folded in; tiles are read as float32."""
    constant: Float[Tensor, " vocabulary"]
    """c, the scores of the zero vector."""
    scaling: Scaling
    logit_scale: float = 1.0
    """What the model multiplies its head's output by; `constant` has it already."""
    ids: Int[Tensor, " vocabulary"] | None = None
    """The token of each row, ascending; None where row t is token t."""

    @property
    def vocabulary(self) -> int:
        """Tokens that are scored."""
        return self.unembedding.shape[0]

    @property
    def scored(self) -> slice | Int[Tensor, " vocabulary"]:
        """An index of the scored tokens among all of the model's."""
        return slice(self.vocabulary) if self.ids is None else self.ids

    def tokens(self, rows: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """The tokens of rows."""
        return rows if self.ids is None else self.ids.to(rows.dtype)[rows.long()]

    def rows(self, tokens: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """The rows of tokens. Raises ValueError for one that is not scored."""
        rows = tokens if self.ids is None else torch.searchsorted(self.ids, tokens)
        missing = rows >= self.vocabulary
        if self.ids is not None:
            missing |= self.tokens(rows.clamp_max(self.vocabulary - 1)) != tokens
        if missing.any():
            raise ValueError(
                f"token {int(tokens[missing][0])} is not in the tokenizer's vocabulary; use --vocabulary model"
            )
        return rows

    @property
    def d_model(self) -> int:
        return self.unembedding.shape[1]

    def to(self, device: torch.device) -> "Lens":
        """The same lens, for vectors that are on another device."""
        return replace(
            self,
            norm=self.norm.to(device),
            unembedding=self.unembedding.to(device),
            constant=self.constant.to(device),
            ids=None if self.ids is None else self.ids.to(device),
        )

    def linear(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """w ∘ C v, times the logit scale: what the unembedding multiplies, before s(v)."""
        return self.norm.centre(vectors) * (self.norm.weight * self.logit_scale)

    def scale(
        self, squared_norm: Float[Tensor, "*batch"], squared_centred: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """s(v) from ‖v‖² and ‖C v‖²; for `unit` scaling, the s that gives lens(v / ‖v‖).

        A zero vector gets a finite value of no meaning: its scores are not reported.
        """
        rule = self.norm.scale if self.scaling == "raw" else self.norm.unit_scale
        return rule(squared_norm, squared_centred)

    def tile(self, start: int, stop: int) -> Float[Tensor, "tile d_model"]:
        return self.unembedding[start:stop].float()


@torch.no_grad()
def make_lens(parts: Anatomy, scaling: Scaling, token_ids: Sequence[int] | None = None) -> Lens:
    """Probe the final norm, and fold what lies between it and the logits into U and c.

    Only `token_ids` (ascending) are scored, or every row of the unembedding. Rows are copied where there are gaps.

    Raises BacklensError when the norm is not affine up to one scalar per vector.
    """
    index = index_of(token_ids, parts.vocabulary)
    unembedding = parts.head_weight.detach()[index]
    ids = torch.tensor(index, device=unembedding.device) if isinstance(index, list) else None
    norm = _final_norm(parts, unembedding.device)
    constant = unembedding.new_zeros(len(unembedding), dtype=torch.float32)
    for module in (parts.head, parts.project_out):
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            constant += bias[index].float() if module is parts.head else fold_bias(unembedding, bias.float())
    if parts.project_out is not None:
        weight = parts.project_out.weight
        assert isinstance(weight, Tensor)
        unembedding = unembedding.float() @ weight.float()
    constant += fold_bias(unembedding, norm.bias)
    return Lens(norm, unembedding, constant * parts.logit_scale, scaling, parts.logit_scale, ids)


def verify_lens(model: PreTrainedModel, parts: Anatomy, lens: Lens) -> float:
    """`lens_error`, refused above `lens_tolerance`: then something behind the last block is not as we know it."""
    error, tolerance = lens_error(model, parts, lens), lens_tolerance(model)
    if not error <= tolerance:
        raise BacklensError(
            f"model: the lens does not give this model's logits (relative error {error:.1e}, at most {tolerance:.0e}); "
            "something between its last block and its logits is unknown to us"
        )
    return error


def lens_tolerance(model: PreTrainedModel) -> float:
    return TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE


def lens_error(model: PreTrainedModel, parts: Anatomy, lens: Lens) -> float:
    """The lens of the last block's output against the model's own logits: the largest difference, relative."""
    kept: list[Tensor] = []
    handle = parts.blocks[-1].module.register_forward_hook(
        lambda _module, _args, output: kept.append(output if isinstance(output, Tensor) else output[0])
    )
    try:
        logits = probe(model).float()[:, lens.scored]
    finally:
        handle.remove()
    hidden = kept[0].detach().flatten(0, -2).float().to(lens.unembedding.device)
    scale = lens.norm.scale(hidden.square().sum(-1), lens.norm.centre(hidden).square().sum(-1))
    scores = scale[:, None] * (lens.linear(hidden) @ lens.unembedding.float().T) + lens.constant
    if parts.softcap is not None:
        scores = parts.softcap * (scores / parts.softcap).tanh()
    return float((scores - logits).abs().max() / logits.abs().max())


def _final_norm(parts: Anatomy, device: torch.device) -> Norm:
    if parts.final_norm is not None:
        return probe_norm(parts.final_norm, parts.d_model, device)
    ones = torch.ones(parts.d_model, device=device)
    return Norm(ones, torch.zeros_like(ones), 0.0, centred=False, normalizing=False)


def fold_bias(
    unembedding: Float[Tensor, "vocabulary d_model"], bias: Float[Tensor, " d_model"], tile: int = 16384
) -> Float[Tensor, " vocabulary"]:
    """U b in float32, tile by tile so that a half-precision U is never copied whole."""
    return torch.cat([part.float() @ bias for part in unembedding.split(tile)])


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
