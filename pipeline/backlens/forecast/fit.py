"""How a copy of the model fits on a cluster's devices: how many it takes, what lies where, and the peak of each."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from backlens.capture.packing import most_tokens
from backlens.engine.plan import MatrixSize, RunPlan, every_matrix, spread_of
from backlens.errors import BacklensError
from backlens.forecast.cluster import Cluster
from backlens.models.device_map import FREE_SHARE, Device, DeviceMapOptions, lens_bytes, place, stored_dtype
from backlens.models.load import empty_model
from backlens.models.module_tree import find_block_list

GPU_TILE, CPU_TILE = 2**30, 2**22
"""Bytes of a tile of scores (`projection.project`)."""
TILES = 3
"""Tiles held at a time: two of scores, and what is gathered from them."""
SAVED = 2
"""What autograd keeps, over the inputs of the blocks' matrices: activations, norms and attention are as much again.
Factors that wait to be projected come in its place as it is freed, and are less (`extract`)."""


@dataclass(frozen=True)
class DeviceUse:
    """What one device of a copy holds at the peak, in bytes."""

    device: Device
    blocks: Sequence[int]
    weights: int
    activations: int
    lens: int
    """Its tiles, and the unembedding where that is a copy; nothing on a device whose vectors go to another one."""

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.lens


@dataclass(frozen=True)
class Fit:
    """A copy on its devices, and how many copies the cluster has room for."""

    devices: Sequence[DeviceUse]
    replicas: int
    batch_tokens: int
    busiest: float = 1.0
    """The share of a copy's vectors that its busiest device projects while the others project theirs; all of them
    where one device works at a time."""


def fit(plan: RunPlan, cluster: Cluster) -> Fit:
    """The fewest devices that hold a copy, or as many as `--gpus-per-replica` says.

    Raises BacklensError when no number of a node's devices does.
    """
    stated = spread_of(plan.config)
    named = [device for device in stated.max_memory if device != "cpu"] if stated is not None else []
    asked = len(named) or plan.config.gpus_per_replica
    counts = [asked] if asked else range(1, cluster.devices + 1)
    problem = ""
    for count in counts:
        try:
            of_one = _uses(plan, cluster, count)
        except BacklensError as error:
            problem = str(error)
            continue
        for tokens in _budgets(plan, cluster):
            uses = [replace(use, activations=use.activations * tokens) for use in of_one]
            crowded = [use for use in uses if use.total > cluster.memory]
            if not crowded:
                return Fit(uses, _replicas(plan, cluster, count), tokens, _busiest(plan, uses))
            problem = f"device {crowded[0].device} would hold {crowded[0].total / 1e9:.1f} GB"
    raise BacklensError(
        f"cluster: a copy does not fit on {counts[-1]} devices of {cluster.memory / 1e9:.0f} GB ({problem}); smaller "
        "--batch-tokens, --activation-checkpointing and --dtype bfloat16 take less"
    )


def _busiest(plan: RunPlan, uses: Sequence[DeviceUse]) -> float:
    if plan.config.activation_checkpointing or any(use.blocks and not use.lens for use in uses):
        return 1.0
    wanted = set(plan.options.layers)
    return max(len(wanted & set(use.blocks)) for use in uses) / len(wanted)


def _replicas(plan: RunPlan, cluster: Cluster, count: int) -> int:
    room = cluster.nodes * (cluster.devices // count)
    asked = plan.config.replicas
    if asked == "auto":
        return room
    if asked > room:
        raise BacklensError(f"replicas: {asked} of {count} devices each; the cluster has room for {room}")
    return asked if asked > 1 else room


def _budgets(plan: RunPlan, cluster: Cluster) -> list[int]:
    """Tokens a batch, the most first: `auto` takes what fits, from an eighth up."""
    asked = plan.config.batch_tokens
    most = most_tokens(asked, "cuda" if cluster.gpus else "cpu")
    return [most, most // 2, most // 4, most // 8] if asked == "auto" else [most]


def _uses(plan: RunPlan, cluster: Cluster, count: int) -> list[DeviceUse]:
    """What devices hold, with the activations of one token."""
    model = empty_model(plan.source, plan.model_config)
    dtype = stored_dtype(plan.model_config, plan.config.dtype)
    limits = _limits(plan, cluster, count)
    # Accelerate warns of every device that this machine does not have
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    placement = place(model, dtype, DeviceMapOptions(limits))
    placed = placement.devices
    path, _ = find_block_list(model)
    kept = _activations(plan, every_matrix(plan.blocks, plan.model_config), dtype)
    home = [device for device in limits if device != "cpu"][-1]
    uses = []
    for device in dict.fromkeys([*limits, *placed.values()]):
        blocks = [number for number in range(len(plan.blocks)) if placed[f"{path}.{number}"] == device]
        weights = _weights(model, placed, device) * dtype.itemsize
        saved = [kept[block] for block in blocks]
        held = max(saved, default=0) if plan.config.activation_checkpointing else sum(saved)
        lens = TILES * (GPU_TILE if cluster.gpus else CPU_TILE)
        if device in placement.lens_copies:
            lens += lens_bytes(model, dtype)
        elif device != home:
            lens = 0
        uses.append(DeviceUse(device, blocks, weights, held, lens))
    return uses


def _limits(plan: RunPlan, cluster: Cluster, count: int) -> dict[Device, int]:
    """Bytes for weights by device, as a run would have them."""
    stated = spread_of(plan.config)
    if stated is not None and stated.max_memory:
        return dict(stated.max_memory)
    if count == 1:  # a model on one device is not spread, and nothing is kept free
        return {0: cluster.memory}
    return {device: int(cluster.memory * FREE_SHARE) for device in range(count)}


def _weights(model: torch.nn.Module, placed: Mapping[str, Device], device: Device) -> int:
    """Numbers, a tied one once."""
    there = {
        id(weight): weight.numel()
        for path, where in placed.items()
        if where == device
        for weight in model.get_submodule(path).parameters()
    }
    return sum(there.values())


def _activations(plan: RunPlan, matrices: Sequence[MatrixSize], dtype: torch.dtype) -> list[int]:
    """Bytes that autograd keeps of each block for one token."""
    found = [0] * len(plan.blocks)
    for matrix in matrices:
        found[matrix.layer] += SAVED * matrix.wide * matrix.chosen * dtype.itemsize
    return found
