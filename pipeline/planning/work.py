"""What a run has to compute and to move, and how long that takes on devices of stated speeds.

With a copy spread over several devices, the model is on one after the other, and each projects what arises on it while
the others do: the busiest decides (`Fit.busiest`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.engine.plan import RunPlan
from pipeline.engine.sizes import MatrixSize, every_matrix, matrices_of
from pipeline.planning.cluster import Cluster
from pipeline.planning.estimate import Estimate
from pipeline.planning.fit import Fit
from pipeline.planning.sample import Sample

PASSES = 8
"""Passes over every score: the product's own, maxima, minima, differences, comparisons, counts."""
OPERATIONS = 300
"""Small operations for a group of modules that share their residual side, in one batch."""
EIGEN = 20
"""Operations of an eigendecomposition, over the cube of its size."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of a whole run."""

    forward: float
    backward: float
    """To activations only: no weight gradient."""
    lens: float
    """Products with the unembedding, in float32."""
    neurons: float
    """Scores of neurons and singular directions, as sums of their positions' scores."""
    factors: float
    """Gram matrices, norms and spectra, in float64."""
    score_bytes: float
    """Read and written by the passes over the scores."""
    operations: float
    """Small ones, one after the other."""
    moved_bytes: float
    """Between the devices of a copy."""

    @property
    def flops(self) -> dict[str, float]:
        return {
            "forward": self.forward,
            "backward": self.backward,
            "lens, positions": self.lens,
            "lens, neurons": self.neurons,
            "factors": self.factors,
        }


def work_of(plan: RunPlan, sample: Sample, expected: Estimate, fit: Fit) -> Work:
    """Count a run's work."""
    config = plan.model_config
    scored, d_model = plan.tokens, int(config.get_text_config().hidden_size)
    prompts, tokens, mean = expected.prompts, expected.tokens, sample.mean_length
    per_token = sum(m.wide * m.high * m.chosen for m in every_matrix(plan.blocks, config))
    matrices = matrices_of(plan.blocks, plan.wanted, config)
    # a prompt's loss is read at one position
    once = 2.0 * per_token * tokens + 2.0 * plan.rows * d_model * prompts
    vectors = tokens * sum(m.chosen for m in matrices if m.leads)
    mixes = prompts * sum(m.seen_by(mean) * (1 + m.kept(plan.wanted.neurons)) for m in matrices)
    groups = sum(m.experts for m in matrices if m.leads)
    batches = tokens / min(fit.batch_tokens, max(tokens, 1))
    crossings = (len(fit.devices) - 1) * 2 * tokens * d_model * 2 if len(fit.devices) > 1 else 0
    return Work(
        forward=once * (2 if plan.config.activation_checkpointing else 1),
        backward=once,
        lens=2.0 * vectors * d_model * scored,
        neurons=2.0 * mixes * mean * scored,
        factors=_factors(matrices, prompts, mean),
        score_bytes=4.0 * PASSES * (vectors + mixes) * scored,
        operations=OPERATIONS * groups * batches,
        moved_bytes=float(crossings) + 4.0 * vectors * d_model * _away(fit, plan),
    )


def _away(fit: Fit, plan: RunPlan) -> float:
    """The share of the vectors that go to the lens of another device. Offloaded blocks come to the lens themselves."""
    wanted = set(plan.wanted.layers)
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
    """Of one copy's devices, were there only one copy."""
    encoding: float
    """Of one copy's writing thread; it goes on while the devices compute."""
    storage: float
    """Of all nodes together; the same."""
    replicas: int

    @property
    def shares(self) -> dict[str, float]:
        """What each would take alone, by what it is a matter of."""
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
        return max(self.shares, key=lambda name: self.shares[name])


def times_of(work: Work, cluster: Cluster, fit: Fit, written: int) -> Times:
    """How long `work` takes on `cluster`, with `written` bytes of tables."""
    reached = cluster.efficiency
    weights = sum(use.weights for use in fit.devices)
    a_node = max(1, -(-fit.replicas // cluster.nodes))
    return Times(
        loading=weights * a_node / (1e9 * cluster.storage_gbps),
        stages={
            "model": (work.forward + work.backward) / (1e12 * cluster.tflops * reached),
            "lens": fit.busiest
            * (
                (work.lens + work.neurons) / (1e12 * cluster.float32_tflops * reached)
                + work.score_bytes / (1e9 * cluster.memory_gbps * reached)
            ),
            "factors": fit.busiest * work.factors / (1e12 * cluster.float64_tflops * reached),
            "small operations": work.operations * cluster.operation_us * 1e-6,
            "network": work.moved_bytes / (1e9 * cluster.link_gbps * reached),
        },
        encoding=written / (1e6 * cluster.encode_mbps),
        storage=written / (1e9 * cluster.storage_gbps * min(cluster.nodes, fit.replicas)),
        replicas=fit.replicas,
    )
