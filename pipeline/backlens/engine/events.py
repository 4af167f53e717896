"""The events of a run, through the standard `logging` module.

An event is a record of the logger `backlens`: its message is the event's name, its fields are in `record.fields`.
A handler on that logger receives the events: the command line writes JSON lines, the Ray executor counts. Without a
handler nothing is written.

    planned      prompts, shards, shards_done, prompts_done
    started      replicas, devices, seconds, shards_left
    shard        shard, prompts, failed, tokens, bytes, seconds (by stage), shards_left
    failures     shard, failed (a warning)
    replicas     alive, when a replica becomes ready or dies
    worker-died  error (a warning)
    note         text, e.g. what the run waits for
    retry        shard, attempt: a shard was lost with its worker and is given out again (a warning)
    finished     prompts, prompts_resumed, rows (by table), seconds, seconds_to_start, stages (seconds), deaths
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every command imports this module, and Arrow is slow to import
    from backlens.store.commit import ShardCommit

SECONDS = "seconds_"
"""Prefix of a stage's time in the stats of a commit."""

LOGGER = logging.getLogger("backlens")
LOGGER.addHandler(logging.NullHandler())
LOGGER.setLevel(logging.INFO)


def emit(event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Send an event to the handlers; JSON must be able to hold the fields."""
    LOGGER.log(level, event, extra={"fields": fields})


def emit_shard(commit: "ShardCommit", shards_left: int) -> None:
    """Send the event of a shard that was committed."""
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
    """Return the seconds of a shard by stage, from the stats of its commit."""
    return {name.removeprefix(SECONDS): value for name, value in stats.items() if name.startswith(SECONDS)}
