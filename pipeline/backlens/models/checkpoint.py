"""The files of a checkpoint: where they are on this machine, which of them are read, and proof that they are the same.

A process resolves a hub id once, to a commit: configuration, tokenizer and weights are read from that commit's folder
in the hub's cache, even if the branch moves or the network fails. Other processes get the commit (`pinned`) and hashes
of its files (`Proof`), and compare their own copy with them.
"""

import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any, Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedTokenizerBase

from backlens.errors import BacklensError
from backlens.models.layout import Layout

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["exact", "fast"]

WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
PICKLES = "pytorch_model*.bin"
"""The weights that transformers reads where there are no safetensors."""
SMALL = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.py", "*.jinja")
"""All files that are read besides the weights."""
NESTED = tuple(f"*/*{suffix}" for suffix in (".json", ".txt", ".model", ".tiktoken"))
"""Copies in other formats (original/, onnx/), which are not read."""
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS_UNSAID = 3.0
"""Seconds of waiting for the hub before a message says so."""

LOGGER = logging.getLogger("backlens")


@dataclass(frozen=True, slots=True)
class Proof:
    """Hashes of a model's files, for other processes to compare with."""

    weights: str
    tokenizer: str
    template: str
    """The tokenizer's chat template, which its hash leaves out."""
    files: tuple[tuple[str | int, ...], ...]
    """Name, size, times of change and inode of each file of weights; while they are the same, so is the content."""


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
    """Where its blocks keep their matrices; None for the known layout of its family."""
    proof: Proof | None = None
    """The expected content of its files; None if it is not known yet."""


def model_folder(source: ModelSource) -> Path:
    """Return the folder of configuration and tokenizer; for a hub id, download them to the hub's cache first.

    Raises BacklensError if there is none, or if it holds something other than a whole model.
    """
    folder = Path(source.path) if os.path.isdir(source.path) else _hub_folder(source.path, source.revision)
    adapters = [name for name in ADAPTERS if (folder / name).exists()]
    if adapters:
        whole = (folder / "config.json").exists()
        raise BacklensError(
            f"model: {source.path} holds an adapter ({adapters[0]}){_base_of(folder)}, and adapters are not supported; "
            "merge it into its base model (peft's merge_and_unload, then save_pretrained) and give that folder"
            + (f", or move {' and '.join(adapters)} away to use the model without it" if whole else "")
        )
    if not (folder / "config.json").exists():
        raise BacklensError(f"model: {source.path} has no config.json{_instead(folder)}")
    return folder


def model_files(source: ModelSource) -> Path:
    """Return `model_folder` with the weights in it; for a hub id, download them to the hub's cache first.

    Raises BacklensError if there are no weights that may be read.
    """
    folder = model_folder(source)
    if not os.path.isdir(source.path):
        _fetch(source, folder, weight_names(folder, allow_pickle=False))
        if source.allow_pickle and not _there(folder, WEIGHTS):
            _fetch(source, folder, weight_names(folder, allow_pickle=True))
    refuse_pickle(source)
    names = weight_names(folder, source.allow_pickle)
    absent = [name for name in names if not (folder / name).exists()]
    if not absent:
        return folder
    if len(names) > 1:
        raise BacklensError(
            f"model: {source.path} lacks {absent[0]}, one of the {len(names)} files of its index; fetch it again"
        )
    if not os.path.isdir(source.path) and not source.allow_pickle:
        raise BacklensError(
            f"model: '{source.path}' has no safetensors weights on the hub; pickle weights can run code when they are "
            "read: convert it with save_pretrained, or pass --allow-pickle if you trust it"
        )
    raise BacklensError(
        f"model: {source.path} cannot be loaded: it has no weights ({absent[0]}){_instead(folder)}"
    )


def weights_here(source: ModelSource) -> bool:
    """Say whether all files of the weights are on this machine, without a download."""
    folder = model_folder(source)
    return all((folder / name).exists() for name in weight_names(folder, source.allow_pickle))


def refuse_pickle(source: ModelSource) -> None:
    """Raise BacklensError if the folder has weights in pickles only, and these are not allowed."""
    folder = model_folder(source)
    if source.allow_pickle or _there(folder, WEIGHTS):
        return
    pickles = sorted(path.name for path in folder.glob(f"{PICKLES}*"))
    if pickles:
        raise BacklensError(
            f"model: {source.path} holds only pickle weights ({pickles[0]}), which can run code when they are read; "
            "convert it with save_pretrained, or pass --allow-pickle if you trust it"
        )


def weight_names(folder: Path, allow_pickle: bool) -> tuple[str, ...]:
    """Name the files that transformers reads the weights from, whether they exist or not."""
    stated = _read_json(folder / "config.json").get("transformers_weights")
    name = str(stated or WEIGHTS)
    if stated is None and allow_pickle and not _there(folder, WEIGHTS):
        name = PICKLE
    index = folder / (name if name.endswith(".index.json") else f"{name}.index.json")
    if ((folder / name).exists() and index.name != name) or not index.exists():
        return (name,)
    homes = _read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise BacklensError(f"model: {index} names no files of weights (weight_map)")
    return tuple(sorted({str(home) for home in homes.values()}))


def commit_of(source: ModelSource) -> str | None:
    """Return the commit of a hub model; None for a folder."""
    return None if os.path.isdir(source.path) else _hub_folder(source.path, source.revision).name


def pinned(source: ModelSource, proof: Proof) -> ModelSource:
    """Make a `source` that means the same model in every process, with its proof."""
    if os.path.isdir(source.path):
        return replace(source, path=os.path.abspath(source.path), proof=proof)
    return replace(source, revision=commit_of(source), proof=proof)


def verify_proof(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise BacklensError if the files that were just loaded differ from `source.proof`."""
    proof = source.proof
    if proof is None:
        return
    folder = model_files(source)
    same = stamps(folder, source) == proof.files or weight_hash(folder, source) == proof.weights
    found = tokenizer_hash(tokenizer), str(tokenizer.chat_template)
    if not same or found != (proof.tokenizer, proof.template):
        raise BacklensError(
            f"model: {source.path} has {'another tokenizer' if same else 'other weights'} on {socket.gethostname()} "
            f"({folder}) than where the run was started, or has changed since; give every worker the same files, and "
            "run the same command again"
        )


def weight_hash(folder: Path, source: ModelSource) -> str:
    """Hash the configuration and every file of weights or code, with their names (SHA-256)."""
    files = _hashed(folder, source)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves Python to other threads
        hashes = pool.map(_file_hash, files)
        lines = [f"{file.name} {found}\n" for file, found in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the tokenizer as transformers would save it: vocabulary, merges, special tokens (SHA-256)."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{state}{tokenizer.special_tokens_map}".encode()).hexdigest()


def _hashed(folder: Path, source: ModelSource) -> list[Path]:
    names = weight_names(folder, source.allow_pickle)
    code = sorted(folder.glob("*.py")) if source.trust_remote_code else []
    return [*(folder / name for name in names), *code, folder / "config.json"]


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stamps(folder: Path, source: ModelSource) -> tuple[tuple[str | int, ...], ...]:
    """Read the facts that tell a changed file of weights without reading it."""
    found = [(file.name, file.stat()) for file in _hashed(folder, source)]
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in found)


def _there(folder: Path, name: str) -> bool:
    """Say whether the folder has such weights, in one file or in several."""
    stated = _read_json(folder / "config.json").get("transformers_weights")
    return stated is not None or (folder / name).exists() or (folder / f"{name}.index.json").exists()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BacklensError(f"model: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BacklensError(f"model: {path} is no JSON object")
    return content


def _base_of(folder: Path) -> str:
    config = folder / ADAPTERS[0]
    base = _read_json(config).get("base_model_name_or_path") if config.exists() else None
    return f" of {base}" if base else ""


def _instead(folder: Path) -> str:
    """Say what a folder without a model holds, and what to give instead."""
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return f", but {gguf[0]}; {GGUF}"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    held = f", but {others[0]}, which transformers does not read" if others else ""
    return f"{held}; give a directory that `save_pretrained` wrote, or a hub id such as owner/name"


GGUF = "GGUF files are not supported; give the safetensors model that it was made from"


# The hub


@cache
def _hub_folder(name: str, revision: str | None) -> Path:
    """Return a commit's folder in the hub's cache, with all small files. Raises BacklensError if that fails."""
    if os.path.isfile(name):
        advice = GGUF if name.endswith(".gguf") else "give the directory that it is in"
        raise BacklensError(f"model: {name} is a file; {advice}")
    if os.path.isabs(name) or name.startswith((".", "~")):
        raise BacklensError(
            f"model: there is no directory {name} on {socket.gethostname()}; give one that `save_pretrained` wrote, "
            "and that every worker sees under this path"
        )
    with _said(f"waiting for the hub to answer for {name}"):
        if revision is not None and COMMIT.fullmatch(revision):
            cached = _cached(name, revision)
            if cached is not None:
                return cached
        elif not _hub_answers(name, revision):
            return _snapshot(name, revision, SMALL, local=True)
        return _snapshot(name, revision, SMALL)


def _cached(name: str, commit: str) -> Path | None:
    """Return the commit's folder if it is in the cache, as far as that is known without the hub."""
    try:
        folder = Path(
            snapshot_download(name, revision=commit, allow_patterns=list(SMALL), local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    complete = (folder / "config.json").exists() and any(folder.glob("*token*"))
    return folder if complete else None


def _hub_answers(name: str, revision: str | None) -> bool:
    """Say whether the hub answers: asked once, with a time limit, because all later calls would wait in turn.

    Raises BacklensError if it has no such revision.
    """
    try:
        HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except RevisionNotFoundError as error:
        raise BacklensError(
            f"model: '{name}' has no revision '{revision}' on the hub; --revision is a branch, a tag or a commit"
        ) from error
    except HFValidationError as error:
        raise _not_there(name, revision) from error
    except Exception:  # noqa: BLE001 (the transport is another library in each version of the hub's)
        return False
    return True


def _fetch(source: ModelSource, folder: Path, names: Sequence[str]) -> None:
    """Download those of the commit's files that are missing here; skip one that the hub does not have."""
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        with _said(f"waiting for the hub to send the weights of {source.path}"):
            _snapshot(source.path, folder.name, absent)


def _snapshot(name: str, revision: str | None, patterns: Sequence[str], *, local: bool = False) -> Path:
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(NESTED),
                local_files_only=local,
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _not_there(name, revision) from error


def _not_there(name: str, revision: str | None) -> BacklensError:
    at = f" at '{revision}'" if revision is not None else ""
    return BacklensError(
        f"model: '{name}'{at} is no directory and not in the hub's cache on {socket.gethostname()}, and the hub has no "
        "such model or cannot be reached; give --model a directory that `save_pretrained` wrote, or a hub id such as "
        "owner/name"
    )


@contextmanager
def _said(text: str) -> Iterator[None]:
    """Log `text` as an event of the run if the body takes long."""
    timer = Timer(SECONDS_UNSAID, lambda: LOGGER.info("note", extra={"fields": {"text": text}}))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
