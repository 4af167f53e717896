"""A model partitioned by ZeRO-3 over several actors gives the rows of the whole one, whatever becomes of the actors."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.engine.cluster import alive, kill, workers
from tests.engine.command import (
    assert_complete,
    assert_same_run,
    backlens,
    called,
    commits,
    error_line,
    finish,
    start,
    wait_for,
    write_jsonl,
)
from tests.engine.conftest import some_prompts
from tests.families import CONFIGS
from tests.tiny import byte_tokenizer, random_model

PROMPTS = 24
ZERO3 = ("--sharding", "zero3", "--ranks", 2)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    random_model(CONFIGS["mixtral"]).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", some_prompts(PROMPTS))


def command(model: Path, prompts: Path, out: Path) -> tuple[object, ...]:
    """Its shards are one to three batches: often one rank has a batch to compute and the other has none."""
    return (
        *("run", "--model", model, "--prompts", prompts, "--out", out),
        *("--modules", "all", "--neurons", 4, "--top-k", 5, "--target-mode", "all"),
        *("--shard-prompts", 3, "--batch-tokens", 24),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), [("llama", ["--offload-to-cpu"]), ("mixtral", [])])
def test_rows_do_not_depend_on_partitioning(
    family: str,
    options: list[object],
    prompts: Path,
    tmp_path: Path,
    cluster: tuple[str, int],
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(family)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    here = called(*command(model, prompts, whole), "--executor", "local")
    assert here.status == 0, here.stderr

    done = backlens(*command(model, prompts, parted), *ZERO3, *options, "--address", cluster[0])

    assert done.status == 0, done.stderr
    assert "2 ranks on cpu" in done.stderr
    assert_complete(parted, PROMPTS)
    assert_same_run(whole, parted)


@pytest.mark.slow
def test_a_gang_that_lost_a_rank_is_rebuilt_and_its_shards_are_computed_again(
    gpt2: Path, prompts: Path, tmp_path: Path, cluster: tuple[str, int]
) -> None:
    address, head = cluster
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    here = called(*command(gpt2, prompts, whole), "--executor", "local")
    assert here.status == 0, here.stderr

    driver = start(*command(gpt2, prompts, parted), *ZERO3, "--address", address)
    wait_for(lambda: commits(parted) or driver.poll() is not None, every=0.01)
    gang = workers(head, "Leader", "Peer")
    kill(workers(head, "Peer"))
    done = finish(driver)

    assert done.status == 0, done.stderr
    assert len(gang) == 2
    assert "workers that died and were replaced: 1" in done.stdout, done.stdout
    assert not alive(gang)
    assert_complete(parted, PROMPTS)
    assert_same_run(whole, parted)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sharding=zero3"], "Give --ranks"),
        (["--sharding=zero3", "--ranks=1"], "takes 2 or more"),
        (["--sharding=zero3", "--ranks=0"], "takes 2 or more"),
        (["--sharding=zero3", "--ranks=2", "--executor=local"], "use --executor ray"),
        (["--sharding=zero3", "--ranks=2", "--gpus-per-replica=4"], "each of the 2 --ranks has one GPU"),
        (["--sharding=zero3", "--ranks=2", "--max-memory=cpu:1GiB"], "is for --sharding accelerate"),
        (["--sharding=accelerate", "--ranks=2"], "is for --sharding zero3"),
        (["--offload-to-cpu"], "is for --sharding zero3"),
    ],
)
def test_options_that_make_no_gang_are_refused(options: list[str], expected: str) -> None:
    refused = called("run", "--out", "/nowhere", *options)
    assert refused.status == 2
    assert expected in error_line(refused)


def test_without_deepspeed_the_extra_is_named(
    gpt2: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    refused = called(*command(gpt2, prompts, tmp_path / "out"), *ZERO3)
    assert refused.status == 2
    assert "backlens[deepspeed]" in error_line(refused)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "quantized weights",
        ),
        ({"dtype": None}, "give --dtype"),
    ],
)
def test_weights_that_cannot_be_partitioned_as_they_are_are_refused(
    change: dict[str, object], expected: str, gpt2: Path, prompts: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(gpt2, tmp_path / "model")
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refused = called(*command(model, prompts, tmp_path / "out"), *ZERO3)
    assert refused.status == 2
    assert expected in error_line(refused)
