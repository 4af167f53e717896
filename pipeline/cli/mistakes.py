"""A mistyped command line, as one line that names the word which was meant."""

import re
from typing import Literal, get_args, get_origin

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from pipeline.errors import nearest

PROPOSAL = re.compile(r' Did you mean "[^"]*"\?')


def explained(error: CycloptsError) -> str:
    """What is wrong, what may have been meant, and where to read more."""
    said = _said(error)
    return f"{said}{'' if said.endswith(('.', '?')) else '.'} See `backlens --help`."


def _said(error: CycloptsError) -> str:
    """cyclopts' own words, but of an unknown word ours: it finds --modules where --modle should be --model."""
    said = " ".join(str(error).split())
    if isinstance(error, UnknownOptionError):
        word = (error.token.keyword or error.token.value).partition("=")[0]
        known = [name for argument in error.argument_collection if argument.parse for name in argument.names]
        return f"unknown option {word}{nearest(word, known)}"
    if isinstance(error, UnknownCommandError | UnusedCliTokensError) and error.unused_tokens:
        word, known = error.unused_tokens[0], _commands(error.app)
        if isinstance(error, UnusedCliTokensError):
            return f'unexpected word "{word}"{nearest(word, known)}'
        return f'unknown command "{word}"{nearest(word, known) or "; there are " + ", ".join(known)}'
    if isinstance(error, CoercionError) and error.token and get_origin(error.target_type) is Literal:
        known = [each for each in get_args(error.target_type) if isinstance(each, str)]
        return PROPOSAL.sub("", said).removesuffix(".") + nearest(error.token.value, known)
    return said


def _commands(app: App | None) -> list[str]:
    return [] if app is None else [name for name in app if not name.startswith("-")]
