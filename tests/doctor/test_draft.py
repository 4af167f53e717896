"""Architectures that are not known: the blocks as they are, and a description that is complete as it is drafted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from backlens.models.blocks import describe_blocks, find_parts, misfits
from backlens.models.layout import LAYOUTS, Cut, Layout, read_layout
from backlens.models.recognition import propose_layout, see_blocks
from tests.doctor.models import RenamedConfig, save
from tests.doctor.test_doctor import doctor
from tests.engine.command import called, write_jsonl
from tests.families import CONFIGS, EXPERT_FF, EXPERTS, MODERN, MOE
from tests.tiny import random_model

EXAONE: dict[str, Any] = MOE | {
    "num_experts": EXPERTS,
    "num_shared_experts": 1,
    "moe_intermediate_size": EXPERT_FF,
    "n_group": 1,
    "topk_group": 1,
}
UNKNOWN: dict[str, PretrainedConfig] = {
    name: AutoConfig.for_model(name, **MODERN)
    for name in ("smollm3", "cohere2", "nemotron", "persimmon", "lfm2", "xglm", "glm", "openai-gpt")
}
UNKNOWN |= {"exaone_moe": AutoConfig.for_model("exaone_moe", **EXAONE), "renamed": RenamedConfig(**MODERN)}
GUESSED = {"nemotron", "persimmon", "lfm2", "exaone_moe", "renamed"}
"""Those whose names are no known layout's."""


def drafted(model: PreTrainedModel, folder: Path) -> Layout:
    (folder / "blocks.yaml").write_text(propose_layout(model).text)
    return read_layout(str(folder / "blocks.yaml"))


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", UNKNOWN)
def test_an_unedited_draft_names_every_matrix_and_fits_every_width(family: str, tmp_path: Path) -> None:
    assert family not in LAYOUTS
    model = random_model(UNKNOWN[family])
    found = find_parts(model, drafted(model, tmp_path))
    gate = set() if family in ("nemotron", "persimmon", "xglm", "openai-gpt") else {"mlp.gate"}
    assert set(found.modules) == {"mlp.up", "mlp.down", "attn.q", "attn.k", "attn.v", "attn.o"} | gate
    assert misfits(found.blocks, found.d_model) == []
    assert bool(propose_layout(model).like) == (family not in GUESSED)
    assert {what for block in found.blocks for what in block.not_covered.values()} <= {"the router"}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_known_familys_draft_is_its_layout(case: str, tmp_path: Path) -> None:
    """But for families whose blocks leave out some of the matrices that their layout names."""
    model = without_weights(CONFIGS[case])
    family = str(CONFIGS[case].model_type)
    drawn, known = drafted(model, tmp_path), LAYOUTS[family]
    assert drawn.logit_scale == pytest.approx(known.logit_scale_in(model.config))
    ours, theirs = (
        [(set(b.matrices.items()), b.experts is not None) for b in describe_blocks(model, layout)]
        for layout in (drawn, known)
    )
    if family in ("deepseek_v3", "falcon", "gpt_bigcode"):  # several descriptions fit as well
        assert misfits(describe_blocks(model, drawn), 32) == []
    else:
        assert ours == theirs


def test_heads_side_by_side_are_cut_head_by_head(tmp_path: Path) -> None:
    model = without_weights(UNKNOWN["persimmon"])
    (query,) = drafted(model, tmp_path).alternatives("attn.q")
    assert query.cut == Cut(groups=4, pieces=3, start=0, stop=1)


def test_metas_names_are_told_apart(tmp_path: Path) -> None:
    """w1 is the gate and w3 the way up; wo is attention's, w2 the way down."""
    layout = drafted(without_weights(UNKNOWN["renamed"]), tmp_path)
    paths = {module: layout.alternatives(module)[0].path for module in layout.matrices}
    assert paths["mlp.gate"] == "mlp.w1"
    assert paths["mlp.up"] == "mlp.w3"
    assert paths["mlp.down"] == "mlp.w2"
    assert paths["attn.o"] == "self_attn.wo"


def test_blocks_of_different_kinds_are_seen_apart_and_what_no_name_suits_is_listed(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3_5_text", **MODERN | {"num_hidden_layers": 4})
    model = without_weights(config)
    linear, full = see_blocks(model)
    assert (linear.layers, full.layers) == ((0, 1, 2), (3,))
    shapes = {matrix.path: matrix.shape for matrix in full.matrices}
    assert shapes["mlp.up_proj"] == "32 → 48"
    assert shapes["self_attn.o_proj"].endswith(" → 32")
    layout = drafted(model, tmp_path)
    assert layout.not_covered.keys() == {m.path for m in linear.matrices if m.path.startswith("linear_attn.")}
    assert all(what.startswith("unknown") for what in layout.not_covered.values())
    assert len(describe_blocks(model, layout)) == 4


def test_experts_are_seen_with_their_number_and_widths() -> None:
    dense, routed = see_blocks(without_weights(UNKNOWN["exaone_moe"]))
    assert dense.layers == (0,)
    (experts,) = (matrix for matrix in routed.matrices if matrix.experts)
    assert experts.path == "mlp.experts"
    assert experts.shape == "4 experts: gate_up_proj 32 → 48, down_proj 24 → 32"


@pytest.mark.parametrize("family", ["renamed", "exaone_moe"])
def test_the_doctor_passes_a_model_with_the_description_it_drafted(family: str, tmp_path: Path) -> None:
    model = save(tmp_path / "model", UNKNOWN[family])
    finished, checks = doctor(model)
    assert finished.status == 1
    assert checks["modules"]["passed"] is False
    said = checks["said"]
    assert said["family"] == family
    assert {"path": "self_attn.q_proj", "shape": "32 → 32"} in said["blocks"][0][
        "matrices"
    ] or family == "renamed"
    (tmp_path / "blocks.yaml").write_text(said["draft"])
    finished, checks = doctor(model, "--anatomy", tmp_path / "blocks.yaml")
    assert finished.status == 0, finished.stdout
    assert checks["weight gradients"]["measured"] <= 1e-5


def test_the_printed_description_is_the_drafted_one(tmp_path: Path) -> None:
    model = save(tmp_path / "model", UNKNOWN["lfm2"])
    shown = called("doctor", "--model", model)
    assert shown.status == 1
    assert "\nlayers 0-1:\n  self_attn.q_proj: 32 → 32\n" in shown.stdout
    assert propose_layout(without_weights(UNKNOWN["lfm2"])).text in shown.stdout
    assert "--anatomy FILE" in shown.stdout
    assert "failed: modules\n" in shown.stdout


def test_from_an_unknown_architecture_to_a_run(tmp_path: Path) -> None:
    model, blocks = save(tmp_path / "model", UNKNOWN["nemotron"]), tmp_path / "blocks.yaml"
    shown = called("doctor", "--model", model)
    assert shown.status == 1
    _, _, description = shown.stdout.partition("A description to edit:\n")
    blocks.write_text(description.partition("Then: ")[0])
    assert called("doctor", "--model", model, "--anatomy", blocks).status == 0
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "A prompt", "target": " x"}])
    run = ("run", "--model", model, "--prompts", prompts, "--executor", "local", "--modules", "all")
    assert called(*run, "--out", tmp_path / "unknown").status == 2
    assert called(*run, "--out", tmp_path / "described", "--anatomy", blocks).status == 0
