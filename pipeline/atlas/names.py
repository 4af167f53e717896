"""What a user calls things, looked up in a run; what is not there gets one line with what is like it."""

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from pipeline.atlas.address import Neuron
from pipeline.atlas.snapshot import Snapshot
from pipeline.errors import BacklensError, nearest


def token_ids(opened: duckdb.DuckDBPyConnection, token: str) -> list[int]:
    """All ids with that text: more than one where tokens are parts of a character."""
    found = _select(opened, "SELECT token_id FROM vocab WHERE token = $token", token=token)
    if found.num_rows == 0:
        near = _similar_tokens(opened, token)
        proposal = f"did you mean {' or '.join(map(repr, near))}?" if near else "and nothing is like it"
        raise BacklensError(
            f"token: {token!r} is not one token of this vocabulary (a leading space counts); {proposal}"
        )
    return found.column("token_id").to_pylist()


def check_place(
    snapshot: Snapshot, opened: duckdb.DuckDBPyConnection, layer: int | None, module: str | None
) -> None:
    """Refuses a layer or module that the run does not have."""
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
    """Refuses a neuron that the model does not have; one that it has may still be below the cut-off everywhere."""
    check_place(snapshot, opened, neuron.layer, neuron.module)
    facts = snapshot.record.model.get("neurons")
    if facts is None:  # a run of an earlier version: nothing says how wide its modules are
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
    """The prompt's row."""
    if is_prompt_number(prompt_id):
        found = _select(opened, "FROM prompts WHERE prompt_id = $prompt_id", prompt_id=prompt_id)
        if found.num_rows:
            return found
    raise BacklensError(_missing_prompt(snapshot, opened, prompt_id))


def is_prompt_number(prompt_id: int) -> bool:
    """Whether it is one that a prompt could have: it fits into its column."""
    return abs(prompt_id) < 2**63


def check_tag(opened: duckdb.DuckDBPyConnection, by: str, columns: Sequence[str]) -> None:
    """Refuses what is neither such a column of `prompts` nor a key of its `meta`."""
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
    """The rows with tokens in the place of lists of their ids, in columns named accordingly."""
    names = [name for name in rows.column_names if name.endswith("_ids")]
    if not names:
        return rows
    columns = {name: rows.column(name).combine_chunks() for name in names}
    ids = pa.concat_arrays([column.flatten() for column in columns.values()]).unique().to_pylist()
    found = _select(
        opened,
        "SELECT token_id, token FROM vocab WHERE token_id IN (SELECT unnest($ids::INTEGER[]))",
        ids=ids,
    )
    known = dict(zip(found.column("token_id").to_pylist(), found.column("token").to_pylist(), strict=True))
    texts = {token_id: known.get(token_id, f"<{token_id}>") for token_id in ids}
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


def _select(opened: duckdb.DuckDBPyConnection, query: str, **parameters: Any) -> pa.Table:
    return opened.sql(query, params=parameters).to_arrow_table()


def _known(snapshot: Snapshot, opened: duckdb.DuckDBPyConnection) -> tuple[Sequence[int], list[str]]:
    """The layers and modules there can be: by the model's facts, else by the rows there are."""
    facts = snapshot.record.model
    if "layers" in facts and "modules" in facts:
        return range(int(facts["layers"])), list(facts["modules"])
    rows = _select(opened, "SELECT DISTINCT layer, module::VARCHAR AS module FROM layers").to_pylist()
    return [row["layer"] for row in rows], sorted({row["module"] for row in rows})


def _layers_of_run(snapshot: Snapshot) -> list[int]:
    """Those that were asked for; empty where the record does not say."""
    named = snapshot.record.fingerprint.get("layers")
    parts = named.split(",") if isinstance(named, str) else []
    return [int(part) for part in parts] if all(part.isdecimal() for part in parts) else []


def _spans(numbers: Sequence[int]) -> str:
    """`0 to 2, 5`"""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans)


def _missing_prompt(snapshot: Snapshot, opened: duckdb.DuckDBPyConnection, prompt_id: int) -> str:
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
    """Up to three tokens that were perhaps meant: the same but for spaces and case, then alike."""
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
