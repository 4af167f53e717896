"""The metrics of a run at the endpoint of a real Ray node, where Prometheus reads them."""

import logging
import re
import urllib.request
from pathlib import Path

import pytest
import ray

from backlens.engine.events import LOGGER, emit
from backlens.engine.executors.ray import RayMetrics
from tests.engine.command import wait_for

NAME = re.compile(r"^ray_backlens_(\w+?)\{(.*)\} (\S+)$", re.MULTILINE)


def scraped(port: int, run: str) -> dict[str, float]:
    """Values by metric and, of the histogram, by stage."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in NAME.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("run") == run and "le" not in tags:
            found[f"{name} {tags.get('stage', '')}".strip()] = float(value)
    return found


@pytest.mark.slow
def test_a_runs_events_arrive_at_the_nodes_endpoint(cluster: tuple[str, int], tmp_path: Path) -> None:
    run = str(tmp_path)
    ray.init(address=cluster[0], logging_level=logging.ERROR, log_to_driver=False)
    try:
        metrics = RayMetrics(run)
        LOGGER.addHandler(metrics)
        emit("started", replicas=2, devices="cpu", seconds=1.0, shards_left=5)
        shard = {"shard": 0, "prompts": 10, "failed": 1, "tokens": 120, "bytes": 1, "seconds": {"lens": 2.0}}
        emit("shard", **shard, shards_left=4)
        emit("shard", **shard, shards_left=3)
        emit("worker-died", replica=0, error="killed")
        emit("replicas", alive=1)
        emit("retry", shard=2, attempt=2)
        emit("retry", shard=3, attempt=2)
        LOGGER.removeHandler(metrics)
        (node,) = ray.nodes()
        port = node["MetricsExportPort"]
        wait_for(lambda: "retries_total" in scraped(port, run), timeout=40, every=0.5)
        found = scraped(port, run)
    finally:
        ray.shutdown()
    assert found == {
        "prompts_total": 20,
        "tokens_total": 240,
        "failures_total": 2,
        "retries_total": 2,
        "worker_deaths_total": 1,
        "replicas_alive": 1,
        "shards_left": 3,
        "shard_seconds_count lens": 2,
        "shard_seconds_sum lens": 4.0,
    }
