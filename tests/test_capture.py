"""Captured factors against autograd on the weights, in every family and either padding."""

import pytest
import torch

from backlens.capture.batch import Side, make_batch
from backlens.capture.hooks import Gradient, capture
from backlens.capture.loss import Outcome
from backlens.models.load import LoadedModel, ModelSource, load_model
from tests.oracle import Oracle
from tests.tiny import CONFIGS, save_tiny

PROMPTS = [[5], [7, 1, 2], list(range(40, 60)), [9, 9, 9, 9]]
TARGETS = [[3], [250, 4, 4], [8, 1], [77]]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny(tmp_path_factory.mktemp("model"), request.param)
    return load_model(ModelSource(str(folder)), torch.device("cpu"))


def captured(loaded: LoadedModel, side: Side, modules: list[str]) -> tuple[list[list[Gradient]], Outcome]:
    groups: list[list[Gradient]] = []
    batch = make_batch(list(zip(PROMPTS, TARGETS, strict=True)), torch.device("cpu"), side)
    outcome = capture(loaded, batch, range(3), modules, lambda group: groups.append(list(group)))
    return groups, outcome


@pytest.mark.parametrize("side", ["right", "left"])
def test_inputs_times_vjps_are_the_weight_gradients_of_a_teacher_forced_target(
    loaded: LoadedModel, side: Side
) -> None:
    oracle = Oracle(loaded.model)
    groups, outcome = captured(loaded, side, oracle.modules)
    batch = make_batch(list(zip(PROMPTS, TARGETS, strict=True)), torch.device("cpu"), side)
    seen = set()
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        truth = oracle.truth(prompt, target)
        assert outcome.loss[row].item() == pytest.approx(truth.loss, rel=1e-5)
        for gradient in (gradient for group in groups for gradient in group):
            key = (gradient.layer, gradient.module)
            seen.add(key)
            own = batch.mask[row]
            x, vjp = gradient.x[row][own], gradient.vjp[row][own]
            product = x.double().T @ vjp.double()
            expected = truth.gradients[key]
            # attention over one token has a gradient of zero, up to rounding in its float32 softmax
            assert (product - expected).norm() <= 1e-5 * max(expected.norm().item(), 0.05)
    assert len(seen) == 3 * len(oracle.modules)


def test_modules_that_share_an_input_arrive_together_and_the_last_layer_first(loaded: LoadedModel) -> None:
    modules = Oracle(loaded.model).modules
    groups, _ = captured(loaded, "right", modules)
    reading = {"attn": {"attn.q", "attn.k", "attn.v"}, "mlp": {"mlp.up", "mlp.gate"} & set(modules)}
    for group in groups:
        names = {gradient.module for gradient in group}
        assert names in (reading["attn"], reading["mlp"], {"mlp.down"}, {"attn.o"})
        assert len({gradient.x.data_ptr() for gradient in group}) == 1
    layers = [group[0].layer for group in groups]
    assert layers == sorted(layers, reverse=True)


def test_capture_leaves_the_model_as_it_was_and_never_makes_a_weight_gradient(loaded: LoadedModel) -> None:
    captured(loaded, "right", ["mlp.down", "attn.q"])
    for name, parameter in loaded.model.named_parameters():
        assert parameter.grad is None, name
        assert not parameter.requires_grad, name
    for module in loaded.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_only_the_chosen_modules_of_a_fused_matrix_arrive(loaded: LoadedModel) -> None:
    groups, _ = captured(loaded, "right", ["attn.k"])
    assert [[g.module for g in group] for group in groups] == [["attn.k"]] * 3


def test_outcomes_are_those_of_the_models_logits(loaded: LoadedModel) -> None:
    _, outcome = captured(loaded, "right", ["mlp.down"])
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([prompt])).logits[0, -1]
        assert outcome.predicted_id[row] == logits.argmax()
        assert outcome.target_rank[row] == (logits > logits[target[0]]).sum()
