"""The files that `backlens submit` sends: this package, and part of a working directory; a job server receives them."""

import http.server
import io
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import backlens
from tests.engine.command import Finished, called, error_line

MIB = 2**20


class Server(http.server.ThreadingHTTPServer):
    """The part of Ray's job server that a submission needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.takes = 100 * MIB
        self.package: list[str] = []
        self.received: list[str] = []
        self.bytes = 0
        self.jobs: list[dict[str, Any]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})
        else:
            self._answer(404, {})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if len(content) > self.server.takes:
            self._answer(413, {})
            return
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        if "backlens/__init__.py" in names:
            self.server.package = names
        else:
            self.server.bytes, self.server.received = len(content), names
        self._answer(200, {})

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.jobs.append(job)
        self._answer(200, {"job_id": job["submission_id"], "submission_id": job["submission_id"]})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # to be put back afterwards
    opened = Server()
    threading.Thread(target=opened.serve_forever, daemon=True).start()
    yield opened
    opened.shutdown()
    opened.server_close()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that has been worked in."""
    folder = tmp_path / "checkout"
    write(
        folder,
        "pipeline/__init__.py",
        "pipeline/code.py",
        "jobs/steps.py",
        "README.md",
        "notes/a.csv",
        "notes/b.txt",
    )
    write(
        folder,
        "pipeline/backlens/demo/__init__.py",
        "pipeline/backlens/demo/model/config.json",
        "pipeline/backlens/demo/model/model.safetensors",
    )
    write(folder, "demo-run/run.json", "demo-run/tokens/0.parquet")
    write(folder, "runs/a [1]/run.json", "runs/a [1]/x.parquet", "runs/notes.txt")
    write(
        folder,
        "models/gpt2/config.json",
        "models/gpt2/model-00001-of-00002.safetensors",
        "models/gpt2/sub/x.json",
    )
    write(folder, "old/config.json", "old/pytorch_model.bin")
    write(folder, "settings/config.json", "settings/weights.txt")
    write(folder, "my-env/pyvenv.cfg", "my-env/lib/x.py", ".venv/bin/python", "hub/CACHEDIR.TAG", "hub/x.bin")
    write(folder, ".pytest_cache/x", "pipeline/__pycache__/x.pyc", "backlens.egg-info/PKG-INFO")
    write(folder, "ignored/x.txt")
    (folder / ".gitignore").write_text("ignored/\n")
    return folder


CODE = {
    *(
        "pipeline/__init__.py",
        "pipeline/code.py",
        "jobs/steps.py",
        "README.md",
        "runs/notes.txt",
        ".gitignore",
    ),
    *(
        "pipeline/backlens/demo/__init__.py",
        "pipeline/backlens/demo/model/config.json",
        "pipeline/backlens/demo/model/model.safetensors",
    ),
    *("settings/config.json", "settings/weights.txt"),
}
NOTES = {"notes/a.csv", "notes/b.txt"}


def write(folder: Path, *names: str, size: int = 10) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(size)


def submitted(server: Server, folder: Path, **content: Any) -> Finished:
    path = folder.parent / "job.yaml"
    path.write_text(yaml.safe_dump({"command": "run", "working-dir": str(folder)} | content))
    return called("submit", path, "--address", f"http://127.0.0.1:{server.server_port}")


def files(server: Server) -> set[str]:
    return {name for name in server.received if not name.endswith("/")}


def test_runs_models_and_caches_are_not_sent_and_code_is(server: Server, checkout: Path) -> None:
    done = submitted(server, checkout)
    assert done.status == 0, done.stderr
    assert files(server) == CODE | NOTES
    said = "not sent: demo-run, models/gpt2, old, runs/a [1] (run directories and models)"
    assert done.stderr.splitlines()[0] == said
    assert len(server.jobs) == 1


def test_the_package_is_sent_whole_with_any_working_directory_or_none(server: Server, checkout: Path) -> None:
    folder = Path(backlens.__file__).parent
    code = {f"backlens/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}
    code = {name for name in code if "__pycache__" not in name}
    assert submitted(server, checkout, excludes=["prompts", "demo", "*.py"]).status == 0
    assert {name for name in server.package if not name.endswith("/")} == code
    server.package = []
    path = checkout / "job.yaml"
    path.write_text(yaml.safe_dump({"command": "run"}))
    assert called("submit", path, "--address", f"http://127.0.0.1:{server.server_port}").status == 0
    assert "backlens/__main__.py" in server.package
    for job in server.jobs:
        assert job["entrypoint"] == "python -m backlens run"
        (uri,) = job["runtime_env"]["py_modules"]
        assert uri.startswith("gcs://")


def test_excludes_of_the_job_file_are_not_sent(server: Server, checkout: Path) -> None:
    assert submitted(server, checkout, excludes=["*.csv"]).status == 0
    assert files(server) == CODE | {"notes/b.txt"}
    assert submitted(server, checkout, excludes=["/notes", "settings"]).status == 0
    assert files(server) == CODE - {"settings/config.json", "settings/weights.txt"}


def test_what_the_job_names_or_asks_for_is_sent(server: Server, checkout: Path) -> None:
    gpt2 = {
        f"models/gpt2/{name}" for name in ("config.json", "model-00001-of-00002.safetensors", "sub/x.json")
    }
    out = str(checkout.parent / "out")
    assert submitted(server, checkout, options={"model": "./models/gpt2", "out": out}).status == 0
    assert files(server) == CODE | NOTES | gpt2
    assert submitted(server, checkout, excludes=["!models/gpt2", "/notes"]).status == 0
    assert files(server) == CODE | gpt2


def test_too_much_is_refused_before_it_is_sent_and_the_large_folders_are_named(
    server: Server, checkout: Path
) -> None:
    write(checkout, "data/raw/deep/a.bin", size=60 * MIB)
    write(checkout, "data/raw/deep/b.bin", size=30 * MIB)
    write(checkout, "big.jsonl", size=40 * MIB)
    refused = submitted(server, checkout)
    assert refused.status == 2
    line = error_line(refused)
    for words in (
        "130.0 MiB",
        "100.0 MiB",
        "data/raw/deep/ 90.0 MiB",
        "big.jsonl 40.0 MiB",
        "excludes:",
        str(checkout),
    ):
        assert words in line
    assert "address" not in line
    assert (server.received, server.jobs) == ([], [])
    assert submitted(server, checkout, excludes=["/data"]).status == 0
    assert files(server) == CODE | NOTES | {"big.jsonl"}


def test_what_is_measured_is_what_is_sent(
    server: Server, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit at the very bytes that arrive lets them pass, and some bytes fewer do not."""
    write(checkout, "data/a.bin", size=3 * MIB)
    assert submitted(server, checkout).status == 0
    for limit, status in ((int(server.bytes * 1.002), 0), (int(server.bytes * 0.998), 2)):
        monkeypatch.setattr("ray._private.ray_constants.DASHBOARD_CLIENT_MAX_SIZE", limit)
        assert submitted(server, checkout).status == status


def test_a_smaller_limit_on_the_way_is_not_blamed_on_the_address_alone(
    server: Server, checkout: Path
) -> None:
    server.takes = 20 * MIB
    write(checkout, "notes/c.txt", size=30 * MIB)
    refused = submitted(server, checkout)
    assert refused.status == 2
    assert "413" in error_line(refused)
    assert "`excludes:`" in error_line(refused)


def test_a_link_to_a_folder_above_does_not_lead_in_circles(checkout: Path) -> None:
    from backlens.engine.jobs import _leftovers

    os.symlink(checkout, checkout / "notes" / "above")
    assert len(dict(_leftovers(checkout, "", set()))) < 30


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"excludes": "notes"}, "'excludes' is a list"),
        ({"excludes": [1]}, "'excludes' is a list"),
        ({"exclude": []}, "did you mean excludes?"),
    ],
)
def test_what_is_no_list_of_patterns_is_refused(
    content: dict[str, Any], expected: str, server: Server, checkout: Path
) -> None:
    refused = submitted(server, checkout, **content)
    assert refused.status == 2
    assert expected in error_line(refused)
