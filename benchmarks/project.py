"""What projecting a batch costs, against the matrix product alone and against the direct way.

    python -m benchmarks.project [--rounds 9] [--threads 2]

GPT-2's 124M-parameter shape (width 768, vocabulary 50,257, random weights), 48 prompts of 11 tokens, one group:
528 residual-side vectors, and per prompt the leading direction and 0 or 16 neurons; then all 3,072 neurons of one
prompt. Everything is timed in turn, round after round, and a ratio is the median over rounds of ratios within a
round: a busy machine moves both sides. `CPU` is processor time, which other processes disturb less than the clock.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from backlens.projection import topk
from backlens.projection.lens import Lens, Norm
from backlens.projection.project import Vectors, project

VOCABULARY, D_MODEL, NEURONS = 50_257, 768, 3_072
PROMPTS, POSITIONS, K = 48, 11, 10


@dataclass(frozen=True)
class Times:
    wall: list[float]
    cpu: list[float]

    def over(self, other: "Times") -> str:
        wall, cpu = (
            statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in ((self.wall, other.wall), (self.cpu, other.cpu))
        )
        return f"{wall:5.2f} x wall, {cpu:5.2f} x CPU"

    def __str__(self) -> str:
        return f"{statistics.median(self.wall) * 1e3:8.1f} ms wall, {statistics.median(self.cpu) * 1e3:8.1f} ms CPU"


def in_turn(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    times = {name: Times([], []) for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            if turn:  # the first warms up
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def random_lens(generator: torch.Generator) -> Lens:
    norm = Norm(torch.ones(D_MODEL), torch.full((D_MODEL,), 0.1), 1e-5, centred=True)
    unembedding = torch.randn(VOCABULARY, D_MODEL, generator=generator) * 0.02
    return Lens(norm, unembedding, unembedding @ norm.bias, "raw")


def random_vectors(lens: Lens, prompts: int, neurons: int, generator: torch.Generator) -> Vectors:
    residual = torch.randn(prompts, POSITIONS, D_MODEL, generator=generator)
    mixes = torch.randn(prompts, 1 + neurons, POSITIONS, generator=generator)

    def scale(vectors: Tensor) -> Tensor:
        return lens.scale(vectors.square().sum(-1), lens.norm.centre(vectors).square().sum(-1))

    every = torch.ones(prompts, POSITIONS + 1 + neurons, dtype=torch.bool)
    return Vectors(
        residual, scale(residual), every[:, :POSITIONS], mixes, scale(mixes @ residual), every[:, POSITIONS:]
    )


def products(lens: Lens, vectors: Vectors) -> dict[str, Callable[[], object]]:
    rows = vectors.residual.flatten(0, 1)
    half = rows.bfloat16(), lens.unembedding.bfloat16()
    whole = torch.empty(len(rows), VOCABULARY)
    tile = torch.empty(len(rows) * 3072)

    def tiled() -> None:
        for start in range(0, VOCABULARY, 3072):
            part = lens.unembedding[start : start + 3072]
            torch.mm(rows, part.mT, out=tile[: len(rows) * len(part)].view(len(rows), -1))

    return {
        "product float32": lambda: torch.mm(rows, lens.unembedding.mT, out=whole),
        "product float32, tiled": tiled,
        "product bfloat16": lambda: half[0] @ half[1].mT,
    }


def one_by_one(lens: Lens, vectors: Vectors, target: int, neurons: int) -> None:
    """The direct way: form the gradient, project each neuron, select."""
    gradient = vectors.mixes[0, 1:] @ vectors.residual[0]
    for neuron in range(neurons):
        scores = lens.unembedding @ (lens.norm(gradient[neuron]))
        scores.topk(K)
        scores.topk(K, largest=False)
        (scores > scores[target]).sum()


def with_pytorch_alone(action: Callable[[], object]) -> Callable[[], object]:
    """The same without compiled loops."""

    def run() -> None:
        with mock.patch.object(topk, "cpu", None):
            action()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)
    lens = random_lens(generator)
    targets = torch.randint(0, VOCABULARY, (PROMPTS,), generator=generator)
    none, some = (random_vectors(lens, PROMPTS, neurons, generator) for neurons in (0, 16))
    every = random_vectors(lens, 1, NEURONS, generator)
    actions = products(lens, some) | {
        "project, no neurons": lambda: project(none, lens, targets, K),
        "project, 16 neurons": lambda: project(some, lens, targets, K),
        "PyTorch alone, no neurons": with_pytorch_alone(lambda: project(none, lens, targets, K)),
        "PyTorch alone, 16 neurons": with_pytorch_alone(lambda: project(some, lens, targets, K)),
    }
    times = in_turn(actions, options.rounds)
    print(f"{PROMPTS} prompts of {POSITIONS} tokens, {options.threads} threads")
    for name, time_ in times.items():
        print(f"{name:24}{time_}   {time_.over(times['product float32'])} the float32 product")
    sample = 24
    times = in_turn(
        {
            "all neurons": lambda: project(every, lens, targets[:1], K),
            "one by one": lambda: one_by_one(lens, every, int(targets[0]), sample),
        },
        max(options.rounds // 3, 1),
    )
    print(f"one prompt, {NEURONS} neurons: {times['all neurons']}")
    print(f"{sample} of its neurons one by one: {times['one by one']}")
    wall = statistics.median(
        b / a for a, b in zip(times["all neurons"].wall, times["one by one"].wall, strict=True)
    )
    print(f"all of them one by one would take {wall * NEURONS / sample:,.0f} times as long as together")


if __name__ == "__main__":
    main()
