"""The errors a user can act on.

Each is one line: what is wrong, where, and what to do. The command line prints the line and leaves with the
error's exit status; anything else is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class BacklensError(Exception):
    """A usage or configuration problem (exit status 2)."""

    status = 2


class Interrupted(BacklensError):
    """The run stopped before it was complete; the same command resumes it (exit status 3)."""

    status = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: which known one it may have been.

    difflib finds what is alike, and takes "modle" for "modules", which shares more letters than "model"; of what it
    finds, the one that fewest slips of a finger lead to is meant. A beginning stands for the shortest word.
    """
    plain = {each.lower(): each for each in known}
    typed = word.lower()
    near = difflib.get_close_matches(typed, plain, n=5)
    if not near and typed.strip("-"):
        near = [each for each in plain if each.startswith(typed)]
    if not near:
        return ""
    return f"; did you mean {plain[min(near, key=lambda each: _slips(typed, each))]}?"


def _slips(typed: str, word: str) -> int:
    """How many letters were left out, added, replaced, or swapped with the next one."""
    before: list[int] = []
    row = list(range(len(word) + 1))
    for i, a in enumerate(typed):
        earlier, before, row = before, row, [i + 1]
        for j, b in enumerate(word):
            row.append(min(before[j] + (a != b), before[j + 1] + 1, row[j] + 1))
            if i and j and (a, typed[i - 1]) == (word[j - 1], b):
                row[-1] = min(row[-1], earlier[j - 1] + 1)
    return row[-1]
