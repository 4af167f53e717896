"""The worker of a sweep: a copy of the model, and shards of the grid in, committed rows of `edits` out.

It runs on the executors of `backlens run`, which know no more of it than `pipeline.engine.work` says. A shard's rows do
not depend on any other's, nor on the worker, so a sweep that was stopped goes on with the shards that have no commit
(`pipeline.store.commit` says what a crash leaves), and a shard whose worker died is given to another.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import torch

from pipeline.editing.evaluate import Exam, Result, ask, exam
from pipeline.editing.grid import Grid, Trial, Work
from pipeline.editing.loading import load_editable
from pipeline.editing.method import Method
from pipeline.editing.options import EditOptions
from pipeline.editing.request import Request
from pipeline.editing.text import generate, ngram_entropy, reference_score
from pipeline.editing.tools import make_method, make_tools
from pipeline.editing.untouched import Bystanders, Untouched
from pipeline.editing.weights import edited, weights_digest
from pipeline.engine.faults import PROMPT_ERRORS, DeviceLost, is_device_lost
from pipeline.engine.versions import package_versions
from pipeline.engine.work import Attempt, Readiness
from pipeline.errors import BacklensError
from pipeline.models.checkpoint import ModelSource
from pipeline.store.commit import SWEEP_TABLES, ShardCommit, commit_shard, find_commit
from pipeline.store.files import Directory
from schemas.tables import EDITS


@dataclass(frozen=True, slots=True)
class SweepJob:
    """Everything a worker of a sweep has to know; small, and sent to every worker."""

    model: ModelSource
    options: EditOptions
    """Its paths are read by the worker: those of --text, --statistics and --editor."""
    grid: Grid
    bystanders: Bystanders
    generate: bool
    directory: Directory

    def worker(self, threads: int | None = None) -> "SweepWorker":
        return SweepWorker(self, threads)


class SweepWorker:
    """Edits the model in memory, asks, and puts it back: one shard at a time, whichever thread calls."""

    def __init__(self, job: SweepJob, threads: int | None = None) -> None:
        started = time.perf_counter()
        if threads is not None:
            torch.set_num_threads(threads)
        self._job = job
        self._loaded = load_editable(job.model)
        self._tools = make_tools(job.options, self._loaded, job.grid.methods, job.grid.layers)
        self._exams: dict[int, tuple[Exam, Result]] = {}
        self._digest = weights_digest(self._loaded)
        self._untouched = Untouched(self._loaded, job.bystanders)
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._readiness = Readiness("+".join(self._loaded.devices), time.perf_counter() - started)

    def ready(self) -> Readiness:
        return self._readiness

    def run(self, attempt: Attempt[Work], /) -> ShardCommit:
        """Compute and commit one shard; a shard that is already committed is left as it is.

        Raises BacklensError if the weights are not what they were.
        """
        done = find_commit(self._job.directory, attempt.shard.index)
        if done is not None:
            return done
        rows = self._computing.submit(self._rows, attempt.shard).result()
        return commit_shard(
            self._job.directory,
            attempt.shard.index,
            {"edits": pa.Table.from_pylist(rows, schema=EDITS.schema)},
            first_prompt=attempt.shard.groups[0][0].prompt_id,
            prompts=len(rows),
            stats={"attempt": float(attempt.number)},
            versions=package_versions(),
            always=SWEEP_TABLES,
        )

    def _rows(self, work: Work) -> list[dict[str, object]]:
        trial = work.trial
        method = make_method(self._job.options, self._tools, trial.method, trial.layer, trial.lr)
        try:
            rows = [row for group in work.groups for row in self._group(trial, method, group)]
        except PROMPT_ERRORS as error:
            if is_device_lost(error):
                raise DeviceLost(f"the device failed ({error})") from error
            raise
        if weights_digest(self._loaded) != self._digest:
            raise BacklensError(
                "edit: the weights were not restored to what they were; nothing of this shard is kept"
            )
        return rows

    def _group(
        self, trial: Trial, method: Method, requests: tuple[Request, ...]
    ) -> Iterator[dict[str, object]]:
        exams = [self._exam(request) for request in requests]
        started = time.perf_counter()
        deltas = method(self._loaded, *requests)
        made = time.perf_counter()
        with edited(self._loaded, deltas):
            results = ask(self._loaded, [each for each, _ in exams])
            asked = time.perf_counter()
            beyond = self._untouched.measure() if trial.at_once > 1 else (None, None)
            texts = [self._texts(request) for request in requests]
        norm = math.sqrt(sum(delta.norm() ** 2 for delta in deltas))
        for request, (_, before), result, (entropy, reference) in zip(
            requests, exams, results, texts, strict=True
        ):
            yield {
                "trial": trial.index,
                "prompt_id": request.prompt_id,
                "method": trial.method,
                "layer": trial.layer,
                "lr": trial.lr,
                "at_once": trial.at_once,
                **dict(result.success),
                **{f"{kind}_accuracy": value for kind, value in result.accuracy.items()},
                "target_prob": result.target.probability,
                "target_rank": result.target.rank,
                "target_prob_before": before.target.probability,
                "target_rank_before": before.target.rank,
                "delta_norm": norm,
                "entropy": entropy,
                "reference": reference,
                "untouched": beyond[0],
                "perplexity": beyond[1],
                "seconds_edit": (made - started) / len(requests),
                "seconds_evaluate": (asked - made) / len(requests),
            }

    def _exam(self, request: Request) -> tuple[Exam, Result]:
        """The case's questions, and what the unedited model says to them: found once."""
        if request.prompt_id not in self._exams:
            made = exam(self._loaded, request)
            self._exams[request.prompt_id] = made, ask(self._loaded, [made])[0]
        return self._exams[request.prompt_id]

    def _texts(self, request: Request) -> tuple[float | None, float | None]:
        if not (self._job.generate and request.generation):
            return None, None
        texts = generate(self._loaded, request.generation, seed=request.prompt_id)
        reference = reference_score(texts, request.references) if request.references else None
        return ngram_entropy(texts), reference
