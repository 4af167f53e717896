"""A replica of several processes that share one copy of the model (DeepSpeed's ZeRO-3): a gang of ranks.

The leader is given a shard as any worker is: it tokenizes, packs the batches that a worker would, and commits. In
between it deals the batches out, one to each rank, itself among them, and takes together what they computed. A pass
gathers weights from all ranks, so a rank for which no batch is left makes its pass with a token of no account.

A gang lives and dies as a whole: a rank that ends leaves the others in a pass that nobody completes. The leader,
which waits beside its own pass and not in it, is told of that by Ray, and hands the error on. To the executor that is
the death of the replica: it kills what is left and starts another.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.capture import Outcome, capture, make_batch
from pipeline.engine.budget import TokenBudget, most_tokens
from pipeline.engine.executors import AHEAD
from pipeline.engine.faults import PROMPT_ERRORS, DeviceLost
from pipeline.engine.memory import release_freed_memory
from pipeline.engine.notes import note
from pipeline.engine.packing import Packer
from pipeline.engine.replica import References
from pipeline.engine.work import Attempt
from pipeline.engine.worker import Computed, Job, Worker
from pipeline.models.zero3 import go_to_meeting, join, open_meeting
from pipeline.plain import printable
from pipeline.prompts.shards import Shard
from pipeline.prompts.source import one_line
from pipeline.prompts.tokenize import Example

SETTLING = 15.0
"""Seconds after which Ray will have told the leader of a rank's end."""


class _Member(Worker):
    """A worker with its part of every weight: a pass that it makes, all ranks have to make."""

    def make_pass(self, batch: Sequence[Example]) -> Computed:
        """Compute a batch; an empty one as a pass all the same.

        An error over its prompts, its size or the device ends the process: the others cannot be told to leave the
        pass. What the executor does about a worker that died finds out whose fault it was.
        """
        computed = Computed()
        try:
            if batch:
                error = self._extract(batch, computed, self._recompute)
                computed.padded = len(batch) * max(self._lengths(batch))
            else:
                token = make_batch([([1], [1])], self._loaded.device)
                capture(self._loaded, token, (), (), lambda _: None, recompute=self._recompute)
                error = None
        except (*PROMPT_ERRORS, DeviceLost) as raised:
            error = raised
        if error is not None:
            sys.stderr.write(
                f"backlens: {printable(one_line(str(error)))}; this rank ends, its shards go to another gang\n"
            )
            sys.stderr.flush()
            os._exit(1)
        computed.outcomes = [
            Outcome(o.loss.cpu(), o.target_rank.cpu(), o.predicted_id.cpu()) for o in computed.outcomes
        ]
        release_freed_memory()
        return computed


class Peer:
    """A rank that follows the leader; an actor, which takes one call at a time, in their order."""

    def __init__(self, job: Job, threads: int) -> None:
        _see_only_what_is_given()
        self._job, self._threads = job, threads

    def load(self, rank: int, ranks: int, meeting: tuple[str, int]) -> None:
        with _late_to_complain():
            join(rank, ranks, go_to_meeting(*meeting), get_node_ip_address())
            self._member = _Member(self._job, self._threads)

    def make_pass(self, batch: Sequence[Example]) -> Computed:
        with _late_to_complain():
            return self._member.make_pass(batch)


class Leader(_Member):
    """Rank 0."""

    def __init__(self, job: Job, threads: int, peers: Sequence[Any]) -> None:
        _see_only_what_is_given()
        self._peers = peers
        self._passing = ThreadPoolExecutor(1, thread_name_prefix="pass")
        ranks, host = 1 + len(peers), get_node_ip_address()
        meeting = open_meeting(host)
        place = (meeting.host, meeting.port)

        def load() -> None:
            join(0, ranks, meeting, host)
            Worker.__init__(self, job, threads)

        try:
            self._together(load, [peer.load.remote(rank, ranks, place) for rank, peer in enumerate(peers, 1)])
        except RayTaskError:
            raise
        except RayError:
            os._exit(1)  # a rank is gone; raised from here, that would be an actor that refuses to start
        self._readiness = replace(self._readiness, device=f"{ranks} ranks on {self._readiness.device}")

    def _compute(self, examples: Sequence[Example], attempt: Attempt[Shard]) -> Computed:
        # Ranks end when they run out of memory, and nobody can say whether that is what the last gang died of.
        most = most_tokens(self._job.batch_tokens, self._loaded.device.type)
        self._budget = TokenBudget(max(1, most >> (attempt.number - 1)), self._loaded.device)
        suspects = attempt.suspected(examples)
        packer = Packer(self._lengths(examples), suspects)
        computed, ranks = Computed(), 1 + len(self._peers)
        passes = 0
        while packer:
            # Neighbours are of like length: a pass takes all ranks about as long. A suspect has a pass to itself.
            batches = self._take(packer, examples, 1 if passes < len(suspects) else ranks)
            passes += 1
            if attempt.number > 1:
                in_flight = [example.prompt.prompt_id for batch in batches for example in batch]
                note(self._job.directory, attempt.shard.index, in_flight)
            own, *others = [*batches, *[[]] * ranks][:ranks]
            theirs = [peer.make_pass.remote(batch) for peer, batch in zip(self._peers, others, strict=True)]
            for part in self._together(partial(self.make_pass, own), theirs):
                computed.merge(part)
        self._refuse(computed.failed)
        return computed

    def _take(self, packer: Packer, examples: Sequence[Example], most: int) -> list[list[Example]]:
        """The next batches, no more than `most`."""
        batches = []
        while packer and len(batches) < most:
            batches.append([examples[index] for index in packer.take(self._budget.at)])
        return batches

    def _together(self, own: Callable[[], Any], theirs: Sequence[Any]) -> list[Any]:
        """What all ranks return. The first error ends the wait: the others may be in a pass, for ever."""
        waiting = [
            self._passing.submit(_late_to_complain()(own)),
            *(reference.future() for reference in theirs),
        ]
        done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
        for each in done:
            each.result()
        return [each.result() for each in waiting]


def _see_only_what_is_given() -> None:
    """Ray hides GPUs from actors that have some, not from those that have none."""
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextmanager
def _late_to_complain() -> Iterator[None]:
    """A broken pass is most often the end of another rank, and that is what the leader should hear first."""
    try:
        yield
    except RuntimeError:
        time.sleep(SETTLING)
        raise


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

    def run(self, attempt: Attempt[Shard]) -> References:
        return [self.leader.run.remote(attempt)]

    def kill(self) -> None:
        for actor in (self.leader, *self.peers):
            ray.kill(actor)
