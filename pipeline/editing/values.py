"""What a place in the model should put out for the model to say a target: found by gradient descent, as in ROME.

For each request a vector d is added at one position to a module's output, so that over several prefixes the target
becomes likely, while "{subject} is a" goes on as before (ROME's equation 4; the same in MEMIT). All requests of a batch
are optimized side by side: each has its own d, and Adam treats every entry by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.capture import make_batch
from pipeline.editing.forward import Site, added_to, encode, logits_of, subject_last, whole_values, wordings
from pipeline.editing.request import Request
from pipeline.models.load import LoadedModel
from pipeline.prompts.subject import SubjectPlace
from pipeline.prompts.tokenize import Example

REQUESTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Search:
    """How values are looked for; as in ROME, but for a rate that means the same in models of any scale."""

    steps: int = 20
    lr: float = 0.5
    """Adam's, in root mean squares of the values before."""
    essence: float = 0.0625
    """Weight of KL(before ‖ after) at "{subject} is a"."""
    decay: float = 0.5
    """Weight of ‖d‖ / ‖value before‖²."""
    longest: float = 4.0
    """The most that d may measure, in lengths of the value before."""
    enough: float = 5e-2
    """A loss of all requests below which the search stops."""


@dataclass(frozen=True)
class Edit:
    """A request as the search sees it."""

    wordings: tuple[Example, ...]
    """Behind every prefix, the first of them empty."""
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
        """The position that is changed: the subject's last, or the prompt's."""
        return subject_last(example, self.where) if self.at_subject else len(example.token_ids) - 1


def find_values(
    loaded: LoadedModel, edits: Sequence[Edit], site: Site, search: Search
) -> Float[Tensor, "edit width"]:
    """d for each edit; float32."""
    chunks = [edits[start : start + REQUESTS_AT_ONCE] for start in range(0, len(edits), REQUESTS_AT_ONCE)]
    return torch.cat([_search(loaded, chunk, site, search) for chunk in chunks])


def _search(loaded: LoadedModel, edits: Sequence[Edit], site: Site, search: Search) -> Tensor:
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
            # prefixes of one edit are averaged, edits are not: one must not slow the other down
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


def _before(loaded: LoadedModel, edits: Sequence[Edit], site: Site) -> Float[Tensor, "edit width"]:
    """What the site puts out at the plain prompt's place."""
    plain = make_batch([(e.wordings[0].token_ids, e.wordings[0].target_ids) for e in edits], loaded.device)
    places = torch.tensor([edit.place(edit.wordings[0]) for edit in edits], device=loaded.device)
    values = whole_values(loaded, plain, replace(site, side="output")).float()
    return values[torch.arange(len(edits), device=values.device), places.to(values.device)]


@dataclass(frozen=True, eq=False)
class _Change:
    """Adds each row's d at its place."""

    d: Float[Tensor, "edit width"]
    owner: Int[Tensor, " row"]
    places: Int[Tensor, " row"]

    def __call__(self, values: Float[Tensor, "row position width"]) -> Float[Tensor, "row position width"]:
        added = torch.zeros_like(values)
        rows = torch.arange(len(values), device=values.device)
        places, owner = self.places.to(values.device), self.owner.to(values.device)
        return values + added.index_put((rows, places), self.d.to(values)[owner])
