"""Which packages a result was made with."""

import platform
from functools import cache
from importlib.metadata import version

PACKAGES = ("backlens", "torch", "transformers", "pyarrow", "ray")


@cache
def package_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
