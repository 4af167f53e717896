"""Records and files that are no prompts: each is reported with its place, and only itself is lost."""

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backlens.config import PromptFields, PromptFormat
from backlens.errors import BacklensError
from backlens.prompts.prompt import Prompt, Rejected
from backlens.prompts.read import read_prompts
from tests.prompts.inputs import (
    PARIS,
    ROME,
    only_prompt,
    only_rejection,
    read,
    write_jsonl,
)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b'{"prompt": "a", "target"', "broken-json", "broken JSON at column 25"),
        (b'{"prompt": ' + b"[" * 100_000, "broken-json", "nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "broken-json", "broken JSON"),
        (b'["a", "b"]', "not-an-object", "not an object"),
        (b'{"prompt": "\xe9", "target": "b"}', "not-utf8", "byte 0xe9 at column 13 is not UTF-8"),
        (b'{"prompt": "\\ud800", "target": "b"}', "not-utf8", "half of a surrogate pair"),
        (b'{"prompt": "a", "target": "b", "id": "\\udfff"}', "not-utf8", "field 'id'"),
        (b'{"prompt": "a"}', "missing-field", "no field 'target' (found: prompt); name it with --target-"),
        (b'{"prompt": null, "target": "b"}', "missing-field", "field 'prompt' is null"),
        (b'{"prompt": "a", "target": "b", "target": "c"}', "broken-json", "has the key 'target' twice"),
        (b'{"prompt": "a", "target": "b", "x": [{"y": 1, "y": 2}]}', "broken-json", "has the key 'y' twice"),
        (b'{"prompt": "a", "target": 4}', "not-text", "field 'target' is a number, not text"),
        (b'{"prompt": ["a"], "target": "b"}', "not-text", "field 'prompt' is a list, not text"),
        (b'{"prompt": " \\n", "target": "b"}', "empty-prompt", "field 'prompt' is empty"),
        (b'{"prompt": "a", "target": ""}', "empty-target", "field 'target' is empty"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_bad_jsonl_line_is_rejected_with_its_place_and_reason(
    tmp_path: Path, line: bytes, code: str, words: str
):
    (tmp_path / "p.jsonl").write_bytes(line + b"\n")
    record = only_rejection(tmp_path / "p.jsonl")
    assert (record.prompt_id, record.stage, record.error) == (0, "read", code)
    assert record.message.startswith("p.jsonl:1: ")
    assert words in record.message


def test_a_target_of_white_space_is_a_target(tmp_path: Path):
    assert only_prompt(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "target": "\n"}])).target == "\n"


@pytest.mark.parametrize(
    ("record", "fields", "remedy"),
    [
        ({"prompt": "a", "answer": "b"}, PromptFields(), "--target-field answer"),
        ({"Prompt": "a", "target": "b"}, PromptFields(), "--prompt-field Prompt"),
        ({"question": "a", "target": "b"}, PromptFields(), "--prompt-field question"),
        ({"prompt": "a", "right answer": "b"}, PromptFields(target="right anser"), "'right answer'"),
        ({"prompt": "a", "zz": "b"}, PromptFields(), "--target-field FIELD"),
    ],
)
def test_a_missing_field_comes_with_the_flag_and_the_likeliest_name(
    tmp_path: Path, record: dict[str, str], fields: PromptFields, remedy: str
):
    message = only_rejection(write_jsonl(tmp_path / "p.jsonl", [record]), fields).message
    assert f"(found: {', '.join(record)}); name it with --" in message
    assert message.endswith(remedy)


def test_the_message_of_the_readme_is_word_for_word(tmp_path: Path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [PARIS] * 16 + [{"prompt": "a", "answer": "b"}])
    last = read(path)[-1]
    assert isinstance(last, Rejected)
    assert last.message == (
        "prompts.jsonl:17: no field 'target' (found: prompt, answer); name it with --target-field answer"
    )


def test_a_subject_field_that_no_record_has_is_a_typo_and_said(tmp_path: Path):
    path = write_jsonl(tmp_path / "p.jsonl", [ROME, PARIS])
    with pytest.raises(
        BacklensError, match=r"^p\.jsonl: in every record, no field 'subjct' .*-field subject$"
    ):
        read(path, fields=PromptFields(subject="subjct"))


def test_a_subject_field_may_be_absent_from_some_records(tmp_path: Path):
    path = write_jsonl(tmp_path / "p.jsonl", [PARIS, {**PARIS, "who": "France"}])
    records = read(path, fields=PromptFields(subject="who"))
    assert [getattr(record, "subject", "rejected") for record in records] == [None, "France"]


def test_a_message_is_one_line_that_can_be_stored_even_if_field_names_are_hostile(tmp_path: Path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"a\nb": 1, "\ud800": 2, "\u2028": 3, "x" * 5000: 4}])
    message = only_rejection(path).message
    assert len(message.splitlines()) == 1
    assert len(message.encode("utf-8")) < 500


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (b"a,b,c", "bad-row"),
        (b"a", "bad-row"),
        (b"a,\xff", "not-utf8"),
        (b'"a"b,c', "bad-row"),
        (b",b", "empty-prompt"),
    ],
)
def test_a_bad_csv_row_is_rejected_alone(tmp_path: Path, row: bytes, code: str):
    (tmp_path / "p.csv").write_bytes(b"prompt,target\nx,y\n" + row + b"\nx,y\n")
    before, bad, after = read(tmp_path / "p.csv")
    assert isinstance(before, Prompt)
    assert isinstance(bad, Rejected)
    assert isinstance(after, Prompt)
    assert (bad.prompt_id, bad.error, bad.message.partition(" ")[0]) == (1, code, "p.csv:3:")


def test_a_parquet_row_whose_text_is_not_utf8_is_rejected_alone(tmp_path: Path):
    raw = pa.array([b"good", b"bad \xff", b"good"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"prompt": text, "target": ["a", "b", "c"]}), tmp_path / "p.parquet")
    records = read(tmp_path / "p.parquet")
    assert [getattr(record, "error", None) for record in records] == [None, "not-utf8", None]


BAD_LINES = {
    b"{": "broken-json",
    b"3": "not-an-object",
    b"\xff": "not-utf8",
    b"{}": "missing-field",
    b'{"prompt": 1, "target": "b"}': "not-text",
    b'{"prompt": "", "target": "b"}': "empty-prompt",
    b'{"prompt": "a", "target": ""}': "empty-target",
}


@given(st.lists(st.one_of(st.none(), st.sampled_from([b"", b" \t", *BAD_LINES])), max_size=30))
@settings(max_examples=60, deadline=None)
def test_bad_lines_anywhere_are_each_found_and_the_ordinals_stay(lines: list[bytes | None]):
    url = "memory://mixed.jsonl"
    good = json.dumps(PARIS).encode()
    fsspec.filesystem("memory").pipe_file(
        "/mixed.jsonl", b"\n".join(line or b"" if line is not None else good for line in lines)
    )
    expected = [
        (number, None if line is None else BAD_LINES[line])
        for number, line in enumerate(lines, start=1)
        if line is None or line.strip()
    ]
    records = read(url)
    assert [record.prompt_id for record in records] == list(range(len(expected)))
    for record, (number, code) in zip(records, expected, strict=True):
        if isinstance(record, Prompt):
            assert (record.where, code) == (f"mixed.jsonl:{number}", None)
        else:
            assert (record.error, record.message.partition(" ")[0]) == (code, f"mixed.jsonl:{number}:")


# Whole files that cannot be read


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", b'[{"src": "a", "answers": ["b"]},\n {]', r"p\.json:2: broken JSON at column 3"),
        ("p.json", b'[{"src": "a", "answers": ["b"]},\n "\xff"]', r"p\.json:2: not UTF-8"),
        ("p.json", b'{\n"data": [{"prompt": "a", "target": "b"}]}', r"object of several lines .* an array"),
        ("p.json", b'{"prompt": "a", "target": "b"}, {', r"object of several lines .*--format jsonl"),
        ("p.json", b'"prompt"', r"neither a JSON array of records nor one record per line"),
        ("p.json", b" \n", r"is empty"),
        ("p.json", b'[{"prompt": "a", "target": "b", "prompt": "c"}]', r"has the key 'prompt' twice"),
        (
            "p.jsonl",
            '{"prompt": "a", "target": "b"}'.encode("utf-16"),
            r"p\.jsonl: is UTF-16.* save .* UTF-8",
        ),
        ("p.csv", "prompt,target\na,b\n".encode("utf-16"), r"p\.csv: is UTF-16"),
        ("p.jsonl.bz2", bz2.compress(b"{}\n") + b"{}\n", r"p\.jsonl\.bz2:\d+: the file is damaged"),
        ("p.jsonl.xz", lzma.compress(b"{}\n") + b"{}\n", r"p\.jsonl\.xz:\d+: the file is damaged"),
        ("p.jsonl.gz", gzip.compress(b"{}\n", mtime=0) + b"{}\n", r"p\.jsonl\.gz:\d+: the file is damaged"),
        ("p.jsonl.zip", b"PK not really", r"p\.jsonl\.zip: cannot be opened"),
        ("p.parquet", b"PAR1 not really", r"p\.parquet: not a readable Parquet file"),
        ("p.csv", b"prompt,\xff\n", r"p\.csv:1: the header cannot be read"),
        ("p.csv", b"prompt,target,prompt\na,b,c\n", r"p\.csv:1: the header has 'prompt' twice"),
        (
            "p.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n' * 9999, mtime=0)[:-20],
            r"p\.jsonl\.gz:\d+: the file is damaged",
        ),
        ("p.jsonl.gz", b"plain text", r"p\.jsonl\.gz:1: the file is damaged"),
        ("p.txt", b"hello", r"cannot tell the format .*\.jsonl.*--format \(jsonl, json, csv"),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_said_in_one_line(
    tmp_path: Path, name: str, content: bytes, words: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BacklensError, match=words) as caught:
        read(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("names", [[], ["a.jsonl", "b.jsonl"]])
def test_a_zip_that_does_not_hold_one_file_is_refused_with_their_names(tmp_path: Path, names: list[str]):
    with zipfile.ZipFile(tmp_path / "p.jsonl.zip", "w") as archive:
        for name in names:
            archive.writestr(name, json.dumps(PARIS))
    with pytest.raises(BacklensError, match=rf"p\.jsonl\.zip: .*{len(names)} files \({', '.join(names)}\)"):
        read(tmp_path / "p.jsonl.zip")


def test_a_zip_of_one_file_is_read_whatever_macos_puts_beside_it(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "p.jsonl.zip", "w") as archive:
        archive.mkdir("folder")
        archive.writestr("folder/p.jsonl", json.dumps(PARIS))
        archive.writestr("__MACOSX/folder/._p.jsonl", b"\x00")
    assert only_prompt(tmp_path / "p.jsonl.zip").target == " Paris"


@pytest.mark.parametrize(("suffix", "compress"), [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_files_one_after_another_are_read_whole(tmp_path: Path, suffix: str, compress: Any):
    path, lines = (
        tmp_path / f"p.jsonl.{suffix}",
        [json.dumps(each).encode() + b"\n" for each in (PARIS, ROME)],
    )
    path.write_bytes(b"".join(compress(line * 50_000) for line in lines))
    assert len(read(path)) == 100_000
    path.write_bytes(compress(lines[0] * 50_000)[:-9])
    with pytest.raises(BacklensError, match="the file is damaged or incomplete"):
        read(path)


def test_a_parquet_column_that_is_there_twice_is_refused_by_name(tmp_path: Path):
    columns = [["a"], ["b"], ["c"]]
    pq.write_table(pa.table(columns, ["prompt", "target", "prompt"]), tmp_path / "p.parquet")
    with pytest.raises(BacklensError, match=r"^p\.parquet: has the column 'prompt' twice; rename"):
        read(tmp_path / "p.parquet")


@pytest.mark.parametrize("format", ["auto", "jsonl", "json", "csv", "parquet", "counterfact", "zsre"])
def test_a_missing_file_is_refused_before_anything_is_read(tmp_path: Path, format: PromptFormat):
    with pytest.raises(BacklensError, match=r"missing\.jsonl: no such file"):
        read_prompts(str(tmp_path / "missing.jsonl"), format, PromptFields(), None)


def test_a_relative_path_with_a_known_suffix_is_not_taken_for_a_hub_id():
    with pytest.raises(BacklensError, match=r"^data/prompts\.jsonl: no such file"):
        read_prompts("data/prompts.jsonl", "auto", PromptFields(), None)


def test_a_directory_that_is_no_dataset_is_refused(tmp_path: Path):
    for format in ("auto", "dataset", "jsonl"):
        with pytest.raises(BacklensError, match="director"):
            read(tmp_path, format)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(BacklensError, match=r"^nosuch://x/p\.jsonl: cannot be opened"):
        read("nosuch://x/p.jsonl")


def test_an_empty_file_holds_no_prompts(tmp_path: Path):
    for name in ("p.jsonl", "p.csv"):
        (tmp_path / name).touch()
        assert read(tmp_path / name) == []
