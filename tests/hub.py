"""A hub of models on this machine, over HTTP, which notes what it is asked for."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """One model, whose branch `main` is at the last commit that was pushed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.commits: dict[str, Path] = {}
        self.asked: list[str] = []
        """Method and path of every request."""
        self.silent = False
        """True if requests are accepted and never answered."""
        self.endpoint = ""

    def push(self, folder: Path) -> str:
        """Make a folder's files, as they are, the newest commit."""
        commit = hashlib.sha1(f"{folder}{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = folder
        return commit

    @property
    def fetched(self) -> set[str]:
        """The files that were downloaded."""
        marker = f"GET /{self.name}/resolve/"
        return {line.removeprefix(marker).partition("/")[2] for line in self.asked if line.startswith(marker)}

    @contextmanager
    def serving(self) -> Iterator[None]:
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.silent:
            time.sleep(60)
            self.close_connection = True
            return
        name, newest = self.hub.name, list(self.hub.commits)[-1]
        tree, files = f"/api/models/{name}/tree/", f"/{name}/resolve/"
        if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
            self._send(200, _json({"id": name, "sha": newest, "siblings": []}), with_body)
        elif path.startswith(tree):
            self._send(
                200, _json(_entries(self.hub.commits[path.removeprefix(tree).split("/")[0]])), with_body
            )
        elif path.startswith(files):
            commit, _, file = path.removeprefix(files).partition("/")
            commit = newest if commit == "main" else commit
            content = (self.hub.commits[commit] / file).read_bytes()
            self._send(200, content, with_body, {"X-Repo-Commit": commit, "ETag": f'"{_digest(content)}"'})
        else:
            self._send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _entries(folder: Path) -> list[dict[str, object]]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": _digest(path.read_bytes()),
        }
        for path in paths
    ]


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
