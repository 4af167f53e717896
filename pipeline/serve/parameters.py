"""What a request asks for: the values of its query string, checked; and what is answered when it is not there."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from pipeline.errors import BacklensError, nearest

MOST_ROWS = 1000
LONGEST = 10_000
"""Characters of one value."""


class Missing(BacklensError):
    """What the address names is not in this run."""


@contextmanager
def is_named_by_the_address() -> Iterator[None]:
    """What is refused in here is not found, rather than badly asked for."""
    try:
        yield
    except BacklensError as error:
        raise Missing(str(error)) from error


class Parameters:
    """A query string's values; a name that the page does not know is refused, an empty value is none."""

    def __init__(
        self, given: Iterable[tuple[str, str]], known: Sequence[str], is_for_programs: bool = False
    ) -> None:
        """A page `is_for_programs` has every row, but where the request says `limit`."""
        self._is_for_programs = is_for_programs
        self._values: dict[str, str] = {}
        for name, value in given:
            if name not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise BacklensError(
                    f"this page has no parameter {name[:40]!r}; {takes}{nearest(name[:40], known)}"
                )
            if len(value) > LONGEST:
                raise BacklensError(f"{name}: {len(value):,} characters are too many; at most {LONGEST:,}")
            if value:
                self._values[name] = value

    def text(self, name: str) -> str | None:
        """The value as it was given."""
        return self._values.get(name)

    def number(self, name: str) -> int | None:
        """The value as a whole number from 0."""
        value = self._values.get(name)
        return None if value is None else whole_number(name, value)

    def most(self, number: int) -> int | None:
        """How many rows a table has whatever the request says: so many for people, all for programs."""
        return None if self._is_for_programs else number

    def limit(self, default: int) -> int | None:
        """How many rows each table may have; None for all."""
        limit = self.number("limit")
        if limit is not None and not 1 <= limit <= MOST_ROWS:
            raise BacklensError(f"limit: {limit} rows; give 1 to {MOST_ROWS:,}")
        return self.most(default) if limit is None else limit


def whole_number(name: str, text: str) -> int:
    """A whole number from 0 that an int64 holds."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise BacklensError(f"{name}: {text[:40]!r} is not a whole number from 0")
    return int(text)


def one_of(name: str, value: str | None, known: Sequence[str]) -> str | None:
    """The value, which must be one of these if there is one."""
    if value is not None and value not in known:
        raise BacklensError(
            f"{name}: {value[:40]!r} is none of {', '.join(known)}{nearest(value[:40], known)}"
        )
    return value
