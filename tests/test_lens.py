"""The lens, read off modules of unknown names."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from backlens.errors import BacklensError
from backlens.models.blocks import find_parts
from backlens.projection.lens import make_lens, probe_norm
from tests.tiny import CONFIGS, random_model

CPU = torch.device("cpu")


class RootOfEntries(nn.Module):
    """A norm of no known kind."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().sqrt().sum(-1, keepdim=True) + 1)


class RunningNorm(nn.Module):
    """A norm with state: its output depends on what it saw before."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * float(x.square().mean())
        return x / self.seen**0.5


@pytest.mark.parametrize("width", [8, 33, 768])
@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("kind", [nn.LayerNorm, LlamaRMSNorm, GemmaRMSNorm, nn.RMSNorm])
def test_kind_weight_bias_and_eps_are_found_by_probing(kind: type[nn.Module], eps: float, width: int) -> None:
    torch.manual_seed(0)
    module = kind(width, eps=eps)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    norm = probe_norm(module, width, CPU)
    assert norm.eps == pytest.approx(eps, rel=1e-3)
    assert norm.centred == (kind is nn.LayerNorm)
    vectors = torch.randn(5, width) * torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4])[:, None]
    torch.testing.assert_close(norm(vectors), module(vectors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [RootOfEntries(), RunningNorm(), nn.Tanh()])
def test_a_norm_that_is_not_affine_up_to_a_scalar_is_refused(module: nn.Module) -> None:
    with pytest.raises(BacklensError, match="final norm"):
        probe_norm(module, 16, CPU)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_lens_of_the_last_hidden_state_equals_the_models_own_logits(family: str) -> None:
    model = random_model(CONFIGS[family])
    parts = find_parts(model)
    kept: list[Tensor] = []
    assert parts.final_norm is not None
    parts.final_norm.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 9)[None]).logits[0]
    lens, hidden = make_lens(parts, "raw"), kept[0][0]
    scale = lens.scale(hidden.square().sum(-1), lens.norm.centre(hidden).square().sum(-1))
    scores = scale[:, None] * (lens.linear(hidden) @ lens.unembedding.T) + lens.constant
    assert (scores - logits).abs().max() <= 1e-5 * logits.abs().max()


@given(exponent=st.integers(-18, 18), seed=st.integers(0, 1000), centred=st.booleans())
@settings(max_examples=60, deadline=None)
def test_unit_scaling_is_the_norm_of_the_vector_divided_by_its_length(
    exponent: int, seed: int, centred: bool
) -> None:
    model = random_model(CONFIGS["gpt2" if centred else "llama"])
    lens = make_lens(find_parts(model), "unit")
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(32, generator=generator).double() * 10.0**exponent
    scale = lens.scale(vector.square().sum(), lens.norm.centre(vector).square().sum())
    unit = vector / vector.norm()
    expected = lens.norm(unit) - lens.norm.bias
    torch.testing.assert_close(scale * lens.linear(vector), expected, rtol=1e-6, atol=1e-9)
