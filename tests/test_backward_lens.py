"""The library: one prompt in a notebook, with the numbers of a run."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
import transformers

import backlens
from backlens import BacklensError, BackwardLens
from tests.engine.command import assert_same_rows, called, in_order, read
from tests.families import CONFIGS as FAMILIES
from tests.tiny import CONFIGS, byte_tokenizer, random_model, save_tiny

RECORDS = [
    {"prompt": "the quick brown", "target": " fox", "subject": "quick"},
    {"prompt": "a", "target": "b"},
    {"prompt": "the lazy dog sleeps in", "target": " Paris"},
    {"prompt": "dogs and", "target": " cats", "subject": "dogs"},
]
TABLES = ("prompts", "layers", "neurons", "tokens", "factors")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def lens(folder: Path) -> BackwardLens:
    return BackwardLens(str(folder))


def test_tables_are_those_of_a_run_over_the_same_prompts(folder: Path, lens: BackwardLens, tmp_path: Path):
    """Bit for bit: the same batches by the same code."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    done = called(
        *("run", "--model", str(folder), "--prompts", str(tmp_path / "prompts.jsonl"), "--modules", "all"),
        *("--out", str(tmp_path / "run"), "--executor", "local", "--save-factors"),
    )
    assert done.status == 0, done.stderr
    g = lens.gradient(RECORDS, modules="all", save_factors=True)
    for name in TABLES:
        expected, found = read(tmp_path / "run", name), in_order(g._tables[name], name)
        assert found.equals(expected), name


def test_factors_multiply_to_the_gradient_of_autograd(folder: Path, lens: BackwardLens):
    g = lens.gradient("the quick brown", " fox", modules="all")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = byte_tokenizer()("the quick brown", return_tensors="pt")["input_ids"]
    target = byte_tokenizer()(" ")["input_ids"][0]
    model(ids).logits[0, -1].log_softmax(-1)[target].neg().backward()
    ending = re.compile(r"\b1\.mlp\.(c_proj|down_proj)\.weight$")
    name, down = next((name, p) for name, p in model.named_parameters() if ending.search(name))
    assert down.grad is not None
    expected = down.grad if "c_proj" in name else down.grad.mT  # Conv1D keeps (in, out)
    found = g[1, "mlp.down"]
    assert (found.matrix - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(found.x.mT @ found.delta, found.matrix)


def test_promoted_and_suppressed_tokens_are_the_ends_of_a_full_projection(folder: Path, lens: BackwardLens):
    g = lens.gradient("the quick brown", " fox")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    delta = g[2, "mlp.down"].delta
    with torch.no_grad():
        scores = model.lm_head(norm(delta[-1]))[: len(byte_tokenizer())].double()
    order = scores.argsort().tolist()
    promoted, suppressed = g[2, "mlp.down"].promoted(k=5), g[2, "mlp.down"].suppressed(k=5)
    assert [token.id for token in promoted] == order[:5]
    assert [token.id for token in suppressed] == order[::-1][:5]
    assert promoted[0] == byte_tokenizer().decode([order[0]])
    assert promoted[0].score == pytest.approx(float(scores[order[0]]), rel=1e-4)
    assert g[2, "mlp.down"].promoted(position=len(delta) - 1, k=5) == promoted
    with pytest.raises(BacklensError, match=r"mlp.up reads the residual stream"):
        g[2, "mlp.up"].promoted()


def state(model: Any) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "training": [module.training for module in model.modules()],
        "grad flags": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "dtypes": [parameter.dtype for parameter in model.parameters()],
        "devices": [parameter.device for parameter in model.parameters()],
        "weights": [parameter.detach().clone() for parameter in model.parameters()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "own forward": ["forward" in vars(module) for module in model.modules()],
        "attention": model.config._attn_implementation,
        "experts": model.config._experts_implementation,
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_a_model_in_memory_is_used_as_it_is_and_left_as_it_was(family: str, tmp_path: Path):
    config = copy.deepcopy({**FAMILIES, **CONFIGS}[family])
    model = random_model(config)
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    expected = BackwardLens(str(tmp_path)).gradient(RECORDS, modules="all")
    model.set_attn_implementation("sdpa")
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    with torch.no_grad():  # a caller's own mode does not matter
        found = BackwardLens((model, tokenizer)).gradient(RECORDS, modules="all")
    for name in ("prompts", "layers", "neurons", "tokens"):
        ours, theirs = (in_order(g._tables[name], name) for g in (found, expected))
        assert_same_rows(ours, theirs, name)
    after = state(model)
    assert all(torch.equal(a, b) for a, b in zip(before.pop("weights"), after.pop("weights"), strict=True))
    assert after == before


def test_a_callers_inference_mode_does_not_matter(folder: Path):
    with torch.inference_mode():
        found = BackwardLens(str(folder)).gradient("the quick brown", " fox")
    assert found.tokens == BackwardLens(str(folder)).gradient("the quick brown", " fox").tokens


def test_token_ids_are_taken_as_they_are(lens: BackwardLens):
    ids = byte_tokenizer()("the quick brown")["input_ids"]
    target = byte_tokenizer()(" fox")["input_ids"]
    from_text, from_ids = lens.gradient("the quick brown", " fox"), lens.gradient(ids, target)
    for name in ("layers", "neurons", "tokens"):
        assert from_ids._tables[name].equals(from_text._tables[name])
    assert lens.gradient(ids, target[0]).tokens == from_ids.tokens
    both = lens.gradient([ids, torch.tensor(ids)], [target, target])
    assert both.prompt["prompt"].to_pylist() == ["the quick brown"] * 2
    with pytest.raises(BacklensError, match=r"the model has no token 300; its ids are 0 to 299"):
        lens.gradient([1, 300], 5)


def test_texts_stand_beside_ids(lens: BackwardLens):
    g = lens.gradient("the quick brown", " fox", subject="quick")
    row = g.tokens.to_pylist()[0]
    assert row["token"] == byte_tokenizer().decode([row["token_id"]])
    assert row["top_tokens"] == [byte_tokenizer().decode([token]) for token in row["top_ids"]]
    assert (g.prompt["subject_start"][0].as_py(), g.prompt["subject_end"][0].as_py()) == (4, 9)
    assert isinstance(pa.table(g.tokens), pa.Table)
    assert isinstance(g.tokens.to_pandas(), pd.DataFrame)
    assert isinstance(g.tokens.to_polars(), pl.DataFrame)
    assert g.tokens.to_polars().height == g.tokens.num_rows


def test_of_many_prompts_those_that_fail_are_rows_and_one_prompt_raises(lens: BackwardLens):
    g = lens.gradient(["the quick", "", "a lazy"], [" fox", " dog", " cat"])
    assert g.prompt["prompt_id"].to_pylist() == [0, 2]
    assert g.failures["prompt_id"].to_pylist() == [1]
    with pytest.raises(BacklensError, match=r"prompt 0: field 'prompt' is empty"):
        lens.gradient("", " fox")
    with pytest.raises(BacklensError, match=r"3 prompts need a list of as many"):
        lens.gradient(["a", "b", "c"], [" x"])
    with pytest.raises(BacklensError, match=r"write g\[prompt, layer, module\]"):
        lens.gradient(["a", "b"], [" x", " y"], save_factors=True)[0, "mlp.down"]
    with pytest.raises(BacklensError, match=r"save_factors=True"):
        g[0, 0, "mlp.down"]


def test_experts_are_named_in_the_third_place(tmp_path: Path):
    model = random_model(FAMILIES["mixtral"])
    g = BackwardLens(model, byte_tokenizer()).gradient("the quick brown", " fox")
    expert = g.tokens["expert"].to_pylist()[0]
    assert g[0, "mlp.down", expert].delta.shape[1] == model.config.hidden_size
    with pytest.raises(BacklensError, match=r"has experts \("):
        g[0, "mlp.down"]


def test_a_heatmap_shows_itself_without_script_or_network(lens: BackwardLens, tmp_path: Path):
    g = lens.gradient("the <b>quick", " fox")
    shown = g.heatmap("mlp.down")._repr_html_()
    assert g._repr_html_() == shown
    assert not re.search(r"<script|<link|https?:|src=|url\(", shown)
    assert "<b>quick" not in shown
    assert shown.count("<tr>") == 1 + lens.layers
    for name in ("map.html", "map.svg", "map.png"):
        g.heatmap("mlp.down").save(str(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(BacklensError, match=r"no rows of attn.o; there are layers 0 to 2 of mlp"):
        g.heatmap("attn.o")


def test_a_gradient_loads_no_ray_no_database_and_no_server(folder: Path):
    code = (
        "import sys, backlens\n"
        f"g = backlens.BackwardLens({str(folder)!r}).gradient('the quick', ' fox')\n"
        "g.tokens, g.heatmap('mlp.down')._repr_html_()\n"
        "print([name for name in ('ray', 'duckdb', 'starlette', 'uvicorn', 'datasets') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_import_backlens_is_quick():
    """Under 0.3 s; several tries, for the machine may be busy."""
    code = "import time; t = time.perf_counter(); import backlens; print(time.perf_counter() - t)"
    tries = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(tries) < 0.3


def test_runs_from_python(folder: Path, tmp_path: Path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    given = {"model": str(folder), "prompts": str(tmp_path / "prompts.jsonl")}
    run = backlens.run(**given, out=str(tmp_path / "run"), executor="local")
    assert run.prompts().num_rows == len(RECORDS)
    assert run.sql("SELECT count(*) AS n FROM tokens").to_pylist() == [{"n": run.tokens().num_rows}]
    opened = backlens.open(str(tmp_path / "run"))
    rows = opened.tokens(prompt=0, layer=1, module="mlp.down")
    assert rows["token"].to_pylist() == list("the quick brown")
    assert opened.atlas.by_prompt(0).num_rows == len(opened.tokens(prompt=0))
    assert backlens.plan(**given, out=str(tmp_path / "planned")).expected.prompts == len(RECORDS)
    with pytest.raises(BacklensError, match=r"run: no option 'modle'; did you mean model\?"):
        backlens.run(modle="gpt2")
    with pytest.raises(BacklensError, match=r"run.json"):
        backlens.open(str(tmp_path))
