"""Parts of a fused matrix that a description gives: XᵀΔ is exact under any cut, so they are marked as unproven."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.models.draft import draft_layout
from tests.doctor.models import save
from tests.doctor.test_doctor import doctor
from tests.doctor.test_draft import UNKNOWN, without_weights
from tests.engine.command import called, write_jsonl
from tests.families import CONFIGS

GPT2: dict[str, Any] = {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj", "attn.o": "attn.c_proj"}


def thirds(**starts: int) -> dict[str, Any]:
    """A description of GPT-2 in which q, k and v begin at these thirds."""
    cuts = {
        f"attn.{name}": {"path": "attn.c_attn", "groups": 1, "pieces": 3, "start": start, "stop": start + 1}
        for name, start in starts.items()
    }
    return {"matrices": GPT2 | cuts}


def run_of(model: Path, out: Path, *options: object) -> tuple[dict[str, str], str]:
    """What run.json says of cuts, and what the command printed."""
    prompts = write_jsonl(out.with_suffix(".jsonl"), [{"prompt": "A prompt", "target": " x"}])
    run = called("run", "--model", model, "--prompts", prompts, "--out", out, "--executor", "local", *options)
    assert run.status == 0, run.stderr
    return json.loads((out / "run.json").read_text())["model"]["unproven_cuts"], run.stderr


def test_a_drafts_cuts_are_marked_wherever_they_are_shown_and_used(tmp_path: Path) -> None:
    model, blocks = save(tmp_path / "model", UNKNOWN["persimmon"]), tmp_path / "blocks.yaml"
    guessed = {
        f"attn.{name}": f"piece {place} of 3 in each of 4 of self_attn.query_key_value"
        for place, name in enumerate("qkv")
    }
    finished, checks = doctor(model)
    assert finished.status == 1
    assert checks["said"]["unproven_cuts"] == guessed
    assert "unproven parts of fused matrices, by the description below" in checks["cuts"]["detail"]
    blocks.write_text(checks["said"]["draft"])
    assert blocks.read_text().count("unproven cut") == 3
    finished, checks = doctor(model, "--anatomy", blocks)
    assert finished.status == 0
    assert checks["said"]["unproven_cuts"] == guessed
    assert checks["cuts"]["status"] == "info"
    assert all(f"{module} ({cut})" in checks["cuts"]["detail"] for module, cut in guessed.items())
    assert "unproven" in called("doctor", "--model", model, "--anatomy", blocks).stdout
    said, printed = run_of(model, tmp_path / "out", "--anatomy", blocks, "--modules", "all")
    assert said == guessed
    assert "unproven parts of fused matrices, by --anatomy: attn.q (piece 0 of 3" in printed
    said, printed = run_of(model, tmp_path / "mlp", "--anatomy", blocks)
    assert said == {}
    assert "unproven" not in printed


@pytest.mark.parametrize(
    ("starts", "unproven"),
    [({"q": 0, "k": 1, "v": 2}, set()), ({"q": 0, "k": 2, "v": 1}, {"attn.k", "attn.v"})],
    ids=["as the family's own code", "k and v exchanged"],
)
def test_cuts_that_are_known_of_the_family_are_proven_and_others_are_not(
    starts: dict[str, int], unproven: set[str], tmp_path: Path
) -> None:
    (tmp_path / "blocks.yaml").write_text(yaml.safe_dump(thirds(**starts)))
    model = save(tmp_path / "model", CONFIGS["gpt2"])
    finished, checks = doctor(model, "--anatomy", tmp_path / "blocks.yaml")
    assert finished.status == 0
    assert ("cuts" in checks) == bool(unproven)
    assert checks["said"]["unproven_cuts"].keys() == unproven
    said, _ = run_of(model, tmp_path / "out", "--anatomy", tmp_path / "blocks.yaml", "--modules", "all")
    assert said.keys() == unproven


def test_without_a_description_nothing_is_unproven(tmp_path: Path) -> None:
    model = save(tmp_path / "model", CONFIGS["gpt2"])
    assert run_of(model, tmp_path / "out", "--modules", "all")[0] == {}


def test_a_draft_with_the_names_of_a_known_family_is_unproven_too() -> None:
    """Layouts may have all their paths in common and cut them differently."""
    text = draft_layout(without_weights(UNKNOWN["glm"])).text
    assert text.count("unproven cut") == 2
    assert "a guess that no check proves" in " ".join(text.replace("#", "").split())
