"""`backlens serve` and `backlens export-html` as commands: what they print, refuse and leave behind."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest

from backlens.atlas.build import build_atlas
from backlens.cli.serve import listening
from backlens.store.directory import Directory
from tests.engine.command import BACKLENS, called
from tests.serve.conftest import MARKUP
from tests.store.examples import ExampleRun, example_run


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server of its own, and the address that it prints."""
    process = subprocess.Popen(
        [BACKLENS, "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+?:\d+", process.stdout.readline())
        assert found is not None
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def test_a_server_answers_and_ends_with_ctrl_c(example: ExampleRun):
    with served(example.out) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}/prompt/1") as answer:
            assert answer.status == 200
            assert "x-powered-by" not in answer.headers
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.example"}))
        assert refusal.value.code == 400
        with pytest.raises(urllib.error.HTTPError) as missing:  # /sql has to be asked for
            urllib.request.urlopen(f"{address}/sql?q=SELECT+1")
        assert missing.value.code == 404
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")


def test_a_run_without_an_atlas_is_told_what_to_do(tmp_path: Path):
    run = example_run(Directory.at(tmp_path / "run"))
    refused = called("serve", run.out)
    assert (refused.status, refused.stdout) == (2, "")
    assert (
        refused.stderr == f"backlens: serve: {run.out} has no atlas yet; build it: backlens atlas {run.out}\n"
    )


def test_an_atlas_of_another_version_is_to_be_built_again(tmp_path: Path):
    run = example_run(Directory.at(tmp_path / "run"))
    build_atlas(run.out)
    manifest = Path(run.out, "atlas", "manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "atlas_version": 2}))
    refused = called("serve", run.out)
    assert (refused.status, refused.stdout) == (2, "")
    assert refused.stderr == (
        f"backlens: the atlas of {run.out} was written by another version and is not read; "
        f"`backlens atlas {run.out}` builds it again\n"
    )


def test_answers_leave_at_once():
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_in_use_is_one_line(example: ExampleRun):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = called("serve", example.out, "--port", taken.getsockname()[1])
    assert refused.status == 2
    assert "Address already in use" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--port", "99999"), "--port 99999: give 1 to 65535"),
        (("--host", "300.1.1.1"), "cannot listen on 300.1.1.1"),
    ],
)
def test_an_address_that_is_none_is_one_line(example: ExampleRun, options: tuple[str, ...], line: str):
    refused = called("serve", example.out, *options)
    assert refused.status == 2
    assert line in refused.stderr
    assert refused.stderr.count("\n") == 1


class Fetches(HTMLParser):
    """Whatever a document would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        if tag in ("script", "link", "img", "iframe", "object", "a") or names & {"src", "href", "style"}:
            self.found.append(tag)


def test_an_exported_prompt_is_one_file_that_needs_nothing(example: ExampleRun, tmp_path: Path):
    target = tmp_path / "prompt.html"
    done = called("export-html", example.out, "--prompt", 0, "--to", target)
    assert (done.status, done.stdout) == (0, f"{target}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.html"]
    text = target.read_text("utf-8")
    parser = Fetches()
    parser.feed(text)
    assert not parser.found
    assert "url(" not in text
    assert MARKUP not in text
    rows = [row for row in example.rows["tokens"] if row["prompt_id"] == 0]
    assert text.count('class="more"') == len(rows)


def test_an_export_needs_no_atlas(tmp_path: Path):
    run = example_run(Directory.at(tmp_path / "run"))
    assert called("export-html", run.out, "--prompt", 1, "--to", tmp_path / "one.html").status == 0


def test_an_export_is_refused_in_one_line(example: ExampleRun, tmp_path: Path):
    missing = called("export-html", example.out, "--prompt", 99, "--to", tmp_path / "p.html")
    assert (missing.status, missing.stderr) == (
        2,
        "backlens: prompt: this run has no prompt 99; it has 0 to 7\n",
    )
    nowhere = called("export-html", example.out, "--prompt", 1, "--to", tmp_path / "no" / "p.html")
    assert nowhere.status == 2
    assert "make it first" in nowhere.stderr
    assert not list(tmp_path.iterdir())


def test_the_explorer_loads_no_model_library():
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, backlens.serve.app; print([m for m in ('torch', 'ray') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout == "[]\n"
