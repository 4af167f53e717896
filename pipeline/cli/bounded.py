"""A bound on this process's memory while it runs a query that anyone may have written.

DuckDB's own limit does not count everything (`len(range(600000000))` takes 5 GB whatever it is), so the operating
system is asked to refuse more: DuckDB then says that memory is short, as it does at its own limit.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import BacklensError

BESIDE = 1 << 30
"""Bytes of address space that are left for what is not data: threads, libraries, the answer."""
UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


@contextmanager
def bounded_memory(size: str) -> Iterator[None]:
    """May take so much more than now, as `4GB` says it. Only Linux keeps such a bound."""
    most = bytes_of(size)
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    bound = pages * resource.getpagesize() + most + BESIDE
    lowest = min(limit for limit in (bound, *before) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def bytes_of(size: str) -> int:
    """`4GB` and `1.5 GiB` as DuckDB takes them."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])(i?)B\s*", size, re.IGNORECASE | re.ASCII)
    if found is None:
        raise BacklensError(f"--memory {size}: write it as 2GB")
    number, unit, is_binary = found.groups()
    return int(float(number) * (1024 if is_binary else 1000) ** UNITS[unit.upper()])
