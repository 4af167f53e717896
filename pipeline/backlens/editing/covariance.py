"""The second moments C = E[x xᵀ] of a matrix's inputs over a text: what the closed forms keep from changing.

ROME (arXiv 2202.05262, §3.1) and MEMIT (arXiv 2210.07229, §4.2) estimate them over Wikipedia; any text will do that
the model should go on reading as before. Texts are streamed: a batch's inputs are added up and forgotten.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backlens.capture.batch import make_batch
from backlens.capture.packing import pack
from backlens.editing.delta import matrix
from backlens.editing.forward import run_model
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel
from backlens.prompts.jsonl_csv import jsonl_rows
from backlens.prompts.prompt import Rejected
from backlens.prompts.source import Source
from backlens.prompts.tokenize import context_length
from backlens.store.directory import replacing

FORMAT = "backlens-moments-1"
TEXTS_AT_ONCE = 512


@dataclass(frozen=True)
class Moments:
    """C by layer for one module, and over how many tokens."""

    module: str
    tokens: int
    of_layer: Mapping[int, Float[Tensor, "d_in d_in"]]
    """Float32: means over tokens, padding not counted."""

    def at(self, layer: int) -> Float[Tensor, "d_in d_in"]:
        """Raises BacklensError for a layer that was not measured."""
        if layer not in self.of_layer:
            there = ", ".join(map(str, sorted(self.of_layer)))
            raise BacklensError(f"statistics: hold layers {there}, not {layer}; measure it too")
        return self.of_layer[layer]

    def save(self, path: str, model_digest: str) -> None:
        about = {"format": FORMAT, "module": self.module, "tokens": str(self.tokens), "model": model_digest}
        try:
            with replacing(path) as temporary:  # several workers may measure the same at a time
                save_file(
                    {str(layer): c.contiguous() for layer, c in self.of_layer.items()}, temporary, about
                )
        except (OSError, SafetensorError) as error:
            raise BacklensError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str, model_digest: str) -> "Moments":
        """Raises BacklensError for another kind of file, and for another model's statistics."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise BacklensError(f"{path}: not statistics that `backlens edit` wrote")
                if about["model"] != model_digest:
                    raise BacklensError(
                        f"{path}: the statistics of another model; name another file with --statistics"
                    )
                of_layer = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise BacklensError(f"{path}: cannot be read: {error}") from error
        return cls(about["module"], int(about["tokens"]), of_layer)


@torch.no_grad()
def measure(
    loaded: LoadedModel,
    texts: Iterable[str],
    layers: Sequence[int],
    module: str = "mlp.down",
    batch_tokens: int = 4096,
) -> Moments:
    """One pass over `texts`, which may be of any number. A text longer than the model reads is cut off there."""
    sums: dict[int, Tensor] = {}
    tokens = 0
    with ExitStack() as hooks:
        mask: list[Tensor] = []
        for layer in layers:
            matrix(loaded, layer, module)  # refuses what is not there
            block = loaded.parts.blocks[layer]
            submodule = block.module.get_submodule(block.matrices[module].path)
            handle = submodule.register_forward_hook(partial(_add, sums, layer, mask))
            hooks.callback(handle.remove)
        for ids in _batches(loaded, texts, batch_tokens):
            batch = make_batch([(each, (0,)) for each in ids], loaded.device)
            mask[:] = [batch.mask]
            run_model(loaded, batch)
            tokens += int(batch.mask.sum())
    if not tokens:
        raise BacklensError("text: holds no tokens to measure statistics over")
    return Moments(module, tokens, {layer: (total / tokens).float() for layer, total in sums.items()})


def _add(
    sums: dict[int, Tensor], layer: int, mask: list[Tensor], _m: nn.Module, args: tuple[Any, ...], _o: Any
) -> None:
    x = args[0].reshape(-1, args[0].shape[-1])[mask[0].to(args[0].device).flatten()].float()
    product = (x.T @ x).double().cpu()  # sums of many terms: float32 would lose the last ones
    sums[layer] = sums[layer] + product if layer in sums else product


def _batches(loaded: LoadedModel, texts: Iterable[str], batch_tokens: int) -> Iterator[list[list[int]]]:
    longest = context_length(loaded.model.config)
    texts = iter(texts)
    while chunk := list(islice(texts, TEXTS_AT_ONCE)):
        ids = [each[:longest] for each in loaded.tokenizer(chunk)["input_ids"] if each]
        for indices in pack([len(each) for each in ids], batch_tokens):
            yield [ids[index] for index in indices]


def read_texts(path: str) -> Iterator[str]:
    """A text per line; of JSON Lines the field `text`."""
    source = Source(path)
    if not source.exists():
        raise BacklensError(f"{path}: no such file; check the path given with --text")
    if source.suffix != ".jsonl":
        yield from (line.decode("utf-8", "replace").strip() for line in source.lines() if line.strip())
        return
    for row in jsonl_rows(source):
        if isinstance(row, Rejected):
            raise BacklensError(row.message)
        if not isinstance(row.values.get("text"), str):
            raise BacklensError(f"{row.where}: no field 'text'; give each line one")
        yield row.values["text"]


def model_digest(loaded: LoadedModel) -> str:
    """Tells models apart by samples of every parameter: quick, where a hash of all bits would take long."""
    digest = hashlib.sha256()
    for name, parameter in loaded.model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def damped(moments: Float[Tensor, "d_in d_in"], share: float = 1e-4) -> Float[Tensor, "d_in d_in"]:
    """C in float64 with a small multiple of its mean eigenvalue on the diagonal, so that it can be inverted."""
    c = moments.double()
    return c + share * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
