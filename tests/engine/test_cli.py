"""The command line: what it refuses and in which words, and that every option does what it says."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from backlens.config import RunConfig, flag
from tests.engine.command import (
    Finished,
    assert_complete,
    assert_same_rows,
    assert_same_run,
    backlens,
    called,
    error_line,
    read,
    tables_of,
    write_jsonl,
)
from tests.engine.conftest import some_prompts
from tests.tiny import CONFIGS, byte_tokenizer, random_model

PROMPTS = 12
FLAGS = [f"--{flag(field.name)}" for field in fields(RunConfig)]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a temporary folder: a command that is wrongly accepted runs the demo into ./demo-run."""
    monkeypatch.chdir(tmp_path)


def run(model: Path, prompts: Path, out: Path, *options: object) -> Finished:
    return called(
        "run", "--model", model, "--prompts", prompts, "--out", out, "--executor", "local", *options
    )


@pytest.fixture(scope="module")
def default_run(gpt2: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "default"
    assert run(gpt2, prompts_file, out).status == 0
    assert_complete(out, PROMPTS)
    return out


@pytest.fixture
def done(gpt2: Path, prompts_file: Path, tmp_path: Path) -> Any:
    """Runs with options, and gives the directory."""

    def finished(*options: object) -> Path:
        result = run(gpt2, prompts_file, tmp_path / "out", *options)
        assert result.status == 0, result.stderr
        return tmp_path / "out"

    return finished


# What is refused, by the console script itself


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--modles", "mlp"), ("--modles", "--modules")),
        (("run", "--top-k", "ten"), ("--top-k", "ten")),
        (("run", "--executor", "spark"), ("--executor", "spark", "local", "ray")),
        (("run", "--top-k", "0"), ("--top-k 0",)),
        (("run", "--neurons", "-2"), ("--neurons -2", "-1 for all")),
        (("run", "--neurons", "1.5"), ("--neurons", "1.5")),
        (("run", "--limit", "0"), ("--limit 0",)),
        (("run", "--batch-tokens", "0"), ("--batch-tokens 0",)),
        (("run", "--replicas", "0"), ("--replicas 0",)),
        (("run", "--executor", "local", "--replicas", "2"), ("--executor local", "--replicas")),
        (("run", "--out"), ("--out",)),
        (("run", "a.yaml", "b.yaml"), ("b.yaml",)),
        (("run", "missing.yaml"), ("missing.yaml",)),
        (("rum",), ("rum", "run")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_usage_error_is_one_line_that_names_the_option(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused = backlens(*arguments)
    line = error_line(refused)
    assert refused.status == 2
    assert refused.stdout == ""
    for word in words:
        assert word in line


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_line_and_leaves_no_directory(
    prompts_file: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "no-model"
    out = tmp_path / "out"
    command = ("run", "--model", missing, "--prompts", prompts_file, "--out", out)
    refused = called(*command)
    assert refused.status == 2
    assert str(missing) in error_line(refused)
    assert not out.exists()
    out.mkdir()  # the user's own stays
    assert called(*command).status == 2
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layers", "3"), ("--layers", "0 to 2")),
        (("--layers", "2-1"), ("--layers",)),
        (("--layers", "first"), ("--layers", "first")),
        (("--modules", "mlp.gate"), ("--modules", "mlp.gate", "mlp.up")),
        (("--top-k", 1000), ("--top-k 1000", "300")),
        (("--prepend-bos", "true"), ("--prepend-bos", "beginning-of-sequence")),
        (("--format", "counterfact"), ("prompts.jsonl",)),
    ],
)
def test_an_option_that_does_not_fit_model_or_prompts_is_one_line(
    options: tuple[object, ...], words: tuple[str, ...], gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    refused = run(gpt2, prompts_file, tmp_path / "out", *options)
    assert refused.status == 2
    line = refused.stderr.splitlines()[-1]
    assert line.startswith("backlens: ")
    assert "Traceback" not in refused.stderr
    for word in words:
        assert word in line


def test_a_model_folder_without_weights_is_one_line(gpt2: Path, prompts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_text((gpt2 / file).read_text())
    refused = run(tmp_path / "model", prompts_file, tmp_path / "out")
    assert refused.status == 2
    assert refused.stderr.splitlines()[-1].startswith(
        f"backlens: model: {tmp_path / 'model'} cannot be loaded"
    )


def test_prompts_that_are_not_there_are_one_line(gpt2: Path, tmp_path: Path) -> None:
    refused = run(gpt2, tmp_path / "none.jsonl", tmp_path / "out")
    assert refused.status == 2
    assert "none.jsonl" in error_line(refused)
    assert "--prompts" in error_line(refused)


def test_a_field_that_no_record_has_is_refused(gpt2: Path, prompts_file: Path, tmp_path: Path) -> None:
    refused = run(gpt2, prompts_file, tmp_path / "out", "--prompt-field", "text")
    assert refused.status == 2
    assert "no field 'text'" in error_line(refused)
    assert not (tmp_path / "out").exists()


def test_a_model_of_an_unknown_family_is_one_line(prompts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused = run(tmp_path / "model", prompts_file, tmp_path / "out")
    assert refused.status == 2
    assert "bert" in error_line(refused)


def test_prompts_without_an_out_ask_for_one(gpt2: Path, prompts_file: Path) -> None:
    refused = called("run", "--model", gpt2, "--prompts", prompts_file)
    assert refused.status == 2
    assert "--out" in error_line(refused)


def test_an_empty_prompts_file_is_one_line(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    refused = run(gpt2, tmp_path / "empty.jsonl", tmp_path / "out")
    assert refused.status == 2
    assert "empty.jsonl" in error_line(refused)


def test_a_file_where_the_directory_should_be_is_one_line(
    gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    refused = run(gpt2, prompts_file, tmp_path / "out")
    assert refused.status == 2
    assert str(tmp_path / "out") in error_line(refused)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_directory_that_is_not_a_run_is_left_as_it_is(
    gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    refused = run(gpt2, prompts_file, tmp_path / "out")
    assert refused.status == 2
    assert "thesis.tex" in error_line(refused)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_one_line(
    gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    refused = run(gpt2, prompts_file, tmp_path / "out")
    assert refused.status == 2
    assert str(tmp_path / "out") in error_line(refused)


def test_a_full_disk_ends_the_run_with_one_line_and_can_be_resumed(
    gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (30_000, hard)
    )  # larger files than this fail, as on a full disk
    try:
        stopped = run(gpt2, prompts_file, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stopped.status == 3
    assert stopped.stderr.splitlines()[-1].startswith("backlens: out: cannot write ")
    assert "Traceback" not in stopped.stderr
    assert run(gpt2, prompts_file, tmp_path / "out").status == 0
    assert_complete(tmp_path / "out", PROMPTS)


# Configuration files


def test_an_unknown_key_in_a_configuration_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("topk: 3\n")
    refused = called("run", tmp_path / "job.yaml")
    assert refused.status == 2
    assert "'topk'" in error_line(refused)
    assert error_line(refused).endswith("did you mean top-k?")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("top-k: ten\n", ("top-k", "ten")),
        ("executor: spark\n", ("executor", "spark")),
        ("- top-k\n", ("job.yaml", "mapping")),
        ("top-k: [\n", ("job.yaml",)),
        ("neurons: 1.5\n", ("neurons", "1.5")),
    ],
)
def test_a_bad_value_in_a_configuration_file_is_one_line(
    text: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    refused = called("run", tmp_path / "job.yaml")
    assert refused.status == 2
    for word in words:
        assert word in error_line(refused)


def test_flags_override_the_configuration_file(gpt2: Path, prompts_file: Path, tmp_path: Path) -> None:
    options = {
        "model": str(gpt2),
        "prompts": str(prompts_file),
        "top-k": 3,
        "neurons": 2,
        "executor": "local",
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(options | {"out": str(tmp_path / "elsewhere")}))
    done = called("run", tmp_path / "job.yaml", "--out", tmp_path / "out", "--top-k", 4)
    assert done.status == 0, done.stderr
    assert not (tmp_path / "elsewhere").exists()
    assert _lengths(read(tmp_path / "out", "layers")["top_ids"]) == {4}
    assert set(_group_sizes(read(tmp_path / "out", "neurons"))) == {2}


def test_the_configuration_file_of_a_run_makes_the_same_run(done: Any, tmp_path: Path) -> None:
    out = done(
        *("--top-k", 7, "--modules", "all", "--layers", "0,2", "--positions", "subject+last", "--neurons", 3),
        *("--scaling", "unit", "--target-mode", "all", "--save-factors", "--limit", 5),
    )
    again = called("run", out / "config.yaml", "--out", tmp_path / "again")
    assert again.status == 0, again.stderr
    assert tables_of(out) == ["factors", "failures", "layers", "neurons", "prompts", "tokens"]
    assert_same_run(out, tmp_path / "again")


# Help


@pytest.mark.parametrize("command", ["run", "plan", "query"])
def test_the_help_of_a_command_shows_an_example(command: str) -> None:
    shown = backlens(command, "--help")
    assert shown.status == 0
    assert shown.stderr == ""
    assert f"Example: backlens {command} " in shown.stdout
    if command != "query":
        assert [
            name for name in FLAGS if f"{name} " not in shown.stdout and f"{name}\n" not in shown.stdout
        ] == []


def test_the_help_of_the_program_lists_its_commands_and_needs_no_model() -> None:
    shown = backlens("--help")
    assert shown.status == 0
    for command in ("run", "plan", "query"):
        assert f"\n│ {command} " in shown.stdout
    assert backlens("--version").stdout.strip()


# What options do


def test_the_defaults_are_those_of_the_documentation(default_run: Path) -> None:
    tokens, neurons = read(default_run, "tokens"), read(default_run, "neurons")
    assert set(tokens["module"].to_pylist()) == {"mlp.up", "mlp.down"}
    assert set(tokens["layer"].to_pylist()) == {0, 1, 2}
    assert _lengths(tokens["top_ids"]) == {10, None}  # zero VJPs of the last layer have no lists
    assert set(_group_sizes(neurons)) == {16}
    assert set(_group_sizes(tokens)) == set(read(default_run, "prompts")["n_tokens"].to_pylist())
    assert tables_of(default_run) == ["failures", "layers", "neurons", "prompts", "tokens"]


def test_layers_and_modules_choose_the_matrices(done: Any) -> None:
    out = done("--layers", "0,2", "--modules", "mlp.down,attn.o")
    for table in ("layers", "neurons", "tokens"):
        rows = read(out, table)
        assert set(rows["layer"].to_pylist()) == {0, 2}
        assert set(rows["module"].to_pylist()) == {"mlp.down", "attn.o"}


@pytest.mark.parametrize(
    ("option", "modules"),
    [("mlp", {"mlp.up", "mlp.down"}), ("attn", {"attn.q", "attn.k", "attn.v", "attn.o"})],
)
def test_modules_may_be_named_by_their_kind(option: str, modules: set[str], done: Any) -> None:
    assert set(read(done("--modules", option, "--neurons", 0), "layers")["module"].to_pylist()) == modules


def test_positions_last_keeps_the_position_of_the_loss(done: Any, default_run: Path) -> None:
    out = done("--positions", "last")
    rows = read(out, "tokens")
    lengths = dict(
        zip(*(read(out, "prompts")[name].to_pylist() for name in ("prompt_id", "n_tokens")), strict=True)
    )
    assert rows.num_rows == PROMPTS * 3 * 2
    for row in rows.to_pylist():
        assert row["position"] == lengths[row["prompt_id"]] - 1
    _assert_same_tables(out, default_run, ("layers", "neurons"))


def test_positions_subject_and_last_keeps_those_of_the_subject_too(done: Any) -> None:
    out = done("--positions", "subject+last", "--layers", "0", "--modules", "mlp.up")
    kept: dict[int, list[int]] = {}
    for row in read(out, "tokens").to_pylist():
        kept.setdefault(row["prompt_id"], []).append(row["position"])
    for prompt in read(out, "prompts").to_pylist():
        expected = {*range(prompt["subject_start"], prompt["subject_end"]), prompt["n_tokens"] - 1}
        assert kept[prompt["prompt_id"]] == sorted(expected)


def test_neurons_0_writes_an_empty_table(done: Any, default_run: Path) -> None:
    out = done("--neurons", 0)
    assert read(out, "neurons").num_rows == 0
    _assert_same_tables(out, default_run, ("layers", "tokens"))


def test_neurons_minus_1_keeps_them_all(done: Any) -> None:
    rows = read(done("--neurons", -1, "--layers", "1", "--limit", 2), "neurons")
    found = {(row["prompt_id"], row["module"], row["neuron"]) for row in rows.to_pylist()}
    assert found == {(p, m, n) for p in (0, 1) for m in ("mlp.up", "mlp.down") for n in range(128)}


def test_kept_neurons_are_the_strongest(done: Any, default_run: Path) -> None:
    every = read(done("--neurons", -1), "neurons").to_pylist()
    norms: dict[tuple[Any, ...], list[float]] = {}
    for row in every:
        norms.setdefault((row["prompt_id"], row["layer"], row["module"]), []).append(row["grad_norm"])
    for row in read(default_run, "neurons").to_pylist():
        group = sorted(norms[row["prompt_id"], row["layer"], row["module"]], reverse=True)
        assert row["grad_norm"] >= group[15] * (1 - 1e-5)


def test_target_mode_all_takes_the_loss_over_every_target_token(done: Any, default_run: Path) -> None:
    out = done("--target-mode", "all")
    first, whole = read(default_run, "prompts").to_pylist(), read(out, "prompts").to_pylist()
    for one, all_of_it in zip(first, whole, strict=True):
        assert one["target_ids"] == all_of_it["target_ids"]
        assert len(one["target_ids"]) > 1
        assert all_of_it["loss"] > one["loss"]
        assert all_of_it["target_rank"] == one["target_rank"]  # of the first token in either mode
        for row in (one, all_of_it):
            assert row["target_prob"] == pytest.approx(np.exp(-row["loss"]), rel=1e-5)
    extra = [len(prompt["target_ids"]) - 1 for prompt in whole]
    positions = [prompt["n_tokens"] + more for prompt, more in zip(whole, extra, strict=True)]
    assert set(_group_sizes(read(out, "tokens"))) == set(positions)


def test_save_factors_writes_x_and_delta_of_every_position(done: Any) -> None:
    out = done("--save-factors", "--modules", "all")
    factors, tokens, layers = (read(out, table) for table in ("factors", "tokens", "layers"))
    keys = ("prompt_id", "layer", "module", "position")
    assert factors.select(keys).equals(tokens.select(keys))
    shapes = {"mlp.up": (32, 128), "mlp.down": (128, 32)}
    gradients: dict[tuple[Any, ...], np.ndarray] = {}
    for row, token in zip(factors.to_pylist(), tokens.to_pylist(), strict=True):
        x, delta = np.array(row["x"]), np.array(row["delta"])
        assert (len(x), len(delta)) == shapes.get(row["module"], (32, 32))
        assert np.linalg.norm(x) == pytest.approx(token["input_norm"], rel=1e-5)
        assert np.linalg.norm(delta) == pytest.approx(token["vjp_norm"], rel=1e-5, abs=1e-12)
        key = (row["prompt_id"], row["layer"], row["module"])
        gradients[key] = gradients.get(key, 0) + np.outer(x, delta)
    for row in layers.to_pylist():
        gradient = gradients[row["prompt_id"], row["layer"], row["module"]]
        assert np.linalg.norm(gradient) == pytest.approx(row["grad_norm"], rel=1e-4, abs=1e-9)


def test_limit_takes_the_first_prompts(done: Any) -> None:
    out = done("--limit", 5)
    assert_complete(out, 5)
    assert read(out, "prompts")["id"].to_pylist() == [f"p{number}" for number in range(5)]


def test_scaling_unit_changes_scores_and_nothing_else(done: Any, default_run: Path) -> None:
    unit, raw = read(done("--scaling", "unit"), "tokens"), read(default_run, "tokens")
    for name in ("input_norm", "vjp_norm"):
        assert np.allclose(unit[name].to_numpy(), raw[name].to_numpy())
    assert unit["top_scores"].to_pylist() != raw["top_scores"].to_pylist()
    # A VJP far shorter than the norm's eps is lost in the raw scores' bias, and stands out in the unit ones.
    smallest = int(np.argmin(np.where(raw["vjp_norm"].to_numpy() > 0, raw["vjp_norm"].to_numpy(), np.inf)))
    spread = [rows["top_scores"][smallest].as_py() for rows in (unit, raw)]
    assert spread[0] != pytest.approx(spread[1])


def test_top_k_sets_the_length_of_the_lists(done: Any, default_run: Path) -> None:
    short, long = read(done("--top-k", 3), "tokens"), read(default_run, "tokens")
    for name in ("top_ids", "bottom_ids"):
        assert short[name].to_pylist() == [ids and ids[:3] for ids in long[name].to_pylist()]


def test_fields_may_have_other_names(gpt2: Path, tmp_path: Path) -> None:
    names = {"prompt": "question", "target": "answer", "subject": "who", "id": "key"}
    records = [{names[key]: value for key, value in record.items()} for record in some_prompts(3)]
    path = write_jsonl(tmp_path / "prompts.jsonl", records)
    options = [word for role, name in names.items() for word in (f"--{role}-field", name)]
    assert run(gpt2, path, tmp_path / "out", *options).status == 0
    rows = read(tmp_path / "out", "prompts").to_pylist()
    assert [(row["prompt"], row["subject"], row["id"]) for row in rows] == [
        (record["prompt"], record["subject"], record["id"]) for record in some_prompts(3)
    ]


def test_a_bfloat16_model_runs_and_float32_can_be_asked_for(prompts_file: Path, tmp_path: Path) -> None:
    random_model(CONFIGS["llama"]).bfloat16().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for dtype in ("auto", "float32"):
        out = tmp_path / dtype
        assert run(tmp_path / "model", prompts_file, out, "--dtype", dtype, "--modules", "all").status == 0
        assert_complete(out, PROMPTS)
    half, whole = (read(tmp_path / dtype, "prompts")["loss"].to_numpy() for dtype in ("auto", "float32"))
    assert np.abs(half - whole).max() < 0.5
    assert np.abs(half - whole).max() > 0


def _assert_same_tables(out: Path, before: Path, tables: tuple[str, ...]) -> None:
    for table in tables:
        assert_same_rows(read(out, table), read(before, table), table)


def _lengths(lists: pa.ChunkedArray) -> set[int | None]:
    return {None if ids is None else len(ids) for ids in lists.to_pylist()}


def _group_sizes(rows: pa.Table) -> list[int]:
    """How many rows each prompt × layer × module has."""
    counts = rows.group_by(["prompt_id", "layer", "module"]).aggregate([([], "count_all")])
    return counts["count_all"].to_pylist()
