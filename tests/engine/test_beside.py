"""Files of the user beside a run are not imported, and `python -m backlens` is the command."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.command import (
    assert_complete,
    backlens,
    beside_hiding_files,
    environment,
    imported_beside,
)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_run_beside_files_of_our_names_imports_none_of_them(executor: str, tmp_path: Path) -> None:
    folder = beside_hiding_files(tmp_path)
    done = backlens("run", "--limit", 3, "--executor", executor, folder=folder)
    assert done.status == 0, done.stderr
    assert_complete(folder / "demo-run", 3)
    assert imported_beside(tmp_path) == []


def test_python_m_backlens_is_the_command_and_verifies_a_run(tmp_path: Path) -> None:
    folder = beside_hiding_files(tmp_path)

    def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "backlens", *arguments],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    assert command("run", "--limit", "2", "--executor", "local").returncode == 0
    verified = command("verify", "demo-run")
    assert verified.returncode == 0, verified.stderr
    assert "are as they were written" in verified.stdout
    file = next((folder / "demo-run" / "tokens").glob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = command("verify", "demo-run")
    assert damaged.returncode == 1
    assert file.name in damaged.stdout
    assert imported_beside(tmp_path) == []
