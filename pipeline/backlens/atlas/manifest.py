"""The record of an atlas, `atlas/manifest.json`: its files and the commits that it was built from.

The name of every file carries the source, a digest of those commits. A new atlas therefore never overwrites files of
the present one, and an atlas is current if its source equals the run's. `find_loss` finds the missing or damaged file
behind an error of DuckDB.
"""

import hashlib
import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backlens.atlas.tables import ATLAS_VERSION
from backlens.printable import json_text
from backlens.store.commit import ShardCommit, committed
from backlens.store.directory import Directory
from backlens.store.parquet import FileRecord
from backlens.store.status import losses, lost_files

ATLAS = "atlas"
MANIFEST = f"{ATLAS}/manifest.json"


@dataclass(frozen=True, slots=True)
class CutOff:
    """The rule by which a run keeps neurons. A missing neuron is weaker than those kept for the prompt, not zero."""

    neurons: int | None
    """Number of neurons kept per prompt, layer and module; -1 means all; None means that the run does not say."""
    top_k: int | None
    """Number of tokens in each list."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "CutOff":
        return cls(config.get("neurons"), config.get("top_k"))

    def __str__(self) -> str:
        if self.neurons is None:
            return "a neuron that is missing for a prompt was not kept, which is not zero"
        if self.neurons < 0:
            return "every neuron is kept for every prompt"
        if self.neurons == 0:
            return "no neurons are kept (--neurons 0)"
        return (
            f"kept: the {self.neurons} strongest neurons per prompt, layer and module; "
            "one that is missing for a prompt is weaker than those, not zero"
        )


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """States if the atlas has the lens of the neurons' own weights."""

    digest: str | None
    """Hash of the weights; None if the atlas lacks them."""
    said: str
    """The model that they come from, or the reason why they are missing."""

    def __str__(self) -> str:
        return f"neuron_weights: {self.said}" if self.digest else f"neuron_weights has no rows: {self.said}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `atlas/manifest.json`."""

    source: str
    shards: int
    """Number of committed shards that the atlas was built from."""
    cut_off: CutOff
    weights: WeightRecord
    files: Mapping[str, Sequence[FileRecord]]
    """Files by table; a table without rows has none."""
    seconds: float
    """Duration of the call that finished the atlas."""
    written_at: str
    """Time in ISO 8601, UTC."""
    atlas_version: int = ATLAS_VERSION

    @property
    def rows(self) -> dict[str, int]:
        return {table: sum(file.rows for file in files) for table, files in self.files.items()}

    @property
    def sizes(self) -> dict[str, int]:
        return {table: sum(file.bytes for file in files) for table, files in self.files.items()}

    def to_json(self) -> bytes:
        return (json_text(asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Manifest":
        fields = json.loads(content)
        files = {table: [FileRecord(**file) for file in files] for table, files in fields["files"].items()}
        records = {"cut_off": CutOff(**fields["cut_off"]), "weights": WeightRecord(**fields["weights"])}
        return cls(**{**fields, **records, "files": files})


def source_of(commits: Mapping[int, ShardCommit], norm_floor: float) -> str:
    """A digest of the commits that an atlas is derived from, and of which lists count: 16 hexadecimal digits."""
    listed = [
        [shard, *sorted(f"{table} {file.checksum}" for table, file in commit.files.items())]
        for shard, commit in sorted(commits.items())
    ]
    return hashlib.sha256(json.dumps([ATLAS_VERSION, norm_floor, listed]).encode()).hexdigest()[:16]


def find_manifest(directory: Directory) -> Manifest | None:
    """The record of the atlas in a run directory; None if this version can read none."""
    if not directory.exists(MANIFEST):
        return None
    try:
        manifest = Manifest.from_json(directory.read(MANIFEST))
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError):
        return None
    return manifest if manifest.atlas_version == ATLAS_VERSION else None


def find_loss(directory: Directory, files: Mapping[str, Sequence[str]]) -> str | None:
    """One line about the first of these files (locations by table) that is lost or damaged, with a remedy; None."""
    names = {posixpath.relpath(path, directory.root) for paths in files.values() for path in paths}
    of_run = [table for table, paths in files.items() if paths]
    for loss in losses(directory, committed(directory).values(), of_run):
        if loss.name in names:
            return str(loss)
    manifest = find_manifest(directory)
    records = [] if manifest is None else [file for some in manifest.files.values() for file in some]
    for path, problem in lost_files(directory, [record for record in records if record.path in names]):
        return (
            f"{directory}/{path}: {problem}; copy it again, or delete {directory}/{ATLAS} and build it again: "
            f"backlens atlas {directory}"
        )
    return None
