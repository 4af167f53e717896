"""The pages of the explorer: the run, search, a token, a neuron, a prompt, two prompts, layers, SQL.

Each function takes the served run, the parts of the address and the parameters, and returns a `Page`.
`prompt_document` is a prompt page as an HTML file of its own, with its style inside and without script or network.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from backlens.atlas import Atlas, names, questions
from backlens.atlas.definitions import PRIOR
from backlens.atlas.names import Neuron, parse_neuron
from backlens.atlas.tables import ATLAS_TABLES
from backlens.errors import BacklensError
from backlens.heatmap import (
    POSITION_CLASSES,
    Points,
    default_module,
    kind_of,
    make_heatmap,
    make_layer_curves,
)
from backlens.serve import questions as lookups
from backlens.serve.charts import Chart, histogram, line_chart
from backlens.serve.page import (
    Beside,
    Page,
    Parameters,
    Served,
    asset,
    environment,
    is_named_by_the_address,
    one_of,
    whole_number,
)
from backlens.serve.questions import AnsweredQuestion, Row, ask, look_up, neuron_values, together
from backlens.serve.sandbox import MOST_BYTES, MOST_ROWS, SECONDS, ask_sandbox
from backlens.store.tables import SIGN_CONVENTION, TABLES
from backlens.terms import WRITES

FOUND, ROWS, FEW, SIMILAR = 50, 20, 12, 10
"""Rows that tables show to people who do not ask for more."""

TOKEN_SHOWS = ("neurons", "places")
NEURON_SHOWS = ("similar",)


def search_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """Tokens and prompts that contain a text; without a text, the first prompts."""
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
    """The neurons whose updates promote or suppress a token; with `show=places` every list that holds it."""
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
            "suppressed": sum(row["suppressed"] for row in layers.rows),
        },
    )


def neuron_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """A neuron's tokens and strongest prompts; with `show=similar` also neurons with similar updates.

    Finding those takes seconds in a large run, so the page leaves them out unless they are asked for.
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
        Beside(*(_neuron_address(neuron, near[side]) for side in ("previous", "next"))),
    )


def _is_there(served: Served, address: str) -> bool:
    try:
        with served.atlas.question() as opened:
            names.check_neuron(served.atlas.snapshot, opened, parse_neuron(address))
    except BacklensError:
        return False
    return True


def _neuron_address(neuron: Neuron, index: int | None) -> str | None:
    if index is None:
        return None
    return f"/neuron/{Neuron(neuron.layer, neuron.module, index, neuron.expert)}"


def run_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """Facts about the run, with prompts, neurons and tokens to begin with."""
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
    """Curves by layer and position class, and means by group."""
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
        {"panels": [(name, kind_of(name), _charts(curves.rows, name, atlas.vocabulary)) for name in modules]},
    )


def about_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """The meaning of signs and columns, and the limits of the lens."""
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


def _charts(rows: Sequence[Row], module: str, vocabulary: int) -> list[Chart]:
    curves = make_layer_curves(rows, module, vocabulary)
    side = "promoted" if module in WRITES else "top"
    return [
        line_chart("mean norm of δ", _labelled(curves.norms), "log"),
        line_chart("mean rank of the target", _labelled(curves.ranks), "rank"),
        line_chart(f"entropy of the {side} token, bits", _labelled(curves.entropies), "linear"),
    ]


def _labelled(lines: Mapping[str, Points]) -> list[tuple[str, Points]]:
    """Lines with their labels, in the order of position classes: each class has one style on all charts."""
    return [(label, lines.get(name, {})) for name, label in POSITION_CLASSES.items()]


def prompt_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """One prompt and module: the heatmap, the target's rank by layer, the strongest neurons."""
    atlas, modules = served.atlas, served.modules
    module = one_of("module", given.text("module"), modules) or default_module(modules)
    with is_named_by_the_address():
        prompt_id = whole_number("prompt", path["prompt_id"])
        row = the_prompt(atlas, prompt_id)
    limit = given.limit(ROWS)
    cells, neurons, tokens = together(
        partial(ask, "cells", atlas.by_prompt, questions.HEATMAP, prompt_id, None, None, module),
        partial(
            ask, "neurons", atlas.prompt_neurons, questions.PROMPT_NEURONS, prompt_id, limit, None, module
        ),
        partial(
            ask,
            "tokens",
            atlas.prominent_tokens,
            questions.PROMINENT_IN_PROMPT,
            prompt_id,
            given.most(FEW),
            None,
            module,
        ),
    )
    with atlas.question() as opened:
        near = look_up(opened, "near", lookups.NEAR_PROMPTS, prompt_id=prompt_id).rows[0]
    *texts, target, predicted = atlas.token_texts(
        [*row["token_ids"], row["target_ids"][0], row["predicted_id"]]
    )
    heatmap = make_heatmap(row, module, cells.rows, texts, target, atlas.vocabulary)
    points = {line.position_class: line.points for line in heatmap.rank_lines}
    ranks = line_chart("rank of the target", _labelled(points), "rank")
    return Page(
        "prompt.html",
        f"Prompt {prompt_id}",
        (cells, neurons, tokens),
        facts={"prompt": row, "module": module},
        view={
            "heatmap": heatmap,
            "modules": modules,
            "kinds": {name: kind_of(name) for name in modules},
            "target": target,
            "predicted": predicted,
            "ranks": ranks,
        },
        beside=Beside(*(_prompt_address(near[side], module, modules) for side in ("previous", "next"))),
    )


def compare_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """Two prompts by layer and module, and the neurons that are kept for either."""
    atlas = served.atlas
    one, two = given.number("one"), given.number("two")
    if one is None or two is None:
        return Page("compare.html", "Compare two prompts", view={"one": one, "two": two, "pair": None})
    with is_named_by_the_address():
        pair = [the_prompt(atlas, prompt_id) for prompt_id in (one, two)]
    module = one_of("module", given.text("module"), served.modules)
    sides = ask("modules", atlas.compare_prompts, questions.COMPARE_PROMPTS, one, two, None, None, module)
    limit = given.limit(ROWS)
    values = {"one": one, "two": two, "module": module, "limit": limit}
    with atlas.question() as opened:
        neurons = look_up(opened, "neurons", lookups.COMPARE_NEURONS, **values)
    charts = [
        line_chart(f"gradient norm of {name}", _norm_lines(sides.rows, name, (one, two)), "log")
        for name in dict.fromkeys(row["module"] for row in sides.rows)
    ]
    return Page(
        "compare.html",
        f"Prompts {one} and {two}",
        (sides, neurons),
        facts={"prompts": pair},
        view={"one": one, "two": two, "pair": pair, "charts": charts, "modules": served.modules},
    )


def the_prompt(atlas: Atlas, prompt_id: int) -> Row:
    """The row of `prompts` of a prompt."""
    (row,) = atlas.prompt(prompt_id).to_pylist()
    return row


def _prompt_address(prompt_id: int | None, module: str, modules: Sequence[str]) -> str | None:
    if prompt_id is None:
        return None
    return f"/prompt/{prompt_id}" + ("" if module == default_module(modules) else f"?module={module}")


def _norm_lines(rows: Sequence[Row], module: str, pair: tuple[int, int]) -> list[tuple[str, Points]]:
    """The gradient's norm by layer, over all experts."""
    lines: list[tuple[str, Points]] = []
    for side, prompt_id in enumerate(pair, start=1):
        squares: dict[int, float] = defaultdict(float)
        for row in rows:
            if row["module"] == module and row[f"grad_norm_{side}"] is not None:
                squares[row["layer"]] += row[f"grad_norm_{side}"] ** 2
        lines.append((f"prompt {prompt_id}", {layer: square**0.5 for layer, square in squares.items()}))
    return lines


EXAMPLE = """SELECT layer, module, avg(grad_norm) AS grad_norm
FROM layers
GROUP BY layer, module
ORDER BY module, layer"""


def sql_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """The rows of one SELECT over the tables; served only with `--sql`."""
    statement = given.text("q")
    asked_for = given.limit(100)
    limit = MOST_ROWS if asked_for is None else asked_for
    view = {"example": EXAMPLE, "seconds": SECONDS, "most_rows": MOST_ROWS}
    if statement is None:
        return Page("sql.html", "SQL", facts={"q": "", "is_cut": False}, view=view)
    answer = ask_sandbox(served.out, statement, limit)
    if answer.is_cut and asked_for is None:
        raise BacklensError(
            f"sql: the query has more than {len(answer.rows):,} rows; this page gives at most {MOST_ROWS:,} rows "
            f"and {MOST_BYTES >> 20} MB; narrow the query, or give limit for the first rows"
        )
    rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
    table = AnsweredQuestion(
        "rows", answer.columns, rows, f"atlas.sql({statement!r}, limit={limit})", statement, answer.is_cut
    )
    facts = {"q": statement, "is_cut": answer.is_cut}
    return Page("sql.html", "SQL", (table,), facts, view)


def prompt_document(atlas: Atlas, out: str, prompt_id: int) -> str:
    """One prompt as an HTML document: heatmap, ranks and strongest neurons of every module."""
    atlas.prompt(prompt_id)
    served = Served.of(atlas, out)
    pages = [
        prompt_page(
            served, {"prompt_id": str(prompt_id)}, Parameters([("module", module)], ("module", "limit"))
        )
        for module in served.modules
    ]
    first = pages[0]
    return (
        environment()
        .get_template("export.html")
        .render(
            pages=pages,
            prompt=first.facts["prompt"],
            target=first.view["target"],
            predicted=first.view["predicted"],
            note=atlas.note,
            cut_off=str(atlas.cut_off),
            linked=False,
            vocabulary=served.vocabulary,
            style=asset("style.css"),
            sign_convention=SIGN_CONVENTION,
            # The last name only: a path says where the user keeps files.
            model=PurePath(str(atlas.snapshot.record.model.get("name", "a model"))).name,
        )
    )
