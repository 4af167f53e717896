"""What a worker writes down before it computes what may have killed another: the prompts that are in flight.

One small file beside the shard's record, on the storage that outlives worker and node; gone when the shard is done,
or when the run is, if the driver was killed in between.
"""

import json
from collections.abc import Sequence

from pipeline.plain import json_text
from pipeline.store.commit import COMMITS
from pipeline.store.files import Directory

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
