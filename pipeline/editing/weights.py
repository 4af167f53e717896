"""The matrices of a model as edits see them: (in, out) whatever their storage, changed in place and put back.

W + u ⊗ v − u ⊗ v is not W in floating point. So what an edit touches is copied first, and copied back afterwards: the
restored weights are the original ones bit for bit, which their hash confirms.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Conv1D

from pipeline.editing.delta import Delta
from pipeline.errors import BacklensError
from pipeline.models.anatomy import Located
from pipeline.models.load import LoadedModel


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix of a model: the parameter that holds it, and how."""

    parameter: Tensor
    transposed: bool
    """Stored (out, in), as `nn.Linear` does."""
    located: Located

    def read(self) -> Float[Tensor, "d_in d_out"]:
        """A float32 copy, for y = x W."""
        stored = self.parameter.T if self.transposed else self.parameter
        return self.located.part_of(stored).float().clone()

    def add(self, update: Float[Tensor, "d_in d_out"]) -> None:
        """W ← W + update, rounded once to the weights' type."""
        stored = self.parameter.T if self.transposed else self.parameter
        columns = self.located.part_of(torch.arange(stored.shape[1], device=stored.device))
        update = update.to(stored.device)
        stored[:, columns] = (stored[:, columns].float() + update).to(stored.dtype)


def matrix(loaded: LoadedModel, layer: int, module: str) -> Matrix:
    """Raises BacklensError where there is no such matrix, or none that can be changed in place."""
    blocks = loaded.anatomy.blocks
    if not 0 <= layer < len(blocks):
        raise BacklensError(f"layer {layer}: the model has layers 0 to {len(blocks) - 1}")
    located = blocks[layer].matrices.get(module)
    if located is None:
        there = ", ".join(blocks[layer].matrices)
        raise BacklensError(f"layer {layer} has no dense {module} to edit (it has {there})")
    submodule = blocks[layer].module.get_submodule(located.path)
    weight = getattr(submodule, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        raise BacklensError(
            f"layer {layer}: {module} is stored quantized or elsewhere than in memory, and cannot be edited in place; "
            "load the model unquantized and on one device"
        )
    return Matrix(weight, not isinstance(submodule, Conv1D), located)


@torch.no_grad()
def add_deltas(loaded: LoadedModel, deltas: Sequence[Delta]) -> None:
    """Edit the model for good."""
    for delta in deltas:
        matrix(loaded, delta.layer, delta.module).add(delta.matrix())


@contextmanager
@torch.no_grad()
def edited(loaded: LoadedModel, deltas: Sequence[Delta]) -> Iterator[None]:
    """The model with `deltas` added, for the length of a block; then every bit is as it was."""
    touched = {
        id(parameter): parameter
        for delta in deltas
        for parameter in (matrix(loaded, delta.layer, delta.module).parameter,)
    }
    kept = {key: parameter.clone() for key, parameter in touched.items()}
    try:
        add_deltas(loaded, deltas)
        with torch.enable_grad():
            yield
    finally:
        for key, parameter in touched.items():
            parameter.copy_(kept[key])


def weights_digest(loaded: LoadedModel) -> str:
    """SHA-256 over every parameter's bits, in the model's order."""
    digest = hashlib.sha256()
    for name, parameter in loaded.model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
