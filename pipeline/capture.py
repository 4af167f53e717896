"""One forward and one backward to activations; inputs and VJPs handed over module by module.

Weights never require grad: the graph starts at the embeddings' output, so nothing weight-sized is allocated.
A forward hook keeps each module's input x and puts a hook on its output *tensor*, which receives the VJP δ
(output-tensor hooks survive module reuse and do not wrap modules, DESIGN §8). As soon as every module that
shares an input has its δ, the group is handed to the consumer and forgotten. Experts are watched one by one
(`models/experts.py`); an expert's gradient has the rows of the tokens that were routed to it, and no others.

Every matrix that was asked for is awaited, by count: its module has to compute all tokens of the batch, once, and
its VJP has to come back. A model that passes a module by (a fused kernel that takes its weight) is refused.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pipeline.errors import BacklensError
from pipeline.models.anatomy import Experts, Located
from pipeline.models.experts import Begin, Watcher, watching
from pipeline.models.layout import READS
from pipeline.models.load import LoadedModel
from pipeline.models.structure import PROBE_TOKENS, graph_from_embeddings

Side = Literal["right", "left"]


class MatrixMissed(BacklensError):
    """A matrix that was asked for did not give its gradient exactly once; the rows of the batch are not complete."""


@dataclass(frozen=True)
class Batch:
    """Padded prompts and where their loss is read. Every tensor is where the model takes its inputs."""

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
    """Which tokens of a batch a gradient's rows are: every token, or those routed to an expert."""

    prompts: Int[Tensor, " row"]
    """Rows of the batch that have a token here, ascending."""
    columns: Int[Tensor, "row slot"]
    """Columns of the batch, ascending; of no meaning where not `mask`."""
    mask: Bool[Tensor, "row slot"]
    """True at real tokens."""
    full: bool = False
    """Whether all of them are known to be real, so that nothing has to be masked."""

    @classmethod
    def every(cls, batch: Batch) -> "Slots":
        prompts, positions = batch.mask.shape
        device = batch.mask.device
        columns = torch.arange(positions, device=device).expand(prompts, -1)
        return cls(torch.arange(prompts, device=device), columns, batch.mask, bool(batch.mask.all()))

    def to(self, device: torch.device) -> "Slots":
        return Slots(self.prompts.to(device), self.columns.to(device), self.mask.to(device), self.full)

    @classmethod
    def routed(cls, tokens: Int[Tensor, " token"], batch: Batch) -> tuple["Slots", Tensor, Tensor, Tensor]:
        """The slots of some tokens (indices into the flattened batch, ascending), and where each real one went.

        Returns the slots, the real tokens' places among `tokens`, and each one's row and slot.
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


@dataclass(frozen=True)
class Gradient:
    """The factors of one weight matrix's gradient, as the model computed them: G = Σ over positions x ⊗ δ.

    Padding is not masked in `x`; in `vjp` it is exactly zero only with right padding. All tensors are on the device
    that computed `vjp`.
    """

    layer: int
    module: str
    expert: int | None
    """None for a matrix that sees every token."""
    slots: Slots
    x: Float[Tensor, "row slot d_in"]
    vjp: Float[Tensor, "row slot d_out"]


@dataclass(frozen=True)
class Outcome:
    """What the forward pass said, per prompt; float32."""

    loss: Float[Tensor, " prompt"]
    """−log p(target | prompt), summed over the target's tokens, natural logarithm."""
    target_rank: Int[Tensor, " prompt"]
    """Rank of the first target token among the model's logits of scored tokens (0 = largest)."""
    predicted_id: Int[Tensor, " prompt"]
    """The scored token with the largest one."""


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
    *,
    recompute: bool = False,
    scored: slice | Int[Tensor, " token"] = slice(None),
) -> Outcome:
    """Run `batch` and give `consume` every group of gradients of the chosen layers and modules, last layer first.

    The loss is the sum over the batch: a mean would make a prompt's gradient depend on its neighbours. With `recompute`
    the forward pass keeps only the blocks' inputs, and the backward pass computes each block once more: a third more
    work, for the memory of one block instead of all. `scored` are the token ids that the outcome counts among.

    Raises MatrixMissed when a matrix does not give its gradient, all of it and once.
    """
    accounts: list[_Account] = []
    with ExitStack() as hooks:
        hooks.enter_context(graph_from_embeddings(loaded.model))
        if loaded.attention == "exact":
            hooks.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recompute:
            hooks.enter_context(_recomputed([block.module for block in loaded.anatomy.blocks]))
        hooks.enter_context(only_loss_positions(loaded.anatomy.head, batch.loss_positions))
        slots_at = cache(Slots.every(batch).to)
        watchers: dict[nn.Module, Begin] = {}
        for layer in layers:
            block = loaded.anatomy.blocks[layer]
            recorder = _LayerRecorder(layer, slots_at, consume)
            for path, matrices in _by_submodule(block.matrices, modules):
                accounts.append(_Account(layer, path, matrices))
                hooks.enter_context(_hook(block.module.get_submodule(path), recorder.recording(accounts[-1])))
            if block.experts is not None:
                of_experts = _expert_accounts(layer, block.experts, modules)
                accounts += of_experts
                watchers[block.experts.module] = _expert_recording(of_experts, batch, consume)
        hooks.enter_context(watching(loaded.model, watchers))
        logits_BSV = loaded.model(
            input_ids=batch.input_ids,
            attention_mask=batch.mask.long(),
            position_ids=(batch.mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
        ).logits.float()
        loss = _losses(logits_BSV, batch)
        outcome = _outcome(logits_BSV.detach(), loss.detach(), batch, scored)
        del logits_BSV
        loss.sum().backward()
    for account in accounts:
        account.settle()
    return outcome


def verify_capture(
    loaded: LoadedModel, layers: Collection[int], modules: Collection[str], *, recompute: bool = False
) -> None:
    """Capture a few tokens. Raises MatrixMissed when a matrix would be missing from the tables."""
    tokens = range(1, PROBE_TOKENS + 1)
    capture(
        loaded,
        make_batch([(tokens, [1])], loaded.device),
        layers,
        modules,
        lambda _: None,
        recompute=recompute,
    )


@dataclass(eq=False)
class _Account:
    """One weight that was asked for: whether it computed, with a graph, and which VJPs have not come back."""

    layer: int
    path: str
    """From the block, or of experts the name of their 3-D weight."""
    matrices: Sequence[tuple[str, Located]]
    """The modules that it computes."""
    called: bool = False
    computed: bool = False
    """With a graph; where blocks are recomputed, the first call is without."""
    awaited: int = 0

    def compute(self, mask: Bool[Tensor, "prompt position"], *values: Tensor) -> None:
        """Note a call with a graph, by the tensors that should hold every token of the batch."""
        if self.computed:
            raise self._missed("is called more than once in a pass")
        for each in values:
            if each.shape[:-1] not in (mask.shape, (mask.numel(),)):
                raise self._missed(
                    f"computes {tuple(each.shape[:-1])} tokens where the batch has {tuple(mask.shape)}"
                )
        self.computed = True

    def settle(self) -> None:
        """Raises MatrixMissed unless everything came back."""
        if not self.called:
            raise self._missed("is never called: the model takes its weight past it, as fused kernels do")
        if not self.computed:
            raise self._missed("gives an output without a graph (no_grad, a detached input, or no tensor)")
        if self.awaited:
            raise self._missed("was called, but the loss passes no gradient back to it")

    def _missed(self, problem: str) -> MatrixMissed:
        names = ", ".join(module for module, _ in self.matrices)
        return MatrixMissed(
            f"model: {names} of layer {self.layer} cannot be had: {self.path} {problem}; leave it out with --modules, "
            "or load the model without what does that"
        )


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


class _LayerRecorder:
    """Inputs and VJPs of one layer's modules until a group that shares an input is complete."""

    def __init__(self, layer: int, slots_at: Callable[[torch.device], Slots], consume: Consumer) -> None:
        self._layer = layer
        self._slots_at = slots_at
        self._consume = consume
        self._waiting: dict[object, dict[str, Tensor]] = {}
        self._expected: dict[object, int] = {}

    def recording(self, account: _Account) -> Callable[..., None]:
        """A forward hook for the submodule that holds the account's matrices."""

        def on_forward(
            _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            account.called = True
            if not isinstance(output, Tensor) or not output.requires_grad:
                return  # to be computed once more, with a graph
            # Not in the backward pass: there a copy from another GPU would wait for what that one projects.
            slots = self._slots_at(output.device)
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach()
            account.compute(slots.mask, x, output)
            account.awaited += 1
            x = self._by_prompt(x, slots)
            group = self._group(account.matrices[0][0], x)
            self._expected[group] = self._expected.get(group, 0) + len(account.matrices)
            output.register_hook(lambda vjp: self._receive(group, slots, x, account, vjp))

        return on_forward

    @staticmethod
    def _by_prompt(values: Tensor, slots: Slots) -> Float[Tensor, "prompt position width"]:
        """OPT's feed-forward matrices see their batch flattened; everywhere else this is a view of itself."""
        return values.view(*slots.mask.shape, values.shape[-1])

    @staticmethod
    def _group(module: str, x: Tensor) -> object:
        # Modules that read one tensor (q, k, v; gate, up) have one residual side: found by identity, not by name.
        return (x.data_ptr(), x.shape) if module in READS else module

    def _receive(self, group: object, slots: Slots, x: Tensor, account: _Account, vjp: Tensor | None) -> None:
        if vjp is None:
            return  # nothing was passed back to this output; it stays awaited
        account.awaited -= 1
        received = self._waiting.setdefault(group, {})
        for module, matrix in account.matrices:
            received[module] = self._by_prompt(matrix.part_of(vjp.detach()), slots)
            self._expected[group] -= 1
        if self._expected[group] == 0:
            del self._waiting[group], self._expected[group]
            # An input that comes from another device is moved inside the module, which the hook does not see.
            x = x.to(slots.mask.device)
            self._consume(
                [Gradient(self._layer, name, None, slots, x, vjp) for name, vjp in received.items()]
            )


def _expert_accounts(layer: int, experts: Experts, modules: Collection[str]) -> list[_Account]:
    return [_Account(layer, path, matrices) for path, matrices in _by_submodule(experts.matrices, modules)]


def _expert_recording(accounts: Sequence[_Account], batch: Batch, consume: Consumer) -> Begin:
    """Hands over an expert's gradients as the δ of each of its weights arrives."""
    by_weight = {account.path: account for account in accounts}

    def begin(hidden_states: Tensor) -> Watcher:
        for account in accounts:
            account.called = True
            if torch.is_grad_enabled():
                account.compute(batch.mask, hidden_states)
        return on_expert

    def on_expert(expert: int, weight: str, tokens: Tensor, x: Tensor, output: Tensor) -> None:
        account = by_weight.get(weight)
        if account is None or not torch.is_grad_enabled():
            return
        x = x.detach()
        # Not in the backward pass: this waits for the device, which projects then.
        slots, real, row, slot = Slots.routed(tokens, batch)
        if not len(real):
            return  # only padding came this way
        account.awaited += 1
        if not output.requires_grad:
            return

        def by_prompt(values: Tensor) -> Float[Tensor, "row slot width"]:
            placed = values.new_zeros(*slots.mask.shape, values.shape[-1])
            placed[row, slot] = values[real]
            return placed

        def receive(vjp: Tensor | None) -> None:
            if vjp is None:
                return
            account.awaited -= 1
            shared = by_prompt(x)
            consume(
                [
                    Gradient(
                        account.layer, name, expert, slots, shared, by_prompt(matrix.part_of(vjp.detach()))
                    )
                    for name, matrix in account.matrices
                ]
            )

        output.register_hook(receive)

    return begin


def _by_submodule(
    matrices: Mapping[str, Located], modules: Collection[str]
) -> Iterator[tuple[str, list[tuple[str, Located]]]]:
    """The chosen modules by the submodule that computes them: a fused one computes several."""
    chosen = {name: matrix for name, matrix in matrices.items() if name in modules}
    for path in dict.fromkeys(matrix.path for matrix in chosen.values()):
        yield path, [(name, matrix) for name, matrix in chosen.items() if matrix.path == path]


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let each block forget what it computed, and compute it again when its gradient is wanted.

    The reentrant form of checkpointing: its first pass has no graph, so hooks act in the second one alone. Ours, not
    transformers': theirs works in train mode only, where dropout is active.
    """

    def forgetful(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            again = partial(forward, **kwargs)
            return checkpoint(again, hidden_states, *args, use_reentrant=True, preserve_rng_state=False)

        return run

    own = [vars(block).get("forward") for block in blocks]  # libraries that dispatch a model put theirs there
    try:
        for block in blocks:
            block.forward = forgetful(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def only_loss_positions(head: nn.Module, positions: Int[Tensor, "prompt step"]) -> Iterator[None]:
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
