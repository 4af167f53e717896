"""MEND's editor (Mitchell et al., arXiv 2110.11309, §3.2): a small network from a gradient's factors to an edit's.

The gradient of a matrix is Σ over positions x ⊗ δ. The editor takes each pair z = [x, δ] by itself:

    z' = (z − mean) / std                              their normalisation, over the training edits
    h  = z' + σ(s₁ ⊙ (U₁V₁z' + b) + o₁)                 equation 3a
    g  = h  +   s₂ ⊙ U₂V₂h + o₂                         equation 3b, without a second σ, as in the authors' code
    [x̃, δ̃] = g · std + mean                            ours: an untrained editor gives the plain gradient

and the edit is W ← W − α Σ x̃ ⊗ δ̃ (for y = x W) with one α per matrix (§3.2, "learned per-layer learning rates").
Matrices of one shape share U, V and b; each has its own s, o, mean, std and α. The U are zero at first.

`Mend` is the method: it applies a trained editor to one gradient (algorithm 2).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backlens.capture.batch import make_batch
from backlens.capture.factors import masked
from backlens.capture.hooks import Gradient, capture
from backlens.editing.activations import wordings
from backlens.editing.delta import Delta
from backlens.editing.request import Request
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel

FORMAT = "backlens-mend-1"
SMALLEST_STD = 1e-2
"""Smallest standard deviation of a dimension, relative to the root mean square over its side: it bounds the scaling of
dimensions that hardly vary."""

Key = tuple[int, str]
"""Layer and module."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Name and shape of one edited matrix."""

    layer: int
    module: str
    d_in: int
    d_out: int

    @property
    def key(self) -> Key:
        return self.layer, self.module

    @property
    def shared(self) -> str:
        """Name of the network that matrices of this shape share."""
        return f"{self.d_in}x{self.d_out}"

    @property
    def own(self) -> str:
        return f"{self.layer}-{self.module.replace('.', '-')}"


class Editor(nn.Module):
    """The networks of all edited matrices, float32. An untrained editor returns the plain gradient."""

    def __init__(self, shapes: Sequence[Shape], rank: int, rate: float = 1.0) -> None:
        super().__init__()
        self.shapes = {shape.key: shape for shape in shapes}
        self.rank = rank
        self.networks = nn.ModuleDict()
        self.sites = nn.ModuleDict()
        for shape in shapes:
            width = shape.d_in + shape.d_out
            if shape.shared not in self.networks:
                self.networks[shape.shared] = _Network(width, min(rank, width))
            self.sites[shape.own] = _MatrixEditor(width, rate)

    def begin_at(self, rate: float) -> None:
        """Set every α."""
        with torch.no_grad():
            for site in self.sites.values():
                assert isinstance(site, _MatrixEditor)
                site.log_rate.fill_(math.log(rate))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self.shapes}))

    @property
    def modules_edited(self) -> tuple[str, ...]:
        return tuple(sorted({module for _, module in self.shapes}))

    def forward(
        self, key: Key, x: Float[Tensor, "*pair d_in"], vjp: Float[Tensor, "*pair d_out"]
    ) -> tuple[Float[Tensor, "*pair d_in"], Float[Tensor, "*pair d_out"]]:
        """x̃ and −α δ̃ of some pairs, whose outer products are added to the matrix. Pairs with δ = 0 give zeros."""
        shape = self.shapes[key]
        site, network = self.sites[shape.own], self.networks[shape.shared]
        assert isinstance(site, _MatrixEditor)
        z = (torch.cat([x, vjp], -1) - site.mean) / site.std
        made = network(z, site) * site.std + site.mean
        there = (vjp != 0).any(-1, keepdim=True)
        u, v = made.split([shape.d_in, shape.d_out], -1)
        return u * there, -site.log_rate.exp() * v * there

    @torch.no_grad()
    def normalise(self, key: Key, x: Float[Tensor, "pair d_in"], vjp: Float[Tensor, "pair d_out"]) -> None:
        """Set mean and standard deviation per dimension from these pairs; pairs with δ = 0 do not count."""
        there = (vjp != 0).any(-1)
        site = self.sites[self.shapes[key].own]
        assert isinstance(site, _MatrixEditor)
        means, stds = [], []
        for side in (x[there], vjp[there]):
            std = side.std(0, correction=0)
            means.append(side.mean(0))
            stds.append(std.clamp_min(SMALLEST_STD * float(std.square().mean().sqrt())).clamp_min(1e-12))
        site.mean.copy_(torch.cat(means))
        site.std.copy_(torch.cat(stds))

    def save(self, path: str, about: Mapping[str, str]) -> None:
        """Write a safetensors file; its header holds the shapes, the rank, and `about` with the model's digest."""
        shapes = " ".join(f"{s.layer}:{s.module}:{s.d_in}:{s.d_out}" for s in self.shapes.values())
        header = {"format": FORMAT, "shapes": shapes, "rank": str(self.rank), **about}
        try:
            save_file(
                {name: each.contiguous().cpu() for name, each in self.state_dict().items()}, path, header
            )
        except (OSError, SafetensorError) as error:
            raise BacklensError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str, model_digest: str) -> "Editor":
        """Read a file. Raises BacklensError for another kind of file, and for the editor of another model."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise BacklensError(f"{path}: not an editor that `backlens edit train-mend` wrote")
                if about["model"] != model_digest:
                    raise BacklensError(
                        f"{path}: the editor of another model; train one with `backlens edit train-mend`"
                    )
                shapes = [
                    Shape(int(layer), module, int(d_in), int(d_out))
                    for layer, module, d_in, d_out in (each.split(":") for each in about["shapes"].split())
                ]
                editor = cls(shapes, int(about["rank"]))
                editor.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise BacklensError(f"{path}: cannot be read: {error}") from error
        return editor.requires_grad_(False)


class _MatrixEditor(nn.Module):
    """Parameters of one matrix."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(2, width))
        self.offsets = nn.Parameter(torch.zeros(2, width))
        self.log_rate = nn.Parameter(torch.tensor(rate).log())
        """log α, because α itself would be learned too slowly across orders of magnitude."""
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))


class _Network(nn.Module):
    """Parameters that matrices of one shape share."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, width, rank) * width**-0.5)
        self.up = nn.Parameter(torch.zeros(2, rank, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, z: Float[Tensor, "*pair width"], site: _MatrixEditor) -> Float[Tensor, "*pair width"]:
        scales, offsets = site.scales, site.offsets
        # clamp_min has the gradient 1 at 0; relu has 0, and an untrained editor would not learn
        h = z + (scales[0] * (z @ self.down[0] @ self.up[0] + self.bias) + offsets[0]).clamp_min(0)
        return h + scales[1] * (h @ self.down[1] @ self.up[1]) + offsets[1]


EditFactors = Mapping[Key, tuple[Float[Tensor, "edit pair d_in"], Float[Tensor, "edit pair d_out"]]]
"""u and v of every edit's pairs, by matrix; pairs of zeros are padding."""


@dataclass(frozen=True)
class Mend:
    """W ← W − α Σ x̃ ⊗ δ̃ in every matrix that the editor was trained for; several requests are added (§3.3)."""

    editor: Editor
    scale: float = 1.0
    """Factor of every α."""

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
    """(X, Δ) of every matrix per edit; zeros at padding. The loss is summed over the target's tokens."""
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
    """The factors to add to each matrix per edit, with a graph to the editor's parameters if grad mode is on."""
    editor.to(loaded.device)
    raw = raw_factors(loaded, requests, editor.layers, editor.modules_edited)
    return {key: editor(key, *raw[key]) for key in editor.shapes}


@contextmanager
def factors_added(
    loaded: LoadedModel, factors: EditFactors, owner: Int[Tensor, " row"], shape: tuple[int, int]
) -> Iterator[None]:
    """Run each row of a batch with the edit of its owner, differentiably; the weights do not change.

    For y = x W, Σ over pairs (x · u) v is added to y. This equals W + Σ u ⊗ v, and no matrix is formed.
    """
    with ExitStack() as hooks:
        for (layer, module), (u, v) in factors.items():
            block = loaded.parts.blocks[layer]
            located = block.matrices[module]
            submodule = block.module.get_submodule(located.path)
            hook = _Addition(u[owner], v[owner], located.part_of, shape)
            hooks.callback(submodule.register_forward_hook(hook).remove)
        yield


@dataclass(frozen=True, eq=False)
class _Addition:
    """Forward hook that adds low-rank factors to a module's output."""

    u: Float[Tensor, "row pair d_in"]
    v: Float[Tensor, "row pair d_out"]
    part_of: Any
    """Picks the module's columns from those of the matrix that holds it."""
    shape: tuple[int, int]

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(*self.shape, -1).float()  # OPT gives its feed-forward matrices a flattened batch
        added = (x @ self.u.mT) @ self.v
        columns = self.part_of(torch.arange(output.shape[-1], device=output.device))
        values = output.reshape(*self.shape, -1)
        return values.index_add(-1, columns, added.to(values.dtype)).view_as(output)
