"""`backlens serve` and `backlens export-html`: a run in a browser."""

import contextlib
import socket
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from backlens.cli.console import say
from backlens.errors import BacklensError
from backlens.store.directory import replacing

Debug = Annotated[bool, Parameter(negative=(), help="Show the traceback of an error.")]
SECONDS = 10.0
"""A page may take."""
MEMORY = "400MB"
"""For DuckDB: all questions that are asked at a time, together."""
LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    out: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8050,
    allow_host: list[str] | None = None,
    sql: Annotated[bool, Parameter(negative=())] = False,
    debug: Debug = False,
) -> int:
    """Explore a run in a browser, on this machine only (needs the extra: pip install "backlens[serve]").

    Tokens, neurons, prompts and layers; every page has an address to keep, and twins in JSON and CSV. Needs the
    atlas (`backlens atlas OUT`), never writes, and has no password. Ctrl-C stops it.

    Example: backlens serve ./demo-run

    Parameters
    ----------
    out
        The run directory.
    host
        The address to listen on. Other than 127.0.0.1, whoever reaches it can read the run.
    port
        0 for any that is free.
    allow_host
        Another name under which browsers reach it, such as that of a proxy; may be repeated.
    sql
        Also a page that runs a visitor's SELECT, with limits on time, memory and rows.
    """
    _require_extra()
    import uvicorn

    from backlens.atlas import Atlas
    from backlens.serve.app import OWN_HOSTS, make_app, require_atlas
    from backlens.serve.page import Served

    atlas = Atlas(out, seconds=SECONDS, memory=MEMORY)
    require_atlas(atlas, out)
    if atlas.note:
        say(atlas.note, stderr=True)
    app = make_app(Served.of(atlas, out, sql), [*OWN_HOSTS, _in_url(host), *(allow_host or [])])
    with listening(host, port) as listener:
        bound = listener.getsockname()[1]
        say(f"serving {out} on http://{_in_url(host)}:{bound}/ (Ctrl-C stops)")
        if host not in LOCAL:
            say("whoever reaches this address can read the run: there is no password", stderr=True)
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, lifespan="off", timeout_graceful_shutdown=2
        )
        # Ctrl-C is how a server is meant to end: uvicorn ends, and raises it once more.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    return 0


def export_html(out: str, /, *, prompt: int, to: str | None = None, debug: Debug = False) -> int:
    """Write one prompt's heatmaps, ranks and neurons as an HTML file that needs no server and no network.

    Example: backlens export-html ./demo-run --prompt 37

    Parameters
    ----------
    out
        The run directory.
    prompt
        A prompt_id.
    to
        The file; by default prompt-37.html for prompt 37.
    """
    from backlens.atlas import Atlas
    from backlens.serve.pages import prompt_document

    target = Path(to or f"prompt-{prompt}.html")
    if not target.parent.is_dir():
        raise BacklensError(f"--to {target}: there is no folder {target.parent}; make it first")
    atlas = Atlas(out, seconds=SECONDS, memory=MEMORY)
    if atlas.note:
        say(atlas.note, stderr=True)
    _write(target, prompt_document(atlas, out, prompt))
    say(target)
    return 0


def _write(target: Path, document: str) -> None:
    """Whole or not at all."""
    try:
        with replacing(target) as temporary:
            Path(temporary).write_text(document, "utf-8")
    except OSError as error:
        raise BacklensError(f"--to {target}: cannot be written ({error.strerror or error})") from error


def _require_extra() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BacklensError(
            f'serve: {error.name} is not installed; install the extra: pip install "backlens[serve]"'
        ) from error


def listening(host: str, port: int) -> socket.socket:
    """A socket whose answers leave at once.

    asyncio sees to that for sockets of its own making; without it small pages wait 40 ms for the client's ACK.
    """
    if not 0 <= port <= 65535:
        raise BacklensError(f"--port {port}: give 1 to 65535, or 0 for any that is free")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BacklensError(
            f"serve: cannot listen on {host}, port {port} ({said}); give another --port, 0 for any that is free"
        ) from error


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
