"""Forward passes for edits: encoded prompts, logits where they are read, and a module's inputs up to its layer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.capture import Batch, make_batch, only_loss_positions
from pipeline.editing.request import Request
from pipeline.engine.packing import pack
from pipeline.errors import BacklensError
from pipeline.models.load import LoadedModel
from pipeline.prompts.record import Prompt, Rejected
from pipeline.prompts.subject import SubjectPlace
from pipeline.prompts.tokenize import Example, context_length, tokenize

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
BATCH_TOKENS = 2048


def encode(
    loaded: LoadedModel,
    pairs: Sequence[tuple[str, str]],
    where: str,
    places: Iterable[SubjectPlace | None] = (),
) -> list[Example]:
    """(prompt, target) texts as token ids, by the rules of `backlens run`; `places` says where prompts name subjects.

    Raises BacklensError for one that has no tokens, or more than the model reads.
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
        rows=loaded.anatomy.rows,
    )
    for one in encoded:
        if isinstance(one, Rejected):
            raise BacklensError(one.message)
    return [one for one in encoded if isinstance(one, Example)]


def wordings(
    loaded: LoadedModel, request: Request, prefixes: Sequence[str], ending: str | None = None
) -> list[Example]:
    """The request's prompt and new target, behind each of some texts ("" among them: as it is)."""
    target = request.target_new if ending is None else ending
    place = request.subject_place()
    return encode(
        loaded,
        [(before + request.prompt, target) for before in prefixes],
        request.where,
        [place and place.behind(before) for before in prefixes],
    )


def subject_last(example: Example, where: str) -> int:
    """The position of the subject's last token."""
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
    with _exactly(loaded):
        return loaded.model(
            input_ids=batch.input_ids,
            attention_mask=batch.mask.long(),
            position_ids=(batch.mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
        )


def logits_of(loaded: LoadedModel, batch: Batch) -> Float[Tensor, "prompt step vocabulary"]:
    """The logits that predict each target token; float32."""
    with only_loss_positions(loaded.anatomy.head, batch.loss_positions):
        return run_model(loaded, batch).logits.float()


def batches(
    loaded: LoadedModel, sequences: Sequences, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[int], Batch]]:
    """Sequences in padded batches of similar length, each with the indices of its rows."""
    lengths = [len(prompt) + len(target) - 1 for prompt, target in sequences]
    for indices in pack(lengths, batch_tokens):
        yield indices, make_batch([sequences[index] for index in indices], loaded.device)


class _Enough(BaseException):
    """Ends a forward pass whose later layers nobody needs."""


@dataclass(frozen=True)
class Site:
    """A place in the model whose values are read: a module's input, or what a module or block puts out."""

    module: nn.Module
    side: str = "input"


def down_input(loaded: LoadedModel, layer: int, module: str = "mlp.down") -> Site:
    block = loaded.anatomy.blocks[layer]
    return Site(block.module.get_submodule(block.matrices[module].path))


@torch.no_grad()
def values_at(
    loaded: LoadedModel, sequences: Sequences, positions: Sequence[Sequence[int]], site: Site
) -> list[Float[Tensor, "chosen width"]]:
    """The site's float32 values at some positions of each sequence (positions in prompt and target, from 0)."""
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    for indices, batch in batches(loaded, sequences):
        values = whole_values(loaded, batch, site)
        for row, index in enumerate(indices):
            found[index] = values[row, torch.as_tensor(positions[index], device=values.device)].float()
    return found


@torch.no_grad()
def whole_values(loaded: LoadedModel, batch: Batch, site: Site) -> Float[Tensor, "prompt position width"]:
    """The site's values of a whole batch; layers behind it are not computed."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        value = args[0] if site.side == "input" else output[0] if isinstance(output, tuple) else output
        # OPT's feed-forward matrices see their batch flattened.
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
    """Let `change` have a module's output, seen as (prompt, position, width), before it goes on."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        changed = change(values.view(*shape, values.shape[-1])).view_as(values)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
