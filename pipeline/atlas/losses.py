"""Which of the files that a question reads is missing or damaged, looked for when DuckDB fails."""

import posixpath
from collections.abc import Mapping, Sequence

from pipeline.atlas.manifest import ATLAS, find_manifest
from pipeline.store.commit import committed
from pipeline.store.files import Directory
from pipeline.store.verify import losses, lost_files


def find_loss(directory: Directory, files: Mapping[str, Sequence[str]]) -> str | None:
    """The first of these files (locations, by table) that is not as it was written, and what to do, in one line."""
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
