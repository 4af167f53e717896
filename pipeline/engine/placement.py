"""What each replica may ask of the cluster, how many fit on its nodes, and what is missing when one does not."""

from collections.abc import Mapping, Sequence
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


def cpus_to_fill(nodes: Sequence[Node], gpus: int) -> float:
    """CPUs for each of as many replicas as there are GPUs for, or of one on each node where there are none.

    All replicas are of one size. Nodes with less than half of what the largest can give do not make the others small:
    a head node often has few CPUs, or none.
    """
    shares = [node.cpus / (node.gpus // gpus if gpus else 1) for node in nodes if node.gpus >= gpus]
    largest = max(shares, default=0.0)
    return _rounded_down(min((share for share in shares if share >= largest / 2), default=0.0)) or 1.0


def capacity(nodes: Sequence[Node], bundles: Sequence[Mapping[str, float]]) -> int:
    """How many replicas of equal processes the nodes hold together."""
    asked = bundles[0]
    return sum(node.room(asked["CPU"], int(asked.get("GPU", 0))) for node in nodes) // len(bundles)


def shortage(
    bundles: Sequence[Mapping[str, float]], free: Mapping[str, float], there: Mapping[str, float]
) -> str:
    """What a replica needs and what the cluster has of it."""
    processes = f"{len(bundles)} processes with each " if len(bundles) > 1 else ""
    needs = " and ".join(f"{amount:g} {name}s" for name, amount in sorted(bundles[0].items(), reverse=True))
    has = " and ".join(
        f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}s"
        for name in sorted(bundles[0], reverse=True)
    )
    return f"a replica needs {processes}{needs} on one node; the cluster has {has} free"


def _rounded_down(cpus: float) -> float:
    return float(int(cpus)) if cpus >= 1 else int(cpus * 100) / 100
