"""MEND's editor: its untrained state, its gradient through an edit, and its training from the command line."""

import json
from pathlib import Path

import duckdb
import pytest
import torch
from torch.func import functional_call

from backlens.cli.main import call
from backlens.demo import FACTS, MODEL
from backlens.editing.delta import matrix, weights_digest
from backlens.editing.methods.gradient import GradientShift
from backlens.editing.methods.mend import Editor, Mend
from backlens.editing.methods.mend_training import Lesson, feed_forward_shapes, losses
from backlens.editing.request import Request
from backlens.models.load import LoadedModel, ModelSource, load_model
from tests.tiny import save_tiny


@pytest.fixture
def llama(tmp_path: Path) -> LoadedModel:
    return load_model(ModelSource(str(save_tiny(tmp_path, "llama"))), torch.device("cpu"))


def untrained(loaded: LoadedModel, layers: tuple[int, ...], rate: float) -> Editor:
    """An editor with a normalisation other than the identity."""
    torch.manual_seed(0)
    editor = Editor(feed_forward_shapes(loaded, layers), rank=8, rate=rate)
    for name, values in editor.named_buffers():
        values.uniform_(0.5, 2.0) if name.endswith("std") else values.normal_()
    return editor


def test_an_editor_that_has_learned_nothing_is_a_step_of_gradient_descent(
    demo: LoadedModel, requests: list[Request]
) -> None:
    some = requests[:3]
    ours = Mend(untrained(demo, (5, 7), rate=0.5))(demo, *some)
    plain = GradientShift((5, 7), 0.5, ("mlp.up", "mlp.down"))(demo, *some)
    assert [(d.layer, d.module) for d in ours] == [(d.layer, d.module) for d in plain]
    for delta, wanted in zip(ours, plain, strict=True):
        scale = float(wanted.matrix().norm())
        assert scale > 0
        assert float((delta.matrix() - wanted.matrix()).norm()) < 1e-3 * scale


def test_the_losses_and_their_gradients_are_those_of_edited_weights(llama: LoadedModel) -> None:
    """Compared with autograd through whole matrices, by functional_call with W + Σ u ⊗ v, one prompt at a time."""
    requests = [Request(0, "a", "ab cd", " x", "cd"), Request(1, "b", "the end", " yz", "end")]
    encode = llama.tokenizer.encode
    lessons = [
        Lesson(
            request,
            [(encode(p), encode(request.target_new)) for p in (request.prompt, f"so {request.prompt}")],
            [(encode("o"), encode("ne two"))],
        )
        for request in requests
    ]
    editor = untrained(llama, (1, 2), rate=0.3)
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    digest = weights_digest(llama)
    edit, locality = losses(llama, editor, lessons)
    ours = torch.autograd.grad(edit + 3.0 * locality, list(editor.parameters()))

    wanted = sum((plain_loss(llama, editor, lesson) for lesson in lessons), torch.zeros(())) / len(lessons)
    theirs = torch.autograd.grad(wanted, list(editor.parameters()))
    torch.testing.assert_close(edit + 3.0 * locality, wanted, rtol=1e-4, atol=1e-6)
    for left, right in zip(ours, theirs, strict=True):
        assert float(right.norm()) > 0
        assert float((left - right).norm()) <= 1e-3 * float(right.norm())
    assert weights_digest(llama) == digest
    assert all(parameter.grad is None for parameter in llama.model.parameters())


def plain_loss(loaded: LoadedModel, editor: Editor, lesson: Lesson) -> torch.Tensor:
    """Loss of one edit: its mean negative log-likelihood, and three times the mean divergence of other predictions."""
    weights = {
        name: value.detach().clone().requires_grad_() for name, value in loaded.model.named_parameters()
    }
    names = {
        key: next(n for n, p in loaded.model.named_parameters() if p is matrix(loaded, *key).parameter)
        for key in editor.shapes
    }

    def scores(of: dict[str, torch.Tensor], row: tuple[list[int], list[int]]) -> torch.Tensor:
        prompt, target = row
        logits = functional_call(loaded.model, of, (torch.tensor([[*prompt, *target[:-1]]]),)).logits[0]
        return logits[len(prompt) - 1 :].log_softmax(-1)

    encode = loaded.tokenizer.encode
    asked = (encode(lesson.request.prompt), encode(lesson.request.target_new))
    kept: dict[tuple[int, str], torch.Tensor] = {}
    hooks = []
    for key in editor.shapes:
        module = loaded.model.get_submodule(names[key].removesuffix(".weight"))

        def keep(
            _m: object, args: tuple[torch.Tensor], output: torch.Tensor, key: tuple[int, str] = key
        ) -> None:
            kept[key] = args[0][0].detach()
            output.register_hook(lambda vjp, key=key: vjps.__setitem__(key, vjp[0]))

        hooks.append(module.register_forward_hook(keep))
    vjps: dict[tuple[int, str], torch.Tensor] = {}
    said = scores(weights, asked)
    (-said[torch.arange(len(asked[1])), asked[1]].sum()).backward()
    for hook in hooks:
        hook.remove()
    edited = {name: value.detach() for name, value in weights.items()}
    for key, name in names.items():
        u, v = editor(key, kept[key], vjps[key])
        edited[name] = edited[name] + (u.T @ v).T  # nn.Linear keeps (out, in)
    before = {name: value.detach() for name, value in weights.items()}
    nll = [-scores(edited, row)[torch.arange(len(row[1])), row[1]].mean() for row in lesson.said]  # pyright: ignore[reportArgumentType, reportCallIssue]
    drift = []
    for row in lesson.kept:
        old, new = scores(before, row), scores(edited, row)  # pyright: ignore[reportArgumentType]
        drift.append((old.exp() * (old - new)).sum(-1).mean())
    return torch.stack(nll).mean() + 3.0 * torch.stack(drift).mean()


def test_an_editor_is_trained_saved_and_used(
    tmp_path: Path, probes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(FACTS.read_text("utf-8"))
    train, held = tmp_path / "train.json", tmp_path / "held.json"
    train.write_text(json.dumps(records[:40]))
    held.write_text(json.dumps(records[500:506]))
    text = tmp_path / "text.txt"
    text.write_text("\n".join((probes / "text.txt").read_text("utf-8").splitlines()[::100]))
    editor, out = str(tmp_path / "editor.safetensors"), str(tmp_path / "s")
    asked = ["edit", "train-mend", editor, "--edits", str(train), "--text", str(text)]
    sized = ["--model", str(MODEL), "--layers", "6-7", "--steps", "12", "--batch", "4", "--rank", "16"]
    assert call([*asked, *sized]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == editor
    assert "step 12 of 12: edit" in captured.err
    use = ["--method", "mend", "--editor", editor, "--model", str(MODEL), "--edits", str(held)]
    assert call(["edit", *use, "--limit", "1"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{layer}.{module}" in shown for layer in (6, 7) for module in ("mlp.up", "mlp.down"))
    sweep = ["edit", "sweep", out, "--methods", "mend", *use[2:]]
    assert call([*sweep, "--layers", "5"]) == 2
    assert "name it by its last, 7" in capsys.readouterr().err
    out = str(tmp_path / "again")
    assert call(["edit", "sweep", out, "--methods", "mend", *use[2:], "--layers", "7"]) == 0
    query = f"SELECT count(*), avg(target_prob / target_prob_before) FROM '{out}/edits/*.parquet'"
    row = duckdb.connect().execute(query).fetchone()
    assert row is not None
    assert row[0] == 6
    assert row[1] > 2


def test_another_models_editor_is_refused(
    tmp_path: Path, llama: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "e.safetensors")
    untrained(llama, (1, 2), 1.0).save(path, {"model": "another"})
    assert call(["edit", "--limit", "1", "--method", "mend", "--editor", path]) == 2
    assert "the editor of another model" in capsys.readouterr().err
