"""Build time, size and answer times of an atlas and of its explorer: 50 million list entries of random rows by default.

    python -m benchmarks.atlas [--prompts 6512] [--folder FOLDER] [--memory 2GB]

Writes a run of 12 layers, two modules, 16 neurons and 8 to 16 positions a prompt through the store, without a model:
token frequencies fall as 1 / (rank + 10), so the most common token has 1.2 % of all entries. `backlens atlas` and the
questions run in processes of their own, whose peak memory is printed. Answer times are of `Atlas` in a process that
has answered something before, each over several tokens, neurons or prompts; then come whole pages of the explorer
(`benchmarks.explorer`). What is in FOLDER already, the run or its atlas, is not made again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from benchmarks.asked import what_to_ask
from benchmarks.explorer import time_pages
from benchmarks.memory import peak_of
from benchmarks.shape import VOCABULARY, word

from backlens.store.commit import commit_shard, write_vocab
from backlens.store.directory import Directory
from backlens.store.run_record import ShardPlan, finish, open_run
from backlens.store.tables import TABLES

LAYERS, MODULES, NEURONS, WIDTH, K = 12, ("mlp.up", "mlp.down"), 16, 3072, 10
SHARD = 256
RELATIONS = 30
MEMORY = "600MB"
"""What each question may use."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=6512)
    parser.add_argument("--folder", help="keep the run here, and take the one that is there")
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--ask", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or f"{name}/run"
        if not Path(folder, "run.json").exists():
            started = time.perf_counter()
            write_run(folder, options.prompts)
            print(
                f"run written in {time.perf_counter() - started:.0f} s, {size_of(Path(folder))}", flush=True
            )
        if not Path(folder, "atlas/manifest.json").exists():
            entry = [sys.executable, "-c", "from backlens.cli.entry import main; main()", "atlas", folder]
            peak, seconds = peak_of([*entry, "--memory", options.memory])
            print(f"build: {seconds:.0f} s, peak {peak / 2**20:,.0f} MiB", flush=True)
        manifest = json.loads(Path(folder, "atlas/manifest.json").read_text())
        for table, files in manifest["files"].items():
            rows, size = (sum(file[what] for file in files) for what in ("rows", "bytes"))
            print(f"{table:>16} {rows:>12,} rows {size / 2**20:8,.0f} MiB {len(files):4} files")
        subprocess.run([sys.executable, "-m", "benchmarks.atlas", "--ask", "--folder", folder], check=True)
        time_pages(folder)


def size_of(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 2**20:,.0f} MiB"


def write_run(folder: str, prompts: int) -> None:
    """Random rows of the shape that a run has; a shard at a time."""
    directory = Directory.at(folder)
    shards = -(-prompts // SHARD)
    config = {"model": "random", "top_k": K, "neurons": NEURONS}
    model = {"name": "random", "layers": LAYERS, "modules": list(MODULES), "vocabulary": VOCABULARY}
    plan = ShardPlan(prompts, shards, SHARD)
    run = open_run(directory, config, config=config, config_yaml="", plan=plan, model=model)
    texts = [word(index) for index in range(VOCABULARY)]
    write_vocab(directory, texts, [text.encode() for text in texts])
    generator = np.random.default_rng(0)
    for shard in range(shards):
        ids = np.arange(shard * SHARD, min((shard + 1) * SHARD, prompts))
        commit_shard(
            directory, shard, shard_tables(ids, generator), first_prompt=int(ids[0]), prompts=len(ids)
        )
    finish(run)


def shard_tables(prompt_ids: np.ndarray, generator: np.random.Generator) -> dict[str, pa.Table]:
    lengths = generator.integers(8, 17, len(prompt_ids))
    units = [(layer, module) for layer in range(LAYERS) for module in MODULES]
    # keys of units, prompt after prompt within each
    prompts = np.tile(np.arange(len(prompt_ids)), len(units))
    unit = np.repeat(np.arange(len(units)), len(prompt_ids))

    def keys(of: np.ndarray) -> dict[str, Any]:
        rows = unit[of]
        return {
            "prompt_id": prompt_ids[prompts[of]],
            "layer": rows // len(MODULES),
            "module": np.array(MODULES)[rows % len(MODULES)],
            "expert": pa.nulls(len(of), pa.int16()),
        }

    every = np.arange(len(unit))
    neuron_of = np.repeat(every, NEURONS)
    position_of = np.repeat(every, lengths[prompts])
    starts = np.cumsum(lengths[prompts]) - lengths[prompts]
    position = np.arange(len(position_of)) - starts[position_of]
    token_ids = [common_tokens(generator, (length,)) for length in lengths]
    flat = np.concatenate(token_ids)
    firsts = np.cumsum(lengths) - lengths
    popularity = -np.log(np.arange(WIDTH) + 30.0)
    noise = generator.gumbel(size=(len(unit), WIDTH)).astype(np.float32) + popularity.astype(np.float32)
    strongest = np.sort(np.argpartition(noise, -NEURONS)[:, -NEURONS:])
    neurons = (strongest + unit[:, None] * 97) % WIDTH
    columns = {
        "layers": keys(every)
        | {
            "rank": np.full(len(every), 8),
            "grad_norm": generator.lognormal(size=len(every)),
            "singular_values": lists(generator.lognormal(size=(len(every), 8)), pa.float32()),
        }
        | projections(generator, len(every)),
        "neurons": keys(neuron_of)
        | {
            "neuron": np.sort(neurons).ravel(),
            "grad_norm": generator.lognormal(size=len(neuron_of)),
            "main_position": np.zeros(len(neuron_of), np.int32),
        }
        | projections(generator, len(neuron_of)),
        "tokens": keys(position_of)
        | {
            "position": position,
            "token_id": flat[firsts[prompts[position_of]] + position],
            "input_norm": generator.lognormal(size=len(position_of)),
            "vjp_norm": generator.lognormal(size=len(position_of)),
        }
        | projections(generator, len(position_of)),
        "prompts": prompt_columns(prompt_ids, token_ids, generator),
    }
    return {
        name: pa.table({c: pa.array(v) for c, v in given.items()})
        .select(TABLES[name].schema.names)
        .cast(TABLES[name].schema)
        for name, given in columns.items()
    }


def prompt_columns(
    prompt_ids: np.ndarray, token_ids: list[np.ndarray], generator: np.random.Generator
) -> dict[str, Any]:
    count = len(prompt_ids)
    targets = common_tokens(generator, (count, 1))
    return {
        "prompt_id": prompt_ids,
        "id": pa.nulls(count, pa.string()),
        "prompt": [" ".join(map(word, ids)) for ids in token_ids],
        "target": [f" {word(ids[0])}" for ids in targets],
        "subject": [word(ids[0]) for ids in token_ids],
        "relation": [f"relation {prompt_id % RELATIONS}" for prompt_id in prompt_ids],
        "token_ids": [ids.tolist() for ids in token_ids],
        "target_ids": lists(targets, pa.int32()),
        "n_tokens": [len(ids) for ids in token_ids],
        "subject_start": np.zeros(count, np.int32),
        "subject_end": np.full(count, 2),
        "loss": generator.lognormal(size=count),
        "target_prob": generator.random(count),
        "target_rank": generator.integers(0, VOCABULARY, count),
        "predicted_id": common_tokens(generator, (count,)),
        "meta": pa.nulls(count, pa.string()),
    }


def projections(generator: np.random.Generator, count: int) -> dict[str, Any]:
    ids = common_tokens(generator, (count, 2 * K))
    scores = np.sort(generator.normal(size=(count, 2 * K)).astype(np.float32))
    return {
        "top_ids": lists(ids[:, :K], pa.int32()),
        "top_scores": lists(scores[:, ::-1][:, :K], pa.float32()),
        "bottom_ids": lists(ids[:, K:], pa.int32()),
        "bottom_scores": lists(scores[:, :K], pa.float32()),
        "target_score": generator.normal(size=count),
        "target_rank": generator.integers(0, VOCABULARY, count),
    }


def common_tokens(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Token ids, of which id r has the frequency 1 / (r + 10); no id twice in the last dimension."""
    share = np.cumsum(1 / (np.arange(VOCABULARY) + 10.0))
    ids = np.searchsorted(share, generator.random(shape) * share[-1])
    if shape[-1] > 1:
        order = np.argsort(ids, -1)
        ordered = np.take_along_axis(ids, order, -1)
        twice = np.zeros(shape, bool)
        np.put_along_axis(twice, order[..., 1:], ordered[..., 1:] == ordered[..., :-1], -1)
        # rare tokens are nearly never drawn, so that these are new
        ids[twice] = generator.integers(VOCABULARY // 2, VOCABULARY, twice.sum())
    return np.minimum(ids, VOCABULARY - 1).astype(np.int32)


def lists(values: np.ndarray, of: pa.DataType) -> pa.Array:
    rows, width = values.shape
    offsets = np.arange(0, (rows + 1) * width, width, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).ravel(), of))


def ask(folder: str) -> None:
    """What a server would: many questions to one opened run."""
    import resource

    from backlens.atlas import Atlas

    asked = what_to_ask(folder)
    prompts, common, rare = asked.prompts, asked.common, asked.rare
    neurons, strongest = asked.neurons, asked.strongest
    atlas = Atlas(folder, memory=MEMORY)
    atlas.coverage()
    count = atlas.snapshot.record.plan.prompts
    questions: dict[str, tuple[Callable[[Any], Any], Sequence[Any]]] = {
        "neuron: summary": (atlas.neuron_summary, neurons),
        "neuron: prompts": (lambda neuron: atlas.by_neuron(neuron, 20), neurons),
        "neuron: prompts, most kept": (lambda neuron: atlas.by_neuron(neuron, 20), strongest),
        "neuron: tokens": (lambda neuron: atlas.neuron_tokens(neuron, 20), neurons),
        "neuron: similar": (lambda neuron: atlas.similar_neurons(neuron, 20), neurons),
        "neuron: similar, most kept": (lambda neuron: atlas.similar_neurons(neuron, 20), strongest),
        "rare token: neurons": (lambda token: atlas.token_neurons(token, 20), rare),
        "rare token: layers": (lambda token: atlas.token_layers(token, 50), rare),
        "rare token: places": (lambda token: atlas.by_token(token, 20), rare),
        "common token: neurons": (lambda token: atlas.token_neurons(token, 20), common),
        "common token: layers": (lambda token: atlas.token_layers(token, 50), common),
        "common token: places": (lambda token: atlas.by_token(token, 20), common),
        "prompt: heatmap, one module": (lambda prompt: atlas.by_prompt(prompt, module="mlp.down"), prompts),
        "prompt: heatmap": (atlas.by_prompt, prompts),
        "prompt: neurons": (lambda prompt: atlas.prompt_neurons(prompt, 20), prompts),
        "prompt: ranks": (atlas.target_ranks, prompts),
        "prompts compared": (
            lambda prompt: atlas.compare_prompts(prompt, (prompt + 99) % count),
            prompts,
        ),
        "run: curves": (lambda _: atlas.layer_curves(), range(3)),
        "run: specific": (lambda _: atlas.specific_neurons(20), range(3)),
        "run: tokens": (lambda _: atlas.prominent_tokens(limit=20), range(3)),
        "run: groups": (lambda _: atlas.groups("relation"), range(3)),
        "run: coverage": (lambda _: atlas.coverage(), range(3)),
    }
    for name, (question, values) in questions.items():
        times = []
        for value in values:
            started = time.perf_counter()
            question(value)
            times.append(1000 * (time.perf_counter() - started))
        print(f"{name:>30} {statistics.median(times):8,.0f} ms, worst {max(times):,.0f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"peak memory of the process that answered: {peak:,.0f} MiB, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
