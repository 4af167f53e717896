"""Ctrl-C while modules are imported, most of a short command's time; and usage errors, which come before it."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.engine.command import BACKLENS, environment

ROOT = Path(__file__).resolve().parents[2]

SITECUSTOMIZE = """
import os, signal, sys

def interrupt():
    os.kill(os.getpid(), signal.SIG{signal})
    for _ in range(10_000):
        pass

class Dropped:
    def __del__(self):
        interrupt()

class Finder:
    def find_spec(self, name, path, target=None):
        if name != "{module}":
            return None
        sys.meta_path.remove(self)
        {act}

sys.meta_path.insert(0, Finder())
"""
ACTS = {
    "raised": "interrupt()",
    "dropped in a destructor": "Dropped()",
    "turned into an ImportError": """
        try:
            interrupt()
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error
    """,
}


def interrupted_at(
    module: str, act: str, folder: Path, *arguments: str, number: str = "INT"
) -> "subprocess.CompletedProcess[str]":
    """`backlens …` of which `module` sends itself a signal when it is imported."""
    code = SITECUSTOMIZE.replace("{module}", module).replace("{signal}", number).replace("{act}", act.strip())
    (folder / "sitecustomize.py").write_text(code)
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["backlens"]
    found, _, name = entry.partition(":")
    return subprocess.run(
        [sys.executable, "-c", f"import sys; from {found} import {name}; sys.exit({name}())", *arguments],
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_one_line(done: "subprocess.CompletedProcess[str]") -> None:
    line = "backlens: interrupted; the same command goes on from what is committed\n"
    assert (done.returncode, done.stderr, done.stdout) == (3, line, "")


@pytest.mark.parametrize(
    ("module", "act"),
    [
        *(
            (module, "raised")
            for module in ("cyclopts", "backlens.config", "torch.nn", "transformers", "pyarrow")
        ),
        *((module, act) for module in ("cyclopts", "torch") for act in ACTS if act != "raised"),
    ],
)
def test_ctrl_c_during_an_import_is_one_line_and_status_3(module: str, act: str, tmp_path: Path) -> None:
    assert_one_line(interrupted_at(module, ACTS[act], tmp_path, "run", "--executor", "local"))
    assert not (tmp_path / "demo-run").exists()


@pytest.mark.parametrize(
    "arguments", [("doctor",), ("plan",), ("atlas", "none"), ("edit",), ("query", "none", "--prompt", "0")]
)
def test_every_command_takes_ctrl_c_so(arguments: tuple[str, ...], tmp_path: Path) -> None:
    module = "duckdb" if arguments[0] == "query" else "torch"
    assert_one_line(interrupted_at(module, ACTS["raised"], tmp_path, *arguments))


def test_a_schedulers_sigterm_is_taken_like_ctrl_c(tmp_path: Path) -> None:
    assert_one_line(interrupted_at("torch", ACTS["raised"], tmp_path, "run", number="TERM"))


def test_ctrl_c_is_an_event_where_standard_error_is_json(tmp_path: Path) -> None:
    done = interrupted_at("cyclopts", ACTS["raised"], tmp_path, "run", "--log-format", "json")
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert '"event": "error"' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("run --prompts facts.jsonl", "--out: name the directory"),
        ("run --model gpt2 --modle x", "unknown option --modle; did you mean --model?"),
        ("run --modles mlp", "did you mean --modules?"),
        ("run --MODEL gpt2", "did you mean --model?"),
        ("run --modle=gpt2", "unknown option --modle; did you mean --model?"),
        ("run --executor lcoal", "did you mean local?"),
        ("run --batch 100", "did you mean --batch-tokens?"),
        ("plan --modle gpt2", "did you mean --model?"),
        ("plan --prompt-count 0", "--prompt-count 0"),
        ("plan --prompt-count 5 --prompt-tokens 8-", "--prompt-tokens"),
        ("run --layers first", '--layers "first"'),
        ("run --modules mlp.dwon", "no module 'mlp.dwon'"),
        ("rnu", 'unknown command "rnu"; did you mean run?'),
        ("xyzzy", "; there are run, plan, doctor,"),
        ("jobs stats", "did you mean status?"),
        ("edit swep out", "did you mean sweep?"),
        ("edit --method romee", "did you mean rome?"),
        ("edit --methd rome", "did you mean --method?"),
        ("edit --model gpt2", "--edits: name a file of edits"),
        ("edit --prompt a", "--prompt and --target-new go together"),
        ("edit sweep out --methods rome,memti", "did you mean memit?"),
        ("edit sweep out", "--lr: forward-shift needs rates"),
        ("edit explain --against fientune", "did you mean finetune?"),
        ("edit train-mend out --model gpt2", "--edits: name a file of edits"),
        ("edit sweep out --lr 1 --layers 3-", '--layers "3-"'),
        ("edit --save-delta nowhere/edit.safetensors", "there is no folder nowhere"),
        ("plot run --figure heatmpa", "did you mean heatmap?"),
        ("plot run --figure heatmap", "give --prompt"),
        ("query run", "give exactly one of"),
        ("query run --token a --show neuron", "did you mean neurons?"),
        ("query run --prompt 1 --compare b", "--compare b"),
        ("serve run --port 70000", "--port 70000"),
        ("export-html run --prompt 1 --to nowhere/a.html", "there is no folder nowhere"),
        ("submit", "JOB_FILE"),
        ("submit none.yaml", "none.yaml: cannot be read"),
    ],
)
def test_a_usage_error_comes_before_anything_heavy_is_imported(
    arguments: str, expected: str, tmp_path: Path
) -> None:
    """An import of torch or Ray would be an interrupt, and no usage error."""
    heavy = ("torch", "transformers", "ray", "datasets", "duckdb", "pyarrow")
    code = f"import sys; sys.modules |= dict.fromkeys({heavy})"  # of which an import raises
    (tmp_path / "sitecustomize.py").write_text(code)
    refused = subprocess.run(
        [BACKLENS, *arguments.split()],
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2, refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert expected in refused.stderr


def test_ctrl_c_while_the_interpreter_ends_says_nothing(tmp_path: Path) -> None:
    code = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    (tmp_path / "sitecustomize.py").write_text(code)
    done = subprocess.run(
        [BACKLENS, "--version"],
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    """The signal is ignored under nohup, and in processes that a shell starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = interrupted_at("cyclopts", ACTS["raised"], tmp_path, "--version")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stderr) == (0, "")
