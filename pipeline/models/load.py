"""Models and tokenizers from a path or the hub, ready for a backward pass that stops at activations."""

import copy
import logging
import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
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
from pipeline.models.checkpoint import (
    Attention,
    Dtype,
    ModelSource,
    Proof,
    model_files,
    model_folder,
    stamps,
    tokenizer_hash,
    verify_proof,
    weight_hash,
    weight_names,
)
from pipeline.models.keys import refuse_other_keys, verify_keys
from pipeline.models.spread import Device, Placement, Spread, place, refuse_missing, stored_dtype
from pipeline.models.structure import input_device, verify_backward
from pipeline.models.vocabulary import token_ids
from pipeline.models.zero3 import Partitioning, Zero3

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""What tokenizers are kept in."""
BITSANDBYTES_SWITCH = "support_avx512bf16_for_cpu"


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
    folder = model_folder(source)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(source, error) from error


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    folder = model_folder(source)
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        if any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
            raise _unreadable(source, error) from error
        found = None
    # of some families transformers makes an empty one where there is no file
    if found is None or found.get_vocab().keys() <= found.get_added_vocab().keys():
        raise BacklensError(
            f"model: {source.path} has no tokenizer (tokenizer.json or the like); save the one that the model was "
            "trained with in the same directory, with its save_pretrained"
        )
    return found


def prove(source: ModelSource) -> Proof:
    """Read every file of the weights. Raises BacklensError if there are none, or no tokenizer."""
    folder = model_files(source)
    files = stamps(folder, source)  # first: what changes from here on is seen
    tokenizer = load_tokenizer(source)
    return Proof(weight_hash(folder, source), tokenizer_hash(tokenizer), str(tokenizer.chat_template), files)


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
    config = load_config(source)
    verify_checkpoint(source, config)
    tokenizer = load_tokenizer(source)
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
    verify_proof(source, tokenizer)
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


def verify_checkpoint(source: ModelSource, config: PretrainedConfig) -> None:
    """Raises BacklensError if the files of weights do not hold those of the model, each by its name."""
    folder = model_files(source)
    files = [folder / name for name in weight_names(folder, source.allow_pickle)]
    with _one_line_for_broken_files(source, config):
        verify_keys(source.path, files, config, empty_model(source, config))


def read_weights(source: ModelSource, config: PretrainedConfig, mapped: Mapping[str, Any]) -> PreTrainedModel:
    """The model as transformers reads it: not frozen, and its parts unchecked.

    Raises BacklensError if a weight is not read from the checkpoint, or one of the checkpoint's is left out.
    """
    unpacked = _unpacked(config, source.dtype)
    with _one_line_for_broken_files(source, config):
        found: Any = AutoModelForCausalLM.from_pretrained(
            model_files(source),
            trust_remote_code=source.trust_remote_code,
            dtype=source.dtype if source.dtype == "auto" else getattr(torch, source.dtype),
            # None takes pickles only where there are no safetensors; torch unpickles tensors and nothing else.
            use_safetensors=None if source.allow_pickle else True,
            ignore_mismatched_sizes=True,  # else it does not say which
            output_loading_info=True,
            **({"attn_implementation": exact_attention(config)} if source.attention == "exact" else {}),
            **({"config": unpacked} if unpacked is not None else {}),
            **mapped,
        )
    model, info = found
    refuse_other_keys(source.path, info)
    if unpacked is not None:  # transformers leaves what was not packed in the checkpoint's type
        _widen(model, source)
    return model


@contextmanager
def _one_line_for_broken_files(source: ModelSource, config: PretrainedConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _unreadable(source, error) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        packed = getattr(config, "quantization_config", None) is not None
        if packed and isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise _unreadable(source, error) from error  # most forms want a certain device
        if "conversion of the weights" in str(error) or "loading state_dict" in str(error):
            raise _unreadable(source, error) from error
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise BacklensError(
            f"model: the pickle weights of {source.path} are broken or hold more than tensors; fetch them again, or "
            "convert them with save_pretrained"
        ) from error


def _widen(model: PreTrainedModel, source: ModelSource) -> None:
    """Bring all weights to the type that is asked for; buffers (rotary frequencies) keep theirs."""
    for weight in model.parameters():
        if weight.is_meta:
            raise BacklensError(
                f"model: {source.path} has packed weights, which are not turned into {source.dtype} on their way from "
                "where they are offloaded to; give more --max-memory or GPUs, or leave out --dtype"
            )
        if weight.is_floating_point():
            weight.data = weight.data.to(getattr(torch, source.dtype))


UNPACKED = ("fp8", "mxfp8", "mxfp4")
"""Forms of weights that transformers turns into floats of any type when it reads them."""


def _unpacked(config: PretrainedConfig, dtype: Dtype) -> PretrainedConfig | None:
    """The configuration that asks for floats, where the weights are packed and a type is asked for."""
    packed = getattr(config, "quantization_config", None)
    if dtype == "auto" or not isinstance(packed, dict) or packed.get("quant_method") not in UNPACKED:
        return None
    config = copy.deepcopy(config)
    config.quantization_config = packed | {"dequantize": True}
    return config


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


def _unreadable(source: ModelSource, error: Exception) -> BacklensError:
    if "trust_remote_code" in str(error):  # of several messages, all with the argument to pass
        return BacklensError(
            f"model: {source.path} needs Python code that it brings with it, which is not run unasked; "
            "read that code and pass --trust-remote-code if you trust it"
        )
    said = " ".join(str(error).split()) or type(error).__name__
    return BacklensError(f"model: {source.path} cannot be loaded: {said}")
