"""Models that are large for the machine, and weights that autograd cannot differentiate."""

from pathlib import Path

import pytest
import torch
from torch import nn

from backlens.capture.packing import free_memory
from backlens.doctor import examine, gradients
from backlens.doctor.model_copy import ModelCopy
from backlens.models.blocks import find_parts
from backlens.models.load import LoadedModel
from tests.doctor.models import save
from tests.doctor.test_doctor import doctor
from tests.families import CONFIGS
from tests.tiny import byte_tokenizer, random_model


@pytest.fixture
def _no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with a few bytes left."""
    for module in (examine, gradients):
        monkeypatch.setattr(module, "free_memory", lambda _device: 1)


@pytest.mark.usefixtures("_no_room")
def test_without_room_layers_are_checked_one_by_one_and_no_other_copy_is_loaded(tmp_path: Path) -> None:
    finished, checks = doctor(save(tmp_path / "model", CONFIGS["qwen2_moe"]))
    assert finished.status == 0
    assert checks["weight gradients"]["passed"] is True
    assert checks["bias gradients"]["passed"] is True
    for name in ("exact and fast attention", "half precision, scores"):
        assert checks[name]["status"] == "skip"
        assert "GiB are free" in checks[name]["detail"]


@pytest.mark.usefixtures("_no_room")
def test_without_room_for_float32_half_precision_has_a_limit_of_its_own(tmp_path: Path) -> None:
    finished, checks = doctor(save(tmp_path / "model", CONFIGS["gpt2"], dtype=torch.bfloat16))
    assert finished.status == 0, finished.stdout
    assert checks["weight gradients"]["limit"] == gradients.HALF_LIMIT
    assert "in bfloat16 (a copy in float32 needs" in checks["weight gradients"]["detail"]


def test_quantized_weights_have_no_gradient_to_compare_with() -> None:
    model = random_model(CONFIGS["gpt2"]).requires_grad_(False)
    loaded = LoadedModel(model, byte_tokenizer(), find_parts(model))
    packed = nn.Parameter(torch.zeros(32, 128, dtype=torch.uint8), requires_grad=False)
    loaded.parts.blocks[1].module.get_submodule("mlp.c_fc").weight = packed
    found = list(gradients.gradient_checks(ModelCopy(loaded, None, (), ())))
    assert [check.status for check in found] == ["skip", "skip"]
    assert "quantized" in found[0].detail


def test_free_memory_is_less_than_a_machine_has() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
