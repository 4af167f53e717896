"""The pages of what has a name: search, a token, a neuron.

The pages of the run as a whole: its card, its layers, and what its tables mean.

The page of free SQL, which is there only if it was asked for (`backlens serve --sql`).
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from backlens.atlas import names, questions
from backlens.atlas.evidence import PRIOR
from backlens.atlas.names import Neuron, parse_neuron
from backlens.atlas.tables import ATLAS_TABLES
from backlens.errors import BacklensError
from backlens.figures.curves import CLASSES
from backlens.heatmap import kind_of
from backlens.serve import questions as lookups
from backlens.serve.charts import Chart, Points, histogram, line_chart
from backlens.serve.page import Beside, Page, Parameters, Served, is_named_by_the_address, one_of
from backlens.serve.questions import AnsweredQuestion, Row, ask, look_up, neuron_values, together
from backlens.serve.sandbox import MOST_BYTES, MOST_ROWS, SECONDS, ask_sandbox
from backlens.store.tables import SIGN_CONVENTION, TABLES
from backlens.terms import WRITES

FOUND = 50
ROWS = 20
SIMILAR = 10

TOKEN_SHOWS = ("neurons", "places")
NEURON_SHOWS = ("similar",)


def search_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """Tokens by their text in all its variants, and prompts; without words, the first prompts."""
    q = given.text("q")
    limit = given.limit(FOUND)
    with served.atlas.question() as opened:
        prompts = look_up(opened, "prompts", lookups.SEARCH_PROMPTS, q=q, limit=limit)
        if q is None:
            return Page("search.html", "Search", (prompts,), {"q": ""})
        tokens = look_up(opened, "tokens", lookups.SEARCH_TOKENS, q=q, limit=limit)
    place = re.fullmatch(r"\s*(\d+\.[a-z]+\.[a-z]+\.(?:e\d+\.)?\d+)\s*", q, re.ASCII)
    view = {"neuron": place[1] if place and _is_there(served, place[1]) else None}
    return Page("search.html", f"Search: {q}", (tokens, prompts), {"q": q}, view)


def token_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """Where gradients push toward a token and away from it; with `show=places` every list that it stands in."""
    atlas = served.atlas
    text = given.text("text") or ""
    show = one_of("show", given.text("show"), TOKEN_SHOWS) or "neurons"
    with is_named_by_the_address(), served.atlas.question() as opened:
        ids = names.token_ids(opened, text)
    limit = given.limit(ROWS)
    layers = ask("layers", atlas.token_layers, questions.TOKEN_LAYERS, text, given.most(1000), ids=ids)
    if show == "places":
        shown = ask("places", atlas.by_token, questions.TOKEN_PLACES, text, limit, ids=ids)
    else:
        shown = ask("neurons", atlas.token_neurons, questions.TOKEN_NEURONS, text, limit, ids=ids)
    return Page(
        "token.html",
        f"Token {text!r}",
        (shown, layers),
        {"text": text, "token_ids": ids},
        {
            "show": show,
            "promoted": sum(row["promoted"] for row in layers.rows),
            "demoted": sum(row["demoted"] for row in layers.rows),
        },
    )


def neuron_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """What all prompts say to a neuron and its strongest prompts; with `show=similar` who is told the same.

    In a large run that takes seconds, so the page does not wait for it.
    """
    atlas = served.atlas
    show = one_of("show", given.text("show"), NEURON_SHOWS)
    limit = given.limit(ROWS)
    with is_named_by_the_address():
        neuron = parse_neuron(path["address"])
        address = str(neuron)
        summary = ask("summary", atlas.neuron_summary, questions.NEURON_SUMMARY, address)
    values = neuron_values(neuron)
    with served.atlas.question() as opened:
        near = look_up(opened, "near", lookups.NEAR_NEURONS, **values).rows[0]
        norms = look_up(opened, "histogram", lookups.HISTOGRAM, **values)
    similar = partial(
        ask, "similar", atlas.similar_neurons, questions.SIMILAR_NEURONS, address, given.most(SIMILAR)
    )
    found = together(
        partial(ask, "tokens", atlas.neuron_tokens, questions.NEURON_TOKENS, address, limit),
        partial(ask, "prompts", atlas.by_neuron, questions.NEURON_PROMPTS, address, limit),
        *([similar] if show else []),
    )
    counts = [(row["norm_from"], row["norm_to"], row["prompts"]) for row in norms.rows]
    return Page(
        "neuron.html",
        f"Neuron {address}",
        (summary, norms, *found),
        {"neuron": address, "kept_neurons": near["kept_neurons"]},
        {
            "histogram": histogram("prompts by gradient norm", counts),
            "prompts": atlas.snapshot.record.plan.prompts,
            "is_shift": neuron.module in WRITES,
            "show": show,
            "is_known": "neurons" in atlas.snapshot.record.model,
        },
        Beside(_address(neuron, near["previous"]), _address(neuron, near["next"])),
    )


def _is_there(served: Served, address: str) -> bool:
    try:
        with served.atlas.question() as opened:
            names.check_neuron(served.atlas.snapshot, opened, parse_neuron(address))
    except BacklensError:
        return False
    return True


def _address(neuron: Neuron, index: int | None) -> str | None:
    if index is None:
        return None
    return f"/neuron/{Neuron(neuron.layer, neuron.module, index, neuron.expert)}"


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
