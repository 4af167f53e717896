"""Devices, operations and time of a run: placement of a copy of the model, operations and moved bytes, and seconds.

If a copy is spread over several devices, the model runs on one device after the other. Each device projects the
vectors of its own blocks while the others project theirs, so the device with the most blocks decides (`Fit.busiest`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from backlens.capture.packing import most_tokens
from backlens.engine.plan import MatrixSize, RunPlan, every_matrix, matrices_of, spread_of
from backlens.errors import BacklensError
from backlens.forecast.bytes import Estimate, TypicalPrompts
from backlens.forecast.cluster import Cluster
from backlens.models.device_map import FREE_SHARE, Device, DeviceMapOptions, lens_bytes, place, stored_dtype
from backlens.models.load import empty_model
from backlens.models.module_tree import find_block_list

GPU_TILE, CPU_TILE = 2**30, 2**22
"""Bytes of one tile of scores (`projection.project`)."""
TILES = 3
"""Tiles in memory at a time: two of scores, and one of what is gathered from them."""
SAVED = 2
"""Bytes that autograd keeps, per byte of the inputs of the blocks' matrices: activations, norms and attention take as
much again. Factors that wait for their projection take the place of what the backward pass has freed, and are smaller.
"""
PASSES = 8
"""Passes over every score: the product itself, maxima, minima, differences, comparisons, counts."""
OPERATIONS = 300
"""Small operations per batch for each group of modules that share their residual side."""
EIGEN = 20
"""Operations of an eigendecomposition, per cube of its size."""


@dataclass(frozen=True)
class DeviceUse:
    """Peak bytes on one device of a copy."""

    device: Device
    blocks: Sequence[int]
    weights: int
    activations: int
    lens: int
    """Tiles, and the unembedding where that is a copy; 0 on a device that sends its vectors to another one."""

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.lens


@dataclass(frozen=True)
class Fit:
    """Placement of a copy on its devices, and the number of copies that the cluster has room for."""

    devices: Sequence[DeviceUse]
    replicas: int
    batch_tokens: int
    busiest: float = 1.0
    """Share of a copy's vectors that its busiest device projects; 1 if one device projects at a time."""


def fit(plan: RunPlan, cluster: Cluster) -> Fit:
    """Place a copy on the fewest devices that hold it, or on as many as `--gpus-per-replica` says.

    Raises BacklensError if a copy does not fit on the devices of one node.
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
    """Tokens per batch to try, the most first; `auto` takes the most that fits, down to an eighth."""
    asked = plan.config.batch_tokens
    most = most_tokens(asked, "cuda" if cluster.gpus else "cpu")
    return [most, most // 2, most // 4, most // 8] if asked == "auto" else [most]


def _uses(plan: RunPlan, cluster: Cluster, count: int) -> list[DeviceUse]:
    """Bytes on each device, with the activations of one token."""
    model = empty_model(plan.source, plan.model_config)
    dtype = stored_dtype(plan.model_config, plan.config.dtype)
    limits = _limits(plan, cluster, count)
    # Accelerate warns of every device that this machine does not have.
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
    """Bytes for weights per device, by the rules of a run."""
    stated = spread_of(plan.config)
    if stated is not None and stated.max_memory:
        return dict(stated.max_memory)
    if count == 1:  # A run keeps nothing free for a model on one device.
        return {0: cluster.memory}
    return {device: int(cluster.memory * FREE_SHARE) for device in range(count)}


def _weights(model: torch.nn.Module, placed: Mapping[str, Device], device: Device) -> int:
    """Number of weights on a device; a tied weight counts once."""
    there = {
        id(weight): weight.numel()
        for path, where in placed.items()
        if where == device
        for weight in model.get_submodule(path).parameters()
    }
    return sum(there.values())


def _activations(plan: RunPlan, matrices: Sequence[MatrixSize], dtype: torch.dtype) -> list[int]:
    """Bytes per token that autograd keeps of each block."""
    found = [0] * len(plan.blocks)
    for matrix in matrices:
        found[matrix.layer] += SAVED * matrix.wide * matrix.chosen * dtype.itemsize
    return found


@dataclass(frozen=True)
class Operations:
    """Floating-point operations and moved bytes of a whole run."""

    forward: float
    backward: float
    """To activations only: no weight gradient."""
    lens: float
    """Products of positions with the unembedding, in float32."""
    neurons: float
    """Scores of neurons and singular directions, which are sums of their positions' scores."""
    factors: float
    """Gram matrices, norms and spectra, in float64."""
    score_bytes: float
    """Bytes that the passes over the scores read and write."""
    small: float
    """Small operations, one after the other."""
    moved_bytes: float
    """Bytes between the devices of a copy."""

    @property
    def flops(self) -> dict[str, float]:
        return {
            "forward": self.forward,
            "backward": self.backward,
            "lens, positions": self.lens,
            "lens, neurons": self.neurons,
            "factors": self.factors,
        }


def work_of(plan: RunPlan, prompts: TypicalPrompts, expected: Estimate, fit: Fit) -> Operations:
    """Count the operations of a run."""
    config = plan.model_config
    scored, d_model = plan.tokens, int(config.get_text_config().hidden_size)
    count, tokens, mean = expected.prompts, expected.tokens, prompts.mean_length
    per_token = sum(m.wide * m.high * m.chosen for m in every_matrix(plan.blocks, config))
    matrices = matrices_of(plan.blocks, plan.options, config)
    # A prompt's loss is read at one position.
    once = 2.0 * per_token * tokens + 2.0 * plan.rows * d_model * count
    vectors = tokens * sum(m.chosen for m in matrices if m.leads)
    mixes = count * sum(m.seen_by(mean) * (1 + m.kept(plan.options.neurons)) for m in matrices)
    groups = sum(m.experts for m in matrices if m.leads)
    batches = tokens / min(fit.batch_tokens, max(tokens, 1))
    crossings = (len(fit.devices) - 1) * 2 * tokens * d_model * 2 if len(fit.devices) > 1 else 0
    return Operations(
        forward=once * (2 if plan.config.activation_checkpointing else 1),
        backward=once,
        lens=2.0 * vectors * d_model * scored,
        neurons=2.0 * mixes * mean * scored,
        factors=_factors(matrices, count, mean),
        score_bytes=4.0 * PASSES * (vectors + mixes) * scored,
        small=OPERATIONS * groups * batches,
        moved_bytes=float(crossings) + 4.0 * vectors * d_model * _away(fit, plan),
    )


def _away(fit: Fit, plan: RunPlan) -> float:
    """Share of the vectors that go to another device's lens. Offloaded blocks are brought to the lens themselves."""
    wanted = set(plan.options.layers)
    away = [use for use in fit.devices if not use.lens and use.device not in ("cpu", "disk")]
    return sum(len(wanted & set(use.blocks)) for use in away) / len(wanted)


def _factors(matrices: Sequence[MatrixSize], prompts: int, mean: float) -> float:
    squares = sum(2.0 * mean**2 * (m.wide + 2 * m.high) * m.chosen for m in matrices)
    return prompts * (squares + sum(2 * EIGEN * mean**3 * m.seen_by(1) for m in matrices))


@dataclass(frozen=True)
class Times:
    """Seconds of a run."""

    loading: float
    stages: Mapping[str, float]
    """Seconds per stage if a single copy did the whole run."""
    encoding: float
    """Seconds of the writing thread if a single copy did the whole run; it works while the devices compute."""
    storage: float
    """Seconds of all nodes together to write the tables, also while the devices compute."""
    replicas: int

    @property
    def shares(self) -> dict[str, float]:
        """Seconds that each part would take if nothing else did."""
        shared = {name: seconds / self.replicas for name, seconds in self.stages.items()}
        return shared | {
            "Parquet": self.encoding / self.replicas,
            "storage": self.storage,
            "loading": self.loading,
        }

    @property
    def seconds(self) -> float:
        computing = sum(self.stages.values()) / self.replicas
        return self.loading + max(computing, self.encoding / self.replicas, self.storage)

    @property
    def bottleneck(self) -> str:
        """Longest part of those that decide; computing, Parquet and storage go on at the same time."""
        shares = self.shares
        sides = (tuple(self.stages), ("Parquet",), ("storage",))
        slowest = max(sides, key=lambda side: sum(shares[name] for name in side))
        return max((*slowest, "loading"), key=lambda name: shares[name])


def times_of(work: Operations, cluster: Cluster, fit: Fit, table_bytes: int) -> Times:
    """Seconds that `work` takes on `cluster`, if the tables have `table_bytes` bytes."""
    reached = cluster.efficiency
    weights = sum(use.weights for use in fit.devices)
    per_node = max(1, -(-fit.replicas // cluster.nodes))
    return Times(
        loading=weights * per_node / (1e9 * cluster.storage_gbps),
        stages={
            "model": (work.forward + work.backward) / (1e12 * cluster.tflops * reached),
            "lens": fit.busiest
            * (
                (work.lens + work.neurons) / (1e12 * cluster.float32_tflops * reached)
                + work.score_bytes / (1e9 * cluster.memory_gbps * reached)
            ),
            "factors": fit.busiest * work.factors / (1e12 * cluster.float64_tflops * reached),
            "small operations": work.small * cluster.operation_us * 1e-6,
            "network": work.moved_bytes / (1e9 * cluster.link_gbps * reached),
        },
        encoding=table_bytes / (1e6 * cluster.encode_mbps),
        storage=table_bytes / (1e9 * cluster.storage_gbps * min(cluster.nodes, fit.replicas)),
        replicas=fit.replicas,
    )
