"""What one check found."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.errors import BacklensError

Status = Literal["pass", "FAIL", "info", "skip"]
"""`info`: a number to know, which no promise depends on. `skip`: not looked at, and why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's table."""

    name: str
    status: Status
    detail: str
    """What was measured, and where it was worst; or why it was not."""
    measured: float | None = None
    limit: float | None = None
    """The largest value that passes."""
    remedy: str = ""
    """What to do about it; of no use where it passed."""

    @property
    def passed(self) -> bool | None:
        """None where nothing was to be passed."""
        return {"pass": True, "FAIL": False}.get(self.status)

    def as_json(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is null."""
        finite = self.measured is not None and math.isfinite(self.measured)
        return asdict(self) | {"passed": self.passed, "measured": self.measured if finite else None}


def at_most(name: str, measured: float, limit: float, detail: str, remedy: str) -> Check:
    """Passes up to `limit`; not for NaN."""
    return Check(name, "pass" if measured <= limit else "FAIL", detail, measured, limit, remedy)


def told(name: str, measured: float | None, detail: str, remedy: str = "") -> Check:
    """A number to know."""
    return Check(name, "info", detail, measured, remedy=remedy)


def skipped(name: str, reason: str, remedy: str = "") -> Check:
    return Check(name, "skip", reason, remedy=remedy)


def attempted(name: str, remedy: str, look: Callable[[], Iterable[Check]]) -> tuple[Check, ...]:
    """What `look` finds; a problem of the model's that stops it is a failure of `name`."""
    try:
        return tuple(look())
    except BacklensError as error:
        return (Check(name, "FAIL", str(error), remedy=remedy),)
