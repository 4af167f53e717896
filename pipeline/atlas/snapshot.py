"""A run's tables as they were committed at one moment, with the atlas if it is of just these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.atlas.database import MEMORY_LIMIT, Database
from pipeline.atlas.manifest import MANIFEST, CutOff, Manifest, find_manifest, source_of
from pipeline.store.commit import committed, table_file
from pipeline.store.files import Directory
from pipeline.store.rundir import RunRecord, load_run, refuse_other_kind
from pipeline.store.vocab import VOCAB_FILE
from schemas.atlas import PROMPT_TABLES
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
    is_foreign: bool
    """Whether there is an atlas that this version cannot read."""

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
        # Written before the first shard, so it is expected with one: a copy without it is not without tokens.
        has_vocab = record.kind == "run" and (bool(commits) or directory.exists(VOCAB_FILE))
        files["vocab"] = [directory.location(VOCAB_FILE)] if has_vocab else []
        is_current = manifest is not None and manifest.source == source_of(commits, norm_floor(record))
        if manifest is not None and is_current:
            for table, records in manifest.files.items():
                files[table] = [directory.location(file.path) for file in records]
        is_foreign = manifest is None and directory.exists(MANIFEST)
        return cls(directory, record, files, len(commits), manifest, is_current, is_foreign)

    def require_run(self) -> None:
        """Raises BacklensError for an edit sweep, of which SQL alone can be asked."""
        refuse_other_kind(self.directory, self.record, "run")

    @property
    def cut_off(self) -> CutOff:
        """Which neurons the run keeps."""
        return CutOff.of(self.record.config)

    @property
    def note(self) -> str | None:
        """What a reader of results should know: that the run is not complete, or its atlas not current."""
        planned, out = self.record.plan.shards, self.directory
        progress = f"{out} is not complete: these are {self.shards} of its {planned} shards"
        notes = [progress if self.shards < planned else None, self.atlas_note]
        return "; ".join(note for note in notes if note) or None

    @property
    def atlas_note(self) -> str | None:
        """Why the atlas that is there is not read."""
        remedy = f"is not read; `backlens atlas {self.directory}` builds it again"
        if self.is_foreign:
            return f"the atlas of {self.directory} was written by another version and {remedy}"
        if self.manifest is not None and not self.is_current:
            return (
                f"the atlas of {self.directory} is of {self.manifest.shards} shards and no longer the run's, "
                f"so it {remedy}"
            )
        return None

    def database(
        self, memory: str = MEMORY_LIMIT, other: "Snapshot | None" = None, is_kept: bool = False
    ) -> Database:
        """These tables, and those of `other` in the schema `other`."""
        beside = None if other is None else (other.directory, other.files)
        return Database(
            self.directory, self.files, memory, beside, is_kept=is_kept, norm_floor=norm_floor(self.record)
        )

    def prompt_database(self, prompt_id: int, memory: str = MEMORY_LIMIT) -> Database:
        """What questions about one prompt read where there is no atlas: the tables of its shard.

        Of a prompt whose shard is not there these are all shards, to say what there is.
        """
        shard = prompt_id // self.record.plan.shard_prompts
        own = {
            table: [path for path in self.files[table] if path.endswith(f"/{table_file(table, shard)}")]
            for table in TABLES
            if table != "vocab"
        }
        files = own | {"vocab": self.files["vocab"]} if own["prompts"] else self.files
        return Database(
            self.directory, files, memory, derived=PROMPT_TABLES, norm_floor=norm_floor(self.record)
        )


def norm_floor(record: RunRecord) -> float:
    """The L2 norm below which a vector's lists are led by the final norm's bias; 0 where a run does not say."""
    return float(record.model.get("norm_floor") or 0.0)
