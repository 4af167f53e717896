"""What of a job's working directory is sent to the cluster: the code, not what has come to lie beside it.

Ray sends the whole folder but for what .gitignore and .rayignore name, and its job server takes 100 MiB.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pipeline.errors import BacklensError

RUN = "run.json"
MODEL = "config.json"
WEIGHTS = re.compile(r".*\.safetensors|pytorch_model.*\.bin|.*\.safetensors\.index\.json|.*\.gguf")
PACKAGE = "__init__.py"
MARKED = ("pyvenv.cfg", "CACHEDIR.TAG")
"""Files that say of their folder: a virtual environment, a cache."""
CACHES = frozenset(
    (".git", ".venv", "venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis")
) | {".tox", ".nox", ".ipynb_checkpoints", "node_modules", ".cache"}
PER_FILE = 80
"""Bytes of a zip file's own for each, beside its name, twice."""
MOSTLY = 0.8


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder, and what of it stays here."""

    excludes: tuple[str, ...]
    """Patterns as in .gitignore; the last that fits a path says whether it stays."""
    left_out: tuple[str, ...]
    """The run directories and models among it."""
    bytes: int


def bundle(folder: Path, excludes: Sequence[str], named: Collection[str]) -> Bundle:
    """Caches, run directories and models stay here, but for models inside a Python package and what the job names.

    Raises BacklensError for more than the job server takes, with the largest folders.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    wanted = [*map(os.path.normpath, named), *(each[1:].strip("/") for each in excludes if each[:1] == "!")]
    found = _leftovers(folder, "", set())
    leftovers = {path: is_data for path, is_data in found if not _is_wanted(path, wanted)}
    patterns = (*(f"/{_escaped(path)}" for path in leftovers), *excludes)
    sizes = _sizes(folder, patterns)
    total = sum(sizes.values())
    if total > DASHBOARD_CLIENT_MAX_SIZE:
        largest = ", ".join(f"{path} {_mb(size)}" for path, size in _largest(sizes))
        raise BacklensError(
            f"working-dir: {folder}: {_mb(total)} would be sent, and a job server takes "
            f"{_mb(DASHBOARD_CLIENT_MAX_SIZE)}; name under `excludes:` in the job file what the job does not need of "
            f"{largest}"
        )
    return Bundle(patterns, tuple(path for path, is_data in leftovers.items() if is_data), total)


def _is_wanted(path: str, wanted: Sequence[str]) -> bool:
    return any(fnmatch(path, each) or fnmatch(os.path.basename(path), each) for each in wanted)


def _leftovers(folder: Path, below: str, seen: set[str]) -> Iterator[tuple[str, bool]]:
    """Folders that are no code, by their path, and whether somebody made them: a run directory, or a model."""
    real = os.path.realpath(folder)
    if real in seen:  # a link to a folder above
        return
    seen.add(real)
    try:
        inside = sorted(os.scandir(folder), key=lambda each: each.name)
    except OSError:
        return
    is_package = any(each.name == PACKAGE for each in inside)
    for each in inside:
        path = f"{below}{each.name}"
        if not each.is_dir():
            continue
        kind = _kind(each.name, Path(each), is_package)
        if kind is None:
            yield from _leftovers(Path(each), f"{path}/", seen)
        else:
            yield path, kind == "data"


def _kind(name: str, folder: Path, in_package: bool) -> str | None:
    try:
        files = os.listdir(folder)
    except OSError:
        return None
    if name in CACHES or name.endswith(".egg-info") or any(mark in files for mark in MARKED):
        return "cache"
    is_model = MODEL in files and any(map(WEIGHTS.fullmatch, files)) and not in_package
    return "data" if RUN in files or is_model else None


def _escaped(path: str) -> str:
    return re.sub(r"([*?\[\]\\ ])", r"\\\1", path)


def _sizes(folder: Path, excludes: Sequence[str]) -> Counter[str]:
    """The bytes that each file takes in what Ray would send, found as Ray finds them."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: Counter[str] = Counter()

    def add(path: Path) -> None:
        if path.is_file():
            name = str(path.relative_to(folder))
            sizes[name] = path.stat().st_size + PER_FILE + 2 * len(name)

    patterns = [*get_runtime_env_default_excludes(), *excludes]
    with_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(folder, [_get_excludes(folder, patterns)], add, include_gitignore=with_gitignore)
    return sizes


def _largest(sizes: Counter[str], most: int = 3) -> list[tuple[str, int]]:
    """The heaviest of the folder's entries, each as deep as nearly all of it lies."""
    found = [(_heart(sizes, name), size) for name, size in _inside(sizes, "").most_common(most)]
    return [(path, size) for path, size in found if size > sum(sizes.values()) / 20]


def _heart(sizes: Counter[str], path: str) -> str:
    inside = _inside(sizes, f"{path}/")
    if not inside:
        return path
    (name, size), *_ = inside.most_common(1)
    return _heart(sizes, f"{path}/{name}") if size > MOSTLY * sum(inside.values()) else f"{path}/"


def _inside(sizes: Counter[str], prefix: str) -> Counter[str]:
    """The bytes of what lies directly below."""
    inside: Counter[str] = Counter()
    for path, size in sizes.items():
        if path.startswith(prefix):
            inside[path.removeprefix(prefix).partition("/")[0]] += size
    return inside


def _mb(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
