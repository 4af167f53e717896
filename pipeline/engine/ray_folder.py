"""The folder in which a Ray of this process's own keeps its logs and sockets.

Ray takes `ray` in RAY_TMPDIR, TMPDIR or /tmp. TMPDIR is often none for it: a scheduler's folder for a job is too long
for the path of a socket, and in /tmp the folder may be another user's.
"""

import os
import shutil
import stat
import sys
from pathlib import Path

from pipeline.errors import Interrupted

SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10"
LONGEST = 103 if sys.platform == "darwin" else 107
"""Bytes in the path of a Unix socket."""
ROOM = 50 * 2**20
"""What a session's logs and maps take, with something to spare."""
REMEDY = "set RAY_TMPDIR to a folder of your own with a short path, or do without Ray: --executor local"


def ray_folder() -> str:
    """The first that will do. Raises Interrupted if none does, or if RAY_TMPDIR, which somebody chose, does not."""
    chosen = os.environ.get("RAY_TMPDIR")
    if chosen:
        if misfit := _misfit(Path(chosen, "ray")):
            raise Interrupted(f"RAY_TMPDIR: Ray cannot keep its files in {chosen}, which {misfit}; {REMEDY}")
        return str(Path(chosen, "ray"))
    bases = [Path(base) for base in dict.fromkeys((os.environ.get("TMPDIR") or "/tmp", "/tmp"))]
    misfits: dict[Path, str] = {}
    for base in (*bases, *(_of_this_user(base) for base in bases)):
        misfit = _misfit(base / "ray")
        if misfit is None and base not in bases:
            misfit = _made_private(base)
        if misfit is None:
            return str(base / "ray")
        misfits[base] = misfit
    found = ", ".join(f"{base} {misfit}" for base, misfit in misfits.items())
    raise Interrupted(f"Ray finds no folder for its files ({found}); {REMEDY}")


def _of_this_user(base: Path) -> Path:
    return base / f"ray-{os.geteuid()}"


def _misfit(folder: Path) -> str | None:
    """Why Ray could not keep its files there; None if it can."""
    length = len(os.fsencode(folder / SOCKET))
    if length > LONGEST:
        return f"is {length - LONGEST} bytes too long for the path of a socket"
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not there.is_dir():
        return f"cannot be used, for {there} is no folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return "may not be written"
    return "has no room" if shutil.disk_usage(there).free < ROOM else None


def _made_private(folder: Path) -> str | None:
    """Make it, for Ray lets everybody write into its own; why not, if somebody else may have files in it."""
    try:
        folder.mkdir(0o700, exist_ok=True)
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    found = folder.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return None if is_ours else "is open to others"
