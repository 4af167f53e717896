"""`make` prints one line while it installs, and names its log. The tests put a script in the place of pip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = 800

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def made(target: str, folder: Path, pip: str) -> "subprocess.CompletedProcess[str]":
    """Run `make` on a target that installs, with the shell commands `pip` in the place of pip."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".created").touch()
    (folder / "pip.sh").write_text(f'seq {LINES}; echo "asked for $*"; {pip}\n')
    command = ["make", f".venv/{target}", "PIP=sh pip.sh"]
    own = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # `make test` has set some
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False, env=own
    )


@pytest.mark.parametrize(
    ("target", "asked"), [(".package", "-e .[plot,serve]"), (".dev", "-e .[dev,plot,quantized,")]
)
def test_an_installation_prints_one_line_and_writes_a_log(target: str, asked: str, tmp_path: Path) -> None:
    done = made(target, tmp_path, "exit 0")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
    log = (tmp_path / ".venv" / "install.log").read_text()
    assert len(log.splitlines()) == LINES + 1
    assert f"asked for {asked}" in log
    assert (tmp_path / ".venv" / target).exists()


def test_a_failed_installation_shows_its_end_and_names_the_log(tmp_path: Path) -> None:
    done = made(".package", tmp_path, 'echo "ERROR: no disk" >&2; exit 1')
    assert done.returncode != 0
    assert "ERROR: no disk" in done.stderr
    assert ".venv/install.log" in done.stderr
    assert len(done.stderr.splitlines()) < 10
    assert not (tmp_path / ".venv" / ".package").exists()
