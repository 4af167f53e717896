"""A sweep of edits: trials over methods, layers and rates, from the options to a finished directory of `edits`.

`sweep` plans, resumes and finishes; it loads no weights. A worker holds a copy of the model, takes shards of the grid,
and commits rows. It runs on the executors of `backlens run`, through the interface in `backlens.engine.executors.base`.
The rows of a shard do not depend on other shards or on the worker. So a stopped sweep continues with the shards that
have no commit (see `backlens.store.commit` for what a crash leaves), and another worker takes the shard of a dead one.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path

import pyarrow as pa
import torch
import yaml

from backlens import demo
from backlens.capture.packing import PROMPT_ERRORS, DeviceLost, is_device_lost
from backlens.editing.delta import edited, weights_digest
from backlens.editing.evaluate import (
    Bystanders,
    Evaluation,
    Result,
    Untouched,
    evaluate,
    generate,
    ngram_entropy,
    prepare,
    reference_score,
)
from backlens.editing.methods import Method, make_method, measure_shared, refuse_missing
from backlens.editing.options import EditOptions, MethodName
from backlens.editing.request import Request, load_editable, model_source, read_requests, subject_notes
from backlens.engine.executors import executing
from backlens.engine.executors.base import Attempt, RayOptions, Readiness
from backlens.errors import BacklensError, Interrupted
from backlens.models.checkpoint import ModelSource, Proof, pinned
from backlens.models.load import load_config, prove
from backlens.printable import plain
from backlens.prompts.source import Source
from backlens.store.commit import SWEEP_TABLES, ShardCommit, commit_shard, committed, find_commit
from backlens.store.directory import Directory
from backlens.store.input_paths import published_name, recorded, remember
from backlens.store.lock import DriverLock
from backlens.store.run_record import (
    FingerprintValue,
    ShardPlan,
    finish,
    made_with_others,
    open_run,
    package_versions,
)
from backlens.store.tables import EDITS

SHARD_CASES = 50


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of the grid."""

    index: int
    method: MethodName
    layer: int
    lr: float | None
    at_once: int


@dataclass(frozen=True, slots=True)
class TrialCases:
    """One shard: a trial, and groups of cases. It holds the cases, so that workers read no file of edits."""

    index: int
    trial: Trial
    groups: tuple[tuple[Request, ...], ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Methods × layers × rates × numbers of edits at once."""

    methods: tuple[MethodName, ...]
    layers: tuple[int, ...]
    rates: tuple[float | None, ...]
    at_once: tuple[int, ...]

    def trials(self) -> list[Trial]:
        points = product(self.methods, self.layers, self.rates, self.at_once)
        return [Trial(index, *point) for index, point in enumerate(points)]

    def shards(self, requests: Sequence[Request]) -> list[TrialCases]:
        """Every trial's cases in groups of `at_once`. Cases that do not fill a last group are left out.

        Raises BacklensError where there are not enough for one.
        """
        work: list[TrialCases] = []
        for trial in self.trials():
            size = trial.at_once
            if size > len(requests):
                raise BacklensError(f"--at-once {size}: there are {len(requests)} cases")
            starts = range(0, len(requests) - size + 1, size)
            groups = [tuple(requests[start : start + size]) for start in starts]
            step = max(1, SHARD_CASES // size)
            for first in range(0, len(groups), step):
                work.append(TrialCases(len(work), trial, tuple(groups[first : first + step])))
        return work


@dataclass(frozen=True, slots=True)
class SweepSetup:
    """All that a worker of a sweep needs; small, because it is sent to every worker."""

    model: ModelSource
    options: EditOptions
    """Options of the methods. The worker reads the files of --text, --statistics and --editor."""
    grid: Grid
    bystanders: Bystanders
    generate: bool
    directory: Directory

    def worker(self, threads: int | None = None) -> "SweepWorker":
        return SweepWorker(self, threads)


class SweepWorker:
    """Edits the model in memory, evaluates it and restores it: one shard at a time, in one thread."""

    def __init__(self, job: SweepSetup, threads: int | None = None) -> None:
        started = time.perf_counter()
        if threads is not None:
            torch.set_num_threads(threads)
        self._job = job
        self._loaded = load_editable(job.model)
        self._shared = measure_shared(job.options, self._loaded, job.grid.methods, job.grid.layers)
        self._prepared: dict[int, tuple[Evaluation, Result]] = {}
        self._digest = weights_digest(self._loaded)
        self._untouched = Untouched(self._loaded, job.bystanders)
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._readiness = Readiness("+".join(self._loaded.devices), time.perf_counter() - started)

    def ready(self) -> Readiness:
        return self._readiness

    def run(self, attempt: Attempt[TrialCases], /) -> ShardCommit:
        """Compute and commit one shard, unless it is committed already.

        Raises BacklensError if the weights are not restored exactly.
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

    def _rows(self, work: TrialCases) -> list[dict[str, object]]:
        trial = work.trial
        method = make_method(self._job.options, self._shared, trial.method, trial.layer, trial.lr)
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
        evaluations = [self._prepare(request) for request in requests]
        started = time.perf_counter()
        deltas = method(self._loaded, *requests)
        made = time.perf_counter()
        with edited(self._loaded, deltas):
            results = evaluate(self._loaded, [each for each, _ in evaluations])
            asked = time.perf_counter()
            beyond = self._untouched.measure() if trial.at_once > 1 else (None, None)
            texts = [self._texts(request) for request in requests]
        norm = math.sqrt(sum(delta.norm() ** 2 for delta in deltas))
        for request, (_, before), result, (entropy, reference) in zip(
            requests, evaluations, results, texts, strict=True
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

    def _prepare(self, request: Request) -> tuple[Evaluation, Result]:
        """The case's evaluation, and its result for the unedited model; computed once per case."""
        if request.prompt_id not in self._prepared:
            made = prepare(self._loaded, request)
            self._prepared[request.prompt_id] = made, evaluate(self._loaded, [made])[0]
        return self._prepared[request.prompt_id]

    def _texts(self, request: Request) -> tuple[float | None, float | None]:
        if not (self._job.generate and request.generation):
            return None, None
        texts = generate(self._loaded, request.generation, seed=request.prompt_id)
        reference = reference_score(texts, request.references) if request.references else None
        return ngram_entropy(texts), reference


@dataclass(frozen=True, slots=True)
class Side:
    """Optional measurements of an edited model: files of facts and of texts, and generation of texts."""

    untouched: str | None = None
    held_out: str | None = None
    generate: bool = False


@dataclass(frozen=True, slots=True)
class Reports:
    """Functions that receive the progress of a sweep."""

    done: Callable[[int, int], None]
    """Receives the number of shards that are done, and of all shards."""
    note: Callable[[str], None]
    """Receives one line about a wait, or about an error that was recovered from."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """Result of a sweep."""

    out: str
    shards: int
    """Number of shards that this command computed."""
    cases: int
    before: int
    """Number of shards that earlier commands computed."""
    deaths: int
    """Number of workers that died and were replaced."""


def sweep(
    options: EditOptions, grid: Grid, side: Side, out: str, reports: Reports, ray: RayOptions | None = None
) -> SweepReport:
    """Compute the shards of the grid that are not committed in `out`, in this process or with `ray` on a cluster.

    Raises BacklensError, before anything is computed, if `out` belongs to another sweep, and Interrupted if workers die
    again and again; the same call then continues.
    """
    refuse_missing(options, grid.methods)
    directory = Directory.at(out)
    with DriverLock(directory) as lock:
        given = {**asdict(options), **asdict(grid), **asdict(side)}
        options = options.with_demo_defaults()
        assert options.edits is not None
        requests = read_requests(options.edits, options.format, options.limit)
        for line in subject_notes(requests):
            reports.note(line)
        source = model_source(options)
        proof = prove(source)
        bystanders = Bystanders.read(side.untouched, side.held_out)
        work = grid.shards(requests)
        kept = recorded(given, directory)
        opened = open_run(
            directory,
            _fingerprint(options, proof, grid, side, requests, bystanders),
            config=kept,
            config_yaml=yaml.safe_dump(plain(kept), sort_keys=False),
            plan=ShardPlan(sum(len(group) for each in work for group in each.groups), len(work), 0),
            model={
                "name": demo.NAME if given["model"] is None else published_name(given["model"]),
                "layers": int(load_config(source).num_hidden_layers),
            },
            versions=package_versions(),
        )
        remember(opened.record, given)
        directory.remove_leftovers()
        commits = committed(directory)
        others = made_with_others([commit.versions for commit in commits.values()])
        if others is not None:
            reports.note(others)
        done = set(commits)
        left = [each for each in work if each.index not in done]
        reports.done(len(done), len(work))
        cases = deaths = 0
        if left:
            job = SweepSetup(
                pinned(source, proof), _absolute(options), grid, bystanders, side.generate, directory
            )
            with executing(ray, reports.note) as executor:
                executor.start(job)
                for number, commit in enumerate(executor.run(iter(left)), start=1):
                    cases, deaths = cases + commit.prompts, executor.counts().deaths
                    reports.done(len(done) + number, len(work))
                    lock.confirm()
            directory.remove_leftovers()  # files of workers that died
            if len(committed(directory)) < len(work):
                raise Interrupted(f"out: {directory} lacks shards; run the same command again")
        finish(opened)
        return SweepReport(str(directory), len(left), cases, len(done), deaths)


def _absolute(options: EditOptions) -> EditOptions:
    """The options with absolute paths, because a worker may have another working directory."""
    paths = {name: getattr(options, name) for name in ("text", "statistics", "editor")}
    found = {
        name: str(Path(path).absolute())
        for name, path in paths.items()
        if path is not None and "://" not in path
    }
    return replace(options, **found)


def _fingerprint(
    options: EditOptions,
    proof: Proof,
    grid: Grid,
    side: Side,
    requests: Sequence[Request],
    bystanders: Bystanders,
) -> dict[str, FingerprintValue]:
    beyond = bystanders.digest()
    return {
        "model": f"weights {proof.weights[:16]}",
        "edits": f"content {_content_digest(requests)[:16]}",
        **{name: " ".join(map(str, values)) for name, values in asdict(grid).items()},
        **_option_values(options),
        "editor": None if options.editor is None else _file_digest(options.editor),
        "text": None if options.text is None else Source(options.text).name,
        "untouched and held-out": None if beyond is None else f"content {beyond[:16]}",
        "generate": side.generate,
    }


def _content_digest(requests: Sequence[Request]) -> str:
    """SHA-256 of the requests' content; it does not depend on the file."""
    said = [[v for k, v in asdict(r).items() if k != "where"] for r in requests]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _file_digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return f"content {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise BacklensError(f"{path}: cannot be read: {error.strerror}; check --editor") from error


def _option_values(options: EditOptions) -> dict[str, FingerprintValue]:
    """The options that change results, by flag."""
    own = (
        *("model", "revision", "edits", "format", "limit", "statistics", "text", "trust_remote_code"),
        "editor",
    )
    return {f.name.replace("_", "-"): getattr(options, f.name) for f in fields(options) if f.name not in own}
