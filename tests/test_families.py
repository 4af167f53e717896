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
from tests.families import CONFIGS, MODERN, columns_of
from tests.tiny import byte_tokenizer, random_model

CPU = torch.device("cpu")
PROMPTS = [[5, 17], [7, 1, 2], list(range(40, 60)), [9, 9, 9, 9]]
TARGETS = [[3], [250], [8], [77]]
Captured = dict[tuple[int, str], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(case: str) -> PreTrainedModel:
    return random_model(CONFIGS[case]).requires_grad_(False)


def rows_of(model: PreTrainedModel, rows: list[int], side: Side) -> list[Captured]:
    """(x, δ) of every layer and module, for each of the given prompts in one batch."""
    loaded = LoadedModel(model, byte_tokenizer(), anatomy(model))
    batch = make_batch([(PROMPTS[row], TARGETS[row]) for row in rows], CPU, side)
    captured: list[Captured] = [{} for _ in rows]

    def keep(group) -> None:
        for gradient in group:
            for row, own in enumerate(batch.mask):
                factors = gradient.x[row][own].clone(), gradient.vjp[row][own].clone()
                captured[row][gradient.layer, gradient.module] = factors

    capture(loaded, batch, range(2), list(loaded.anatomy.matrices), keep)
    return captured


def weight_gradient(model: PreTrainedModel, case: str, layer: int, module: str) -> Tensor:
    """(in, out), by autograd on the weight itself."""
    parts = anatomy(model)
    fused = columns_of(case, module)
    submodule = parts.blocks[layer].get_submodule(fused[0] if fused else parts.matrices[module].path)
    weight = submodule.weight
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    gradient = weight.grad.T if isinstance(submodule, nn.Linear) else weight.grad
    return gradient[:, fused[1]] if fused else gradient


def test_factors_multiply_to_autograds_gradient_of_every_matrix(case: str, model: PreTrainedModel) -> None:
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        captured = rows_of(model, [row], "right")[0]
        alone = copy.deepcopy(model).requires_grad_(True)
        logits = alone(torch.tensor([prompt])).logits[0, -1]
        (-logits.log_softmax(-1)[target[0]]).backward()
        expected = {key: weight_gradient(alone, case, *key) for key in captured}
        # a gradient of zero is rounding, and rounding is relative to what the backward pass carries
        floor = 0.03 * max(gradient.norm().item() for gradient in expected.values())
        for key, (x, vjp) in captured.items():
            error = (x.double().T @ vjp.double() - expected[key]).norm()
            assert error <= 1e-5 * max(expected[key].norm().item(), floor), key


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
