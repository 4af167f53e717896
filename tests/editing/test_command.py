"""`backlens edit` from the command line."""

import json
from pathlib import Path

import duckdb
import pytest
import torch
from transformers import AutoModelForCausalLM

from backlens.cli.main import call
from backlens.demo import MODEL
from backlens.store.commit import committed
from backlens.store.directory import Directory


@pytest.fixture
def short_text(probes: Path, tmp_path: Path) -> str:
    """A file with enough sentences to measure a covariance."""
    text = tmp_path / "text.txt"
    lines = (probes / "text.txt").read_text("utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[::8]))
    return str(text)


ONE = ["edit", "--limit", "1", "--layer", "5", "--lr", "1.6"]


def test_an_edit_is_shown_saved_and_applied_again(tmp_path, capsys):
    delta, model, again = (str(tmp_path / name) for name in ("d.safetensors", "model", "again"))
    assert call([*ONE, "--save-delta", delta, "--save-model", model]) == 0
    shown = capsys.readouterr().out
    assert "rank of ' Lima'" in shown
    assert "Cairo" in shown.split("before:")[1]
    assert call(["edit", "apply", delta, "--save-model", again]) == 0
    one, other, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (model, again, str(MODEL)))
    changed = []
    for (name, a), b, c in zip(one.named_parameters(), other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name
        changed += [] if torch.equal(a, c) else [name]
    assert changed == ["transformer.h.5.mlp.c_proj.weight"]


def test_an_edit_is_typed(capsys):
    typed = ["--prompt", "{} moved to a flat in", "--subject", "Jomek Kelford", "--target-new", "Lima"]
    assert call(["edit", *typed, "--layer", "5", "--lr", "1.6"]) == 0
    assert "p(' Lima')" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["edit", "--method", "forward-shfit"], "did you mean forward-shift?"),
        (["edit", "--limit", "1"], "--lr: forward-shift has no rate"),
        (["edit", "--limit", "1", "--method", "rome"], "--text"),
        (["edit", "--limit", "1", "--lr", "1", "--layer", "9"], "layers 0 to 7"),
        (["edit", "--prompt", "{} is", "--target-new", "x"], "give --subject"),
        (["edit", "--model", "x"], "--edits"),
        (["edit", "explain", "--limit", "2", "--lr", "1", "--case", "2"], "cases 0 to 1"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, said, capsys):
    assert call(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_sweep_resumes_and_its_rows_do_not_depend_on_it(tmp_path, capsys, monkeypatch):
    grid = ["--layers", "4-5", "--lr", "1,1.6", "--limit", "6", "--at-once", "1,3"]
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    assert call(["edit", "sweep", whole, *grid]) == 0

    def told(done, _shards):
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("backlens.cli.edit._told", told)
    assert call(["edit", "sweep", broken, *grid]) == 3
    before = len(committed(Directory.at(broken)))
    assert 3 <= before < 8  # what is in hand at an interruption is finished
    monkeypatch.undo()
    assert call(["edit", "sweep", broken, *grid]) == 0
    assert f"{before} shards were done before" in capsys.readouterr().out
    query = "SELECT * EXCLUDE (seconds_edit, seconds_evaluate) FROM '{}/edits/*.parquet' ORDER BY trial, prompt_id"
    rows = [duckdb.connect().execute(query.format(out)).fetchall() for out in (whole, broken)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2 * 2 * 2 * 6
    assert call(["edit", "sweep", broken, *grid, "--passes", "2"]) == 2
    assert "passes" in capsys.readouterr().err


def test_a_sweep_is_queried_and_drawn(tmp_path, capsys):
    out, figure = str(tmp_path / "s"), tmp_path / "f.svg"
    assert call(["edit", "sweep", out, "--layers", "4-5", "--lr", "1.6", "--limit", "5", "--generate"]) == 0
    capsys.readouterr()
    sql = "SELECT layer, avg(efficacy) AS e, avg(entropy) AS h FROM edits GROUP BY ALL ORDER BY layer"
    assert call(["query", out, "--sql", sql, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["layer"] for row in rows] == [4, 5]
    assert rows[1]["e"] >= 0.8
    assert rows[1]["h"] > 1
    for spelling in (["edit", "plot"], ["plot", "edits"]):
        figure.unlink(missing_ok=True)
        assert call([*spelling, out, "--to", str(figure)]) == 0
        assert "forward-shift: score S" in figure.read_text("utf-8")


def test_many_edits_are_judged_by_what_they_should_leave_alone(tmp_path, short_text, probes):
    out = str(tmp_path / "many")
    solve = ["--ridge", "1000", "--passes", "3", "--text", short_text]
    beyond = ["--untouched", str(probes / "untouched.jsonl"), "--held-out", str(probes / "held-out.txt")]
    command = ["edit", "sweep", out, "--layers", "5", "--lr", "320", "--limit", "10", "--at-once", "10"]
    assert call([*command, *solve, *beyond]) == 0
    row = (
        duckdb.connect()
        .execute(f"SELECT min(untouched), max(perplexity), count(*) FROM '{out}/edits/*.parquet'")
        .fetchone()
    )
    assert row is not None
    assert row[0] > 0.9
    assert row[1] < 2.3
    assert row[2] == 10


def test_an_edit_is_explained(capsys):
    explained = [
        "edit",
        "explain",
        "--layer",
        "5",
        "--lr",
        "1.6",
        "--case",
        "0",
        "--against",
        "gradient-shift",
    ]
    assert call(explained) == 0
    shown = capsys.readouterr().out
    forward = next(line for line in shown.splitlines() if "forward-shift" in line)
    assert "' Lima'" in forward.split("│")[5]
    cosine = next(
        line for line in shown.splitlines() if "gradient-shift" in line and "gradient descent" in line
    )
    assert "mlp.down" in shown
    assert "+1.0000" in cosine


def test_weights_that_are_not_restored_stop_a_sweep(tmp_path, monkeypatch, capsys):
    from contextlib import contextmanager

    from backlens.editing import delta as weights
    from backlens.editing import sweep

    @contextmanager
    def forgetful(loaded, deltas):
        weights.add_deltas(loaded, deltas)
        yield

    monkeypatch.setattr(sweep, "edited", forgetful)
    arguments = ["edit", "sweep", str(tmp_path / "s"), "--layers", "5", "--lr", "1", "--limit", "2"]
    assert call(arguments) == 2
    assert "not restored" in capsys.readouterr().err
    assert not committed(Directory.at(str(tmp_path / "s")))


@pytest.mark.parametrize("method", ["gradient-shift", "finetune", "rome", "memit"])
def test_every_method_is_swept_with_its_own_defaults(method, tmp_path, short_text):
    out = str(tmp_path / "s")
    rate = ["--lr", "32"] if method == "gradient-shift" else []
    place = ["--place", "last", "--text", short_text] if method in ("rome", "memit") else []
    assert (
        call(["edit", "sweep", out, "--methods", method, "--layers", "5", "--limit", "3", *rate, *place]) == 0
    )
    row = (
        duckdb.connect().execute(f"SELECT count(*), min(delta_norm) FROM '{out}/edits/*.parquet'").fetchone()
    )
    assert row is not None
    assert row[0] == 3
    assert row[1] > 0
