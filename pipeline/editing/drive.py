"""A sweep from its options to a finished directory: plan, resume, shards, done."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import yaml

from pipeline.editing.covariance import model_digest
from pipeline.editing.options import EditOptions
from pipeline.editing.request import Request, read_requests
from pipeline.editing.sweep import Grid, Side, Sweeper, content_digest, option_values
from pipeline.engine.versions import package_versions
from pipeline.models.load import LoadedModel, ModelSource, load_model
from pipeline.prompts.source import Source
from pipeline.store.commit import committed
from pipeline.store.files import Directory
from pipeline.store.lock import DriverLock
from pipeline.store.rundir import FingerprintValue, Plan, finish, open_run

Told = Callable[[int, int], None]
"""How many shards are done, of how many."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did."""

    out: str
    shards: int
    """Computed by this command."""
    cases: int
    before: int
    """Shards that an earlier command had done."""


def load(options: EditOptions) -> tuple[LoadedModel, list[Request]]:
    """The model, ready to be edited, and the edits."""
    options = options.with_demo_defaults()
    assert options.model is not None
    assert options.edits is not None
    requests = read_requests(options.edits, options.format, options.limit)
    return load_editable(options), requests


def load_editable(options: EditOptions) -> LoadedModel:
    assert options.model is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = ModelSource(
        options.model, options.revision, options.dtype, trust_remote_code=options.trust_remote_code
    )
    return load_model(source, device)


def sweep(options: EditOptions, grid: Grid, side: Side, out: str, told: Told) -> Swept:
    """Compute what of the grid is not committed in `out` yet.

    Raises BacklensError, before anything is computed, if `out` is another sweep's.
    """
    directory = Directory.at(out)
    with DriverLock(directory):
        loaded, requests = load(options)
        work = grid.shards(len(requests))
        config = {**asdict(options), **asdict(grid), **asdict(side)}
        opened = open_run(
            directory,
            _fingerprint(options, grid, side, loaded, requests),
            config=config,
            config_yaml=yaml.safe_dump(_plain(config), sort_keys=False),
            plan=Plan(sum(stop - start for each in work for start, stop in each.groups), len(work), 0),
            model={"name": options.with_demo_defaults().model, "layers": len(loaded.anatomy.blocks)},
            versions=package_versions(),
        )
        directory.remove_leftovers()
        done = set(committed(directory))
        left = [each for each in work if each.shard not in done]
        told(len(done), len(work))
        cases = 0
        if left:
            sweeper = Sweeper(loaded, requests, options, grid, side)
            for number, each in enumerate(left, start=1):
                cases += sweeper.run(each, directory).prompts
                told(len(done) + number, len(work))
        finish(opened)
        return Swept(str(directory), len(left), cases, len(done))


def _fingerprint(
    options: EditOptions, grid: Grid, side: Side, loaded: LoadedModel, requests: Sequence[Request]
) -> dict[str, FingerprintValue]:
    files = {"text": options.text, "untouched": side.untouched, "held-out": side.held_out}
    return {
        "model": f"weights {model_digest(loaded)[:16]}",
        "edits": f"content {content_digest(requests)[:16]}",
        **{name: " ".join(map(str, values)) for name, values in asdict(grid).items()},
        **option_values(options),
        **{name: None if path is None else Source(path).name for name, path in files.items()},
        "generate": side.generate,
    }


def _plain(value: object) -> object:
    """As YAML writes it: no tuples."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
