"""Replicas are given as much as lets all of them fit, node by node."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backlens.engine.executors.ray_session import Node, capacity, cpus_per_replica, cpus_to_fill, shortage
from backlens.errors import BacklensError


@pytest.mark.parametrize(
    ("nodes", "replicas", "gpus", "expected"),
    [
        ([Node(2, 0)], 1, 0, 2.0),
        ([Node(2, 0)], 3, 0, 0.66),
        ([Node(1, 0), Node(1, 0)], 3, 0, 0.5),  # a third of two CPUs would fit one node only once
        ([Node(64, 8)] * 2, 4, 4, 32.0),
        ([Node(64, 8)] * 2, 2, 8, 64.0),
        ([Node(8, 1), Node(64, 0)], 1, 1, 8.0),
    ],
)
def test_each_replica_gets_the_most_that_lets_all_fit(
    nodes: list[Node], replicas: int, gpus: int, expected: float
) -> None:
    assert cpus_per_replica(nodes, replicas, gpus) == expected


@given(
    st.lists(st.builds(Node, st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(0, 4),
)
def test_what_is_given_always_fits(nodes: list[Node], replicas: int, gpus: int) -> None:
    try:
        cpus = cpus_per_replica(nodes, replicas, gpus)
    except BacklensError:
        assert gpus
        assert sum(int(node.gpus // gpus) for node in nodes) < replicas
        return
    left = [[node.cpus, node.gpus] for node in nodes]
    for _ in range(replicas):
        place = next(room for room in left if room[0] >= cpus - 1e-6 and room[1] >= gpus)
        place[0] -= cpus
        place[1] -= gpus


def test_replicas_with_more_gpus_than_a_node_has_are_refused() -> None:
    with pytest.raises(BacklensError, match="1 with 8 GPUs each do not fit"):
        cpus_per_replica([Node(64, 4), Node(64, 4)], 1, 8)


@pytest.mark.parametrize(
    ("nodes", "gpus", "cpus", "replicas"),
    [
        ([Node(64, 8), Node(64, 8)], 2, 16.0, 8),
        ([Node(2, 0), Node(64, 0), Node(64, 0)], 0, 64.0, 2),  # a small head has no copy
        ([Node(2, 0), Node(1, 0), Node(1, 0)], 0, 1.0, 4),
        ([Node(0, 0), Node(16, 1)], 1, 16.0, 1),
        ([Node(4, 0)], 1, 1.0, 0),  # nobody has a GPU yet: what to ask the autoscaler for
    ],
)
def test_a_cluster_is_filled_with_replicas_of_one_size(
    nodes: list[Node], gpus: int, cpus: float, replicas: int
) -> None:
    assert cpus_to_fill(nodes, gpus) == cpus
    assert capacity(nodes, [{"CPU": cpus, "GPU": gpus}]) == replicas


def test_replicas_of_several_processes_are_counted_whole() -> None:
    assert capacity([Node(8, 3), Node(8, 2)], [{"CPU": 2, "GPU": 1}] * 2) == 2


def test_what_is_missing_is_named() -> None:
    there = {"CPU": 8.0, "memory": 1e9}
    assert shortage([{"CPU": 4, "GPU": 2}], there, there) == (
        "a replica needs 2 GPUs and 4 CPUs on one node; the cluster has 0 of 0 GPUs and 8 of 8 CPUs free"
    )
