"""A low-rank change of one weight matrix, and the file that holds several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import BacklensError
from pipeline.plain import json_text

FORMAT = "backlens-deltas-1"


@dataclass(frozen=True, eq=False)
class Delta:
    """W ← W + Σ_r u_r ⊗ v_r for y = x W; float32. Added as it is: signs and learning rates are in it."""

    layer: int
    module: str
    u: Float[Tensor, "rank d_in"]
    v: Float[Tensor, "rank d_out"]

    def matrix(self) -> Float[Tensor, "d_in d_out"]:
        return self.u.float().T @ self.v.float()

    def norm(self) -> float:
        """Frobenius, from the factors alone."""
        u, v = self.u.double(), self.v.double()
        return float(((u @ u.T) * (v @ v.T)).sum().clamp_min(0).sqrt())

    @classmethod
    def full(cls, layer: int, module: str, change: Float[Tensor, "d_in d_out"]) -> "Delta":
        """A change of any rank, in factors of its smaller side."""
        d_in, d_out = change.shape
        if d_in <= d_out:
            return cls(layer, module, torch.eye(d_in, device=change.device), change)
        return cls(layer, module, change.T.contiguous(), torch.eye(d_out, device=change.device))


def merged(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    """The same change with one delta for each matrix."""
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
    """The deltas of a file, and what was written about them. Raises BacklensError for any other file."""
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
    """Values as a safetensors header can hold them."""
    return {key: value if isinstance(value, str) else json_text(value) for key, value in about.items()}
