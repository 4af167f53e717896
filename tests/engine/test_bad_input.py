"""Bad records are named and left out; the good ones among them keep the rows they would have had alone."""

import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import normalizers

from tests.engine.command import (
    assert_complete,
    assert_same_rows,
    called,
    count_commits,
    error_line,
    read,
    renumbered,
    write_jsonl,
)
from tests.engine.conftest import some_prompts
from tests.tiny import CONFIGS, byte_tokenizer, random_model

CONTEXT = 256
NOTHING = "~"
"""A character that the tokenizer of these tests drops."""
REPEATS = 4


@dataclass(frozen=True)
class Bad:
    """A record that cannot be processed, as it is written, and the reason that must be given."""

    error: str
    content: bytes


def _line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


BAD_LINES = (
    Bad("missing-field", _line(target=" y")),
    Bad("missing-field", _line(prompt="a")),
    Bad("missing-field", _line()),
    Bad("missing-field", _line(prompt=None, target=" y")),
    Bad("missing-field", _line(prompt="a", target=None)),
    Bad("empty-prompt", _line(prompt="", target=" y")),
    Bad("empty-prompt", _line(prompt=" \t ", target=" y")),
    Bad("empty-prompt", _line(prompt=NOTHING, target=" y")),
    Bad("empty-target", _line(prompt="a", target="")),
    Bad("empty-target", _line(prompt="a", target=NOTHING)),
    Bad("too-long", _line(prompt="a" * (CONTEXT + 1), target=" y")),
    Bad("broken-json", b'{"prompt": "a", "target": " y"'),
    Bad("broken-json", b"prompt: a"),
    Bad("not-utf8", b'{"prompt": "caf\xe9", "target": " y"}'),
    Bad("not-an-object", b'["a", " y"]'),
    Bad("not-an-object", b'"a"'),
    Bad("not-text", _line(prompt=7, target=" y")),
    Bad("not-text", _line(prompt="a", target=[" y"])),
    Bad("not-utf8", b'{"prompt": "a \\ud83d b", "target": " y"}'),
)

BAD_ROWS = (
    Bad("bad-row", b"a"),
    Bad("bad-row", b"a, y,more"),
    Bad("bad-row", b'a,"b" c'),
    Bad("not-utf8", b"caf\xe9, y"),
    Bad("empty-prompt", b", y"),
    Bad("empty-prompt", b'"  ", y'),
    Bad("empty-prompt", NOTHING.encode() + b", y"),
    Bad("empty-target", b"a,"),
    Bad("empty-target", b"a," + NOTHING.encode()),
    Bad("too-long", b"a" * (CONTEXT + 1) + b", y"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer makes nothing of a tilde."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    random_model(CONFIGS["gpt2"]).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(NOTHING, "")  # pyright: ignore
    tokenizer.save_pretrained(folder)
    return folder


def _mixed(bad: tuple[Bad, ...], good: list[bytes], seed: int) -> list[Bad | bytes]:
    """Every bad record `REPEATS` times among the good ones, which keep their order."""
    draw = random.Random(seed)
    records: list[Bad | bytes] = [*bad] * REPEATS
    draw.shuffle(records)
    for place, record in zip(
        sorted(draw.sample(range(len(records)), len(good))), reversed(good), strict=True
    ):
        records.insert(len(records) - place, record)
    return records


def _check(out: Path, clean: Path, records: list[Bad | bytes], name: str, first_line: int) -> None:
    """Every record is where it belongs, and the good ones are as in the run over them alone."""
    assert_complete(out, len(records))
    failures = {row["prompt_id"]: row for row in read(out, "failures").to_pylist()}
    assert set(failures) == {number for number, record in enumerate(records) if isinstance(record, Bad)}
    for number, row in failures.items():
        record = records[number]
        assert isinstance(record, Bad)
        assert row["error"] == record.error, row
        assert row["stage"] in ("read", "tokenize")
        assert row["message"].startswith(f"{name}:{first_line + number}: "), row
        assert "\n" not in row["message"]
    good = [number for number, record in enumerate(records) if isinstance(record, bytes)]
    for table in ("prompts", "layers", "neurons", "tokens"):
        assert_same_rows(
            read(out, table), renumbered(read(clean, table), table, dict(enumerate(good))), table
        )


def test_bad_json_lines_become_failures_and_leave_the_good_ones_alone(model: Path, tmp_path: Path) -> None:
    good = [_line(**record) for record in some_prompts(24)]
    records = _mixed(BAD_LINES, good, seed=1)
    assert len(records) - len(good) >= 60
    mixed, alone = tmp_path / "mixed.jsonl", tmp_path / "good.jsonl"
    mixed.write_bytes(b"\n".join(r.content if isinstance(r, Bad) else r for r in records))
    alone.write_bytes(b"\n".join(good))

    done = _run(model, mixed, tmp_path / "out")

    assert done.status == 1
    assert f"{len(records) - len(good)} prompts could not be processed" in done.stdout
    assert _run(model, alone, tmp_path / "clean").status == 0
    _check(tmp_path / "out", tmp_path / "clean", records, "mixed.jsonl", first_line=1)


def test_bad_csv_rows_become_failures_and_leave_the_good_ones_alone(model: Path, tmp_path: Path) -> None:
    good = [_csv(record["prompt"], record["target"]) for record in some_prompts(12)]
    records = _mixed(BAD_ROWS, good, seed=2)
    mixed, alone = tmp_path / "mixed.csv", tmp_path / "good.csv"
    header = b"prompt,target"
    mixed.write_bytes(b"\n".join([header, *(r.content if isinstance(r, Bad) else r for r in records)]))
    alone.write_bytes(b"\n".join([header, *good]))

    assert _run(model, mixed, tmp_path / "out").status == 1
    assert _run(model, alone, tmp_path / "clean").status == 0
    _check(tmp_path / "out", tmp_path / "clean", records, "mixed.csv", first_line=2)


def _csv(*cells: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue().encode()


@pytest.mark.parametrize("bad", [bad for bad in BAD_LINES if bad.error not in ("too-long",)])
def test_on_error_fail_names_the_first_bad_line_and_commits_nothing(
    bad: Bad, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(
        b"\n".join([_line(prompt="a", target=" y"), _line(prompt="b", target=" y"), bad.content])
    )

    done = _run(model, path, tmp_path / "out", "--on-error", "fail")

    assert done.status == 2
    assert "prompts.jsonl:3: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert count_commits(tmp_path / "out") == 0


def test_on_error_fail_refuses_an_unreadable_line_before_anything_is_loaded(
    model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.csv"
    path.write_bytes(b"prompt,target\na, y\nb\n")
    line = error_line(_run(model, path, tmp_path / "out", "--on-error", "fail"))
    assert line.startswith("prompts.csv:3: ")
    assert not (tmp_path / "out" / "run.json").exists()


def test_on_error_fail_runs_to_the_end_when_nothing_is_bad(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "prompts.jsonl", some_prompts(3))
    assert _run(model, path, tmp_path / "out", "--on-error", "fail").status == 0
    assert_complete(tmp_path / "out", 3)


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json", "prompts.csv"])
def test_a_column_of_another_name_is_refused_before_the_model_loads(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / name, tmp_path / "out"
    record = {"text": "a", "answer": " y"}
    csv = "text,answer\n" + "a, y\n" * 3
    path.write_text(
        csv if name.endswith("csv") else json.dumps([record] * 3) if name.endswith("json") else ""
    )
    if name.endswith("jsonl"):
        write_jsonl(path, [record] * 3)

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    for command in ("run", "plan"):
        with monkeypatch.context() as patch:
            patch.setattr("backlens.backward_lens.load_model", load)
            options = ("--executor", "local") if command == "run" else ()
            done = called(command, "--model", model, "--prompts", path, "--out", out, *options)
        assert done.status == 2
        line = error_line(done)
        assert line == (
            f"{name}: in every record, no field 'prompt' (found: text, answer); "
            "name it with --prompt-field text"
        )
        assert not out.exists()
    assert _run(model, path, out, "--prompt-field", "text", "--target-field", "answer").status == 0
    assert_complete(out, 3)


@pytest.mark.parametrize(
    "content", [b'{"prompt": "a", "target": ""}\noops\n', b'{"prompt": "~", "target": " y"}']
)
def test_when_every_prompt_failed_that_is_said_first_and_nothing_is_recommended(
    content: bytes, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    done = _run(model, tmp_path / "p.jsonl", tmp_path / "out")
    assert done.status == 1
    assert done.stdout.startswith("every prompt failed: ")
    assert "Next" not in done.stdout
    planned = called("plan", "--model", model, "--prompts", tmp_path / "p.jsonl")
    assert planned.status == 2
    assert error_line(planned).startswith("prompts: none of ")
    assert "p.jsonl:1: " in error_line(planned)


def test_a_plan_goes_on_to_the_first_prompt_that_can_be_processed(model: Path, tmp_path: Path) -> None:
    lines = [_line(prompt="", target=" y")] * 600 + [_line(prompt="a", target=" y")] * 2
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    done = called("plan", "--model", model, "--prompts", tmp_path / "p.jsonl")
    assert done.status == 0, done.stderr
    assert "600 of 602 prompts cannot be read" in done.stdout


def test_a_prompt_that_has_rows_is_recommended(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join([_line(prompt="", target=" y"), b"oops", _line(prompt="a", target=" y")]))
    done = _run(model, path, tmp_path / "out")
    assert f"backlens query {tmp_path / 'out'} --prompt 2" in done.stdout


def test_subjects_that_prompts_do_not_name_are_counted(model: Path, tmp_path: Path) -> None:
    prompts = ["Dana is", "Dan is", "Dan and Dan", "no Dan~", "Danish"]
    path = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": p, "target": " y", "subject": "Dan"} for p in prompts]
    )
    done = _run(model, path, tmp_path / "out", "--positions", "subject+last")
    assert done.status == 0, done.stderr
    starts = read(tmp_path / "out", "prompts")["subject_start"].to_pylist()
    assert starts == [None, 0, 8, 3, None]
    absent = (
        "prompts that do not name their subject in whole words: 2 (subject_start is null; "
        "--positions subject+last: only their last position has rows in tokens)"
    )
    repeated = "prompts that name their subject several times: 1 "
    assert absent in done.stderr
    assert absent in done.stdout
    assert repeated in done.stdout
    planned = called("plan", "--model", model, "--prompts", path, "--positions", "subject+last")
    assert absent in planned.stdout
    assert repeated in planned.stdout
    clean = _run(model, path, tmp_path / "out2", "--limit", 2, "--positions", "all")
    assert "whole words: 1 (subject_start is null)" in clean.stdout


@pytest.mark.parametrize("target_mode", ["first", "all"])
@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT, CONTEXT + 1])
def test_a_prompt_that_just_fits_the_context_is_processed(
    length: int, target_mode: str, model: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a" * length, "target": "yz"}])
    fits = length + (1 if target_mode == "all" else 0) <= CONTEXT
    assert _run(model, path, tmp_path / "out", "--target-mode", target_mode).status == (0 if fits else 1)
    assert read(tmp_path / "out", "prompts").num_rows == int(fits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["Z", "!"])
def test_a_prompt_whose_numbers_overflow_fails_without_touching_its_neighbours(
    broken: str, value: float, tmp_path: Path
) -> None:
    # "!" is token 0: what a batch is padded with must not matter.
    tokenizer = byte_tokenizer()
    model = random_model(CONFIGS["llama"])
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(broken)] = value  # pyright: ignore
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = some_prompts(10)
    places = (0, 4, 9)
    for place in places:
        records[place]["prompt"] += broken + "end"
    mixed = write_jsonl(tmp_path / "mixed.jsonl", records)
    good = [number for number in range(10) if number not in places]
    alone = write_jsonl(tmp_path / "good.jsonl", [records[number] for number in good])

    done = _run(tmp_path / "model", mixed, tmp_path / "out")

    assert done.status == 1, done.stderr
    assert _run(tmp_path / "model", alone, tmp_path / "clean").status == 0
    assert_complete(tmp_path / "out", 10)
    failures = read(tmp_path / "out", "failures").to_pylist()
    assert [(row["prompt_id"], row["stage"], row["error"]) for row in failures] == [
        (place, "compute", "not-finite") for place in places
    ]
    assert [row["message"].split(": ")[0] for row in failures] == [f"mixed.jsonl:{p + 1}" for p in places]
    for table in ("prompts", "layers", "neurons", "tokens"):
        rows = read(tmp_path / "out", table)
        assert _all_finite(rows)
        clean = renumbered(read(tmp_path / "clean", table), table, dict(enumerate(good)))
        assert_same_rows(rows, clean, table)


def _all_finite(rows: pa.Table) -> bool:
    floats = [
        column.combine_chunks().flatten() if pa.types.is_list(column.type) else column
        for column in rows.columns
        if pa.types.is_floating(getattr(column.type, "value_type", column.type))
    ]
    return all(np.isfinite(values.drop_null().to_numpy()).all() for values in floats)


def _run(model: Path, prompts: Path, out: Path, *options: object) -> Any:
    command = ("run", "--model", model, "--prompts", prompts, "--out", out, "--executor", "local")
    return called(*command, "--shard-prompts", 16, "--modules", "all", "--neurons", 4, "--top-k", 5, *options)
