"""One copy of a model, partitioned over the ranks of a process group by DeepSpeed's ZeRO-3.

Each rank keeps its share of every weight, gathers a module's weights while that module computes, and drops them
again; activations are whole on each rank, and each rank has its own prompts. Gathering is collective: every rank has
to make the same number of passes, in the same order, or all ranks wait for ever.

The lens's weights (final norm, unembedding) are copied whole to each rank, once: they are read for every vector,
between the backward pass's own gathers, and outside any module's forward pass, where a partitioned weight is empty.
That is 2.1 GB of Llama-3-70B's 141 GB; each batch gathers the whole model twice anyway.
"""

import copy
import importlib.util
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from transformers import PretrainedConfig, PreTrainedModel

from backlens.errors import BacklensError
from backlens.models.blocks import ModelParts
from backlens.models.device_map import stored_dtype

LONGEST_WAIT = timedelta(hours=1)
"""Time limit of one collective: the other ranks wait while rank 0 reads the whole checkpoint."""


@dataclass(frozen=True, slots=True)
class Zero3:
    """How a copy of a model is partitioned."""

    ranks: int
    offload: bool = False
    """Keep each rank's share in main memory, and bring it to the device when it is gathered."""


def refuse_unpartitionable(config: PretrainedConfig, dtype: str) -> None:
    """Raise BacklensError if DeepSpeed is missing, or cannot partition these weights."""
    if importlib.util.find_spec("deepspeed") is None:
        raise BacklensError(
            'sharding: zero3 needs DeepSpeed; install it with pip install "backlens[deepspeed]"'
        )
    if getattr(config, "quantization_config", None) is not None:
        raise BacklensError(
            "sharding: zero3 does not partition quantized weights; use --sharding accelerate for this model"
        )
    if dtype == "auto" and config.dtype is None:
        raise BacklensError(
            "sharding: zero3 must know the weights' type before they are read, and the model's config.json does not "
            "say it; give --dtype"
        )


def open_meeting(host: str) -> TCPStore:
    """Open the store where ranks find each other; the first rank listens, on a free port."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def go_to_meeting(host: str, port: int) -> TCPStore:
    """Connect to the first rank's store."""
    return TCPStore(host, port, is_master=False)


def join(rank: int, ranks: int, meeting: TCPStore, host: str) -> None:
    """Join the group of ranks that share a copy, and wait for all of them: NCCL between GPUs, gloo between CPUs.

    `host` is this process's address in the network that the ranks share.
    """
    has_gpu = torch.cuda.is_available()
    interface = _interface(host)
    # By default gloo listens at the address of the host's name, which other nodes may not reach.
    os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
    # DeepSpeed reads these. A rank sees one device, whose number is 0.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR=meeting.host, MASTER_PORT=str(meeting.port))
    os.environ["DS_ACCELERATOR"] = "cuda" if has_gpu else "cpu"
    torch.distributed.init_process_group(
        "nccl" if has_gpu else "gloo", store=meeting, rank=rank, world_size=ranks, timeout=LONGEST_WAIT
    )


def _interface(host: str) -> str:
    """Return the name of the network interface with this address."""
    import psutil  # comes with DeepSpeed

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host and address.family == socket.AF_INET for address in addresses):
            return name
    raise BacklensError(f"sharding: no network interface of this node has Ray's address {host}")


class Partitioning:
    """Partitions a model: `loading` around `from_pretrained`, then `engage`."""

    def __init__(self, zero3: Zero3, config: PretrainedConfig, dtype: str) -> None:
        refuse_unpartitionable(config, dtype)
        d_model = int(config.get_text_config().hidden_size)
        self._settings = _settings(zero3, stored_dtype(config, dtype), d_model)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Let transformers partition each weight when it reads it, inside the context."""
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        _use_ready_made_collectives()
        settings = HfDeepSpeedConfig(self._settings)  # transformers reads it as long as the object lives
        yield
        del settings

    def engage(self, model: PreTrainedModel) -> None:
        """Let a partitioned model gather each module's weights while it computes."""
        import deepspeed

        # the model's hooks keep the returned engine alive
        deepspeed.initialize(model=model, config=self._settings)


def _settings(zero3: Zero3, dtype: torch.dtype, d_model: int) -> dict[str, Any]:
    offload = {"offload_param": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    return {
        "train_micro_batch_size_per_gpu": 1,  # required; nothing is trained
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {
            "stage": 3,
            # Norms and other small weights stay whole: gathering each would cost a message and save nothing.
            "stage3_param_persistence_threshold": d_model,
            **(offload if zero3.offload else {}),
        },
    }


def _use_ready_made_collectives() -> None:
    """Keep DeepSpeed from compiling its own collectives for CPUs; a stale lock of that hangs later runs."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def whole_for_the_lens(parts: ModelParts) -> ModelParts:
    """Replace the parts that the lens reads by whole copies; collective."""
    return replace(
        parts,
        head=_whole(parts.head),
        final_norm=parts.final_norm and _whole(parts.final_norm),
        project_out=parts.project_out and _whole(parts.project_out),
    )


def _whole(module: nn.Module) -> nn.Module:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        whole = copy.deepcopy(module)
    for part in whole.modules():
        # DeepSpeed's hooks expect partitions, which the copy does not have
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            hooks.clear()
    return whole
