"""MEND: one gradient, put through a trained editor (`editor.py`; arXiv 2110.11309, algorithm 2)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.capture import Gradient, capture, make_batch
from pipeline.editing.delta import Delta
from pipeline.editing.editor import Editor, Key
from pipeline.editing.forward import wordings
from pipeline.editing.request import Request
from pipeline.factors import masked
from pipeline.models.load import LoadedModel

EditFactors = Mapping[Key, tuple[Float[Tensor, "edit pair d_in"], Float[Tensor, "edit pair d_out"]]]
"""By matrix: u and v of every edit's pairs; pairs of zeros fill up."""


@dataclass(frozen=True)
class Mend:
    """W ← W − α Σ x̃ ⊗ δ̃ in every matrix that the editor was trained for; several requests are added up (§3.3)."""

    editor: Editor
    scale: float = 1.0
    """Multiplies every α."""

    @torch.no_grad()
    def __call__(self, loaded: LoadedModel, *requests: Request) -> tuple[Delta, ...]:
        found = edit_factors(loaded, self.editor, requests)
        return tuple(
            Delta(*key, u.flatten(0, 1)[kept], self.scale * v.flatten(0, 1)[kept])
            for key, (u, v) in sorted(found.items())
            for kept in (_there(v),)
        )


def _there(v: Float[Tensor, "edit pair d_out"]) -> Bool[Tensor, " all"]:
    return (v != 0).any(-1).flatten()


def raw_factors(
    loaded: LoadedModel, requests: Sequence[Request], layers: Sequence[int], modules: Sequence[str]
) -> EditFactors:
    """(X, Δ) of every matrix, edit by edit; zeros at padding. The loss is summed over the target's tokens."""
    examples = [wordings(loaded, request, ("",))[0] for request in requests]
    batch = make_batch([(e.token_ids, e.target_ids) for e in examples], loaded.device)
    found: dict[Key, tuple[Tensor, Tensor]] = {}

    def consume(group: Sequence[Gradient]) -> None:
        for gradient in group:
            pair = masked(gradient.x, gradient.slots)[0], masked(gradient.vjp, gradient.slots)[0]
            found[gradient.layer, gradient.module] = pair

    with torch.enable_grad():
        capture(loaded, batch, layers, modules, consume)
    return found


def edit_factors(loaded: LoadedModel, editor: Editor, requests: Sequence[Request]) -> EditFactors:
    """What to add to each matrix for each edit, with a graph to the editor's parameters where grad mode is on."""
    editor.to(loaded.device)
    raw = raw_factors(loaded, requests, editor.layers, editor.modules_edited)
    return {key: editor(key, *raw[key]) for key in editor.shapes}


@contextmanager
def factors_added(
    loaded: LoadedModel, factors: EditFactors, owner: Int[Tensor, " row"], shape: tuple[int, int]
) -> Iterator[None]:
    """Let each row of a batch see the model with its owner's edit, differentiably, and leave the weights alone.

    For y = x W, y gains Σ over pairs (x · u) v: the same as W + Σ u ⊗ v, and no matrix is formed.
    """
    with ExitStack() as hooks:
        for (layer, module), (u, v) in factors.items():
            block = loaded.anatomy.blocks[layer]
            located = block.matrices[module]
            submodule = block.module.get_submodule(located.path)
            hook = _Addition(u[owner], v[owner], located.part_of, shape)
            hooks.callback(submodule.register_forward_hook(hook).remove)
        yield


@dataclass(frozen=True, eq=False)
class _Addition:
    """A forward hook."""

    u: Float[Tensor, "row pair d_in"]
    v: Float[Tensor, "row pair d_out"]
    part_of: Any
    """Picks the module's columns from those of the matrix that holds it."""
    shape: tuple[int, int]

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(*self.shape, -1).float()  # OPT's feed-forward matrices see their batch flattened
        added = (x @ self.u.mT) @ self.v
        columns = self.part_of(torch.arange(output.shape[-1], device=output.device))
        values = output.reshape(*self.shape, -1)
        return values.index_add(-1, columns, added.to(values.dtype)).view_as(output)
