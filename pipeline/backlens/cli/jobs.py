"""`backlens submit` and `backlens jobs`: commands whose driver runs on a Ray cluster."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.table import Column, Table

from backlens.cli.console import Debug, console, say, say_json
from backlens.errors import BacklensError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

Address = Annotated[
    str | None,
    Parameter(
        help="The job server, e.g. http://head:8265. Default: $RAY_API_SERVER_ADDRESS, else the one here."
    ),
]

COLOURS = re.compile("\x1b\\[[0-9;]*m")
"""The escape codes with which Ray colours the lines of workers."""

app = App(name="jobs", help="Show, read and stop jobs that were submitted to a Ray cluster.")


@app.command
def status(
    identity: Annotated[str | None, Parameter(help="A job's id. Default: all jobs.")] = None,
    /,
    *,
    address: Address = None,
    json: Annotated[bool, Parameter(negative=(), help="JSON lines instead of a table.")] = False,
    debug: Debug = False,
) -> int:
    """Show the state of one job, or of all.

    Example: backlens jobs status --address http://head:8265
    """
    from backlens.engine.jobs import job_details

    found = [_JobLine.of(job) for job in job_details(identity, address)]
    if json:
        for line in found:
            say_json(line.as_json())
        return 0
    longest = max((len(line.id) for line in found), default=0)
    out = Column("out", overflow="fold")
    table = Table(Column("job", min_width=longest), "state", "started", "ended", "exit", out)
    for line in found:
        ended = "" if line.exit_status is None else str(line.exit_status)
        table.add_row(line.id, line.state, line.started or "", line.ended or "", ended, line.out or "")
    console().print(table, soft_wrap=True)
    for line in found if identity is not None else ():
        if line.message:
            say(line.message)
    return 0


@app.command
def logs(
    identity: Annotated[str, Parameter(help="A job's id.")],
    /,
    *,
    follow: Annotated[bool, Parameter(negative=(), help="Continue until the job ends.")] = False,
    address: Address = None,
    debug: Debug = False,
) -> int:
    """Print the output of a job.

    Example: backlens jobs logs project-1a2b3c4d --follow --address http://head:8265
    """
    from backlens.engine.jobs import job_logs

    for part in job_logs(identity, address, follow):
        say(COLOURS.sub("", part), end="")
    return 0


@app.command
def stop(
    identity: Annotated[str, Parameter(help="A job's id.")],
    /,
    *,
    address: Address = None,
    debug: Debug = False,
) -> int:
    """Stop a job. Its commits stay; the same job, submitted again, goes on from there.

    Example: backlens jobs stop project-1a2b3c4d --address http://head:8265
    """
    from backlens.engine.jobs import stop_job

    say(f"{identity}: {stop_job(identity, address).status.value.lower()}")
    return 0


def submit_file(path: str, address: str | None, parse: Callable[[list[str]], Any]) -> int:
    """Check the job's command line with `parse`, submit it, and print its id and how to follow it."""
    from backlens.engine.jobs import read_job, submit

    job = read_job(path)
    try:
        parse(job.words)
    except (CycloptsError, BacklensError) as error:
        raise BacklensError(f"{path}: {' '.join(str(error).split())}") from error
    submitted = submit(job, address)
    if submitted.left_out:
        say(f"not sent: {', '.join(submitted.left_out)} (run directories and models)", stderr=True)
    say(submitted.identity)
    where = "" if address is None else f" --address {address}"
    say(f"backlens jobs logs {submitted.identity} --follow{where}", stderr=True)
    return 0


@dataclass(frozen=True, slots=True)
class _JobLine:
    """One job as a row of the table and as a JSON line."""

    id: str
    state: str
    started: str | None
    ended: str | None
    exit_status: int | None
    """Exit status of the `backlens` command; 3 means that the run can be resumed."""
    out: str | None
    entrypoint: str
    message: str | None

    @classmethod
    def of(cls, job: "JobDetails") -> "_JobLine":
        return cls(
            id=str(job.submission_id),
            state=job.status.value.lower(),
            started=_time(job.start_time),
            ended=_time(job.end_time),
            exit_status=job.driver_exit_code,
            out=(job.metadata or {}).get("out"),
            entrypoint=job.entrypoint,
            message=job.message,
        )

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
