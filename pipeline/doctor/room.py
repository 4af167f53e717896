"""How much memory there is for another copy of a model."""

import gc
import os
from pathlib import Path

import torch

from pipeline.engine.memory import release_freed_memory


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; in a container, what its limit leaves.

    Where the system does not say how much is free, half of what it has.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    stated = [free for free in (_of_the_system(), _of_the_container()) if free is not None]
    return min(stated, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _of_the_system() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_the_container() -> int | None:
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if not limit or not used or not limit[0].isdecimal():
        return None
    return max(0, int(limit[0]) - int(used[0]))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("ascii").splitlines()
    except OSError:
        return []


def give_back_memory() -> None:
    """After a model was dropped: its modules refer to each other, and only a collection frees them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_freed_memory()
