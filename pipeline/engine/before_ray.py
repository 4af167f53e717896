"""What Ray reads from the environment when it is imported, so it has to stand there before that."""

import os


def keep_deaths_quiet() -> None:
    """That a worker died is ours to say, not a paragraph of Ray's on standard output."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
