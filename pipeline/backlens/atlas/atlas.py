"""Questions to a run: the lists that hold a token, the updates of a neuron, one prompt, or any SELECT.

    atlas = Atlas("./run")
    atlas.by_token(" Paris", limit=20)
    atlas.by_neuron("35.mlp.down.123", limit=20)
    atlas.by_prompt(17)
    atlas.sql("SELECT module, avg(grad_norm) FROM layers GROUP BY module", limit=100)

Every method returns an Arrow table (`Answer`; notebooks show it as HTML) over the shards that were committed when the
run was opened. An answer has all rows unless `limit` is given; `answer.total` then says how many there are. Questions
read the tables that `backlens atlas` wrote if those are of exactly these shards. Otherwise they derive them on the way,
which is slower and gives the same answer; only the logit lens of the neurons' own weights needs an atlas, because it
comes from the model.

`promoted` counts bottom lists, because an update subtracts gradients, and `suppressed` counts top lists. Both count
kept neurons only (`cut_off`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, Self

import duckdb
import pyarrow as pa

from backlens.atlas import names, questions
from backlens.atlas.database import MEMORY_LIMIT, Database, Snapshot, connection
from backlens.atlas.manifest import CutOff
from backlens.atlas.names import Neuron, parse_neuron
from backlens.atlas.untrusted_sql import count_rows, run_select
from backlens.display import Answer, table_html
from backlens.errors import BacklensError
from backlens.heatmap import Heatmap, make_heatmap
from backlens.store.directory import Directory

SECONDS = 60.0
"""Time limit of a question."""
COLUMNS = ("relation", "subject", "target")
"""Columns of `prompts` that `groups` takes; any other word is a key of `meta`."""


class Atlas:
    """A run as it was when this object was made."""

    def __init__(self, out: str | Directory, seconds: float = SECONDS, memory: str = MEMORY_LIMIT) -> None:
        """Open the run directory `out`, a path or a URL.

        `seconds` limits one question, `memory` (such as `4GB`) all questions that run at a time.
        Raises BacklensError if `out` is no run directory.
        """
        self.snapshot = Snapshot.open(out)
        self.seconds = seconds
        self.memory = memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database that questions share; a later question opens it again."""
        if (opened := self.__dict__.pop("_database", None)) is not None:
            opened.close()

    def _repr_html_(self) -> str:
        """A few facts about the run, for notebooks."""
        record, files = self.snapshot.record, self.snapshot.files
        facts = {
            "run": str(self.snapshot.directory),
            "model": str(record.model.get("name")),
            "shards": f"{self.snapshot.shards} of {record.plan.shards}",
            "neurons": str(self.cut_off),
            "atlas": "current"
            if self.snapshot.is_current
            else "none: answers are derived on the way (slower)",
            "tables": ", ".join(name for name, paths in files.items() if paths),
            "note": self.note,
        }
        said = {name: fact for name, fact in facts.items() if fact}
        return table_html(pa.table({"fact": list(said), "value": list(said.values())}))

    @property
    def note(self) -> str | None:
        """A warning for readers of results if the run is not complete or its atlas not current; else None."""
        return self.snapshot.note

    @property
    def cut_off(self) -> CutOff:
        """The rule by which neurons are kept for a prompt. A missing neuron is below the cut-off, not zero."""
        return self.snapshot.cut_off

    @property
    def weights_note(self) -> str | None:
        """The reason why the summary of a neuron lacks the lens of its own weights; None if it has it."""
        manifest = self.snapshot.manifest if self.snapshot.is_current else None
        if manifest is None:
            return "the logit lens of the neurons' weights needs an atlas: `backlens atlas` adds it"
        return str(manifest.weights) if manifest.weights.digest is None else None

    @cached_property
    def vocabulary(self) -> int:
        """Number of tokens that lists and ranks are over."""
        with self.question() as opened:
            ((count,),) = opened.execute("SELECT count(*) FROM vocab").fetchall()
        return count

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The texts of token ids; `<7>` for an id that the vocabulary does not have."""
        with self.question() as opened:
            texts = names.texts_of(opened, ids)
        return [texts[token_id] for token_id in ids]

    def by_token(
        self, token: str, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """The top and bottom lists that hold `token`, of neurons and of positions, the most prominent first.

        `neuron` is null in rows of positions, `position` in rows of neurons; `place` counts from 0.
        """
        return self._of_token(questions.TOKEN_PLACES, token, limit=limit, layer=layer, module=module)

    def token_neurons(
        self, token: str, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """The neurons whose updates promote or suppress `token`.

        Neurons come first that have it in more lists than chance among the lists of their layer's module explains.
        """
        return self._of_token(questions.TOKEN_NEURONS, token, limit=limit, layer=layer, module=module)

    def token_layers(
        self, token: str, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """How often updates promote and suppress `token`, by layer and module, with the neurons that do so most."""
        return self._of_token(questions.TOKEN_LAYERS, token, limit=limit, layer=layer, module=module)

    def by_neuron(self, neuron: str | Neuron, limit: int | None = None) -> Answer:
        """The gradient of one neuron for each prompt that keeps it, the largest norm first."""
        return self._of_neuron(questions.NEURON_PROMPTS, neuron, limit=limit)

    def neuron_tokens(self, neuron: str | Neuron, limit: int | None = None) -> Answer:
        """The tokens in a neuron's lists, with the number of prompts that promote and suppress each."""
        return self._of_neuron(questions.NEURON_TOKENS, neuron, limit=limit)

    def neuron_summary(self, neuron: str | Neuron, limit: int | None = None) -> Answer:
        """One row: prompts that keep the neuron, norms, promoted and suppressed tokens, the lens of its own weights."""
        return self._of_neuron(questions.NEURON_SUMMARY, neuron, limit=limit)

    def similar_neurons(self, neuron: str | Neuron, limit: int | None = None) -> Answer:
        """The neurons of all layers with similar updates, by the cosine of their counts per side and token."""
        return self._of_neuron(questions.SIMILAR_NEURONS, neuron, limit=limit)

    def specific_neurons(
        self,
        limit: int | None = None,
        layer: int | None = None,
        module: str | None = None,
        min_prompts: int = 5,
    ) -> Answer:
        """The neurons with tokens of their own, by smoothed log odds in bits against their layer's module.

        With few prompts any neuron looks specific, hence `min_prompts`.
        """
        return self._ask(
            questions.SPECIFIC_NEURONS, layer=layer, module=module, limit=limit, min_prompts=min_prompts
        )

    def prompt(self, prompt_id: int) -> Answer:
        """The row of `prompts` of one prompt. Raises BacklensError if there is none."""
        with self._prompt_question(prompt_id) as opened:
            return Answer(names.check_prompt(self.snapshot, opened, prompt_id))

    def by_prompt(
        self, prompt_id: int, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """The rows of `tokens` of one prompt, with texts: layers × modules × positions."""
        return self._of_prompt(questions.HEATMAP, prompt_id, limit=limit, layer=layer, module=module)

    def heatmap(self, prompt_id: int, module: str = "mlp.down") -> Heatmap:
        """The heatmap of one prompt and module. Raises BacklensError if the run has no rows of it."""
        (prompt,) = self.prompt(prompt_id).to_pylist()
        rows = self.by_prompt(prompt_id, module=module).to_pylist()
        if not rows:
            raise BacklensError(
                f"heatmap: {self.snapshot.directory} has no rows of prompt {prompt_id} and {module}"
            )
        *tokens, target = self.token_texts([*prompt["token_ids"], prompt["target_ids"][0]])
        return make_heatmap(prompt, module, rows, tokens, target, self.vocabulary)

    def prompt_neurons(
        self, prompt_id: int, limit: int | None = None, layer: int | None = None, module: str | None = None
    ) -> Answer:
        """The neurons that are kept for a prompt, the largest gradient norm first."""
        return self._of_prompt(questions.PROMPT_NEURONS, prompt_id, limit=limit, layer=layer, module=module)

    def target_ranks(
        self,
        prompt_id: int,
        limit: int | None = None,
        layer: int | None = None,
        module: str | None = None,
        position: int | None = None,
    ) -> Answer:
        """The target's raw rank (0 = highest score) by layer at one position of a prompt, by default its last."""
        given = {"limit": limit, "layer": layer, "module": module, "position": position}
        return self._of_prompt(questions.TARGET_RANKS, prompt_id, **given)

    def prominent_tokens(
        self,
        prompt_id: int | None = None,
        limit: int | None = None,
        layer: int | None = None,
        module: str | None = None,
    ) -> Answer:
        """The tokens that stand out at some layer, at the positions of a prompt or, without one, in all neurons."""
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
        """Two prompts by layer and module: gradient norms, raw ranks at the last position, kept and shared neurons."""
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
        """Two runs by layer and module: means of norms and ranks over the prompts whose text is in both."""
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
        """Counts by layer and module: prompts, positions, kept neurons, zero gradients."""
        return self._ask(questions.COVERAGE, limit=limit, layer=layer, module=module)

    def modules(self, module: str | None = None, prompt_id: int | None = None) -> list[str]:
        """The modules with rows of positions, for one prompt or for any; only `module` if it is given."""
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
        """Mean norms, mean raw ranks and entropies by layer, module and position class."""
        return self._ask(questions.LAYER_CURVES, limit=limit, layer=layer, module=module)

    def sql(self, statement: str, limit: int | None = None, as_text: bool = False) -> Answer:
        """The rows of one SELECT over the tables. Raises BacklensError for any other statement.

        `as_text` gives values that JSON has no type for, such as dates and blobs, in DuckDB's notation.
        """

        def count() -> int:
            with connection(self.snapshot.database(self.memory), self.seconds) as again:
                return count_rows(again, statement)

        with connection(self.snapshot.database(self.memory), self.seconds) as opened:
            rows = run_select(opened, statement, limit, as_text)
            return Answer(rows, count if limit is not None and rows.num_rows == limit else None)

    @cached_property
    def _database(self) -> Database:
        """The database of all questions, opened for the first one."""
        return self.snapshot.database(self.memory, is_kept=True)

    def question(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A cursor over the tables, for trusted SELECTs. Raises BacklensError for an edit sweep."""
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
            if answer.num_rows == 0:  # checked only now: the check takes half as long as an answer
                names.check_prompt(self.snapshot, opened, prompt_id)
            return answer

    def _ask(self, question: str, **given: Any) -> Answer:
        with self.question() as opened:
            names.check_place(self.snapshot, opened, given.get("layer"), given.get("module"))
            return _answer(opened, question, given, self.question)


Asking = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]
"""A function that opens a run for one question."""


def _answer(
    opened: duckdb.DuckDBPyConnection, question: str, given: Mapping[str, Any], again: Asking
) -> Answer:
    """The answer. If its limit may have cut it, `again` opens the run once more to count the rows on request."""
    rows = names.with_texts(opened, _select(opened, question, given))

    def count() -> int:
        with again() as asked:
            counted = f"SELECT count(*) AS rows FROM ({question})"
            return _select(asked, counted, {**given, "limit": None})["rows"][0].as_py()

    return Answer(rows, count if given.get("limit") == rows.num_rows else None)


def _select(opened: duckdb.DuckDBPyConnection, question: str, given: Mapping[str, Any]) -> pa.Table:
    """The rows of a question, with the values that it has parameters for."""
    bound = {name: value for name, value in given.items() if f"${name}" in question}
    return opened.sql(question, params=bound).to_arrow_table()
