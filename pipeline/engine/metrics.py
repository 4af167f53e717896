"""A run's Ray metrics, which every node of a cluster exports for Prometheus.

They are counted in the driver, from its events: commits bring what the workers measured, so each shard is counted
once, and a worker that dies takes no counts with it. Metrics of a driver are exported by the node it is on.

    ray_backlens_prompts_total, _tokens_total, _failures_total, _retries_total, _worker_deaths_total     counters
    ray_backlens_replicas_alive, _shards_left                                                           gauges
    ray_backlens_shard_seconds, by stage                                                                histogram

All have the label `run`, the run directory.
"""

import logging
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
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
            "backlens_shard_seconds", "Worker seconds of a shard", SECONDS, ("run", "stage")
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
