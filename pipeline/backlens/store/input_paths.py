"""Where a run's model and inputs lie, in words that a published directory can hold.

`run.json` and `config.yaml` name a file relative to their own directory, or to the home folder (`~/…`); of what lies
far from both they hold the name alone, for a whole path says how its author's machine is laid out. The whole paths go
to the user's cache. So a directory that is moved or copied is replayed where its files lie beside it as before, and on
the machine that made it wherever it is.
"""

import contextlib
import hashlib
import json
import os
import posixpath
from collections.abc import Mapping
from typing import Any

from backlens.errors import BacklensError
from backlens.store.directory import Directory, replacing
from backlens.store.run_record import CONFIG_FILE, RunRecord, find_run

PATHS = ("model", "anatomy", "prompts", "offload", "edits", "text", "statistics", "editor")
PATHS_BESIDE = ("untouched", "held_out")
"""The options, of runs and of sweeps, that may name a file or a folder."""


def recorded(options: Mapping[str, Any], directory: Directory) -> dict[str, Any]:
    """The options as `run.json` and `config.yaml` hold them; `out` is the directory that these are in."""
    return {
        name: _portable(value, directory) if name in (*PATHS, *PATHS_BESIDE) and value is not None else value
        for name, value in options.items()
    } | ({"out": "."} if "out" in options else {})


def published_name(model: str) -> str:
    """A model as cards and pages call it: its hub id, or its folder's name."""
    path = _local(model)
    return model if path is None else os.path.basename(path) or model


def remember(record: RunRecord, options: Mapping[str, Any]) -> None:
    """Keep the whole paths of this run's files for this user. A cache that cannot be written is left out."""
    paths = {
        name: path
        for name in (*PATHS, *PATHS_BESIDE)
        if isinstance(value := options.get(name), str) and (path := _local(value)) is not None
    }
    file = _cache_file(record)
    if not paths or file is None:
        return
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with replacing(file) as temporary, open(temporary, "w", encoding="utf-8") as stream:
            json.dump(paths, stream)


def located(options: Mapping[str, Any], directory: Directory, record: RunRecord) -> dict[str, Any]:
    """The options of a run's own files, with paths that mean the same wherever this process stands."""
    remembered = _remembered(record)
    return {
        name: _found(value, directory, remembered.get(name))
        if name in (*PATHS, *PATHS_BESIDE) and isinstance(value, str)
        else value
        for name, value in options.items()
    }


def replayed_run(path: str) -> tuple[Directory, RunRecord] | None:
    """The run whose own `config.yaml` this is; None if it is another file of options."""
    folder, name = os.path.split(path)
    if name != CONFIG_FILE:
        return None
    directory = Directory.at(folder or ".")
    record = find_run(directory)
    if record is None:
        return None
    if record.kind == "sweep":
        raise BacklensError(
            f"{path}: holds the options of an edit sweep, which this command does not take; "
            "give the `backlens edit sweep` again that made it"
        )
    return directory, record


def _portable(value: str, directory: Directory) -> str:
    path = _local(value)
    if path is None:
        return value
    home = os.path.expanduser("~")
    if directory.is_local:
        shared = os.path.commonpath([path, directory.root])
        if shared != "/" and (not _within(path, home) or _within(shared, home)):
            relative = os.path.relpath(path, directory.root)
            return relative if relative.startswith("..") else posixpath.join(".", relative)
    if _within(path, home):
        return posixpath.join("~", os.path.relpath(path, home))
    return os.path.basename(path)


def _local(value: str) -> str | None:
    """The absolute path of what is named, if it is a file or folder of this machine and no hub id or URL."""
    if "://" in value and not value.startswith("file://"):
        return None
    path = os.path.expanduser(value.removeprefix("file://"))
    return os.path.abspath(path) if os.path.isabs(path) or os.path.lexists(path) else None


def _found(value: str, directory: Directory, remembered: str | None) -> str:
    """A path that is there, or else the likeliest one, which its reader then says is missing."""
    if "://" in value or os.path.isabs(value):
        return remembered if remembered is not None and not os.path.lexists(value) else value
    if value.startswith("~"):
        near = os.path.expanduser(value)
    else:
        near = os.path.normpath(os.path.join(directory.root, value)) if directory.is_local else None
    if near is not None and os.path.lexists(near):
        return near
    if remembered is not None and os.path.lexists(remembered):
        return remembered
    # Files of earlier versions hold paths as they were typed: a hub id, or relative to where that was.
    is_marked = value.startswith(("./", "../", "~"))
    return near if near is not None and is_marked and not os.path.lexists(value) else value


def _within(path: str, folder: str) -> bool:
    return folder not in ("", "/", "~") and (path == folder or path.startswith(folder.rstrip("/") + "/"))


def _remembered(record: RunRecord) -> dict[str, str]:
    file = _cache_file(record)
    if file is None:
        return {}
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _cache_file(record: RunRecord) -> str | None:
    """By what stays of a run when its directory is moved, copied or resumed."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        return None
    identity = json.dumps([record.created_at, record.fingerprint], sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return os.path.join(cache, "backlens", "places", f"{name}.json")
