"""Every family: factors against autograd, the lens against the model's logits, rows alone and in company.

`docs/models.md` is a table of the same measurements (`docs/write_models.py`).
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.engine.plan import norm_floor
from pipeline.errors import BacklensError
from pipeline.lens import lens_tolerance, make_lens, verify_lens
from pipeline.models.anatomy import anatomy
from pipeline.models.layout import LAYOUTS
from pipeline.models.load import ModelSource, load_model
from tests.agreement import Agreement, captured, measure
from tests.families import CONFIGS, MODERN
from tests.tiny import byte_tokenizer, random_model


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(case: str) -> PreTrainedModel:
    return random_model(CONFIGS[case]).requires_grad_(False)


@pytest.fixture(scope="module")
def agreement(model: PreTrainedModel, case: str) -> Agreement:
    return measure(model, case)


def test_factors_multiply_to_autograds_gradient_of_every_matrix(agreement: Agreement) -> None:
    assert {"mlp.up", "mlp.down", "attn.q", "attn.o"} - agreement.gradient.keys() <= {"attn.q"}
    assert max(agreement.gradient.values()) <= 1e-5


def test_lens_of_the_last_block_gives_the_models_logits(agreement: Agreement) -> None:
    assert agreement.lens <= 1e-5


def test_factors_do_not_depend_on_neighbours_or_padding(agreement: Agreement) -> None:
    assert max(agreement.batch.values()) <= 1e-4
    assert max(agreement.padding.values()) <= 1e-4


def test_factors_are_the_same_when_blocks_are_computed_twice(model: PreTrainedModel) -> None:
    kept, recomputed = (captured(model, [2, 0], recompute=again) for again in (False, True))
    for expected, found in zip(kept, recomputed, strict=True):
        assert found.keys() == expected.keys()
        for key, factors in expected.items():
            for one, other in zip(found[key], factors, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert not any("forward" in vars(block.module) for block in anatomy(model).blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_case", ["gpt2", "gemma2", "phi3", "mixtral"])
def test_weights_in_half_precision(half_case: str, dtype: torch.dtype) -> None:
    """x and δ are what the model computes in its own type: as good a gradient as autograd's in that type."""
    model = random_model(CONFIGS[half_case]).requires_grad_(False)
    nn.Module.to(model, dtype)
    agreement = measure(model, half_case)
    rounding = torch.finfo(dtype).eps
    assert max(agreement.gradient.values()) <= 2 * rounding
    assert agreement.lens <= lens_tolerance(model)
    assert lens_tolerance(random_model(CONFIGS[half_case])) == 1e-5


def test_exact_attention_adds_falcons_slopes_once(tmp_path: Path) -> None:
    random_model(CONFIGS["falcon, all heads"]).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(ModelSource(str(tmp_path)), torch.device("cpu"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(loaded.model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)


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


def test_the_length_below_which_a_bias_leads_the_lists_is_read_off_the_structure(model: PreTrainedModel):
    """Against the final norm as it is probed: sqrt(ε d) if there is any bias behind the blocks, 0 if there is none."""
    model = copy.deepcopy(model)
    blocks = anatomy(model).blocks
    inside = {id(p) for block in blocks for p in block.module.parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and id(parameter) not in inside:
            nn.init.normal_(parameter)
    lens = make_lens(anatomy(model), "raw")
    has_bias = bool(lens.constant.abs().max() > 0) and lens.norm.normalizing
    expected = math.sqrt(lens.norm.eps * lens.d_model) if has_bias else 0.0
    assert norm_floor(model, blocks) == pytest.approx(expected, rel=1e-3)
