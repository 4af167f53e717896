"""The explorer as an ASGI application: addresses to pages, each in three forms, and refusals to one line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlencode

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from pipeline.errors import BacklensError
from pipeline.serve.name_pages import neuron_page, search_page, token_page
from pipeline.serve.page import Page, Served
from pipeline.serve.parameters import Missing, Parameters
from pipeline.serve.prompt_pages import compare_page, prompt_page
from pipeline.serve.render import as_html
from pipeline.serve.run_pages import about_page, layers_page, run_page
from pipeline.serve.security import Guard
from pipeline.serve.sql_page import sql_page
from pipeline.serve.standing import NotNow, Standing
from pipeline.serve.twins import as_csv, as_json

Form = Literal["html", "json", "csv"]
MEDIA: dict[Form, str] = {"html": "text/html", "json": "application/json", "csv": "text/csv"}
STATUS: Mapping[type[Exception], int] = {Missing: 404, NotNow: 503}
TITLES = {404: "Not found", 503: "Not now"}
AT_ONCE = 2
"""Pages that are made at the same time; each takes memory and all cores."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a page is, what makes it, and the parameters it takes."""

    path: str
    make: Callable[[Served, Mapping[str, str], Parameters], Page]
    parameters: Sequence[str] = ()


ADDRESSES = (
    Address("/", run_page, ("limit",)),
    Address("/search", search_page, ("q", "limit")),
    Address("/token", token_page, ("text", "show", "limit")),
    Address("/neuron/{address}", neuron_page, ("show", "limit")),
    Address("/prompt/{prompt_id}", prompt_page, ("module", "limit")),
    Address("/compare", compare_page, ("one", "two", "module", "limit")),
    Address("/layers", layers_page, ("module", "by")),
    Address("/about", about_page),
)
SQL = Address("/sql", sql_page, ("q", "limit"))


def make_app(served: Served, hosts: Sequence[str]) -> Starlette:
    """The explorer of one run, answering under these host names."""
    addresses = (*ADDRESSES, SQL) if served.has_sql else ADDRESSES
    standing = Standing(served)
    pages, queries = CapacityLimiter(AT_ONCE), CapacityLimiter(1)
    routes: list[Route | Mount] = []
    for address in addresses:
        limiter = queries if address is SQL else pages
        for form in ("json", "csv", "html"):  # `/neuron/{address}` would match its twins too
            endpoint = partial(_answer, standing, address, form, limiter)
            routes.append(Route(_path(address, form), endpoint, name=f"{address.path} {form}"))
    routes.append(Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")))
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={
            BacklensError: partial(_refuse, standing),
            HTTPException: partial(_refuse, standing),
        },
    )
    app.router.redirect_slashes = False
    return app


async def _answer(
    standing: Standing, address: Address, form: Form, limiter: CapacityLimiter, request: Request
) -> Response:
    return await to_thread.run_sync(_answered, standing, address, form, request, limiter=limiter)


def _answered(standing: Standing, address: Address, form: Form, request: Request) -> Response:
    served = standing.now()
    try:
        return _make(served, address, form, request)
    except BacklensError:
        # Its files may have been those of an atlas that has just been replaced.
        if (again := standing.looked_at_again()) is served:
            raise
        return _make(again, address, form, request)


def _make(served: Served, address: Address, form: Form, request: Request) -> Response:
    extra = ("table",) if form == "csv" else ()
    query = parse_qsl(
        request.scope["query_string"].decode("latin-1"), keep_blank_values=True, errors="replace"
    )
    given = Parameters(query, (*address.parameters, *extra), is_for_programs=form != "html")
    page = address.make(served, request.path_params, given)
    if form == "csv":
        content = as_csv(page, given.text("table"))
    elif form == "json":
        facts = {"run": served.out, "note": served.atlas.note, "cut_off": str(served.atlas.cut_off)}
        content = as_json(page, facts)
    else:
        path = "/index" if request.scope["path"] == "/" else request.scope["path"]
        twins = {kind: _with_query(f"{path}.{kind}", query) for kind in ("json", "csv")}
        content = as_html(page, served, path=request.scope["path"], query=dict(query), twins=twins)
    return Response(content, media_type=MEDIA[form])


def _refuse(standing: Standing, request: Request, error: Exception) -> Response:
    """One clear line, as a page or as its twin would say it."""
    path = request.scope["path"]
    if isinstance(error, HTTPException):
        status = error.status_code
        line = f"there is no page {path[:80]!r} here" if status == 404 else str(error.detail)
    else:
        status, line = STATUS.get(type(error), 400), str(error)
    if path.endswith((".json", ".csv")):
        return PlainTextResponse(f"{line}\n", status)
    page = Page("error.html", TITLES.get(status, "Not understood"), view={"line": line})
    words = request.query_params.get("text") or request.query_params.get("q") or ""
    around = {"path": path, "query": {}, "twins": {}, "words": words}
    return Response(as_html(page, standing.last, **around), status, media_type=MEDIA["html"])


def _path(address: Address, form: Form) -> str:
    if form == "html":
        return address.path
    return f"/index.{form}" if address.path == "/" else f"{address.path}.{form}"


def _with_query(path: str, query: Sequence[tuple[str, str]]) -> str:
    kept = [(name, value) for name, value in query if value]
    return f"{path}?{urlencode(kept)}" if kept else path
