"""Checkpoints that are not, or not wholly, those of their configuration: refused by name, on every way of loading."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Qwen3MoeConfig,
)

from backlens.editing import sweep as drive
from backlens.engine import run as driver
from backlens.errors import BacklensError
from backlens.models.device_map import DeviceMapOptions
from backlens.models.load import ModelSource, load_model
from backlens.models.zero3 import Zero3
from tests.engine.command import (
    Finished,
    assert_same_run,
    backlens,
    called,
    count_commits,
    error_line,
    write_jsonl,
)
from tests.families import CONFIGS
from tests.tiny import LLAMA_SHAPE, byte_tokenizer, random_model, save_tiny

Weights = dict[str, torch.Tensor]
CPU = torch.device("cpu")


def run(model: object, prompts: Path, out: Path, *options: object) -> Finished:
    return called(
        "run", "--model", model, "--prompts", prompts, "--out", out, "--executor", "local", *options
    )


def changed(model: Path, folder: Path, change: Callable[[Weights], Weights]) -> Path:
    """The same model with other tensors in its checkpoint."""
    shutil.copytree(model, folder)
    weights = change(load_file(folder / "model.safetensors"))
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    save_file(copies, folder / "model.safetensors", {"format": "pt"})
    return folder


def configure(model: Path, **values: Any) -> None:
    """Change the model's configuration."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def block_of(weights: Weights, index: int, copied: int) -> Weights:
    """A copy of a block, to stand at another place."""
    old, new = f".layers.{copied}.", f".layers.{index}."
    return {key.replace(old, new): value for key, value in weights.items() if old in key}


FLAWS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a matrix is missing": (
        without("model.layers.1.mlp.up_proj.weight"),
        "the checkpoint lacks model.layers.1.mlp.up_proj.weight",
    ),
    "a norm is missing": (without("model.norm.weight"), "the checkpoint lacks model.norm.weight"),
    "the embeddings are missing": (
        without("model.embed_tokens.weight"),
        "the checkpoint lacks model.embed_tokens.weight",
    ),
    "another prefix": (
        lambda weights: {key.replace("model.layers", "model.h"): value for key, value in weights.items()},
        "the checkpoint holds model.h.0.input_layernorm.weight",
    ),
    "a matrix too many": (
        lambda weights: weights | {"model.layers.0.mlp.extra_proj.weight": torch.ones(2, 2)},
        "the checkpoint holds model.layers.0.mlp.extra_proj.weight, which the model does not have",
    ),
    "a block too many": (
        lambda weights: weights | block_of(weights, 3, copied=2),
        "they hold 4 blocks, and the configuration has 3 (num_hidden_layers)",
    ),
    "another shape": (
        lambda weights: weights | {"model.layers.2.mlp.down_proj.weight": torch.ones(32, 55)},
        "model.layers.2.mlp.down_proj.weight has the shape 32 × 55, not 32 × 56",
    ),
}


@pytest.fixture(params=FLAWS)
def flaw(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_checkpoint_that_is_not_the_models_is_refused_by_name_before_anything_starts(
    flaw: str, llama: Path, prompts_file: Path, tmp_path: Path
) -> None:
    change, said = FLAWS[flaw]
    model = changed(llama, tmp_path / "model", change)
    for command in ("run", "plan"):
        refused = called(command, "--model", model, "--prompts", prompts_file, "--out", tmp_path / "out")
        assert refused.status == 2
        line = error_line(refused)
        assert line.startswith(f"model: the weights of {model} are not those of its config.json: ")
        assert said in line
    assert not (tmp_path / "out" / "run.json").exists()
    refused = called("doctor", "--model", model)
    assert refused.status == 2
    assert said in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("form", ["several files", "pickle"])
def test_so_it_is_in_several_files_and_in_pickles(form: str, flaw: str, llama: Path, tmp_path: Path) -> None:
    change, said = FLAWS[flaw]
    model = changed(llama, tmp_path / "model", change)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    if form == "pickle":
        torch.save(weights, model / "pytorch_model.bin")
    else:
        homes = {
            name: f"model-{number % 2 + 1:05d}-of-00002.safetensors" for number, name in enumerate(weights)
        }
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
        for home in set(homes.values()):
            save_file({n: w for n, w in weights.items() if homes[n] == home}, model / home, {"format": "pt"})
    with pytest.raises(BacklensError, match=re.escape(said)):
        load_model(ModelSource(str(model), allow_pickle=form == "pickle"), CPU)


def test_so_it_is_where_accelerate_places_the_weights(flaw: str, llama: Path, tmp_path: Path) -> None:
    change, said = FLAWS[flaw]
    model = changed(llama, tmp_path / "model", change)
    spread = DeviceMapOptions({"cpu": 100_000}, offload=str(tmp_path / "offload"))
    with pytest.raises(BacklensError, match=re.escape(said)):
        load_model(ModelSource(str(model)), CPU, spread)
    load_model(ModelSource(str(llama)), CPU, spread)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_so_it_is_where_deepspeed_partitions_them(form: str, flaw: str, llama: Path, tmp_path: Path) -> None:
    """It says nothing of what is too many; so this is known before its ranks load together."""
    change, said = FLAWS[flaw]
    model = changed(llama, tmp_path / "model", change)
    if form == "pickle":
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
    with pytest.raises(BacklensError, match=re.escape(said)):
        load_model(ModelSource(str(model), allow_pickle=form == "pickle"), CPU, zero3=Zero3(2))


@pytest.mark.parametrize(
    "kind", [AutoModel, AutoModelForSequenceClassification], ids=["no head", "a classifier"]
)
def test_a_model_without_a_language_models_head_is_refused(
    kind: Any, llama: Path, prompts_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    kind.from_pretrained(llama).save_pretrained(tmp_path / "model")
    line = error_line(run(tmp_path / "model", prompts_file, tmp_path / "out"))
    assert "the checkpoint lacks lm_head.weight" in line
    assert ("score.weight, which the model does not have" in line) == (kind is not AutoModel)


def test_a_tied_head_may_be_left_out_or_be_there(gpt2: Path, prompts_file: Path, tmp_path: Path) -> None:
    weights = load_file(gpt2 / "model.safetensors")
    assert "lm_head.weight" not in weights
    model = changed(gpt2, tmp_path / "model", lambda w: w | {"lm_head.weight": w["transformer.wte.weight"]})
    assert run(model, prompts_file, tmp_path / "out").status == 0
    assert run(gpt2, prompts_file, tmp_path / "usual").status == 0
    assert_same_run(tmp_path / "out", tmp_path / "usual")


def test_what_older_checkpoints_hold_and_no_model_reads_is_no_fault(
    gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """gpt2 on the hub has no prefix, and masks that are computed today."""

    def older(weights: Weights) -> Weights:
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256) for layer in range(3)}
        return {key.removeprefix("transformer."): value for key, value in weights.items()} | masks

    model = changed(gpt2, tmp_path / "model", older)
    done = run(model, prompts_file, tmp_path / "out")
    assert done.status == 0, done.stderr
    assert run(gpt2, prompts_file, tmp_path / "usual").status == 0
    assert_same_run(tmp_path / "out", tmp_path / "usual")


@pytest.mark.parametrize("layers", [2, 4])
def test_a_configuration_with_another_number_of_blocks_is_refused(
    layers: int, llama: Path, prompts_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    configure(model, num_hidden_layers=layers, layer_types=None)
    line = error_line(run(model, prompts_file, tmp_path / "out"))
    assert ("model.layers.3." if layers == 4 else "they hold 3 blocks, and the configuration has 2") in line


def test_a_block_that_the_class_ignores_by_its_number_is_refused(tmp_path: Path) -> None:
    """The class assumes that layer 61 of DeepSeek-V3 predicts further tokens."""
    model = random_model(CONFIGS["deepseek_v3"])
    model.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")

    def further(weights: Weights) -> Weights:
        return weights | block_of(weights, 61, copied=1)

    broken = changed(tmp_path / "whole", tmp_path / "broken", further)
    with pytest.raises(BacklensError, match="they hold 62 blocks, and the configuration has 2"):
        load_model(ModelSource(str(broken)), CPU)
    predicts = {"model.layers.61.eh_proj.weight": torch.ones(2, 2)}
    load_model(
        ModelSource(str(changed(tmp_path / "whole", tmp_path / "sound", lambda w: further(w) | predicts))),
        CPU,
    )


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    shape: dict[str, Any] = LLAMA_SHAPE | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}
    random_model(Qwen3MoeConfig(vocab_size=300, **shape)).save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    broken = changed(tmp_path / "whole", tmp_path / "broken", without(name))
    with pytest.raises(BacklensError, match=re.escape(f"they lack {name}")):
        load_model(ModelSource(str(broken)), CPU)


def test_a_file_of_the_index_that_is_missing_is_named(
    llama: Path, prompts_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(model, max_shard_size="60KB")
    (model / "model.safetensors").unlink()
    gone = sorted(model.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert f"lacks {gone.name}, one of the" in error_line(run(model, prompts_file, tmp_path / "out"))


# What is no checkpoint


def test_an_adapter_is_refused_with_and_without_a_model_around_it(
    llama: Path, prompts_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "meta/base"}'
    )
    (tmp_path / "alone").mkdir()
    shutil.copy(model / "adapter_config.json", tmp_path / "alone")
    for folder in (model, tmp_path / "alone"):
        for command in ("run", "plan", "doctor"):
            rest = () if command == "doctor" else ("--out", tmp_path / "out")
            refused = called(command, "--model", folder, "--prompts", prompts_file, *rest)
            assert refused.status == 2
            line = error_line(refused)
            assert line.startswith(f"model: {folder} holds an adapter (adapter_config.json) of meta/base")
            assert "merge_and_unload" in line
    assert called("edit", "--model", model, "--limit", "1").status == 2


def test_gguf_files_are_refused_by_their_name(llama: Path, prompts_file: Path, tmp_path: Path) -> None:
    folder, whole = tmp_path / "folder", shutil.copytree(llama, tmp_path / "whole")
    folder.mkdir()
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    (whole / "model.safetensors").rename(whole / "model-q4.gguf")
    for model in (folder, folder / "model-q4.gguf", whole):
        line = error_line(run(model, prompts_file, tmp_path / "out"))
        assert "model-q4.gguf" in line
        assert "GGUF files are not supported; give the safetensors model that it was made from" in line


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)], ids=["nothing", "its settings"])
def test_a_model_without_a_tokenizer_is_one_line(
    family: str, kept: tuple[str, ...], prompts_file: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", family)
    for name in {"tokenizer.json", "tokenizer_config.json"} - set(kept):
        (model / name).unlink()
    for command in ("run", "doctor"):
        rest = () if command == "doctor" else ("--out", tmp_path / "out", "--executor", "local")
        refused = called(command, "--model", model, "--prompts", prompts_file, *rest)
        assert refused.status == 2
        line = refused.stderr.splitlines()[-1]
        assert line.startswith(f"backlens: model: {model} has no tokenizer") or "tokenizer" in line, line
        assert "Traceback" not in refused.stderr


def test_a_folder_without_a_model_says_what_is_missing(
    llama: Path, prompts_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in error_line(run(tmp_path / "empty", prompts_file, tmp_path / "out"))
    variant = shutil.copytree(llama, tmp_path / "variant")
    (variant / "model.safetensors").rename(variant / "model.fp16.safetensors")
    line = error_line(run(variant, prompts_file, tmp_path / "out"))
    assert "it has no weights (model.safetensors), but model.fp16.safetensors" in line
    gone = tmp_path / "gone"
    assert f"there is no directory {gone} on" in error_line(run(gone, prompts_file, tmp_path / "out"))


# 8-bit floats


BLOCK = 32


def in_8_bits(folder: Path) -> tuple[Path, Weights]:
    """A model in 8-bit floats with a scale for each block of 32 × 32, and the weights that these stand for."""
    shape: dict[str, Any] = LLAMA_SHAPE | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "initializer_range": 0.05,
    }
    random_model(LlamaConfig(vocab_size=300, **shape)).bfloat16().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    packed, meant = dict(weights), {name: tensor.float() for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if ".layers." not in name or tensor.ndim != 2:
            continue
        rows, columns = tensor.shape
        blocks = tensor.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        eight = (blocks / scale).to(torch.float8_e4m3fn)
        packed[name] = eight.reshape(rows, columns)
        packed[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
        meant[name] = (eight.float() * scale).reshape(rows, columns)
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    form = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    configure(folder, quantization_config=form)
    return folder, meant


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_in_8_bit_floats_are_turned_into_the_type_that_is_asked_for(
    dtype: str, tmp_path: Path
) -> None:
    model, meant = in_8_bits(tmp_path / "model")
    loaded = load_model(ModelSource(str(model), dtype=dtype), CPU)  # pyright: ignore[reportArgumentType]
    wanted = getattr(torch, dtype)
    held = loaded.model.state_dict()
    for name, tensor in meant.items():
        assert held[name].dtype == wanted, name
        torch.testing.assert_close(held[name], tensor.to(wanted), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_models_in_8_bit_floats_run_and_are_planned(dtype: str, prompts_file: Path, tmp_path: Path) -> None:
    model, _ = in_8_bits(tmp_path / "model")
    done = run(model, prompts_file, tmp_path / "out", "--dtype", dtype)
    assert done.status == 0, done.stderr
    planned = called("plan", "--model", model, "--prompts", prompts_file, "--dtype", dtype)
    assert planned.status == 0, planned.stderr


@pytest.mark.slow
def test_the_doctor_checks_a_model_in_8_bit_floats_in_float32(tmp_path: Path) -> None:
    model, _ = in_8_bits(tmp_path / "model")
    done = called("doctor", "--model", model)
    assert done.status == 0, done.stdout + done.stderr


def test_an_8_bit_matrix_without_its_scale_is_refused(prompts_file: Path, tmp_path: Path) -> None:
    model, _ = in_8_bits(tmp_path / "whole")
    name = "model.layers.1.mlp.down_proj.weight"
    broken = changed(model, tmp_path / "broken", without(f"{name}_scale_inv"))
    assert f"no scale for {name}" in error_line(run(broken, prompts_file, tmp_path / "out"))


# Weights that change


@pytest.mark.parametrize("change", ["weights", "tokenizer"])
def test_a_model_that_changes_between_the_drivers_look_and_the_workers_is_refused(
    change: str, gpt2: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(gpt2, tmp_path / "model")
    opened = driver.open_run

    def opened_late(*arguments: Any, **options: Any) -> Any:
        if change == "weights":
            weights = load_file(model / "model.safetensors")
            weights["transformer.h.1.mlp.c_fc.weight"][3, 4] += 1e-3
            save_file(weights, model / "model.safetensors", {"format": "pt"})
        else:
            tokenizer = json.loads((model / "tokenizer.json").read_text())
            vocabulary = tokenizer["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        return opened(*arguments, **options)

    monkeypatch.setattr(driver, "open_run", opened_late)
    refused = run(model, prompts_file, tmp_path / "out")
    assert refused.status == 2
    other = "other weights" if change == "weights" else "another tokenizer"
    assert f"backlens: model: {model} has {other} on" in refused.stderr.splitlines()[-1]
    assert count_commits(tmp_path / "out") == 0


@pytest.mark.slow
def test_a_relative_model_and_offload_folder_mean_the_same_to_workers(
    llama: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: tuple[str, int]
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    offloaded = ("--sharding", "accelerate", "--max-memory", "cpu:90KiB", "--offload", "rest")
    arguments = ("--model", "model", "--prompts", prompts_file, "--out", "out", "--address", cluster[0])
    done = backlens("run", *arguments, *offloaded)
    assert done.status == 0, done.stderr
    assert run(llama, prompts_file, tmp_path / "usual").status == 0
    assert_same_run(tmp_path / "out", tmp_path / "usual")
    assert json.loads((tmp_path / "out" / "run.json").read_bytes())["model"]["name"] == "model"


def test_a_sweep_of_edits_refuses_a_model_that_changes_before_its_workers_load_it(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(gpt2, tmp_path / "model")
    edits = write_jsonl(
        tmp_path / "edits.jsonl", [{"prompt": "The sea is", "subject": "sea", "target_new": " red"}]
    )
    opened = drive.open_run

    def opened_late(*arguments: Any, **options: Any) -> Any:
        weights = load_file(model / "model.safetensors")
        weights["transformer.h.0.mlp.c_proj.weight"] *= 1.01
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        return opened(*arguments, **options)

    monkeypatch.setattr(drive, "open_run", opened_late)
    refused = called(
        *("edit", "sweep", tmp_path / "sweep", "--model", model, "--edits", edits),
        *("--layers", "1", "--lr", "1", "--executor", "local"),
    )
    assert refused.status == 2
    assert f"backlens: model: {model} has other weights on" in refused.stderr.splitlines()[-1]
    assert count_commits(tmp_path / "sweep") == 0


def test_shards_that_other_versions_of_a_package_made_are_told_when_a_run_goes_on(
    gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    assert run(gpt2, prompts_file, tmp_path / "out", "--shard-prompts", "4").status == 0
    again = run(gpt2, prompts_file, tmp_path / "out", "--shard-prompts", "4")
    assert "other versions" not in again.stderr
    commit = tmp_path / "out" / "_commits" / "000001.json"
    written = json.loads(commit.read_text())
    here = written["versions"]["transformers"]
    written["versions"]["transformers"] = "4.40.0"
    commit.write_text(json.dumps(written))
    again = run(gpt2, prompts_file, tmp_path / "out", "--shard-prompts", "4")
    assert again.status == 0
    line = next(line for line in again.stderr.splitlines() if "other versions" in line)
    assert line.startswith(f"1 shard was made with other versions: transformers 4.40.0 (now {here});")
