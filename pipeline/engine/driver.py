"""The driver: plans, hands shards to an executor, and closes the run. It holds no weights and no rows."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from pipeline import demo
from pipeline.config import RunConfig
from pipeline.engine.events import emit, emit_shard, stage_seconds
from pipeline.engine.executors import RayOptions, Standing, executing
from pipeline.engine.notes import forget_all
from pipeline.engine.plan import RunPlan, fingerprint, make_plan
from pipeline.engine.versions import made_with_others, package_versions
from pipeline.engine.worker import FAILED, FIRST_DONE, SUBJECTS_ABSENT, SUBJECTS_REPEATED
from pipeline.errors import Interrupted
from pipeline.models.checkpoint import Proof
from pipeline.models.load import load_tokenizer, prove
from pipeline.models.vocabulary import vocabulary
from pipeline.prompts.read import read_prompts
from pipeline.prompts.shards import shards
from pipeline.prompts.subject import subject_lines
from pipeline.store.card import count_rows
from pipeline.store.commit import ShardCommit, committed
from pipeline.store.files import Directory
from pipeline.store.lock import DriverLock
from pipeline.store.places import published_name, recorded, remember
from pipeline.store.rundir import RunDirectory, finish, open_run
from pipeline.store.verify import losses
from pipeline.store.vocab import write_vocab


class Progress(Protocol):
    """Told what happens, in order, to show it."""

    def planned(self, plan: RunPlan, already_done: int) -> None: ...

    def started(self, workers: int, devices: str, seconds: float) -> None: ...

    def committed(self, commit: ShardCommit, standing: Standing) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Report:
    """What a run did, and where its time went."""

    out: str
    prompts: int
    """Prompts processed by this command, failures included."""
    resumed_prompts: int
    """Prompts that an earlier command had done."""
    rows: Mapping[str, int]
    """Rows of each table, earlier commands' included."""
    seconds: float
    seconds_to_start: float
    """Planning, and loading the models."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Worker seconds by stage, summed over workers."""
    shards: int = 0
    """Shards committed by this command."""
    out_of_memory: int = 0
    """Batches that did not fit and were computed in smaller ones."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Prompts in `failures` by kind, earlier commands' included."""
    first_done: int = 0
    """The lowest prompt_id that has rows, if any has."""
    subjects_absent: int = 0
    """Prompts that do not name their subject; earlier commands' included, as in the next."""
    subjects_repeated: int = 0
    """Prompts that name their subject several times."""
    positions: str = "all"
    """Which positions have rows in `tokens`."""
    standing: Standing = field(default_factory=Standing)
    """Replicas at the end, and what became of others."""

    @property
    def prompts_per_second(self) -> float:
        return self.prompts / max(self.seconds - self.seconds_to_start, 1e-9)


def run(config: RunConfig, progress: Progress) -> Report:
    """Run what `config` says, or what is left of it.

    Raises BacklensError before anything is computed for what the user can mend, Interrupted when the run stopped
    halfway; the same call then goes on.
    """
    started = time.perf_counter()
    given, config = config, config.with_demo_defaults()
    assert config.out is not None
    directory = Directory.at(config.out)
    # As given: a default is found again wherever the package is, its path is this machine's.
    kept = replace(given, **recorded(asdict(given) | {"out": "."}, directory))
    with DriverLock(directory) as lock:
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
        if config.positions == "subject+last":
            for line in subject_lines(plan.survey.subjects_absent, 0, config.positions):
                progress.note(line)
        others = made_with_others([commit.versions for commit in done.values()])
        if others is not None:
            progress.note(others)
        for remark in plan.remarks:
            progress.note(remark)
        emit(
            "planned",
            prompts=plan.shards.prompts,
            shards=plan.shards.shards,
            prompts_done=resumed,
            shards_done=len(done),
        )
        work = _run_shards(plan, proof, opened, set(done), lock, progress, started)
        directory.remove_leftovers()  # of workers that died and were replaced
        forget_all(directory)  # of drivers that were killed
        finished = finish(opened) if opened.record.status != "done" else opened
        commits = list(committed(finished.directory).values())
        report = Report(
            out=str(directory),
            prompts=work.prompts,
            resumed_prompts=resumed,
            rows=count_rows(commits),
            seconds=time.perf_counter() - started,
            seconds_to_start=work.seconds_to_start,
            stages=work.stages,
            shards=work.shards,
            out_of_memory=work.out_of_memory,
            failures=_failures(commits),
            first_done=int(min((c.stats[FIRST_DONE] for c in commits if FIRST_DONE in c.stats), default=0)),
            subjects_absent=_counted(commits, SUBJECTS_ABSENT),
            subjects_repeated=_counted(commits, SUBJECTS_REPEATED),
            positions=config.positions,
            standing=work.standing,
        )
        emit(
            "finished",
            prompts=report.prompts,
            prompts_resumed=resumed,
            rows=report.rows,
            seconds=report.seconds,
            seconds_to_start=report.seconds_to_start,
            stages=dict(report.stages),
            deaths=report.standing.deaths,
        )
        return report


def _counted(commits: Sequence[ShardCommit], name: str) -> int:
    return sum(int(commit.stats.get(name, 0)) for commit in commits)


def model_name(given: RunConfig) -> str:
    """The model as the run's card and pages call it."""
    return demo.NAME if given.model is None else published_name(given.model)


def _failures(commits: Sequence[ShardCommit]) -> dict[str, int]:
    """Failed prompts by kind, as the workers counted them."""
    counts: Counter[str] = Counter()
    for commit in commits:
        for name, value in commit.stats.items():
            if name.startswith(FAILED):
                counts[name.removeprefix(FAILED)] += int(value)
    return dict(counts.most_common())


@dataclass
class _Work:
    """What this command added up while shards came in."""

    prompts: int = 0
    seconds_to_start: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    out_of_memory: int = 0
    standing: Standing = field(default_factory=Standing)

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
    progress: Progress,
    started: float,
) -> _Work:
    work = _Work()
    if len(done) == plan.shards.shards:
        work.seconds_to_start = time.perf_counter() - started
        return work
    config = plan.config
    assert config.prompts is not None
    records = read_prompts(config.prompts, config.format, config.prompt_fields, config.limit)
    left = (s for s in shards(records, opened.record.plan.shard_prompts) if s.index not in done)
    with executing(_ray_options(config), progress.note) as executor:
        workers = executor.start(plan.job(opened.directory, proof))
        work.seconds_to_start = time.perf_counter() - started
        devices = ", ".join(sorted({worker.device for worker in workers}))
        progress.started(len(workers), devices, work.seconds_to_start)
        shards_left = plan.shards.shards - len(done)
        emit(
            "started",
            replicas=len(workers),
            devices=devices,
            seconds=work.seconds_to_start,
            shards_left=shards_left,
        )
        for commit in executor.run(left):
            work.add(commit)
            work.standing = executor.standing()
            progress.committed(commit, work.standing)
            shards_left -= 1
            emit_shard(commit, shards_left)
            lock.confirm()
    missing = plan.shards.shards - len(committed(opened.directory))
    if missing:
        raise Interrupted(
            f"out: {opened.directory} lacks {missing} shards; did the prompts change during the run?"
        )
    return work


def _ray_options(config: RunConfig) -> RayOptions | None:
    """None for the local executor."""
    if config.executor == "local":
        return None
    return RayOptions(config.address, config.replicas, config.gpus_per_replica, config.placement_timeout)
