"""The device of each part of a model, when one copy lies on several devices.

Blocks are placed in order and never split: their output is d_model wide, so little crosses from one device to the
next. Everything outside the blocks (embeddings, norm, head) lies together on the last GPU and stays there: the lens
reads it outside the forward pass, where offloaded weights cannot be read.

Each GPU with blocks gets a copy of the lens; vectors do not move to the lens. Moving N vectors costs 4 d N bytes in
float32; a copy of the unembedding in half precision costs 2 V d once, which is less from N = V / 2 on. For Llama-3-70B
(V = 128,256) on three GPUs, a token has a vector for each of two matrices in 27 blocks per GPU, so 1,190 tokens pay
for the copy: a hundred prompts of 12 tokens. More important, a GPU with its own lens projects while the others do, and
projecting, with 2 V d operations per vector, is most of a run. So each GPU with blocks reserves the 2 V d bytes (2.1 GB
there). If that would push a block off the GPUs, only the last one has a lens.

A block that fits on no device is offloaded: it stays in main memory, or in the safetensors file, and is brought to a
device while it computes. Autograd would hold on to all weights so brought until the backward pass; so a model with an
offloaded block uses activation checkpointing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from backlens.errors import BacklensError
from backlens.models.module_tree import find_block_list

Device = int | str
"""A GPU by its index among those of the process, "cpu", or "disk"."""

FREE_SHARE = 0.8
"""Share of a GPU's free memory for weights; the rest is for activations and the lens's tiles."""


@dataclass(frozen=True, slots=True)
class DeviceMapOptions:
    """Devices and memory that a copy of a model may use in its process."""

    max_memory: Mapping[Device, int] = field(default_factory=dict)
    """Bytes for weights, by device; empty for all GPUs, or for main memory without GPUs."""
    offload: str | None = None
    """A folder for blocks that are read from disk; None if no block may be."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices of a copy of a model."""

    devices: Mapping[str, Device]
    """Device of every block and of every module outside them, by path."""
    lens_copies: tuple[int, ...] = ()
    """GPUs, besides the head's, with room for a copy of the lens; in the order of the backward pass."""


def place(model: PreTrainedModel, dtype: torch.dtype, options: DeviceMapOptions) -> Placement:
    """Place a model that has no weights yet. Raises BacklensError when it does not fit."""
    path, blocks = find_block_list(model)
    limits = dict(options.max_memory) or _all_devices()
    gpus = [device for device in limits if device != "cpu"]
    home: Device = gpus[-1] if gpus else "cpu"
    outside = dict(_outside(model, "", blocks))
    room = limits[home] - _bytes_outside(model, blocks, dtype)
    if room < 0:
        raise BacklensError(
            f"max-memory: embeddings, norm and head take {_gib(limits[home] - room)} and lie on one device, but "
            f"{_name(home)} has {_gib(limits[home])}; give it more"
        )
    limits = {"cpu": 0, **limits, home: room}
    others = [device for device in gpus if device != home]
    lens = lens_bytes(model, dtype)
    found = _place_blocks(blocks, dtype, limits | {gpu: max(0, limits[gpu] - lens) for gpu in others})
    copies = tuple(gpu for gpu in reversed(others) if isinstance(gpu, int) and gpu in found)
    if {"cpu", "disk"} & set(found) and home != "cpu":
        found, copies = _place_blocks(blocks, dtype, limits), ()
    on_disk = sum(device == "disk" for device in found)
    if on_disk and options.offload is None:
        raise BacklensError(
            f"max-memory: {on_disk} of {len(blocks)} blocks fit on no device; give more --max-memory or GPUs, or a "
            "folder to --offload them to"
        )
    placed: dict[str, Device] = dict.fromkeys(outside, home)
    return Placement(placed | {f"{path}.{index}": device for index, device in enumerate(found)}, copies)


def refuse_missing(options: DeviceMapOptions) -> None:
    """Raise BacklensError for a GPU that this process does not have."""
    there = torch.cuda.device_count()
    missing = [device for device in options.max_memory if isinstance(device, int) and device >= there]
    if missing:
        raise BacklensError(
            f"max-memory: there is no GPU {missing[0]}: a copy of the model has {there} here, numbered from 0 "
            "(--gpus-per-replica)"
        )


def stored_dtype(config: PretrainedConfig, dtype: str) -> torch.dtype:
    """Return the type of the weights: the given one, or the checkpoint's for "auto"."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _place_blocks(blocks: nn.ModuleList, dtype: torch.dtype, limits: Mapping[Device, int]) -> list[Device]:
    """Choose the blocks' devices, in order; "disk" for those that fit nowhere.

    Accelerate fills one device after the other, which leaves the later ones empty. So equal shares are tried first; if
    they leave blocks over, because a device has no room for its share, devices are filled in order.
    """
    from accelerate import infer_auto_device_map  # here: a model on one device needs no Accelerate
    from accelerate.utils import get_balanced_memory

    whole = sorted({type(block).__name__ for block in blocks})
    filled: Any = dict(limits)
    balanced: Any = get_balanced_memory(blocks, dict(filled), no_split_module_classes=whole, dtype=dtype)
    found: list[Device] = []
    for room in (balanced, filled):
        placed: Any = infer_auto_device_map(blocks, room, no_split_module_classes=whole, dtype=dtype)
        # with all of them on one device, Accelerate names only that
        found = [placed.get(str(index), placed.get("")) for index in range(len(blocks))]
        if not {"cpu", "disk"} & set(found):
            break
    return found


def _all_devices() -> dict[Device, int]:
    from accelerate.utils import get_max_memory

    free: dict[Device, int] = get_max_memory()
    gpus = {device: int(size * FREE_SHARE) for device, size in free.items() if device not in ("cpu", "disk")}
    return gpus or {"cpu": free["cpu"]}


def _outside(module: nn.Module, prefix: str, blocks: nn.ModuleList) -> Iterator[tuple[str, nn.Module]]:
    """Yield the largest modules without a block, with their paths."""
    for name, child in module.named_children():
        if child is blocks:
            continue
        if any(part is blocks for part in child.modules()):
            yield from _outside(child, f"{prefix}{name}.", blocks)
        else:
            yield f"{prefix}{name}", child


def _bytes_outside(model: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype) -> int:
    within = {id(weight) for weight in blocks.parameters()}
    # `parameters` counts a head that is tied to the embeddings once
    return sum(weight.numel() * dtype.itemsize for weight in model.parameters() if id(weight) not in within)


def lens_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Return the bytes of a lens, which are those of its unembedding."""
    head = model.get_output_embeddings()
    if head is None:
        return 0  # `find_parts` refuses such a model
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    vocabulary, width = weight.shape
    d_model = int(model.config.get_text_config().hidden_size)
    # a linear map before the head is folded into it, in float32
    return vocabulary * d_model * (dtype.itemsize if width == d_model else torch.float32.itemsize)


def _name(device: Device) -> str:
    return "main memory" if device == "cpu" else f"GPU {device}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
