"""Pickles and Python code in a model folder are read only when the user says so."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.command import Finished, assert_same_run, backlens, called, error_line


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(question: str = "") -> str:
        raise AssertionError(f"asked on the terminal: {question}")

    monkeypatch.setattr("builtins.input", asked)


def run(model: Path, prompts: Path, out: Path, *options: object) -> Finished:
    return called(
        "run", "--model", model, "--prompts", prompts, "--out", out, "--executor", "local", *options
    )


# Pickles


def pickled(model: Path, folder: Path, files: int = 1) -> Path:
    """The same model with its weights in pickles."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["pytorch_model.bin"]
    if files > 1:
        names = [f"pytorch_model-{number:05d}-of-{files:05d}.bin" for number in range(1, files + 1)]
        homes = {name: names[number % files] for number, name in enumerate(weights)}
        index = {"metadata": {}, "weight_map": homes}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for number, name in enumerate(names):
        torch.save({key: weights[key] for key in list(weights)[number::files]}, folder / name)
    return folder


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("command", ["run", "plan"])
def test_pickle_weights_are_refused_before_anything_starts(
    command: str, files: int, gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    model = pickled(gpt2, tmp_path / "model", files)
    refused = called(command, "--model", model, "--prompts", prompts_file, "--out", tmp_path / "out")
    assert refused.status == 2
    name = "pytorch_model.bin" if files == 1 else "pytorch_model-00001-of-00002.bin"
    assert error_line(refused) == (
        f"model: {model} holds only pickle weights ({name}), which can run code when they are read; "
        "convert it with save_pretrained, or pass --allow-pickle if you trust it"
    )
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("files", [1, 2])
def test_allowed_pickle_weights_give_the_run_of_the_same_safetensors(
    files: int, gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    model = pickled(gpt2, tmp_path / "model", files)
    done = run(model, prompts_file, tmp_path / "out", "--allow-pickle")
    assert done.status == 0, done.stderr
    assert run(gpt2, prompts_file, tmp_path / "usual").status == 0
    assert_same_run(tmp_path / "out", tmp_path / "usual")


def test_other_pickle_weights_are_another_model(gpt2: Path, prompts_file: Path, tmp_path: Path) -> None:
    model = pickled(gpt2, tmp_path / "model")
    assert run(model, prompts_file, tmp_path / "out", "--allow-pickle").status == 0
    weights = torch.load(model / "pytorch_model.bin")
    weights["transformer.ln_f.bias"] += 1
    torch.save(weights, model / "pytorch_model.bin")
    refused = run(model, prompts_file, tmp_path / "out", "--allow-pickle")
    assert refused.status == 2
    assert "model weights" in error_line(refused)


@pytest.mark.parametrize("options", [(), ("--allow-pickle",)], ids=["unsaid", "allowed"])
def test_safetensors_are_taken_where_there_are_both(
    options: tuple[str, ...], gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(gpt2, tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"not read")
    done = run(tmp_path / "model", prompts_file, tmp_path / "out", *options)
    assert done.status == 0, done.stderr


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_code_in_an_allowed_pickle_is_not_run_either(gpt2: Path, prompts_file: Path, tmp_path: Path) -> None:
    model = pickled(gpt2, tmp_path / "model")
    torch.save({"lm_head.weight": _Trap(tmp_path / "sprung")}, model / "pytorch_model.bin")
    refused = run(model, prompts_file, tmp_path / "out", "--allow-pickle")
    assert not (tmp_path / "sprung").exists()
    assert refused.status == 2
    line = refused.stderr.splitlines()[-1]
    assert line.startswith(
        f"backlens: model: the pickle weights of {model} are broken or hold more than tensors"
    )
    assert "Traceback" not in refused.stderr
    with pytest.raises(pickle.UnpicklingError):
        torch.load(model / "pytorch_model.bin")
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize("length", [0, 100, 2000])
def test_broken_pickle_weights_are_one_line(
    length: int, gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    model = pickled(gpt2, tmp_path / "model")
    weights = model / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:length])
    refused = run(model, prompts_file, tmp_path / "out", "--allow-pickle")
    assert refused.status == 2
    line = refused.stderr.splitlines()[-1]
    assert line.startswith(f"backlens: model: the pickle weights of {model} are broken")
    assert "Traceback" not in refused.stderr


def test_broken_safetensors_are_one_line(gpt2: Path, prompts_file: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"<html>not found</html>")
    refused = run(tmp_path / "model", prompts_file, tmp_path / "out")
    assert refused.status == 2
    assert refused.stderr.splitlines()[-1].startswith(
        f"backlens: model: {tmp_path / 'model'} cannot be loaded: "
    )


# Python code

OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

(Path(__file__).parent / "was-run").touch()


class OwnConfig(LlamaConfig):
    pass


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}


@pytest.fixture
def own_code(llama: Path, tmp_path: Path) -> Path:
    """A llama that transformers does not know for one: its class comes with it."""
    folder = tmp_path / "own"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    (folder / "own_code.py").write_text(OWN_CODE)
    return folder


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_model_that_needs_its_own_code_is_refused_unless_it_is_trusted(
    command: str, own_code: Path, prompts_file: Path, tmp_path: Path
) -> None:
    refused = called(command, "--model", own_code, "--prompts", prompts_file, "--out", tmp_path / "out")
    assert refused.status == 2
    assert error_line(refused) == (
        f"model: {own_code} needs Python code that it brings with it, which is not run unasked; "
        "read that code and pass --trust-remote-code if you trust it"
    )
    assert not (tmp_path / "out" / "run.json").exists()


def test_code_that_transformers_does_not_need_is_not_run(
    llama: Path, prompts_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    (model / "own_code.py").write_text("raise SystemExit('was run')")
    done = run(model, prompts_file, tmp_path / "out")
    assert done.status == 0, done.stderr


@pytest.mark.slow
def test_trusted_code_is_run_and_gives_the_rows_of_its_model(
    own_code: Path, llama: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    options = ("--model", own_code, "--prompts", prompts_file, "--trust-remote-code")
    local = ("--out", tmp_path / "out", "--executor", "local")
    planned = backlens("plan", *options, "--out", tmp_path / "out")
    assert planned.status == 0, planned.stderr
    done = backlens("run", *options, *local)
    assert done.status == 0, done.stderr
    assert list((tmp_path / "modules").rglob("was-run"))
    assert run(llama, prompts_file, tmp_path / "usual").status == 0
    assert_same_run(tmp_path / "out", tmp_path / "usual")
    with (own_code / "own_code.py").open("a") as code:
        code.write("# changed\n")
    refused = backlens("run", *options, *local)
    assert refused.status == 2
    assert "model weights" in error_line(refused)
