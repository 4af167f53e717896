"""`backlens serve`, `export-html` and `plot`: a run in a browser, in one HTML file, and as a figure."""

import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from backlens.cli.console import Debug, require_folder, say
from backlens.errors import BacklensError, nearest
from backlens.store.directory import replacing

if TYPE_CHECKING:
    from backlens.atlas import Atlas

SECONDS = 10.0
"""Longest time for a page."""
MEMORY = "400MB"
"""Memory of DuckDB, for all pages at a time together."""
LOCAL = ("127.0.0.1", "localhost", "::1")
FIGURES = ("heatmap", "norms", "ranks", "curves")


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

    Shows tokens, neurons, prompts and layers; every page has a permanent address, and JSON and CSV under similar ones.
    Needs the atlas (`backlens atlas OUT`), never writes, and has no password. Ctrl-C stops it.

    Example: backlens serve ./demo-run

    Parameters
    ----------
    out
        The run directory.
    host
        The address to listen on. At any other than 127.0.0.1, everybody who reaches it can read the run.
    port
        The port; 0 for any free one.
    allow_host
        Another host name that browsers use for it, such as that of a proxy; may be repeated.
    sql
        Add a page that runs a visitor's SELECT, with limits on time, memory and rows.
    """
    _check_port(port)
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
        # Ctrl-C is the usual end of a server: uvicorn ends, and raises it again.
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
    target = Path(to or f"prompt-{prompt}.html")
    require_folder(str(target), "--to")
    from backlens.atlas import Atlas
    from backlens.serve.pages import prompt_document

    atlas = Atlas(out, seconds=SECONDS, memory=MEMORY)
    if atlas.note:
        say(atlas.note, stderr=True)
    _write(target, prompt_document(atlas, out, prompt))
    say(target)
    return 0


def _write(target: Path, document: str) -> None:
    """Write the file whole or not at all."""
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
    """Open a socket that sends small answers at once.

    asyncio does this for the sockets that it makes; otherwise small pages wait 40 ms for the client's ACK.
    """
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


def _check_port(port: int) -> None:
    if not 0 <= port <= 65535:
        raise BacklensError(f"--port {port}: give 1 to 65535, or 0 for any that is free")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def draw(out: str, figure: str | None, prompt: int | None, module: str | None, to: str | None) -> int:
    """Draw one figure of a run to a file, and return the exit status."""
    kind = figure or ("curves" if prompt is None else "heatmap")
    if kind not in FIGURES:
        raise BacklensError(f"--figure {kind}: there are {', '.join(FIGURES)}{nearest(kind, FIGURES)}")
    if prompt is None and kind != "curves":
        raise BacklensError(f"plot: the figure {kind} shows one prompt; give --prompt")
    if prompt is not None and kind == "curves":
        raise BacklensError("plot: curves show all prompts; leave out --prompt, or use --figure ranks")
    from backlens.figures import check_target, missing_letters, require_matplotlib, save

    require_matplotlib()
    target = check_target(to or _file_name(kind, prompt, module))
    is_vector = target.suffix.lower() == ".svg"
    from backlens.atlas import Atlas

    atlas = Atlas(out)
    if atlas.note:
        say(atlas.note, stderr=True)
    from backlens.figures.curves import draw_curves, draw_ranks
    from backlens.figures.heatmap import draw_heatmap
    from backlens.heatmap import default_module, make_layer_curves

    note = None
    if prompt is None:
        rows, vocabulary = atlas.layer_curves().to_pylist(), atlas.vocabulary
        curves = {name: make_layer_curves(rows, name, vocabulary) for name in _modules(atlas, module)}
        drawn = draw_curves(curves, _prompts(atlas))
    elif kind == "ranks":
        heatmaps = [atlas.heatmap(prompt, name) for name in _modules(atlas, module, prompt)]
        drawn = draw_ranks(heatmaps, is_vector)
        note = missing_letters([heatmaps[0].prompt], is_vector)
    else:
        heatmap = atlas.heatmap(prompt, module or default_module(_modules(atlas, None, prompt)))
        drawn = draw_heatmap(heatmap, is_vector, "norms" if kind == "norms" else "tokens")
        note = missing_letters(heatmap.texts, is_vector)
    if note is not None:
        say(note, stderr=True)
    save(drawn, target)
    say(target)
    return 0


def _modules(atlas: "Atlas", module: str | None, prompt: int | None = None) -> list[str]:
    found = atlas.modules(module, prompt)
    if not found:
        raise BacklensError(f"plot: {atlas.snapshot.directory} has no rows to draw")
    return found


def _prompts(atlas: "Atlas") -> str:
    """The prompts that a figure of the whole run is about."""
    shards, planned = atlas.snapshot.shards, atlas.snapshot.record.plan.shards
    return "all prompts of the run" if shards == planned else f"{shards} of {planned} shards of the run"


def _file_name(kind: str, prompt: int | None, module: str | None) -> str:
    parts = [kind, *([] if prompt is None else [str(prompt)]), *([] if module is None else [module])]
    return f"{'-'.join(parts)}.png"
