"""Models and tokenizers from a path or the hub, ready for a backward pass that stops at activations."""

import copy
import hashlib
import logging
import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pipeline.errors import BacklensError
from pipeline.models.anatomy import Anatomy, anatomy
from pipeline.models.layout import Layout
from pipeline.models.spread import Device, Placement, Spread, place, refuse_missing, stored_dtype
from pipeline.models.structure import input_device, verify_backward
from pipeline.models.vocabulary import token_ids
from pipeline.models.zero3 import Partitioning, Zero3

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["exact", "fast"]

_PICKLES = "pytorch_model*.bin"
"""The weights that transformers reads where there are no safetensors."""


BITSANDBYTES_SWITCH = "support_avx512bf16_for_cpu"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model, and how to load it."""

    path: str
    """A directory or a hub id."""
    revision: str | None = None
    dtype: Dtype = "auto"
    attention: Attention = "exact"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    layout: Layout | None = None
    """Where its blocks keep their matrices; None for what is known of its family."""


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model in evaluation mode, with its parts found."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    attention: Attention = "exact"
    placed: Mapping[str, Device] = field(default_factory=dict)
    """Where its parts are, by path, if it is spread over several devices."""
    partitioned: bool = False
    """Whether each of several processes has a part of every weight (`zero3`)."""
    lens_copies: tuple[torch.device, ...] = ()
    """Devices with blocks, beside its own, that have room for a lens."""

    @property
    def device(self) -> torch.device:
        """Where it takes its inputs; of a spread model, where the lens is too."""
        return input_device(self.model)

    @property
    def devices(self) -> tuple[str, ...]:
        """Every place that holds weights."""
        if not self.placed:
            return (str(self.device),)
        return tuple(sorted({str(device) for device in self.placed.values()}))

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """The ids that are tokens and that the model can predict, ascending."""
        return token_ids(self.tokenizer, self.anatomy.vocabulary)

    @property
    def offloaded(self) -> bool:
        """Whether blocks are brought to a device for as long as they compute, and autograd would keep what was brought.

        Of partitioned weights it keeps those that are sliced, which only experts do.
        """
        if self.partitioned:
            return any(block.experts is not None for block in self.anatomy.blocks)
        places = set(self.placed.values())
        return "disk" in places or ("cpu" in places and self.device.type != "cpu")


def quiet_transformers() -> None:
    """Progress bars and advice of the loading libraries would tear a run's own lines apart."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def load_config(source: ModelSource) -> PretrainedConfig:
    """Read the model's configuration alone: no weights."""
    quiet_transformers()
    try:
        return AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(source, error) from error


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(source, error) from error
    if len(tokenizer.get_vocab()) < 2:  # what transformers makes up where there are no files of a tokenizer
        raise BacklensError(
            f"model: {source.path} cannot be loaded: it has no tokenizer; put its tokenizer's files there "
            "(tokenizer.json, tokenizer_config.json)"
        )
    return tokenizer


def load_model(
    source: ModelSource, device: torch.device, spread: Spread | None = None, zero3: Zero3 | None = None
) -> LoadedModel:
    """Load weights (safetensors, unless pickles are allowed), freeze them, and find the model's parts.

    With `spread`, each weight goes straight to its place of several, and `device` is of no meaning. With `zero3`, this
    process has joined its group (`take_seat`) and keeps its share of each weight; loading is then collective.

    `exact` attention is the eager one, or PyTorch's "math" kernel where the eager one computes something else:
    memory-efficient kernels make gradients depend on padding and batch (DESIGN §8). Evaluation mode is forced because
    a model saved in train mode would run with dropout.
    """
    quiet_transformers()
    tokenizer, config = load_tokenizer(source), load_config(source)
    # Else transformers has a service of the hub open a pull request with safetensors, in a thread of this process.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    placement = Placement({})
    folder: str | None = None
    if spread is not None:
        refuse_missing(spread)
        placement = place(empty_model(source, config), stored_dtype(config, source.dtype), spread)
        folder = _offload_folder(spread) if "disk" in placement.devices.values() else None
    placed = dict(placement.devices)
    mapped = {"device_map": placed, "offload_folder": folder} if placed else {}
    partitioning = Partitioning(zero3, config, source.dtype) if zero3 is not None else None
    with partitioning.loading() if partitioning is not None else nullcontext():
        model = read_weights(source, config, mapped)
    model.eval().requires_grad_(False)
    _tame_bitsandbytes(model)
    if folder is not None and any(os.scandir(folder)):
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    elif folder is not None:
        os.rmdir(folder)  # the weights are read from where they are, as their type is the checkpoint's
    if partitioning is not None:
        partitioning.engage(model)
    elif not placed:
        nn.Module.to(model, device)
    parts = anatomy(model, source.layout)
    verify_backward(model, [block.module for block in parts.blocks])
    copies = tuple(torch.device("cuda", gpu) for gpu in placement.lens_copies)
    return LoadedModel(model, tokenizer, parts, source.attention, placed, zero3 is not None, copies)


def read_weights(source: ModelSource, config: PretrainedConfig, mapped: Mapping[str, Any]) -> PreTrainedModel:
    """The model as transformers reads it: not frozen, and its parts unchecked."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            source.path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            dtype=source.dtype if source.dtype == "auto" else getattr(torch, source.dtype),
            # None takes pickles only where there are no safetensors; torch unpickles tensors and nothing else.
            use_safetensors=None if source.allow_pickle else True,
            **({"attn_implementation": exact_attention(config)} if source.attention == "exact" else {}),
            **mapped,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _unreadable(source, error) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise BacklensError(
            f"model: the pickle weights of {source.path} are broken or hold more than tensors; fetch them again, or "
            "convert them with save_pretrained"
        ) from error


def _tame_bitsandbytes(model: PreTrainedModel) -> None:
    """Keep 4-bit layers on a kernel with a backward pass.

    On CPUs with bfloat16 instructions they change to one without, and for good, when they first see an input without
    a graph: in any `no_grad`, and in the first pass of checkpointing.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # 8-bit layers warn at every product
    for module in model.modules():
        if hasattr(module, BITSANDBYTES_SWITCH):
            setattr(module, BITSANDBYTES_SWITCH, False)


def _offload_folder(spread: Spread) -> str:
    """A folder of this process's own: replicas on one machine may be given the same place."""
    assert spread.offload is not None
    try:
        os.makedirs(spread.offload, exist_ok=True)
        return tempfile.mkdtemp(prefix="backlens-", dir=spread.offload)
    except OSError as error:
        raise BacklensError(
            f"offload: cannot write to {spread.offload}: {error.strerror or error}"
        ) from error


def exact_attention(config: PretrainedConfig) -> str:
    # the eager attention of transformers' Falcon adds ALiBi's slopes twice, in the mask and to the logits
    return "sdpa" if config.model_type == "falcon" and config.alibi else "eager"


def empty_model(source: ModelSource, config: PretrainedConfig) -> PreTrainedModel:
    """The model's modules without weights, on the meta device; quantized ones as they were before."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except ValueError as error:  # what transformers says of a family without causal language models
        raise BacklensError(
            f"model: {source.path} is a {config.model_type}, of which transformers has no causal language model"
        ) from error


def refuse_pickle(source: ModelSource) -> None:
    """Raises BacklensError if a local folder has its weights in pickles only, and they are not allowed."""
    folder = Path(source.path)
    if source.allow_pickle or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.glob(_PICKLES))
    if pickles:
        raise BacklensError(
            f"model: {source.path} holds only pickle weights ({pickles[0]}), which can run code when they are read; "
            "convert it with save_pretrained, or pass --allow-pickle if you trust it"
        )


def model_files(source: ModelSource) -> Path:
    """The local folder of the model's files; a hub id is downloaded to the hub's cache first."""
    if os.path.isdir(source.path):
        return Path(source.path)
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.jinja"]
    if source.allow_pickle:
        patterns.append(_PICKLES)
    try:
        folder = Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _unreadable(source, error) from error
    if not source.allow_pickle and not any(folder.glob("*.safetensors")):
        raise BacklensError(
            f"model: '{source.path}' has no safetensors weights on the hub; pickle weights can run code when they are "
            "read: convert it with save_pretrained, or pass --allow-pickle if you trust it"
        )
    return folder


def weight_hash(folder: Path, source: ModelSource) -> str:
    """SHA-256 over the configuration and every file that weights or code are read from, by name.

    Any changed weight is another model.
    """
    patterns = ["*.safetensors"]
    if source.allow_pickle:
        patterns.append(_PICKLES)
    if source.trust_remote_code:
        patterns.append("*.py")
    files = [*sorted(file for pattern in patterns for file in folder.glob(pattern)), folder / "config.json"]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the tokenizer as transformers would save it (vocabulary, merges, special tokens)."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{state}{tokenizer.special_tokens_map}".encode()).hexdigest()


def _unreadable(source: ModelSource, error: Exception) -> BacklensError:
    if "trust_remote_code" in str(error):  # of several messages, all with the argument to pass
        return BacklensError(
            f"model: {source.path} needs Python code that it brings with it, which is not run unasked; "
            "read that code and pass --trust-remote-code if you trust it"
        )
    there = isinstance(error, ImportError | SafetensorError)
    if there or os.path.isdir(source.path):
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return BacklensError(f"model: {source.path} cannot be loaded: {first_line}")
    return BacklensError(
        f"model: '{source.path}' is no directory here, and the hub has no such model or cannot be reached; "
        "give --model a directory that `save_pretrained` wrote, or a hub id such as owner/name"
    )
