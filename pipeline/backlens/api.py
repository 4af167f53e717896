"""Runs from Python: `run` and `plan` with their options as keywords, and `open` for the tables of a run directory."""

from dataclasses import fields
from functools import cached_property
from typing import Any

import pyarrow as pa

from backlens.atlas.atlas import Atlas
from backlens.config import PlanOptions, RunConfig
from backlens.display import Answer, with_texts_beside
from backlens.engine.run import NoProgress
from backlens.engine.run import run as run_config
from backlens.errors import BacklensError, nearest
from backlens.forecast import Forecast, make_forecast
from backlens.store.tables import TABLES


class Run:
    """A run directory, with the shards that were committed when it was opened.

    Every method gives an Arrow table (`Answer`) with the texts of tokens beside their ids; nothing is cut unless
    `limit` is given.
    """

    def __init__(self, out: str) -> None:
        """Open the run at `out`; raises BacklensError if `out` is no run directory."""
        self.atlas = Atlas(out)

    @property
    def path(self) -> str:
        return str(self.atlas.snapshot.directory)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Facts about the model in `run.json`: name, family, layers, width, vocabulary, weight hash."""
        return dict(self.atlas.snapshot.record.model)

    def sql(self, statement: str, limit: int | None = None) -> Answer:
        """Run one SELECT over the tables of the run and of its atlas."""
        return self.atlas.sql(statement, limit=limit)

    def prompts(self, limit: int | None = None) -> Answer:
        """One row per prompt."""
        return self._rows("prompts", {}, limit)

    def tokens(
        self,
        prompt: int | None = None,
        layer: int | None = None,
        module: str | None = None,
        limit: int | None = None,
    ) -> Answer:
        """One row per prompt × layer × module × position: norms of x and δ, top and bottom tokens."""
        return self._rows("tokens", {"prompt_id": prompt, "layer": layer, "module": module}, limit)

    def neurons(
        self,
        prompt: int | None = None,
        layer: int | None = None,
        module: str | None = None,
        limit: int | None = None,
    ) -> Answer:
        """One row per kept neuron of a prompt × layer × module."""
        return self._rows("neurons", {"prompt_id": prompt, "layer": layer, "module": module}, limit)

    def layers(
        self,
        prompt: int | None = None,
        layer: int | None = None,
        module: str | None = None,
        limit: int | None = None,
    ) -> Answer:
        """One row per prompt × layer × module: norm, rank and singular values of the gradient."""
        return self._rows("layers", {"prompt_id": prompt, "layer": layer, "module": module}, limit)

    def failures(self, limit: int | None = None) -> Answer:
        """One row per prompt that could not be processed, with the reason."""
        return self._rows("failures", {}, limit)

    def _rows(self, table: str, keys: dict[str, Any], limit: int | None) -> Answer:
        given = {name: key for name, key in keys.items() if key is not None}
        where = " AND ".join(f"{name} = ${name}" for name in given) or "TRUE"
        order = ", ".join(TABLES[table].sort_keys)
        query = f"SELECT * FROM {table} WHERE {where} ORDER BY {order}"
        if limit is not None:
            query, given["limit"] = f"{query} LIMIT $limit", limit
        with self.atlas.question() as opened:
            rows = opened.sql(query, params=given).to_arrow_table()
        return Answer(with_texts_beside(rows, self._texts))

    @cached_property
    def _texts(self) -> pa.Array:
        with self.atlas.question() as opened:
            found = opened.sql("SELECT token FROM vocab ORDER BY token_id").to_arrow_table()
        return found["token"].combine_chunks()

    def __repr__(self) -> str:
        record, shards = self.atlas.snapshot.record, self.atlas.snapshot.shards
        return f"Run {self.path}: {record.model.get('name')}, {shards} of {record.plan.shards} shards"

    def _repr_html_(self) -> str:
        return self.atlas._repr_html_()


def run(**options: Any) -> Run:
    """Run the pipeline and open its directory; the same call resumes a stopped run.

    The options are those of `backlens run`, as keywords: `run(model="gpt2", prompts="facts.jsonl", out="run")`.
    Raises BacklensError for a wrong option or input, and Interrupted if the run stops halfway.
    """
    _check("run", options, RunConfig)
    return Run(run_config(RunConfig(**options), NoProgress()).out)


def plan(**options: Any) -> Forecast:
    """Estimate a run: rows, bytes, devices, time and cost. The options are those of `backlens plan`."""
    _check("plan", options, RunConfig, PlanOptions)
    planning = {field.name: options.pop(field.name) for field in fields(PlanOptions) if field.name in options}
    return make_forecast(RunConfig(**options), PlanOptions(**planning))


def open(out: str) -> Run:
    """Open a run directory, a path or a URL, as it is now. Raises BacklensError if it is none."""
    return Run(out)


def _check(command: str, options: dict[str, Any], *kinds: type) -> None:
    known = [field.name for kind in kinds for field in fields(kind)]
    for name in options:
        if name not in known:
            raise BacklensError(f"{command}: no option {name!r}{nearest(name, known)}")
