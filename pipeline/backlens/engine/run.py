"""The driver of a run: it plans, gives shards to an executor, and closes the run. It holds no weights and no rows."""

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from backlens import demo
from backlens.config import ResolvedConfig, RunConfig
from backlens.engine.events import emit, emit_shard, stage_seconds
from backlens.engine.executors import executing
from backlens.engine.executors.base import RayOptions, ReplicaCounts, forget_all
from backlens.engine.plan import RunPlan, fingerprint, is_pipe, make_plan
from backlens.engine.worker import FAILED, FIRST_DONE, SUBJECTS_ABSENT, SUBJECTS_REPEATED
from backlens.errors import BacklensError, Interrupted
from backlens.models.checkpoint import Proof
from backlens.models.load import load_tokenizer, prove
from backlens.models.vocabulary import vocabulary
from backlens.prompts.prompt import shards, subject_lines
from backlens.prompts.read import read_prompts
from backlens.store.commit import ShardCommit, committed, write_vocab
from backlens.store.directory import Directory
from backlens.store.input_paths import published_name, recorded, remember
from backlens.store.lock import DriverLock
from backlens.store.run_record import (
    RunDirectory,
    count_rows,
    finish,
    made_with_others,
    open_run,
    package_versions,
)
from backlens.store.status import losses


class RunProgress(Protocol):
    """Shows what happens in a run, in order."""

    def planned(self, plan: RunPlan, already_done: int) -> None: ...

    def started(self, workers: int, devices: str, seconds: float) -> None: ...

    def committed(self, commit: ShardCommit, counts: ReplicaCounts) -> None: ...

    def note(self, text: str) -> None: ...


class NoProgress:
    """Shows nothing: the events of the run are enough."""

    def planned(self, plan: RunPlan, already_done: int) -> None: ...

    def started(self, workers: int, devices: str, seconds: float) -> None: ...

    def committed(self, commit: ShardCommit, counts: ReplicaCounts) -> None: ...

    def note(self, text: str) -> None:
        emit("note", text=text)


@dataclass(frozen=True)
class Report:
    """The result of a run: prompts, rows, and where the time went."""

    out: str
    prompts: int
    """Prompts that this command processed, failures included."""
    resumed_prompts: int
    """Prompts that earlier commands processed."""
    rows: Mapping[str, int]
    """Rows per table, those of earlier commands included."""
    seconds: float
    seconds_to_start: float
    """Seconds to plan and to load the models."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage, summed over workers."""
    shards: int = 0
    """Shards that this command committed."""
    out_of_memory: int = 0
    """Batches that did not fit and were divided."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Prompts in `failures` by kind, those of earlier commands included."""
    first_done: int = 0
    """The lowest prompt_id that has rows; 0 if none has."""
    subjects_absent: int = 0
    """Prompts that do not contain their subject, those of earlier commands included."""
    subjects_repeated: int = 0
    """Prompts that contain their subject several times, those of earlier commands included."""
    positions: str = "all"
    """The option --positions."""
    replicas: ReplicaCounts = field(default_factory=ReplicaCounts)
    """Replicas at the end, deaths and retries."""

    @property
    def prompts_per_second(self) -> float:
        return self.prompts / max(self.seconds - self.seconds_to_start, 1e-9)


def run(given: RunConfig, progress: RunProgress) -> Report:
    """Run the prompts of `given`, or those that are left.

    Raises BacklensError before anything is computed if an option or an input is wrong, and Interrupted if the run stops
    halfway; the same call then goes on.
    """
    started = time.perf_counter()
    resolved = given.with_demo_defaults()
    directory = Directory.at(resolved.out)
    # The record holds no path of a default: that path belongs to this machine.
    kept = replace(given, **recorded(asdict(given) | {"out": "."}, directory))
    with DriverLock(directory) as lock, _prompts_kept(resolved) as config:
        plan = make_plan(config)
        proof = prove(plan.source)
        opened = open_run(
            directory,
            fingerprint(plan, proof),
            config=asdict(kept),
            config_yaml=kept.to_yaml(),
            plan=plan.shards,
            model=plan.model_facts | {"name": model_name(given), "weight_hash": proof.weights},
            versions=package_versions(),
        )
        remember(opened.record, asdict(given))
        directory.remove_leftovers()
        write_vocab(directory, *vocabulary(load_tokenizer(plan.source), plan.rows), plan.token_ids)
        done = committed(directory)
        for loss in losses(directory, done.values()):
            progress.note(str(loss))
            break
        resumed = sum(commit.prompts for commit in done.values())
        progress.planned(plan, resumed)
        emit(
            "planned",
            prompts=plan.shards.prompts,
            shards=plan.shards.shards,
            prompts_done=resumed,
            shards_done=len(done),
        )
        if config.positions == "subject+last":
            for line in subject_lines(plan.survey.subjects_absent, 0, config.positions):
                progress.note(line)
        others = made_with_others([commit.versions for commit in done.values()])
        if others is not None:
            progress.note(others)
        for remark in plan.remarks:
            progress.note(remark)
        tally = _run_shards(plan, proof, opened, set(done), lock, progress, started)
        directory.remove_leftovers()  # those of dead workers
        forget_all(directory)  # those of killed drivers
        finished = finish(opened) if opened.record.status != "done" else opened
        commits = list(committed(finished.directory).values())
        report = Report(
            out=str(directory),
            prompts=tally.prompts,
            resumed_prompts=resumed,
            rows=count_rows(commits),
            seconds=time.perf_counter() - started,
            seconds_to_start=tally.seconds_to_start,
            stages=tally.stages,
            shards=tally.shards,
            out_of_memory=tally.out_of_memory,
            failures=_failures(commits),
            first_done=int(min((c.stats[FIRST_DONE] for c in commits if FIRST_DONE in c.stats), default=0)),
            subjects_absent=_total(commits, SUBJECTS_ABSENT),
            subjects_repeated=_total(commits, SUBJECTS_REPEATED),
            positions=config.positions,
            replicas=tally.replicas,
        )
        emit(
            "finished",
            prompts=report.prompts,
            prompts_resumed=resumed,
            rows=report.rows,
            seconds=report.seconds,
            seconds_to_start=report.seconds_to_start,
            stages=dict(report.stages),
            deaths=report.replicas.deaths,
        )
        return report


@contextmanager
def _prompts_kept(config: ResolvedConfig) -> Iterator[ResolvedConfig]:
    """Copy prompts that come through a pipe to a temporary file: a run reads them to plan, and again to compute."""
    if not is_pipe(config.prompts):
        yield config
        return
    pipe = Path(config.prompts)
    if config.format == "auto" and not pipe.suffix:
        raise BacklensError(
            f"--prompts {pipe}: a pipe has no name to tell the format; add e.g. --format jsonl"
        )
    with tempfile.TemporaryDirectory(prefix="backlens-") as folder:
        copy = Path(folder, pipe.name)
        try:
            with pipe.open("rb") as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            raise BacklensError(
                f"--prompts {pipe}: cannot be copied to {folder}: {error.strerror}"
            ) from error
        yield replace(config, prompts=str(copy))


def _total(commits: Sequence[ShardCommit], name: str) -> int:
    return sum(int(commit.stats.get(name, 0)) for commit in commits)


def model_name(given: RunConfig) -> str:
    """Return the name of the model for the run's card and pages."""
    return demo.NAME if given.model is None else published_name(given.model)


def _failures(commits: Sequence[ShardCommit]) -> dict[str, int]:
    """Return the number of failed prompts by kind, which the workers counted."""
    counts: Counter[str] = Counter()
    for commit in commits:
        for name, value in commit.stats.items():
            if name.startswith(FAILED):
                counts[name.removeprefix(FAILED)] += int(value)
    return dict(counts.most_common())


@dataclass
class _Tally:
    """Sums over the shards that this command committed."""

    prompts: int = 0
    seconds_to_start: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    out_of_memory: int = 0
    replicas: ReplicaCounts = field(default_factory=ReplicaCounts)

    def add(self, commit: ShardCommit) -> None:
        self.prompts += commit.prompts
        self.shards += 1
        self.out_of_memory += int(commit.stats.get("out_of_memory", 0))
        self.stages.update(stage_seconds(commit.stats))


def _run_shards(
    plan: RunPlan,
    proof: Proof,
    opened: RunDirectory,
    done: set[int],
    lock: DriverLock,
    progress: RunProgress,
    started: float,
) -> _Tally:
    tally = _Tally()
    if len(done) == plan.shards.shards:
        tally.seconds_to_start = time.perf_counter() - started
        return tally
    config = plan.config
    records = read_prompts(config.prompts, config.format, config.prompt_fields, config.limit)
    left = (s for s in shards(records, opened.record.plan.shard_prompts) if s.index not in done)
    with executing(_ray_options(config), progress.note) as executor:
        workers = executor.start(plan.setup(opened.directory, proof))
        tally.seconds_to_start = time.perf_counter() - started
        devices = ", ".join(sorted({worker.device for worker in workers}))
        progress.started(len(workers), devices, tally.seconds_to_start)
        shards_left = plan.shards.shards - len(done)
        emit(
            "started",
            replicas=len(workers),
            devices=devices,
            seconds=tally.seconds_to_start,
            shards_left=shards_left,
        )
        for commit in executor.run(left):
            tally.add(commit)
            tally.replicas = executor.counts()
            progress.committed(commit, tally.replicas)
            shards_left -= 1
            emit_shard(commit, shards_left)
            lock.confirm()
    missing = plan.shards.shards - len(committed(opened.directory))
    if missing:
        raise Interrupted(
            f"out: {opened.directory} lacks {missing} shards; did the prompts change during the run?"
        )
    return tally


def _ray_options(config: RunConfig) -> RayOptions | None:
    """Return the request to Ray; None for the local executor."""
    if config.executor == "local":
        return None
    return RayOptions(config.address, config.replicas, config.gpus_per_replica, config.placement_timeout)
