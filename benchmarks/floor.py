"""Compare our time with the floor, the least that any exact method has to compute, and split it into stages.

    python -m benchmarks.floor [--rounds 5] [--prompts 256] [--every 4] [--threads 2]

The floor is the forward and backward pass to activations, and the float32 product of the unembedding with every vector
that gets a row in `tokens`, by the fastest way that PyTorch offers here. One process, GPT-2's 124M-parameter shape with
random weights, interleaved rounds, medians. Batches are those of a shard of `--prompts` prompts; to save time, only one
batch in `--every` is computed.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from benchmarks.shape import make_model, write_prompts
from torch import Tensor

from backlens.backward_lens import BackwardLens
from backlens.capture.batch import make_batch
from backlens.capture.hooks import capture
from backlens.capture.packing import ON_CPU, pack
from backlens.config import PromptFields
from backlens.models.load import LoadedModel, ModelSource, load_model
from backlens.projection.lens import make_lens
from backlens.prompts.prompt import Prompt
from backlens.prompts.read import read_prompts
from backlens.prompts.tokenize import Example, tokenize
from backlens.rows import RowOptions, sequence

MODULES = ("mlp.up", "mlp.down")
WIDTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        write_prompts(folder / "prompts.jsonl", options.prompts)
        loaded = load_model(ModelSource(str(folder / "model")), torch.device("cpu"))
        work = batches(folder / "prompts.jsonl", loaded)
        measure(loaded, work[options.every // 2 :: options.every], options.rounds)


def measure(loaded: LoadedModel, work: Sequence[Sequence[Example]], rounds: int) -> None:
    lens = make_lens(loaded.parts, "raw")
    layers = tuple(range(len(loaded.parts.blocks)))
    prompts = sum(map(len, work))
    rows = sum(len(layers) * len(example.token_ids) for batch in work for example in batch)
    rows += sum((len(layers) - 1) * len(example.token_ids) + 1 for batch in work for example in batch)
    stages: defaultdict[str, list[float]] = defaultdict(list)

    reader = BackwardLens.from_parts(loaded, lens)

    def model_alone() -> None:
        for batch in work:
            padded = make_batch([sequence(example, "first") for example in batch], torch.device("cpu"))
            capture(loaded, padded, layers, MODULES, lambda _group: None)

    def everything(neurons: int) -> Callable[[], None]:
        def run() -> None:
            totals: defaultdict[str, float] = defaultdict(float)
            for batch in work:
                found = reader.rows(batch, RowOptions(layers, MODULES, neurons=neurons))
                for stage, seconds in found.seconds.items():
                    totals[stage] += seconds
            for stage, seconds in totals.items():
                stages[f"{stage}, {neurons} neurons"].append(seconds / prompts)

        return run

    ways: dict[str, Callable[[], None]] = {
        "forward and backward": model_alone,
        **{
            f"product, {name}": way for name, way in products(rows, lens.unembedding, len(work) * len(layers))
        },
        "ours, tokens and layers": everything(0),
        "ours, with 16 neurons": everything(16),
    }
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for name, way in [*ways.items()] * (rounds + 1):
        started = time.perf_counter()
        way()
        seconds[name].append((time.perf_counter() - started) / prompts)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up
    report(medians, stages, rows / prompts)


def products(rows: int, unembedding: Tensor, groups: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """The product of the same number of vectors, in the same number of groups, tile by tile."""
    each = rows // (2 * groups)
    vectors = torch.randn(each, unembedding.shape[1])

    def tiles() -> Iterator[Tensor]:
        for _ in range(2 * groups):
            yield from unembedding.split(WIDTH)

    def by_rows() -> None:
        for tile in tiles():
            torch.mm(vectors, tile.mT)

    def by_tokens() -> None:
        for tile in tiles():
            torch.mm(tile, vectors.mT)

    def whole() -> None:
        for _ in range(2 * groups):
            torch.mm(vectors, unembedding.mT)

    def onednn() -> None:
        for tile in tiles():
            torch.ops.mkldnn._linear_pointwise(vectors, tile, None, "none", [], "")

    if torch.backends.mkldnn.is_available():
        yield "oneDNN", onednn
    yield from (("vectors × tokens", by_rows), ("tokens × vectors", by_tokens), ("untiled", whole))


def report(medians: dict[str, float], stages: dict[str, list[float]], rows: float) -> None:
    for name, value in medians.items():
        print(f"{name:>28} {value:8.4f} s per prompt")
    product = min(value for name, value in medians.items() if name.startswith("product"))
    floor = medians["forward and backward"] + product
    flops = 2 * rows * 50_257 * 768 / product / 1e9
    print(f"{'floor':>28} {floor:8.4f} s per prompt ({rows:.0f} vectors, {flops:.0f} GFLOP/s in the product)")
    for name in ("ours, tokens and layers", "ours, with 16 neurons"):
        print(f"{name:>28} {medians[name] / floor:8.2f} x the floor")
    for name, times in stages.items():
        print(f"{name:>28} {statistics.median(times):8.4f} s per prompt")


def batches(prompts: Path, loaded: LoadedModel) -> list[list[Example]]:
    """The batches that the engine makes."""
    records = [
        record
        for record in read_prompts(str(prompts), "jsonl", PromptFields(), None)
        if isinstance(record, Prompt)
    ]
    found = tokenize(records, loaded.tokenizer, prepend_bos="auto", target_mode="first", context=1024)
    examples = [example for example in found if isinstance(example, Example)]
    packed = pack([len(example.token_ids) for example in examples], ON_CPU)
    return [[examples[index] for index in indices] for indices in packed]


if __name__ == "__main__":
    main()
