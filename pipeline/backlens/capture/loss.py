"""The loss of each prompt, and what the forward pass says about its target."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backlens.capture.batch import Batch


@dataclass(frozen=True)
class Outcome:
    """What the forward pass said, per prompt; float32."""

    loss: Float[Tensor, " prompt"]
    """−log p(target | prompt), summed over the target's tokens, natural logarithm."""
    target_rank: Int[Tensor, " prompt"]
    """Rank of the first target token among the model's logits of scored tokens (0 = largest)."""
    predicted_id: Int[Tensor, " prompt"]
    """The scored token with the largest one."""

    def to(self, device: torch.device) -> "Outcome":
        return Outcome(self.loss.to(device), self.target_rank.to(device), self.predicted_id.to(device))


def _losses(logits: Float[Tensor, "prompt step vocabulary"], batch: Batch) -> Float[Tensor, " prompt"]:
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    return losses.view_as(batch.targets).masked_fill(~batch.target_mask, 0.0).sum(-1)


def _outcome(
    logits: Float[Tensor, "prompt step vocabulary"],
    loss: Float[Tensor, " prompt"],
    batch: Batch,
    scored: slice | Int[Tensor, " token"],
) -> Outcome:
    target = logits[:, 0].gather(1, batch.targets[:, :1])
    among = logits[:, 0, scored]
    predicted = among.argmax(-1)
    return Outcome(
        loss, (among > target).sum(-1), predicted if isinstance(scored, slice) else scored[predicted]
    )
