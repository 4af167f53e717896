"""Errors that a user can act on, and the search for the word that a user meant.

Each error is one line: what is wrong, where, and what to do. The command line prints the line and ends with the exit
status of the error; any other error is a bug of this package and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class BacklensError(Exception):
    """A wrong command, option or input (exit status 2)."""

    status = 2


class Interrupted(BacklensError):
    """The run stopped before it was complete; the same command resumes it (exit status 3)."""

    status = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the most similar known word, or nothing.

    difflib finds similar words, but prefers "modules" to "model" for "modle", because more letters are equal; among its
    words the one with the fewest typing errors is chosen. The beginning of a word stands for the shortest such word.
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
    """Count the letters that were left out, added, replaced, or swapped with the next one."""
    before: list[int] = []
    row = list(range(len(word) + 1))
    for i, a in enumerate(typed):
        earlier, before, row = before, row, [i + 1]
        for j, b in enumerate(word):
            row.append(min(before[j] + (a != b), before[j + 1] + 1, row[j] + 1))
            if i and j and (a, typed[i - 1]) == (word[j - 1], b):
                row[-1] = min(row[-1], earlier[j - 1] + 1)
    return row[-1]
