"""What is tried next of a shard whose worker died over it.

Once in a while a worker dies for reasons of its own, so a shard is first just given out again, but to a worker that
has no other: from then on it is known whose fault a death is. Such a worker notes which prompts it is about to
compute (`notes.py`). Those in flight at a death are computed one at a time in the next attempt; one that was alone in
flight at the last of ATTEMPTS deaths, and in flight at the one before, is recorded as a failure and left out.
"""

from dataclasses import replace

from pipeline.engine.work import Attempt, S

ATTEMPTS = 4
"""How many deaths a shard is tried through before a prompt is blamed or the run stops."""


def next_attempt(lost: Attempt[S], in_flight: tuple[int, ...]) -> Attempt[S] | None:
    """The attempt after one that was lost while prompts `in_flight` were computed; None if there should be none."""
    if lost.number < ATTEMPTS:
        return replace(lost, number=lost.number + 1, suspects=in_flight)
    if len(in_flight) == 1 and in_flight[0] in lost.suspects:
        return Attempt(lost.shard, number=2, condemned=lost.condemned | set(in_flight))
    return None
