"""Settings for every test, and for the processes that tests start: one thread per process, and a cache of their own."""

import atexit
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs write the paths of their inputs to the user's cache; those of tests go to a folder of the tests.

    Models of the hub stay where they are.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@atexit.register
def _keep_reports_of_living_types_from_the_output() -> None:
    """DuckDB's binding reports its own constants as leaked when another library keeps modules alive to the very end.

    No connection or cursor of ours is among them. Registered first, so it runs last: what is written to standard error
    after this is written by the interpreter's own end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
