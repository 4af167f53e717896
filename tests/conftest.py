"""For every test: one thread for tensors too small for two, here and in the processes that tests start."""

import atexit
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


@atexit.register
def _keep_reports_of_living_types_from_the_output() -> None:
    """DuckDB's binding reports its own constants as leaked when another library keeps modules alive to the very end.

    No connection or cursor of ours is among them. Registered first, so it runs last: what is written to standard error
    after this is written by the interpreter's own end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
