"""One forward and one backward to activations; inputs and VJPs handed over module by module.

Weights never require grad: the graph starts at the embeddings' output, so nothing weight-sized is allocated.
A forward hook keeps each module's input x and puts a hook on its output *tensor*, which receives the VJP δ
(output-tensor hooks survive module reuse and do not wrap modules, DESIGN §8). As soon as every module that
shares an input has its δ, the group is handed to the consumer and forgotten.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.models.anatomy import Located
from pipeline.models.layout import READS
from pipeline.models.load import LoadedModel

Side = Literal["right", "left"]


@dataclass(frozen=True)
class Batch:
    """Padded prompts and where their loss is read. Every tensor is on the model's device."""

    input_ids: Int[Tensor, "prompt position"]
    mask: Bool[Tensor, "prompt position"]
    """True at real tokens."""
    loss_positions: Int[Tensor, "prompt step"]
    """Columns of `input_ids` whose logits predict the targets."""
    targets: Int[Tensor, "prompt step"]
    target_mask: Bool[Tensor, "prompt step"]
    """True where a prompt has a target token at that step."""


@dataclass(frozen=True)
class Gradient:
    """The factors of one weight matrix's gradient, as the model computed them: G = Σ over positions x ⊗ δ.

    Padding is not masked in `x`; in `vjp` it is exactly zero only with right padding.
    """

    layer: int
    module: str
    x: Float[Tensor, "prompt position d_in"]
    vjp: Float[Tensor, "prompt position d_out"]


@dataclass(frozen=True)
class Outcome:
    """What the forward pass said, per prompt; float32."""

    loss: Float[Tensor, " prompt"]
    """−log p(target | prompt), summed over the target's tokens, natural logarithm."""
    target_rank: Int[Tensor, " prompt"]
    """Rank of the first target token among the model's logits (0 = largest)."""
    predicted_id: Int[Tensor, " prompt"]


Consumer = Callable[[Sequence[Gradient]], None]
"""Receives the gradients of modules that share their residual side: `x` is one tensor for all of them."""


def make_batch(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    device: torch.device,
    side: Side = "right",
) -> Batch:
    """Pad (prompt ids, target ids) pairs; all target tokens but the last are teacher-forced behind the prompt.

    A row is padded with its own first token. Attention gives padding a weight of zero, but zero times the values
    of a token whose embedding is not finite would not be zero.
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


def capture(
    loaded: LoadedModel,
    batch: Batch,
    layers: Collection[int],
    modules: Collection[str],
    consume: Consumer,
) -> Outcome:
    """Run `batch` and give `consume` every group of gradients of the chosen layers and modules, last layer first.

    The loss is the sum over the batch: a mean would make a prompt's gradient depend on its neighbours.
    """
    with ExitStack() as hooks:
        hooks.enter_context(_graph_from_embeddings(loaded.anatomy.embeddings))
        hooks.enter_context(_only_loss_positions(loaded.anatomy.head, batch.loss_positions))
        for layer in layers:
            recorder = _LayerRecorder(layer, batch.mask.shape, consume)
            for path, matrices in _by_submodule(loaded.anatomy.matrices, modules):
                submodule = loaded.anatomy.blocks[layer].get_submodule(path)
                hooks.enter_context(_hook(submodule, recorder.recording(matrices)))
        with torch.enable_grad():
            logits_BSV = loaded.model(
                input_ids=batch.input_ids,
                attention_mask=batch.mask.long(),
                position_ids=(batch.mask.cumsum(-1) - 1).clamp_min(0),
                use_cache=False,
            ).logits.float()
            loss = _losses(logits_BSV, batch)
            outcome = _outcome(logits_BSV.detach(), loss.detach(), batch)
            del logits_BSV
            loss.sum().backward()
    return outcome


def _losses(logits: Float[Tensor, "prompt step vocabulary"], batch: Batch) -> Float[Tensor, " prompt"]:
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    return losses.view_as(batch.targets).masked_fill(~batch.target_mask, 0.0).sum(-1)


def _outcome(
    logits: Float[Tensor, "prompt step vocabulary"], loss: Float[Tensor, " prompt"], batch: Batch
) -> Outcome:
    first = logits[:, 0]
    target = first.gather(1, batch.targets[:, :1])
    return Outcome(loss, (first > target).sum(-1), first.argmax(-1))


class _LayerRecorder:
    """Inputs and VJPs of one layer's modules until a group that shares an input is complete."""

    def __init__(self, layer: int, shape: torch.Size, consume: Consumer) -> None:
        self._layer = layer
        self._shape = shape
        self._consume = consume
        self._waiting: dict[object, dict[str, Tensor]] = {}
        self._expected: dict[object, int] = {}

    def recording(self, matrices: Sequence[tuple[str, Located]]) -> Callable[..., None]:
        """A forward hook for the submodule that holds `matrices`."""

        def on_forward(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = self._by_prompt(args[0].detach())
            group = self._group(matrices[0][0], x)
            self._expected[group] = self._expected.get(group, 0) + len(matrices)
            output.register_hook(lambda vjp: self._receive(group, x, matrices, vjp))

        return on_forward

    def _by_prompt(self, values: Tensor) -> Float[Tensor, "prompt position width"]:
        """OPT's feed-forward matrices see their batch flattened; everywhere else this is a view of itself."""
        return values.view(*self._shape, values.shape[-1])

    @staticmethod
    def _group(module: str, x: Tensor) -> object:
        # Modules that read one tensor (q, k, v; gate, up) have one residual side: found by identity, not by name.
        return (x.data_ptr(), x.shape) if module in READS else module

    def _receive(
        self, group: object, x: Tensor, matrices: Sequence[tuple[str, Located]], vjp: Tensor
    ) -> None:
        received = self._waiting.setdefault(group, {})
        for module, matrix in matrices:
            received[module] = self._by_prompt(matrix.part_of(vjp.detach()))
            self._expected[group] -= 1
        if self._expected[group] == 0:
            del self._waiting[group], self._expected[group]
            self._consume([Gradient(self._layer, module, x, vjp) for module, vjp in received.items()])


def _by_submodule(matrices: Any, modules: Collection[str]) -> Iterator[tuple[str, list[tuple[str, Located]]]]:
    """The chosen modules by the submodule that computes them: a fused one computes several."""
    chosen = {name: matrix for name, matrix in matrices.items() if name in modules}
    for path in dict.fromkeys(matrix.path for matrix in chosen.values()):
        yield path, [(name, matrix) for name, matrix in chosen.items() if matrix.path == path]


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _graph_from_embeddings(embeddings: nn.Module) -> Iterator[None]:
    """Start autograd's graph at the embeddings' output; it keeps embedding scales and offloading hooks working."""
    with _hook(embeddings, lambda _module, _args, output: output.requires_grad_(True)):
        yield


@contextmanager
def _only_loss_positions(head: nn.Module, positions: Int[Tensor, "prompt step"]) -> Iterator[None]:
    """Feed the head only the positions whose logits the loss reads: (prompt, step, vocabulary), not every position."""

    def gather(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        return (hidden[rows, positions.to(hidden.device)], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
