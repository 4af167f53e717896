"""The one worker class that every executor runs: a copy of the model, and shards in, commits out."""

import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch

from pipeline.capture import Outcome
from pipeline.engine.columns import fact_table, failure_table, prompt_table, without_prompts
from pipeline.engine.extract import Block, Extracted, Wanted, extract, sequence
from pipeline.engine.memory import release_freed_memory
from pipeline.engine.packing import pack
from pipeline.engine.versions import package_versions
from pipeline.errors import BacklensError
from pipeline.lens import Scaling, make_lens, verify_lens
from pipeline.models.load import ModelSource, load_model
from pipeline.models.spread import Spread
from pipeline.models.zero3 import Zero3, whole_for_the_lens
from pipeline.prompts.record import Prompt, Rejected
from pipeline.prompts.shards import Shard
from pipeline.prompts.tokenize import Example, PrependBos, context_length, tokenize
from pipeline.screening import Precision
from pipeline.store.commit import ShardCommit, commit_shard, find_commit
from pipeline.store.files import Directory


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
    screening: Precision
    prepend_bos: PrependBos
    chat_template: bool
    batch_tokens: int
    activation_checkpointing: bool
    on_error: Literal["record", "fail"]
    directory: Directory


@dataclass(frozen=True, slots=True)
class Attempt:
    """A shard to compute, and what is known of earlier attempts that ended with their worker."""

    shard: Shard
    number: int = 1


@dataclass(frozen=True, slots=True)
class Readiness:
    """What a worker says once its model is loaded."""

    device: str
    load_seconds: float


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
        self._lens = make_lens(whole_for_the_lens(parts) if job.zero3 else parts, job.scaling)
        verify_lens(self._loaded.model, self._loaded.anatomy, self._lens)
        self._context = context_length(self._loaded.model.config)
        # One thread computes, whichever thread called: the allocator keeps freed memory by thread, and a second
        # one would keep as much again.
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._tokenizing = threading.Lock()  # fast tokenizers refuse two borrowers at a time
        self._readiness = Readiness("+".join(self._loaded.devices), time.perf_counter() - started)

    def ready(self) -> Readiness:
        return self._readiness

    def run(self, attempt: Attempt) -> ShardCommit:
        """Compute and commit one shard; a shard that is already committed is left as it is."""
        shard = attempt.shard
        done = find_commit(self._job.directory, shard.index)
        if done is not None:
            return done
        started = time.perf_counter()
        with self._tokenizing:
            examples, rejected = self._tokenize(shard)
        tokenizing = time.perf_counter() - started
        computed = self._computing.submit(self._compute, examples, attempt).result()
        computed.seconds["tokenize"] = tokenizing
        return self._commit(shard, computed, rejected)

    def _tokenize(self, shard: Shard) -> tuple[list[Example], list[Rejected]]:
        prompts = [record for record in shard.records if isinstance(record, Prompt)]
        results = tokenize(
            prompts,
            self._loaded.tokenizer,
            prepend_bos=self._job.prepend_bos,
            target_mode=self._job.wanted.target_mode,
            context=self._context,
            chat_template=self._job.chat_template,
        )
        rejected = [record for record in (*shard.records, *results) if isinstance(record, Rejected)]
        self._refuse(rejected)
        return [result for result in results if isinstance(result, Example)], rejected

    def _compute(self, examples: Sequence[Example], _attempt: Attempt) -> "Computed":
        computed = Computed()
        # Autograd would keep every offloaded block's weights on the device until the backward pass.
        recompute = self._job.activation_checkpointing or self._loaded.offloaded
        for indices in pack(self._lengths(examples), self._job.batch_tokens):
            self._extract([examples[index] for index in indices], computed, recompute)
            release_freed_memory()
        self._refuse([overflow(example) for example in computed.overflowed])
        return computed

    def _lengths(self, examples: Sequence[Example]) -> list[int]:
        return [sum(map(len, sequence(example, self._job.wanted.target_mode))) - 1 for example in examples]

    def _extract(self, batch: Sequence[Example], computed: "Computed", recompute: bool) -> None:
        extracted = extract(
            self._loaded,
            self._lens,
            batch,
            self._job.wanted,
            screening=self._job.screening,
            recompute=recompute,
        )
        computed.add(batch, extracted)

    def _commit(self, shard: Shard, computed: "Computed", rejected: list[Rejected]) -> ShardCommit:
        started = time.perf_counter()
        tables = computed.tables(self._job.wanted.save_factors)
        tables["failures"] = failure_table([*rejected, *map(overflow, computed.overflowed)])
        stats = {
            "tokens": float(sum(len(example.token_ids) for example in computed.examples)),
            **{f"seconds_{stage}": seconds for stage, seconds in computed.seconds.items()},
            "seconds_tables": time.perf_counter() - started,
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
        self.overflowed: list[Example] = []
        self.blocks: defaultdict[str, list[Block]] = defaultdict(list)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, batch: Sequence[Example], extracted: Extracted) -> None:
        self.examples += batch
        self.outcomes.append(extracted.outcome)
        self.overflowed += [e for e, fine in zip(batch, extracted.finite.tolist(), strict=True) if not fine]
        self._add_rows(extracted.blocks, extracted.seconds)

    def merge(self, other: "Computed") -> None:
        """Take in what another process computed of the same shard."""
        self.examples += other.examples
        self.outcomes += other.outcomes
        self.overflowed += other.overflowed
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
        dropped = [example.prompt.prompt_id for example in self.overflowed]
        return {name: without_prompts(table, dropped) for name, table in tables.items()}


def overflow(example: Example) -> Rejected:
    prompt = example.prompt
    return Rejected(
        prompt.prompt_id,
        "compute",
        "not-finite",
        f"{prompt.where}: the loss or a gradient is not a finite number; try --dtype float32",
    )
