"""The explorer as an ASGI application: addresses, the three forms of each page, and errors in one line.

The explorer has no password, so a web page that its user has open elsewhere must neither read it nor control it. It
answers only under its own host names (otherwise a foreign domain could resolve to 127.0.0.1: DNS rebinding), and its
pages load nothing but its own files. A run is opened once, and again after `backlens atlas` has replaced its atlas.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlencode

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backlens.atlas import Atlas
from backlens.atlas.manifest import find_manifest
from backlens.errors import BacklensError
from backlens.serve.page import Missing, Page, Parameters, Served, as_csv, as_html, as_json
from backlens.serve.pages import (
    about_page,
    compare_page,
    layers_page,
    neuron_page,
    prompt_page,
    run_page,
    search_page,
    sql_page,
    token_page,
)

CHECK_EVERY = 1.0
"""Seconds between two checks of the atlas's record."""


class NotNow(BacklensError):
    """The run has no atlas that can be served at the moment."""


def require_atlas(atlas: Atlas, out: str) -> None:
    """Raise NotNow if the run has no current atlas: without one a page would take minutes."""
    atlas.snapshot.require_run()
    if not atlas.snapshot.is_current:
        raise NotNow(
            atlas.snapshot.atlas_note or f"serve: {out} has no atlas yet; build it: backlens atlas {out}"
        )


class CurrentRun:
    """The run in its present state. A request ends with the state that it began with, if the files still exist."""

    def __init__(self, served: Served) -> None:
        self.last = served
        """The state at the last check."""
        self._checked = time.monotonic()
        self._checking = threading.Lock()

    def now(self) -> Served:
        """The run, checked within the last second. Raises NotNow if it has no atlas any more."""
        if time.monotonic() - self._checked < CHECK_EVERY:
            return self.last
        return self.checked_again()

    def checked_again(self) -> Served:
        """The run, checked now. Raises NotNow if it has no atlas any more."""
        with self._checking:
            before = self.last.atlas
            if find_manifest(before.snapshot.directory) != before.snapshot.manifest:
                atlas = Atlas(before.snapshot.directory, before.seconds, before.memory)
                require_atlas(atlas, self.last.out)
                self.last = Served.of(atlas, self.last.out, self.last.has_sql)
            self._checked = time.monotonic()
            return self.last


METHODS = ("GET", "HEAD")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

OWN_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """Passes GET and HEAD requests to known hosts, refuses all others, and adds the headers to every response."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        if scope["method"] not in METHODS:
            allow = {"Allow": ", ".join(METHODS)}
            return PlainTextResponse("only GET and HEAD are answered here\n", 405, headers=allow)
        if host_name(Headers(scope=scope).getlist("host")) not in self._hosts:
            return PlainTextResponse(
                "not served under this host name; `backlens serve --allow-host NAME` adds one\n", 400
            )
        return None


def host_name(given: Sequence[str]) -> str | None:
    """The host of the `Host` header without its port; None if the header is missing or repeated."""
    if len(given) != 1:
        return None
    name, _, port = given[0].lower().rpartition(":")
    return name if name and port.isascii() and (port.isdigit() or not port) else given[0].lower()


Form = Literal["html", "json", "csv"]
MEDIA: dict[Form, str] = {"html": "text/html", "json": "application/json", "csv": "text/csv"}
STATUS: Mapping[type[Exception], int] = {Missing: 404, NotNow: 503}
TITLES = {404: "Not found", 503: "Not available now"}
AT_ONCE = 2
"""Pages that are made at a time; each takes memory and all cores."""


@dataclass(frozen=True, slots=True)
class Address:
    """The path of a page, the function that makes it, and its parameters."""

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
    """The explorer of one run, which answers under these host names."""
    addresses = (*ADDRESSES, SQL) if served.has_sql else ADDRESSES
    current = CurrentRun(served)
    pages, queries = CapacityLimiter(AT_ONCE), CapacityLimiter(1)
    routes: list[Route | Mount] = []
    for address in addresses:
        limiter = queries if address is SQL else pages
        for form in ("json", "csv", "html"):  # HTML last: `/neuron/{address}` matches its twins too
            endpoint = partial(_answer, current, address, form, limiter)
            routes.append(Route(_path(address, form), endpoint, name=f"{address.path} {form}"))
    routes.append(Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")))
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={
            BacklensError: partial(_refuse, current),
            HTTPException: partial(_refuse, current),
        },
    )
    app.router.redirect_slashes = False
    return app


async def _answer(
    current: CurrentRun, address: Address, form: Form, limiter: CapacityLimiter, request: Request
) -> Response:
    return await to_thread.run_sync(_answered, current, address, form, request, limiter=limiter)


def _answered(current: CurrentRun, address: Address, form: Form, request: Request) -> Response:
    served = current.now()
    try:
        return _make(served, address, form, request)
    except BacklensError:
        # Perhaps a file was missing because the atlas has just been replaced.
        if (again := current.checked_again()) is served:
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


def _refuse(current: CurrentRun, request: Request, error: Exception) -> Response:
    """The error in one line, in the form of the page that was asked for."""
    path = request.scope["path"]
    if isinstance(error, HTTPException):
        status = error.status_code
        line = f"there is no page {path[:80]!r} here" if status == 404 else str(error.detail)
    else:
        status, line = STATUS.get(type(error), 400), str(error)
    if path.endswith((".json", ".csv")):
        return PlainTextResponse(f"{line}\n", status)
    page = Page("error.html", TITLES.get(status, "Invalid request"), view={"line": line})
    words = request.query_params.get("text") or request.query_params.get("q") or ""
    around = {"path": path, "query": {}, "twins": {}, "words": words}
    return Response(as_html(page, current.last, **around), status, media_type=MEDIA["html"])


def _path(address: Address, form: Form) -> str:
    if form == "html":
        return address.path
    return f"/index.{form}" if address.path == "/" else f"{address.path}.{form}"


def _with_query(path: str, query: Sequence[tuple[str, str]]) -> str:
    kept = [(name, value) for name, value in query if value]
    return f"{path}?{urlencode(kept)}" if kept else path
