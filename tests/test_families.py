"""Every family: factors against autograd, the lens against the model's logits, rows alone and in company."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.capture import Side, capture, make_batch
from pipeline.errors import BacklensError
from pipeline.lens import make_lens, verify_lens
from pipeline.models.anatomy import anatomy
from pipeline.models.layout import LAYOUTS
from pipeline.models.load import LoadedModel
from tests.families import CONFIGS, EXPERTS, MODERN, columns_of, expert_gradient
from tests.tiny import byte_tokenizer, random_model

CPU = torch.device("cpu")
PROMPTS = [[5, 17], [7, 1, 2], list(range(40, 60)), [9, 9, 9, 9]]
TARGETS = [[3], [250], [8], [77]]
Key = tuple[int, str, int | None]
"""Layer, module, expert."""
Captured = dict[Key, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(case: str) -> PreTrainedModel:
    return random_model(CONFIGS[case]).requires_grad_(False)


def rows_of(
    model: PreTrainedModel, rows: list[int], side: Side, *, recompute: bool = False
) -> list[Captured]:
    """(x, δ) of every weight matrix, for each of the given prompts in one batch."""
    loaded = LoadedModel(model, byte_tokenizer(), anatomy(model))
    batch = make_batch([(PROMPTS[row], TARGETS[row]) for row in rows], CPU, side)
    captured: list[Captured] = [{} for _ in rows]

    def keep(group) -> None:
        for gradient in group:
            slots = gradient.slots
            for prompt, own, x, vjp in zip(slots.prompts, slots.mask, gradient.x, gradient.vjp, strict=True):
                key = gradient.layer, gradient.module, gradient.expert
                captured[int(prompt)][key] = x[own].clone(), vjp[own].clone()

    capture(loaded, batch, range(2), loaded.anatomy.modules, keep, recompute=recompute)
    return captured


def gradient_of(weight: object) -> Tensor:
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    return weight.grad


def weight_gradients(model: PreTrainedModel, case: str) -> dict[Key, Tensor]:
    """(in, out) of every matrix of the model's blocks, by autograd on the weights themselves."""
    gradients: dict[Key, Tensor] = {}
    for layer, block in enumerate(anatomy(model).blocks):
        for module, located in block.matrices.items():
            fused = columns_of(case, module)
            submodule = block.module.get_submodule(fused[0] if fused else located.path)
            gradient = gradient_of(submodule.weight)
            gradient = gradient.T if isinstance(submodule, nn.Linear) else gradient
            gradients[layer, module, None] = gradient[:, fused[1]] if fused else gradient
        experts = block.module.get_submodule("mlp.experts") if block.experts else nn.Module()
        weights = {name: gradient_of(weight) for name, weight in experts.named_parameters()}
        for module in ("mlp.up", "mlp.gate", "mlp.down") if weights else ():
            for expert in range(EXPERTS):
                gradients[layer, module, expert] = expert_gradient(case, module, weights, expert)
    return gradients


def test_factors_multiply_to_autograds_gradient_of_every_matrix(case: str, model: PreTrainedModel) -> None:
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        captured = rows_of(model, [row], "right")[0]
        alone = copy.deepcopy(model).requires_grad_(True)
        logits = alone(torch.tensor([prompt])).logits[0, -1]
        (-logits.log_softmax(-1)[target[0]]).backward()
        expected = weight_gradients(alone, case)
        # a gradient of zero is rounding, and rounding is relative to what the backward pass carries
        floor = 0.03 * max(gradient.norm().item() for gradient in expected.values())
        for key, gradient in expected.items():
            if key not in captured:
                assert key[2] is not None, key
                assert not gradient.any(), f"{key}: no token was routed there"
                continue
            x, vjp = captured[key]
            error = (x.double().T @ vjp.double() - gradient).norm()
            assert error <= 1e-5 * max(gradient.norm().item(), floor), key
        assert captured.keys() <= expected.keys()


def test_lens_of_the_last_block_gives_the_models_logits(model: PreTrainedModel) -> None:
    parts = anatomy(model)
    assert verify_lens(model, parts, make_lens(parts, "raw")) <= 1e-5


@pytest.mark.parametrize("side", ["right", "left"])
def test_factors_do_not_depend_on_neighbours_or_padding(model: PreTrainedModel, side: Side) -> None:
    together = rows_of(model, [0, 1, 2, 3], side)
    for row in range(4):
        alone = rows_of(model, [row], "right")[0]
        largest = max(vjp.norm().item() for _, vjp in alone.values())
        for key, (x, vjp) in alone.items():
            for found, expected in zip(together[row][key], (x, vjp), strict=True):
                assert (found - expected).norm() <= 1e-4 * max(expected.norm().item(), 1e-2 * largest), key


def test_factors_are_the_same_when_blocks_are_computed_twice(model: PreTrainedModel) -> None:
    kept, recomputed = (rows_of(model, [2, 0], "right", recompute=again) for again in (False, True))
    for expected, found in zip(kept, recomputed, strict=True):
        assert found.keys() == expected.keys()
        for key, factors in expected.items():
            for one, other in zip(found[key], factors, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert not any("forward" in vars(block.module) for block in anatomy(model).blocks)


def test_every_known_family_is_tried_here() -> None:
    assert {str(config.model_type) for config in CONFIGS.values()} == set(LAYOUTS)


def test_a_block_with_a_matrix_that_no_module_name_covers_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**MODERN))
    model.get_submodule("model.layers.1.mlp").add_module("adapter", nn.Linear(32, 32))
    with pytest.raises(BacklensError, match=r"block 1 .*mlp\.adapter"):
        anatomy(model)


def test_a_head_that_is_not_affine_is_refused() -> None:
    class Squared(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).square()

    model = LlamaForCausalLM(LlamaConfig(**MODERN)).eval()
    model.lm_head = Squared(32, 300, bias=False)
    parts = anatomy(model)
    with pytest.raises(BacklensError, match="does not give this model's logits"):
        verify_lens(model, parts, make_lens(parts, "raw"))
