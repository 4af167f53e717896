"""Models by hub id: which files are fetched, and that a process asks the hub once."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine.cluster import one_node_cluster
from tests.engine.command import BACKLENS, Finished, backlens, count_commits, environment
from tests.hub import Hub
from tests.tiny import save_tiny


@pytest.fixture
def hub() -> Iterator[Hub]:
    served = Hub("owner/name")
    with served.serving():
        yield served


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A model in two files, beside the copies that publishers keep there."""
    folder = save_tiny(tmp_path / "published", "llama")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink()
    for copy in (
        *("original/consolidated.00.pth", "original/model.safetensors", "original/params.json"),
        *("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "onnx/model.onnx"),
    ):
        (folder / copy).parent.mkdir(exist_ok=True)
        (folder / copy).write_bytes(b"a copy")
    return folder


def run(hub: Hub, home: Path, prompts: Path, out: Path, *options: object, command: str = "run") -> Finished:
    online = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_ETAG_TIMEOUT": "5",
    }
    where = ("--executor", "local") if command == "run" else ()
    arguments = [BACKLENS, command, "--model", hub.name, "--prompts", prompts, "--out", out, *where, *options]
    done = subprocess.run(
        list(map(str, arguments)), env=environment() | online, capture_output=True, text=True, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def record(out: Path) -> dict[str, str]:
    return json.loads((out / "run.json").read_bytes())["model"]


def test_only_the_weights_that_are_read_are_fetched_and_the_commit_is_recorded(
    hub: Hub, published: Path, prompts_file: Path, tmp_path: Path
) -> None:
    commit = hub.push(published)
    planned = run(hub, tmp_path / "home", prompts_file, tmp_path / "out", command="plan")
    assert planned.status == 0, planned.stderr
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert hub.fetched == small | {"model.safetensors.index.json"}  # a plan needs no weights
    done = run(hub, tmp_path / "home", prompts_file, tmp_path / "out")
    assert done.status == 0, done.stderr
    shards = {path.name for path in published.glob("model-0*.safetensors")}
    assert len(shards) > 1
    assert hub.fetched == small | shards | {"model.safetensors.index.json"}
    assert record(tmp_path / "out")["revision"] == commit


@pytest.mark.slow
def test_without_an_answer_of_the_hub_a_run_says_that_it_waits_and_goes_on_with_its_cache(
    hub: Hub, published: Path, prompts_file: Path, tmp_path: Path
) -> None:
    commit = hub.push(published)
    assert run(hub, tmp_path / "home", prompts_file, tmp_path / "first").status == 0
    hub.asked.clear()
    hub.silent = True
    started = time.monotonic()
    done = run(hub, tmp_path / "home", prompts_file, tmp_path / "second")
    assert done.status == 0, done.stderr
    assert time.monotonic() - started < 60
    assert [line for line in hub.asked if hub.name in line] == ["GET /api/models/owner/name"]
    assert done.stderr.splitlines()[0] == "waiting for the hub to answer for owner/name"
    assert record(tmp_path / "second") == record(tmp_path / "first")
    assert record(tmp_path / "second")["revision"] == commit


@pytest.mark.slow
def test_a_branch_that_has_moved_is_another_model(
    hub: Hub, published: Path, prompts_file: Path, tmp_path: Path
) -> None:
    hub.push(published)
    assert run(hub, tmp_path / "home", prompts_file, tmp_path / "out").status == 0
    newest = hub.push(save_tiny(tmp_path / "moved", "llama", seed=1))
    refused = run(hub, tmp_path / "home", prompts_file, tmp_path / "out")
    assert refused.status == 2
    assert "model weights" in refused.stderr
    assert run(hub, tmp_path / "home", prompts_file, tmp_path / "new").status == 0
    assert record(tmp_path / "new")["revision"] == newest


def test_a_model_that_neither_the_hub_nor_the_cache_has_is_one_line(
    hub: Hub, prompts_file: Path, tmp_path: Path, gpt2: Path
) -> None:
    hub.push(gpt2)
    online = ("--revision", "elsewhere")
    refused = run(hub, tmp_path / "home", prompts_file, tmp_path / "out", *online)
    assert refused.status == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(
        "backlens: model: 'owner/name' at 'elsewhere' is no directory and not in the hub's cache"
    )


@pytest.mark.slow
def test_pickles_on_the_hub_are_fetched_only_if_they_are_allowed(
    hub: Hub, gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.push(folder)
    refused = run(hub, tmp_path / "home", prompts_file, tmp_path / "out")
    assert refused.status == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("backlens: model: 'owner/name' has no safetensors weights on the hub")
    assert "--allow-pickle" in line
    assert "pytorch_model.bin" not in hub.fetched
    done = run(hub, tmp_path / "home", prompts_file, tmp_path / "out", "--allow-pickle")
    assert done.status == 0, done.stderr
    assert "pytorch_model.bin" in hub.fetched


def cached(home: Path, model: Path, commit: str) -> None:
    """Put a model into a hub's cache as the commit that its branch is at."""
    hub = home / "hub" / "models--owner--name"
    (hub / "refs").mkdir(parents=True, exist_ok=True)
    (hub / "refs" / "main").write_text(commit)
    shutil.copytree(model, hub / "snapshots" / commit)


@pytest.mark.slow
def test_a_node_with_other_weights_or_none_is_refused(
    gpt2: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's cache has the branch at another commit; then the same commit, with other weights in it."""
    first, second = "1" * 40, "2" * 40
    cached(tmp_path / "driver", gpt2, first)
    cached(tmp_path / "node", save_tiny(tmp_path / "other", seed=1), second)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "node"))
    with one_node_cluster(cpus=1) as (address, _):
        monkeypatch.setenv("HF_HOME", str(tmp_path / "driver"))
        arguments = ("--model", "owner/name", "--prompts", prompts_file, "--address", address, "--layers", 0)
        nowhere = backlens("run", *arguments, "--out", tmp_path / "out")
        cached(tmp_path / "node", tmp_path / "other", first)
        other = backlens("run", *arguments, "--out", tmp_path / "out")
    assert (nowhere.status, other.status) == (2, 2), nowhere.stderr + other.stderr
    assert (
        f"'owner/name' at '{first}' is no directory and not in the hub's cache"
        in nowhere.stderr.splitlines()[-1]
    )
    assert "backlens: model: owner/name has other weights on" in other.stderr.splitlines()[-1]
    assert "Traceback" not in nowhere.stderr + other.stderr
    assert count_commits(tmp_path / "out") == 0
