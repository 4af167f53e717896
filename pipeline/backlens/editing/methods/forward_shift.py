"""Forward pass shifting (Katz et al., arXiv 2402.12865, §6), alone and for many edits at once.

The gradient of FF2 at the last position is x ⊗ δ, and δ is close to a negative multiple of the target's embedding; so
one forward pass to find x gives an edit: W ← W + η x ⊗ E[target], for y = x W.

What goes beyond the paper:

* `normalise`: a key k with x · k = 1 replaces x. Then the output at x moves by exactly η E[target], and η has the same
  meaning in every layer. k is x / ‖x‖² (`length`) or C⁻¹x / (xᵀC⁻¹x) (`covariance`); of all such keys, the latter has
  the least effect E‖k · x'‖² on the other inputs x' that C was measured over (ROME's choice of key).
* `ridge`: many edits at once ask for X D = V, with one row of X and of V = η E[target] per edit. The D that minimises
  ‖X D − V‖² + λ E‖x' D‖² is (λ C + XᵀX)⁻¹ Xᵀ V = C⁻¹Xᵀ (λ I + X C⁻¹Xᵀ)⁻¹ V: λ tokens of the texts weigh as much as one
  edit. In the plain sum of single shifts, edits add to each other's outputs.
* `passes`: the shift of a pass is (1 − p(target)) η E[target], with the p that the passes before produced. So an edit
  that works gets no more, and an edit that others have weakened gets more.
* `contrast`: E[target] − Σ p(token) E[token] replaces E[target]: the embeddings of the tokens that the model expects
  are subtracted, weighted by their probability. This is −δ at the head's input, so it needs no second factor.
* `temperature`: divides the logits that give p. Above 1, p is still below 1 when the target is the most probable token,
  so its lead grows, and other wordings follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backlens.editing.activations import (
    Moments,
    batches,
    damped,
    down_input,
    logits_of,
    subject_last,
    values_at,
    wordings,
)
from backlens.editing.delta import Delta, edited, matrix, merged
from backlens.editing.options import Normalise, Place
from backlens.editing.request import Request
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel
from backlens.prompts.tokenize import Example

MODULE = "mlp.down"


@dataclass(frozen=True)
class ForwardShift:
    """Writes the target's embedding at the layer's input of the prompt's last position."""

    layers: tuple[int, ...]
    lr: float
    """η; `normalise` decides which key it multiplies."""
    normalise: Normalise = "none"
    place: Place = "last"
    """Position whose input is the key: the prompt's last, or the subject's last."""
    prefixes: tuple[str, ...] = ("",)
    """Texts before the prompt; the key is the mean over them."""
    moments: Moments | None = None
    ridge: float | None = None
    """λ of the joint solution; None adds the edits up."""
    passes: int = 1
    contrast: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if (self.normalise == "covariance" or self.ridge is not None) and self.moments is None:
            raise BacklensError("forward-shift: give --statistics or --text for the covariance of the inputs")

    def __call__(self, loaded: LoadedModel, *requests: Request) -> tuple[Delta, ...]:
        examples = [wordings(loaded, request, self.prefixes) for request in requests]
        deltas: list[Delta] = []
        for number in range(self.passes):
            for layer in self.layers:
                matrix(loaded, layer, MODULE)
                with edited(loaded, deltas):
                    x = self._keys(loaded, layer, requests, examples)
                    v = self._shifts(loaded, [each[0] for each in examples], first=number == 0).to(x.device)
                v = v * (self.lr / len(self.layers))
                deltas.append(Delta(layer, MODULE, *self._solved(layer, x, v)))
        return merged(deltas)

    def _keys(
        self, loaded: LoadedModel, layer: int, requests: Sequence[Request], examples: Sequence[list[Example]]
    ) -> Float[Tensor, "token d_in"]:
        """One row per target token: the input at its position, as the mean over prefixes."""
        flat = [example for each in examples for example in each]
        places = [
            self._places(example, request)
            for request, each in zip(requests, examples, strict=True)
            for example in each
        ]
        sequences = [(example.token_ids, example.target_ids) for example in flat]
        inputs = iter(values_at(loaded, sequences, places, down_input(loaded, layer)))
        return torch.cat([torch.stack([next(inputs) for _ in each]).mean(0) for each in examples])

    def _shifts(
        self, loaded: LoadedModel, examples: Sequence[Example], first: bool
    ) -> Float[Tensor, "token d_model"]:
        """One row per target token, before η: the vector to add to the output at its position."""
        counts = [len(self._places(example)) for example in examples]
        targets = [token for e, count in zip(examples, counts, strict=True) for token in e.target_ids[:count]]
        wanted = target_embeddings(loaded, targets)
        if first and not self.contrast:
            return wanted
        said, expected = _said(loaded, examples, counts, self.temperature)
        return wanted - expected if self.contrast else wanted * (1 - said)[:, None]

    def _places(self, example: Example, request: Request | None = None) -> list[int]:
        if self.place == "subject":
            return [subject_last(example, request.where) if request else 0]
        last = len(example.token_ids) - 1
        return list(range(last, last + len(example.target_ids)))

    def _solved(self, layer: int, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """u and v of the delta, for keys x and shifts v."""
        if self.ridge is None and self.normalise == "none":
            return x, v
        if self.ridge is None and self.normalise == "length":
            return x / x.square().sum(-1, keepdim=True), v
        assert self.moments is not None
        c = damped(self.moments.at(layer)).to(x.device)
        keys = torch.linalg.solve(c, x.double().T).T  # C⁻¹x of every edit
        if self.ridge is None:
            return (keys / (keys * x).sum(-1, keepdim=True)).float(), v
        inner = x.double() @ keys.T
        inner = inner + self.ridge * torch.eye(len(x), dtype=inner.dtype, device=inner.device)
        return keys.float(), torch.linalg.solve(inner, v.double()).float()


@torch.no_grad()
def _said(
    loaded: LoadedModel, examples: Sequence[Example], counts: Sequence[int], temperature: float
) -> tuple[Float[Tensor, " token"], Float[Tensor, "token d_model"]]:
    """p of the first `counts` target tokens of each edit, and Σ p(token) E[token] at their positions."""
    said: list[Tensor] = [torch.empty(0)] * len(examples)
    expected = list(said)
    for indices, batch in batches(loaded, [(e.token_ids, e.target_ids) for e in examples]):
        p = (logits_of(loaded, batch) / temperature).softmax(-1)
        mean = expected_embeddings(loaded, p)
        of_target = p.gather(-1, batch.targets[..., None]).squeeze(-1)
        for row, index in enumerate(indices):
            said[index], expected[index] = of_target[row, : counts[index]], mean[row, : counts[index]]
    return torch.cat(said), torch.cat(expected)


def target_embeddings(loaded: LoadedModel, token_ids: Sequence[int]) -> Float[Tensor, "token d_model"]:
    """The unembedding rows of some tokens, in the model's width."""
    weight = loaded.parts.head_weight
    return _in_the_residual_stream(loaded, weight[torch.as_tensor(token_ids, device=weight.device)].float())


def expected_embeddings(
    loaded: LoadedModel, probabilities: Float[Tensor, "*place vocabulary"]
) -> Float[Tensor, "*place d_model"]:
    """The mean of the unembedding rows under given distributions over tokens."""
    weight = loaded.parts.head_weight.float()
    return _in_the_residual_stream(loaded, probabilities.to(weight.device) @ weight)


def _in_the_residual_stream(loaded: LoadedModel, rows: Tensor) -> Tensor:
    if loaded.parts.project_out is None:
        return rows
    weight = loaded.parts.project_out.weight
    assert isinstance(weight, Tensor)
    return rows @ weight.float()
