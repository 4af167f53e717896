"""What happens in a run, one event at a time, through the standard `logging` module.

An event is a record of the logger `backlens`: its message is the event's name, its fields are in `record.fields`.
Who wants to know attaches a handler: the command line writes JSON lines, `metrics` counts. Without one nothing is
written.

    planned      prompts, shards, shards_done, prompts_done
    started      replicas, devices, seconds, shards_left
    shard        shard, prompts, failed, tokens, bytes, seconds (by stage), shards_left
    failures     shard, failed (a warning)
    replicas     alive, when one more is at work, or one less
    worker-died  error (a warning)
    note         text, e.g. what is waited for
    retry        shard, attempt, of a shard that was lost with its worker (a warning)
    finished     prompts, prompts_resumed, rows (by table), seconds, seconds_to_start, stages (seconds), deaths

A run's Ray metrics, which every node of a cluster exports for Prometheus.

They are counted in the driver, from its events: commits bring what the workers measured, so each shard is counted
once, and a worker that dies takes no counts with it. Metrics of a driver are exported by the node it is on.

    ray_backlens_prompts_total, _tokens_total, _failures_total, _retries_total, _worker_deaths_total     counters
    ray_backlens_replicas_alive, _shards_left                                                           gauges
    ray_backlens_shard_seconds, by stage                                                                histogram

All have the label `run`, the run directory.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:  # the command line imports this module whatever it is asked, and Arrow takes its time
    from backlens.store.commit import ShardCommit

SECONDS = "seconds_"
"""Begins the name of a stage's time in a commit's stats."""

LOGGER = logging.getLogger("backlens")
LOGGER.addHandler(logging.NullHandler())
LOGGER.setLevel(logging.INFO)


def emit(event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Tell whoever listens; fields are what JSON can hold."""
    LOGGER.log(level, event, extra={"fields": fields})


def emit_shard(commit: "ShardCommit", shards_left: int) -> None:
    """A shard's commit came in."""
    failed = commit.rows.get("failures", 0)
    emit(
        "shard",
        shard=commit.shard,
        prompts=commit.prompts,
        failed=failed,
        tokens=round(commit.stats.get("tokens", 0)),
        bytes=sum(file.bytes for file in commit.files.values()),
        seconds=stage_seconds(commit.stats),
        shards_left=shards_left,
    )
    if failed:
        emit("failures", level=logging.WARNING, shard=commit.shard, failed=failed)


def stage_seconds(stats: Mapping[str, float]) -> dict[str, float]:
    """The seconds of a shard's stages, out of what its worker measured."""
    return {name.removeprefix(SECONDS): value for name, value in stats.items() if name.startswith(SECONDS)}


BUCKETS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
"""Upper bounds of the histogram's buckets."""


class RayMetrics(logging.Handler):
    """Counts the events of one run."""

    def __init__(self, run: str) -> None:
        super().__init__()
        tags = {"run": run}
        count = {
            "prompts": "Prompts of committed shards, failed ones included",
            "tokens": "Tokens of committed shards",
            "failures": "Prompts that could not be processed",
            "retries": "Shards given out again after their worker died",
            "worker_deaths": "Workers that died and were replaced",
        }
        self._counters = {
            name: Counter(f"backlens_{name}", text, tuple(tags)).set_default_tags(tags)
            for name, text in count.items()
        }
        self._replicas = Gauge("backlens_replicas_alive", "Copies of the model at work", tuple(tags))
        self._left = Gauge("backlens_shards_left", "Shards without a commit", tuple(tags))
        self._seconds = Histogram(
            "backlens_shard_seconds", "Worker seconds of a shard", BUCKETS, ("run", "stage")
        )
        for metric in (self._replicas, self._left, self._seconds):
            metric.set_default_tags(tags)

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = getattr(record, "fields", {})
        match record.getMessage():
            case "started":
                self._left.set(fields["shards_left"])
                self._replicas.set(fields["replicas"])
            case "replicas":
                self._replicas.set(fields["alive"])
            case "shard":
                self._count(prompts=fields["prompts"], tokens=fields["tokens"], failures=fields["failed"])
                self._left.set(fields["shards_left"])
                for stage, seconds in fields["seconds"].items():
                    self._seconds.observe(seconds, {"stage": stage})
            case "worker-died":
                self._count(worker_deaths=1)
            case "retry":
                self._count(retries=1)

    def _count(self, **increments: int) -> None:
        for name, value in increments.items():
            if value:
                self._counters[name].inc(value)
