"""The pages of a prompt, and of two of them.

One prompt as an HTML file of its own: its style within, no script, and nothing that is fetched.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePath

from backlens.atlas import Atlas, questions
from backlens.errors import BacklensError
from backlens.heatmap import kind_of, make_heatmap
from backlens.serve import questions as lookups
from backlens.serve.charts import Points, line_chart
from backlens.serve.page import (
    Beside,
    Missing,
    Page,
    Parameters,
    Served,
    asset,
    environment,
    is_named_by_the_address,
    one_of,
    whole_number,
)
from backlens.serve.questions import Row, ask, look_up, together
from backlens.store.tables import SIGN_CONVENTION
from backlens.terms import WRITES

NEURONS = 20
TOKENS = 12
LINES = {
    "last": "last position",
    "subject_last": "subject, last token",
    "subject_first": "subject, first token",
}


def prompt_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """One prompt and one module: the heatmap, the target's rank by layer, the strongest neurons."""
    atlas, modules = served.atlas, served.modules
    module = one_of("module", given.text("module"), modules) or default_module(modules)
    with is_named_by_the_address():
        prompt_id = whole_number("prompt", path["prompt_id"])
        row = the_prompt(atlas, prompt_id)
    limit = given.limit(NEURONS)
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
            given.most(TOKENS),
            None,
            module,
        ),
    )
    ids = [*row["token_ids"], row["target_ids"][0], row["predicted_id"]]
    with served.atlas.question() as opened:
        near = look_up(opened, "near", lookups.NEAR_PROMPTS, prompt_id=prompt_id).rows[0]
        found = look_up(opened, "texts", lookups.TOKEN_TEXTS, ids=ids).rows
    named = {token["token_id"]: token["token"] for token in found}
    texts = [named.get(token_id, f"<{token_id}>") for token_id in ids]
    heatmap = make_heatmap(module, texts[:-2], cells.rows, row["prompt"], row["target"], texts[-2])
    lines = _rank_lines(row, cells.rows, module, served.vocabulary)
    ranks = line_chart("rank of the target", lines, "rank")
    return Page(
        "prompt.html",
        f"Prompt {prompt_id}",
        (cells, neurons, tokens),
        facts={"prompt": row, "module": module},
        view={
            "heatmap": heatmap,
            "modules": modules,
            "kinds": {name: kind_of(name) for name in modules},
            "target": texts[-2],
            "predicted": texts[-1],
            "ranks": ranks,
            "is_shift": module in WRITES,
        },
        beside=Beside(*(_address(near[side], module, modules) for side in ("previous", "next"))),
    )


def compare_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """Two prompts by layer and module, and the neurons that either of them keeps."""
    atlas = served.atlas
    one, two = given.number("one"), given.number("two")
    if one is None or two is None:
        return Page("compare.html", "Compare two prompts", view={"one": one, "two": two, "pair": None})
    try:
        pair = [the_prompt(atlas, prompt_id) for prompt_id in (one, two)]
    except BacklensError as error:
        raise Missing(str(error)) from error
    module = one_of("module", given.text("module"), served.modules)
    sides = ask("modules", atlas.compare_prompts, questions.COMPARE_PROMPTS, one, two, None, None, module)
    limit = given.limit(NEURONS)
    values = {"one": one, "two": two, "module": module, "limit": limit}
    with served.atlas.question() as opened:
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
    """The prompt's row of `prompts`."""
    (row,) = atlas.prompt(prompt_id).to_pylist()
    return row


def default_module(modules: Sequence[str]) -> str:
    """What an update writes, if it is there."""
    return "mlp.down" if "mlp.down" in modules or not modules else modules[0]


def _address(prompt_id: int | None, module: str, modules: Sequence[str]) -> str | None:
    if prompt_id is None:
        return None
    return f"/prompt/{prompt_id}" + ("" if module == default_module(modules) else f"?module={module}")


def _rank_lines(prompt: Row, rows: Sequence[Row], module: str, vocabulary: int) -> list[tuple[str, Points]]:
    """The target's rank by layer at the last position and the subject's ends, counted from the side that speaks."""
    positions = {"last": prompt["n_tokens"] - 1}
    if prompt["subject_start"] is not None:
        positions |= {"subject_last": prompt["subject_end"] - 1, "subject_first": prompt["subject_start"]}
    lines: list[tuple[str, Points]] = []
    drawn: set[int] = set()
    for name, position in positions.items():
        points = {}
        for row in sorted(rows, key=lambda row: row["vjp_norm"]):
            if row["position"] == position and row["target_rank"] is not None:
                rank = row["target_rank"]
                points[row["layer"]] = float(vocabulary - 1 - rank if module in WRITES else rank)
        lines.append((LINES[name], {} if position in drawn else points))
        drawn.add(position)
    return lines


def _norm_lines(rows: Sequence[Row], module: str, pair: tuple[int, int]) -> list[tuple[str, Points]]:
    """The gradient's norm by layer; of experts, all together."""
    lines: list[tuple[str, Points]] = []
    for side, prompt_id in enumerate(pair, start=1):
        squares: dict[int, float] = defaultdict(float)
        for row in rows:
            if row["module"] == module and row[f"grad_norm_{side}"] is not None:
                squares[row["layer"]] += row[f"grad_norm_{side}"] ** 2
        lines.append((f"prompt {prompt_id}", {layer: square**0.5 for layer, square in squares.items()}))
    return lines


def prompt_document(atlas: Atlas, out: str, prompt_id: int) -> str:
    """The prompt's heatmap, ranks and strongest neurons of every module that the run has."""
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
            style=asset("style.css"),
            sign_convention=SIGN_CONVENTION,
            # A path would say where the run's user keeps things.
            model=PurePath(str(atlas.snapshot.record.model.get("name", "a model"))).name,
        )
    )
