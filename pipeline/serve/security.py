"""What every answer of the explorer carries, and which requests get none.

The explorer has no password, so a web page that its user has open elsewhere must neither read it nor steer it. It
answers only under its own names (else a stranger's domain could be pointed at 127.0.0.1: DNS rebinding), and its
pages load and run nothing but its own files.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    """Lets reading requests to known hosts through, and adds the headers to every answer."""

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
    """The host of the one `Host` header, without its port; None if there are none or several."""
    if len(given) != 1:
        return None
    name, _, port = given[0].lower().rpartition(":")
    return name if name and port.isascii() and (port.isdigit() or not port) else given[0].lower()
