"""A model's module tree: its blocks and the modules behind the last one, found without a layout."""

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
    """The modules that turn the last block's output into the head's input."""

    final_norm: nn.Module | None
    """None if the model has none (OPT-350m)."""
    project_out: nn.Module | None
    """A linear map between the final norm and the head."""


def has_matrix(module: nn.Module) -> bool:
    """Say whether the module itself, not a child, has a weight matrix in any form.

    Quantized matrices are packed into parameters or buffers of other shapes, but their modules state in_features and
    out_features.
    """
    stated = hasattr(module, "in_features") and hasattr(module, "out_features")
    return stated or any(len(full_shape(weight)) > 1 for weight in module.parameters(recurse=False))


def full_shape(weight: Tensor) -> torch.Size:
    """Return a weight's shape; for one that DeepSpeed has partitioned, and that is empty here, the gathered shape."""
    return getattr(weight, "ds_shape", weight.shape)


def matrix_paths(block: nn.Module) -> list[str]:
    """List the paths from the block to every module with a weight matrix, in the block's order."""
    return [path for path, module in block.named_modules() if has_matrix(module)]


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Return the blocks. Raises BacklensError as `find_block_list` does."""
    return tuple(find_block_list(model)[1])


def find_block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the one ModuleList with as many modules as the model has layers, each with weight matrices; and its path.

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
    """Return the device that takes token ids and gives logits: that of the embeddings."""
    return next(model.get_input_embeddings().parameters()).device


@contextmanager
def graph_from_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Start autograd's graph at the embeddings' output; embedding scales and offloading hooks keep working."""
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


def probe(model: PreTrainedModel) -> Tensor:
    """Compute the logits of a few tokens, (token, vocabulary), with a graph as in a real pass."""
    ids = torch.arange(1, PROBE_TOKENS + 1, device=input_device(model))[None]
    with graph_from_embeddings(model):
        return model(input_ids=ids, use_cache=False).logits[0].detach()


def verify_backward(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    """Take a gradient through each single matrix of the blocks.

    Raises BacklensError where none passes: a kernel for quantized weights without a backward pass would silently leave
    its part out of every gradient below it.
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
        with warnings.catch_warnings(action="ignore"):  # torch warns of the same
            probe(model)


def find_tail(model: PreTrainedModel, blocks: Sequence[nn.Module], head: nn.Module) -> Tail:
    """Run a few tokens, and find the modules that act between the last block and the head.

    Raises BacklensError when they are more than a norm and a linear map.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    acted: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # dropout and the like return their input in evaluation mode
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
            f"model: between its last block and its head only a norm, then a linear map, are supported; it has {names}"
        )
    return Tail(norms[0] if norms else None, linear[0] if linear else None)


def _equal(before: Any, after: Tensor) -> bool:
    return isinstance(before, Tensor) and before.shape == after.shape and torch.equal(before, after)
