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
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this module whatever it is asked, and Arrow takes its time
    from pipeline.store.commit import ShardCommit

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
