"""Low-rank changes of weight matrices: their file, and the change of a model in place.

Matrices are (in, out) here, whatever their storage. W + u ⊗ v − u ⊗ v is not W in floating point, so a matrix is copied
before an edit and copied back after it: the restored weights equal the original ones bit for bit, as their hash shows.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Conv1D

from backlens.errors import BacklensError
from backlens.models.blocks import Located
from backlens.models.load import LoadedModel
from backlens.printable import json_text

FORMAT = "backlens-deltas-1"


@dataclass(frozen=True, eq=False)
class Delta:
    """W ← W + Σ_r u_r ⊗ v_r for y = x W; float32. Sign and learning rate are included."""

    layer: int
    module: str
    u: Float[Tensor, "rank d_in"]
    v: Float[Tensor, "rank d_out"]

    def matrix(self) -> Float[Tensor, "d_in d_out"]:
        return self.u.float().T @ self.v.float()

    def norm(self) -> float:
        """Frobenius norm, computed from the factors."""
        u, v = self.u.double(), self.v.double()
        return float(((u @ u.T) * (v @ v.T)).sum().clamp_min(0).sqrt())

    @classmethod
    def full(cls, layer: int, module: str, change: Float[Tensor, "d_in d_out"]) -> "Delta":
        """A change of any rank, in as many factors as its smaller side is long."""
        d_in, d_out = change.shape
        if d_in <= d_out:
            return cls(layer, module, torch.eye(d_in, device=change.device), change)
        return cls(layer, module, change.T.contiguous(), torch.eye(d_out, device=change.device))


def merged(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    """The same change with one delta per matrix."""
    of: dict[tuple[int, str], list[Delta]] = {}
    for delta in deltas:
        of.setdefault((delta.layer, delta.module), []).append(delta)
    return tuple(
        Delta(*key, torch.cat([each.u for each in same]), torch.cat([each.v for each in same]))
        for key, same in of.items()
    )


def save_deltas(path: str, deltas: Sequence[Delta], about: Mapping[str, str]) -> None:
    """Write `LAYER.MODULE.u` and `.v` to a safetensors file, with `about` (strings) in its metadata."""
    tensors = {}
    for delta in merged(deltas):
        tensors[f"{delta.layer}.{delta.module}.u"] = delta.u.contiguous().cpu()
        tensors[f"{delta.layer}.{delta.module}.v"] = delta.v.contiguous().cpu()
    try:
        save_file(tensors, path, {"format": FORMAT, **about})
    except (OSError, SafetensorError) as error:
        raise BacklensError(f"{path}: cannot be written: {error}") from error


def load_deltas(path: str) -> tuple[tuple[Delta, ...], Mapping[str, str]]:
    """The deltas of a file, and its metadata. Raises BacklensError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            names = sorted({name[:-2] for name in file.keys()})  # noqa: SIM118
            if about.get("format") != FORMAT:
                raise BacklensError(f"{path}: not a file of deltas that `backlens edit` wrote")
            deltas = []
            for name in names:
                layer, _, module = name.partition(".")
                u, v = file.get_tensor(f"{name}.u"), file.get_tensor(f"{name}.v")
                deltas.append(Delta(int(layer), module, u, v))
    except (OSError, SafetensorError, ValueError) as error:
        raise BacklensError(f"{path}: cannot be read: {error}") from error
    return tuple(deltas), about


def described(about: Mapping[str, object]) -> dict[str, str]:
    """Values as strings, for the header of a safetensors file."""
    return {key: value if isinstance(value, str) else json_text(value) for key, value in about.items()}


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One weight matrix of a model: the parameter that holds it, and its place there."""

    parameter: Tensor
    transposed: bool
    """True for storage as (out, in), as in `nn.Linear`."""
    located: Located

    def read(self) -> Float[Tensor, "d_in d_out"]:
        """A float32 copy, for y = x W."""
        stored = self.parameter.T if self.transposed else self.parameter
        return self.located.part_of(stored).float().clone()

    def add(self, update: Float[Tensor, "d_in d_out"]) -> None:
        """W ← W + update, rounded once to the type of the weights."""
        stored = self.parameter.T if self.transposed else self.parameter
        columns = self.located.part_of(torch.arange(stored.shape[1], device=stored.device))
        update = update.to(stored.device)
        stored[:, columns] = (stored[:, columns].float() + update).to(stored.dtype)


def matrix(loaded: LoadedModel, layer: int, module: str) -> WeightMatrix:
    """A weight matrix. Raises BacklensError if there is none, or if it cannot be changed in place."""
    blocks = loaded.parts.blocks
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
    return WeightMatrix(weight, not isinstance(submodule, Conv1D), located)


@torch.no_grad()
def add_deltas(loaded: LoadedModel, deltas: Sequence[Delta]) -> None:
    """Add the deltas to the weights in place."""
    for delta in deltas:
        matrix(loaded, delta.layer, delta.module).add(delta.matrix())


@contextmanager
@torch.no_grad()
def edited(loaded: LoadedModel, deltas: Sequence[Delta]) -> Iterator[None]:
    """Add `deltas` to the weights during the block, then restore every bit."""
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
