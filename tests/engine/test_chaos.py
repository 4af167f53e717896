"""A run goes on through the deaths of workers, nodes, drivers and ranks; only the work in hand is done again."""

import random
from pathlib import Path

import pytest

from tests.engine.chaos import SHARD, What, costs, disturb, numbered_prompts
from tests.engine.cluster import several_nodes
from tests.engine.command import assert_complete, assert_same_run, called
from tests.engine.misbehaving import command, save_misbehaving

PROMPTS = 200
"""Enough that the last driver has work left when its rank is killed, on a quick machine too."""
KILLS: tuple[What, ...] = ("process", "node", "driver", "process")
"""The driver that is started again partitions the model: the second process is a rank of a gang."""


@pytest.mark.slow
def test_replicas_come_and_go_drivers_change_the_sharding_and_only_the_work_in_hand_is_lost(
    tmp_path: Path,
) -> None:
    prompts, log = numbered_prompts(PROMPTS), tmp_path / "log"
    clean, out = tmp_path / "clean", tmp_path / "out"
    plan = ("--shard-prompts", SHARD, "--batch-tokens", 64)
    here = called(
        *command(save_misbehaving(tmp_path / "quick"), prompts, clean), *plan, "--executor", "local"
    )
    assert here.status == 0, here.stderr
    model = save_misbehaving(tmp_path / "model", log=log, naps=0.2)

    with several_nodes(2) as nodes:
        common = (*command(model, prompts, out), *plan, "--executor", "ray", "--address", nodes.address)
        whole, parted = ("--replicas", "auto"), ("--sharding", "zero3", "--ranks", 2)
        commands = [(*common, *whole), (*common, *parted)]
        done, kills = disturb(commands, nodes, out, KILLS, random.Random(0))

    assert done.status == 0, done.stderr
    assert [each.what for each in kills] == ["worker", "node", "driver", "rank"]
    assert "workers that died and were replaced: 1" in done.stdout, done.stdout
    assert_complete(out, PROMPTS)
    assert_same_run(clean, out)
    assert not list(out.glob("_commits/*.attempt"))
    lost = [prompts for each in costs(log, kills) for prompts in each]
    assert 0 < sum(lost) <= SHARD * sum(prompts > 0 for prompts in lost)
