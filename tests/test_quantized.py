"""Quantized weights: factors against autograd on a float model that holds the dequantized weights."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from backlens.capture.batch import make_batch
from backlens.capture.hooks import Gradient, capture
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel, ModelSource, load_model
from backlens.models.module_tree import verify_backward
from backlens.projection.lens import lens_error, lens_tolerance, make_lens
from tests.engine.command import called
from tests.tiny import LLAMA_SHAPE, byte_tokenizer, random_model

CPU = torch.device("cpu")
SHAPE = LLAMA_SHAPE | {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}
PROMPT, TARGET = [5, 17, 99, 1], [42]
FORMS = {
    # 4 bits: the product is of the dequantized weights, computed in float32
    "4": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        1e-5,
    ),
    # 8 bits: inputs too are rounded to 8 bits on their way in
    "8": ({"load_in_8bit": True}, 5e-2),
}

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: no 8- or 4-bit weights"
)


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(form: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"bits{form}")
    random_model(LlamaConfig(vocab_size=300, **SHAPE)).save_pretrained(folder / "float")
    config = BitsAndBytesConfig(**FORMS[form][0])
    model = AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(folder / "quantized")
    byte_tokenizer().save_pretrained(folder / "quantized")
    return folder


@pytest.fixture(scope="module")
def quantized(folder: Path) -> LoadedModel:
    return load_model(ModelSource(str(folder / "quantized")), CPU)


def dequantized(folder: Path, quantized: LoadedModel) -> PreTrainedModel:
    """A float model with the values that the quantized weights stand for."""
    model = AutoModelForCausalLM.from_pretrained(
        folder / "float", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        module: Any
        for name, module in quantized.model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                values = bitsandbytes.functional.dequantize_4bit(
                    module.weight.data, module.weight.quant_state
                )
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
                values = module.weight.data.float() * scale[:, None] / 127
            else:
                continue
            model.get_parameter(f"{name}.weight").copy_(values)
    return model.eval().requires_grad_(True)


def test_factors_multiply_to_the_gradient_of_the_weights_that_they_stand_for(
    form: str, folder: Path, quantized: LoadedModel
) -> None:
    captured: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(group: Sequence[Gradient]) -> None:
        captured.update({(g.layer, g.module): (g.x[0].clone(), g.vjp[0].clone()) for g in group})

    batch = make_batch([(PROMPT, TARGET)], CPU)
    outcome = capture(quantized, batch, range(3), quantized.parts.modules, keep)
    model: Any = dequantized(folder, quantized)
    loss = -model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)[TARGET[0]]
    loss.backward()
    limit = FORMS[form][1]
    assert outcome.loss.item() == pytest.approx(loss.item(), rel=limit)
    assert len(captured) == 3 * 7
    for (layer, module), (x, vjp) in captured.items():
        path = quantized.parts.blocks[layer].matrices[module].path
        gradient = model.model.layers[layer].get_submodule(path).weight.grad.T
        assert (x.T @ vjp - gradient).norm() <= limit * gradient.norm(), (layer, module)


def test_checkpointing_and_passes_without_a_graph_change_nothing(quantized: LoadedModel) -> None:
    """The first pass of checkpointing has no graph, and neither has one that only asks for logits."""
    found = []
    for checkpointing in (False, True, False):
        factors: dict[tuple[int, str], torch.Tensor] = {}

        def keep(group: Sequence[Gradient], factors: dict[tuple[int, str], torch.Tensor] = factors) -> None:
            factors.update({(g.layer, g.module): g.vjp[0].clone() for g in group})

        batch = make_batch([(PROMPT, TARGET)], CPU)
        capture(
            quantized,
            batch,
            range(3),
            quantized.parts.modules,
            keep,
            activation_checkpointing=checkpointing,
        )
        found.append(factors)
        with torch.no_grad():
            quantized.model(torch.tensor([PROMPT]))
    for factors in found[1:]:
        assert factors.keys() == found[0].keys()
        for place, vjp in factors.items():
            torch.testing.assert_close(vjp, found[0][place], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_doctor_passes_a_quantized_model_and_says_what_it_could_not_check(folder: Path) -> None:
    done = called("doctor", "--model", folder / "quantized")
    assert done.status == 0, done.stdout + done.stderr
    assert "check the unquantized model" in done.stdout


def test_the_lens_is_that_of_the_unquantized_head(quantized: LoadedModel) -> None:
    error = lens_error(quantized.model, quantized.parts, make_lens(quantized.parts, "raw"))
    assert error <= lens_tolerance(quantized.model)


def test_a_kernel_without_a_backward_pass_is_an_error(form: str, folder: Path) -> None:
    """On some CPUs a 4-bit layer changes to such a kernel when it is first used without a graph."""
    if form != "4":
        pytest.skip("8-bit layers have one kernel")
    loaded = load_model(ModelSource(str(folder / "quantized")), CPU)
    layers = [module for module in loaded.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:  # as bitsandbytes has it, and loading had not
        layer.support_avx512bf16_for_cpu = bitsandbytes.functional.has_avx512bf16()
    with torch.no_grad():
        loaded.model(torch.tensor([PROMPT]))
    converted = any(
        getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)
        for module in loaded.model.modules()
        if isinstance(module, nn.Linear)
    )
    if not converted:
        pytest.skip("this CPU has no such kernel (it takes avx512_bf16)")
    with pytest.raises(BacklensError, match=r"no gradient passes through self_attn\.q_proj of block 0"):
        verify_backward(loaded.model, [block.module for block in loaded.parts.blocks])


@pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None,
    reason="gptqmodel is not installed: its kernels for GPTQ and AWQ weights want a GPU",
)
def test_gptq_modules_state_their_widths() -> None:
    """A block's matrices are found by the widths that these modules state, whatever they are packed into."""
    from gptqmodel.nn_modules.qlinear.torch import TorchQuantLinear  # pyright: ignore[reportMissingImports]

    module = TorchQuantLinear(
        bits=4, group_size=32, sym=True, desc_act=False, in_features=64, out_features=32
    )
    assert (module.in_features, module.out_features) == (64, 32)
