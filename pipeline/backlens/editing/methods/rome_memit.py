"""ROME and MEMIT: values found by gradient descent, and written by a closed form that changes other inputs least.

Both treat FF2 of a layer as a memory from keys (its inputs at the subject's last token) to values (its outputs).

The search for values: per request, a vector d is added to a module's output at one position, so that the target
becomes probable after several prefixes while the prediction after "{subject} is a" stays (ROME's equation 4; the same
in MEMIT). All requests of a batch are optimized together: each has its own d, and Adam treats every entry by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from backlens.capture.batch import make_batch
from backlens.editing.activations import (
    EditSite,
    Moments,
    added_to,
    damped,
    down_input,
    encode,
    logits_of,
    subject_last,
    values_at,
    whole_values,
    wordings,
)
from backlens.editing.delta import Delta, edited, matrix
from backlens.editing.methods.forward_shift import MODULE
from backlens.editing.options import Place
from backlens.editing.request import Request
from backlens.models.load import LoadedModel
from backlens.prompts.prompt import SubjectPlace
from backlens.prompts.tokenize import Example

REQUESTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Search:
    """Settings of the search for values, as in ROME; but the rate is relative, so that it fits models of any scale."""

    steps: int = 20
    lr: float = 0.5
    """Adam's learning rate, relative to the root mean square of the values before the edit."""
    essence: float = 0.0625
    """Weight of KL(before ‖ after) at "{subject} is a"."""
    decay: float = 0.5
    """Weight of ‖d‖ / ‖value before‖²."""
    longest: float = 4.0
    """Limit on ‖d‖, relative to the norm of the value before the edit."""
    enough: float = 5e-2
    """The search stops when the loss of every request is below this, in nats."""


@dataclass(frozen=True)
class Edit:
    """A request, encoded for the search."""

    wordings: tuple[Example, ...]
    """The prompt after every prefix; the first prefix is empty."""
    essence: Example | None
    where: str
    at_subject: bool

    @classmethod
    def of(cls, loaded: LoadedModel, request: Request, prefixes: Sequence[str], at_subject: bool) -> "Edit":
        essence = None
        if at_subject and request.subject is not None:
            pairs = [(f"{request.subject} is", " a")]
            (essence,) = encode(
                loaded, pairs, request.where, [SubjectPlace(0, len(request.subject.rstrip()))]
            )
            essence = replace(essence, token_ids=(*essence.token_ids, *essence.target_ids))
        return cls(tuple(wordings(loaded, request, prefixes)), essence, request.where, at_subject)

    def place(self, example: Example) -> int:
        """The edited position: the last one of the subject or of the prompt."""
        return subject_last(example, self.where) if self.at_subject else len(example.token_ids) - 1


def find_values(
    loaded: LoadedModel, edits: Sequence[Edit], site: EditSite, search: Search
) -> Float[Tensor, "edit width"]:
    """One d per edit, float32."""
    chunks = [edits[start : start + REQUESTS_AT_ONCE] for start in range(0, len(edits), REQUESTS_AT_ONCE)]
    return torch.cat([_search(loaded, chunk, site, search) for chunk in chunks])


def _search(loaded: LoadedModel, edits: Sequence[Edit], site: EditSite, search: Search) -> Tensor:
    rows = [(number, e, True) for number, edit in enumerate(edits) for e in edit.wordings]
    rows += [(number, edit.essence, False) for number, edit in enumerate(edits) if edit.essence is not None]
    batch = make_batch([(e.token_ids, e.target_ids) for _, e, _ in rows], loaded.device)
    owner = torch.tensor([number for number, _, _ in rows], device=loaded.device)
    places = torch.tensor([edits[number].place(e) for number, e, _ in rows], device=loaded.device)
    spoken = torch.tensor([is_wording for _, _, is_wording in rows], device=loaded.device)
    before = _before(loaded, edits, site)
    longest = search.longest * before.norm(dim=-1, keepdim=True)
    d = torch.zeros_like(before, requires_grad=True)
    optimizer = torch.optim.Adam([d], lr=search.lr * float(before.square().mean().sqrt()))
    change = _Change(d, owner, places)
    reference: Tensor | None = None
    shape = (batch.mask.shape[0], batch.mask.shape[1])
    for step in range(search.steps + 1):
        with torch.enable_grad(), added_to(site.module, change, shape):
            scores = logits_of(loaded, batch).log_softmax(-1)
            nll = -scores.gather(-1, batch.targets[..., None]).squeeze(-1) * batch.target_mask
            # the loss is a mean over prefixes, but not over edits, which would slow each other down
            said = torch.zeros(len(edits), device=d.device).index_add(
                0, owner[spoken], nll[spoken].sum(-1) / batch.target_mask[spoken].sum(-1)
            ) / len(edits[0].wordings)
            loss = said + search.decay * (d.norm(dim=-1) / before.square().sum(-1))
            essence = scores[~spoken, 0]
            if len(essence):
                reference = essence.detach() if reference is None else reference
                drift = (reference.exp() * (reference - essence)).sum(-1)
                loss = loss.index_add(0, owner[~spoken], search.essence * drift)
            if step == search.steps or float(loss.detach().max()) < search.enough:
                break
            (d.grad,) = torch.autograd.grad(loss.sum(), [d])
        optimizer.step()
        with torch.no_grad():
            d.mul_((longest / d.norm(dim=-1, keepdim=True)).clamp_max(1.0))
    return d.detach()


def _before(loaded: LoadedModel, edits: Sequence[Edit], site: EditSite) -> Float[Tensor, "edit width"]:
    """The site's output at the edited position of the prompt without a prefix."""
    plain = make_batch([(e.wordings[0].token_ids, e.wordings[0].target_ids) for e in edits], loaded.device)
    places = torch.tensor([edit.place(edit.wordings[0]) for edit in edits], device=loaded.device)
    values = whole_values(loaded, plain, replace(site, side="output")).float()
    return values[torch.arange(len(edits), device=values.device), places.to(values.device)]


@dataclass(frozen=True, eq=False)
class _Change:
    """Adds each row's d at the edited position."""

    d: Float[Tensor, "edit width"]
    owner: Int[Tensor, " row"]
    places: Int[Tensor, " row"]

    def __call__(self, values: Float[Tensor, "row position width"]) -> Float[Tensor, "row position width"]:
        added = torch.zeros_like(values)
        rows = torch.arange(len(values), device=values.device)
        places, owner = self.places.to(values.device), self.owner.to(values.device)
        return values + added.index_put((rows, places), self.d.to(values)[owner])


@dataclass(frozen=True)
class Rome:
    """Rank-one model editing (Meng et al., arXiv 2202.05262): W ← W + (C⁻¹k*) ⊗ Λ, for y = x W.

    k* is the key, as the mean over prefixes. Λ = d / (k · C⁻¹k*), where k is the prompt's own key and d the wanted
    change of its value (equation 2, with k for k* in the denominator as in the authors' code). So k maps to the new
    value exactly. Several requests are edited one after another.
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
    """Mass-editing memory (Meng et al., arXiv 2210.07229): many edits at once, shared by several layers.

    Per edit, z is the wanted output of the last of the layers (equation 16 of the paper). Then, layer by layer, keys K
    and residuals R are computed again, and the r layers that are left share R equally (equation 20):
    Δ = (λ C + KᵀK)⁻¹ Kᵀ R / r, with one row of K and R per edit (equation 14, transposed).
    """

    layers: tuple[int, ...]
    moments: Moments
    weight: float = 15000.0
    """λ: weight of the texts; the larger, the less an edit changes other inputs."""
    prefixes: tuple[str, ...] = ("",)
    place: Place = "subject"
    search: Search = field(default_factory=Search)

    def __call__(self, loaded: LoadedModel, *requests: Request) -> tuple[Delta, ...]:
        edits = [Edit.of(loaded, request, self.prefixes, self.place == "subject") for request in requests]
        block = EditSite(loaded.parts.blocks[self.layers[-1]].module, "output")
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
    """FF2's inputs at the edited position of each wording."""
    matrix(loaded, layer, MODULE)
    flat = [(edit, example) for edit in edits for example in edit.wordings]
    sequences = [(example.token_ids, example.target_ids) for _, example in flat]
    places = [[edit.place(example)] for edit, example in flat]
    found = iter(values_at(loaded, sequences, places, down_input(loaded, layer)))
    return [torch.cat([next(found) for _ in edit.wordings]) for edit in edits]


def outputs_of(loaded: LoadedModel, edits: Sequence[Edit], site: EditSite) -> Float[Tensor, "edit width"]:
    """The site's output at the edited position of each prompt without a prefix."""
    examples = [edit.wordings[0] for edit in edits]
    places = [[edit.place(example)] for edit, example in zip(edits, examples, strict=True)]
    return torch.cat(values_at(loaded, [(e.token_ids, e.target_ids) for e in examples], places, site))
