"""Agreement of captured factors with autograd, of the lens with the logits, and of a batch with prompts alone."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from backlens.capture.batch import Side, make_batch
from backlens.capture.hooks import Gradient, capture
from backlens.models.blocks import find_parts
from backlens.models.load import LoadedModel
from backlens.projection.lens import lens_error, make_lens
from tests.families import EXPERTS, columns_of, expert_gradient
from tests.tiny import byte_tokenizer

CPU = torch.device("cpu")
PROMPTS = [[5, 17], [7, 1, 2], list(range(40, 60)), [9, 9, 9, 9]]
TARGETS = [[3], [250], [8], [77]]
SMALLEST = 0.03
"""Errors are relative to a gradient's norm, or to this share of the prompt's largest gradient: a vanishing gradient is
only rounding."""

Key = tuple[int, str, int | None]
"""Layer, module, expert."""
Captured = dict[Key, tuple[Tensor, Tensor]]
"""(x, δ) by matrix."""


@dataclass(frozen=True)
class Agreement:
    """Largest relative errors over prompts, layers and experts; those of factors are by module."""

    gradient: dict[str, float]
    """Error of Xᵀ Δ against autograd's gradient of the weight."""
    batch: dict[str, float]
    """Error of x and δ in a batch of prompts of several lengths, against those of the prompt alone."""
    padding: dict[str, float]
    """The same with padding on the left."""
    lens: float
    """Error of the lens of the last block's output against the model's logits."""


def measure(model: PreTrainedModel, case: str) -> Agreement:
    parts = find_parts(model)
    every = range(len(PROMPTS))
    alone = [captured(model, [row])[0] for row in every]
    return Agreement(
        gradient=_worst([_against_autograd(model, case, row, alone[row]) for row in every]),
        batch=_worst(list(map(_difference, captured(model, every, "right"), alone))),
        padding=_worst(list(map(_difference, captured(model, every, "left"), alone))),
        lens=lens_error(model, parts, make_lens(parts, "raw")),
    )


def captured(
    model: PreTrainedModel,
    rows: Sequence[int],
    side: Side = "right",
    *,
    activation_checkpointing: bool = False,
) -> list[Captured]:
    """(x, δ) of every weight matrix, for each of the given prompts in one batch."""
    loaded = LoadedModel(model, byte_tokenizer(), find_parts(model))
    batch = make_batch([(PROMPTS[row], TARGETS[row]) for row in rows], CPU, side)
    found: list[Captured] = [{} for _ in rows]

    def keep(group: Sequence[Gradient]) -> None:
        for gradient in group:
            slots = gradient.slots
            for prompt, own, x, vjp in zip(slots.prompts, slots.mask, gradient.x, gradient.vjp, strict=True):
                key = gradient.layer, gradient.module, gradient.expert
                found[int(prompt)][key] = x[own].clone(), vjp[own].clone()

    layers = range(len(loaded.parts.blocks))
    capture(
        loaded, batch, layers, loaded.parts.modules, keep, activation_checkpointing=activation_checkpointing
    )
    return found


def _against_autograd(model: PreTrainedModel, case: str, row: int, found: Captured) -> dict[Key, float]:
    expected = weight_gradients(model, case, row)
    floor = SMALLEST * max(gradient.norm().item() for gradient in expected.values())
    assert found.keys() <= expected.keys()
    errors: dict[Key, float] = {}
    for key, gradient in expected.items():
        x, vjp = found.get(key, (torch.zeros(0, len(gradient)), torch.zeros(0, gradient.shape[1])))
        error = (x.double().T @ vjp.double() - gradient).norm().item()
        errors[key] = error / max(gradient.norm().item(), floor)
    return errors


def weight_gradients(model: PreTrainedModel, case: str, row: int) -> dict[Key, Tensor]:
    """(in, out) of every matrix of the model's blocks, by autograd on the weights themselves."""
    model = copy.deepcopy(model).requires_grad_(True)
    logits = model(torch.tensor([PROMPTS[row]])).logits[0, -1].float()
    (-logits.log_softmax(-1)[TARGETS[row][0]]).backward()
    gradients: dict[Key, Tensor] = {}
    for layer, block in enumerate(find_parts(model).blocks):
        for module, located in block.matrices.items():
            fused = columns_of(case, module)
            submodule = block.module.get_submodule(fused[0] if fused else located.path)
            gradient = _gradient(submodule.weight)
            gradient = gradient.T if isinstance(submodule, nn.Linear) else gradient
            gradients[layer, module, None] = gradient[:, fused[1]] if fused else gradient
        experts = block.module.get_submodule("mlp.experts") if block.experts else nn.Module()
        weights = {name: _gradient(weight) for name, weight in experts.named_parameters()}
        for module in ("mlp.up", "mlp.gate", "mlp.down") if weights else ():
            for expert in range(EXPERTS):
                gradients[layer, module, expert] = expert_gradient(case, module, weights, expert)
    return {key: gradient.float() for key, gradient in gradients.items()}


def _gradient(weight: object) -> Tensor:
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    return weight.grad


def _difference(found: Captured, expected: Captured) -> dict[Key, float]:
    """Return the larger error of x and δ."""
    assert found.keys() == expected.keys()
    largest = max(vjp.norm().item() for _, vjp in expected.values())
    return {
        key: max(
            (one - other).norm().item() / max(other.norm().item(), 1e-2 * largest)
            for one, other in zip(found[key], factors, strict=True)
        )
        for key, factors in expected.items()
    }


def _worst(errors: Sequence[Mapping[Key, float]]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for by_key in errors:
        for (_, module, _), error in by_key.items():
            worst[module] = max(worst.get(module, 0.0), error)
    return worst
