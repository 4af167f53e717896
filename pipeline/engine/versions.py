"""Which packages a result was made with."""

import platform
from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import version

PACKAGES = ("backlens", "torch", "transformers", "pyarrow", "ray")


@cache
def package_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def made_with_others(made: Collection[Mapping[str, str]]) -> str | None:
    """One line if some of the shards were made with other versions than are here; `made` has those of each shard."""
    now = package_versions()
    others = [with_ for with_ in made if dict(with_) != now]
    if not others:
        return None
    names = {name: version for name, version in now.items() if any(w.get(name) != version for w in others)}
    before = {name: sorted({w.get(name, "none") for w in others} - {now[name]}) for name in names}
    changes = ", ".join(f"{name} {' and '.join(before[name])} (now {names[name]})" for name in names)
    shards = "1 shard was" if len(others) == 1 else f"{len(others):,} shards were"
    return f"{shards} made with other versions: {changes}; numbers may differ between shards, _commits/ says whose"
