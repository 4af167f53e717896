"""A run directory on an object store: anything that fsspec opens."""

import json
from pathlib import Path

import fsspec
import pyarrow.dataset
import pytest

from backlens.cli.main import call
from tests.tiny import save_tiny


def test_a_run_into_a_url_gives_the_tables_of_a_local_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "abc" * n, "target": " d"} for n in range(1, 6)]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    command = [
        "run",
        "--model",
        str(model),
        "--prompts",
        str(prompts),
        "--executor",
        "local",
        "--shard-prompts",
        "2",
    ]
    assert call([*command, "--out", "memory://bucket/run"]) == 0
    assert call([*command, "--out", str(tmp_path / "run")]) == 0
    for table in ("prompts", "layers", "neurons", "tokens"):
        remote = pyarrow.dataset.dataset(f"/bucket/run/{table}", filesystem=fsspec.filesystem("memory"))
        assert remote.to_table().equals(pyarrow.dataset.dataset(tmp_path / "run" / table).to_table())
    assert call([*command, "--out", "memory://bucket/run"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert call([*command, "--out", "memory://bucket/run", "--top-k", "3"]) == 2
    assert "top-k 10" in capsys.readouterr().err
    assert call(["query", "memory://bucket/run", "--prompt", "4", "--json", "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["layer"] == 0
