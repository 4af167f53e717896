"""Names that users give: tokens, neurons, layers, modules and prompts, looked up in a run.

A name that the run does not have raises BacklensError with one line that proposes similar ones.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from backlens.atlas.database import Snapshot
from backlens.errors import BacklensError, nearest


@dataclass(frozen=True, slots=True)
class Neuron:
    """The address of a neuron: `35.mlp.down.123`, or `35.mlp.down.e3.123` in expert 3."""

    layer: int
    module: str
    index: int
    expert: int | None = None
    """None in a dense block; in a block with experts None means any of them."""

    def __str__(self) -> str:
        expert = "" if self.expert is None else f"e{self.expert}."
        return f"{self.layer}.{self.module}.{expert}{self.index}"


def parse_neuron(text: str) -> Neuron:
    """Parse an address. Raises BacklensError if it is malformed; no run is looked at."""
    match = re.fullmatch(r"(\d{1,9})\.(.+?)(?:\.e(\d{1,9}))?\.(\d{1,9})", text.strip(), re.ASCII)
    if match is None:
        raise BacklensError(
            f"neuron: {text!r} is not an address; write layer.module.index such as 35.mlp.down.123, "
            "or 35.mlp.down.e3.123 for expert 3"
        )
    layer, module, expert, index = match.groups()
    return Neuron(int(layer), module, int(index), None if expert is None else int(expert))


def token_ids(opened: duckdb.DuckDBPyConnection, token: str) -> list[int]:
    """All token ids with this text: several where tokens are parts of one character. Raises BacklensError for none."""
    found = _select(opened, "SELECT token_id FROM vocab WHERE token = $token", token=token)
    if found.num_rows == 0:
        near = _similar_tokens(opened, token)
        proposal = f"did you mean {' or '.join(map(repr, near))}?" if near else "no token is similar"
        raise BacklensError(
            f"token: {token!r} is not one token of this vocabulary (a leading space counts); {proposal}"
        )
    return found.column("token_id").to_pylist()


def check_place(
    snapshot: Snapshot, opened: duckdb.DuckDBPyConnection, layer: int | None, module: str | None
) -> None:
    """Raise BacklensError for a layer or module that the run does not have."""
    if layer is None and module is None:
        return
    layers, modules = _known(snapshot, opened)
    of_run = _layers_of_run(snapshot)
    if modules and module is not None and module not in modules:
        raise BacklensError(
            f"module: this run has no module {module!r}; it has {', '.join(modules)}{nearest(module, modules)}"
        )
    if layers and layer is not None and layer not in layers:
        raise BacklensError(f"layer: the model has no layer {layer}; it has {min(layers)} to {max(layers)}")
    if of_run and layer is not None and layer not in of_run:
        raise BacklensError(f"layer: this run has no layer {layer}; it has {_spans(of_run)} (--layers)")


def check_neuron(snapshot: Snapshot, opened: duckdb.DuckDBPyConnection, neuron: Neuron) -> None:
    """Raise BacklensError for a neuron that the model does not have.

    A neuron that it has may still be below the cut-off for every prompt.
    """
    check_place(snapshot, opened, neuron.layer, neuron.module)
    facts = snapshot.record.model.get("neurons")
    if facts is None:  # runs of earlier versions do not record the widths of modules
        return
    place = f"{neuron.module} of layer {neuron.layer}"
    there = [fact for fact in facts if fact["module"] == neuron.module and neuron.layer in fact["layers"]]
    if not there:
        raise BacklensError(f"neuron: the model has no {place}")
    if neuron.expert is not None:
        there = [fact for fact in there if fact["experts"] is not None]
        if not there:
            raise BacklensError(f"neuron: {place} has no experts; leave out e{neuron.expert}")
        experts = there[0]["experts"]
        if neuron.expert >= experts:
            raise BacklensError(f"neuron: {place} has no expert {neuron.expert}; it has 0 to {experts - 1}")
    width = max(fact["neurons"] for fact in there)
    if not 0 <= neuron.index < width:
        raise BacklensError(
            f"neuron: {place} has no neuron {neuron.index}; it is {width} wide: 0 to {width - 1}"
        )


def check_prompt(snapshot: Snapshot, opened: duckdb.DuckDBPyConnection, prompt_id: int) -> pa.Table:
    """The row of `prompts` of a prompt. Raises BacklensError if there is none."""
    if is_prompt_number(prompt_id):
        found = _select(opened, "FROM prompts WHERE prompt_id = $prompt_id", prompt_id=prompt_id)
        if found.num_rows:
            return found
    raise BacklensError(_missing_prompt(snapshot, opened, prompt_id))


def is_prompt_number(prompt_id: int) -> bool:
    """True if the number fits into the column `prompt_id`."""
    return abs(prompt_id) < 2**63


def check_tag(opened: duckdb.DuckDBPyConnection, by: str, columns: Sequence[str]) -> None:
    """Raise BacklensError if `by` is neither one of these columns of `prompts` nor a key of `meta`."""
    if by in columns:
        return
    rows = _select(
        opened, "SELECT DISTINCT unnest(json_keys(meta)) AS key FROM prompts WHERE meta IS NOT NULL"
    )
    keys = sorted(rows.column("key").to_pylist())
    if by not in keys:
        known = [*columns, *keys]
        raise BacklensError(f"by: prompts have no {by!r}; they have {', '.join(known)}{nearest(by, known)}")


def with_texts(opened: duckdb.DuckDBPyConnection, rows: pa.Table) -> pa.Table:
    """The rows with texts in the place of lists of token ids: `top_ids` becomes `top_tokens`."""
    names = [name for name in rows.column_names if name.endswith("_ids")]
    if not names:
        return rows
    columns = {name: rows.column(name).combine_chunks() for name in names}
    ids = pa.concat_arrays([column.flatten() for column in columns.values()]).unique().to_pylist()
    texts = texts_of(opened, ids)
    for name, column in columns.items():
        tokens = pa.array([texts[token_id] for token_id in column.flatten().to_pylist()], pa.string())
        lengths = np.diff(column.offsets.to_numpy()) * ~column.is_null().to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        rows = rows.set_column(
            rows.column_names.index(name),
            name.removesuffix("_ids") + "_tokens",
            pa.ListArray.from_arrays(offsets, tokens, mask=column.is_null()),
        )
    return rows


def texts_of(opened: duckdb.DuckDBPyConnection, ids: Sequence[int]) -> dict[int, str]:
    """The texts of token ids; `<7>` for an id that the vocabulary does not have."""
    query = "SELECT token_id, token FROM vocab WHERE token_id IN (SELECT unnest($ids::INTEGER[]))"
    known = dict(opened.execute(query, {"ids": list(ids)}).fetchall())
    return {token_id: known.get(token_id, f"<{token_id}>") for token_id in ids}


def _select(opened: duckdb.DuckDBPyConnection, query: str, **parameters: Any) -> pa.Table:
    return opened.sql(query, params=parameters).to_arrow_table()


def _known(snapshot: Snapshot, opened: duckdb.DuckDBPyConnection) -> tuple[Sequence[int], list[str]]:
    """The layers and modules of the model, as the run records them; else those of the rows."""
    facts = snapshot.record.model
    if "layers" in facts and "modules" in facts:
        return range(int(facts["layers"])), list(facts["modules"])
    rows = _select(opened, "SELECT DISTINCT layer, module::VARCHAR AS module FROM layers").to_pylist()
    return [row["layer"] for row in rows], sorted({row["module"] for row in rows})


def _layers_of_run(snapshot: Snapshot) -> list[int]:
    """The layers of `--layers`; empty if the record does not say."""
    named = snapshot.record.fingerprint.get("layers")
    parts = named.split(",") if isinstance(named, str) else []
    return [int(part) for part in parts] if all(part.isdecimal() for part in parts) else []


def _spans(numbers: Sequence[int]) -> str:
    """Numbers as ranges: `0 to 2, 5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans)


def _missing_prompt(snapshot: Snapshot, opened: duckdb.DuckDBPyConnection, prompt_id: int) -> str:
    """The reason why a prompt has no row."""
    failed = (
        _select(opened, "FROM failures WHERE prompt_id = $prompt_id", prompt_id=prompt_id).to_pylist()
        if is_prompt_number(prompt_id)
        else []
    )
    if failed:
        failure = failed[0]
        return f"prompt: {prompt_id} failed ({failure['stage']}, {failure['error']}): {failure['message']}"
    if snapshot.note and 0 <= prompt_id < snapshot.record.plan.prompts:
        return f"prompt: {prompt_id} is not there yet; {snapshot.note}"
    ids = _select(opened, "SELECT min(prompt_id) AS first, max(prompt_id) AS last FROM prompts").to_pylist()[
        0
    ]
    return f"prompt: this run has no prompt {prompt_id}; it has {ids['first']} to {ids['last']}"


def _similar_tokens(opened: duckdb.DuckDBPyConnection, token: str) -> list[str]:
    """Up to three similar tokens: first those that differ only in spaces and case."""
    rows = _select(
        opened,
        """
        SELECT token FROM (SELECT DISTINCT token FROM vocab)
        WHERE lower(trim(token)) = lower(trim($token))
            OR jaro_winkler_similarity(lower(trim(token)), lower(trim($token))) > 0.85
        ORDER BY
            lower(trim(token)) = lower(trim($token)) DESC,
            trim(token) = trim($token) DESC,
            jaro_winkler_similarity(lower(trim(token)), lower(trim($token))) DESC,
            token
        LIMIT 3
        """,
        token=token,
    )
    return rows.column("token").to_pylist()
