"""Paths of a run's model and inputs, in a form that a published directory can hold.

`run.json` and `config.yaml` name a file relative to their own directory or to the home folder (`~/…`). For a file
elsewhere they hold its last name only, because an absolute path would publish how its author's machine is laid out. The
absolute paths go to the user's cache. So a run can be repeated from a moved or copied directory if its files are still
beside it, and on the machine that made it from anywhere.
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
"""Options of runs and of sweeps that may name a file or a folder."""


def recorded(options: Mapping[str, Any], directory: Directory) -> dict[str, Any]:
    """The options in the form of `run.json` and `config.yaml`; `out` becomes `.`, the directory of these files."""
    return {
        name: _portable(value, directory) if name in (*PATHS, *PATHS_BESIDE) and value is not None else value
        for name, value in options.items()
    } | ({"out": "."} if "out" in options else {})


def published_name(model: str) -> str:
    """The name of a model in cards and pages: its hub id, or the name of its folder."""
    path = _local(model)
    return model if path is None else os.path.basename(path) or model


def remember(record: RunRecord, options: Mapping[str, Any]) -> None:
    """Write the absolute paths of the run's files to the user's cache. A cache that cannot be written is no error."""
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
    """The options of `run.json` or `config.yaml` with paths that do not depend on the working directory."""
    remembered = _remembered(record)
    return {
        name: _found(value, directory, remembered.get(name))
        if name in (*PATHS, *PATHS_BESIDE) and isinstance(value, str)
        else value
        for name, value in options.items()
    }


def replayed_run(path: str) -> tuple[Directory, RunRecord] | None:
    """The run that wrote this `config.yaml`; None if the file is another one."""
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
    """The absolute path if `value` names a file or folder of this machine, None for a hub id or URL."""
    if "://" in value and not value.startswith("file://"):
        return None
    path = os.path.expanduser(value.removeprefix("file://"))
    return os.path.abspath(path) if os.path.isabs(path) or os.path.lexists(path) else None


def _found(value: str, directory: Directory, remembered: str | None) -> str:
    """A path that exists, or else the most likely one, which its reader then reports as missing."""
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
    # Records of earlier versions hold values as typed: a hub id, or a path relative to that working directory.
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
    """The cache file of a run, named by facts that do not change when its directory is moved, copied or resumed."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        return None
    identity = json.dumps([record.created_at, record.fingerprint], sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return os.path.join(cache, "backlens", "places", f"{name}.json")
