"""A sweep from its options to a finished directory: plan, resume, shards, done. It loads no weights itself."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import yaml

from pipeline import demo
from pipeline.editing.grid import Grid
from pipeline.editing.loading import model_source
from pipeline.editing.options import EditOptions
from pipeline.editing.request import Request, read_requests, subject_notes
from pipeline.editing.sweep import SweepJob
from pipeline.editing.tools import refuse_missing
from pipeline.editing.untouched import Bystanders
from pipeline.engine.executors import RayOptions, executing
from pipeline.engine.versions import made_with_others, package_versions
from pipeline.errors import BacklensError, Interrupted
from pipeline.models.checkpoint import Proof, pinned
from pipeline.models.load import load_config, prove
from pipeline.prompts.source import Source
from pipeline.store.commit import committed
from pipeline.store.files import Directory
from pipeline.store.lock import DriverLock
from pipeline.store.places import published_name, recorded, remember
from pipeline.store.rundir import FingerprintValue, Plan, finish, open_run


@dataclass(frozen=True, slots=True)
class Side:
    """What else is measured of an edited model: files of facts and of texts, and whether it writes."""

    untouched: str | None = None
    held_out: str | None = None
    generate: bool = False


@dataclass(frozen=True, slots=True)
class Reports:
    """Who is told what."""

    done: Callable[[int, int], None]
    """How many shards are done, of how many."""
    note: Callable[[str], None]
    """What is waited for, and what went wrong and was mended."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did."""

    out: str
    shards: int
    """Computed by this command."""
    cases: int
    before: int
    """Shards that an earlier command had done."""
    deaths: int
    """Workers that died and were replaced."""


def sweep(
    options: EditOptions, grid: Grid, side: Side, out: str, reports: Reports, ray: RayOptions | None = None
) -> Swept:
    """Compute what of the grid is not committed in `out` yet, in this process or with `ray` on a cluster.

    Raises BacklensError, before anything is computed, if `out` is another sweep's, and Interrupted when workers went on
    dying; the same call then goes on.
    """
    refuse_missing(options, grid.methods)
    directory = Directory.at(out)
    with DriverLock(directory) as lock:
        given = {**asdict(options), **asdict(grid), **asdict(side)}
        options = options.with_demo_defaults()
        assert options.edits is not None
        requests = read_requests(options.edits, options.format, options.limit)
        for line in subject_notes(requests):
            reports.note(line)
        source = model_source(options)
        proof = prove(source)
        bystanders = Bystanders.read(side.untouched, side.held_out)
        work = grid.shards(requests)
        kept = recorded(given, directory)
        opened = open_run(
            directory,
            _fingerprint(options, proof, grid, side, requests, bystanders),
            config=kept,
            config_yaml=yaml.safe_dump(_plain(kept), sort_keys=False),
            plan=Plan(sum(len(group) for each in work for group in each.groups), len(work), 0),
            model={
                "name": demo.NAME if given["model"] is None else published_name(given["model"]),
                "layers": int(load_config(source).num_hidden_layers),
            },
            versions=package_versions(),
        )
        remember(opened.record, given)
        directory.remove_leftovers()
        commits = committed(directory)
        others = made_with_others([commit.versions for commit in commits.values()])
        if others is not None:
            reports.note(others)
        done = set(commits)
        left = [each for each in work if each.index not in done]
        reports.done(len(done), len(work))
        cases = deaths = 0
        if left:
            job = SweepJob(
                pinned(source, proof), _absolute(options), grid, bystanders, side.generate, directory
            )
            with executing(ray, reports.note) as executor:
                executor.start(job)
                for number, commit in enumerate(executor.run(iter(left)), start=1):
                    cases, deaths = cases + commit.prompts, executor.standing().deaths
                    reports.done(len(done) + number, len(work))
                    lock.confirm()
            directory.remove_leftovers()  # of workers that died and were replaced
            if len(committed(directory)) < len(work):
                raise Interrupted(f"out: {directory} lacks shards; run the same command again")
        finish(opened)
        return Swept(str(directory), len(left), cases, len(done), deaths)


def _absolute(options: EditOptions) -> EditOptions:
    """With paths that mean the same in a worker, which may stand in another folder."""
    paths = {name: getattr(options, name) for name in ("text", "statistics", "editor")}
    found = {
        name: str(Path(path).absolute())
        for name, path in paths.items()
        if path is not None and "://" not in path
    }
    return replace(options, **found)


def _fingerprint(
    options: EditOptions,
    proof: Proof,
    grid: Grid,
    side: Side,
    requests: Sequence[Request],
    bystanders: Bystanders,
) -> dict[str, FingerprintValue]:
    beyond = bystanders.digest()
    return {
        "model": f"weights {proof.weights[:16]}",
        "edits": f"content {_content_digest(requests)[:16]}",
        **{name: " ".join(map(str, values)) for name, values in asdict(grid).items()},
        **_option_values(options),
        "editor": None if options.editor is None else _file_digest(options.editor),
        "text": None if options.text is None else Source(options.text).name,
        "untouched and held-out": None if beyond is None else f"content {beyond[:16]}",
        "generate": side.generate,
    }


def _content_digest(requests: Sequence[Request]) -> str:
    """Of what the requests say, not of the file."""
    said = [[v for k, v in asdict(r).items() if k != "where"] for r in requests]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _file_digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return f"content {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise BacklensError(f"{path}: cannot be read: {error.strerror}; check --editor") from error


def _option_values(options: EditOptions) -> dict[str, FingerprintValue]:
    """The options that change results, by flag."""
    own = (
        *("model", "revision", "edits", "format", "limit", "statistics", "text", "trust_remote_code"),
        "editor",
    )
    return {f.name.replace("_", "-"): getattr(options, f.name) for f in fields(options) if f.name not in own}


def _plain(value: object) -> object:
    """As YAML writes it: no tuples."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
