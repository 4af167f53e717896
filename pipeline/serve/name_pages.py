"""The pages of what has a name: search, a token, a neuron."""

import re
from collections.abc import Mapping
from functools import partial

from pipeline.atlas import names, questions
from pipeline.atlas.address import Neuron, parse_neuron
from pipeline.errors import BacklensError
from pipeline.plot.heatmap import SHIFTS
from pipeline.serve import lookups
from pipeline.serve.asked import ask, look_up, neuron_values, together
from pipeline.serve.charts import histogram
from pipeline.serve.page import Beside, Page, Served
from pipeline.serve.parameters import Parameters, is_named_by_the_address, one_of

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
            "is_shift": neuron.module in SHIFTS,
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
