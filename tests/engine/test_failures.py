"""A prompt that cannot be computed is found and recorded, whatever it does; every other one is done as without it."""

from pathlib import Path

import pytest

from tests.engine.command import (
    assert_complete,
    assert_same_rows,
    backlens,
    called,
    commits,
    read,
    renumbered,
    tables_of,
)
from tests.engine.misbehaving import command, save_misbehaving

SOUND = [f"prompt {chr(97 + number) * (1 + number % 7)}" for number in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_misbehaving(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clean(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the sound prompts alone."""
    out = tmp_path_factory.mktemp("runs") / "clean"
    done = called(*command(model, SOUND, out), "--executor", "local", "--batch-tokens", 200)
    assert done.status == 0, done.stderr
    return out


def with_bad(bad: dict[int, str]) -> tuple[list[str], dict[int, int]]:
    """The sound prompts with others in between, and the sound ones' ordinals by their old ones."""
    prompts, numbers, sound = [], {}, iter(enumerate(SOUND))
    for place in range(len(SOUND) + len(bad)):
        if place in bad:
            prompts.append(bad[place])
        else:
            old, prompt = next(sound)
            numbers[old] = place
            prompts.append(prompt)
    return prompts, numbers


def failures(out: Path) -> dict[int, tuple[str, str]]:
    return {row["prompt_id"]: (row["stage"], row["error"]) for row in read(out, "failures").to_pylist()}


def assert_others_as_in(clean: Path, out: Path, numbers: dict[int, int]) -> None:
    for table in sorted(set(tables_of(clean)) - {"failures"}):
        assert_same_rows(renumbered(read(clean, table), table, numbers), read(out, table), table)


@pytest.mark.parametrize(("letter", "error"), [("R", "raised"), ("B", "raised"), ("H", "out-of-memory")])
def test_a_prompt_that_fails_in_the_forward_or_backward_pass_is_recorded_alone(
    letter: str, error: str, model: Path, clean: Path, tmp_path: Path
) -> None:
    prompts, numbers = with_bad({3: f"bad {letter}", 11: f"and {letter} again"})
    out = tmp_path / "out"
    done = called(*command(model, prompts, out), "--executor", "local", "--batch-tokens", 200)
    assert done.status == 1, done.stderr
    assert failures(out) == {3: ("compute", error), 11: ("compute", error)}
    assert f"2 prompts could not be processed ({error} 2)" in done.stdout
    assert_complete(out, len(prompts))
    assert_others_as_in(clean, out, numbers)


def test_the_first_failure_ends_a_run_that_shall_not_record_any(model: Path, tmp_path: Path) -> None:
    bad = command(model, [*SOUND, "bad R"], tmp_path / "out")
    done = called(*bad, "--executor", "local", "--on-error", "fail")
    assert done.status == 2
    assert "ValueError: no such prompt, please (--on-error fail)" in done.stderr.splitlines()[-1]


def test_a_batch_that_does_not_fit_is_made_smaller_and_that_is_remembered(
    clean: Path, tmp_path: Path
) -> None:
    model = save_misbehaving(tmp_path / "model", room=60)
    out = tmp_path / "out"
    done = called(
        *command(model, SOUND * 3, out),
        *("--executor", "local", "--batch-tokens", 200, "--shard-prompts", 20),
    )
    assert done.status == 0, done.stderr
    assert_complete(out, 60)
    stats = [record["stats"] for record in commits(out).values()]
    counts = [each["out_of_memory"] for each in stats]
    assert counts[0] >= 1
    assert counts[1:] == [0, 0]
    assert all(each["batch_tokens"] <= 60 for each in stats)
    assert f"batches that did not fit into memory and were made smaller: {counts[0]:.0f}" in done.stdout
    first = {number: number for number in range(20)}
    rows = read(out, "tokens")
    kept = rows.filter([number < 20 for number in rows["prompt_id"].to_pylist()])
    assert_same_rows(renumbered(read(clean, "tokens"), "tokens", first), kept, "tokens")


def test_a_model_that_fails_at_everything_is_no_matter_of_prompts(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such prompt"):
        called(*command(model, [f"R {prompt}" for prompt in SOUND], tmp_path / "out"), "--executor", "local")


@pytest.mark.slow
def test_prompts_that_kill_their_worker_are_found_and_a_lost_device_is_survived(
    model: Path, clean: Path, tmp_path: Path, cluster: tuple[str, int]
) -> None:
    prompts, numbers = with_bad({2: "D device", 4: "bad K"})
    out = tmp_path / "out"
    engine = ("--executor", "ray", "--replicas", 2, "--address", cluster[0])
    done = backlens(*command(model, prompts, out), *engine, "--shard-prompts", 6, "--batch-tokens", 200)
    assert done.status == 1, done.stderr
    assert failures(out) == {4: ("compute", "worker-died")}
    assert (model / "mark").exists()
    assert "Traceback" not in done.stdout + done.stderr
    assert_complete(out, len(prompts))
    assert not list(out.glob("_commits/*.attempt"))
    rows = read(out, "tokens")
    others = rows.filter([number != 2 for number in rows["prompt_id"].to_pylist()])
    assert_same_rows(renumbered(read(clean, "tokens"), "tokens", numbers), others, "tokens")


@pytest.mark.slow
def test_a_run_that_finds_no_place_says_what_is_missing(
    model: Path, tmp_path: Path, cluster: tuple[str, int]
) -> None:
    engine = ("--executor", "ray", "--address", cluster[0], "--gpus-per-replica", 2)
    done = backlens(*command(model, SOUND, tmp_path / "out"), *engine, "--placement-timeout", 1)
    assert done.status == 3
    last = done.stderr.splitlines()[-1]
    assert "no place for a replica within 1 s: a replica needs 2 GPUs and" in last
    assert "the cluster has 0 of 0 GPUs" in last
    assert "Traceback" not in done.stderr
