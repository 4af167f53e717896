"""How wide the matrices of blocks are, and whether a description of them fits."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Conv1D

from pipeline.models.anatomy import Block, Located
from pipeline.models.layout import READS


def widths(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a module that multiplies by one matrix; None for tables, convolutions and anything else."""
    stated = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(stated[0], int) and isinstance(stated[1], int):
        return stated[0], stated[1]
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return None
    wide, high = weight.shape if isinstance(module, Conv1D) else weight.shape[::-1]
    return wide, high


def expert_widths(experts: Any, weight: str) -> tuple[int, int]:
    """(in, out) of one expert's matrix, out of a 3-D weight."""
    shape = getattr(experts, weight).shape
    return (shape[1], shape[2]) if experts.is_transposed else (shape[2], shape[1])


def misfits(blocks: Sequence[Block], d_model: int) -> list[str]:
    """What a description says that the matrices' widths do not bear out; a line for each, empty if it fits.

    Modules that read the residual stream are d_model wide at their input, those that write to it at their output;
    and the parts that a fused matrix is cut into hold every column of its output, each once.
    """
    return [
        f"block {index}: {problem}"
        for index, block in enumerate(blocks)
        for problem in _misfits(block, d_model)
    ]


def _misfits(block: Block, d_model: int) -> Iterator[str]:
    by_path: dict[str, dict[str, Located]] = {}
    for module, located in block.matrices.items():
        by_path.setdefault(located.path, {})[module] = located
    for path, modules in by_path.items():
        found = widths(block.module.get_submodule(path))
        if found is None:
            yield f"{path} is no matrix, and cannot be {', '.join(modules)}"
            continue
        parts = {module: _columns(located, found[1]) for module, located in modules.items()}
        undivided = [module for module, columns in parts.items() if columns is None]
        if undivided:
            yield f"{path}: its {found[1]} outputs do not divide into the groups and pieces of {', '.join(undivided)}"
            continue
        held = {module: columns for module, columns in parts.items() if columns is not None}
        yield from _uncovered(path, found[1], held, path in block.not_covered)
        for module, columns in held.items():
            width = found[0] if module in READS else len(columns)
            if width != d_model:
                side = "reads" if module in READS else "writes"
                yield f"{module} ({path}) {side} a width of {width}, and the model's is {d_model}"


def _columns(located: Located, high: int) -> list[int] | None:
    """The columns of a module in the output it is a part of; None where the cut does not divide it."""
    if located.cut is not None and high % (located.cut.groups * located.cut.pieces):
        return None
    return located.part_of(torch.arange(high)).tolist()


def _uncovered(path: str, high: int, held: dict[str, list[int]], rest_is_stated: bool) -> Iterator[str]:
    times = Counter(column for columns in held.values() for column in columns)
    twice = sum(count > 1 for count in times.values())
    names = ", ".join(held)
    if twice:
        yield f"{path}: {twice} of its {high} outputs are in more than one of {names}"
    if len(times) < high and not rest_is_stated:
        yield f"{path}: {high - len(times)} of its {high} outputs are in none of {names}"
