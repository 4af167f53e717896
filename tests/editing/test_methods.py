"""The change of each method, against direct linear algebra and autograd."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import Conv1D

from backlens.editing.activations import Moments, measure
from backlens.editing.delta import Delta, edited, load_deltas, matrix, merged, save_deltas, weights_digest
from backlens.editing.evaluate import evaluate, prepare, summary
from backlens.editing.methods import Method
from backlens.editing.methods.forward_shift import ForwardShift
from backlens.editing.methods.gradient import FineTune, GradientShift
from backlens.editing.methods.mend import Editor, Mend
from backlens.editing.methods.mend_training import feed_forward_shapes
from backlens.editing.methods.rome_memit import Memit, Rome, spread
from backlens.editing.request import Request
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel, ModelSource, load_model
from tests.families import CONFIGS
from tests.tiny import byte_tokenizer, random_model

LAYER = 5


def input_of_down(loaded: LoadedModel, prompt: str) -> torch.Tensor:
    """FF2's inputs at every position, by a hook and one unpadded pass."""
    kept: list[torch.Tensor] = []
    block = loaded.model.get_submodule(f"transformer.h.{LAYER}.mlp.c_proj")
    handle = block.register_forward_hook(lambda _m, args, _o: kept.append(args[0][0]))
    with torch.no_grad():
        loaded.model(torch.tensor([loaded.tokenizer.encode(prompt)]))
    handle.remove()
    return kept[0]


def test_forward_shift_adds_the_target_embedding_times_the_input(demo, requests):
    request = requests[0]
    (delta,) = ForwardShift((LAYER,), 1.6)(demo, request)
    (token,) = demo.tokenizer.encode(request.target_new)
    x = input_of_down(demo, request.prompt)[-1]
    wanted = 1.6 * torch.outer(x, demo.model.get_output_embeddings().weight[token])
    torch.testing.assert_close(delta.matrix(), wanted, rtol=1e-4, atol=1e-4)


def test_a_normalised_shift_moves_the_output_by_eta_embeddings(demo, requests, moments):
    x = input_of_down(demo, requests[0].prompt)[-1]
    for normalise in ("length", "covariance"):
        (delta,) = ForwardShift((LAYER,), 3.0, normalise, moments=moments)(demo, requests[0])
        (token,) = demo.tokenizer.encode(requests[0].target_new)
        moved = 3.0 * demo.model.get_output_embeddings().weight[token]
        torch.testing.assert_close(x @ delta.matrix(), moved, rtol=1e-3, atol=1e-3)


def test_the_covariance_solve_is_the_ridge_solution(demo, requests, moments):
    some, weight = requests[:7], 50.0
    method = ForwardShift((LAYER,), 2.0, moments=moments, ridge=weight)
    (delta,) = method(demo, *some)
    x = torch.stack([input_of_down(demo, request.prompt)[-1] for request in some]).double()
    tokens = [demo.tokenizer.encode(request.target_new)[0] for request in some]
    v = 2.0 * demo.model.get_output_embeddings().weight[tokens].double()
    c = moments.at(LAYER).double()
    c = c + 1e-4 * c.diagonal().mean() * torch.eye(len(c))
    wanted = torch.linalg.inv(weight * c + x.T @ x) @ x.T @ v
    error = (delta.matrix() - wanted).norm() / wanted.norm()
    assert error < 1e-4


def test_the_ridge_share_of_memit_is_direct_linear_algebra():
    generator = torch.Generator().manual_seed(0)
    keys, residual = (torch.randn(5, width, generator=generator).double() for width in (12, 8))
    root = torch.randn(40, 12, generator=generator).double()
    c = root.T @ root / 40
    u, v = spread(keys.float(), residual.float(), c.float(), 3.0)
    damped = c + 1e-4 * c.diagonal().mean() * torch.eye(12)
    wanted = torch.linalg.inv(3.0 * damped + keys.T @ keys) @ keys.T @ residual
    torch.testing.assert_close((u.T @ v).double(), wanted, rtol=1e-4, atol=1e-5)


def test_rome_is_the_constrained_least_change(demo, requests, moments):
    """The change has the least effect E‖x D‖² of all that give the key its value."""
    (delta,) = Rome(LAYER, moments, place="last")(demo, requests[0])
    k = input_of_down(demo, requests[0].prompt)[-1].double()
    c = moments.at(LAYER).double()
    c = c + 1e-4 * c.diagonal().mean() * torch.eye(len(c))
    change = delta.matrix().double()
    value = k @ change
    inverse = torch.linalg.inv(c)
    wanted = torch.outer(inverse @ k, value) / (k @ inverse @ k)
    assert (change - wanted).norm() / wanted.norm() < 1e-4
    assert value.norm() > 1


def test_memit_writes_many_facts_at_once(demo, requests, moments):
    some = requests[:10]
    method = Memit((4, 5, 6), moments, weight=10.0, place="last")
    with edited(demo, method(demo, *some)):
        found = summary(evaluate(demo, [prepare(demo, request) for request in some]))
    assert found.success["efficacy"] == 1.0


def test_gradient_shift_is_a_step_of_descent(demo, requests):
    request = requests[0]
    deltas = GradientShift((LAYER,), 0.5)(demo, request)
    model = copy.deepcopy(demo.model).requires_grad_(True)
    ids = torch.tensor([demo.tokenizer.encode(request.prompt)])
    (token,) = demo.tokenizer.encode(request.target_new)
    (-model(ids).logits[0, -1].log_softmax(-1)[token]).backward()
    block = model.get_submodule(f"transformer.h.{LAYER}.mlp")
    wanted = {"mlp.up": block.c_fc.weight.grad, "mlp.down": block.c_proj.weight.grad}
    assert {delta.module for delta in deltas} == set(wanted)
    for delta in deltas:
        torch.testing.assert_close(delta.matrix(), -0.5 * wanted[delta.module], rtol=1e-3, atol=1e-6)
    (imprint,) = GradientShift((LAYER,), 0.5, ("mlp.up",))(demo, request)
    assert imprint.module == "mlp.up"


def test_finetuning_stays_within_its_norm(demo, requests):
    (free,) = FineTune((LAYER,), lr=0.02)(demo, requests[0])
    (bound,) = FineTune((LAYER,), lr=0.02, limit=0.01)(demo, requests[0])
    assert free.matrix().abs().max() > 0.011
    assert 0 < bound.matrix().abs().max() <= 0.01 + 1e-6
    with edited(demo, [free]):
        assert evaluate(demo, [prepare(demo, requests[0])])[0].accuracy["efficacy"] == 1.0


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox", "phi3", "falcon", "gemma2"])
def test_every_method_edits_every_dense_family_and_leaves_it_as_it_was(family, tmp_path):
    random_model(CONFIGS[family]).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(ModelSource(str(tmp_path)), torch.device("cpu"))
    request = Request(0, "here", "ab cd ef", " x", "cd", " y", ("gh ij",), ("kl",), " y")
    moments = measure(loaded, ["some text to read", "and some more of it"] * 4, range(2))
    methods: list[Method] = [
        ForwardShift((1,), 0.5, "covariance", moments=moments),
        GradientShift((0, 1), 0.1),
        FineTune((1,), 0.01, modules=("mlp.up", "mlp.down"), steps=3),
        Rome(0, moments),
        Memit((0,), moments, 1.0),
        Mend(Editor(feed_forward_shapes(loaded, (0, 1)), rank=4)),
    ]
    digest = weights_digest(loaded)
    for method in methods:
        deltas = method(loaded, request)
        assert weights_digest(loaded) == digest
        plain = [matrix(loaded, d.layer, d.module).read() for d in merged(deltas)]
        with edited(loaded, deltas):
            assert weights_digest(loaded) != digest
            for delta, before in zip(merged(deltas), plain, strict=True):
                now = matrix(loaded, delta.layer, delta.module).read()
                torch.testing.assert_close(now - before, delta.matrix(), rtol=1e-3, atol=1e-5)
        assert weights_digest(loaded) == digest


def test_a_matrix_is_seen_the_way_round_it_multiplies(demo):
    block = demo.parts.blocks[0].module.get_submodule("mlp.c_proj")
    assert isinstance(block, Conv1D)
    assert not isinstance(block, nn.Linear)
    assert matrix(demo, 0, "mlp.down").read().shape == (512, 128)


def test_weights_come_back_even_after_an_error(demo, requests):
    digest = weights_digest(demo)
    with pytest.raises(ZeroDivisionError), edited(demo, ForwardShift((LAYER,), 1.6)(demo, requests[0])):
        raise ZeroDivisionError
    assert weights_digest(demo) == digest


def test_deltas_survive_their_file_and_merge(tmp_path):
    generator = torch.Generator().manual_seed(0)
    parts = [
        Delta(
            layer, "mlp.down", torch.randn(2, 6, generator=generator), torch.randn(2, 4, generator=generator)
        )
        for layer in (3, 3, 11)
    ]
    path = str(tmp_path / "d.safetensors")
    save_deltas(path, parts, {"method": "rome"})
    deltas, about = load_deltas(path)
    assert about["method"] == "rome"
    assert sorted((d.layer, len(d.u)) for d in deltas) == [(3, 4), (11, 2)]
    for delta in deltas:
        wanted = sum(p.matrix() for p in parts if p.layer == delta.layer)
        torch.testing.assert_close(delta.matrix(), wanted)
        assert delta.norm() == pytest.approx(float(delta.matrix().norm()), rel=1e-5)


def test_a_covariance_is_the_mean_of_outer_products(demo, tmp_path):
    texts = ["Paris is in France.", "The old boat by the river is green and small."]
    moments = measure(demo, texts, [LAYER])
    x = torch.cat([input_of_down(demo, text) for text in texts])
    assert moments.tokens == len(x)
    torch.testing.assert_close(moments.at(LAYER), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    path = str(tmp_path / "c.safetensors")
    moments.save(path, "this model")
    assert torch.equal(Moments.load(path, "this model").at(LAYER), moments.at(LAYER))
    with pytest.raises(BacklensError, match="another model"):
        Moments.load(path, "another")


def test_a_hundred_edits_are_solved_for_without_losing_the_model(demo, requests, moments):
    """The naive sum destroys the model; the iterated covariance solve keeps it."""
    some = requests[:100]
    evaluations = [prepare(demo, request) for request in some]
    found = {}
    for name, method in {
        "naive": ForwardShift((LAYER,), 320, "length"),
        "solve": ForwardShift((LAYER,), 320, moments=moments, ridge=1000, passes=6),
    }.items():
        with edited(demo, method(demo, *some)):
            found[name] = summary(evaluate(demo, evaluations)).success
    assert found["solve"]["efficacy"] >= 0.98
    assert found["solve"]["paraphrase"] >= 0.95
    assert found["solve"]["neighbourhood"] >= 0.9 > found["naive"]["neighbourhood"]


def test_a_request_without_a_subject_is_refused_by_methods_that_need_one(demo, requests, moments):
    lost = replace(requests[0], subject=None)
    with pytest.raises(BacklensError, match="subject"):
        Rome(0, moments)(demo, lost)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_contrasting_shift_is_what_descent_would_add_to_the_heads_input(demo, requests, temperature):
    request = requests[0]
    (delta,) = ForwardShift((LAYER,), 1.0, contrast=True, temperature=temperature)(demo, request)
    (token,) = demo.tokenizer.encode(request.target_new)
    kept: list[torch.Tensor] = []
    hook = demo.model.lm_head.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    with torch.no_grad():
        demo.model(torch.tensor([demo.tokenizer.encode(request.prompt)]))
    hook.remove()
    hidden = kept[0][0, -1].clone().requires_grad_()
    (-(demo.model.lm_head(hidden) / temperature).log_softmax(-1)[token]).backward()
    assert hidden.grad is not None
    wanted = torch.outer(input_of_down(demo, request.prompt)[-1], -temperature * hidden.grad)
    torch.testing.assert_close(delta.matrix(), wanted, rtol=1e-3, atol=1e-4)
