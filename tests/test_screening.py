"""Lists and ranks equal those of a full sort of the exact scores, bit for bit, for any screening."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backlens.projection import cpu, topk
from backlens.projection import project as projection
from backlens.projection.lens import Lens, Norm
from backlens.projection.project import TopK, Vectors, project, scored_rows
from backlens.projection.scores import ApproximateScores, ExactScores, Screening, prepare

WORDS = ("normal", "near ties", "duplicates", "whole numbers", "all the same", "of every length", "denormal")
SIZES = (1.0, 1e30, 1e-30, 1e-40)
CASES = st.builds(
    lambda **drawn: Case(**drawn),
    seed=st.integers(0, 2**31),
    words=st.sampled_from(WORDS),
    sizes=st.sampled_from([(1.0,), (1e30,), (1e-30,), (1e-40,), SIZES]),
    vocabulary=st.sampled_from([7, 64, 2048, 2049, 3001, 4160]),
    d_model=st.sampled_from([3, 5, 32, 800]),
    centred=st.booleans(),
    normalizing=st.booleans(),
    unit=st.booleans(),
    biased=st.booleans(),
    mixes=st.sampled_from([0, 1, 3, 70]),
    silent=st.sampled_from([(), (1,), (0, 1, 2)]),
)
LOOPS = st.sampled_from(["compiled", "cramped", "torch"])


@dataclass(frozen=True)
class Case:
    """A lens and a batch, drawn to be difficult."""

    seed: int = 0
    words: str = "normal"
    sizes: tuple[float, ...] = (1.0,)
    vocabulary: int = 3001
    d_model: int = 32
    centred: bool = True
    normalizing: bool = True
    unit: bool = False
    biased: bool = True
    mixes: int = 3
    silent: tuple[int, ...] = ()
    """Prompts of which every vector is zero."""

    def lens(self) -> Lens:
        draw = np.random.default_rng(self.seed)
        shape = (self.vocabulary, self.d_model)
        words = draw.normal(size=shape).astype(np.float32)
        few = words[draw.integers(0, min(6, len(words)), len(words))]
        unembedding = {
            "normal": words,
            "near ties": few * (1 + draw.integers(-2, 3, (len(words), 1)) * np.float32(2**-23)),
            "duplicates": few,
            "whole numbers": np.round(words),
            "all the same": np.broadcast_to(words[:1], shape).copy(),
            "of every length": words * np.exp2(draw.integers(-60, 60, (len(words), 1))),
            "denormal": words * np.float32(1e-40),
        }[self.words].astype(np.float32)
        ones = torch.ones(self.d_model)
        weight = torch.tensor(draw.normal(size=self.d_model), dtype=torch.float32)
        norm = Norm(weight, ones * self.biased, 1e-5, self.centred, self.normalizing)
        constant = torch.from_numpy(unembedding @ norm.bias.numpy())
        return Lens(norm, torch.from_numpy(unembedding), constant, "unit" if self.unit else "raw")

    def vectors(self, lens: Lens) -> Vectors:
        draw = np.random.default_rng(self.seed + 1)
        prompts, positions = 3, 4
        residual = draw.normal(size=(prompts, positions, self.d_model))
        residual[0, 1] = 1.0  # a centred norm makes nothing of it: all scores are the constant
        residual *= draw.choice(self.sizes, size=(prompts, positions, 1))
        residual[1, 3] = residual[2, 0] = 0
        residual[list(self.silent)] = 0
        mixes = draw.normal(size=(prompts, self.mixes, positions)) * draw.choice(
            [0, 1], size=(1, 1, positions)
        )
        residual, mixes = torch.tensor(residual).float(), torch.tensor(mixes).float()
        mixed = mixes.double() @ residual.double()
        own_scale, mix_scale = scale_of(lens, residual), scale_of(lens, mixed)
        wanted = (residual != 0).any(-1)
        wanted[2, 2] = False
        return Vectors(residual, own_scale, wanted, mixes, mix_scale, (mixed != 0).any(-1))

    def targets(self) -> Tensor:
        return torch.tensor(np.random.default_rng(self.seed + 2).integers(0, self.vocabulary, 3))


@contextmanager
def running(loops: str) -> Iterator[None]:
    """The compiled loops in one thread; in three that run out of room; PyTorch's operations in three threads."""
    threads = torch.get_num_threads()
    with ExitStack() as changed:
        torch.set_num_threads(1 if loops == "compiled" else 3)
        if loops == "torch":
            changed.enter_context(mock.patch.object(topk, "cpu", None))
        elif loops == "cramped":
            changed.enter_context(mock.patch.object(cpu, "LEAST_ROOM", 1))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def scale_of(lens: Lens, vectors: Tensor) -> Tensor:
    wide = vectors.double()
    return lens.scale(wide.square().sum(-1), lens.norm.centre(wide).square().sum(-1))


def full_sort(vectors: Vectors, lens: Lens, targets: Tensor, k: int) -> list[TopK | None]:
    """Every score by its definition, then a plain sort by score and id."""
    unembedding, constant = lens.unembedding.double().numpy(), lens.constant.double().numpy()
    found = []
    linear = lens.linear(vectors.residual.double())
    for raw, scale, wanted in (
        (linear, vectors.scale, vectors.wanted),
        (vectors.mixes.double() @ linear, vectors.mix_scale, vectors.mix_wanted),
    ):
        scaled = (raw * scale[..., None]).numpy()
        rows = []
        for prompt, place in wanted.nonzero().tolist():
            with np.errstate(over="ignore"):
                scores = (unembedding @ scaled[prompt, place] + constant).astype(np.float32)
            target = scores[targets[prompt]]
            top = np.argsort(-scores, kind="stable")[:k]
            bottom = np.argsort(scores, kind="stable")[:k]
            rows.append((top, scores[top], bottom, scores[bottom], target, (scores > target).sum()))
        found.append(
            TopK(*(torch.tensor(np.array(column)) for column in zip(*rows, strict=True))) if rows else None
        )
    return found


def assert_same(found: TopK, expected: TopK | None) -> None:
    if expected is None:
        assert len(found.target_rank) == 0
        return
    for name in TopK.__dataclass_fields__:
        assert torch.equal(getattr(found, name).double(), getattr(expected, name).double()), name


@given(
    case=CASES,
    k=st.one_of(st.integers(1, 12), st.sampled_from([100, 700])),
    tile_bytes=st.sampled_from([None, 1]),
    screening=st.sampled_from(["float32", "bfloat16"]),
    loops=LOOPS,
)
@settings(max_examples=300, deadline=None)
def test_a_projection_is_a_full_sort_of_float32_scores(
    case: Case, k: int, tile_bytes: int | None, screening: Screening, loops: str
) -> None:
    lens, k = case.lens(), min(k, case.vocabulary)
    vectors, targets = case.vectors(lens), case.targets()
    with running(loops):
        selections = project(vectors, lens, targets, k, tile_bytes, screening=screening)
    for found, expected in zip(selections, full_sort(vectors, lens, targets, k), strict=True):
        assert_same(found, expected)


@given(case=CASES, pairs=st.sampled_from([2**8, 2**14]), many=st.sampled_from([12, 300]), loops=LOOPS)
@settings(max_examples=100, deadline=None)
def test_a_projection_is_a_full_sort_when_there_is_no_room_for_doubts(
    case: Case, pairs: int, many: int, loops: str
) -> None:
    lens, k = case.lens(), min(10, case.vocabulary)
    vectors, targets = case.vectors(lens), case.targets()
    few_pairs = mock.patch.object(projection, "PAIRS", pairs)
    with running(loops), few_pairs, mock.patch.object(projection, "MANY", many):
        selections = project(vectors, lens, targets, k)
    for found, expected in zip(selections, full_sort(vectors, lens, targets, k), strict=True):
        assert_same(found, expected)


@given(case=CASES, screening=st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=100, deadline=None)
def test_a_screened_score_is_within_the_proven_error(case: Case, screening: Screening) -> None:
    lens = case.lens()
    scored = scored_rows(case.vectors(lens), lens, case.targets())
    screen, stop = ApproximateScores(scored, lens, prepare(lens), screening), min(case.vocabulary, 640)
    rows = torch.arange(len(scored.targets))
    out = torch.cat([scores for _, scores in screen.tile(0, stop).scores()])
    distance = (out.double() - ExactScores(scored, lens).of_tile(rows, 0, stop).double()).abs().amax(-1)
    sound = screen.sound()
    assert (distance <= screen.error(0, stop))[sound].all()


@pytest.mark.parametrize("mixes", [3, 70])
def test_a_prompts_selection_is_the_same_alone_and_in_a_batch(mixes: int) -> None:
    case = Case(d_model=400, mixes=mixes)
    lens = case.lens()
    vectors, targets = case.vectors(lens), case.targets()
    together = project(vectors, lens, targets, 10)
    alone = [project(vectors[i : i + 1], lens, targets[i : i + 1], 10) for i in range(3)]
    for place in range(2):
        for name in TopK.__dataclass_fields__:
            rows = torch.cat([getattr(pair[place], name) for pair in alone])
            assert torch.equal(getattr(together[place], name), rows)


def test_few_tokens_are_left_in_doubt() -> None:
    case = Case(vocabulary=50_000, d_model=64)
    lens = case.lens()
    vectors, targets = case.vectors(lens), case.targets()
    scored: list[int] = []
    original = ExactScores.of_pairs

    def counted(exact: ExactScores, rows: Tensor, ids: Tensor) -> Tensor:
        scored.append(len(ids))
        return original(exact, rows, ids)

    with mock.patch.object(ExactScores, "of_pairs", counted):
        project(vectors, lens, targets, 10)
    rows = int(vectors.wanted.sum() + vectors.mix_wanted.sum())
    assert sum(scored) < 60 * rows


def test_loops_run_where_their_compilation_cannot_be_kept(tmp_path: Path) -> None:
    lines = (
        "import resource, numpy as np",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))",  # as on a full disk
        "from backlens.projection import cpu",
        "held = np.zeros(1, np.int64)",
        "ids, scores = np.zeros((1, 2), np.int64), np.zeros((1, 2), np.float32)",
        "pairs = np.zeros(3, np.int64), np.arange(3), np.float32([1, 3, 2])",
        "cpu.first_of_rows(*pairs, ids, scores, held)",
        "print(ids.tolist())",
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "[[1, 2]]\n", done.stderr
