"""The worker of a run, whichever executor it is on: a copy of the model, and shards in, commits out."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch

from pipeline.capture import MatrixMissed, Outcome, verify_capture
from pipeline.config import Vocabulary
from pipeline.engine.blocks import Block
from pipeline.engine.budget import TokenBudget
from pipeline.engine.columns import fact_table, failure_table, prompt_table, without_prompts
from pipeline.engine.events import SECONDS
from pipeline.engine.extract import Extracted, Wanted, extract, sequence
from pipeline.engine.faults import PROMPT_ERRORS, DeviceLost, is_device_lost, is_out_of_memory
from pipeline.engine.memory import MemoryGauge, release_all, release_freed_memory
from pipeline.engine.notes import note
from pipeline.engine.packing import Packer
from pipeline.engine.versions import package_versions
from pipeline.engine.work import Attempt, Readiness
from pipeline.errors import BacklensError
from pipeline.lens import Scaling, make_lens, verify_lens
from pipeline.models.checkpoint import ModelSource
from pipeline.models.load import load_model
from pipeline.models.spread import Spread
from pipeline.models.zero3 import Zero3, whole_for_the_lens
from pipeline.prompts.record import Prompt, Rejected
from pipeline.prompts.shards import Shard
from pipeline.prompts.source import one_line
from pipeline.prompts.tokenize import Example, PrependBos, context_length, tokenize
from pipeline.screening import Precision
from pipeline.store.commit import ShardCommit, commit_shard, find_commit
from pipeline.store.files import Directory

FAILED = "failed_"
"""Begins the name of a count of failed prompts in a commit's stats; what follows is their kind."""
SUBJECTS_ABSENT, SUBJECTS_REPEATED = "subjects_absent", "subjects_repeated"
"""Counts of prompts that do not name their subject, and that name it several times."""
FIRST_DONE = "first_done"
"""The lowest prompt_id that has rows."""
FAILING = 8
"""Prompts that raise before any was computed: beyond that it is not the prompts."""

NOT_FINITE = "the loss or a gradient is not a finite number; try --dtype float32"
OUT_OF_MEMORY = "does not fit into memory, not even alone and with its activations computed twice"
WORKER_DIED = (
    "the worker's process died each time it computed this prompt; it may need more memory than there is"
)


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a worker has to know; small, and sent to every worker."""

    model: ModelSource
    spread: Spread | None
    """Over which devices each copy of the model is spread; None for one device."""
    zero3: Zero3 | None
    """Over how many processes each copy is partitioned; None for one."""
    wanted: Wanted
    scaling: Scaling
    vocabulary: Vocabulary
    screening: Precision
    prepend_bos: PrependBos
    chat_template: bool
    batch_tokens: int | Literal["auto"]
    activation_checkpointing: bool
    on_error: Literal["record", "fail"]
    directory: Directory

    def worker(self, threads: int | None = None) -> "Worker":
        return Worker(self, threads)


class Worker:
    """Holds one copy of the model and turns shards into committed files.

    `run` may be called by two threads at a time: while one writes a shard, the other computes the next.
    """

    def __init__(self, job: Job, threads: int | None = None) -> None:
        started = time.perf_counter()
        if threads is not None:
            torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._job = job
        self._loaded = load_model(job.model, device, job.spread, job.zero3)
        parts = self._loaded.anatomy
        parts = whole_for_the_lens(parts) if job.zero3 else parts
        tokens = self._loaded.token_ids if job.vocabulary == "tokenizer" else None
        self._lens = make_lens(parts, job.scaling, tokens)
        verify_lens(self._loaded.model, self._loaded.anatomy, self._lens)
        verify_capture(self._loaded, job.wanted.layers, job.wanted.modules, recompute=self._recompute)
        self._lens_copies = [self._lens.to(device) for device in self._loaded.lens_copies]
        self._context = context_length(self._loaded.model.config)
        self._budget = TokenBudget(job.batch_tokens, self._loaded.device)
        self._any_computed = False
        self._raised = 0
        # One thread computes, whichever thread called: the allocator keeps freed memory by thread, and a second
        # one would keep as much again.
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._tokenizing = threading.Lock()  # fast tokenizers refuse two borrowers at a time
        self._readiness = Readiness("+".join(self._loaded.devices), time.perf_counter() - started)

    def ready(self) -> Readiness:
        return self._readiness

    def run(self, attempt: Attempt[Shard]) -> ShardCommit:
        """Compute and commit one shard; a shard that is already committed is left as it is."""
        shard = attempt.shard
        done = find_commit(self._job.directory, shard.index)
        if done is not None:
            return done
        started = time.perf_counter()
        with self._tokenizing:
            examples, rejected = self._tokenize(shard, attempt.condemned)
        tokenizing = time.perf_counter() - started
        computed = self._computing.submit(self._compute, examples, attempt).result()
        computed.seconds["tokenize"] = tokenizing
        return self._commit(attempt, computed, rejected)

    def _tokenize(
        self, shard: Shard, condemned: Collection[int] = ()
    ) -> tuple[list[Example], list[Rejected]]:
        prompts = [record for record in shard.records if isinstance(record, Prompt)]
        results = tokenize(
            [prompt for prompt in prompts if prompt.prompt_id not in condemned],
            self._loaded.tokenizer,
            prepend_bos=self._job.prepend_bos,
            target_mode=self._job.wanted.target_mode,
            context=self._context,
            rows=self._loaded.anatomy.rows,
            chat_template=self._job.chat_template,
        )
        rejected = [record for record in (*shard.records, *results) if isinstance(record, Rejected)]
        rejected += [
            rejected_prompt(prompt, "worker-died", WORKER_DIED)
            for prompt in prompts
            if prompt.prompt_id in condemned
        ]
        self._refuse(rejected)
        return [result for result in results if isinstance(result, Example)], rejected

    def _compute(self, examples: Sequence[Example], attempt: Attempt[Shard]) -> "Computed":
        lengths = self._lengths(examples)
        packer = Packer(lengths, attempt.suspected(examples))
        computed = Computed()
        while packer:
            indices = packer.take(self._budget.at)
            batch = [examples[index] for index in indices]
            if attempt.number > 1:
                note(self._job.directory, attempt.shard.index, [e.prompt.prompt_id for e in batch])
            gauge = MemoryGauge()
            error = self._try(batch, computed)
            tokens = len(batch) * lengths[indices[-1]]
            if error is None:
                self._budget.learn(gauge, len(batch), lengths[indices[-1]])
                computed.padded += tokens
            elif len(batch) == 1:
                computed.failed.append(self._failure(batch[0], error))
            elif is_out_of_memory(error):
                self._budget.halve(tokens)
                computed.out_of_memory += 1
                packer.put_back(indices)
            else:
                packer.halve(indices)
        self._refuse(computed.failed)
        return computed

    def _lengths(self, examples: Sequence[Example]) -> list[int]:
        return [sum(map(len, sequence(example, self._job.wanted.target_mode))) - 1 for example in examples]

    @property
    def _recompute(self) -> bool:
        # Autograd would keep every offloaded block's weights on the device until the backward pass.
        return self._job.activation_checkpointing or self._loaded.offloaded

    def _try(self, batch: Sequence[Example], computed: "Computed") -> Exception | None:
        """Compute a batch; an error that its prompts or its size may be to blame for is returned."""
        error = self._extract(batch, computed, self._recompute)
        if error is not None and is_out_of_memory(error):
            release_all()
            if len(batch) == 1 and not self._recompute:
                error = self._extract(batch, computed, recompute=True)
        release_freed_memory()
        return error

    def _extract(self, batch: Sequence[Example], computed: "Computed", recompute: bool) -> Exception | None:
        try:
            extracted = extract(
                self._loaded,
                self._lens,
                batch,
                self._job.wanted,
                copies=self._lens_copies,
                screening=self._job.screening,
                recompute=recompute,
            )
        except PROMPT_ERRORS as error:
            if is_device_lost(error):
                raise DeviceLost(f"the device failed ({one_line(str(error))})") from error
            # What was computed up to here hangs on the traceback.
            return error.with_traceback(None) if is_out_of_memory(error) else error
        computed.add(batch, extracted)
        self._any_computed = True
        return None

    def _failure(self, example: Example, error: Exception) -> Rejected:
        """The row of a prompt that failed alone. A model that fails at everything is no matter of prompts."""
        if is_out_of_memory(error):
            return rejected_prompt(example.prompt, "out-of-memory", OUT_OF_MEMORY)
        self._raised += 1
        if self._raised == FAILING and not self._any_computed:
            raise error
        if isinstance(error, MatrixMissed):
            return rejected_prompt(example.prompt, "matrix-missed", str(error))
        return rejected_prompt(example.prompt, "raised", f"{type(error).__name__}: {error}")

    def _commit(
        self, attempt: Attempt[Shard], computed: "Computed", rejected: Sequence[Rejected]
    ) -> ShardCommit:
        started, shard = time.perf_counter(), attempt.shard
        tables = computed.tables(self._job.wanted.save_factors)
        failed = [*rejected, *computed.failed]
        tables["failures"] = failure_table(failed)
        stats = {
            "tokens": float(sum(len(example.token_ids) for example in computed.examples)),
            "padded_tokens": float(computed.padded),
            "batch_tokens": float(self._budget.most),
            "out_of_memory": float(computed.out_of_memory),
            "attempt": float(attempt.number),
            **_prompt_stats(tables["prompts"], computed.examples),
            **{FAILED + kind: float(count) for kind, count in Counter(r.error for r in failed).items()},
            **{SECONDS + stage: seconds for stage, seconds in computed.seconds.items()},
            SECONDS + "tables": time.perf_counter() - started,
        }
        return commit_shard(
            self._job.directory,
            shard.index,
            tables,
            first_prompt=shard.records[0].prompt_id,
            prompts=len(shard.records),
            stats=stats,
            versions=package_versions(),
        )

    def _refuse(self, rejected: Sequence[Rejected]) -> None:
        if rejected and self._job.on_error == "fail":
            raise BacklensError(f"{rejected[0].message} (--on-error fail)")


class Computed:
    """What the batches of one shard gave."""

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.outcomes: list[Outcome] = []
        self.failed: list[Rejected] = []
        self.blocks: defaultdict[str, list[Block]] = defaultdict(list)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.padded = 0
        """Tokens of the batches, padding included."""
        self.out_of_memory = 0
        """Batches that did not fit."""
        self._overflowed: list[int] = []

    def add(self, batch: Sequence[Example], extracted: Extracted) -> None:
        self.examples += batch
        self.outcomes.append(extracted.outcome)
        for example, fine in zip(batch, extracted.finite.tolist(), strict=True):
            if not fine:
                self._overflowed.append(example.prompt.prompt_id)
                self.failed.append(rejected_prompt(example.prompt, "not-finite", NOT_FINITE))
        self._add_rows(extracted.blocks, extracted.seconds)

    def merge(self, other: "Computed") -> None:
        """Take in what another process computed of the same shard."""
        self.examples += other.examples
        self.outcomes += other.outcomes
        self.failed += other.failed
        self.padded += other.padded
        self._overflowed += other._overflowed
        self._add_rows(other.blocks, other.seconds)

    def _add_rows(self, blocks: Mapping[str, list[Block]], seconds: Mapping[str, float]) -> None:
        for name, more in blocks.items():
            self.blocks[name] += more
        for stage, taken in seconds.items():
            self.seconds[stage] += taken

    def tables(self, save_factors: bool) -> dict[str, pa.Table]:
        names = ("layers", "neurons", "tokens", *(["factors"] if save_factors else []))
        tables = {name: fact_table(name, self.blocks.pop(name, [])) for name in names}
        tables["prompts"] = prompt_table(self.examples, self.outcomes)
        return {name: without_prompts(table, self._overflowed) for name, table in tables.items()}


def _prompt_stats(prompts: pa.Table, examples: Sequence[Example]) -> dict[str, float]:
    """What the run's report says of the prompts that have rows."""
    rows = prompts.select(["prompt_id", "subject", "subject_start"]).to_pylist()
    places = (example.prompt.subject_place() for example in examples)
    stats = {
        SUBJECTS_ABSENT: sum(row["subject"] is not None and row["subject_start"] is None for row in rows),
        SUBJECTS_REPEATED: sum(place is not None and place.others > 0 for place in places),
        **({FIRST_DONE: min(row["prompt_id"] for row in rows)} if rows else {}),
    }
    return {name: float(value) for name, value in stats.items()}


def rejected_prompt(prompt: Prompt, error: str, message: str) -> Rejected:
    return Rejected(prompt.prompt_id, "compute", error, one_line(f"{prompt.where}: {message}"))
