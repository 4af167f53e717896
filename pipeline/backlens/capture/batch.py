"""A batch of padded prompts, and the tokens of it that the rows of a gradient stand for."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Side = Literal["right", "left"]


@dataclass(frozen=True)
class Batch:
    """Padded prompts, and where their targets are predicted. All tensors are on the model's input device."""

    input_ids: Int[Tensor, "prompt position"]
    mask: Bool[Tensor, "prompt position"]
    """True at real tokens."""
    loss_positions: Int[Tensor, "prompt step"]
    """Columns of `input_ids` whose logits predict the targets."""
    targets: Int[Tensor, "prompt step"]
    target_mask: Bool[Tensor, "prompt step"]
    """True where a prompt has a target token at that step."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, eq=False)
class Slots:
    """The tokens of a batch that a gradient's rows stand for: every token, or those routed to an expert."""

    prompts: Int[Tensor, " row"]
    """Rows of the batch that have a token here, in ascending order."""
    columns: Int[Tensor, "row slot"]
    """Columns of the batch, in ascending order; undefined where `mask` is False."""
    mask: Bool[Tensor, "row slot"]
    """True at real tokens."""
    full: bool = False
    """True if all of them are known to be real tokens, so that nothing has to be masked."""

    @classmethod
    def every(cls, batch: Batch) -> "Slots":
        """Make the slots of every token of a batch."""
        prompts, positions = batch.mask.shape
        device = batch.mask.device
        columns = torch.arange(positions, device=device).expand(prompts, -1)
        return cls(torch.arange(prompts, device=device), columns, batch.mask, bool(batch.mask.all()))

    def to(self, device: torch.device) -> "Slots":
        return Slots(self.prompts.to(device), self.columns.to(device), self.mask.to(device), self.full)

    @classmethod
    def routed(cls, tokens: Int[Tensor, " token"], batch: Batch) -> tuple["Slots", Tensor, Tensor, Tensor]:
        """Make the slots of some tokens, given as indices into the flattened batch, in ascending order.

        Returns the slots, the places of the real tokens among `tokens`, and the row and slot of each.
        """
        width = batch.mask.shape[1]
        real = batch.mask.to(tokens.device).flatten()[tokens].nonzero().squeeze(-1)
        prompts, row, counts = (tokens[real] // width).unique_consecutive(
            return_inverse=True, return_counts=True
        )
        slot = torch.arange(len(real), device=tokens.device) - (counts.cumsum(0) - counts)[row]
        mask = torch.arange(int(counts.max()) if len(counts) else 0, device=tokens.device) < counts[:, None]
        columns = torch.zeros_like(mask, dtype=torch.long)
        columns[row, slot] = tokens[real] % width
        return cls(prompts, columns, mask), real, row, slot


def make_batch(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    device: torch.device,
    side: Side = "right",
) -> Batch:
    """Pad (prompt ids, target ids) pairs; all target tokens but the last follow the prompt (teacher forcing).

    A row is padded with its own first token. Attention gives padding a weight of zero, but zero times the value
    of a token whose embedding is not finite is not zero.
    """
    inputs = [[*prompt, *target[:-1]] for prompt, target in sequences]
    width, steps = max(map(len, inputs)), max(len(target) for _, target in sequences)
    shape = (len(sequences), width)
    input_ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    loss_positions = torch.zeros((len(sequences), steps), dtype=torch.long)
    targets, target_mask = (
        torch.zeros_like(loss_positions),
        torch.zeros_like(loss_positions, dtype=torch.bool),
    )
    for row, (ids, (prompt, target)) in enumerate(zip(inputs, sequences, strict=True)):
        start = 0 if side == "right" else width - len(ids)
        input_ids[row] = ids[0]
        input_ids[row, start : start + len(ids)] = torch.tensor(ids)
        mask[row, start : start + len(ids)] = True
        first = start + len(prompt) - 1
        loss_positions[row, : len(target)] = torch.arange(first, first + len(target))
        targets[row, : len(target)] = torch.tensor(target)
        target_mask[row, : len(target)] = True
    return Batch(*(t.to(device) for t in (input_ids, mask, loss_positions, targets, target_mask)))
