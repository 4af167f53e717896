"""Models and tokenizers, from a path, the hub or memory, ready for a backward pass that stops at activations."""

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

from backlens.errors import BacklensError
from backlens.models.blocks import ModelParts, find_parts
from backlens.models.checkpoint import (
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
from backlens.models.device_map import (
    Device,
    DeviceMapOptions,
    Placement,
    place,
    refuse_missing,
    stored_dtype,
)
from backlens.models.layout import Layout
from backlens.models.module_tree import input_device, verify_backward
from backlens.models.vocabulary import token_ids
from backlens.models.weight_keys import refuse_other_keys, verify_keys
from backlens.models.zero3 import Partitioning, Zero3

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Files of tokenizers."""
BITSANDBYTES_SWITCH = "support_avx512bf16_for_cpu"


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model in evaluation mode, with its tokenizer and parts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parts: ModelParts
    attention: Attention = "exact"
    placed: Mapping[str, Device] = field(default_factory=dict)
    """Devices of its parts, by path, if it lies on several."""
    partitioned: bool = False
    """True if each of several processes has a part of every weight (`zero3`)."""
    lens_copies: tuple[torch.device, ...] = ()
    """Devices with blocks, besides its own, that have room for a copy of the lens."""

    @property
    def device(self) -> torch.device:
        """The device of its inputs; for a model on several devices, also that of the lens."""
        return input_device(self.model)

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device that holds weights."""
        if not self.placed:
            return (str(self.device),)
        return tuple(sorted({str(device) for device in self.placed.values()}))

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """Ids that are tokens and that the model can predict, in ascending order."""
        return token_ids(self.tokenizer, self.parts.vocabulary)

    @property
    def offloaded(self) -> bool:
        """True if blocks are brought to a device while they compute, and autograd would keep their weights there.

        Of partitioned weights, autograd keeps only those that are sliced: experts'.
        """
        if self.partitioned:
            return any(block.experts is not None for block in self.parts.blocks)
        places = set(self.placed.values())
        return "disk" in places or ("cpu" in places and self.device.type != "cpu")


def quiet_transformers() -> None:
    """Turn off progress bars and advice of the loading libraries, which would break up a run's own lines."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def load_config(source: ModelSource) -> PretrainedConfig:
    """Read the model's configuration, without weights."""
    quiet_transformers()
    folder = model_folder(source)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(source, error) from error


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer. Raises BacklensError if it has none."""
    folder = model_folder(source)
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        if any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
            raise _unreadable(source, error) from error
        found = None
    # for some families transformers makes an empty tokenizer if there is no file
    if found is None or found.get_vocab().keys() <= found.get_added_vocab().keys():
        raise BacklensError(
            f"model: {source.path} has no tokenizer (tokenizer.json or the like); save the one that the model was "
            "trained with in the same directory, with its save_pretrained"
        )
    return found


def prove(source: ModelSource) -> Proof:
    """Hash every file of the weights. Raises BacklensError if there are none, or no tokenizer."""
    folder = model_files(source)
    files = stamps(folder, source)  # first, so that a later change is seen
    tokenizer = load_tokenizer(source)
    return Proof(weight_hash(folder, source), tokenizer_hash(tokenizer), str(tokenizer.chat_template), files)


def load_model(
    source: ModelSource,
    device: torch.device,
    device_map: DeviceMapOptions | None = None,
    zero3: Zero3 | None = None,
) -> LoadedModel:
    """Load weights (safetensors, unless pickles are allowed), freeze them, and find the model's parts.

    With `device_map`, each weight goes straight to its own device, and `device` is ignored. With `zero3`, this process
    has joined its group (`zero3.join`) and keeps its share of each weight; loading is then collective.

    `exact` attention is the eager one, or PyTorch's "math" kernel where the eager one computes something else:
    memory-efficient kernels make gradients depend on padding and batch. Evaluation mode is set because a model saved in
    train mode would run with dropout.
    """
    quiet_transformers()
    config = load_config(source)
    verify_checkpoint(source, config)
    tokenizer = load_tokenizer(source)
    # Else transformers starts a thread that has the hub open a pull request with safetensors.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    placement = Placement({})
    folder: str | None = None
    if device_map is not None:
        refuse_missing(device_map)
        placement = place(empty_model(source, config), stored_dtype(config, source.dtype), device_map)
        folder = _offload_folder(device_map) if "disk" in placement.devices.values() else None
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
        os.rmdir(folder)  # weights of the checkpoint's own type are read from its files
    if partitioning is not None:
        partitioning.engage(model)
    elif not placed:
        nn.Module.to(model, device)
    parts = find_parts(model, source.layout)
    verify_backward(model, [block.module for block in parts.blocks])
    copies = tuple(torch.device("cuda", gpu) for gpu in placement.lens_copies)
    return LoadedModel(model, tokenizer, parts, source.attention, placed, zero3 is not None, copies)


def adopt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout | None = None,
    attention: Attention = "exact",
) -> LoadedModel:
    """Find the parts of a model in memory. Call this, and everything that uses its result, inside `borrowed`.

    Raises BacklensError as `find_parts` does, and where a matrix passes no gradient.
    """
    parts = find_parts(model, layout)
    verify_backward(model, [block.module for block in parts.blocks])
    return LoadedModel(model, tokenizer, parts, attention)


@contextmanager
def borrowed(model: PreTrainedModel, attention: Attention = "exact") -> Iterator[None]:
    """Set evaluation mode, frozen weights and exact attention, as in a run; restore everything at the end."""
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config: Any = model.config
    own_attention, own_experts = config._attn_implementation, config._experts_implementation
    run_attention = exact_attention(config) if attention == "exact" else own_attention
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        if run_attention != own_attention:
            model.set_attn_implementation(run_attention)
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for parameter in trained:
            parameter.requires_grad_(True)
        if config._attn_implementation != own_attention:
            model.set_attn_implementation(own_attention)
        if config._experts_implementation != own_experts:
            model.set_experts_implementation(own_experts)


def verify_checkpoint(source: ModelSource, config: PretrainedConfig) -> None:
    """Raise BacklensError if the files of weights do not hold exactly the model's, by name."""
    folder = model_files(source)
    files = [folder / name for name in weight_names(folder, source.allow_pickle)]
    with _one_line_for_broken_files(source, config):
        verify_keys(source.path, files, config, empty_model(source, config))


def read_weights(source: ModelSource, config: PretrainedConfig, mapped: Mapping[str, Any]) -> PreTrainedModel:
    """Read the model with transformers; it is not frozen, and its parts are not checked.

    Raises BacklensError if a weight is not in the checkpoint, or one of the checkpoint's is not used.
    """
    unpacked = _unpacked(config, source.dtype)
    with _one_line_for_broken_files(source, config):
        found: Any = AutoModelForCausalLM.from_pretrained(
            model_files(source),
            trust_remote_code=source.trust_remote_code,
            dtype=source.dtype if source.dtype == "auto" else getattr(torch, source.dtype),
            # None takes pickles only where there are no safetensors; torch unpickles tensors and nothing else.
            use_safetensors=None if source.allow_pickle else True,
            ignore_mismatched_sizes=True,  # reported below instead
            output_loading_info=True,
            **({"attn_implementation": exact_attention(config)} if source.attention == "exact" else {}),
            **({"config": unpacked} if unpacked is not None else {}),
            **mapped,
        )
    model, info = found
    refuse_other_keys(source.path, info)
    if unpacked is not None:  # weights that were not packed still have the checkpoint's type
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
            raise _unreadable(source, error) from error  # most quantized forms need a certain device
        if "conversion of the weights" in str(error) or "loading state_dict" in str(error):
            raise _unreadable(source, error) from error
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise BacklensError(
            f"model: the pickle weights of {source.path} are broken or hold more than tensors; fetch them again, or "
            "convert them with save_pretrained"
        ) from error


def _widen(model: PreTrainedModel, source: ModelSource) -> None:
    """Convert all weights to `source.dtype`; buffers (rotary frequencies) keep their type."""
    for weight in model.parameters():
        if weight.is_meta:
            raise BacklensError(
                f"model: {source.path} has packed weights, which are not turned into {source.dtype} on their way from "
                "where they are offloaded to; give more --max-memory or GPUs, or leave out --dtype"
            )
        if weight.is_floating_point():
            weight.data = weight.data.to(getattr(torch, source.dtype))


UNPACKED = ("fp8", "mxfp8", "mxfp4")
"""Quantized forms that transformers turns into floats of any type when it reads them."""


def _unpacked(config: PretrainedConfig, dtype: Dtype) -> PretrainedConfig | None:
    """Return a configuration that turns packed weights into floats, if a type is given; else None."""
    packed = getattr(config, "quantization_config", None)
    if dtype == "auto" or not isinstance(packed, dict) or packed.get("quant_method") not in UNPACKED:
        return None
    config = copy.deepcopy(config)
    config.quantization_config = packed | {"dequantize": True}
    return config


def _tame_bitsandbytes(model: PreTrainedModel) -> None:
    """Keep bitsandbytes' 4-bit layers on a kernel with a backward pass.

    On CPUs with bfloat16 instructions they switch for good to a kernel without one when they first see an input without
    a graph: under `no_grad`, and in the first pass of checkpointing.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # 8-bit layers warn at every product
    for module in model.modules():
        if hasattr(module, BITSANDBYTES_SWITCH):
            setattr(module, BITSANDBYTES_SWITCH, False)


def _offload_folder(device_map: DeviceMapOptions) -> str:
    """Make a folder of this process's own: replicas on one machine may share the given one."""
    assert device_map.offload is not None
    try:
        os.makedirs(device_map.offload, exist_ok=True)
        return tempfile.mkdtemp(prefix="backlens-", dir=device_map.offload)
    except OSError as error:
        raise BacklensError(
            f"offload: cannot write to {device_map.offload}: {error.strerror or error}"
        ) from error


def exact_attention(config: PretrainedConfig) -> str:
    """Name the attention implementation whose gradients do not depend on padding or batch."""
    # the eager attention of transformers' Falcon adds ALiBi's slopes twice, in the mask and to the logits
    return "sdpa" if config.model_type == "falcon" and config.alibi else "eager"


def empty_model(source: ModelSource, config: PretrainedConfig) -> PreTrainedModel:
    """Make the model's modules without weights, on the meta device; quantized ones in their original form."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except ValueError as error:  # transformers has no causal language model of this family
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
