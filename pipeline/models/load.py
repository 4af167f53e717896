"""Models and tokenizers from a path or the hub, ready for a backward pass that stops at activations."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
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

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["exact", "fast"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model, and how to load it."""

    path: str
    """A directory or a hub id."""
    revision: str | None = None
    dtype: Dtype = "auto"
    attention: Attention = "exact"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model in evaluation mode, with its parts found."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy


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
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error


def load_model(source: ModelSource, device: torch.device) -> LoadedModel:
    """Load weights (safetensors only), freeze them, and find the model's parts.

    `exact` attention is the eager one: memory-efficient kernels make gradients depend on padding and batch
    (DESIGN §8). Evaluation mode is forced because a model saved in train mode would run with dropout.
    """
    quiet_transformers()
    tokenizer = load_tokenizer(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            dtype=source.dtype if source.dtype == "auto" else getattr(torch, source.dtype),
            use_safetensors=True,
            **({"attn_implementation": "eager"} if source.attention == "exact" else {}),
        )
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error
    model.eval().requires_grad_(False)
    nn.Module.to(model, device)
    return LoadedModel(model, tokenizer, anatomy(model))


def model_files(source: ModelSource) -> Path:
    """The local folder of the model's files; a hub id is downloaded to the hub's cache first."""
    if os.path.isdir(source.path):
        return Path(source.path)
    try:
        return Path(
            snapshot_download(
                source.path,
                revision=source.revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.jinja"],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _unreadable(source, error) from error


def weight_hash(folder: Path) -> str:
    """SHA-256 over every weight file and the configuration, by name: any changed weight is another model."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
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
    if os.path.isdir(source.path):
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return BacklensError(f"model: {source.path} cannot be loaded: {first_line}")
    return BacklensError(
        f"model: '{source.path}' is no directory here, and the hub has no such model or cannot be reached; "
        "give --model a directory that `save_pretrained` wrote, or a hub id such as owner/name"
    )
