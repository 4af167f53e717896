"""What a worker writes down before it computes what may have killed another: the prompts that are in flight.

One small file beside the shard's record, on the storage that outlives worker and node; gone when the shard is done,
or when the run is, if the driver was killed in between.

What is tried next of a shard whose worker died over it.

Once in a while a worker dies for reasons of its own, so a shard is first just given out again, but to a worker that
has no other: from then on it is known whose fault a death is. Such a worker notes which prompts it is about to
compute (`notes.py`). Those in flight at a death are computed one at a time in the next attempt; one that was alone in
flight at the last of ATTEMPTS deaths, and in flight at the one before, is recorded as a failure and left out.

A worker that went with its node says nothing about prompts: that attempt is made again as it was. A worker killed by
somebody, alone, looks like one that a prompt killed; it takes four such kills at one shard, the last two in the same
prompt, to blame an innocent one.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from backlens.engine.executors.base import Attempt, S
from backlens.printable import json_text
from backlens.store.commit import COMMITS
from backlens.store.directory import Directory

SUFFIX = ".attempt"


def note(directory: Directory, shard: int, prompt_ids: Sequence[int]) -> None:
    """Say that these prompts are computed next."""
    directory.write_atomically(_name(shard), json_text({"in_flight": list(prompt_ids)}).encode())


def noted(directory: Directory, shard: int) -> tuple[int, ...]:
    """The prompts of the shard's last note; none if there is no note."""
    try:
        return tuple(json.loads(directory.read(_name(shard)))["in_flight"])
    except FileNotFoundError:
        return ()


def forget(directory: Directory, shard: int) -> None:
    directory.remove(_name(shard))


def forget_all(directory: Directory) -> None:
    for name in directory.names(COMMITS):
        if name.endswith(SUFFIX):
            directory.remove(f"{COMMITS}/{name}")


def _name(shard: int) -> str:
    return f"{COMMITS}/{shard:06d}{SUFFIX}"


ATTEMPTS = 4
"""How many deaths a shard is tried through before a prompt is blamed or the run stops."""
NODES = 8
"""How many nodes may be lost under a shard before the run stops: a prompt might take down whole machines."""


def next_attempt(lost: Attempt[S], in_flight: tuple[int, ...], node_lost: bool) -> Attempt[S] | None:
    """The attempt after one that was lost while prompts `in_flight` were computed; None if there should be none."""
    if node_lost:
        return replace(lost, nodes=lost.nodes + 1) if lost.nodes < NODES else None
    if lost.number < ATTEMPTS:
        return replace(lost, number=lost.number + 1, suspects=in_flight)
    if len(in_flight) == 1 and in_flight[0] in lost.suspects:
        return Attempt(lost.shard, number=2, condemned=lost.condemned | set(in_flight))
    return None
