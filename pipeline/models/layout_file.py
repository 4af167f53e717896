"""Layouts as YAML, for architectures that are not known here: `backlens doctor` drafts one, `--anatomy` reads it.

    matrices:                      # by module name; paths from a block
      mlp.up: mlp.up_proj
      mlp.down: [mlp.down_proj, mlp.shared_expert.down_proj]    # blocks differ: each has one of them
      attn.q: {path: attn.c_attn, groups: 1, pieces: 3, start: 0, stop: 1}    # a part of a fused output
    experts: mlp.experts           # where routed experts are, if the model has any
    not-covered:                   # matrices left out of the tables, and what they are
      mlp.gate: the router
    logit-scale: 1.0               # what the head's output is multiplied by

A fused output is seen as (groups, pieces, width): a module is pieces start to stop of every group.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.errors import BacklensError, nearest
from pipeline.models.layout import MODULES, Cut, Layout, Matrix

KEYS = ("matrices", "experts", "not-covered", "logit-scale")
CUT_KEYS = ("groups", "pieces", "start", "stop")


def read_layout(path: str) -> Layout:
    """The layout of a YAML file. Raises BacklensError that names the file, the key and what is wrong with it."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BacklensError(f"--anatomy {path}: cannot be read: {' '.join(str(error).split())}") from error
    try:
        return _layout(content)
    except _Malformed as error:
        raise BacklensError(f"--anatomy {path}: {error}") from error


class _Malformed(Exception):
    """What is wrong with a description."""


def _layout(content: Any) -> Layout:
    described = _mapping("the description", content)
    _known(described, KEYS, "key")
    matrices = _mapping("matrices", described.get("matrices"))
    _known(matrices, MODULES, "module")
    experts, scale = described.get("experts"), described.get("logit-scale", 1.0)
    if experts is not None and not isinstance(experts, str):
        raise _Malformed(f"experts: give a path, not {experts!r}")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not scale:
        raise _Malformed(f"logit-scale: give a number other than 0, not {scale!r}")
    left_out = _mapping("not-covered", described.get("not-covered") or {})
    return Layout(
        {name: _alternatives(name, value) for name, value in matrices.items()},
        experts,
        {str(path): str(what) for path, what in left_out.items()},
        float(scale),
    )


def _alternatives(name: str, value: Any) -> tuple[Matrix, ...]:
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    return tuple(_matrix(name, each) for each in values)


def _matrix(name: str, value: Any) -> Matrix:
    if isinstance(value, str):
        return Matrix(value)
    described = _mapping(f"matrices: {name}", value)
    _known(described, ("path", *CUT_KEYS), f"key of {name}")
    numbers = [described.get(key) for key in CUT_KEYS]
    if not isinstance(described.get("path"), str) or not all(type(number) is int for number in numbers):
        raise _Malformed(f"matrices: {name}: give path, and the whole numbers {', '.join(CUT_KEYS)}")
    cut = Cut(**{key: described[key] for key in CUT_KEYS})
    if not (cut.groups > 0 and 0 <= cut.start < cut.stop <= cut.pieces):
        raise _Malformed(f"matrices: {name}: needs groups > 0 and 0 <= start < stop <= pieces")
    return Matrix(described["path"], cut)


def _mapping(what: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise _Malformed(f"{what}: a mapping is expected, e.g. `mlp.up: mlp.up_proj`")
    return value


def _known(described: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
    for key in described:
        if key not in known:
            hint = nearest(str(key), known) or f"; there are {', '.join(known)}"
            raise _Malformed(f"unknown {what} '{key}'{hint}")
