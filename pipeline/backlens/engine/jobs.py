"""Job files and their submission to Ray's job server: a `backlens` command whose driver runs on the cluster.

A job is a command line and its environment. This package goes with it (Ray's `py_modules`), so driver and workers run
the code that submitted the job, whatever the nodes have installed. A folder of the user may go too: without caches,
run directories and models, because a job server takes 100 MiB. Nothing else about a job is kept here: the run
directory is the state, so a job that was stopped or lost its head node goes on when it is submitted again.
"""

import asyncio
import logging
import os
import re
import shlex
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import backlens
from backlens.config import flag
from backlens.errors import BacklensError, nearest
from backlens.printable import human_bytes

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RUN = "run.json"
MODEL = "config.json"
WEIGHTS = re.compile(r".*\.safetensors|pytorch_model.*\.bin|.*\.safetensors\.index\.json|.*\.gguf")
IN_PACKAGE = "__init__.py"
MARKED = ("pyvenv.cfg", "CACHEDIR.TAG")
"""Files that mark their folder as a virtual environment or a cache."""
CACHES = frozenset(
    (".git", ".venv", "venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis")
) | {".tox", ".nox", ".ipynb_checkpoints", "node_modules", ".cache"}
PER_FILE = 80
"""Bytes that a zip file adds per file, besides its name twice."""
MOSTLY = 0.8
"""Share of a folder's bytes below which its largest entry is not named instead of it."""
PACKAGE = Path(backlens.__file__).parent
STOPPING_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Bundle:
    """The part of a working directory that is sent."""

    excludes: tuple[str, ...]
    """Patterns of files that are not sent, as in .gitignore; the last one that matches a path decides."""
    left_out: tuple[str, ...]
    """Run directories and models that are not sent."""
    bytes: int


def bundle(folder: Path, excludes: Sequence[str], named: Collection[str]) -> Bundle:
    """Choose the files to send: no caches, run directories or models, except those in `named` or in a Python package.

    Raises BacklensError, with the largest folders, if they are more than the job server takes.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    wanted = [*map(os.path.normpath, named), *(each[1:].strip("/") for each in excludes if each[:1] == "!")]
    found = _leftovers(folder, "", set())
    leftovers = {path: is_data for path, is_data in found if not _is_wanted(path, wanted)}
    patterns = (*(f"/{_escaped(path)}" for path in leftovers), *excludes)
    sizes = _sizes(folder, patterns)
    total = sum(sizes.values())
    if total > DASHBOARD_CLIENT_MAX_SIZE:
        largest = ", ".join(f"{path} {human_bytes(size)}" for path, size in _largest(sizes))
        raise BacklensError(
            f"working-dir: {folder}: {human_bytes(total)} would be sent, and a job server takes "
            f"{human_bytes(DASHBOARD_CLIENT_MAX_SIZE)}; name under `excludes:` in the job file what the job does not "
            f"need of {largest}"
        )
    return Bundle(patterns, tuple(path for path, is_data in leftovers.items() if is_data), total)


def _is_wanted(path: str, wanted: Sequence[str]) -> bool:
    return any(fnmatch(path, each) or fnmatch(os.path.basename(path), each) for each in wanted)


def _leftovers(folder: Path, below: str, seen: set[str]) -> Iterator[tuple[str, bool]]:
    """Find the folders that are no code: their paths, and True for a run directory or a model, False for a cache."""
    real = os.path.realpath(folder)
    if real in seen:  # a link to a folder above
        return
    seen.add(real)
    try:
        inside = sorted(os.scandir(folder), key=lambda each: each.name)
    except OSError:
        return
    is_package = any(each.name == IN_PACKAGE for each in inside)
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
    """Return the bytes per file in the archive that Ray would send, by Ray's own rules."""
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
    """Return the largest entries, each narrowed to the folder that holds nearly all of its bytes."""
    found = [(_narrowed(sizes, name), size) for name, size in _inside(sizes, "").most_common(most)]
    return [(path, size) for path, size in found if size > sum(sizes.values()) / 20]


def _narrowed(sizes: Counter[str], path: str) -> str:
    inside = _inside(sizes, f"{path}/")
    if not inside:
        return path
    (name, size), *_ = inside.most_common(1)
    return _narrowed(sizes, f"{path}/{name}") if size > MOSTLY * sum(inside.values()) else f"{path}/"


def _inside(sizes: Counter[str], prefix: str) -> Counter[str]:
    """Return the bytes of the entries directly below `prefix`."""
    inside: Counter[str] = Counter()
    for path, size in sizes.items():
        if path.startswith(prefix):
            inside[path.removeprefix(prefix).partition("/")[0]] += size
    return inside


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFile:
    """The content of a job file; its keys are these words, with dashes."""

    name: str
    """Prefix of the ids of its submissions."""
    command: tuple[str, ...]
    """The words after `backlens`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the command, under the words of its flags."""
    working_dir: Path | None = None
    """A folder of the user that is uploaded, and in which the job runs; the package itself is always sent."""
    excludes: tuple[str, ...] = ()
    """Patterns of files that are not uploaded, as in .gitignore; `!name` uploads a folder that would stay."""
    image: str | None = None
    """A container image with backlens in it; Ray then takes neither a package nor a working directory."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the driver and of every worker."""

    @property
    def words(self) -> list[str]:
        """The command line after `backlens`."""
        return [*self.command, *(f"--{key}={_word(value)}" for key, value in self.options.items())]

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "backlens", *self.words])

    @property
    def out(self) -> str | None:
        """The run directory of the job."""
        named = self.options.get("out") or next(iter(self.command[1:]), None)
        return None if named is None else str(named)

    @property
    def values(self) -> list[str]:
        """The words of the command line that may name a file or folder."""
        return [*self.command[1:], *map(str, self.options.values())]

    @property
    def runtime_env(self) -> dict[str, Any]:
        environment: dict[str, Any] = {"env_vars": dict(self.env)}
        if self.working_dir is not None:
            environment["working_dir"] = str(self.working_dir)
        if self.image is not None:
            environment["image_uri"] = self.image
        return environment


def read_job(path: str) -> JobFile:
    """Read a job file; a relative working directory starts at the folder of the file.

    Raises BacklensError for unknown keys, a missing command, or a run directory that the job would lose.
    """
    content = _mapping(path)
    known = [flag(each.name) for each in fields(JobFile)]
    for key in content:
        if key not in known:
            raise BacklensError(f"{path}: unknown key '{key}'{nearest(key, known)}")
    command, options, env = content.get("command"), content.get("options") or {}, content.get("env") or {}
    if not isinstance(command, str) or not command.split():
        raise BacklensError(f"{path}: name the command that the job runs, e.g. `command: run`")
    excludes = content.get("excludes") or []
    if not isinstance(excludes, list) or not all(isinstance(each, str) for each in excludes):
        raise BacklensError(f"{path}: 'excludes' is a list of patterns, as in .gitignore")
    for key, value in (("options", options), ("env", env)):
        if not isinstance(value, dict) or any(isinstance(each, dict | list) for each in value.values()):
            raise BacklensError(f"{path}: '{key}' is a mapping of names to single values")
    job = JobFile(
        name=re.sub(r"[^\w-]", "-", str(content.get("name") or Path(path).stem)),
        command=tuple(shlex.split(command)),
        options={key: value for key, value in options.items() if value is not None},
        working_dir=_folder(path, content.get("working-dir")),
        excludes=tuple(excludes),
        image=content.get("image"),
        env={str(name): _word(value) for name, value in env.items()},
    )
    if job.image is not None and job.working_dir is not None:
        raise BacklensError(f"{path}: give an image or a working-dir, not both (Ray takes one of them)")
    if job.excludes and job.working_dir is None:
        raise BacklensError(f"{path}: 'excludes' is about a working-dir, and there is none")
    if job.out is not None and "://" not in job.out and not os.path.isabs(job.out):
        raise BacklensError(
            f"{path}: '{job.out}' would be in the job's own folder, which Ray deletes; give a URL or an absolute "
            "path on storage that every node sees"
        )
    return job


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that the server has taken."""

    identity: str
    left_out: tuple[str, ...] = ()
    """Run directories and models in the working directory that were not sent."""


def submit(job: JobFile, address: str | None) -> Submitted:
    """Send the job, this package and the working directory to the cluster's job server."""
    import ray  # noqa: F401 - makes the handlers that would print every file that is not sent

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)
    environment, left_out = job.runtime_env, ()
    if job.working_dir is not None:
        sent = bundle(job.working_dir, job.excludes, job.values)
        environment["excludes"], left_out = list(sent.excludes), sent.left_out
    identity = f"{job.name}-{uuid.uuid4().hex[:8]}"
    metadata = {"out": job.out} if job.out is not None else {}
    with _server(address) as server:
        if job.image is None:
            # by itself: Ray would apply the working directory's `excludes` to the package as well
            code = {"py_modules": [str(PACKAGE)], "excludes": ["__pycache__"]}
            server._upload_py_modules_if_needed(code)
            environment["py_modules"] = code["py_modules"]
        server.submit_job(
            entrypoint=job.entrypoint,
            runtime_env=environment,
            metadata=metadata,
            submission_id=identity,
        )
    return Submitted(identity, left_out)


def job_details(identity: str | None, address: str | None) -> "list[JobDetails]":
    """Return one job, or all jobs that were submitted, the oldest first."""
    with _server(address) as server:
        if identity is not None:
            return [server.get_job_info(identity)]
        submitted = [job for job in server.list_jobs() if job.submission_id is not None]
        return sorted(submitted, key=lambda job: job.start_time or 0)


def job_logs(identity: str, address: str | None, follow: bool) -> Iterator[str]:
    """Yield the output of a job so far, and with `follow` until it ends."""
    with _server(address) as server:
        if not follow:
            yield server.get_job_logs(identity)
            return
        server.get_job_info(identity)  # raises for an unknown job, whose stream of logs would only be empty
        stream, loop = server.tail_job_logs(identity), asyncio.new_event_loop()
        try:
            while True:
                yield loop.run_until_complete(anext(stream))
        except StopAsyncIteration:
            return
        finally:
            loop.run_until_complete(stream.aclose())  # pyright: ignore[reportAttributeAccessIssue]
            loop.close()


def stop_job(identity: str, address: str | None) -> "JobDetails":
    """Stop a job and wait until it has ended; its commits stay."""
    with _server(address) as server:
        server.stop_job(identity)
        ends = time.monotonic() + STOPPING_SECONDS
        while not (job := server.get_job_info(identity)).status.is_terminal() and time.monotonic() < ends:
            time.sleep(0.2)
        return job


@contextmanager
def _server(address: str | None) -> Iterator["JobSubmissionClient"]:
    from backlens.engine.executors.ray_address import job_server

    url = job_server(address)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    # Ray prefers its own variables to an address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    try:
        yield JobSubmissionClient(url)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        said = _first_line(error)
        if "status code 413" in said:  # from a proxy: the limit of the job server itself is checked before
            said += "; the upload is too large for what answers there: name more files under `excludes:`"
        raise BacklensError(f"address: {url}: {said}") from error


def _first_line(error: BaseException) -> str:
    """Return the first line of the job server's message, or the last line of a traceback that it sent."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if any(line.startswith("Traceback") for line in lines) or len(lines) > 3 else lines[0]


def _mapping(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BacklensError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise BacklensError(f"{path}: a job is a mapping with a command, e.g. `command: run`")
    return {str(key): value for key, value in content.items()}


def _folder(path: str, named: str | None) -> Path | None:
    if named is None:
        return None
    folder = (Path(path).parent / named).resolve()
    if not folder.is_dir():
        raise BacklensError(f"{path}: the working-dir {folder} is no folder here")
    return folder


def _word(value: object) -> str:
    """Write a YAML value as a user would type it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
