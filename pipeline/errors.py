"""The errors a user can act on.

Each is one line: what is wrong, where, and what to do. The command line prints the line and leaves with the
error's exit status; anything else is a defect of ours and keeps its traceback.
"""


class BacklensError(Exception):
    """A usage or configuration problem (exit status 2)."""

    status = 2


class Interrupted(BacklensError):
    """The run stopped before it was complete; the same command resumes it (exit status 3)."""

    status = 3
