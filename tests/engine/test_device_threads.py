"""Projecting beside the model: the same rows in the same order, devices at work at once, errors that surface."""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backlens.backward_lens import BackwardLens
from backlens.capture.batch import make_batch
from backlens.capture.hooks import Gradient, capture
from backlens.capture.packing import is_out_of_memory
from backlens.columns import BatchRows
from backlens.models.load import LoadedModel, ModelSource, load_model
from backlens.projection.lens import Lens, make_lens
from backlens.projection.threads import device_threads
from backlens.prompts.prompt import Prompt
from backlens.prompts.tokenize import Example
from backlens.rows import RowOptions
from tests.families import CONFIGS
from tests.test_device_map import EmulatedGpus
from tests.tiny import byte_tokenizer, random_model

PATIENCE = 20.0
"""Seconds after which what should have happened at once has not."""
EXAMPLES = [
    Example(Prompt(number, "", "", ""), tuple(range(number + 3, 7 * number + 9)), (number,), 0, 2)
    for number in range(4)
]


def load(family: str, folder: Path) -> LoadedModel:
    random_model(CONFIGS[family]).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_model(ModelSource(str(folder)), torch.device("cpu"))


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    return load("llama", tmp_path)


def wanted(loaded: LoadedModel) -> RowOptions:
    layers = tuple(range(len(loaded.parts.blocks)))
    return RowOptions(layers, loaded.parts.modules, top_k=5, neurons=4, save_factors=True)


def rows(extracted: BatchRows) -> list[tuple[object, ...]]:
    """Everything that a batch gave, in its order."""
    found: list[tuple[object, ...]] = [
        (extracted.finite.tolist(), *(part.tolist() for part in vars(extracted.outcome).values()))
    ]
    for table, blocks in extracted.blocks.items():
        for block in blocks:
            arrays = dict(block.columns)
            for name, ragged in block.lists.items():
                arrays |= {name: ragged.values, f"{name} lengths": ragged.lengths}
            if block.projections is not None:
                arrays |= {"valid": block.projections.valid, **block.projections.columns}
            values = {name: (array.dtype, array.tolist()) for name, array in arrays.items()}
            found.append((table, block.layer, block.module, block.expert, values))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "mixtral"])
def test_rows_and_their_order_are_the_same_in_threads(family: str, tmp_path: Path) -> None:
    loaded = load(family, tmp_path)
    lens = make_lens(loaded.parts, "raw")
    one, other = (
        BackwardLens.from_parts(loaded, lens).rows(EXAMPLES, wanted(loaded), threads=each)
        for each in (False, True)
    )
    assert set(one.blocks) == {"tokens", "layers", "neurons", "factors"}
    assert rows(one) == rows(other)
    assert set(one.seconds) == set(other.seconds)
    assert min(other.seconds.values()) >= 0


class Elsewhere(Tensor):
    """In main memory, and said to be on a GPU."""

    there: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.there


@dataclass(frozen=True)
class Watched(Lens):
    """A lens that notes when it is used."""

    uses: list[int] = field(default_factory=list)

    @classmethod
    def on(cls, gpu: int | None, lens: Lens) -> "Watched":
        unembedding = lens.unembedding
        if gpu is not None:
            unembedding = unembedding.as_subclass(Elsewhere)
            unembedding.there = torch.device("cuda", gpu)
        parts: dict[str, Any] = vars(lens) | {"unembedding": unembedding}
        return cls(**parts)

    def linear(self, vectors: Tensor) -> Tensor:
        self.uses.append(len(vectors))
        return super().linear(vectors)


@pytest.mark.parametrize(("home", "copy"), [(1, None), (None, 0), (1, 0)])
def test_vectors_are_projected_where_they_arise_or_else_where_the_head_is(
    home: int | None, copy: int | None, loaded: LoadedModel
) -> None:
    """They arise in main memory here."""
    lens = make_lens(loaded.parts, "raw")
    expected = rows(BackwardLens.from_parts(loaded, lens).rows(EXAMPLES, wanted(loaded)))
    first, second = Watched.on(home, lens), Watched.on(copy, lens)
    with EmulatedGpus():
        found = BackwardLens.from_parts(loaded, first, [second]).rows(EXAMPLES, wanted(loaded), threads=False)
    assert (bool(first.uses), bool(second.uses)) == (copy is not None, copy is None)
    assert rows(found) == expected


def test_every_device_projects_while_the_others_do(loaded: LoadedModel) -> None:
    """Each device's first piece waits for those of all others, which the backward pass has yet to reach."""
    devices = [torch.device("cuda", number) for number in range(len(loaded.parts.blocks))]
    together = threading.Barrier(len(devices))
    done: defaultdict[torch.device, list[str]] = defaultdict(list)
    handed: defaultdict[torch.device, list[str]] = defaultdict(list)
    threads: dict[torch.device, set[str]] = defaultdict(set)
    with EmulatedGpus(), device_threads(devices) as hand_over:

        def consume(gradients: Sequence[Gradient]) -> None:
            device, module = devices[gradients[0].layer], gradients[0].module

            def project() -> None:
                if not done[device]:
                    together.wait(PATIENCE)
                done[device].append(module)
                threads[device].add(threading.current_thread().name)

            handed[device].append(module)
            hand_over(device, project)

        batch = make_batch([([1, 2, 3], [4]), ([5, 6], [7])], loaded.device)
        capture(loaded, batch, range(len(devices)), loaded.parts.modules, consume)
    assert done == handed
    assert all(len(modules) > 1 for modules in done.values())
    assert len(set.union(*threads.values())) == len(devices)


@dataclass(frozen=True)
class Starved(Lens):
    """A lens for which there is no memory."""

    @classmethod
    def like(cls, lens: Lens) -> "Starved":
        return cls(**vars(lens))

    def linear(self, vectors: Tensor) -> Tensor:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_projection_that_runs_out_of_memory_is_the_batchs_error_and_leaves_nothing(
    loaded: LoadedModel,
) -> None:
    lens = make_lens(loaded.parts, "raw")
    before = rows(BackwardLens.from_parts(loaded, lens).rows(EXAMPLES, wanted(loaded), threads=True))
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        BackwardLens.from_parts(loaded, Starved.like(lens)).rows(EXAMPLES, wanted(loaded), threads=True)
    assert is_out_of_memory(raised.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("project-")]
    assert rows(BackwardLens.from_parts(loaded, lens).rows(EXAMPLES, wanted(loaded), threads=True)) == before


CPU = torch.device("cpu")


def test_after_an_error_no_piece_is_begun_and_the_next_hand_over_says_it() -> None:
    failed, begun = threading.Event(), []

    def fail() -> None:
        failed.set()
        raise MemoryError("first")

    def hand_over_some() -> None:
        with device_threads([CPU]) as hand_over:
            hand_over(CPU, fail)
            assert failed.wait(PATIENCE)
            for _ in range(1000):
                hand_over(CPU, lambda: begun.append(1))
                time.sleep(0.001)

    with pytest.raises(MemoryError, match="first"):
        hand_over_some()
    assert begun == []


def test_an_error_of_the_pass_itself_ends_the_waiting_pieces() -> None:
    release, begun = threading.Event(), []

    def first() -> None:
        begun.append("first")
        assert release.wait(PATIENCE)

    def fail_with_pieces_waiting() -> None:
        with device_threads([CPU]) as hand_over:
            hand_over(CPU, first)
            hand_over(CPU, lambda: begun.append("second"))
            threading.Timer(0.2, release.set).start()
            raise ValueError("of the pass")

    with pytest.raises(ValueError, match="of the pass"):
        fail_with_pieces_waiting()
    assert begun == ["first"]


def test_an_error_of_the_last_piece_is_raised_at_the_end() -> None:
    def last() -> None:
        raise torch.OutOfMemoryError("out of memory, it says")

    with pytest.raises(torch.OutOfMemoryError), device_threads([CPU]) as hand_over:
        hand_over(CPU, last)


def test_whoever_hands_over_does_not_wait(loaded: LoadedModel) -> None:
    """The first of a single device's pieces is done only after the last one was handed over."""
    passed = threading.Event()
    order: list[np.ndarray] = []
    with device_threads([CPU]) as hand_over:

        def consume(gradients: Sequence[Gradient]) -> None:
            def project() -> None:
                assert passed.wait(PATIENCE)
                order.append(gradients[0].vjp.numpy())

            hand_over(CPU, project)

        capture(loaded, make_batch([([1, 2, 3], [4])], CPU), (0, 1), loaded.parts.modules, consume)
        passed.set()
    assert len(order) == 2 * 4
