"""Edits by the exact gradient: one step of gradient descent from its factors, and fine-tuning with Adam.

The loss is −log p(target), summed over the target's tokens. `backlens.capture.hooks` gives the factors of its gradient;
the weights themselves have no gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backlens.capture.batch import make_batch
from backlens.capture.factors import masked
from backlens.capture.hooks import Gradient, capture
from backlens.editing.activations import wordings
from backlens.editing.delta import Delta, edited, matrix
from backlens.editing.request import Request
from backlens.models.load import LoadedModel


def gradients(
    loaded: LoadedModel, requests: Sequence[Request], layers: Sequence[int], modules: Sequence[str]
) -> tuple[dict[tuple[int, str], tuple[Tensor, Tensor]], Tensor]:
    """(X, Δ) of every matrix over all positions of all requests, and the loss of each request in nats."""
    examples = [wordings(loaded, request, ("",))[0] for request in requests]
    batch = make_batch([(e.token_ids, e.target_ids) for e in examples], loaded.device)
    found: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def consume(group: Sequence[Gradient]) -> None:
        for gradient in group:
            real = gradient.slots.mask
            x = masked(gradient.x, gradient.slots)[0][real]
            found[gradient.layer, gradient.module] = x, masked(gradient.vjp, gradient.slots)[0][real]

    outcome = capture(loaded, batch, layers, modules, consume)
    return found, outcome.loss


@dataclass(frozen=True)
class GradientShift:
    """One step of gradient descent: W ← W − η Σ over positions of x ⊗ δ.

    In the paper's terms (§5), the update of FF1 imprints the inputs x and the update of FF2 shifts the output.
    `modules` selects them: `mlp.up` and, if the model has it, `mlp.gate`; `mlp.down`.
    """

    layers: tuple[int, ...]
    lr: float
    modules: tuple[str, ...] = ("mlp.up", "mlp.gate", "mlp.down")

    def __call__(self, loaded: LoadedModel, *requests: Request) -> tuple[Delta, ...]:
        modules = [name for name in self.modules if any(name in b.matrices for b in loaded.parts.blocks)]
        factors, _ = gradients(loaded, requests, self.layers, modules)
        return tuple(Delta(*key, x, -self.lr * vjp) for key, (x, vjp) in sorted(factors.items()))


@dataclass(frozen=True)
class FineTune:
    """Adam on whole matrices until the loss is low: FT, and with `limit` the norm-constrained FT-L, set up as the
    baselines of ROME (arXiv 2202.05262, §E.1; Zhu et al., arXiv 2012.00363)."""

    layers: tuple[int, ...]
    lr: float = 5e-4
    modules: tuple[str, ...] = ("mlp.down",)
    steps: int = 25
    enough: float = 1e-2
    """Mean loss, in nats, at which the training stops."""
    limit: float | None = None
    """Limit on the change of every entry of a matrix (an L∞ ball)."""

    def __call__(self, loaded: LoadedModel, *requests: Request) -> tuple[Delta, ...]:
        keys = [(layer, module) for layer in self.layers for module in self.modules]
        changes = {key: torch.zeros_like(matrix(loaded, *key).read()) for key in keys}
        optimizer = torch.optim.Adam(list(changes.values()), lr=self.lr)
        for _ in range(self.steps):
            with edited(loaded, _deltas(changes)):
                factors, loss = gradients(loaded, requests, self.layers, self.modules)
            if float(loss.mean()) < self.enough:
                break
            for key, (x, vjp) in factors.items():
                changes[key].grad = (x.T @ vjp) / len(requests)
            optimizer.step()
            for change in changes.values():
                if self.limit is not None:
                    change.clamp_(-self.limit, self.limit)
        return _deltas(changes)


def _deltas(changes: Mapping[tuple[int, str], Tensor]) -> tuple[Delta, ...]:
    return tuple(Delta.full(*key, change) for key, change in changes.items())
