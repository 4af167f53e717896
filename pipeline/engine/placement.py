"""What each replica may ask of the cluster so that all of them fit on its nodes."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import BacklensError


@dataclass(frozen=True, slots=True)
class Node:
    """The resources of one machine."""

    cpus: float
    gpus: float

    def room(self, cpus: float, gpus: int) -> int:
        """How many replicas of that size it holds."""
        by_cpus = int(self.cpus / cpus + 1e-9)
        return min(by_cpus, int(self.gpus // gpus)) if gpus else by_cpus


def cpus_per_replica(nodes: Sequence[Node], replicas: int, gpus: int) -> float:
    """The most CPUs that each replica can have: whole ones, or hundredths where there is less than one.

    A replica is on one node, so what counts is room on nodes, not the sum: a request that fits nowhere would wait
    for ever. Raises BacklensError when the replicas do not fit at any size.
    """
    sizes = {_rounded_down(node.cpus / count) for node in nodes for count in range(1, replicas + 1)}
    for size in sorted(sizes - {0.0}, reverse=True):
        if sum(node.room(size, gpus) for node in nodes) >= replicas:
            return size
    found = ", ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes[:8])
    raise BacklensError(
        f"replicas: {replicas} with {gpus} GPUs each do not fit on the cluster's nodes ({found}"
        f"{', …' if len(nodes) > 8 else ''}); ask for fewer --replicas or --gpus-per-replica"
    )


def _rounded_down(cpus: float) -> float:
    return float(int(cpus)) if cpus >= 1 else int(cpus * 100) / 100
