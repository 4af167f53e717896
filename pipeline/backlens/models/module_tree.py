"""What a model's structure says for certain, without a description: its blocks, and what follows the last one."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from backlens.errors import BacklensError

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Tail:
    """What turns the last block's output into the head's input."""

    final_norm: nn.Module | None
    """None where there is none (OPT-350m)."""
    project_out: nn.Module | None
    """A linear map between the final norm and the head."""


def has_matrix(module: nn.Module) -> bool:
    """Whether the module itself computes with a weight matrix, in whatever form it is stored.

    Quantized matrices are packed into parameters or buffers of other shapes, but their modules still state a width in
    and out.
    """
    stated = hasattr(module, "in_features") and hasattr(module, "out_features")
    return stated or any(len(full_shape(weight)) > 1 for weight in module.parameters(recurse=False))


def full_shape(weight: Tensor) -> torch.Size:
    """A weight's shape; of one that DeepSpeed has partitioned and that is empty here, what it has when gathered."""
    return getattr(weight, "ds_shape", weight.shape)


def matrix_paths(block: nn.Module) -> list[str]:
    """Paths from the block to every module that holds a weight matrix, in the block's own order."""
    return [path for path, module in block.named_modules() if has_matrix(module)]


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The modules of the list of blocks. Raises BacklensError as `find_block_list` does."""
    return tuple(find_block_list(model)[1])


def find_block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and content of the one ModuleList that is as long as the model is deep and holds weight matrices.

    Raises BacklensError when there is no such list, or more than one.
    """
    depth = int(model.config.get_text_config().num_hidden_layers)
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and all(map(matrix_paths, module))
    }
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        raise BacklensError(
            f"model: its {depth} blocks should be the one list of {depth} modules with weight matrices; found: {found}"
        )
    return next(iter(lists.items()))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its token ids, and gives its logits: of a model on several devices, the embeddings'."""
    return next(model.get_input_embeddings().parameters()).device


@contextmanager
def graph_from_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Start autograd's graph at the embeddings' output; it keeps embedding scales and offloading hooks working."""
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


def probe(model: PreTrainedModel) -> Tensor:
    """The logits of a few tokens, (token, vocabulary); with a graph, as in a real pass."""
    ids = torch.arange(1, PROBE_TOKENS + 1, device=input_device(model))[None]
    with graph_from_embeddings(model):
        return model(input_ids=ids, use_cache=False).logits[0].detach()


def verify_backward(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    """Take a gradient through each matrix of the blocks alone.

    Raises BacklensError where none passes: a kernel for quantized weights without a backward pass would leave its
    part out of every gradient below it, and say nothing.
    """

    def note(path: str, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return
        ones = torch.ones_like(output)
        passed = torch.autograd.grad(output, args[0], ones, retain_graph=True, allow_unused=True)[0]
        if passed is None:
            raise BacklensError(
                f"model: no gradient passes through {path} ({type(_module).__name__}): its kernel has no backward pass "
                "here; load the weights in another form (unquantized, e.g. --dtype bfloat16)"
            )

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            for path in matrix_paths(block):
                hook = partial(note, f"{path} of block {index}")
                hooks.callback(block.get_submodule(path).register_forward_hook(hook).remove)
        with warnings.catch_warnings(action="ignore"):  # of torch, of the same
            probe(model)


def find_tail(model: PreTrainedModel, blocks: Sequence[nn.Module], head: nn.Module) -> Tail:
    """Run a few tokens and see which modules act between the last block and the head.

    Raises BacklensError when there is more than a norm and a linear map behind it.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    acted: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # dropout and the like pass their input on, and are nothing to a model in evaluation mode
        if args and isinstance(output, Tensor) and output is not args[0] and not _equal(args[0], output):
            acted.append(module)

    with ExitStack() as hooks:
        for module in model.modules():
            if id(module) not in inside and module is not head and not list(module.children()):
                hooks.callback(module.register_forward_hook(note).remove)
        hooks.callback(blocks[-1].register_forward_hook(lambda *_: acted.clear()).remove)
        probe(model)
    return _as_tail(acted)


def _as_tail(acted: Sequence[nn.Module]) -> Tail:
    linear = [module for module in acted if has_matrix(module)]
    norms = [module for module in acted if not has_matrix(module)]
    if len(norms) > 1 or len(linear) > 1 or list(acted) != norms + linear:
        names = ", ".join(type(module).__name__ for module in acted)
        raise BacklensError(
            f"model: between its last block and its head we know a norm, then a linear map; this model has {names}"
        )
    return Tail(norms[0] if norms else None, linear[0] if linear else None)


def _equal(before: Any, after: Tensor) -> bool:
    return isinstance(before, Tensor) and before.shape == after.shape and torch.equal(before, after)
