"""Jobs: what a job file says is checked here, and run by Ray's own job server."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from backlens.cli.main import app
from backlens.engine.jobs import read_job
from backlens.errors import BacklensError
from tests.engine.cluster import free_ports, one_node_cluster
from tests.engine.command import (
    assert_complete,
    assert_same_run,
    beside_hiding_files,
    called,
    commits,
    count_commits,
    error_line,
    imported_beside,
    wait_for,
    write_jsonl,
)
from tests.engine.conftest import some_prompts

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
PROMPTS = 240


def test_there_is_a_job_for_each_of_the_three_uses() -> None:
    assert [path.stem for path in JOBS] == ["atlas", "dataset", "project"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_bundled_job_is_a_command_line_that_backlens_takes(path: Path) -> None:
    job = read_job(str(path))
    assert job.command[0] in list(app)
    app.parse_args(job.words)
    assert job.entrypoint.startswith(f"python -m backlens {job.command[0]}")
    assert job.out is not None
    assert job.out.startswith("s3://")
    assert "working_dir" not in job.runtime_env


def _write(folder: Path, **content: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_options_are_the_flags_of_the_command(tmp_path: Path) -> None:
    options = {"out": "/runs/a b", "save-factors": True, "prepend-bos": True, "limit": 5, "layers": None}
    job = read_job(str(_write(tmp_path, command="run", options=options, env={"N": 1}, image="registry/a:1")))
    assert job.words == ["run", "--out=/runs/a b", "--save-factors=true", "--prepend-bos=true", "--limit=5"]
    assert (
        job.entrypoint
        == "python -m backlens run '--out=/runs/a b' --save-factors=true --prepend-bos=true --limit=5"
    )
    assert job.runtime_env == {"env_vars": {"N": "1"}, "image_uri": "registry/a:1"}
    config = app.parse_args(job.words)[1].arguments["options"]
    assert (config.out, config.save_factors, config.prepend_bos, config.limit) == (
        "/runs/a b",
        True,
        "true",
        5,
    )


def test_a_working_directory_starts_at_the_folder_of_the_job_file(tmp_path: Path) -> None:
    job = read_job(str(_write(tmp_path, command="run", **{"working-dir": "."})))
    assert job.entrypoint == "python -m backlens run"
    assert job.runtime_env["working_dir"] == str(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"options": {}}, "name the command"),
        ({"command": "run", "option": {}}, "unknown key 'option'; did you mean options?"),
        ({"command": "run", "options": {"out": "runs/a"}}, "would be in the job's own folder"),
        ({"command": "atlas runs/a"}, "would be in the job's own folder"),
        ({"command": "run", "options": ["out"]}, "'options' is a mapping"),
        ({"command": "run", "env": {"A": {"B": "C"}}}, "'env' is a mapping"),
        ({"command": "run", "working-dir": "nowhere"}, "is no folder here"),
        ({"command": "run", "working-dir": ".", "image": "a"}, "not both"),
    ],
)
def test_what_is_no_job_is_refused(content: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(BacklensError, match=r"job\.yaml: ") as refused:
        read_job(str(_write(tmp_path, **content)))
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"modlues": "all"}, "modlues"),
        ({"top-k": 0}, "--top-k 0: keep at least one token"),
        ({"replicas": "many"}, "replicas"),
    ],
)
def test_a_command_line_that_would_be_refused_there_is_refused_here(
    options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    refused = called(
        "submit", _write(tmp_path, command="run", options=options), "--address", "http://nobody:1"
    )
    assert refused.status == 2
    assert error_line(refused).startswith(f"{tmp_path}/job.yaml: ")
    assert expected in refused.stderr


def test_files_that_are_not_there_and_are_not_yaml_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in error_line(called("submit", tmp_path / "none.yaml"))
    for content in ("a: [", "just words"):
        (tmp_path / "bad.yaml").write_text(content)
        refused = called("submit", tmp_path / "bad.yaml")
        assert (refused.status, "bad.yaml" in error_line(refused)) == (2, True)


@pytest.mark.parametrize(
    "command", [["jobs", "status"], ["jobs", "status", "a"], ["jobs", "logs", "a"], ["jobs", "stop", "a"]]
)
def test_a_job_server_that_does_not_answer_is_named(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")  # to be put back afterwards
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    refused = called(*command, "--address", address)
    assert refused.status == 2
    assert error_line(refused).startswith(f"address: {address}: ")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    port = free_ports(1)[0]
    with one_node_cluster(job_server=port):
        yield f"http://127.0.0.1:{port}"


def _job(server: str, identity: str) -> dict[str, Any]:
    return json.loads(called("jobs", "status", identity, "--json", "--address", server).stdout)


def _ended(server: str, identity: str) -> dict[str, Any]:
    while (job := _job(server, identity))["state"] in ("pending", "running"):
        time.sleep(1)
    return job


@pytest.mark.slow
def test_a_stopped_job_goes_on_when_it_is_submitted_again(
    server: str, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submit, status, logs, stop, submit again: through Ray's job server, from a folder whose files hide nothing."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server)
    prompts, out = write_jsonl(tmp_path / "prompts.jsonl", some_prompts(PROMPTS)), tmp_path / "out"
    common = {"model": str(gpt2), "prompts": str(prompts), "modules": "all", "shard-prompts": 6, "neurons": 8}
    content = yaml.safe_load((ROOT / "jobs" / "project.yaml").read_text("utf-8"))
    content["options"] = common | {"out": str(out), "executor": "ray", "replicas": 2}
    folder = beside_hiding_files(tmp_path)
    path = _write(folder, **content, **{"working-dir": "."})

    submitted = called("submit", path, "--address", server)
    assert submitted.status == 0, submitted.stderr
    assert submitted.stderr.splitlines()[1:] == []
    first = submitted.stdout.strip()
    wait_for(lambda: count_commits(out) >= 2, timeout=200, every=0.05)
    standing = json.loads(called("status", out, "--json").stdout)
    assert standing["state"] == "running"
    assert standing["driver"] is not None
    stopped = called("jobs", "stop", first, "--address", server)
    assert stopped.stdout.strip() == f"{first}: stopped"
    done_before = commits(out)
    assert 0 < len(done_before) < PROMPTS // 6
    wait_for(lambda: json.loads(called("status", out, "--json").stdout)["state"] == "stopped", every=0.2)

    second = called("submit", path, "--address", server).stdout.strip()
    followed = called("jobs", "logs", second, "--follow", "--address", server)
    assert followed.status == 0, followed.stderr
    ended = _ended(server, second)
    assert (ended["state"], ended["exit_status"], ended["out"]) == ("succeeded", 0, str(out))
    assert "of them are done already" in followed.stdout
    assert f"{PROMPTS:,} of {PROMPTS:,} prompts" in followed.stdout
    logs = called("jobs", "logs", second, "--address", server).stdout
    assert f"{PROMPTS:,} of {PROMPTS:,} prompts" in logs
    assert {number: commits(out)[number] for number in done_before} == done_before
    assert_complete(out, PROMPTS)
    listed = called("jobs", "status", "--address", server).stdout
    assert first in listed
    assert second in listed

    here = ("--executor", "local", "--out", tmp_path / "here")
    flags = [f"--{name}={value}" for name, value in common.items()]
    assert called("run", *flags, *here).status == 0
    assert_same_run(out, tmp_path / "here")
    assert imported_beside(tmp_path) == []


@pytest.mark.slow
def test_a_job_that_fails_says_so(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server)
    options = {"model": "/no/such/model", "prompts": "/no/such/prompts", "out": str(tmp_path / "out")}
    path = _write(tmp_path, command="run", options=options)
    identity = called("submit", path, "--address", server).stdout.strip()
    ended = _ended(server, identity)
    assert (ended["state"], ended["exit_status"]) == ("failed", 2)
    assert "no directory /no/such/model" in called("jobs", "logs", identity, "--address", server).stdout


@pytest.mark.slow
def test_an_unknown_job_is_named(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server)
    for command in (["status"], ["logs"], ["logs", "--follow"], ["stop"]):
        refused = called("jobs", command[0], "no-such-job", *command[1:], "--address", server)
        assert refused.status == 2
        assert "no-such-job" in error_line(refused)
