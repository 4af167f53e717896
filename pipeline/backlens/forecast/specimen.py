"""How many bytes a shard's tables take: a specimen of each is made and written, and its file measured.

How well Parquet packs rows depends on what is in them: how many tokens the lists draw from, how often neighbours
repeat each other, which exponents scores have. So rows are made as a run makes them, by the same code, from random
factors: inputs of equal length at every position, VJPs that are the longest at the last one and alone there
in the last layer. Only widths and vocabulary are smaller, and ids are spread over the whole vocabulary again.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from backlens.capture.batch import Batch, Slots, make_batch
from backlens.capture.hooks import Gradient
from backlens.capture.loss import Outcome
from backlens.columns import MatrixRows, Projections, Ragged, fact_table, prompt_table
from backlens.engine.plan import MatrixSize
from backlens.forecast.pilot import Pilot
from backlens.forecast.prompts import Sample, numbered
from backlens.projection.lens import Lens, Norm, Scaling
from backlens.prompts.tokenize import Example
from backlens.rows import RowCollector, RowOptions, chosen_positions, sequence
from backlens.store.directory import Directory
from backlens.store.parquet import ROW_GROUP_ROWS, write_table
from backlens.store.tables import TABLES, declared_table
from backlens.terms import READS

WIDTH, NEURONS, VOCABULARY = 64, 512, 2048
"""At most so wide is what a specimen is made from; WIDTH is more for longer prompts, which have more directions."""
AT_ONCE = 2**21
"""Numbers of a factor's neuron side made at a time."""
KINDS = 3
"""Layers that are made; the others are as one of these, save for their numbers."""
OFF_LAST = 0.6
"""Over the prompt's length: a VJP's length relative to the last position's. Measured on models here: 0.4 to 1.3."""
TURNS = 1
"""Ways to spread a specimen's ids over the vocabulary, a prompt keeping to one. Measured at GPT-2's shape with random
weights: bytes of all tables are 1.00 of a run's with one way, and 1.10 with 64; lists do favour some tokens."""
REACH = 2**19
"""Bytes back to which zstd sees a row again."""
FACTOR_ROWS, FACTOR_LAYERS, FACTOR_NUMBERS = 64, 12, 2**18
"""At most so many rows a module, layers, and numbers a module, of `factors`."""


@dataclass(frozen=True)
class ShardSpec:
    """What a shard's tables hold."""

    prompts: int
    layers: int
    matrices: Sequence[MatrixSize]
    """Of one layer."""
    has_last: bool
    """Whether the model's last layer is among the layers."""
    options: RowOptions
    scaling: Scaling
    vocabulary: int
    dtype: torch.dtype
    """Of the weights, and so of factors before they are widened."""
    d_model: int


def shard_bytes(
    spec: ShardSpec, sample: Sample, rows: dict[str, float], pilot: Pilot | None
) -> dict[str, float]:
    """Bytes of one shard's files, by table, for the rows that the shard has of each."""
    generator = torch.Generator().manual_seed(0)
    made = dict(_tables(spec, sample, generator, pilot))
    found = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Directory.at(name)
        for table, there in made.items():
            declared = declared_table(table, there.schema)
            empty = write_table(directory, f"{table}-empty.parquet", declared.empty(), declared).bytes
            full = write_table(directory, f"{table}.parquet", there, declared).bytes
            each = (full - empty) / max(there.num_rows, 1)
            found[table] = empty + each * rows.get(table, 0.0)
    return found


def _tables(
    spec: ShardSpec, sample: Sample, generator: torch.Generator, pilot: Pilot | None
) -> Iterator[tuple[str, pa.Table]]:
    prompts = numbered(sample.examples, spec.prompts)
    loss = torch.rand(len(prompts), generator=generator) * 10
    ids = torch.randint(spec.vocabulary, (2, len(prompts)), generator=generator)
    yield (
        "prompts",
        prompt_table(prompts, [Outcome(loss, loss.neg(), ids[0], ids[1])] if prompts else []),
    )
    yield "failures", TABLES["failures"].empty()
    facts = pilot.blocks if pilot else _blocks(spec, numbered(prompts, _few(spec, sample)), generator)
    for table, blocks in facts.items():
        yield table, fact_table(table, blocks)
    if spec.options.save_factors and "factors" not in facts:
        yield "factors", _factors(spec, sample, generator)


def _few(spec: ShardSpec, sample: Sample) -> int:
    """Prompts that with their neurons make no more than a row group of one layer."""
    rows = len(spec.matrices) * (sample.mean_length + max(_kept(spec, size) for size in spec.matrices))
    return max(1, min(spec.prompts, int(ROW_GROUP_ROWS / max(rows, 1))))


def _kept(spec: ShardSpec, size: MatrixSize) -> int:
    return min(size.kept(spec.options.neurons), NEURONS)


def _blocks(
    spec: ShardSpec, examples: Sequence[Example], generator: torch.Generator
) -> dict[str, list[MatrixRows]]:
    """Rows of as many layers as fill a row group of the longest table, or of all."""
    kinds = min(spec.layers - spec.has_last, KINDS)
    made = [_layer(spec, examples, generator, last=False) for _ in range(kinds)]
    last = _layer(spec, examples, generator, last=True) if spec.has_last else None
    found: dict[str, list[MatrixRows]] = {"layers": [], "neurons": [], "tokens": []}
    for table, blocks in found.items():
        one = (last or made[0]).get(table, [])
        rows = sum(len(block.columns["prompt_id"]) for block in one)
        layers = min(spec.layers, -(-ROW_GROUP_ROWS // max(rows, 1)))
        # the last layer keeps its share
        lasts = 0 if last is None else 1 if layers == spec.layers else round(layers / spec.layers)
        for layer in range(layers - lasts):
            blocks += [_varied(b, layer, spec) for b in made[layer % kinds].get(table, [])]
        if lasts and last is not None:
            blocks += [_varied(block, layers - 1, spec) for block in last.get(table, [])]
    return found


def _varied(block: MatrixRows, layer: int, spec: ShardSpec) -> MatrixRows:
    """The same rows for another layer: ids spread over the vocabulary and turned, numbers of another size.

    Modules that share their residual side go on sharing their rows of `tokens`.
    """
    draw = np.random.default_rng([layer, *_side(block.module).encode()])
    factor = np.float32(draw.uniform(0.5, 2.0))
    columns = {
        name: values * factor if values.dtype == np.float32 else values
        for name, values in block.columns.items()
    }
    lists = {name: Ragged(part.values * factor, part.lengths) for name, part in block.lists.items()}
    found = block.projections
    if found is not None:
        stretch, turn = spec.vocabulary / _vocabulary(spec), int(draw.integers(spec.vocabulary))
        inside = draw.integers(max(int(stretch), 1), size=(TURNS, _vocabulary(spec)))
        prompts = block.columns["prompt_id"][found.valid, None] % TURNS

        def spread(ids: np.ndarray) -> np.ndarray:
            return ((ids * stretch + inside[prompts, ids] + turn) % spec.vocabulary).astype(np.int32)

        rank = found.columns["target_rank"] * stretch
        projected = {
            name: spread(values) if name.endswith("_ids") else values * factor
            for name, values in found.columns.items()
        }
        found = Projections(found.valid, projected | {"target_rank": rank.astype(np.int32)})
    return replace(block, layer=layer, columns=columns, lists=lists, projections=found)


def _side(module: str) -> str:
    """The first module of those that share the residual side."""
    return module if module not in READS else "mlp.up" if module.startswith("mlp") else "attn.q"


def _vocabulary(spec: ShardSpec) -> int:
    return min(spec.vocabulary, VOCABULARY)


def _layer(
    spec: ShardSpec, examples: Sequence[Example], generator: torch.Generator, *, last: bool
) -> dict[str, list[MatrixRows]]:
    """One layer's rows."""
    longest = max(len(example.token_ids) + len(example.target_ids) for example in examples)
    width = min(spec.d_model, max(WIDTH, longest))
    lens = _lens(spec, width, generator)
    found: dict[str, list[MatrixRows]] = {}
    at_once = max(1, AT_ONCE // (longest * max(NEURONS, width)))
    for first in range(0, len(examples), at_once):
        some = examples[first : first + at_once]
        pairs = [sequence(example, spec.options.target_mode) for example in some]
        batch = make_batch(pairs, torch.device("cpu"))
        batch = replace(batch, targets=batch.targets % lens.vocabulary)
        chosen = chosen_positions(some, batch, spec.options.positions)
        extraction = RowCollector(lens, batch, spec.options, chosen, some)
        for group in _groups(spec, batch, width, last, generator):
            extraction.add(group)
        for table, blocks in extraction.blocks.items():
            found.setdefault(table, []).extend(blocks)
    return found


def _lens(spec: ShardSpec, width: int, generator: torch.Generator) -> Lens:
    unembedding = torch.randn(_vocabulary(spec), width, generator=generator)
    norm = Norm(torch.ones(width), torch.zeros(width), 1e-5, centred=False)
    return Lens(norm, unembedding, torch.zeros(len(unembedding)), spec.scaling)


def _groups(
    spec: ShardSpec, batch: Batch, width: int, last: bool, generator: torch.Generator
) -> Iterator[list[Gradient]]:
    """Gradients by the residual side that they share."""
    slots = Slots.every(batch)

    def inputs(size: int) -> Tensor:
        return torch.randn(*batch.mask.shape, size, generator=generator)

    def vjps(size: int, module: str) -> Tensor:
        drawn = torch.randn(*batch.mask.shape, 1, generator=generator)
        length = OFF_LAST / batch.mask.sum(-1)[:, None, None] * torch.exp(0.5 * drawn)
        # behind the last attention, only the prompt's last position matters
        length = torch.zeros_like(length) if last and module not in ("attn.k", "attn.v") else length
        length[torch.arange(len(length)), batch.loss_positions[:, 0]] = 1.0
        return inputs(size) * length

    sides: dict[str, list[Gradient]] = {}
    shared = {"mlp.up": inputs(width), "attn.q": inputs(width)}
    for size in spec.matrices:
        other = min(size.neurons, max(NEURONS, batch.mask.shape[1]))
        side = _side(size.module)
        if size.module in READS:
            gradient = Gradient(0, size.module, None, slots, shared[side], vjps(other, size.module))
        else:
            gradient = Gradient(0, size.module, None, slots, inputs(other), vjps(width, size.module))
        sides.setdefault(side, []).append(gradient)
    yield from sides.values()


def _factors(spec: ShardSpec, sample: Sample, generator: torch.Generator) -> pa.Table:
    """Rows of their true widths, of which a few say enough.

    Inputs that modules share are written once where a module's rows are few and narrow, so that zstd sees them again.
    """
    blocks = []
    layers = min(spec.layers, FACTOR_LAYERS)
    for layer in range(layers):
        last = spec.has_last and layers == spec.layers and layer == layers - 1
        shared: dict[tuple[str, int], Tensor] = {}
        for size in spec.matrices:
            rows = max(1, min(FACTOR_ROWS, FACTOR_NUMBERS // (size.wide + size.high)))
            x, delta = (torch.randn(rows, wide, generator=generator) for wide in (size.wide, size.high))
            if size.module in READS and 4 * size.wide * spec.prompts * sample.positions < REACH:
                x = shared.setdefault((_side(size.module), rows), x)
            delta *= _lengths(rows, sample, generator, last and size.module not in ("attn.k", "attn.v"))
            block = MatrixRows(
                layer, size.module, None, {name: np.arange(rows) for name in ("prompt_id", "position")}
            )
            for name, values in (("x", x), ("delta", delta)):
                stored = values.to(spec.dtype).float().numpy()
                block.lists[name] = Ragged(stored.ravel(), np.full(rows, stored.shape[1]))
            blocks.append(block)
    return fact_table("factors", blocks)


def _lengths(rows: int, sample: Sample, generator: torch.Generator, alone: bool) -> Tensor:
    """Lengths of VJPs, as in `_groups`, for rows of prompts of the sample's mean length; only the last if `alone`."""
    prompt = max(1, round(sample.positions))
    drawn = torch.exp(0.5 * torch.randn(rows, 1, generator=generator))
    found = torch.zeros_like(drawn) if alone else OFF_LAST / max(1.0, sample.mean_length) * drawn
    found[prompt // 2 :: prompt] = 1.0  # somewhere in each prompt, so that few rows have their share of them
    return found
