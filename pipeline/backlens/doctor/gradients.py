"""Xᵀ Δ and Σδ against autograd on the weights themselves, matrix by matrix.

Autograd's side shares nothing with capture: the model is called with one prompt, no mask and its own experts, and only
the weights that are checked require grad. As many layers are checked at a time as their gradients have room for.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel

from backlens.capture.batch import make_batch
from backlens.capture.hooks import Gradient, capture
from backlens.capture.packing import free_memory
from backlens.doctor.checks import Check, at_most, skipped
from backlens.doctor.model_copy import ModelCopy, Place, place_name
from backlens.models.blocks import Block, Located
from backlens.prompts.tokenize import Example
from backlens.rows import sequence

WEIGHTS, BIASES = "weight gradients", "bias gradients"

LIMIT = 1e-5
HALF_LIMIT = 5e-2
"""Limit for weights in bfloat16 or float16, where autograd rounds the gradient itself."""

FLOOR = 0.03
"""Share of a prompt's largest gradient that smaller ones are compared with."""

MOST_PROMPTS = 3
SHARE = 0.5
"""Share of the free memory that gradients may take."""

REMEDY = "the tables would be wrong for this model; check what --anatomy says of it, or report it as a defect"


@dataclass(frozen=True, slots=True)
class Compared:
    """Our gradient of one matrix or bias for one prompt, compared with autograd's."""

    place: Place
    error: float
    """Norm of the difference from autograd's gradient."""
    norm: float
    """Norm of autograd's gradient."""


def gradient_checks(copy: ModelCopy, why_half: str = "") -> Iterator[Check]:
    """Check weights and biases; `why_half` says why a copy in half precision is used."""
    quantized = _without_float_weights(copy.loaded.parts.blocks)
    if quantized:
        reason = f"quantized weights have no gradient to compare with ({quantized})"
        yield from (skipped(name, reason, "check the unquantized model") for name in (WEIGHTS, BIASES))
        return
    errors: dict[str, list[tuple[float, Place]]] = {WEIGHTS: [], BIASES: []}
    for example in _of_different_lengths(copy.probes):
        found = _compare(copy, example)
        for name, compared in found.items():
            floor = FLOOR * max((each.norm for each in compared), default=0.0)
            errors[name] += [(each.error / max(each.norm, floor, 1e-30), each.place) for each in compared]
    limit = HALF_LIMIT if copy.half else LIMIT
    for name, formula in ((WEIGHTS, "Xᵀ Δ"), (BIASES, "Σ δ")):
        if not errors[name]:
            yield skipped(name, "these matrices have no biases")
            continue
        worst, place = max(errors[name], key=lambda each: (each[0] != each[0], each[0]))
        detail = (
            f"{formula} against autograd, {len(errors[name]):,} comparisons in {_precision(copy)}{why_half}; "
            f"worst: {place_name(place)}"
        )
        yield at_most(name, worst, limit, detail, REMEDY)


def _precision(copy: ModelCopy) -> str:
    return str(copy.loaded.model.dtype).removeprefix("torch.")


def _of_different_lengths(examples: Sequence[Example]) -> list[Example]:
    """Choose the shortest prompt, the longest, and one between."""
    by_length = sorted(examples, key=lambda example: len(example.token_ids))
    wanted = sorted({0, len(by_length) // 2, len(by_length) - 1})
    return [by_length[index] for index in wanted[:MOST_PROMPTS]]


def _compare(copy: ModelCopy, example: Example) -> dict[str, list[Compared]]:
    found: dict[str, list[Compared]] = {WEIGHTS: [], BIASES: []}
    for layers in _chunks(copy):
        blocks = {layer: copy.loaded.parts.blocks[layer] for layer in layers}
        with _weight_gradients(copy.loaded.model, [*blocks.values()], example):
            _compare_layers(copy, example, blocks, found)
    return found


def _compare_layers(
    copy: ModelCopy, example: Example, blocks: dict[int, Block], found: dict[str, list[Compared]]
) -> None:
    reached: set[Place] = set()

    def consume(group: Sequence[Gradient]) -> None:
        for gradient in group:
            place = gradient.layer, gradient.module, gradient.expert
            reached.add(place)
            x, vjp = gradient.x[gradient.slots.mask], gradient.vjp[gradient.slots.mask]
            weight, bias = _autograds(blocks[gradient.layer], gradient.module, gradient.expert)
            found[WEIGHTS].append(_compared(place, x.double().T @ vjp.double(), weight))
            if bias is not None:
                found[BIASES].append(_compared(place, vjp.double().sum(0), bias))

    batch = make_batch([sequence(example, "first")], copy.loaded.model.device)
    capture(copy.loaded, batch, [*blocks], copy.loaded.parts.modules, consume)
    for place in set(_places(blocks)) - reached:  # No token went to these experts: autograd gives zero too.
        weight, bias = _autograds(blocks[place[0]], *place[1:])
        found[WEIGHTS].append(_compared(place, torch.zeros_like(weight), weight))
        if bias is not None:
            found[BIASES].append(_compared(place, torch.zeros_like(bias), bias))


def _compared(place: Place, ours: Tensor, autograds: Tensor) -> Compared:
    return Compared(place, float((ours - autograds).norm()), float(autograds.norm()))


def _places(blocks: dict[int, Block]) -> Iterator[Place]:
    for layer, block in blocks.items():
        yield from ((layer, module, None) for module in block.matrices)
        if block.experts is not None:
            for module, located in block.experts.matrices.items():
                count = len(getattr(block.experts.module, located.path))
                yield from ((layer, module, expert) for expert in range(count))


def _autograds(block: Block, module: str, expert: int | None) -> tuple[Tensor, Tensor | None]:
    """Autograd's gradients of one matrix, shape (in, out), and of its bias, shape (out,), if it has one."""
    if expert is None:
        located = block.matrices[module]
        holder = block.module.get_submodule(located.path)
        weight, bias = _gradient(holder.weight), getattr(holder, "bias", None)
        transposed = isinstance(holder, Conv1D)
        bias = _gradient(bias) if isinstance(bias, Tensor) else None
    else:
        assert block.experts is not None
        located, holder = block.experts.matrices[module], block.experts.module
        weight = _gradient(getattr(holder, located.path))[expert]
        bias = getattr(holder, f"{located.path}_bias", None)
        transposed = bool(holder.is_transposed)
        bias = _gradient(bias)[expert] if isinstance(bias, Tensor) else None
    weight = weight if transposed else weight.T
    columns = _columns(located, weight.shape[1])
    if columns is None:
        return weight, bias
    return weight[:, columns], None if bias is None else bias[columns]


def _columns(located: Located, width: int) -> Tensor | None:
    return None if located.cut is None else located.part_of(torch.arange(width))


def _gradient(weight: object) -> Tensor:
    assert isinstance(weight, Tensor)
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _parameters(block: Block) -> Iterator[nn.Parameter]:
    """Weights and biases of the block's matrices."""
    holders = [
        (block.module.get_submodule(located.path), "weight", "bias") for located in block.matrices.values()
    ]
    if block.experts is not None:
        paths = (located.path for located in block.experts.matrices.values())
        holders += [(block.experts.module, path, f"{path}_bias") for path in paths]
    for holder, *names in dict.fromkeys(holders):
        for name in names:
            parameter = getattr(holder, name, None)
            if isinstance(parameter, nn.Parameter):
                yield parameter


def _without_float_weights(blocks: Sequence[Block]) -> str:
    """Class name of a module whose weight autograd cannot differentiate; empty if there is none."""
    for block in blocks:
        holders = [
            (block.module.get_submodule(located.path), "weight") for located in block.matrices.values()
        ]
        if block.experts is not None:
            holders += [(block.experts.module, located.path) for located in block.experts.matrices.values()]
        for holder, name in holders:
            weight = getattr(holder, name, None)
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                return type(holder).__name__
    return ""


def _chunks(copy: ModelCopy) -> Iterator[range]:
    blocks = copy.loaded.parts.blocks
    largest = max(sum(p.numel() * p.element_size() for p in _parameters(block)) for block in blocks)
    size = max(1, int(SHARE * free_memory(copy.loaded.model.device) / largest))
    for start in range(0, len(blocks), size):
        yield range(start, min(start + size, len(blocks)))


@contextmanager
def _weight_gradients(model: PreTrainedModel, blocks: Sequence[Block], example: Example) -> Iterator[None]:
    """Put the gradients of the blocks' weights and biases into `.grad` for the block; then freeze and clear them."""
    parameters = [parameter for block in blocks for parameter in _parameters(block)]
    ids = torch.tensor([example.token_ids], device=model.device)
    try:
        _require_grad(parameters, True)
        with torch.enable_grad(), _own_experts(model):
            logits = model(input_ids=ids, use_cache=False, **_last_only(model)).logits[0, -1].float()
            (-logits.log_softmax(-1)[example.target_ids[0]]).backward()
        _require_grad(parameters, False)
        yield
    finally:
        _require_grad(parameters, False)
        for parameter in parameters:
            parameter.grad = None


def _last_only(model: PreTrainedModel) -> dict[str, int]:
    """Ask for the last logits alone, if the model can: logits of several positions are rounded differently."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _require_grad(parameters: Sequence[nn.Parameter], required: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(required)


@contextmanager
def _own_experts(model: PreTrainedModel) -> Iterator[None]:
    """Compute experts by the loop of the model's own file, whichever implementation is set."""
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
