"""The worker of a run, on any executor: it holds a copy of the model and turns shards into commits."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch

from backlens.backward_lens import BackwardLens
from backlens.capture.packing import TokenBudget
from backlens.columns import Computed, failure_table, rejected_prompt
from backlens.config import Vocabulary
from backlens.engine.events import SECONDS
from backlens.engine.executors.base import Attempt, Readiness, note
from backlens.errors import BacklensError
from backlens.models.checkpoint import ModelSource
from backlens.models.device_map import DeviceMapOptions
from backlens.models.zero3 import Zero3
from backlens.projection.lens import Scaling
from backlens.prompts.prompt import Prompt, Rejected, Shard
from backlens.prompts.tokenize import Example, PrependBos
from backlens.rows import RowOptions
from backlens.store.commit import ShardCommit, commit_shard, find_commit
from backlens.store.directory import Directory
from backlens.store.run_record import package_versions

FAILED = "failed_"
"""Prefix of a count of failed prompts in the stats of a commit; their kind follows."""
SUBJECTS_ABSENT, SUBJECTS_REPEATED = "subjects_absent", "subjects_repeated"
"""Counts of prompts that do not contain their subject, and that contain it several times."""
FIRST_DONE = "first_done"
"""The lowest prompt_id that has rows."""

WORKER_DIED = (
    "the worker's process died each time it computed this prompt; the machine may have too little memory"
)

Compute = Callable[[Sequence[Example], Attempt[Shard]], Computed]
"""The function that computes the rows of a shard's prompts."""


@dataclass(frozen=True, slots=True)
class RunSetup:
    """Everything that a worker has to know; small, because every worker receives it."""

    model: ModelSource
    device_map: DeviceMapOptions | None
    """How each copy of the model is divided over devices; None for one device."""
    zero3: Zero3 | None
    """How each copy is divided over processes; None for one process."""
    options: RowOptions
    scaling: Scaling
    vocabulary: Vocabulary
    prepend_bos: PrependBos
    chat_template: bool
    batch_tokens: int | Literal["auto"]
    on_error: Literal["record", "fail"]
    directory: Directory

    def load(self, threads: int | None) -> BackwardLens:
        """Load the model in this process, for its GPUs or else for this many threads."""
        if threads is not None:
            torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        lens = BackwardLens.load(
            self.model, device, self.scaling, self.vocabulary, device_map=self.device_map, zero3=self.zero3
        )
        lens.verify(self.options)
        return lens

    def worker(self, threads: int | None = None) -> "Worker":
        started = time.perf_counter()
        lens = self.load(threads)
        readiness = Readiness("+".join(lens.loaded.devices), time.perf_counter() - started)
        return Worker(self, lens, readiness)


class Worker:
    """Holds one copy of the model and turns shards into committed files.

    Two threads may call `run` at a time: one writes a shard while the other computes the next.
    """

    def __init__(
        self, setup: RunSetup, lens: BackwardLens, readiness: Readiness, compute: Compute | None = None
    ) -> None:
        """Compute in this process alone, or with `compute` (ZeRO-3)."""
        self._setup, self._lens, self._readiness = setup, lens, readiness
        self._budget = TokenBudget(setup.batch_tokens, lens.loaded.device)
        self._compute = compute or self._compute_here
        # One thread computes, whichever thread calls: the allocator keeps freed memory per thread, and a second
        # thread would keep as much again.
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._tokenizing = threading.Lock()  # fast tokenizers refuse two threads at a time

    def ready(self) -> Readiness:
        return self._readiness

    def run(self, attempt: Attempt[Shard]) -> ShardCommit:
        """Compute and commit one shard; leave a shard that has a commit as it is."""
        shard = attempt.shard
        done = find_commit(self._setup.directory, shard.index)
        if done is not None:
            return done
        started = time.perf_counter()
        with self._tokenizing:
            examples, rejected = self._tokenize(shard, attempt.blamed)
        tokenizing = time.perf_counter() - started
        computed = self._computing.submit(self._compute, examples, attempt).result()
        self._refuse(computed.failed)
        computed.seconds["tokenize"] = tokenizing
        return self._commit(attempt, computed, rejected)

    def _tokenize(self, shard: Shard, blamed: Collection[int]) -> tuple[list[Example], list[Rejected]]:
        prompts = [record for record in shard.records if isinstance(record, Prompt)]
        examples, rejected = self._lens.examples(
            [prompt for prompt in prompts if prompt.prompt_id not in blamed],
            prepend_bos=self._setup.prepend_bos,
            target_mode=self._setup.options.target_mode,
            chat_template=self._setup.chat_template,
        )
        rejected = [*(record for record in shard.records if isinstance(record, Rejected)), *rejected]
        rejected += [
            rejected_prompt(prompt, "worker-died", WORKER_DIED)
            for prompt in prompts
            if prompt.prompt_id in blamed
        ]
        self._refuse(rejected)
        return examples, rejected

    def _compute_here(self, examples: Sequence[Example], attempt: Attempt[Shard]) -> Computed:
        def announce(batch: Sequence[Example]) -> None:
            if attempt.number > 1:
                note(self._setup.directory, attempt.shard.index, [each.prompt.prompt_id for each in batch])

        return self._lens.compute(
            examples, self._setup.options, self._budget, alone=attempt.suspected(examples), announce=announce
        )

    def _commit(
        self, attempt: Attempt[Shard], computed: Computed, rejected: Sequence[Rejected]
    ) -> ShardCommit:
        started, shard = time.perf_counter(), attempt.shard
        tables = computed.tables(self._setup.options.save_factors)
        failed = [*rejected, *computed.failed]
        tables["failures"] = failure_table(failed)
        stats = {
            "tokens": float(sum(len(example.token_ids) for example in computed.examples)),
            "padded_tokens": float(computed.padded),
            "batch_tokens": float(computed.batch_tokens),
            "out_of_memory": float(computed.out_of_memory),
            "attempt": float(attempt.number),
            **_prompt_stats(tables["prompts"], computed.examples),
            **{FAILED + kind: float(count) for kind, count in Counter(r.error for r in failed).items()},
            **{SECONDS + stage: seconds for stage, seconds in computed.seconds.items()},
            SECONDS + "tables": time.perf_counter() - started,
        }
        return commit_shard(
            self._setup.directory,
            shard.index,
            tables,
            first_prompt=shard.records[0].prompt_id,
            prompts=len(shard.records),
            stats=stats,
            versions=package_versions(),
        )

    def _refuse(self, rejected: Sequence[Rejected]) -> None:
        if rejected and self._setup.on_error == "fail":
            raise BacklensError(f"{rejected[0].message} (--on-error fail)")


def _prompt_stats(prompts: pa.Table, examples: Sequence[Example]) -> dict[str, float]:
    """Count, for the run's report, facts about the prompts that have rows."""
    rows = prompts.select(["prompt_id", "subject", "subject_start"]).to_pylist()
    places = (example.prompt.subject_place() for example in examples)
    stats = {
        SUBJECTS_ABSENT: sum(row["subject"] is not None and row["subject_start"] is None for row in rows),
        SUBJECTS_REPEATED: sum(place is not None and place.others > 0 for place in places),
        **({FIRST_DONE: min(row["prompt_id"] for row in rows)} if rows else {}),
    }
    return {name: float(value) for name, value in stats.items()}
