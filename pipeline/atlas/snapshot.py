"""A run's tables as they were committed at one moment, with the atlas if it is of just these."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import duckdb

from pipeline.atlas.manifest import CutOff, Manifest, find_manifest, source_of
from pipeline.atlas.sql import MEMORY_LIMIT, connection
from pipeline.store.commit import committed, table_file
from pipeline.store.files import Directory
from pipeline.store.rundir import RunRecord, load_run
from pipeline.store.vocab import VOCAB_FILE
from schemas.tables import TABLES


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where the files are that a run had at one moment."""

    directory: Directory
    record: RunRecord
    files: Mapping[str, Sequence[str]]
    """By table: where its committed files are, and those of the atlas if it is current."""
    shards: int
    """How many shards are committed."""
    manifest: Manifest | None
    """Of the atlas, current or not; None without one."""
    is_current: bool
    """Whether the atlas is of just these shards."""

    @classmethod
    def open(cls, out: str | Directory) -> "Snapshot":
        """The run in the directory or at the URL `out`, as it is now."""
        directory = Directory.at(out)
        record = load_run(directory)
        manifest = find_manifest(directory)
        commits = committed(directory)
        files = {
            table: [directory.location(c.files[table].path) for c in commits.values() if table in c.files]
            for table in TABLES
        }
        files["vocab"] = [directory.location(VOCAB_FILE)] if directory.exists(VOCAB_FILE) else []
        is_current = manifest is not None and manifest.source == source_of(commits)
        if manifest is not None and is_current:
            for table, records in manifest.files.items():
                files[table] = [directory.location(file.path) for file in records]
        return cls(directory, record, files, len(commits), manifest, is_current)

    @property
    def cut_off(self) -> CutOff:
        """Which neurons the run keeps."""
        return CutOff.of(self.record.config)

    @property
    def note(self) -> str | None:
        """What a reader of results should know: that the run is not complete, or its atlas not current."""
        planned = self.record.plan.shards
        notes = []
        if self.shards < planned:
            notes.append(f"{self.directory} is not complete: these are {self.shards} of its {planned} shards")
        if self.manifest is not None and not self.is_current:
            notes.append(
                f"the atlas of {self.directory} is of {self.manifest.shards} shards and no longer the run's, so it "
                f"is not read; `backlens atlas {self.directory}` builds it again"
            )
        return "; ".join(notes) or None

    def connection(
        self, seconds: float, other: "Snapshot | None" = None, memory: str = MEMORY_LIMIT
    ) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A connection that sees these tables, and those of `other` in the schema `other`."""
        beside = None if other is None else (other.directory, other.files)
        return connection(self.directory, self.files, seconds, beside, memory)

    def prompt_connection(
        self, prompt_id: int, seconds: float, memory: str = MEMORY_LIMIT
    ) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A connection for questions about one prompt: it sees that prompt's shard, and no atlas.

        Of a prompt whose shard is not there it sees all shards, to say what there is.
        """
        shard = prompt_id // self.record.plan.shard_prompts
        own = {
            table: [path for path in self.files[table] if path.endswith(f"/{table_file(table, shard)}")]
            for table in TABLES
            if table != "vocab"
        }
        files = own | {"vocab": self.files["vocab"]} if own["prompts"] else self.files
        return connection(self.directory, files, seconds, memory=memory, facts_only=True)
