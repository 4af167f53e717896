"""Neurons with tokens of their own are those that were planted, and no others: with chance alone there are none."""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from backlens.atlas import Atlas
from backlens.atlas.build import build_atlas
from backlens.store.commit import commit_shard, write_vocab
from backlens.store.directory import Directory
from backlens.store.run_record import ShardPlan, finish, open_run
from backlens.store.tables import TABLES
from tests.store.examples import arrow

Row = dict[str, Any]
PROMPTS, NEURONS, KEPT, K = 60, 40, 12, 5
VOCABULARY = [f" t{index}" for index in range(120)]
COMMON = range(8)
"""Tokens that stand in half of all lists, as those of a norm's bias do."""
PLANTED = {
    (1, "mlp.down", 7): ("bottom", 100),
    (0, "mlp.up", 3): ("top", 77),
    (2, "mlp.down", 30): ("bottom", 55),
}
"""Neurons, and the token that is in four of five of their lists."""
SHORT = {(1, "mlp.up", 9): ("top", 66)}
"""The same, of vectors that are too short for their lists to say anything."""
FLOOR = 0.25


def surprise(count: float, lists: float, base: float) -> float:
    """n KL(count / n ‖ base) in nats, of what is more than expected."""
    share = count / lists
    if share <= base:
        return 0.0
    rest = (1 - share) * math.log((1 - share) / (1 - base)) if share < 1 else 0.0
    return lists * (share * math.log(share / base) + rest)


def smoothed(count: float, lists: float, base: float) -> float:
    """Log odds in bits, as if five more lists were as all are."""
    share = (count + 5 * base) / (lists + 5)
    return math.log2(share / (1 - share)) - math.log2(base / (1 - base))


def neuron_rows(chance: random.Random, planted: Mapping[tuple, tuple[str, int]]) -> list[Row]:
    """The strongest neurons of every prompt; neurons differ in how often they are kept, as in real runs."""
    rows: list[Row] = []
    weights = [1 / (1 + neuron % 13) for neuron in range(NEURONS)]
    for prompt_id in range(PROMPTS):
        for layer in range(3):
            for module in ("mlp.up", "mlp.down"):
                ours = [n for n in range(NEURONS) if (layer, module, n) in planted]
                kept = {n for n in ours if chance.random() < 0.7}
                while len(kept) < KEPT:
                    kept.add(chance.choices(range(NEURONS), weights)[0])
                for neuron in sorted(kept):
                    keys = (layer, module, neuron)
                    rows.append(_row(chance, prompt_id, keys, planted.get(keys)))
    return rows


def _row(chance: random.Random, prompt_id: int, keys: tuple, own: tuple[str, int] | None) -> Row:
    layer, module, neuron = keys
    lists: dict[str, list[int]] = {}
    for side in ("top", "bottom"):
        common = [token for token in COMMON if chance.random() < 0.5][: K - 1]
        others = chance.sample(range(len(COMMON), len(VOCABULARY)), K)
        mine = [own[1]] if own is not None and own[0] == side and chance.random() < 0.8 else []
        lists[side] = list(dict.fromkeys([*mine, *common, *others]))[:K]
    return {
        "prompt_id": prompt_id,
        "layer": layer,
        "module": module,
        "expert": None,
        "neuron": neuron,
        "grad_norm": 0.125 if keys in SHORT else 1.0 + chance.randrange(256) / 256,
        "main_position": 0,
        "top_ids": lists["top"],
        "top_scores": [float(K - place) for place in range(K)],
        "bottom_ids": lists["bottom"],
        "bottom_scores": [float(place - K) for place in range(K)],
        "target_score": 0.0,
        "target_rank": 5,
    }


def written(folder: Path, neurons: list[Row], floor: float = FLOOR) -> str:
    directory = Directory.at(folder)
    run = open_run(
        directory,
        {"model": "tiny"},
        config={"neurons": KEPT, "top_k": K},
        config_yaml="",
        plan=ShardPlan(prompts=PROMPTS, shards=1, shard_prompts=PROMPTS),
        model={"name": "tiny", "layers": 3, "modules": ["mlp.up", "mlp.down"], "norm_floor": floor},
    )
    write_vocab(directory, VOCABULARY, [token.encode() for token in VOCABULARY])
    rows: dict[str, list[Row]] = {name: [] for name in TABLES if name not in ("vocab", "edits", "factors")}
    rows["neurons"] = neurons
    nothing = {"id": None, "subject": None, "relation": None, "subject_start": None, "subject_end": None}
    said = {"prompt": "x", "target": "y", "token_ids": [0], "target_ids": [1], "n_tokens": 1, "loss": 1.0}
    found = {"target_prob": 0.5, "target_rank": 1, "predicted_id": 0, "meta": None}
    rows["prompts"] = [{"prompt_id": prompt_id, **nothing, **said, **found} for prompt_id in range(PROMPTS)]
    commit_shard(directory, 0, arrow(rows), first_prompt=0, prompts=PROMPTS)
    finish(run)
    return str(folder)


def shuffled(chance: random.Random, rows: list[Row]) -> list[Row]:
    """The same rows, dealt out anew to the neurons of their layer's module."""
    dealt: list[Row] = []
    for layer in range(3):
        for module in ("mlp.up", "mlp.down"):
            unit = [row for row in rows if (row["layer"], row["module"]) == (layer, module)]
            names = [row["neuron"] for row in unit]
            chance.shuffle(names)
            dealt += [{**row, "neuron": name} for row, name in zip(unit, names, strict=True)]
    return dealt


def specific(atlas: Atlas) -> set[tuple]:
    return {(row["layer"], row["module"], row["neuron"]) for row in atlas.specific_neurons()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("has_atlas", [False, True], ids=["tables", "atlas"])
def test_planted_neurons_are_found_and_no_others(tmp_path: Path, seed: int, has_atlas: bool):
    rows = neuron_rows(random.Random(seed), {**PLANTED, **SHORT})
    out = written(tmp_path, rows)
    if has_atlas:
        build_atlas(out)
    with Atlas(out) as atlas:
        assert atlas.snapshot.is_current == has_atlas
        assert specific(atlas) == set(PLANTED)
        for keys, (side, token_id) in PLANTED.items():
            (found,) = atlas.specific_neurons(layer=keys[0], module=keys[1])
            name = "promoted" if side == "bottom" else "suppressed"
            unit = [
                row for row in rows if (row["layer"], row["module"]) == keys[:2] and row["grad_norm"] >= FLOOR
            ]
            mine = [row for row in unit if row["neuron"] == keys[2]]
            count = sum(token_id in row[f"{side}_ids"] for row in mine)
            base = sum(token_id in row[f"{side}_ids"] for row in unit) / (len(unit) + 1)
            assert (found[f"{name}_tokens"], found[f"{name}_counts"]) == ([VOCABULARY[token_id]], [count])
            assert found["specificity"] == pytest.approx(smoothed(count, len(mine), base))
            assert found["lists"] == len(mine)


@pytest.mark.parametrize("seed", range(3))
def test_among_the_same_rows_shuffled_there_is_no_neuron_with_a_token_of_its_own(tmp_path: Path, seed: int):
    chance = random.Random(seed)
    with Atlas(written(tmp_path, shuffled(chance, neuron_rows(chance, PLANTED)))) as atlas:
        assert specific(atlas) == set()
        for _, token_id in PLANTED.values():
            assert {row["log_odds"] for row in atlas.token_neurons(VOCABULARY[token_id])} == {None}


def test_the_neuron_that_a_token_is_planted_in_leads_its_page_however_rarely_it_is_kept(tmp_path: Path):
    rows = neuron_rows(random.Random(1), PLANTED)
    rare = dict.fromkeys(PLANTED, 0)
    kept = []
    for row in rows:
        keys = (row["layer"], row["module"], row["neuron"])
        rare[keys] = rare.get(keys, 0) + 1
        if keys not in PLANTED or rare[keys] <= 15:
            kept.append(row)
    with Atlas(written(tmp_path, kept)) as atlas:
        for keys, (_, token_id) in PLANTED.items():
            first, *others = atlas.token_neurons(VOCABULARY[token_id])
            assert (first["layer"], first["module"], first["neuron"]) == keys
            assert first["log_odds"] > 2
            assert all(row["log_odds"] is None for row in others)


def test_lists_of_vectors_below_the_norms_epsilon_are_not_counted(tmp_path: Path):
    rows = neuron_rows(random.Random(0), SHORT)
    (keys,) = SHORT
    with Atlas(written(tmp_path / "one", rows)) as atlas:
        (found,) = atlas.neuron_summary("1.mlp.up.9")
        assert (found["lists"], found["suppressed_tokens"]) == (0, None)
        assert found["prompts"] > 20  # it is kept all the same
    with Atlas(written(tmp_path / "other", rows, floor=0.0)) as atlas:
        assert specific(atlas) == {keys}  # for a norm without bias, lists do not depend on the length
