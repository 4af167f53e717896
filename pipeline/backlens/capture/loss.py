"""The loss whose gradients are read, and what `prompts` says of each prompt's forward pass.

A loss is an object that maps logits to one number per prompt. `NLL` is the one of the paper; another one subclasses
`LossFunction` and is passed to `BackwardLens.gradient(loss=…)` or `capture(loss=…)`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from backlens.capture.batch import Batch


@dataclass(frozen=True)
class Outcome:
    """Facts of a batch's forward pass, one value per prompt: columns of `prompts`."""

    loss: Float[Tensor, " prompt"]
    """The loss whose gradients are taken, float32; in nats for `NLL`."""
    target_log_prob: Float[Tensor, " prompt"]
    """log p(target | prompt), over all target tokens that are used, float32; `prompts` has p itself."""
    target_rank: Int[Tensor, " prompt"]
    """Number of scored tokens with a larger logit than the target's first token (0 = predicted)."""
    predicted_id: Int[Tensor, " prompt"]
    """The scored token with the largest logit behind the prompt."""

    def to(self, device: torch.device) -> "Outcome":
        return Outcome(*(getattr(self, field.name).to(device) for field in fields(self)))


class LossFunction(ABC):
    """A differentiable number per prompt. The gradient is that of the sum over the batch, never of a mean."""

    def positions(self, batch: Batch) -> Int[Tensor, "prompt step"]:
        """Columns of the batch whose logits are computed: `batch.loss_positions`, and any further ones behind them."""
        return batch.loss_positions

    @abstractmethod
    def __call__(
        self,
        logits: Float[Tensor, "prompt step vocabulary"],
        targets: Int[Tensor, "prompt target"],
        mask: Bool[Tensor, "prompt target"],
    ) -> Float[Tensor, " prompt"]:
        """Compute the loss of each prompt from float32 logits at `positions`.

        The logits of step i predict `targets[:, i]`; `mask` is False where a prompt has fewer targets.
        """

    def target_log_prob(
        self,
        logits: Float[Tensor, "prompt step vocabulary"],
        loss: Float[Tensor, " prompt"],
        targets: Int[Tensor, "prompt target"],
        mask: Bool[Tensor, "prompt target"],
    ) -> Float[Tensor, " prompt"]:
        """Compute log p(target | prompt)."""
        return NLL(logits[:, : targets.shape[1]], targets, mask).neg()

    def facts(
        self,
        logits: Float[Tensor, "prompt step vocabulary"],
        loss: Float[Tensor, " prompt"],
        batch: Batch,
        scored: slice | Int[Tensor, " token"],
    ) -> Outcome:
        """Say how likely the target is, and where it ranks among the `scored` token ids."""
        first = logits[:, 0]
        target, among = first.gather(1, batch.targets[:, :1]), first[:, scored]
        predicted = among.argmax(-1)
        return Outcome(
            loss,
            self.target_log_prob(logits, loss, batch.targets, batch.target_mask),
            (among > target).sum(-1),
            predicted if isinstance(scored, slice) else scored[predicted],
        )


@dataclass(frozen=True)
class NegativeLogLikelihood(LossFunction):
    """−log p(target | prompt), summed over the target's tokens, in nats (arXiv 2402.12865, §3)."""

    def __call__(
        self,
        logits: Float[Tensor, "prompt step vocabulary"],
        targets: Int[Tensor, "prompt target"],
        mask: Bool[Tensor, "prompt target"],
    ) -> Float[Tensor, " prompt"]:
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets).masked_fill(~mask, 0.0).sum(-1)

    def target_log_prob(
        self,
        logits: Float[Tensor, "prompt step vocabulary"],
        loss: Float[Tensor, " prompt"],
        targets: Int[Tensor, "prompt target"],
        mask: Bool[Tensor, "prompt target"],
    ) -> Float[Tensor, " prompt"]:
        return loss.neg()


NLL = NegativeLogLikelihood()
