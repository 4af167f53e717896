"""Rows of the tables as columns of NumPy arrays, one block per table, layer and module: what `extract.py` makes and
`columns.py` turns into Arrow.

Arrow tables from a shard's blocks of arrays, without a Python object per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from backlens.capture.loss import Outcome
from backlens.projection.project import TopK
from backlens.prompts.prompt import Rejected
from backlens.prompts.tokenize import Example
from backlens.store.tables import FAILURES, MODULE, PROMPTS, TABLES, Table


@dataclass(frozen=True)
class Projections:
    """Projection columns of a block's rows: a selection for the valid rows, nulls for the others."""

    valid: np.ndarray
    top_ids: np.ndarray
    top_scores: np.ndarray
    bottom_ids: np.ndarray
    bottom_scores: np.ndarray
    target_score: np.ndarray
    target_rank: np.ndarray

    @classmethod
    def of(cls, selection: TopK, valid: Bool[Tensor, " row"]) -> "Projections":
        columns = {name: getattr(selection, name).cpu().numpy() for name in TopK.__dataclass_fields__}
        return cls(valid=valid.cpu().numpy(), **columns)

    def of_mixes(self, shape: torch.Size, mixes: slice) -> "Projections":
        """The rows of some of every prompt's mixes, out of rows laid out (prompt, mix)."""
        keep = np.zeros(shape, dtype=bool)
        keep[:, mixes] = True
        flat = keep.ravel()
        kept = flat[self.valid]
        columns = {
            name: getattr(self, name)[kept] for name in Projections.__dataclass_fields__ if name != "valid"
        }
        return Projections(valid=self.valid[flat], **columns)


@dataclass(frozen=True)
class Ragged:
    """A list per row: every row's values end to end, and how many each row has."""

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, values: Float[Tensor, "row value"], lengths: np.ndarray | None = None) -> "Ragged":
        """The first `lengths[i]` values of row i; the whole rows when no lengths are given."""
        array = values.cpu().numpy()
        if lengths is None:
            lengths = np.full(len(array), array.shape[1])
        return cls(array[np.arange(array.shape[1]) < lengths[:, None]], lengths)


@dataclass(frozen=True)
class MatrixRows:
    """Rows of one table for one weight matrix: plain columns, then lists, then projection columns."""

    layer: int
    module: str
    expert: int | None
    columns: dict[str, np.ndarray]
    lists: dict[str, Ragged] = field(default_factory=dict)
    projections: Projections | None = None


def fact_table(name: str, blocks: Sequence[MatrixRows]) -> pa.Table:
    """The rows of one fact table, in the order of the blocks."""
    table = TABLES[name]
    if not blocks:
        return table.empty()
    counts = [len(block.columns["prompt_id"]) for block in blocks]
    columns: dict[str, pa.Array] = {
        "layer": pa.array(np.repeat([block.layer for block in blocks], counts), pa.int16()),
        "module": _modules([block.module for block in blocks], counts),
        "expert": _experts([block.expert for block in blocks], counts),
    }
    for key in blocks[0].columns:
        values = np.concatenate([block.columns[key] for block in blocks])
        columns[key] = pa.array(values).cast(table.schema.field(key).type)
    for key in blocks[0].lists:
        parts = [block.lists[key] for block in blocks]
        ragged = Ragged(
            np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts])
        )
        columns[key] = _lists(ragged, None, table.schema.field(key).type)
    projections = [block.projections for block in blocks if block.projections is not None]
    if projections:
        columns |= _projection_arrays(projections, table)
    return _assemble(table, columns)


def prompt_table(examples: Sequence[Example], outcomes: Sequence[Outcome]) -> pa.Table:
    """The `prompts` rows of examples in the order of their batches' outcomes."""
    loss = np.concatenate([o.loss.cpu().numpy() for o in outcomes]) if outcomes else np.empty(0)
    columns = {
        "prompt_id": [e.prompt.prompt_id for e in examples],
        "id": [e.prompt.id for e in examples],
        "prompt": [e.prompt.prompt for e in examples],
        "target": [e.prompt.target for e in examples],
        "subject": [e.prompt.subject for e in examples],
        "relation": [e.prompt.relation for e in examples],
        "token_ids": [e.token_ids for e in examples],
        "target_ids": [e.target_ids for e in examples],
        "n_tokens": [len(e.token_ids) for e in examples],
        "subject_start": [e.subject_start for e in examples],
        "subject_end": [e.subject_end for e in examples],
        "loss": loss,
        "target_prob": np.exp(-loss),
        "target_rank": [int(r) for o in outcomes for r in o.target_rank.tolist()],
        "predicted_id": [int(p) for o in outcomes for p in o.predicted_id.tolist()],
        "meta": [e.prompt.meta for e in examples],
    }
    schema = PROMPTS.schema
    return _assemble(
        PROMPTS, {name: pa.array(column, schema.field(name).type) for name, column in columns.items()}
    )


def failure_table(rejected: Sequence[Rejected]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"prompt_id": r.prompt_id, "stage": r.stage, "error": r.error, "message": r.message}
            for r in rejected
        ],
        schema=FAILURES.schema,
    )


def without_prompts(table: pa.Table, prompt_ids: Sequence[int]) -> pa.Table:
    """Drop the rows of prompts whose numbers mean nothing."""
    if not prompt_ids:
        return table
    return table.filter(~pc.field("prompt_id").isin(list(prompt_ids)))


def _modules(names: Sequence[str], counts: Sequence[int]) -> pa.DictionaryArray:
    known = sorted(set(names))
    codes = np.repeat([known.index(name) for name in names], counts)
    return pa.DictionaryArray.from_arrays(pa.array(codes, MODULE.index_type), pa.array(known, pa.string()))


def _experts(experts: Sequence[int | None], counts: Sequence[int]) -> pa.Array:
    """Null for matrices that see every token."""
    values = np.repeat([-1 if expert is None else expert for expert in experts], counts)
    return pa.array(values.astype(np.int16), pa.int16(), mask=values < 0)


def _projection_arrays(parts: Sequence[Projections], table: Table) -> dict[str, pa.Array]:
    valid = np.concatenate([part.valid for part in parts])
    arrays: dict[str, pa.Array] = {}
    for key in ("top_ids", "top_scores", "bottom_ids", "bottom_scores"):
        values = np.concatenate([getattr(part, key) for part in parts])
        ragged = Ragged(values.ravel(), np.where(valid, values.shape[1], 0))
        arrays[key] = _lists(ragged, valid, table.schema.field(key).type)
    for key in ("target_score", "target_rank"):
        values = np.concatenate([getattr(part, key) for part in parts])
        spread = np.zeros(len(valid), values.dtype)
        spread[valid] = values
        arrays[key] = pa.array(spread, table.schema.field(key).type, mask=~valid)
    return arrays


def _lists(ragged: Ragged, valid: np.ndarray | None, type: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(ragged.lengths)]).astype(np.int32)
    values = pa.array(ragged.values, type.field(0).type)  # type: ignore[attr-defined]
    mask = None if valid is None or valid.all() else pa.array(~valid)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=type, mask=mask)


def _assemble(table: Table, columns: dict[str, pa.Array]) -> pa.Table:
    schema = table.schema
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
