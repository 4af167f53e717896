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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from backlens.errors import BacklensError
from backlens.models.blocks import ModelParts
from backlens.models.final_norm import TOLERANCE, Norm, probe_norm
from backlens.models.module_tree import probe
from backlens.models.vocabulary import index_of

Scaling = Literal["raw", "unit"]


HALF_TOLERANCE = 3e-2
"""The same for logits of a model in bfloat16 or float16, which are rounded on their way."""


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
def make_lens(parts: ModelParts, scaling: Scaling, token_ids: Sequence[int] | None = None) -> Lens:
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


def verify_lens(model: PreTrainedModel, parts: ModelParts, lens: Lens) -> float:
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


def lens_error(model: PreTrainedModel, parts: ModelParts, lens: Lens) -> float:
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


def _final_norm(parts: ModelParts, device: torch.device) -> Norm:
    if parts.final_norm is not None:
        return probe_norm(parts.final_norm, parts.d_model, device)
    ones = torch.ones(parts.d_model, device=device)
    return Norm(ones, torch.zeros_like(ones), 0.0, centred=False, normalizing=False)


def fold_bias(
    unembedding: Float[Tensor, "vocabulary d_model"], bias: Float[Tensor, " d_model"], tile: int = 16384
) -> Float[Tensor, " vocabulary"]:
    """U b in float32, tile by tile so that a half-precision U is never copied whole."""
    return torch.cat([part.float() @ bias for part in unembedding.split(tile)])
