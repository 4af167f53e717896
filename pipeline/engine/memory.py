"""Giving freed memory back to the system."""

import ctypes


def release_freed_memory() -> None:
    """Return what a batch freed.

    glibc keeps freed blocks for later allocations, and between batches of different shapes they fit ever worse:
    without this, a run of 2,000 prompts peaked at 2.5 times the memory of one of 200. Other C libraries have no
    such call and need none.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
