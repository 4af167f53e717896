"""Questions to a run: where a token stands, what a neuron is told, what happened in a prompt, or any SELECT.

    atlas = Atlas("./run")
    atlas.by_token(" Paris", limit=20)
    atlas.by_neuron("35.mlp.down.123", limit=20)
    atlas.by_prompt(17)
    atlas.sql("SELECT module, avg(grad_norm) FROM layers GROUP BY module", limit=100)

All of them return Arrow tables (`Answer`: notebooks show them as HTML) and see the shards that were committed when the
run was opened. An answer has every row there is, but where `limit` is given; then `answer.total` says how many there
are. They read the tables that `backlens atlas` wrote if those are of just these shards, and derive them on the way if
not: slower, the same. Only what neurons' own weights say takes an atlas, for it comes from the model.
"promoted" counts bottom lists, for an update subtracts gradients, and "demoted" top lists; both count kept neurons
only (`cut_off`).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, Self

import duckdb
import pyarrow as pa

from pipeline.atlas import names, questions
from pipeline.atlas.address import Neuron, parse_neuron
from pipeline.atlas.answer import Answer, table_html
from pipeline.atlas.database import MEMORY_LIMIT, Database, connection
from pipeline.atlas.manifest import CutOff
from pipeline.atlas.snapshot import Snapshot
from pipeline.atlas.sql import count_rows, run_select
from pipeline.errors import BacklensError
from pipeline.store.files import Directory

SECONDS = 60.0
COLUMNS = ("relation", "subject", "target")
"""Columns of `prompts` that `groups` can go by; other words are keys of its `meta`."""


class Atlas:
    """A run as it was when this was made, to be asked."""

    def __init__(self, out: str | Directory, seconds: float = SECONDS, memory: str = MEMORY_LIMIT) -> None:
        """`out` is a run directory, a path or a URL; a question may take `seconds`, all at a time `memory`."""
        self.snapshot = Snapshot.open(out)
        self.seconds = seconds
        self.memory = memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what questions keep open; a later question opens it anew."""
        if (opened := self.__dict__.pop("_database", None)) is not None:
            opened.close()

    def _repr_html_(self) -> str:
        """The run in a few rows, for notebooks."""
        record, files = self.snapshot.record, self.snapshot.files
        facts = {
            "run": str(self.snapshot.directory),
            "model": str(record.model.get("name")),
            "shards": f"{self.snapshot.shards} of {record.plan.shards}",
            "neurons": str(self.cut_off),
            "atlas": "current" if self.snapshot.is_current else "none: answers are derived on the way",
            "tables": ", ".join(name for name, paths in files.items() if paths),
            "note": self.note,
        }
        said = {name: fact for name, fact in facts.items() if fact}
        return table_html(pa.table({"": list(said), "what": list(said.values())}))

    @property
    def note(self) -> str | None:
        """What a reader of results should know: that the run is not complete, or its atlas not current."""
        return self.snapshot.note

    @property
    def cut_off(self) -> CutOff:
        """Which neurons are kept for a prompt. The others are not there, which does not mean zero."""
        return self.snapshot.cut_off

    @property
    def weights_note(self) -> str | None:
        """Why a neuron's summary has no columns of its own weights; None if it has them."""
        manifest = self.snapshot.manifest if self.snapshot.is_current else None
        if manifest is None:
            return "what the neurons' weights say is added by `backlens atlas`"
        return str(manifest.weights) if manifest.weights.digest is None else None

    def by_token(
        self, token: str, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """The neurons and positions in whose top or bottom lists `token` stands, the most prominent first.

        `neuron` is null in a position's rows and `position` in a neuron's; `place` counts from 0 in its list.
        """
        return self._of_token(questions.TOKEN_PLACES, token, limit=limit, layer=layer, module=module)

    def token_neurons(
        self, token: str, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """The neurons that gradients push toward `token` (promoted) or away from it, most often first."""
        return self._of_token(questions.TOKEN_NEURONS, token, limit=limit, layer=layer, module=module)

    def token_layers(
        self, token: str, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """How often each layer's modules are pushed toward `token` and away from it, and in which neurons."""
        return self._of_token(questions.TOKEN_LAYERS, token, limit=limit, layer=layer, module=module)

    def by_neuron(self, neuron: str | Neuron, limit: int | None = None) -> Answer:
        """What each prompt's gradient says to one neuron, the strongest first."""
        return self._of_neuron(questions.NEURON_PROMPTS, neuron, limit=limit)

    def neuron_tokens(self, neuron: str | Neuron, limit: int | None = None) -> Answer:
        """The tokens in a neuron's lists: in how many prompts it is pushed toward them or away."""
        return self._of_neuron(questions.NEURON_TOKENS, neuron, limit=limit)

    def neuron_summary(self, neuron: str | Neuron, limit: int | None = None) -> Answer:
        """One row: how often it is kept, how strongly, what all prompts together say to it, and its own weights."""
        return self._of_neuron(questions.NEURON_SUMMARY, neuron, limit=limit)

    def similar_neurons(self, neuron: str | Neuron, limit: int | None = None) -> Answer:
        """The neurons of all layers that are told the same: by the cosine of their counts by side and token."""
        return self._of_neuron(questions.SIMILAR_NEURONS, neuron, limit=limit)

    def specific_neurons(
        self,
        limit: int | None = None,
        layer: int | None = None,
        module: str | None = None,
        min_prompts: int = 5,
    ) -> Answer:
        """The neurons whose tokens differ most from those of their layer's module, in bits.

        Few prompts make any neuron look specific, hence `min_prompts`.
        """
        return self._ask(
            questions.SPECIFIC_NEURONS, layer=layer, module=module, limit=limit, min_prompts=min_prompts
        )

    def prompt(self, prompt_id: int) -> Answer:
        """One prompt's row of `prompts`: its text, target and loss among them."""
        with self._prompt_question(prompt_id) as opened:
            return Answer(names.check_prompt(self.snapshot, opened, prompt_id))

    def by_prompt(
        self, prompt_id: int, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """One prompt's layers, modules and positions, each with the tokens of its projection: its heatmap."""
        return self._of_prompt(questions.HEATMAP, prompt_id, limit=limit, layer=layer, module=module)

    def prompt_neurons(
        self, prompt_id: int, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """The neurons that are kept for a prompt, the strongest first."""
        return self._of_prompt(questions.PROMPT_NEURONS, prompt_id, limit=limit, layer=layer, module=module)

    def target_ranks(
        self,
        prompt_id: int,
        limit: int | None = None,
        layer: int | None = None,
        module: str | None = None,
        position: int | None = None,
    ) -> Answer:
        """The target's rank through the layers at one position of a prompt, by default its last."""
        given = {"limit": limit, "layer": layer, "module": module, "position": position}
        return self._of_prompt(questions.TARGET_RANKS, prompt_id, **given)

    def prominent_tokens(
        self,
        prompt_id: int | None = None,
        limit: int | None = None,
        layer: int | None = None,
        module: str | None = None,
    ) -> Answer:
        """The tokens that stand out at any layer: at a prompt's positions, or in the neurons of all prompts."""
        if prompt_id is None:
            return self._ask(questions.PROMINENT_TOKENS, limit=limit, layer=layer, module=module)
        return self._of_prompt(
            questions.PROMINENT_IN_PROMPT, prompt_id, limit=limit, layer=layer, module=module
        )

    def compare_prompts(
        self,
        one: int,
        two: int,
        limit: int | None = None,
        layer: int | None = None,
        module: str | None = None,
    ) -> Answer:
        """Two prompts (or two targets of one) by layer and module: norms, ranks at the last position, neurons."""
        if one == two:
            raise BacklensError(f"prompt: {one} is compared with itself; give another one")
        self.prompt(one)
        self.prompt(two)
        return self._ask(questions.COMPARE_PROMPTS, one=one, two=two, limit=limit, layer=layer, module=module)

    def compare_runs(
        self,
        other: "Atlas | str",
        limit: int | None = None,
        layer: int | None = None,
        module: str | None = None,
    ) -> Answer:
        """Two runs by layer and module, over the prompts whose text is in both; means of norms and ranks."""
        beside = other.snapshot if isinstance(other, Atlas) else Snapshot.open(other)
        for snapshot in (self.snapshot, beside):
            snapshot.require_run()
        with connection(self.snapshot.database(self.memory, beside), self.seconds) as opened:
            names.check_place(self.snapshot, opened, layer, module)
            given = {"limit": None, "layer": layer, "module": module}
            rows = _select(opened, questions.COMPARE_RUNS, given)
            if rows.num_rows == 0:
                raise BacklensError(
                    f"compare: {self.snapshot.directory} and {beside.directory} have no prompt in common at the "
                    "same layer and module; they must be of the same prompts (targets may differ)"
                )
            return Answer(rows if limit is None else rows.slice(0, limit), lambda: rows.num_rows)

    def groups(
        self,
        by: str = "relation",
        limit: int | None = None,
        layer: int | None = None,
        module: str | None = None,
    ) -> Answer:
        """Means by layer and module over the prompts of each relation, subject, target or key of `meta`."""
        with self.question() as opened:
            names.check_tag(opened, by, COLUMNS)
        pointer = "/" + by.replace("~", "~0").replace("/", "~1")
        return self._ask(questions.GROUPS, by=by, pointer=pointer, limit=limit, layer=layer, module=module)

    def coverage(
        self, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """What is there by layer and module: prompts, positions, kept neurons, and how much of it is zero."""
        return self._ask(questions.COVERAGE, limit=limit, layer=layer, module=module)

    def modules(self, module: str | None = None, prompt_id: int | None = None) -> list[str]:
        """The modules that have rows of positions, of one prompt or of any; or this one if it has some."""
        question = self.question() if prompt_id is None else self._prompt_question(prompt_id)
        with question as opened:
            names.check_place(self.snapshot, opened, None, module)
            if prompt_id is not None:
                names.check_prompt(self.snapshot, opened, prompt_id)
            given = {"module": module, "prompt_id": prompt_id}
            rows = opened.execute(questions.MODULES, given).fetchall()
        return [name for (name,) in rows]

    def layer_curves(
        self, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """Norms, ranks and entropies by layer, module and kind of position."""
        return self._ask(questions.LAYER_CURVES, limit=limit, layer=layer, module=module)

    def sql(self, statement: str, limit: int | None = None, as_text: bool = False) -> Answer:
        """The rows of one SELECT over the tables; nothing else is run.

        `as_text` gives dates, intervals, blobs and what else JSON has no word for as DuckDB writes them.
        """

        def count() -> int:
            with connection(self.snapshot.database(self.memory), self.seconds) as again:
                return count_rows(again, statement)

        with connection(self.snapshot.database(self.memory), self.seconds) as opened:
            rows = run_select(opened, statement, limit, as_text)
            return Answer(rows, count if limit is not None and rows.num_rows == limit else None)

    @cached_property
    def _database(self) -> Database:
        """Opened for the first question, and kept for those that follow."""
        return self.snapshot.database(self.memory, is_kept=True)

    def question(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A cursor for SELECTs of our own, which sees the tables."""
        self.snapshot.require_run()
        return self._database.question(self.seconds)

    def _prompt_question(self, prompt_id: int) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        if self.snapshot.is_current:
            return self.question()
        self.snapshot.require_run()
        return connection(self.snapshot.prompt_database(prompt_id, self.memory), self.seconds)

    def _of_token(self, question: str, token: str, **given: Any) -> Answer:
        with self.question() as opened:
            names.check_place(self.snapshot, opened, given.get("layer"), given.get("module"))
            return _answer(opened, question, given | {"ids": names.token_ids(opened, token)}, self.question)

    def _of_neuron(self, question: str, neuron: str | Neuron, limit: int | None) -> Answer:
        wanted = parse_neuron(neuron) if isinstance(neuron, str) else neuron
        given = {"layer": wanted.layer, "module": wanted.module, "index": wanted.index}
        with self.question() as opened:
            names.check_neuron(self.snapshot, opened, wanted)
            return _answer(opened, question, given | {"expert": wanted.expert, "limit": limit}, self.question)

    def _of_prompt(self, question: str, prompt_id: int, **given: Any) -> Answer:
        asking = partial(self._prompt_question, prompt_id)
        with asking() as opened:
            names.check_place(self.snapshot, opened, given.get("layer"), given.get("module"))
            known = prompt_id if names.is_prompt_number(prompt_id) else None
            answer = _answer(opened, question, given | {"prompt_id": known}, asking)
            if answer.num_rows == 0:  # only now, for to look it up takes as long as half an answer
                names.check_prompt(self.snapshot, opened, prompt_id)
            return answer

    def _ask(self, question: str, **given: Any) -> Answer:
        with self.question() as opened:
            names.check_place(self.snapshot, opened, given.get("layer"), given.get("module"))
            return _answer(opened, question, given, self.question)


Asking = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]
"""Opens a run for one question."""


def _answer(
    opened: duckdb.DuckDBPyConnection, question: str, given: Mapping[str, Any], again: Asking
) -> Answer:
    """The answer; if there may be more rows than its limit, they are counted `again` when that is asked for."""
    rows = names.with_texts(opened, _select(opened, question, given))

    def count() -> int:
        with again() as asked:
            counted = f"SELECT count(*) AS rows FROM ({question})"
            return _select(asked, counted, {**given, "limit": None})["rows"][0].as_py()

    return Answer(rows, count if given.get("limit") == rows.num_rows else None)


def _select(opened: duckdb.DuckDBPyConnection, question: str, given: Mapping[str, Any]) -> pa.Table:
    """The question with those values that it asks for."""
    bound = {name: value for name, value in given.items() if f"${name}" in question}
    return opened.sql(question, params=bound).to_arrow_table()
