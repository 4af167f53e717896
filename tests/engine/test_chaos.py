"""A run goes on through the deaths of workers, nodes and drivers, and only the work in hand is done again."""

import random
from pathlib import Path

import pytest

from tests.engine.chaos import SHARD, What, computed_again, disturb, numbered_prompts
from tests.engine.cluster import several_nodes
from tests.engine.command import assert_complete, assert_same_run, called
from tests.engine.misbehaving import command, save_misbehaving

PROMPTS = 80
KILLS: tuple[What, ...] = ("worker", "node", "driver")


@pytest.mark.slow
def test_replicas_come_and_go_with_the_nodes_and_only_the_work_in_hand_is_lost(tmp_path: Path) -> None:
    prompts, log = numbered_prompts(PROMPTS), tmp_path / "log"
    clean, out = tmp_path / "clean", tmp_path / "out"
    shards = ("--shard-prompts", SHARD)
    here = called(
        *command(save_misbehaving(tmp_path / "quick"), prompts, clean), *shards, "--executor", "local"
    )
    assert here.status == 0, here.stderr
    model = save_misbehaving(tmp_path / "model", log=log, naps=0.2)

    with several_nodes(2) as nodes:
        engine = ("--executor", "ray", "--address", nodes.address, "--replicas", "auto")
        arguments = (*command(model, prompts, out), *engine, *shards)
        done = disturb(arguments, nodes, out, KILLS, random.Random(0))

    assert done.status == 0, done.stderr
    assert_complete(out, PROMPTS)
    assert_same_run(clean, out)
    again = computed_again(log)
    assert 0 < again.total() <= SHARD * len(again)
