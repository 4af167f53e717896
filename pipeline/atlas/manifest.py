"""What an atlas consists of and what it was built from: the record `atlas/manifest.json`, written last.

Every file's name carries the source, a digest of the commits that it was derived from. So while another atlas is
being built the files of the standing one are left alone, and an atlas is current if its source is the run's.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.plain import json_text
from pipeline.store.commit import ShardCommit
from pipeline.store.files import Directory
from pipeline.store.parquet import FileRecord
from schemas.atlas import ATLAS_VERSION

ATLAS = "atlas"
MANIFEST = f"{ATLAS}/manifest.json"


@dataclass(frozen=True, slots=True)
class CutOff:
    """Which neurons a run keeps. One that it does not keep for a prompt is weaker than those, and not zero."""

    neurons: int | None
    """The strongest this many per prompt, layer and module; -1 is all of them; None: the run does not say."""
    top_k: int | None
    """How many tokens each of its lists holds."""

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
            f"kept are the {self.neurons} strongest neurons per prompt, layer and module; "
            "one that is missing for a prompt is weaker than those, not zero"
        )


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """Whether the neurons' own weights are in the atlas."""

    digest: str | None
    """The hash of the weights; None if they are not."""
    said: str
    """Of which model they are, or why they are not there."""

    def __str__(self) -> str:
        return f"neuron_weights: {self.said}" if self.digest else f"neuron_weights has no rows: {self.said}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `atlas/manifest.json`."""

    source: str
    shards: int
    """How many committed shards it was built from."""
    cut_off: CutOff
    weights: WeightRecord
    files: Mapping[str, Sequence[FileRecord]]
    """By table; a table without rows has none."""
    seconds: float
    """How long the call that finished it took."""
    written_at: str
    """ISO 8601, UTC."""
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
    """A digest of the rows that an atlas is derived from, and of which lists count; 16 hexadecimal digits."""
    listed = [
        [shard, *sorted(f"{table} {file.checksum}" for table, file in commit.files.items())]
        for shard, commit in sorted(commits.items())
    ]
    return hashlib.sha256(json.dumps([ATLAS_VERSION, norm_floor, listed]).encode()).hexdigest()[:16]


def find_manifest(directory: Directory) -> Manifest | None:
    """The record of the atlas in a run directory; None if there is none that this version can read."""
    if not directory.exists(MANIFEST):
        return None
    try:
        manifest = Manifest.from_json(directory.read(MANIFEST))
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError):
        return None
    return manifest if manifest.atlas_version == ATLAS_VERSION else None
