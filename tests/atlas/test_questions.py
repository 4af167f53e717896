"""Every question of `Atlas` against a search through the rows in plain Python, with an atlas and without."""

import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from statistics import fmean, median
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backlens.atlas import Atlas
from backlens.atlas.build import build_atlas
from backlens.atlas.names import parse_neuron
from backlens.errors import BacklensError
from backlens.store.directory import Directory
from tests.atlas.test_evidence import smoothed, surprise
from tests.atlas.test_query import appearances, told
from tests.store.examples import VOCAB, ExampleRun, example_run

Row = dict[str, Any]
UNIT = ("layer", "module", "expert")
NEURON = (*UNIT, "neuron")
SIDES = ("top", "bottom")
ALL = 1_000_000


@contextmanager
def written(seed: int, experts: bool) -> Iterator[tuple[ExampleRun, Atlas]]:
    with tempfile.TemporaryDirectory() as folder:
        example = example_run(Directory.at(folder), seed=seed, experts=experts)
        yield example, Atlas(folder)


def on_random_runs(check: Callable[[ExampleRun, Atlas], None]) -> Callable[..., None]:
    """The check on a few random runs, dense or with experts, each without an atlas and with one."""

    def test(seed: int, experts: bool) -> None:
        with written(seed, experts) as (example, atlas):
            check(example, atlas)
            build_atlas(example.out)
            indexed = Atlas(example.out)
            assert indexed.snapshot.is_current
            check(example, indexed)

    given_runs = given(seed=st.integers(0, 2**31), experts=st.booleans())
    quick = settings(
        max_examples=2, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    test.__name__ = check.__name__
    test.__doc__ = check.__doc__
    return quick(given_runs(test))


def key(row: Row, names: tuple[str, ...] = NEURON) -> tuple:
    return tuple(row[name] for name in names)


def order(keys: tuple) -> tuple:
    """Keys as SQL sorts them: nulls last."""
    return tuple((value is None, 0 if value is None else value) for value in keys)


def entries(example: ExampleRun) -> list[Row]:
    """Every entry of every neuron's lists."""
    return [
        {**row, "side": side, "token_id": token_id, "place": place, "score": score}
        for row in example.rows["neurons"]
        for side in ("top", "bottom")
        for place, (token_id, score) in enumerate(
            zip(row[f"{side}_ids"] or [], row[f"{side}_scores"] or [], strict=True)
        )
    ]


def grouped(rows: list[Row], names: tuple[str, ...]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row, names)].append(row)
    return groups


def sides(rows: list[Row]) -> Counter:
    return Counter(row["side"] for row in rows)


def prompts_of(rows: list[Row]) -> int:
    return len({row["prompt_id"] for row in rows})


def close(found: Any, expected: Any) -> bool:
    """Equal, numbers to rounding."""
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9)
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    if isinstance(expected, dict) and isinstance(found, dict):
        return found.keys() == expected.keys() and all(
            close(found[name], expected[name]) for name in expected
        )
    return found == expected


def assert_same(found: list[Row], expected: list[Row]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert close(one, other), f"{one}\n{other}"


@on_random_runs
def test_places_of_a_token_and_prompts_of_a_neuron_are_the_rows_themselves(example: ExampleRun, atlas: Atlas):
    assert atlas.by_token(VOCAB[7], ALL).to_pylist() == appearances(example, 7)
    assert atlas.by_token(VOCAB[1], 4).to_pylist() == appearances(example, 1)[:4]
    for address in ("1.mlp.down.3", "0.mlp.up.e1.2"):
        assert atlas.by_neuron(address, ALL).to_pylist() == told(example, parse_neuron(address))


@on_random_runs
def test_a_heatmap_is_a_prompts_rows(example: ExampleRun, atlas: Atlas):
    rows = [row for row in example.rows["tokens"] if row["prompt_id"] == 5 and row["module"] == "mlp.up"]
    rows.sort(key=lambda row: order(key(row, (*UNIT, "position"))))
    shared = (
        "layer",
        "module",
        "expert",
        "position",
        "vjp_norm",
        "target_rank",
        "top_scores",
        "bottom_scores",
    )
    expected = [
        {name: row[name] for name in shared}
        | {"token": VOCAB[row["token_id"]]}
        | {f"{side}_tokens": row[f"{side}_ids"] and [VOCAB[i] for i in row[f"{side}_ids"]] for side in SIDES}
        for row in rows
    ]
    found = atlas.by_prompt(5, module="mlp.up").to_pylist()
    assert [{name: row[name] for name in expected[0]} for row in found] == expected


@on_random_runs
def test_tables_sorted_by_prompt_hold_the_rows_themselves(example: ExampleRun, atlas: Atlas):
    for table, last in (("tokens", "position"), ("neurons", "neuron")):
        names = ("prompt_id", *UNIT, last)
        rows = sorted(example.rows[table], key=lambda row: order(key(row, names)))
        found = atlas.sql(f"FROM prompt_{table} ORDER BY {', '.join(names)}", ALL).to_pylist()
        assert found == [{name: row[name] for name in found[0]} for row in rows]


@on_random_runs
def test_the_neurons_of_a_token_are_those_in_whose_lists_it_stands(example: ExampleRun, atlas: Atlas):
    for token_id in (1, 4, 20):
        rows = grouped([row for row in entries(example) if row["token_id"] == token_id], NEURON)
        expected = [
            dict(zip(NEURON, keys, strict=True))
            | {"promoted": sides(found)["bottom"], "suppressed": sides(found)["top"]}
            | {"prompts": prompts_of(found), "lists": lists_of(example, keys)}
            # so few prompts are no evidence of anything (test_evidence.py has runs with more)
            | {"best_place": min(row["place"] for row in found), "log_odds": None}
            for keys, found in rows.items()
        ]
        expected.sort(key=lambda row: (-row["promoted"] - row["suppressed"], order(key(row))))
        assert_same(atlas.token_neurons(VOCAB[token_id], ALL).to_pylist(), expected)
        within = [row for row in expected if (row["layer"], row["module"]) == (1, "mlp.up")]
        assert_same(atlas.token_neurons(VOCAB[token_id], ALL, 1, "mlp.up").to_pylist(), within)


@on_random_runs
def test_the_layers_of_a_token_count_its_lists(example: ExampleRun, atlas: Atlas):
    for token_id in (1, 12):
        rows = grouped([row for row in entries(example) if row["token_id"] == token_id], UNIT)
        expected = []
        for keys, found in sorted(rows.items(), key=lambda item: order(item[0])):
            pushed = {
                side: sorted(
                    Counter(row["neuron"] for row in found if row["side"] == side).items(),
                    key=lambda item: (-item[1], item[0]),
                )[:5]
                for side in ("bottom", "top")
            }
            expected.append(
                {"token_id": token_id, **dict(zip(UNIT, keys, strict=True))}
                | {"promoted": sides(found)["bottom"], "suppressed": sides(found)["top"]}
                | {"prompts": prompts_of(found), "neurons": len({row["neuron"] for row in found})}
                | {
                    f"{name}_{part}": [item[place] for item in pushed[side]] or None
                    for name, side in (("promoted", "bottom"), ("suppressed", "top"))
                    for place, part in enumerate(("neurons", "counts"))
                }
            )
        assert_same(atlas.token_layers(VOCAB[token_id], ALL).to_pylist(), expected)


def lists_of(example: ExampleRun, keys: tuple) -> int:
    return sum(row["top_ids"] is not None for row in example.rows["neurons"] if key(row) == keys)


def summary(example: ExampleRun, keys: tuple) -> Row:
    """One neuron's row of `neuron_summary`, with texts."""
    kept = [row for row in example.rows["neurons"] if key(row) == keys]
    kept.sort(key=lambda row: (-row["grad_norm"], row["prompt_id"]))
    norms = [row["grad_norm"] for row in kept]
    listed = entries(example)
    mine = [row for row in listed if key(row) == keys]
    counts = Counter((row["side"], row["token_id"]) for row in mine)
    found: Row = dict(zip(NEURON, keys, strict=True)) | {
        "prompts": len(kept),
        "grad_norm_sum": sum(norms),
        "grad_norm_mean": fmean(norms),
        "grad_norm_max": max(norms),
        "strongest_prompts": [row["prompt_id"] for row in kept[:5]],
        "strongest_norms": norms[:5],
        "lists": lists_of(example, keys),
        "entries_norm": math.sqrt(sum(count**2 for count in counts.values())),
    }
    # the lens of its own weights takes the model (test_weights.py)
    found |= {
        f"weight_{part}": None
        for part in ("norm", *(f"{s}_{w}" for s in SIDES for w in ("tokens", "scores")))
    }
    for name, side in (("promoted", "bottom"), ("suppressed", "top")):
        found |= said(name, [row for row in mine if row["side"] == side], side, listed, keys)
    return found


def said(name: str, rows: list[Row], side: str, listed: list[Row], keys: tuple) -> Row:
    counts = Counter(row["token_id"] for row in rows)
    none = {f"{name}_own_{part}": None for part in ("tokens", "counts", "log_odds")}
    parts = ("tokens", "counts", "lifts", "entropy")
    if not counts:
        return none | {f"{name}_{part}": None for part in parts}
    unit = Counter(row["token_id"] for row in listed if row["side"] == side and key(row)[:2] == keys[:2])
    total, all_total = counts.total(), unit.total()
    lift = {token: counts[token] / total / (unit[token] / all_total) for token in counts}
    first = sorted(counts, key=lambda token: (-counts[token], token))[:10]
    values = (
        [VOCAB[token] for token in first],
        [counts[token] for token in first],
        [lift[token] for token in first],
        abs(sum(n / total * math.log2(n / total) for n in counts.values())),
    )
    return none | {f"{name}_{part}": value for part, value in zip(parts, values, strict=True)}


def address(keys: tuple) -> str:
    layer, module, expert, neuron = keys
    return f"{layer}.{module}.{neuron}" if expert is None else f"{layer}.{module}.e{expert}.{neuron}"


@on_random_runs
def test_a_summary_adds_up_what_the_prompts_say_to_a_neuron(example: ExampleRun, atlas: Atlas):
    every = sorted({key(row) for row in example.rows["neurons"]}, key=order)
    for keys in every[:: len(every) // 4]:
        assert_same(atlas.neuron_summary(address(keys)).to_pylist(), [summary(example, keys)])


@on_random_runs
def test_the_tokens_of_a_neuron_are_those_in_its_lists(example: ExampleRun, atlas: Atlas):
    for index in (0, 3):
        mine = [
            row
            for row in entries(example)
            if key(row, ("layer", "module", "neuron")) == (1, "mlp.down", index)
        ]
        expected = [
            {"token_id": token_id, "token": VOCAB[token_id]}
            | {"promoted": sides(rows)["bottom"], "suppressed": sides(rows)["top"]}
            | {"prompts": prompts_of(rows), "best_place": min(row["place"] for row in rows)}
            for (token_id,), rows in grouped(mine, ("token_id",)).items()
        ]
        expected.sort(key=lambda row: (-row["promoted"] - row["suppressed"], row["token_id"]))
        assert_same(atlas.neuron_tokens(f"1.mlp.down.{index}", ALL).to_pylist(), expected)


@on_random_runs
def test_similar_neurons_are_told_the_same_tokens(example: ExampleRun, atlas: Atlas):
    vectors = {
        keys: Counter((row["side"], row["token_id"]) for row in rows)
        for keys, rows in grouped(entries(example), NEURON).items()
    }
    asked = min(vectors, key=order)
    mine = vectors.pop(asked)
    expected = {
        keys: sum(mine[item] * theirs[item] for item in mine)
        / math.sqrt(sum(n * n for n in mine.values()) * sum(n * n for n in theirs.values()))
        for keys, theirs in vectors.items()
        if mine.keys() & theirs.keys()
    }
    found = atlas.similar_neurons(address(asked), ALL).to_pylist()
    assert {key(row) for row in found} == set(expected)
    for row in found:
        shared = {token for _, token in mine.keys() & vectors[key(row)].keys()}
        assert row["shared_tokens"] == len(shared)
        assert math.isclose(row["similarity"], expected[key(row)], rel_tol=1e-9)
    assert [row["similarity"] for row in found] == sorted((row["similarity"] for row in found), reverse=True)


@on_random_runs
def test_a_prompts_neurons_are_its_rows_strongest_first(example: ExampleRun, atlas: Atlas):
    (prompt,) = [row for row in example.rows["prompts"] if row["prompt_id"] == 6]
    rows = [row for row in example.rows["neurons"] if row["prompt_id"] == 6 and row["layer"] == 2]
    rows.sort(key=lambda row: (-row["grad_norm"], order(key(row))))
    found = atlas.prompt_neurons(6, ALL, layer=2).to_pylist()
    assert [key(row) for row in found] == [key(row) for row in rows]
    for one, other in zip(found, rows, strict=True):
        assert one["main_token"] == VOCAB[prompt["token_ids"][other["main_position"]]]
        assert one["target_rank"] == other["target_rank"]
        assert one["bottom_tokens"] == (other["bottom_ids"] and [VOCAB[i] for i in other["bottom_ids"]])


@on_random_runs
def test_target_ranks_follow_one_position_through_the_layers(example: ExampleRun, atlas: Atlas):
    (prompt,) = [row for row in example.rows["prompts"] if row["prompt_id"] == 1]
    for given_position, position in ((None, prompt["n_tokens"] - 1), (0, 0)):
        rows = [
            row for row in example.rows["tokens"] if row["prompt_id"] == 1 and row["position"] == position
        ]
        rows.sort(key=lambda row: order(key(row, ("module", "expert", "layer"))))
        names = (*UNIT, "position", "target_rank", "target_score", "vjp_norm")
        found = atlas.target_ranks(1, position=given_position).to_pylist()
        assert [key(row, names) for row in found] == [key(row, names) for row in rows]


@on_random_runs
def test_prominent_tokens_of_a_prompt_are_counted_over_its_cells(example: ExampleRun, atlas: Atlas):
    cells = [
        {**row, "side": side, "token_id": token_id, "place": place}
        for row in example.rows["tokens"]
        if row["prompt_id"] == 2
        for side in ("top", "bottom")
        for place, token_id in enumerate(row[f"{side}_ids"] or [])
    ]
    expected = [
        {"token_id": token_id, "token": VOCAB[token_id], "side": side, "cells": len(rows)}
        | {"first_places": sum(row["place"] == 0 for row in rows)}
        | {"layers": len(layers := {row["layer"] for row in rows})}
        | {"first_layer": min(layers), "last_layer": max(layers)}
        for (token_id, side), rows in grouped(cells, ("token_id", "side")).items()
    ]
    expected.sort(
        key=lambda row: (-row["first_places"], -row["cells"], row["token_id"], row["side"] != "top")
    )
    assert_same(atlas.prominent_tokens(2, ALL).to_pylist(), expected)


@on_random_runs
def test_prominent_tokens_of_a_run_are_those_that_a_module_has_in_more_prompts(
    example: ExampleRun, atlas: Atlas
):
    listed = grouped(entries(example), UNIT)
    prompts = len(example.rows["prompts"])
    found: dict[tuple, dict[tuple, int]] = defaultdict(dict)
    for (layer, module), every in grouped(entries(example), ("layer", "module")).items():
        experts = {row["expert"] for row in every}
        for (token_id,), rows in grouped(every, ("token_id",)).items():
            kept = [prompts_of([row for row in rows if row["expert"] == expert]) for expert in experts]
            found[(layer, module)][token_id] = min(prompts, sum(kept))
    comparisons = sum(map(len, found.values()))
    expected = []
    for (token_id,), rows in grouped(entries(example), ("token_id",)).items():
        layers = {row["layer"] for row in rows}
        base = sum(unit.get(token_id, 0) for unit in found.values()) / (len(found) * prompts + 1)
        strong = {
            keys: smoothed(unit[token_id], prompts, base)
            for keys, unit in sorted(found.items())
            if token_id in unit and surprise(unit[token_id], prompts, base) >= math.log(comparisons / 0.001)
        }
        most = (
            max(strong, key=lambda keys: strong[keys])
            if strong
            else min(k for k in found if token_id in found[k])
        )
        expected.append(
            {"token_id": token_id, "token": VOCAB[token_id]}
            | {"promoted": sides(rows)["bottom"], "suppressed": sides(rows)["top"], "layers": len(layers)}
            | {"first_layer": min(layers), "last_layer": max(layers)}
            | {
                "most_in_a_module": max(
                    len([r for r in each if r["token_id"] == token_id]) for each in listed.values()
                )
            }
            | {"log_odds": strong.get(most), "most_layer": most[0], "most_module": most[1]}
        )
    expected.sort(
        key=lambda row: (
            row["log_odds"] is None, -(row["log_odds"] or 0), -row["most_in_a_module"], row["token_id"],
        )
    )  # fmt: skip
    assert_same(atlas.prominent_tokens(limit=ALL).to_pylist(), expected)


@on_random_runs
def test_two_prompts_are_compared_by_layer_and_module(example: ExampleRun, atlas: Atlas):
    last = {row["prompt_id"]: row["n_tokens"] - 1 for row in example.rows["prompts"]}
    units = sorted({key(row, UNIT) for row in example.rows["layers"]}, key=order)
    expected = []
    for unit in units:
        row: Row = dict(zip(UNIT, unit, strict=True))
        kept = {}
        for number, prompt_id in ((1, 0), (2, 5)):
            mine = {
                table: [
                    r for r in example.rows[table] if key(r, UNIT) == unit and r["prompt_id"] == prompt_id
                ]
                for table in ("layers", "tokens", "neurons")
            }
            (at_last,) = [r for r in mine["tokens"] if r["position"] == last[prompt_id]]
            kept[number] = {r["neuron"] for r in mine["neurons"]}
            row |= {
                f"grad_norm_{number}": mine["layers"][0]["grad_norm"],
                f"target_rank_{number}": at_last["target_rank"],
                f"neurons_{number}": len(kept[number]),
            }
        expected.append(row | {"shared_neurons": len(kept[1] & kept[2])})
    assert_same(atlas.compare_prompts(0, 5).to_pylist(), expected)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), experts=st.booleans())
def test_two_runs_are_compared_over_the_prompts_of_both(seed: int, experts: bool):
    with written(seed, experts) as (one, atlas), written(seed + 1, experts) as (two, other):
        found = atlas.compare_runs(other).to_pylist()
        facts = [
            [{key(row, (*UNIT, "prompt_id")): row for row in each.rows["layers"]} for each in (one, two)],
            [{key(row, (*NEURON, "prompt_id")) for row in each.rows["neurons"]} for each in (one, two)],
        ]
    layers, neurons = facts
    expected = []
    for unit in sorted({keys[:3] for keys in layers[0]}, key=order):
        both = [keys for keys in layers[0].keys() & layers[1].keys() if keys[:3] == unit]
        row: Row = dict(zip(UNIT, unit, strict=True)) | {"prompts": len(both)}
        for number in (0, 1):
            rows = [layers[number][keys] for keys in both]
            ranks = [each["target_rank"] for each in rows if each["target_rank"] is not None]
            row[f"grad_norm_{number + 1}"] = fmean(each["grad_norm"] for each in rows)
            row[f"target_rank_{number + 1}"] = fmean(ranks) if ranks else None
        expected.append(row | {"shared_neurons": sum(keys[:3] == unit for keys in neurons[0] & neurons[1])})
    assert_same(found, expected)


@on_random_runs
def test_groups_are_means_over_their_prompts(example: ExampleRun, atlas: Atlas):
    prompts = {row["prompt_id"]: row for row in example.rows["prompts"]}
    for by in ("subject", "row", "relation"):
        tags = {
            prompt_id: str(prompt_id) if by == "row" else prompt[by] for prompt_id, prompt in prompts.items()
        }
        rows = [{**row, "tag": tags[row["prompt_id"]]} for row in example.rows["layers"] if row["layer"] == 1]
        expected = []
        for keys, found in grouped(rows, ("tag", "module", "layer", "expert")).items():
            ranks = [row["target_rank"] for row in found if row["target_rank"] is not None]
            expected.append(
                dict(zip(("tag", "module", "layer", "expert"), keys, strict=True))
                | {"prompts": len(found), "loss": fmean(prompts[row["prompt_id"]]["loss"] for row in found)}
                | {"target_prob": 0.25, "grad_norm": fmean(row["grad_norm"] for row in found)}
                | {"target_rank": fmean(ranks) if ranks else None}
            )
        expected.sort(key=lambda row: order(key(row, ("tag", "module", "layer", "expert"))))
        assert_same(atlas.groups(by, layer=1).to_pylist(), expected)


@on_random_runs
def test_coverage_counts_what_is_there(example: ExampleRun, atlas: Atlas):
    rows = {table: grouped(example.rows[table], UNIT) for table in ("layers", "tokens", "neurons")}
    expected = [
        dict(zip(UNIT, unit, strict=True))
        | {"prompts": len(found), "prompts_without_rows": len(example.rows["prompts"]) - len(found)}
        | {"zero_gradients": sum(row["rank"] == 0 for row in found), "positions": len(rows["tokens"][unit])}
        | {"zero_vjps": sum(row["vjp_norm"] == 0 for row in rows["tokens"][unit])}
        | {"neuron_rows": len(rows["neurons"][unit])}
        | {"distinct_neurons": len({row["neuron"] for row in rows["neurons"][unit]})}
        | {"failed_prompts": len(example.rows["failures"])}
        for unit, found in sorted(rows["layers"].items(), key=lambda item: order(item[0]))
    ]
    assert_same(atlas.coverage().to_pylist(), expected)


def position_class(position: int, prompt: Row) -> str:
    if position == prompt["n_tokens"] - 1:
        return "last"
    if position == prompt["subject_end"] - 1:
        return "subject_last"
    return "subject_first" if position == prompt["subject_start"] else "other"


def entropy(values: list[int]) -> float:
    counts = Counter(values)
    return abs(sum(n / counts.total() * math.log2(n / counts.total()) for n in counts.values()))


@on_random_runs
def test_layer_curves_are_means_by_kind_of_position(example: ExampleRun, atlas: Atlas):
    prompts = {row["prompt_id"]: row for row in example.rows["prompts"]}
    rows = [
        {**row, "position_class": position_class(row["position"], prompts[row["prompt_id"]])}
        for row in example.rows["tokens"]
    ]
    expected = []
    for keys, found in grouped(rows, (*UNIT, "position_class")).items():
        spoken = [row for row in found if row["top_ids"] is not None]
        ranks = [row["target_rank"] for row in spoken]
        expected.append(
            dict(zip((*UNIT, "position_class"), keys, strict=True))
            | {"positions": len(found), "prompts": prompts_of(found), "input_norm": 1.0, "vjp_norm": 0.5}
            | {"zeros": 0, "target_rank": fmean(ranks) if ranks else None}
            | {"target_rank_median": float(median(ranks)) if ranks else None}
            | {"top_entropy": entropy([row["top_ids"][0] for row in spoken]) if spoken else None}
            | {"bottom_entropy": entropy([row["bottom_ids"][0] for row in spoken]) if spoken else None}
        )
    expected.sort(key=lambda row: order(key(row, ("module", "expert", "position_class", "layer"))))
    assert_same(atlas.layer_curves().to_pylist(), expected)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas(example_run(Directory.at(tmp_path_factory.mktemp("run"))).out)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda a: a.token_neurons(" Pariss"), r"did you mean ' Paris'"),
        (lambda a: a.specific_neurons(module="mlp.donw"), r"no module 'mlp.donw'.*did you mean mlp.down\?"),
        (lambda a: a.coverage(layer=9), r"no layer 9; it has 0 to 2"),
        (lambda a: a.groups("relatoin"), r"have no 'relatoin'.*row; did you mean relation\?"),
        (lambda a: a.compare_prompts(1, 1), r"compared with itself"),
        (lambda a: a.compare_prompts(1, 77), r"no prompt 77"),
        (lambda a: a.prompt_neurons(10**30), r"no prompt 10{30}"),
        (lambda a: a.neuron_tokens("1.mlp.down.99999999999999999999"), r"is not an address"),
        (lambda a: a.compare_runs("/nowhere"), r"is not a run directory"),
    ],
)
def test_what_is_not_there_gets_one_line_that_says_so(atlas: Atlas, ask: Callable[[Atlas], Any], said: str):
    with pytest.raises(BacklensError, match=said) as refusal:
        ask(atlas)
    assert "\n" not in str(refusal.value)


def test_modules_and_layers_multiply_to_the_examples_units(atlas: Atlas):
    found = [(row["layer"], row["module"]) for row in atlas.coverage().to_pylist()]
    assert found == list(product(range(3), ["mlp.down", "mlp.up"]))
