"""Ray that is not there, is something else, asks for a token or cannot start: one line, soon, with the remedy."""

import http.server
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from backlens.engine.executors import ray_address
from backlens.engine.executors import ray_session as ray_folder
from backlens.engine.executors import ray_session as session
from backlens.engine.executors.ray_address import job_server, named_cluster
from backlens.errors import BacklensError, Interrupted
from tests.engine.cluster import free_ports, one_node_cluster
from tests.engine.command import Finished, backlens, called, environment
from tests.engine.test_full_disk import disk as disk

VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_TMPDIR", "TMPDIR")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # to be put back, also what the code sets
        monkeypatch.delenv(name)


@pytest.fixture
def nobody() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture
def mute() -> Iterator[str]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def website() -> Iterator[str]:
    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>a page</html>")

        def log_message(self, format: str, *args: Any) -> None: ...

    site = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{site.server_port}"
    site.shutdown()


@contextmanager
def refused_within(seconds: float, *words: str, status: int = 2) -> Iterator[None]:
    started = time.monotonic()
    with pytest.raises(BacklensError) as refused:
        yield
    assert time.monotonic() - started < seconds
    assert refused.value.status == status
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_where_nothing_listens_there_is_no_cluster(nobody: str) -> None:
    with refused_within(5, nobody, "no Ray cluster answers", "refused"):
        named_cluster(nobody)
    with refused_within(5, f"http://{nobody}", "no job server answers", "refused"):
        job_server(f"http://{nobody}")
    with refused_within(5, nobody, "no job server answers", "refused"):
        job_server(nobody)


def test_a_port_that_says_nothing_is_not_waited_for(mute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused_within(15, mute, "within 8 s"):
        named_cluster(mute)
    monkeypatch.setattr(ray_address, "SECONDS", 2.0)
    with refused_within(6, f"ray://{mute}", "within 2 s"):
        named_cluster(f"ray://{mute}")
    for address in (f"http://{mute}", mute):
        with refused_within(6, address, "no job server answers", "within 2 s"):
            job_server(address)


def test_a_host_that_has_no_address_is_said_to(nobody: str) -> None:
    with refused_within(20, "nosuch.invalid:6379", "no Ray cluster answers"):
        named_cluster("nosuch.invalid:6379")
    with refused_within(20, "no job server answers"):
        job_server("http://nosuch.invalid:8265")


def test_another_server_is_no_ray(website: str) -> None:
    with refused_within(20, "no Ray cluster", "backlens submit"):
        named_cluster(website)
    for address in (website, f"http://{website}"):
        with refused_within(20, "no job server of Ray"):
            job_server(address)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "tcp://head:6379", "http:6379x"])
def test_what_is_no_address_is_told_how_to_be_one(address: str) -> None:
    with refused_within(5, address, "host:port"):
        named_cluster(address)


def test_a_job_servers_address_is_for_submit() -> None:
    with refused_within(5, "http://head:8265", "head:6379", "backlens submit"):
        named_cluster("http://head:8265")


def test_auto_without_a_cluster_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _folder: None)
    for ask in (named_cluster, job_server):
        with refused_within(5, "no Ray cluster runs on this machine", "ray start --head"):
            ask("auto")
    with refused_within(5, "no Ray cluster runs on this machine"):
        job_server(None)


def test_an_address_in_the_environment_is_told_from_a_given_one(
    nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with refused_within(5, f"{nobody} ($RAY_ADDRESS)"):
        named_cluster(None)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://{nobody}")
    with refused_within(5, f"http://{nobody} ($RAY_API_SERVER_ADDRESS)"):
        job_server(None)
    with refused_within(5, "http://127.0.0.1:1: "):
        job_server("http://127.0.0.1:1")
    assert named_cluster("local") is None


@pytest.mark.parametrize(
    "command",
    [
        ("run", "--limit", 1, "--out", "out", "--layers", "0", "--address"),
        ("edit", "sweep", "out", "--lr", 1, "--limit", 1, "--layers", "0", "--executor", "ray", "--address"),
        ("jobs", "status", "--address"),
        ("submit", "job.yaml", "--address"),
    ],
    ids=lambda command: " ".join(map(str, command[:2])),
)
def test_every_command_with_an_address_is_refused_by_one_line(
    command: tuple[object, ...], nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("command: doctor\n")
    refused = called(*command, nobody)
    assert refused.status == 2
    assert refused.stderr.splitlines()[-1].startswith(f"backlens: address: {nobody}: no ")
    assert not [line for line in refused.stderr.splitlines() if line.startswith(("[", "Traceback"))]


@pytest.mark.slow
def test_an_atlas_with_an_address_is_refused_by_one_line(nobody: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert called("run", "--limit", 1, "--out", out, "--layers", "0", "--executor", "local").status == 0
    refused = called("atlas", out, "--executor", "ray", "--address", nobody)
    assert refused.status == 2
    assert refused.stderr.splitlines()[-1].startswith(f"backlens: address: {nobody}: no ")


@pytest.mark.slow
def test_a_running_cluster_is_found_by_either_address_and_asked_for_its_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_ports(1)[0]
    with one_node_cluster(1, port) as (cluster, _):
        assert named_cluster(cluster) == cluster
        for address in (cluster, f"127.0.0.1:{port}", f"http://127.0.0.1:{port}/"):
            assert job_server(address).endswith(f":{port}")
        with refused_within(20, "the address of a Ray cluster", "http://head:8265"):
            job_server(f"http://{cluster}")
        with refused_within(20, "no Ray cluster", "backlens submit"):
            named_cluster(f"127.0.0.1:{port}")
        monkeypatch.setattr("ray._private.services.find_node_ids", set)
        monkeypatch.setattr(ray_address, "SECONDS", 1.0)
        with refused_within(20, "this machine is none of its nodes", "ray start --address="):
            named_cluster(cluster)


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_says_where_to_put_it(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    command = ("run", "--limit", 1, "--out", tmp_path / "out", "--layers", "0", "--address")
    with one_node_cluster(1, port, token="b" * 64) as (cluster, _):
        for refused in (
            backlens("jobs", "status", "--address", f"http://127.0.0.1:{port}"),
            backlens("jobs", "status", "--address", cluster),
            backlens(*command, cluster),
        ):
            assert refused.status == 2
            line = refused.stderr.splitlines()[-1]
            for word in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN", "~/.ray/auth_token"):
                assert word in line
        with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}
        listed = _with_environment(
            with_token, "jobs", "status", "--json", "--address", f"http://127.0.0.1:{port}"
        )
        assert (listed.status, listed.stderr) == (0, "")


def _with_environment(variables: dict[str, str], *arguments: object, cwd: Path | None = None) -> Finished:
    done = subprocess.run(
        [sys.executable, "-c", "from backlens.cli.entry import main; main()", *map(str, arguments)],
        env=environment() | variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


# A Ray of the command's own, and its folder


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for that of a socket."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        yield Path(folder)


def test_the_longest_folder_that_is_taken_fits_the_path_of_a_socket(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real socket is bound at the longest path of a session; one letter more is too long for the kernel."""
    room = ray_folder.LONGEST - len(f"{short}//ray/{ray_folder.SOCKET}")
    for letters, fits in ((room, True), (room + 1, False)):
        monkeypatch.setenv("TMPDIR", str(short / ("a" * letters)))
        longest = Path(os.environ["TMPDIR"], "ray", ray_folder.SOCKET)
        longest.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as made:
            if fits:
                made.bind(str(longest))
            else:
                with pytest.raises(OSError, match="too long"):
                    made.bind(str(longest))
        assert (ray_folder.ray_folder() == f"{os.environ['TMPDIR']}/ray") == fits


def test_a_folder_of_another_user_is_passed_by(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(short))
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "ray" and may(path, mode))
    (short / "ray").mkdir()
    monkeypatch.setattr(ray_folder, "_of_this_user", lambda base: short / "mine" if base == short else base)
    assert ray_folder.ray_folder() == str(short / "mine" / "ray")
    assert (short / "mine").stat().st_mode & 0o777 == 0o700
    (short / "mine").chmod(0o777)
    with refused_within(1, "mine is open to others", "RAY_TMPDIR", "--executor local", status=3):
        ray_folder.ray_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a while")
def test_a_user_who_may_not_write_to_the_shared_folder_gets_one(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short))
    (short / "ray").mkdir(mode=0o755)
    short.chmod(0o777)
    answer, told = os.pipe()
    if (somebody := os.fork()) == 0:
        os.setuid(65534)
        os.write(told, ray_folder.ray_folder().encode())
        os._exit(0)
    os.waitpid(somebody, 0)
    os.close(told)
    with os.fdopen(answer) as found:
        assert found.read() in (f"{short}/ray-65534/ray", "/tmp/ray")


@pytest.mark.parametrize("kind", ["too long", "a file", "full"])
def test_a_chosen_folder_that_ray_cannot_use_is_named(
    kind: str, short: Path, request: pytest.FixtureRequest
) -> None:
    folder = short / "folder"
    if kind == "too long":
        folder = short / ("a" * 60)
    elif kind == "a file":
        folder.touch()
    else:
        folder = request.getfixturevalue("disk")  # of a few megabytes
        (folder / "ballast").write_bytes(bytes(3 * 2**20))
    refused = _with_environment(
        {"RAY_TMPDIR": str(folder)}, "run", "--limit", 1, "--layers", "0", "--out", short / "out"
    )
    assert refused.status == 3
    line = refused.stderr.splitlines()[-1]
    assert line.startswith("backlens: RAY_TMPDIR: Ray cannot keep its files in ")
    assert "--executor local" in line
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("a\nb"), KeyError("x"), Exception()]
)
def test_whatever_keeps_ray_from_starting_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_options: Any) -> None:
        raise error

    monkeypatch.setattr(session.ray, "init", init)
    with refused_within(5, "Ray cannot start on this machine", type(error).__name__, "RAY_TMPDIR", status=3):
        session.connect(None)
    assert issubclass(Interrupted, BacklensError)


@pytest.mark.slow
def test_a_run_works_where_tmpdir_is_too_long_for_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / "scratch" / "user_0123456789" / "job_00001234567890"
    folder.mkdir(parents=True)
    out = tmp_path / "out"
    done = _with_environment({"TMPDIR": str(folder)}, "run", "--limit", 1, "--layers", "0", "--out", out)
    assert done.status == 0, done.stderr
    assert json.loads((out / "run.json").read_text())["status"] == "done"
