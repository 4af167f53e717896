"""Small runs with random rows, written through the store; the rows are also there as plain Python."""

import json
import random
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from backlens.store.commit import commit_shard, write_vocab
from backlens.store.directory import Directory
from backlens.store.run_record import RunDirectory, ShardPlan, finish, open_run
from backlens.store.tables import TABLES

VOCAB = ["Paris", " Paris", " paris", " Rome", "\n", " the", "é", "'quoted'", "%", " London"] + [
    f" token{index}" for index in range(30)
]
LAYERS = range(3)
MODULES = ["mlp.up", "mlp.down"]
K = 3

Rows = dict[str, list[dict[str, Any]]]


def random_rows(random_state: random.Random, prompt_ids: range, experts: bool = False) -> Rows:
    """The rows of a shard, in no order; prompt 3 failed if the shard covers it."""
    rows: Rows = {name: [] for name in TABLES if name not in ("vocab", "edits")}
    for prompt_id in prompt_ids:
        if prompt_id == 3:
            message = "prompts.jsonl:4: no field 'target' (found: prompt)"
            rows["failures"].append(
                {"prompt_id": 3, "stage": "read", "error": "missing-field", "message": message}
            )
            continue
        prompt = _prompt_row(random_state, prompt_id)
        rows["prompts"].append(prompt)
        for layer in LAYERS:
            for module in MODULES:
                for expert in range(2) if experts else [None]:
                    keys = {"prompt_id": prompt_id, "layer": layer, "module": module, "expert": expert}
                    _add_facts(rows, random_state, keys, prompt["token_ids"])
    for table in rows.values():
        random_state.shuffle(table)
    return rows


def _prompt_row(random_state: random.Random, prompt_id: int) -> dict[str, Any]:
    n_tokens = random_state.randint(2, 4)
    return {
        "prompt_id": prompt_id,
        "id": None if prompt_id % 2 else f"fact-{prompt_id}",
        "prompt": f"The capital of country {prompt_id} is",
        "target": " Paris",
        "subject": f"country {prompt_id}",
        "relation": None,
        "token_ids": random_state.choices(range(len(VOCAB)), k=n_tokens),
        "target_ids": [1],
        "n_tokens": n_tokens,
        "subject_start": 0,
        "subject_end": 1,
        "loss": _float(random_state),
        "target_prob": 0.25,
        "target_rank": 2,
        "predicted_id": random_state.randrange(len(VOCAB)),
        "meta": json.dumps({"row": prompt_id}),
    }


def _add_facts(rows: Rows, random_state: random.Random, keys: dict[str, Any], token_ids: list[int]) -> None:
    rows["layers"].append(
        keys
        | {"rank": 2, "grad_norm": _float(random_state), "singular_values": [2.0, 1.0]}
        | _projection(random_state)
    )
    for neuron in random_state.sample(range(6), k=2):
        measured = {"neuron": neuron, "grad_norm": _float(random_state), "main_position": len(token_ids) - 1}
        rows["neurons"].append(keys | measured | _projection(random_state))
    for position, token_id in enumerate(token_ids):
        measured = {"position": position, "token_id": token_id, "input_norm": 1.0, "vjp_norm": 0.5}
        rows["tokens"].append(keys | measured | _projection(random_state))
        rows["factors"].append(keys | {"position": position, "x": [1.0, 2.0], "delta": [0.5, 0.0, -1.0]})


def _projection(random_state: random.Random) -> dict[str, Any]:
    names = ["top_ids", "top_scores", "bottom_ids", "bottom_scores", "target_score", "target_rank"]
    if random_state.random() < 0.1:  # a zero vector
        return dict.fromkeys(names)
    top = sorted((_float(random_state) for _ in range(K)), reverse=True)
    bottom = sorted(-_float(random_state) for _ in range(K))
    ids = random_state.sample(range(len(VOCAB)), k=2 * K)
    return dict(zip(names, [ids[:K], top, ids[K:], bottom, _float(random_state), 5], strict=True))


def _float(random_state: random.Random) -> float:
    """A positive number that float32 holds exactly."""
    return random_state.randrange(1, 4096) / 256


def arrow(rows: Rows) -> dict[str, pa.Table]:
    return {name: pa.Table.from_pylist(rows[name], schema=TABLES[name].schema) for name in rows}


@dataclass(frozen=True)
class ExampleRun:
    """A written run, and all of its rows."""

    run: RunDirectory
    rows: Rows

    @property
    def out(self) -> str:
        return self.run.directory.root


def start_run(directory: Directory, *, prompts: int = 8, shard_prompts: int = 4) -> RunDirectory:
    run = open_run(
        directory,
        {"model": "tiny", "top_k": K, "dtype": "float32"},
        config={"model": "tiny", "top_k": K},
        config_yaml="model: tiny\ntop_k: 3\n",
        plan=ShardPlan(prompts=prompts, shards=-(-prompts // shard_prompts), shard_prompts=shard_prompts),
        model={"name": "tiny", "layers": len(LAYERS), "modules": MODULES, "vocab": len(VOCAB)},
    )
    write_vocab(directory, VOCAB, [token.encode() for token in VOCAB])
    return run


def example_run(
    directory: Directory,
    *,
    shards: int = 2,
    committed: int | None = None,
    experts: bool = False,
    seed: int = 0,
) -> ExampleRun:
    """A run of `shards` shards of four prompts, of which the first `committed` (default: all) are committed."""
    random_state = random.Random(seed)
    committed = shards if committed is None else committed
    run = start_run(directory, prompts=4 * shards)
    rows: Rows = {name: [] for name in TABLES if name not in ("vocab", "edits")}
    for shard in range(committed):
        of_shard = random_rows(random_state, range(4 * shard, 4 * shard + 4), experts)
        commit_shard(directory, shard, arrow(of_shard), first_prompt=4 * shard, prompts=4)
        for name, added in of_shard.items():
            rows[name] += added
    return ExampleRun(finish(run) if committed == shards else run, rows)
