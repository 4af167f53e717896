"""Compare our time per prompt with TransformerLens 4.2.0 and with a loop over single vectors.

    pip install -e ".[bench]"
    python -m benchmarks.peers [--rounds 3] [--prompts 256] [--peer-prompts 4]

One model on one machine: GPT-2's 124M-parameter shape with random weights, all layers, both feed-forward matrices, all
positions, k = 10.

* ours: `backlens run --executor local` with default options, from the start of the process to its end, with Parquet
  files; seconds divided by prompts.
* TransformerLens: `BackwardLens.analyze`, one prompt at a time. Its model is loaded before the clock starts.
* the loop: the paper's procedure without batches. One prompt, gradients of the weights by autograd, and for each
  position's vector and kept neuron the model's own norm and head, softmax, and two top-k's. It has no ranks, spectra
  or singular vectors.

Rounds are interleaved, each contender in a process of its own; medians are printed, and whether the top and bottom ids
agree.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset
import torch
from benchmarks.shape import make_model, write_prompts
from torch import Tensor

TOP_K, NEURONS = 10, 16
Ids = dict[str, list[list[int]]]
"""[top ids, bottom ids] of one prompt by `layer.module.position`."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--peer-prompts", type=int, default=4)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        seconds, ids = CONTENDERS[options.contender](options.folder, options.peer_prompts)
        (options.folder / f"{options.contender}.json").write_text(
            json.dumps({"seconds": seconds, "ids": ids})
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options.rounds, options.prompts, options.peer_prompts)


def compare(folder: Path, rounds: int, prompts: int, peer_prompts: int) -> None:
    make_model(folder / "model")
    write_prompts(folder / "prompts.jsonl", prompts)
    seconds: dict[str, list[float]] = {"ours": []}
    ids: dict[str, list[Ids]] = {}
    for number in range(rounds):
        seconds["ours"].append(ours(folder, folder / f"run{number}") / prompts)
        for name in CONTENDERS:
            answer = peer(name, folder, peer_prompts)
            seconds.setdefault(name, []).append(statistics.median(answer["seconds"]))
            ids[name] = answer["ids"]
    ids["ours"] = our_ids(folder / "run0", peer_prompts)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    say(
        f"{prompts} prompts of 8 to 16 tokens for us, {peer_prompts} for the others; medians of {rounds} rounds"
    )
    for name, value in medians.items():
        say(
            f"{name:>16} {value:8.4f} s per prompt  {value / medians['ours']:6.1f} x ours  {agreement(ids, name)}"
        )


def ours(folder: Path, out: Path) -> float:
    command = ["run", "--model", folder / "model", "--prompts", folder / "prompts.jsonl", "--out", out]
    started = time.perf_counter()
    entry = [sys.executable, "-c", "from backlens.cli.entry import main; main()"]
    subprocess.run(
        [*entry, *command, "--executor", "local"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def peer(name: str, folder: Path, prompts: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.peers", "--contender", name, "--folder", str(folder)]
    subprocess.run([*command, "--peer-prompts", str(prompts)], check=True)
    return json.loads((folder / f"{name}.json").read_text())


def transformerlens(folder: Path, count: int) -> tuple[list[float], list[Ids]]:
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
    from transformer_lens.tools.analysis import BackwardLens  # pyright: ignore[reportMissingImports]

    model = TransformerBridge.boot_transformers(str(folder / "model"), device="cpu", dtype=torch.float32)
    model.eval()  # otherwise it runs with dropout
    model.cfg.default_prepend_bos = False  # as our tokenizer does
    lens = BackwardLens(model)
    seconds, found = [], []
    for prompt, target in records(folder, count):
        started = time.perf_counter()
        result = lens.analyze(prompt, target, range(12), top_k=TOP_K)
        seconds.append(time.perf_counter() - started)
        ids: Ids = {}
        for layer in result.layers:
            for module, matrix in (("mlp.up", layer.input_projection), ("mlp.down", layer.output_projection)):
                tops, bottoms = matrix.top_ranking.indices, matrix.bottom_ranking.indices
                for position, zero in enumerate(matrix.zero_norm_mask.tolist()):
                    if not zero:  # the zero vector would rank the norm's bias
                        key = f"{layer.layer}.{module}.{position}"
                        ids[key] = [tops[position].tolist(), bottoms[position].tolist()]
        found.append(ids)
    return seconds, found


def vector_by_vector(folder: Path, count: int) -> tuple[list[float], list[Ids]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    seconds, found = [], []
    for prompt, target in records(folder, count):
        started = time.perf_counter()
        found.append(loop_over_vectors(model, tokenizer.encode(prompt), tokenizer.encode(target)[0]))
        seconds.append(time.perf_counter() - started)
    return seconds, found


def loop_over_vectors(model: Any, prompt: list[int], target: int) -> Ids:
    kept: dict[str, dict[str, Tensor]] = {}
    handles = []
    for layer, block in enumerate(model.transformer.h):
        for module, matrix in (("mlp.up", block.mlp.c_fc), ("mlp.down", block.mlp.c_proj)):
            factors = kept.setdefault(f"{layer}.{module}", {"weight": matrix.weight})

            def on_forward(_m: object, args: tuple[Tensor], output: Tensor, factors: dict = factors) -> None:
                factors["x"] = args[0][0].detach()
                output.register_hook(lambda vjp: factors.update(vjp=vjp[0]))

            handles.append(matrix.register_forward_hook(on_forward))
    model.zero_grad()
    (-model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[target]).backward()
    for handle in handles:
        handle.remove()
    ids: Ids = {}
    with torch.no_grad():
        for name, factors in kept.items():
            reads = name.endswith("up")
            vectors = factors["x"] if reads else factors["vjp"]
            for position, vector in enumerate(vectors):
                answer = through_the_lens(model, vector)
                if vector.any():
                    ids[f"{name}.{position}"] = answer
            gradient = factors["weight"].grad
            assert gradient is not None
            gradient = gradient if reads else gradient.T  # (d_model, neuron)
            for neuron in gradient.norm(dim=0).topk(NEURONS).indices:
                through_the_lens(model, gradient[:, neuron])
    return ids


def through_the_lens(model: Any, vector: Tensor) -> list[list[int]]:
    scores = model.lm_head(model.transformer.ln_f(vector)).softmax(-1)
    return [scores.topk(TOP_K).indices.tolist(), scores.topk(TOP_K, largest=False).indices.tolist()]


CONTENDERS: dict[str, Callable[[Path, int], tuple[list[float], list[Ids]]]] = {
    "transformerlens": transformerlens,
    "vector-by-vector": vector_by_vector,
}


def our_ids(out: Path, count: int) -> list[Ids]:
    rows = pyarrow.dataset.dataset(out / "tokens").to_table().to_pylist()
    found: list[Ids] = [{} for _ in range(count)]
    for row in rows:
        if row["prompt_id"] < count and row["top_ids"] is not None:
            key = f"{row['layer']}.{row['module']}.{row['position']}"
            found[row["prompt_id"]][key] = [row["top_ids"], row["bottom_ids"]]
    return found


def agreement(ids: dict[str, list[Ids]], name: str) -> str:
    """Number of lists that equal ours, id by id."""
    if name == "ours":
        return ""
    pairs = [
        (one[key], other.get(key)) for one, other in zip(ids["ours"], ids[name], strict=True) for key in one
    ]
    same = sum(one[side] == other[side] for one, other in pairs if other for side in (0, 1))
    return f"{same} of {2 * len(pairs)} lists agree"


def records(folder: Path, count: int) -> list[tuple[str, str]]:
    lines = (folder / "prompts.jsonl").read_text().splitlines()[:count]
    return [(record["prompt"], record["target"]) for record in map(json.loads, lines)]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
