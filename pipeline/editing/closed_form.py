"""ROME and MEMIT: values found by gradient descent, written by a closed form that spares what the model has read.

Both take FF2 of a layer as a memory from keys (its inputs, at the subject's last token) to values (its outputs).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.editing.covariance import Moments, damped
from pipeline.editing.delta import Delta
from pipeline.editing.forward import Site, down_input, values_at
from pipeline.editing.forward_shift import MODULE
from pipeline.editing.options import Place
from pipeline.editing.request import Request
from pipeline.editing.values import Edit, Search, find_values
from pipeline.editing.weights import edited, matrix
from pipeline.models.load import LoadedModel


@dataclass(frozen=True)
class Rome:
    """Rank-one model editing (Meng et al., arXiv 2202.05262): W ← W + (C⁻¹k*) ⊗ Λ, for y = x W.

    With k* the key, mean over prefixes, Λ = d / (k · C⁻¹k*), where k is the prompt's own key and d what its value must
    change by (equation 2; k instead of k* in the denominator is the authors' code). So k maps to the new value
    exactly. Several requests are edited one after the other.
    """

    layer: int
    moments: Moments
    prefixes: tuple[str, ...] = ("",)
    place: Place = "subject"
    search: Search = field(default_factory=Search)

    def __call__(self, loaded: LoadedModel, *requests: Request) -> tuple[Delta, ...]:
        deltas: list[Delta] = []
        c = damped(self.moments.at(self.layer))
        for request in requests:
            with edited(loaded, deltas):
                edit = Edit.of(loaded, request, self.prefixes, self.place == "subject")
                keys = keys_of(loaded, [edit], self.layer)[0]
                d = find_values(loaded, [edit], down_input(loaded, self.layer), self.search)
            u = torch.linalg.solve(c.to(keys.device), keys.double().mean(0))
            deltas.append(Delta(self.layer, MODULE, (u / (u @ keys[0].double())).float()[None], d))
        return tuple(deltas)


@dataclass(frozen=True)
class Memit:
    """Mass-editing memory (Meng et al., arXiv 2210.07229): many edits at once, spread over several layers.

    For each edit, z is what the last of the layers should put out (their equation 16). Then layer by layer, with
    keys K and residuals R recomputed, each of the layers left takes an equal share r of R (their equation 20):
    Δ = (λ C + KᵀK)⁻¹ Kᵀ R / r, rows of K and R being edits (equation 14, transposed).
    """

    layers: tuple[int, ...]
    moments: Moments
    weight: float = 15000.0
    """λ: how many tokens of the text an edit is outweighed by."""
    prefixes: tuple[str, ...] = ("",)
    place: Place = "subject"
    search: Search = field(default_factory=Search)

    def __call__(self, loaded: LoadedModel, *requests: Request) -> tuple[Delta, ...]:
        edits = [Edit.of(loaded, request, self.prefixes, self.place == "subject") for request in requests]
        block = Site(loaded.anatomy.blocks[self.layers[-1]].module, "output")
        wanted = find_values(loaded, edits, block, self.search) + outputs_of(loaded, edits, block)
        deltas: list[Delta] = []
        for number, layer in enumerate(self.layers):
            with edited(loaded, deltas):
                keys = torch.stack([each.mean(0) for each in keys_of(loaded, edits, layer)])
                residual = (wanted - outputs_of(loaded, edits, block)) / (len(self.layers) - number)
            deltas.append(Delta(layer, MODULE, *spread(keys, residual, self.moments.at(layer), self.weight)))
        return tuple(deltas)


def spread(
    keys: Float[Tensor, "edit d_in"],
    residual: Float[Tensor, "edit d_out"],
    moments: Float[Tensor, "d_in d_in"],
    weight: float,
) -> tuple[Float[Tensor, "edit d_in"], Float[Tensor, "edit d_out"]]:
    """u and v of Δ = (λ C + KᵀK)⁻¹ Kᵀ R."""
    k = keys.double()
    system = weight * damped(moments).to(k.device) + k.T @ k
    return torch.linalg.solve(system, k.T).T.float(), residual


def keys_of(loaded: LoadedModel, edits: Sequence[Edit], layer: int) -> list[Float[Tensor, "prefix d_in"]]:
    """FF2's inputs at the place of each wording."""
    matrix(loaded, layer, MODULE)
    flat = [(edit, example) for edit in edits for example in edit.wordings]
    sequences = [(example.token_ids, example.target_ids) for _, example in flat]
    places = [[edit.place(example)] for edit, example in flat]
    found = iter(values_at(loaded, sequences, places, down_input(loaded, layer)))
    return [torch.cat([next(found) for _ in edit.wordings]) for edit in edits]


def outputs_of(loaded: LoadedModel, edits: Sequence[Edit], site: Site) -> Float[Tensor, "edit width"]:
    """What a site puts out at each plain prompt's place."""
    examples = [edit.wordings[0] for edit in edits]
    places = [[edit.place(example)] for edit, example in zip(edits, examples, strict=True)]
    return torch.cat(values_at(loaded, [(e.token_ids, e.target_ids) for e in examples], places, site))
