"""A replica of several processes that share one copy of the model (DeepSpeed's ZeRO-3): a gang of ranks.

The leader is given a shard as any worker is: it tokenizes, packs the very batches that a worker would, and commits.
In between it deals the batches out to all ranks, itself among them, and takes together what they computed. Every pass
gathers weights from all ranks, so all make as many passes as the one with the most batches, the last ones idle.

A gang lives and dies as a whole: a rank that ends leaves the others in a collective that nobody completes. The leader,
which waits beside its own computation and not in it, is told of that by Ray, and ends too. To the executor
that is the death of the replica: it kills what is left and starts another.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore

from pipeline.capture import Outcome, capture, make_batch
from pipeline.engine.executors import AHEAD
from pipeline.engine.replica import References
from pipeline.engine.worker import Attempt, Computed, Job, Worker
from pipeline.models.zero3 import join, open_meeting
from pipeline.prompts.tokenize import Example

SETTLING = 15.0
"""Seconds after which Ray will have told the leader of a rank's end."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank computes of a shard."""

    batches: Sequence[Sequence[Example]]
    idle: int
    """Passes to make besides, so that every rank makes as many."""


def deal(batches: Sequence[Sequence[Example]], ranks: int) -> list[Share]:
    """A share for each rank. Neighbours are of like length, so every pass takes all ranks about as long."""
    passes = -(-len(batches) // ranks)
    dealt = [batches[rank::ranks] for rank in range(ranks)]
    return [Share(own, passes - len(own)) for own in dealt]


class _Member(Worker):
    """A worker with its part of every weight; whatever it computes, all ranks have to."""

    def compute_share(self, share: Share) -> Computed:
        computed = self.compute(share.batches)
        for _ in range(share.idle):
            self._pass_idly()
        computed.outcomes = [
            Outcome(o.loss.cpu(), o.target_rank.cpu(), o.predicted_id.cpu()) for o in computed.outcomes
        ]
        return computed

    def _pass_idly(self) -> None:
        batch = make_batch([([1], [1])], self._loaded.device)
        capture(self._loaded, batch, (), (), lambda _: None, recompute=self._recompute)


class Peer:
    """A rank that follows the leader; an actor, which takes one call at a time, in their order."""

    def __init__(self, job: Job, threads: int) -> None:
        self._job, self._threads = job, threads

    def load(self, rank: int, ranks: int, meeting: tuple[str, int]) -> None:
        with _late_to_complain():
            join(rank, ranks, TCPStore(*meeting, is_master=False), get_node_ip_address())
            self._member = _Member(self._job, self._threads)

    def compute(self, share: Share) -> Computed:
        with _late_to_complain():
            return self._member.compute_share(share)


class Leader(_Member):
    """Rank 0."""

    def __init__(self, job: Job, threads: int, peers: Sequence[Any]) -> None:
        self._peers = peers
        self._dealing = threading.Lock()
        ranks, host = 1 + len(peers), get_node_ip_address()
        meeting = open_meeting(host)

        def load() -> None:
            join(0, ranks, meeting, host)
            Worker.__init__(self, job, threads)

        loading = ThreadPoolExecutor(1).submit(_complaining_late(load))
        place = (meeting.host, meeting.port)
        _all_of(loading, [peer.load.remote(rank, ranks, place) for rank, peer in enumerate(peers, 1)])
        self._readiness = replace(self._readiness, device=f"{ranks} ranks on {self._readiness.device}")

    def _compute(self, batches: Sequence[Sequence[Example]]) -> Computed:
        first, *others = deal(batches, 1 + len(self._peers))
        # Two shards may be dealt out at a time, and every rank must come to them in the same order.
        with self._dealing:
            own = self._computing.submit(_complaining_late(self.compute_share), first)
            theirs = [peer.compute.remote(share) for peer, share in zip(self._peers, others, strict=True)]
        computed = Computed()
        for part in _all_of(own, theirs):
            computed.add(part)
        return computed


def _all_of(own: Future[Any], theirs: Sequence[Any]) -> list[Any]:
    """What all ranks return. The first error ends the wait: the others may be in a collective, for ever.

    Where a rank's process is gone, so is this one: its own part of the work cannot be stopped in another way.
    """
    futures = [own, *(reference.future() for reference in theirs)]
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for error in filter(None, (future.exception() for future in done)):
        if isinstance(error, RayActorError):
            os._exit(1)
        raise error
    return [future.result() for future in futures]


@contextmanager
def _late_to_complain() -> Iterator[None]:
    """A broken collective is most often the end of another rank, and that is what the leader should hear first."""
    try:
        yield
    except RuntimeError:
        time.sleep(SETTLING)
        raise


def _complaining_late(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with _late_to_complain():
            return function(*args)

    return run


@dataclass(frozen=True, slots=True)
class GangKind:
    """A copy of the model in several actors, on one device each."""

    job: Job
    cpus: float
    """For each rank."""
    gpus: int
    """For each rank: 1, or 0 for none."""

    @property
    def bundles(self) -> Sequence[Mapping[str, float]]:
        assert self.job.zero3 is not None
        return [{"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})] * self.job.zero3.ranks

    def start(self, group: PlacementGroup) -> "Gang":
        threads = max(1, int(self.cpus))
        peers = [
            self._actor(Peer, group, rank, 1).remote(self.job, threads)
            for rank in range(1, len(self.bundles))
        ]
        leader = self._actor(Leader, group, 0, AHEAD + 1)
        return Gang(leader.remote(self.job, threads, peers), peers)

    def _actor(self, kind: type, group: PlacementGroup, rank: int, concurrency: int) -> Any:
        return ray.remote(kind).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_restarts=0,
            max_concurrency=concurrency,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
        )


@dataclass(frozen=True, slots=True)
class Gang:
    """Actors that hold one copy of the model together. What befalls any of them, its leader answers with."""

    leader: Any
    peers: Sequence[Any]

    def ready(self) -> References:
        return [self.leader.ready.remote()]

    def run(self, attempt: Attempt) -> References:
        return [self.leader.run.remote(attempt)]

    def kill(self) -> None:
        for actor in (self.leader, *self.peers):
            ray.kill(actor)
