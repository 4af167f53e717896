"""`backlens doctor`: what it says of models that are in order."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig

from pipeline.config import RunConfig, flag
from pipeline.doctor.options import DoctorOptions
from tests.doctor.models import save
from tests.engine.command import Finished, called, error_line, write_jsonl
from tests.families import CONFIGS, MODERN

NUMBERS = {
    "weight gradients": 1e-5,
    "lens": 1e-5,
    "batch, right-padded": 1e-4,
    "batch, left-padded": 1e-4,
    "batch, projected": 1e-4,
}
"""The largest values that the README promises, in float32."""

TABLE = (
    *("modules", "widths", "weight gradients", "bias gradients", "lens"),
    *("batch, right-padded", "batch, left-padded", "batch, projected", "exact and fast attention"),
    *(
        "half precision, scores",
        "half precision, top tokens",
        "vocabulary",
        "beginning of sequence",
        "memory",
    ),
    *(f"time, {stage}" for stage in ("tokenize", "model", "factors", "lens", "rows")),
)


def doctor(model: Path, *options: object) -> tuple[Finished, dict[str, Any]]:
    """What the doctor says of a model, and its checks by name."""
    finished = called("doctor", "--model", model, "--json", *options)
    said = json.loads(finished.stdout)
    return finished, {check["name"]: check for check in said["checks"]} | {"said": said}


@pytest.fixture(scope="module", params=["gpt2", "llama", "mixtral", "opt, as 350m"])
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def answer(case: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, dict[str, Any]]:
    return doctor(save(tmp_path_factory.mktemp("models") / "model", CONFIGS[case]))


def test_a_model_in_order_passes_with_every_number_below_its_limit(
    case: str, answer: tuple[Finished, dict[str, Any]]
) -> None:
    finished, checks = answer
    assert finished.status == 0, finished.stdout
    assert tuple(name for name in checks if name != "said") == TABLE
    assert checks["said"]["healthy"]
    assert checks["said"]["draft"] is None
    for name, limit in NUMBERS.items():
        assert checks[name]["passed"] is True
        assert 0 < checks[name]["measured"] <= limit == checks[name]["limit"]
    assert checks["half precision, scores"]["status"] == "info"
    assert 0 < checks["half precision, scores"]["measured"] < 0.1
    assert 0.5 < checks["half precision, top tokens"]["measured"] <= 1
    assert checks["time, lens"]["measured"] > 0
    assert checks["bias gradients"]["status"] == ("skip" if case in ("llama", "mixtral") else "pass")


def test_every_matrix_is_compared_with_three_prompts(
    case: str, answer: tuple[Finished, dict[str, Any]]
) -> None:
    """In each of two layers; Mixtral has four experts of three matrices each, and no other feed-forward matrices."""
    matrices = 2 * {"gpt2": 6, "llama": 7, "mixtral": 4 + 4 * 3, "opt, as 350m": 6}[case]
    _, checks = answer
    assert checks["modules"]["measured"] == matrices
    assert f"{3 * matrices} comparisons" in checks["weight gradients"]["detail"]


def test_the_table_has_a_line_for_every_check_and_the_users_prompts_are_tried(tmp_path: Path) -> None:
    records = [{"q": text, "target": " x"} for text in ("One prompt", "and another one")]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    model = save(tmp_path / "model", CONFIGS["gpt2"])
    shown = called("doctor", "--model", model, "--prompts", prompts, "--prompt-field", "q")
    assert shown.status == 0
    assert [name for name in TABLE if f"│ {name} " not in shown.stdout] == []
    assert "x and δ of 2 prompts" in shown.stdout
    assert "FAIL" not in shown.stdout
    assert "nothing failed" in shown.stdout


def test_weights_in_half_precision_are_checked_in_float32(tmp_path: Path) -> None:
    finished, checks = doctor(save(tmp_path / "model", CONFIGS["llama"], dtype=torch.bfloat16))
    assert finished.status == 0
    assert "in float32" in checks["weight gradients"]["detail"]
    assert checks["weight gradients"]["limit"] == 1e-5
    assert checks["batch, right-padded"]["limit"] == 0.1
    assert checks["lens"]["limit"] > 1e-5
    assert "bfloat16 against float32" in checks["half precision, scores"]["detail"]


def test_one_prompt_is_enough_for_all_but_batches(tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "Only one", "target": " x"}])
    finished, checks = doctor(save(tmp_path / "model", MistralConfig(**MODERN)), "--prompts", prompts)
    assert finished.status == 0
    assert checks["batch, left-padded"]["status"] == "skip"
    assert checks["weight gradients"]["passed"] is True


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    missing = called("doctor", "--model", tmp_path / "nowhere")
    assert missing.status == 2
    assert "nowhere" in error_line(missing)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    no_language_model = called("doctor", "--model", tmp_path)
    assert no_language_model.status == 2
    assert "t5" in error_line(no_language_model)


def test_a_broken_description_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "blocks.yaml").write_text("matrices: {mlp.upp: mlp.up_proj}")
    model = save(tmp_path / "model", CONFIGS["llama"])
    refused = called("doctor", "--model", model, "--anatomy", tmp_path / "blocks.yaml")
    assert refused.status == 2
    assert "did you mean mlp.up?" in error_line(refused)


def test_its_options_are_those_of_a_run() -> None:
    runs = {field.name: field for field in fields(RunConfig)}
    for field in fields(DoctorOptions):
        assert (field.type, field.default) == (runs[field.name].type, runs[field.name].default)


def test_its_help_lists_its_options_and_shows_an_example() -> None:
    shown = called("doctor", "--help")
    assert shown.status == 0
    assert "Example: backlens doctor " in shown.stdout
    for option in (*(f"--{flag(field.name)}" for field in fields(DoctorOptions)), "--json", "--debug"):
        assert option in shown.stdout
