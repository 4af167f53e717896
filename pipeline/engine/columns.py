"""Arrow tables from a shard's blocks of arrays, without a Python object per row."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.capture import Outcome
from pipeline.engine.blocks import Block, Projections, Ragged
from pipeline.prompts.record import Rejected
from pipeline.prompts.tokenize import Example
from schemas.tables import FAILURES, MODULE, PROMPTS, TABLES, Table


def fact_table(name: str, blocks: Sequence[Block]) -> pa.Table:
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
