"""What a command says on standard error: text for people, or one JSON object a line for programs."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

from pipeline.cli.terminal import json_for, say
from pipeline.engine.events import LOGGER, emit

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """time (ISO 8601, UTC), level, event, then the event's fields; of other libraries' records, their message."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": time, "level": record.levelname.lower()}
        if record.name == LOGGER.name:
            line |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        else:
            line |= {"event": "log", "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json_for(sys.stderr, line)


class NoteHandler(logging.Handler):
    """The text of `note` events, a line each; whoever shows a run's progress tells the other events."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "note":
            say(getattr(record, "fields", {}).get("text", ""), stderr=True)


def log_format(tokens: Sequence[str]) -> LogFormat:
    """What a command line asks for, before it is parsed: its mistakes are told in the same format."""
    given = " ".join(tokens).replace("--log-format=", "--log-format ")
    return "json" if "--log-format json" in given else "text"


@contextmanager
def logging_as(format: LogFormat) -> Iterator[None]:
    """Write every record, of other libraries too, and Python's warnings; in text, only what is waited for."""
    if format == "text":
        notes = NoteHandler()
        LOGGER.addHandler(notes)
        try:
            yield
        finally:
            LOGGER.removeHandler(notes)
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)


def say_error(message: str, format: LogFormat) -> None:
    if format == "json":
        emit("error", level=logging.ERROR, message=message)
    else:
        say(f"backlens: {message}", stderr=True)


def say_interrupted(format: LogFormat) -> None:
    say_error("interrupted; the same command goes on from what is committed", format)
