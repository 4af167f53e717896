"""The names of a checkpoint's weights: they have to be exactly those of its model.

transformers fills missing weights with random numbers, and leaves out those that it does not know.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from backlens.errors import BacklensError
from backlens.models.module_tree import find_block_list

EXPERT = re.compile(r"(.*\bexperts\.)(\d+)\.(.+)")
NAMED = 3
"""Names that a message lists; it counts the others."""


def refuse_other_keys(path: str, info: Mapping[str, Any]) -> None:
    """Raise BacklensError for weights that transformers did not find or did not know (`output_loading_info`).

    It does not list weights that are tied to others, or that the model's class ignores.
    """
    wrong = [
        f"{name} has the shape {_shape(held)}, not {_shape(expected)}"
        for name, held, expected in sorted(info["mismatched_keys"])
    ]
    told = [
        _told("lacks", info["missing_keys"]),
        _told("holds", info["unexpected_keys"], ", which the model does not have"),
        "; ".join(wrong[:NAMED]) + (f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""),
        "; ".join(info["error_msgs"][:NAMED]),
    ]
    if any(told):
        raise BacklensError(
            f"model: the weights of {path} are not those of its config.json: {'; '.join(filter(None, told))}; "
            "give the whole checkpoint of a causal language model, with the configuration that it was saved with"
        )


def verify_keys(
    path: str, files: Sequence[Path], config: PretrainedConfig, skeleton: PreTrainedModel
) -> None:
    """Do the same from the names and shapes in the files, before any weight is read.

    Loading with DeepSpeed does not report weights that the model does not have, and a class may ignore further blocks
    where `config` states too few.
    """
    held = _headers(files)
    _refuse_missing_experts(path, held)
    if getattr(config, "quantization_config", None) is not None:
        _refuse_unscaled(path, held)
        return  # packed into tensors of other names and shapes
    _refuse_further_blocks(path, held, skeleton)
    try:
        found: Any = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict={name: torch.empty(shape, device="meta") for name, (_, shape) in held.items()},
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError as error:  # a conversion of names and shapes that does not work out
        raise BacklensError(
            f"model: the weights of {path} are not those of its config.json: {error}"
        ) from error
    refuse_other_keys(path, found[1])


def _headers(files: Sequence[Path]) -> dict[str, tuple[str, Sequence[int]]]:
    """Read type and shape of each tensor, by name, without the weights."""
    held: dict[str, tuple[str, Sequence[int]]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
                held |= {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        else:
            pickled = torch.load(file, map_location="meta", weights_only=True)
            held |= {name: (str(tensor.dtype), tensor.shape) for name, tensor in pickled.items()}
    return held


def _refuse_missing_experts(path: str, held: Iterable[str]) -> None:
    """Raise BacklensError that names a missing expert: transformers stacks experts without saying which is missing."""
    there: defaultdict[str, defaultdict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name in held:
        if found := EXPERT.fullmatch(name):
            there[found[1]][found[3]].add(int(found[2]))
    missing = [
        f"{stem}{index}.{part}"
        for stem, parts in there.items()
        for index in range(max(set().union(*parts.values())) + 1)
        for part, indices in parts.items()
        if index not in indices
    ]
    if missing:
        raise BacklensError(
            f"model: the weights of {path} are not whole: they lack {_some(missing)}; fetch them again"
        )


def _refuse_unscaled(path: str, held: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """Raise BacklensError for a matrix of 8-bit floats without its scale."""
    scaled = {name.rpartition(".")[0] for name in held if "scale" in name.rpartition(".")[2]}
    bare = [
        name
        for name, (dtype, _) in held.items()
        if dtype.startswith("F8_E4") and name.endswith(".weight") and name.rpartition(".")[0] not in scaled
    ]
    if bare:
        raise BacklensError(
            f"model: the weights of {path} are not whole: no scale for {_some(bare)}; fetch them again"
        )


def _refuse_further_blocks(path: str, held: Iterable[str], skeleton: PreTrainedModel) -> None:
    """Raise BacklensError for blocks behind the last one, unless they are heads for further tokens."""
    path_in_model, blocks = find_block_list(skeleton)
    without_prefix = path_in_model.partition(".")[2] or path_in_model
    block = re.compile(rf"(?:{re.escape(path_in_model)}|{re.escape(without_prefix)})\.(\d+)\.(.+)")
    parts: defaultdict[int, set[str]] = defaultdict(set)
    for name in held:
        if found := block.fullmatch(name):
            parts[int(found[1])].add(found[2])
    usual = set().union(*(parts[index] for index in range(len(blocks))))
    further = [index for index in parts if index >= len(blocks) and parts[index] <= usual]
    if further:
        raise BacklensError(
            f"model: the weights of {path} are not those of its config.json: they hold {max(further) + 1} blocks, and "
            f"the configuration has {len(blocks)} (num_hidden_layers); give it the number that the checkpoint has"
        )


def _told(verb: str, names: Iterable[str], more: str = "") -> str:
    return f"the checkpoint {verb} {_some(names)}{more}" if names else ""


def _some(names: Iterable[str]) -> str:
    """Write `a, b, c and 4 more`, with blocks in order."""
    ordered = sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    rest = len(ordered) - NAMED
    return ", ".join(ordered[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _shape(shape: Iterable[int] | Tensor) -> str:
    return " × ".join(map(str, shape))
