"""A replica of several processes, or ranks, that share one copy of the model (DeepSpeed's ZeRO-3).

The leader takes a shard as any worker does: it tokenizes, packs the batches that a worker would pack, and commits. In
between it gives each rank, itself included, one batch, and merges their results. A pass gathers weights from all
ranks, so a rank without a batch runs a dummy one-token batch.

A replica dies as a whole: when one rank ends, the others wait in a pass that never completes. The leader waits beside
its own pass and not in it, so Ray can tell it about the end of a rank, and it passes the error on. The executor takes
that as the death of the replica: it kills the other ranks and starts another replica.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from backlens.backward_lens import lengths_of
from backlens.capture.packing import (
    PROMPT_ERRORS,
    DeviceLost,
    Packer,
    TokenBudget,
    most_tokens,
    release_freed_memory,
)
from backlens.columns import Computed
from backlens.engine.executors.base import AHEAD, Attempt, Readiness, note
from backlens.engine.executors.replicas import References
from backlens.engine.worker import RunSetup, Worker
from backlens.models.zero3 import go_to_meeting, join, open_meeting
from backlens.printable import printable
from backlens.prompts.prompt import Shard
from backlens.prompts.source import one_line
from backlens.prompts.tokenize import Example
from backlens.store.commit import ShardCommit

SETTLING = 15.0
"""Seconds within which Ray tells the leader that a rank has ended."""


class Rank:
    """One rank, with its part of every weight. All ranks must make each pass together."""

    def __init__(self, setup: RunSetup, threads: int) -> None:
        self._options = setup.options
        self.lens = setup.load(threads)

    def make_pass(self, batch: Sequence[Example]) -> Computed:
        """Compute a batch; for an empty one, run a dummy one-token batch.

        An error about the prompts, the batch's size or the device ends the process, because the other ranks cannot be
        told to leave the pass. The executor's rule for dead workers then finds the prompt at fault.
        """
        computed = Computed()
        try:
            if batch:
                error = self.lens.add_rows(batch, self._options, computed)
                computed.padded = len(batch) * max(lengths_of(batch, self._options.target_mode))
            else:
                self.lens.dummy_pass(self._options)
                error = None
        except (*PROMPT_ERRORS, DeviceLost) as raised:
            error = raised
        if error is not None:
            sys.stderr.write(
                f"backlens: {printable(one_line(str(error)))}; this rank ends, its shards go to another replica\n"
            )
            sys.stderr.flush()
            os._exit(1)
        computed.outcomes = [outcome.to(torch.device("cpu")) for outcome in computed.outcomes]
        release_freed_memory()
        return computed


class Peer:
    """A rank that follows the leader: an actor that takes one call at a time, in order."""

    def __init__(self, setup: RunSetup, threads: int) -> None:
        _hide_other_gpus()
        self._setup, self._threads = setup, threads

    def load(self, rank: int, ranks: int, meeting: tuple[str, int]) -> None:
        with _errors_delayed():
            join(rank, ranks, go_to_meeting(*meeting), get_node_ip_address())
            self._rank = Rank(self._setup, self._threads)

    def make_pass(self, batch: Sequence[Example]) -> Computed:
        with _errors_delayed():
            return self._rank.make_pass(batch)


class Leader:
    """Rank 0: gives all ranks their batches, and commits the results as any worker does."""

    def __init__(self, setup: RunSetup, threads: int, peers: Sequence[Any]) -> None:
        _hide_other_gpus()
        started = time.perf_counter()
        self._setup, self._peers = setup, peers
        self._passing = ThreadPoolExecutor(1, thread_name_prefix="pass")
        ranks, host = 1 + len(peers), get_node_ip_address()
        meeting = open_meeting(host)
        place = (meeting.host, meeting.port)

        def load() -> Rank:
            join(0, ranks, meeting, host)
            return Rank(setup, threads)

        try:
            self._rank, *_ = self._together(
                load, [peer.load.remote(rank, ranks, place) for rank, peer in enumerate(peers, 1)]
            )
        except RayTaskError:
            raise
        except RayError:
            os._exit(1)  # a rank is gone; an error raised here would be an actor that refuses to start
        lens = self._rank.lens
        device = f"{ranks} ranks on {'+'.join(lens.loaded.devices)}"
        readiness = Readiness(device, time.perf_counter() - started)
        self._worker = Worker(setup, lens, readiness, self._compute)

    def ready(self) -> Readiness:
        return self._worker.ready()

    def run(self, attempt: Attempt[Shard]) -> ShardCommit:
        return self._worker.run(attempt)

    def _compute(self, examples: Sequence[Example], attempt: Attempt[Shard]) -> Computed:
        # Ranks end when they run out of memory, so each attempt halves the batch: the last one may have died of that.
        device = self._rank.lens.loaded.device
        most = most_tokens(self._setup.batch_tokens, device.type)
        budget = TokenBudget(max(1, most >> (attempt.number - 1)), device)
        suspects = attempt.suspected(examples)
        packer = Packer(lengths_of(examples, self._setup.options.target_mode), suspects)
        computed, ranks = Computed(), 1 + len(self._peers)
        computed.batch_tokens = budget.most
        passes = 0
        while packer:
            # Neighbours have similar lengths, so a pass takes all ranks about as long. A suspect has a pass to itself.
            batches = _take(packer, examples, budget, 1 if passes < len(suspects) else ranks)
            passes += 1
            if attempt.number > 1:
                in_flight = [example.prompt.prompt_id for batch in batches for example in batch]
                note(self._setup.directory, attempt.shard.index, in_flight)
            own, *others = [*batches, *[[]] * ranks][:ranks]
            theirs = [peer.make_pass.remote(batch) for peer, batch in zip(self._peers, others, strict=True)]
            for part in self._together(partial(self._rank.make_pass, own), theirs):
                computed.merge(part)
        return computed

    def _together(self, own: Callable[[], Any], theirs: Sequence[Any]) -> list[Any]:
        """Collect the results of all ranks. The first error ends the wait: the others may never leave their pass."""
        waiting = [
            self._passing.submit(_errors_delayed()(own)),
            *(reference.future() for reference in theirs),
        ]
        done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
        for each in done:
            each.result()
        return [each.result() for each in waiting]


def _take(packer: Packer, examples: Sequence[Example], budget: TokenBudget, most: int) -> list[list[Example]]:
    """Take the next batches, at most `most`."""
    batches = []
    while packer and len(batches) < most:
        batches.append([examples[index] for index in packer.take(budget.at)])
    return batches


def _hide_other_gpus() -> None:
    """Hide all GPUs from an actor that has none; Ray hides the others only from an actor that has some."""
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextmanager
def _errors_delayed() -> Iterator[None]:
    """Delay an error: a broken pass mostly means that another rank ended, and the leader should hear that first."""
    try:
        yield
    except RuntimeError:
        time.sleep(SETTLING)
        raise


@dataclass(frozen=True, slots=True)
class Zero3Kind:
    """A copy of the model in several actors, on one device each."""

    setup: RunSetup
    ranks: int
    cpus: float
    """CPUs per rank."""
    gpus: int
    """GPUs per rank: 1 or 0."""

    @property
    def bundles(self) -> Sequence[Mapping[str, float]]:
        return [{"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})] * self.ranks

    def start(self, group: PlacementGroup) -> "Zero3Replica":
        threads = max(1, int(self.cpus))
        peers = [
            self._actor(Peer, group, rank, 1).remote(self.setup, threads) for rank in range(1, self.ranks)
        ]
        leader = self._actor(Leader, group, 0, AHEAD + 1)
        return Zero3Replica(leader.remote(self.setup, threads, peers), peers)

    def _actor(self, kind: type, group: PlacementGroup, rank: int, concurrency: int) -> Any:
        return ray.remote(kind).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_restarts=0,
            max_concurrency=concurrency,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
        )


@dataclass(frozen=True, slots=True)
class Zero3Replica:
    """Actors that share one copy of the model; the leader's answer fails when any of them does."""

    leader: Any
    peers: Sequence[Any]

    def ready(self) -> References:
        return [self.leader.ready.remote()]

    def run(self, attempt: Attempt[Shard]) -> References:
        return [self.leader.run.remote(attempt)]

    def kill(self) -> None:
        for actor in (self.leader, *self.peers):
            ray.kill(actor)
