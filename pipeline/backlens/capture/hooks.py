"""One forward and one backward pass to activations: each matrix's input x and VJP δ, group by group.

Weights never require grad: the graph starts at the embeddings' output, so nothing weight-sized is allocated.
A forward hook keeps each module's input x and puts a hook on its output *tensor*, which receives the VJP δ: hooks on
tensors survive modules that are called twice, and do not wrap modules. As soon as every module that shares an input
has its δ, the consumer gets the group. Experts are hooked one by one (`models/experts.py`); an expert's gradient has
rows for the tokens that were routed to it alone.

Every requested matrix is accounted for: its module has to compute all tokens of the batch, once, and its VJP has to
come back. A model that passes a module by (a fused kernel that takes its weight) is refused.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from backlens.capture.batch import Batch, Slots, make_batch
from backlens.capture.loss import NLL, LossFunction, Outcome
from backlens.errors import BacklensError
from backlens.models.blocks import Located
from backlens.models.experts import Begin, Watcher, watching
from backlens.models.load import LoadedModel
from backlens.models.module_tree import PROBE_TOKENS, graph_from_embeddings
from backlens.terms import READS


class MatrixMissed(BacklensError):
    """A requested matrix did not give its gradient exactly once, so the rows of the batch are not complete."""


@dataclass(frozen=True)
class Gradient:
    """The factors of one weight matrix's gradient, as the model computed them: G = Σ over positions x ⊗ δ.

    Padding is not masked in `x`; in `vjp` it is exactly zero only with right padding. All tensors are on the device
    that computed `vjp`.
    """

    layer: int
    module: str
    expert: int | None
    """Index of the expert; None for a matrix that sees every token."""
    slots: Slots
    x: Float[Tensor, "row slot d_in"]
    vjp: Float[Tensor, "row slot d_out"]


Consumer = Callable[[Sequence[Gradient]], None]
"""Takes the gradients of modules that share their input: `x` is one tensor for all of them."""


def capture(
    loaded: LoadedModel,
    batch: Batch,
    layers: Collection[int],
    modules: Collection[str],
    consume: Consumer,
    *,
    loss: LossFunction = NLL,
    activation_checkpointing: bool = False,
    scored: slice | Int[Tensor, " token"] = slice(None),
) -> Outcome:
    """Run `batch` and give `consume` every group of gradients of the chosen layers and modules, last layer first.

    Gradients are those of the sum of `loss` over the batch: a mean would make a prompt's gradient depend on its
    neighbours. With `activation_checkpointing` the forward pass keeps only the blocks' inputs, and the backward pass
    computes each block again: a third more work, for the memory of one block instead of all. Ranks in the outcome
    count the token ids in `scored`.

    Raises MatrixMissed when a matrix does not give its whole gradient exactly once, BacklensError when `loss` does not
    give one number per prompt.
    """
    accounts: list[_Account] = []
    with ExitStack() as hooks:
        hooks.enter_context(graph_from_embeddings(loaded.model))
        if loaded.attention == "exact":
            hooks.enter_context(sdpa_kernel(SDPBackend.MATH))
        if activation_checkpointing:
            hooks.enter_context(_checkpointed([block.module for block in loaded.parts.blocks]))
        hooks.enter_context(only_loss_positions(loaded.parts.head, loss.positions(batch)))
        slots_at = cache(Slots.every(batch).to)
        watchers: dict[nn.Module, Begin] = {}
        for layer in layers:
            block = loaded.parts.blocks[layer]
            recorder = _LayerRecorder(layer, slots_at, consume)
            for path, matrices in _by_submodule(block.matrices, modules):
                accounts.append(_Account(layer, path, matrices))
                hooks.enter_context(_hook(block.module.get_submodule(path), recorder.recording(accounts[-1])))
            if block.experts is not None:
                weights = _by_submodule(block.experts.matrices, modules)
                of_experts = [_Account(layer, path, matrices) for path, matrices in weights]
                accounts += of_experts
                watchers[block.experts.module] = _expert_recording(of_experts, batch, consume)
        hooks.enter_context(watching(loaded.model, watchers))
        logits_BSV = loaded.model(
            input_ids=batch.input_ids,
            attention_mask=batch.mask.long(),
            position_ids=(batch.mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
        ).logits.float()
        losses = loss(logits_BSV, batch.targets, batch.target_mask)
        if losses.shape != (len(batch.mask),):
            raise BacklensError(
                f"loss: {type(loss).__name__} gives shape {tuple(losses.shape)} for {len(batch.mask)} prompts; give "
                "one number per prompt, not their sum or mean"
            )
        outcome = loss.facts(logits_BSV.detach(), losses.detach(), batch, scored)
        del logits_BSV
        losses.sum().backward()
    for account in accounts:
        account.settle()
    return outcome


def verify_capture(
    loaded: LoadedModel,
    layers: Collection[int],
    modules: Collection[str],
    *,
    activation_checkpointing: bool = False,
) -> None:
    """Capture a short batch. Raises MatrixMissed when a matrix would be missing from the tables."""
    tokens = range(1, PROBE_TOKENS + 1)
    capture(
        loaded,
        make_batch([(tokens, [1])], loaded.device),
        layers,
        modules,
        lambda _: None,
        activation_checkpointing=activation_checkpointing,
    )


@dataclass(eq=False)
class _Account:
    """One requested weight: whether it was called with a graph, and how many VJPs have not come back."""

    layer: int
    path: str
    """Path from the block; for experts, the name of their 3-D weight."""
    matrices: Sequence[tuple[str, Located]]
    """The modules that it computes, by name."""
    called: bool = False
    computed: bool = False
    """True after a call with a graph; under activation checkpointing the first call has none."""
    awaited: int = 0

    def compute(self, mask: Bool[Tensor, "prompt position"], *values: Tensor) -> None:
        """Record a call with a graph. `values` are the tensors that should hold every token of the batch."""
        if self.computed:
            raise self._missed("is called more than once in a pass")
        for each in values:
            if each.shape[:-1] not in (mask.shape, (mask.numel(),)):
                raise self._missed(
                    f"computes {tuple(each.shape[:-1])} tokens where the batch has {tuple(mask.shape)}"
                )
        self.computed = True

    def settle(self) -> None:
        """Raise MatrixMissed unless every VJP came back."""
        if not self.called:
            raise self._missed("is never called: the model uses its weight without it, as fused kernels do")
        if not self.computed:
            raise self._missed("gives an output without a graph (no_grad, a detached input, or no tensor)")
        if self.awaited:
            raise self._missed("was called, but the loss passes no gradient back to it")

    def _missed(self, problem: str) -> MatrixMissed:
        names = ", ".join(module for module, _ in self.matrices)
        return MatrixMissed(
            f"model: {names} of layer {self.layer} cannot be captured: {self.path} {problem}; leave it out with "
            "--modules, or load the model in another form"
        )


class _LayerRecorder:
    """Holds inputs and VJPs of one layer's modules until a group that shares an input is complete."""

    def __init__(self, layer: int, slots_at: Callable[[torch.device], Slots], consume: Consumer) -> None:
        self._layer = layer
        self._slots_at = slots_at
        self._consume = consume
        self._waiting: dict[object, dict[str, Tensor]] = {}
        self._expected: dict[object, int] = {}

    def recording(self, account: _Account) -> Callable[..., None]:
        """Make a forward hook for the submodule that holds the account's matrices."""

        def on_forward(
            _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            account.called = True
            if not isinstance(output, Tensor) or not output.requires_grad:
                return  # the call with a graph comes later
            # Copied here and not in the backward pass, where a copy from another GPU would wait for its projections.
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
        """Give `values` the batch's shape: OPT's feed-forward matrices see their batch flattened."""
        return values.view(*slots.mask.shape, values.shape[-1])

    @staticmethod
    def _group(module: str, x: Tensor) -> object:
        # Modules that read one tensor (q, k, v; gate, up) share their residual side; the tensor tells, not the name.
        return (x.data_ptr(), x.shape) if module in READS else module

    def _receive(self, group: object, slots: Slots, x: Tensor, account: _Account, vjp: Tensor | None) -> None:
        if vjp is None:
            return  # the loss does not depend on this output, which stays awaited
        account.awaited -= 1
        received = self._waiting.setdefault(group, {})
        for module, matrix in account.matrices:
            received[module] = self._by_prompt(matrix.part_of(vjp.detach()), slots)
            self._expected[group] -= 1
        if self._expected[group] == 0:
            del self._waiting[group], self._expected[group]
            # The module itself moves an input from another device, which the hook does not see.
            x = x.to(slots.mask.device)
            self._consume(
                [Gradient(self._layer, name, None, slots, x, vjp) for name, vjp in received.items()]
            )


def _expert_recording(accounts: Sequence[_Account], batch: Batch, consume: Consumer) -> Begin:
    """Make a watcher that hands over an expert's gradients when the δ of one of its weights arrives."""
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
        # Computed here and not in the backward pass: this waits for the device, which is projecting then.
        slots, real, row, slot = Slots.routed(tokens, batch)
        if not len(real):
            return  # only padding was routed here
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
    """Group the chosen modules by the submodule that computes them: a fused one computes several."""
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
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Keep only each block's input in the forward pass, and compute the block again in the backward pass.

    This is the reentrant form of checkpointing: its first pass has no graph, so hooks act in the second pass alone.
    transformers' own checkpointing works in train mode only, where dropout is active.
    """

    def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            again = partial(forward, **kwargs)
            return checkpoint(again, hidden_states, *args, use_reentrant=True, preserve_rng_state=False)

        return run

    own = [vars(block).get("forward") for block in blocks]  # libraries that dispatch a model put theirs there
    try:
        for block in blocks:
            block.forward = checkpointed(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def only_loss_positions(head: nn.Module, positions: Int[Tensor, "prompt step"]) -> Iterator[None]:
    """Feed the head only `positions`, so that logits are (prompt, step, vocabulary) and not of every position."""

    def gather(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        return (hidden[rows, positions.to(hidden.device)], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
