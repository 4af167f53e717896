"""The entry point of `backlens`: Ctrl-C and SIGTERM have one meaning from the first import to the last line.

Python raises KeyboardInterrupt wherever the program is. Before the command runs nothing would catch it; in a
destructor, or in the callback of an import's lock, Python drops it with a traceback; and a C extension that is being
loaded turns it into an ImportError. So this module, which imports very little, sets the handlers first.
"""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals that end a run so that it can be resumed, with Ray's processes stopped; schedulers send SIGTERM."""

_received: list[int] = []


def main() -> None:
    """The console script."""
    _handle(_interrupt)
    sys.unraisablehook = _raise_again
    try:
        from backlens.cli.main import call

        status = call(sys.argv[1:])
    except BaseException:
        if not _received:
            raise
        status = _say_interrupted()
    # The command is done: a signal while the interpreter ends its threads only ends it sooner.
    _handle(lambda _number, _frame: os._exit(status))
    sys.exit(status)


def _handle(handler: "signal._HANDLER") -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt


def _raise_again(dropped: "sys.UnraisableHookArgs") -> None:
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        # Later, because an error raised in here would be dropped as well.
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(dropped)


def _say_interrupted() -> int:
    """Print the line that `call` prints when it is interrupted."""
    _handle(signal.SIG_IGN)
    from backlens.cli.console import log_format, logging_as, say_interrupted

    format = log_format(sys.argv[1:])
    with logging_as(format):
        say_interrupted(format)
    return INTERRUPTED
