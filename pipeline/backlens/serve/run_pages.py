"""The pages of the run as a whole: its card, its layers, and what its tables mean.

The page of free SQL, which is there only if it was asked for (`backlens serve --sql`).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from backlens.atlas import questions
from backlens.atlas.evidence import PRIOR
from backlens.atlas.tables import ATLAS_TABLES
from backlens.errors import BacklensError
from backlens.figures.curves import CLASSES
from backlens.heatmap import kind_of
from backlens.serve import questions as lookups
from backlens.serve.charts import Chart, Points, line_chart
from backlens.serve.page import Page, Parameters, Served, one_of
from backlens.serve.questions import AnsweredQuestion, Row, ask, look_up
from backlens.serve.sandbox import MOST_BYTES, MOST_ROWS, SECONDS, ask_sandbox
from backlens.store.tables import SIGN_CONVENTION, TABLES
from backlens.terms import WRITES

FEW = 12


def run_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """What the run is, and where to begin."""
    atlas = served.atlas
    limit = given.limit(FEW)
    with served.atlas.question() as opened:
        prompts = look_up(opened, "prompts", lookups.SEARCH_PROMPTS, q=None, limit=limit)
    return Page(
        "run.html",
        "Run",
        (
            ask("coverage", atlas.coverage, questions.COVERAGE),
            prompts,
            ask("specific", atlas.specific_neurons, questions.SPECIFIC_NEURONS, limit),
            ask("tokens", atlas.prominent_tokens, questions.PROMINENT_TOKENS, None, limit),
        ),
        _facts(served),
    )


def layers_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """The curves by layer and kind of position, and means by group."""
    atlas = served.atlas
    module = one_of("module", given.text("module"), served.modules)
    by = given.text("by") or "relation"
    pointer = "/" + by.replace("~", "~0").replace("/", "~1")
    groups = ask(
        "groups", atlas.groups, questions.GROUPS, by, given.most(1000), None, module, pointer=pointer
    )
    curves = ask("curves", atlas.layer_curves, questions.LAYER_CURVES, None, None, module)
    modules = list(dict.fromkeys(row["module"] for row in curves.rows))
    return Page(
        "layers.html",
        "Layers",
        (curves, groups),
        {"by": by},
        {"panels": [(name, kind_of(name), _charts(curves.rows, name)) for name in modules]},
    )


def about_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """What signs and columns mean, and what may not be concluded."""
    columns = [
        {"table": table.name, "column": column.name, "type": str(column.type), "doc": column.doc}
        for table in (*TABLES.values(), *ATLAS_TABLES.values())
        for column in table.columns
    ]
    tables = [*TABLES.values(), *ATLAS_TABLES.values()]
    facts = {"sign_convention": SIGN_CONVENTION, "columns": columns}
    return Page("about.html", "About", facts=facts, view={"tables": tables, "prior": f"{PRIOR:g}"})


def _facts(served: Served) -> dict[str, Any]:
    snapshot = served.atlas.snapshot
    record, manifest = snapshot.record, snapshot.manifest
    return {
        "status": record.status,
        "shards": snapshot.shards,
        "planned_shards": record.plan.shards,
        "planned_prompts": record.plan.prompts,
        "model": dict(record.model),
        "config": dict(record.config),
        "versions": dict(record.versions),
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "atlas_rows": {} if manifest is None else manifest.rows,
    }


def _charts(rows: Sequence[Row], module: str) -> list[Chart]:
    of_module = [row for row in rows if row["module"] == module]
    # An update writes the bottom of δ, so that is the side whose tokens matter there.
    spoken = "bottom_entropy" if module in WRITES else "top_entropy"
    return [
        line_chart("mean ‖δ‖", _lines(of_module, "vjp_norm"), "log"),
        line_chart("mean rank of the target", _lines(of_module, "target_rank"), "rank"),
        line_chart(f"entropy of the {spoken.split('_')[0]} token, bits", _lines(of_module, spoken), "linear"),
    ]


def _lines(rows: Sequence[Row], column: str) -> list[tuple[str, Points]]:
    """By kind of position; over experts by how many positions each has; what is null is left out."""
    lines: list[tuple[str, Points]] = []
    for name, (label, _) in CLASSES.items():
        sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row in rows:
            if row["position_class"] == name and row[column] is not None:
                sums[row["layer"]][0] += row[column] * row["positions"]
                sums[row["layer"]][1] += row["positions"]
        lines.append((label, {layer: total / weight for layer, (total, weight) in sums.items()}))
    return lines


EXAMPLE = """SELECT layer, module, avg(grad_norm) AS grad_norm
FROM layers
GROUP BY layer, module
ORDER BY module, layer"""


def sql_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """One SELECT over the tables."""
    statement = given.text("q")
    asked_for = given.limit(100)
    limit = MOST_ROWS if asked_for is None else asked_for
    view = {"example": EXAMPLE, "seconds": SECONDS, "most_rows": MOST_ROWS}
    if statement is None:
        return Page("sql.html", "SQL", facts={"q": "", "is_cut": False}, view=view)
    answer = ask_sandbox(served.out, statement, limit)
    if answer.is_cut and asked_for is None:
        raise BacklensError(
            f"sql: there are more than these {len(answer.rows):,} rows, and this page gives at most {MOST_ROWS:,} "
            f"and {MOST_BYTES >> 20} MB; narrow the query, or give limit for the first of them"
        )
    rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
    asked = AnsweredQuestion(
        "rows", answer.columns, rows, f"atlas.sql({statement!r}, limit={limit})", statement, answer.is_cut
    )
    facts = {"q": statement, "is_cut": answer.is_cut}
    return Page("sql.html", "SQL", (asked,), facts, view)
