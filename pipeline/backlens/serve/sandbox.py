"""A visitor's SELECT in a process of its own, within limits of the operating system.

DuckDB's own limits are not enough for a server: its memory limit does not count the vectors of a query
(`len(range(200000000))` takes 5 GB under a limit of 256 MB), and a single function cannot be interrupted (it runs for
35 s). So the process has limits on memory and time, cannot write to any file, and is killed when it is late.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from backlens.atlas import Atlas
from backlens.atlas.database import connection
from backlens.atlas.untrusted_sql import checked_query, text_columns
from backlens.errors import BacklensError
from backlens.printable import json_text, plain

SECONDS = 5.0
START = 10.0
"""Seconds for the process to start, in addition to the query's own."""
MEMORY = 2 << 30
"""Bytes of address space; an idle process takes about half of them."""
MOST_BYTES = 4 << 20
"""Bytes that an answer may have."""
MOST_ROWS = 1000
BATCH = 50


@dataclass(frozen=True, slots=True)
class SandboxReply:
    """The rows of a SELECT."""

    columns: list[str]
    rows: list[list[Any]]
    is_cut: bool
    """True if there are more rows."""


def ask_sandbox(out: str, statement: str, limit: int, seconds: float = SECONDS) -> SandboxReply:
    """The rows of one SELECT over the run `out`. Raises BacklensError if it is refused or exceeds a limit."""
    question = json_text({"out": out, "statement": statement, "limit": limit, "seconds": seconds})
    command = [sys.executable, "-P", "-m", "backlens.serve.sandbox"]
    try:
        ran = subprocess.run(command, input=question.encode(), capture_output=True, timeout=START + seconds)
    except subprocess.TimeoutExpired:
        raise BacklensError(f"sql: stopped after {seconds:g} s; narrow it, by layer for example") from None
    if ran.returncode:
        raise BacklensError("sql: the query exceeds its limit of memory or time; narrow it")
    said = json.loads(ran.stdout)
    if "refused" in said:
        raise BacklensError(said["refused"])
    return SandboxReply(**said)


def _limit_process() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = int(START + SECONDS) * (os.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def answer(out: str, statement: str, limit: int, seconds: float) -> dict[str, Any]:
    """The fields of a `SandboxReply`, computed in this process."""
    with connection(Atlas(out).snapshot.database(), seconds) as opened:
        query = checked_query(opened, statement)
        columns = text_columns(opened.sql(f"FROM ({query})"))
        found = opened.execute(f"SELECT {columns} FROM ({query}) LIMIT {limit + 1}")
        names = [name for name, *_ in found.description or ()]
        rows: list[Any] = []
        size = 0
        while len(rows) <= limit and size < MOST_BYTES and (batch := plain(found.fetchmany(BATCH))):
            rows += batch
            size += len(json_text(batch))
        is_cut = len(rows) > limit or size >= MOST_BYTES
        return {"columns": names, "rows": rows[:limit], "is_cut": is_cut}


def main() -> None:
    """Read a question from standard input and write its answer to standard output."""
    _limit_process()
    question = json.load(sys.stdin)
    try:
        said = answer(**question)
    except BacklensError as error:
        said = {"refused": str(error)}
    except MemoryError:
        said = {"refused": "sql: the query exceeds its limit of memory; narrow it"}
    sys.stdout.write(json_text(said, ascii_only=True))


if __name__ == "__main__":
    main()
