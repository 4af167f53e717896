"""Activations of the model that edits need: logits, values at a module, and second moments of a matrix's inputs.

The second moments C = E[x xᵀ] say which inputs an edit should not change. ROME (arXiv 2202.05262, §3.1) and MEMIT
(arXiv 2210.07229, §4.2) estimate them over Wikipedia; any text serves that the model should go on reading as before.
Texts are streamed: the inputs of a batch are added to the sum and not kept.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backlens.capture.batch import Batch, make_batch
from backlens.capture.hooks import only_loss_positions
from backlens.capture.packing import pack
from backlens.editing.delta import matrix
from backlens.editing.request import Request
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel
from backlens.prompts.jsonl_csv import jsonl_rows
from backlens.prompts.prompt import Prompt, Rejected, SubjectPlace
from backlens.prompts.source import Source
from backlens.prompts.tokenize import Example, context_length, tokenize
from backlens.store.directory import replacing

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
BATCH_TOKENS = 2048


def encode(
    loaded: LoadedModel,
    pairs: Sequence[tuple[str, str]],
    where: str,
    places: Iterable[SubjectPlace | None] = (),
) -> list[Example]:
    """(prompt, target) texts as token ids, by the rules of `backlens run`; `places` are the places of the subjects.

    Raises BacklensError for a pair without tokens, or with more than the model reads.
    """
    prompts = [
        Prompt(index, prompt, target, where, slot=place)
        for index, ((prompt, target), place) in enumerate(
            zip(pairs, chain(places, repeat(None)), strict=False)
        )
    ]
    context = context_length(loaded.model.config)
    encoded = tokenize(
        prompts,
        loaded.tokenizer,
        prepend_bos="auto",
        target_mode="all",
        context=context,
        rows=loaded.parts.rows,
    )
    for one in encoded:
        if isinstance(one, Rejected):
            raise BacklensError(one.message)
    return [one for one in encoded if isinstance(one, Example)]


def wordings(
    loaded: LoadedModel, request: Request, prefixes: Sequence[str], ending: str | None = None
) -> list[Example]:
    """The request's prompt and new target after each of `prefixes` ("" leaves the prompt as it is)."""
    target = request.target_new if ending is None else ending
    place = request.subject_place()
    return encode(
        loaded,
        [(before + request.prompt, target) for before in prefixes],
        request.where,
        [place and place.behind(before) for before in prefixes],
    )


def subject_last(example: Example, where: str) -> int:
    """The position of the subject's last token. Raises BacklensError if the prompt does not name the subject."""
    if example.subject_end is None:
        raise BacklensError(
            f"{where}: this method changes the subject's last position: give a 'subject' that the prompt names"
        )
    return example.subject_end - 1


@contextmanager
def _exactly(loaded: LoadedModel) -> Iterator[None]:
    with ExitStack() as stack:
        if loaded.attention == "exact":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def run_model(loaded: LoadedModel, batch: Batch) -> Any:
    """The model's output for a batch, with exact attention where the model has it."""
    with _exactly(loaded):
        return loaded.model(
            input_ids=batch.input_ids,
            attention_mask=batch.mask.long(),
            position_ids=(batch.mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
        )


def logits_of(loaded: LoadedModel, batch: Batch) -> Float[Tensor, "prompt step vocabulary"]:
    """The logits that predict each target token, float32."""
    with only_loss_positions(loaded.parts.head, batch.loss_positions):
        return run_model(loaded, batch).logits.float()


def batches(
    loaded: LoadedModel, sequences: Sequences, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[int], Batch]]:
    """Padded batches of sequences of similar length, each with the indices of its sequences."""
    lengths = [len(prompt) + len(target) - 1 for prompt, target in sequences]
    for indices in pack(lengths, batch_tokens):
        yield indices, make_batch([sequences[index] for index in indices], loaded.device)


class _Enough(BaseException):
    """Ends a forward pass before its later layers, which are not needed."""


@dataclass(frozen=True)
class EditSite:
    """A place in the model where values are read: the input or the output of a module or block."""

    module: nn.Module
    side: str = "input"


def down_input(loaded: LoadedModel, layer: int, module: str = "mlp.down") -> EditSite:
    """The input of a weight matrix."""
    block = loaded.parts.blocks[layer]
    return EditSite(block.module.get_submodule(block.matrices[module].path))


@torch.no_grad()
def values_at(
    loaded: LoadedModel, sequences: Sequences, positions: Sequence[Sequence[int]], site: EditSite
) -> list[Float[Tensor, "chosen width"]]:
    """The site's float32 values at some positions of each sequence (positions in prompt and target, from 0)."""
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    for indices, batch in batches(loaded, sequences):
        values = whole_values(loaded, batch, site)
        for row, index in enumerate(indices):
            found[index] = values[row, torch.as_tensor(positions[index], device=values.device)].float()
    return found


@torch.no_grad()
def whole_values(loaded: LoadedModel, batch: Batch, site: EditSite) -> Float[Tensor, "prompt position width"]:
    """The site's values for a whole batch; later layers are not computed."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        value = args[0] if site.side == "input" else output[0] if isinstance(output, tuple) else output
        # OPT gives its feed-forward matrices a flattened batch.
        kept.append(value.detach().view(*batch.mask.shape, value.shape[-1]))
        raise _Enough

    handle = site.module.register_forward_hook(keep)
    try:
        run_model(loaded, batch)
    except _Enough:
        pass
    finally:
        handle.remove()
    return kept[0]


@contextmanager
def added_to(module: nn.Module, change: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> Iterator[None]:
    """Apply `change` to a module's output, in the shape (prompt, position, width), during the block."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        changed = change(values.view(*shape, values.shape[-1])).view_as(values)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


FORMAT = "backlens-moments-1"
TEXTS_AT_ONCE = 512


@dataclass(frozen=True)
class Moments:
    """Second moments C of one module by layer, and the number of tokens that they were measured over."""

    module: str
    tokens: int
    of_layer: Mapping[int, Float[Tensor, "d_in d_in"]]
    """C by layer, float32: means over tokens, without padding."""

    def at(self, layer: int) -> Float[Tensor, "d_in d_in"]:
        """C of a layer. Raises BacklensError for a layer that was not measured."""
        if layer not in self.of_layer:
            there = ", ".join(map(str, sorted(self.of_layer)))
            raise BacklensError(f"statistics: hold layers {there}, not {layer}; measure it too")
        return self.of_layer[layer]

    def save(self, path: str, model_digest: str) -> None:
        about = {"format": FORMAT, "module": self.module, "tokens": str(self.tokens), "model": model_digest}
        try:
            with replacing(path) as temporary:  # several workers may write it at the same time
                save_file(
                    {str(layer): c.contiguous() for layer, c in self.of_layer.items()}, temporary, about
                )
        except (OSError, SafetensorError) as error:
            raise BacklensError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str, model_digest: str) -> "Moments":
        """Read a file. Raises BacklensError for another kind of file, and for the statistics of another model."""
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
    """Measure C over any number of texts in one pass. A text that is longer than the model reads is cut."""
    sums: dict[int, Tensor] = {}
    tokens = 0
    with ExitStack() as hooks:
        mask: list[Tensor] = []
        for layer in layers:
            matrix(loaded, layer, module)  # raises if there is no such matrix
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
    product = (x.T @ x).double().cpu()  # float32 would lose the last of many terms
    sums[layer] = sums[layer] + product if layer in sums else product


def _batches(loaded: LoadedModel, texts: Iterable[str], batch_tokens: int) -> Iterator[list[list[int]]]:
    longest = context_length(loaded.model.config)
    texts = iter(texts)
    while chunk := list(islice(texts, TEXTS_AT_ONCE)):
        ids = [each[:longest] for each in loaded.tokenizer(chunk)["input_ids"] if each]
        for indices in pack([len(each) for each in ids], batch_tokens):
            yield [ids[index] for index in indices]


def read_texts(path: str) -> Iterator[str]:
    """Texts of a file: its lines, or the fields `text` of JSON Lines."""
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
    """A hash of samples of every parameter, which tells models apart. A hash of all bits would take long."""
    digest = hashlib.sha256()
    for name, parameter in loaded.model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def damped(moments: Float[Tensor, "d_in d_in"], share: float = 1e-4) -> Float[Tensor, "d_in d_in"]:
    """C in float64 plus `share` times its mean diagonal entry on the diagonal, so that it can be inverted."""
    c = moments.double()
    return c + share * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
