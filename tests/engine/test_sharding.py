"""A model spread over devices gives the rows of the whole one."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from backlens.config import RunConfig, parse_max_memory
from backlens.errors import BacklensError
from tests.engine.command import (
    Finished,
    assert_complete,
    assert_same_run,
    backlens,
    called,
    error_line,
    snapshot,
)

SMALL = {"gpt2": "200KB", "llama": "150KB"}
"""Main memory for everything outside the blocks and for one block of three."""


@pytest.fixture(scope="module", params=SMALL)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(family)


@pytest.fixture(scope="module")
def whole(model: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with a model that is all on one device."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = called(*_command(model, prompts_file, out), "--executor", "local")
    assert done.status == 0, done.stderr
    return out


def _command(model: Path, prompts: Path, out: Path) -> tuple[object, ...]:
    return (
        *("run", "--model", model, "--prompts", prompts, "--out", out),
        *("--modules", "all", "--neurons", 4, "--top-k", 5, "--save-factors", "--shard-prompts", 5),
    )


def _spread(family: str, folder: Path) -> tuple[object, ...]:
    return ("--sharding", "accelerate", "--max-memory", f"cpu:{SMALL[family]}", "--offload", folder)


def _check(done: Finished, out: Path, whole: Path, folder: Path) -> None:
    assert done.status == 0, done.stderr
    assert "ready on cpu+disk" in done.stderr
    assert_complete(out, 12)
    assert_same_run(whole, out)
    assert list(folder.rglob("*")) == []


def test_rows_do_not_depend_on_offloading_to_disk(
    family: str, model: Path, prompts_file: Path, whole: Path, tmp_path: Path
) -> None:
    command = _command(model, prompts_file, tmp_path / "out")
    done = called(*command, *_spread(family, tmp_path / "disk"), "--executor", "local")
    _check(done, tmp_path / "out", whole, tmp_path / "disk")


def test_what_is_written_to_disk_is_removed_again(llama: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Weights of another type than the checkpoint's cannot be read from it block by block."""
    command = _command(llama, prompts_file, tmp_path / "out")
    options = ("--sharding", "accelerate", "--max-memory", "cpu:75KB", "--offload", tmp_path / "disk")
    done = called(*command, *options, "--dtype", "bfloat16", "--executor", "local")
    assert done.status == 0, done.stderr
    assert "ready on cpu+disk" in done.stderr
    here = called(
        *_command(llama, prompts_file, tmp_path / "whole"), "--dtype", "bfloat16", "--executor", "local"
    )
    assert here.status == 0, here.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "out")
    assert list((tmp_path / "disk").rglob("*")) == []


def test_a_spread_model_without_limits_is_all_on_what_there_is(
    model: Path, prompts_file: Path, whole: Path, tmp_path: Path
) -> None:
    command = _command(model, prompts_file, tmp_path / "out")
    done = called(*command, "--sharding", "accelerate", "--executor", "local")
    assert done.status == 0, done.stderr
    assert_same_run(whole, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama"], indirect=True)  # that families differ is this process's to show
def test_actors_spread_their_copies_too(
    family: str, model: Path, prompts_file: Path, whole: Path, tmp_path: Path, cluster: tuple[str, int]
) -> None:
    command = _command(model, prompts_file, tmp_path / "out")
    engine = ("--executor", "ray", "--replicas", 2, "--gpus-per-replica", 0, "--address", cluster[0])
    done = backlens(*command, *_spread(family, tmp_path / "disk"), *engine)
    _check(done, tmp_path / "out", whole, tmp_path / "disk")


def test_the_sharding_is_in_the_configuration_and_not_in_the_fingerprint(
    gpt2: Path, prompts_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = called("run", "--model", gpt2, "--prompts", prompts_file, "--out", out, "--executor", "local")
    assert first.status == 0, first.stderr
    rows = {name: state for name, state in snapshot(out).items() if name.endswith(".parquet")}
    command = ("run", "--model", gpt2, "--prompts", prompts_file, "--out", out, "--executor", "local")
    again = called(*command, *_spread("gpt2", tmp_path / "disk"))
    assert again.status == 0, again.stderr
    assert "nothing to do" in again.stdout
    assert {name: state for name, state in snapshot(out).items() if name in rows and name[:5] != "vocab"} == {
        name: state for name, state in rows.items() if name[:5] != "vocab"
    }
    assert not any(
        "accelerate" in str(part) for part in json.loads((out / "run.json").read_text())["fingerprint"]
    )
    options = yaml.safe_load((out / "config.yaml").read_text())
    assert (options["sharding"], options["max-memory"]) == ("accelerate", "cpu:200KB")


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="has a GPU 7")
def test_a_model_that_does_not_fit_is_refused(gpt2: Path, prompts_file: Path, tmp_path: Path) -> None:
    common = ("run", "--model", gpt2, "--prompts", prompts_file, "--out", tmp_path / "out")
    for limit, expected in (
        ("cpu:200KB", "2 of 3 blocks fit on no device"),
        ("cpu:10KB", "embeddings, norm and head take"),
        ("7:1GiB", "there is no GPU 7"),
    ):
        options = ("--sharding", "accelerate", "--max-memory", limit)
        refused = called(*common, "--executor", "local", *options)
        assert refused.status == 2
        assert expected in error_line(Finished(2, refused.stdout, refused.stderr.splitlines()[-1]))


@pytest.mark.parametrize("text", ["", "20GiB", "0:20", "gpu:20GiB", "0:1GiB,0:2GiB", "0:1GiB;cpu:1GiB"])
def test_memory_that_is_not_written_as_devices_and_sizes_is_refused(text: str) -> None:
    with pytest.raises(BacklensError, match="--max-memory"):
        RunConfig(sharding="accelerate", max_memory=text)


def test_memory_is_read_in_the_order_of_devices() -> None:
    assert list(parse_max_memory("cpu:1.5GiB, 1:2MB,0:3kb").items()) == [
        (0, 3000),
        (1, 2_000_000),
        ("cpu", 3 * 2**29),
    ]


def test_offloading_without_accelerate_is_refused() -> None:
    for option in ("--max-memory=0:1GiB", "--offload=/somewhere"):
        refused = called("run", "--out", "/nowhere", option)
        assert refused.status == 2
        assert "is for --sharding accelerate" in error_line(refused)
