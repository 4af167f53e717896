"""Reading prompts: every record of the input comes out once, in order, as a prompt or as a reason why not."""

import csv
import datetime
import gzip
import io
import json
import random
import tracemalloc
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from backlens.config import PromptFields
from backlens.errors import BacklensError
from backlens.prompts.prompt import Prompt, Rejected, SubjectPlace
from backlens.prompts.read import read_prompts
from tests.prompts.inputs import (
    PARIS,
    ROME,
    only_prompt,
    read,
    surveyed,
    write_csv,
    write_dataset,
    write_jsonl,
    write_parquet,
)

# What comes out


def test_a_jsonl_record_comes_out_as_it_was_written(tmp_path: Path):
    line = {**ROME, "relation": "capital", "year": 1946, "note": None}
    assert read(write_jsonl(tmp_path / "facts.jsonl", [line])) == [
        Prompt(
            prompt_id=0,
            prompt="The capital of Italy is",
            target=" Rome",
            where="facts.jsonl:1",
            id="q2",
            subject="Italy",
            relation="capital",
            meta='{"note": null, "year": 1946}',
        )
    ]


def test_no_space_is_added_to_the_target_of_a_column_format(tmp_path: Path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": " The capital: ", "target": "Paris"}])
    assert (only_prompt(path).prompt, only_prompt(path).target) == (" The capital: ", "Paris")


def test_meta_is_null_without_other_columns(tmp_path: Path):
    assert only_prompt(write_jsonl(tmp_path / "p.jsonl", [ROME])).meta is None


def test_fields_can_be_named_and_the_rest_goes_to_meta(tmp_path: Path):
    record = {"q": "2 + 2 =", "a": " 4", "who": "2", "key": 12, "prompt": "unused"}
    fields = PromptFields(prompt="q", target="a", subject="who", id="key")
    prompt = only_prompt(write_jsonl(tmp_path / "p.jsonl", [record]), fields)
    assert (prompt.prompt, prompt.target, prompt.subject, prompt.id) == ("2 + 2 =", " 4", "2", "12")
    assert prompt.meta == '{"prompt": "unused"}'


def test_a_numeric_id_becomes_text(tmp_path: Path):
    assert only_prompt(write_jsonl(tmp_path / "p.jsonl", [{**PARIS, "id": 41}])).id == "41"


def test_a_subject_that_the_prompt_does_not_hold_is_kept(tmp_path: Path):
    assert only_prompt(write_jsonl(tmp_path / "p.jsonl", [{**PARIS, "subject": "Peru"}])).subject == "Peru"


def test_a_column_that_only_happens_to_be_called_relation_stays_in_meta(tmp_path: Path):
    prompt = only_prompt(write_jsonl(tmp_path / "p.jsonl", [{**PARIS, "relation": ["a", "b"]}]))
    assert prompt.relation is None
    assert prompt.meta == '{"relation": ["a", "b"]}'


def test_meta_is_strict_json_whatever_the_columns_hold(tmp_path: Path):
    line = '{"prompt": "a", "target": "b", "score": NaN, "best": Infinity, "odd": "\\ud800", "ü": "é"}'
    (tmp_path / "p.jsonl").write_text(line, encoding="utf-8")
    meta = only_prompt(tmp_path / "p.jsonl").meta
    assert meta is not None

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(meta, parse_constant=refuse) == {
        "score": "nan",
        "best": "inf",
        "odd": "?",
        "ü": "é",
    }
    meta.encode("utf-8")


IDS = {
    "decimal": (pa.array([Decimal("10.50")]), "10.50"),
    "uuid": (pa.array([UUID(int=7).bytes], pa.uuid()), "00000000-0000-0000-0000-000000000007"),
    "fixed bytes": (pa.array([b"0123"], pa.binary(4)), "30313233"),
    "bytes": (pa.array([b"q1"]), "q1"),
    "date": (pa.array([datetime.date(2024, 2, 12)]), "2024-02-12"),
    "far date": (pa.array([10_000_000], pa.date32()), "29349-01-26"),
    "bool": (pa.array([True]), "true"),
    "float": (pa.array([1.5]), "1.5"),
    "list": (pa.array([[1, 2]]), "[1, 2]"),
    "object": (pa.array([{"b": 1, "a": "é"}]), '{"a": "é", "b": 1}'),
    "dictionary": (pa.array(["q1"]).dictionary_encode(), "q1"),
    "null": (pa.array([None]), None),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("fields", [PromptFields(), PromptFields(id="id")])
def test_an_id_of_any_type_is_kept_as_text(tmp_path: Path, name: str, fields: PromptFields):
    column, expected = IDS[name]
    pq.write_table(pa.table({"prompt": ["a"], "target": ["b"], "id": column}), tmp_path / "p.parquet")
    prompt = only_prompt(tmp_path / "p.parquet", fields)
    assert (prompt.id, prompt.meta) == (expected, None)


NOT_UTF8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
OTHERS = {
    "date": (pa.array([10_000_000], pa.date32()), "29349-01-26"),
    "zone": (pa.array([1], pa.timestamp("us", "Mars/Phobos")), "1970-01-01 00:00:00.000001Z"),
    "time": (pa.array([2**60], pa.timestamp("us", "UTC")), f"<value out of range: {2**60}>"),
    "duration": (pa.array([2**62], pa.duration("s")), str(2**62)),
    "nested": (pa.array([[10_000_000] * 9], pa.list_(pa.date32())), f"[{','.join(['29349-01-26'] * 9)}]"),
    "decimal": (pa.array([Decimal("1.50")], pa.decimal256(60, 2)), "1.50"),
    "map": (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())), [["k", 1]]),
    "dictionary": (pa.array([b"a"]).dictionary_encode(), "a"),
    "binary": (pa.array([b"\xff\x00"]), "ff00"),
    "not UTF-8": (NOT_UTF8, "fffe"),
    "half": (pa.array([1.5], pa.float16()), 1.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_parquet_column_that_nobody_asked_for_becomes_json(tmp_path: Path, name: str):
    column, expected = OTHERS[name]
    table = pa.table({"prompt": ["a", "c"], "target": ["b", "d"], "x": pa.concat_arrays([column] * 2)})
    pq.write_table(table, tmp_path / "p.parquet")
    assert [json.loads(getattr(each, "meta", "")) for each in read(tmp_path / "p.parquet")] == [
        {"x": expected}
    ] * 2


def test_an_object_with_one_field_twice_becomes_text(tmp_path: Path):
    twice = pa.StructArray.from_arrays([pa.array([17]), pa.array([18])], names=["a", "a"])
    pq.write_table(pa.table({"prompt": ["a"], "target": ["b"], "x": twice}), tmp_path / "p.parquet")
    text = json.loads(only_prompt(tmp_path / "p.parquet").meta or "")["x"]
    assert "17" in text
    assert "18" in text


def test_a_value_does_not_change_the_text_of_its_neighbours(tmp_path: Path):
    days = pa.array([10_000_000, 1], pa.date32())
    pq.write_table(pa.table({"prompt": ["a", "c"], "target": ["b", "d"], "x": days}), tmp_path / "p.parquet")
    _, near = read(tmp_path / "p.parquet")
    assert isinstance(near, Prompt)
    assert near.meta == '{"x": "1970-01-02"}'


def test_an_array_of_objects_is_read_like_json_lines(tmp_path: Path):
    records = [{**ROME, "year": 1946}, PARIS, 5, {"prompt": "a"}]
    (tmp_path / "p.json").write_text("\ufeff\n " + json.dumps(records, indent=1), encoding="utf-8")
    lines = read(write_jsonl(tmp_path / "p.jsonl", records))
    array = read(tmp_path / "p.json")
    assert [type(record) for record in array] == [Prompt, Prompt, Rejected, Rejected]
    assert [getattr(record, "where", "p.json[2]") for record in array[:3]] == [
        f"p.json[{n}]" for n in range(3)
    ]
    for one, other in zip(array, lines, strict=True):
        if isinstance(one, Prompt):
            assert one == replace(other, where=one.where)  # pyright: ignore
        else:
            assert one.error == getattr(other, "error", None)
    fields = PromptFields(prompt="q", target="a")
    (tmp_path / "q.json").write_text('[{"q": "2 + 2 =", "a": " 4"}]')
    assert only_prompt(tmp_path / "q.json", fields).target == " 4"


def test_json_lines_may_be_named_json(tmp_path: Path):
    assert read(write_jsonl(tmp_path / "p.json", [PARIS, {}, ROME])) == [
        replace(record, message=record.message.replace("p.jsonl", "p.json"))
        if isinstance(record, Rejected)
        else replace(record, where=record.where.replace("p.jsonl", "p.json"))
        for record in read(write_jsonl(tmp_path / "p.jsonl", [PARIS, {}, ROME]))
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "json"])
def test_a_template_is_filled_with_its_subject(tmp_path: Path, suffix: str):
    record = {"prompt": "What the Jordan means to {} is {}", "target": " b", "subject": "Jordan"}
    path = tmp_path / f"p.{suffix}"
    if suffix == "csv":
        write_csv(path, [list(record), list(record.values())])
    elif suffix == "parquet":
        write_parquet(path, [record])
    else:
        path.write_text(json.dumps([record] if suffix == "json" else record))
    prompt = only_prompt(path)
    assert prompt.prompt == "What the Jordan means to Jordan is {}"
    assert prompt.subject_place() == SubjectPlace(25, 31)


def test_braces_without_a_subject_are_text(tmp_path: Path):
    prompt = only_prompt(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x = {}", "target": "\n"}]))
    assert (prompt.prompt, prompt.subject_place()) == ("x = {}", None)


def test_where_the_subject_stood_is_content(tmp_path: Path):
    filled_in = {"prompt": "Dan met Dan in", "target": " b", "subject": "Dan"}
    digests = {
        surveyed(write_jsonl(tmp_path / "p.jsonl", [{**filled_in, "prompt": prompt}])).digest
        for prompt in ("Dan met Dan in", "{} met Dan in", "Dan met {} in")
    }
    assert len(digests) == 3


def test_subjects_that_are_absent_or_repeated_are_counted(tmp_path: Path):
    prompts = ["Dana is", "Dan is", "Dan and Dan", "Dan and {}", "DAN is", "no"]
    records = [{"prompt": prompt, "target": " b", "subject": "Dan"} for prompt in prompts]
    found = surveyed(write_jsonl(tmp_path / "p.jsonl", [*records, PARIS]))
    assert (found.subjects_absent, found.subjects_repeated) == (2, 1)


@pytest.mark.parametrize("count", [1, 3, 1001])
def test_an_input_whose_records_all_lack_a_field_is_refused(tmp_path: Path, count: int):
    path = write_jsonl(tmp_path / "p.jsonl", [{"text": "a", "answer": " b"}] * count)
    words = "the first 1,000 records" if count > 1000 else "every record"
    with pytest.raises(
        BacklensError,
        match=rf"^p\.jsonl: in {words}, no field 'prompt' \(found: text, answer\); .*--prompt-field text$",
    ):
        surveyed(path)


@pytest.mark.parametrize(
    "records",
    [
        [{"text": "a"}] * 999 + [PARIS],
        [{"prompt": "a"}, {"target": "b"}],
        [{"prompt": None, "target": "b"}],
        [{"prompt": "", "target": "b"}, {"target": "b"}],
    ],
)
def test_records_that_fail_for_several_reasons_are_no_matter_of_a_name(
    tmp_path: Path, records: list[dict[str, Any]]
):
    assert surveyed(write_jsonl(tmp_path / "p.jsonl", records)).prompts == len(records)


def test_dates_and_bytes_become_strings_in_meta(tmp_path: Path):
    day = datetime.date(2024, 2, 12)
    record = {**PARIS, "day": day, "raw": b"\xff\x00", "ascii": b"abc", "tags": [{"a": day}]}
    meta = only_prompt(write_parquet(tmp_path / "p.parquet", [record])).meta
    assert json.loads(meta or "") == {
        "day": "2024-02-12",
        "raw": "ff00",
        "ascii": "abc",
        "tags": [{"a": "2024-02-12"}],
    }


# Lines, line numbers and ordinals


def test_blank_lines_are_not_records_but_count_in_line_numbers(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text("\n  \t\n" + json.dumps(PARIS) + "\r\n\n{\n" + json.dumps(ROME))
    records = read(tmp_path / "p.jsonl")
    assert [record.prompt_id for record in records] == [0, 1, 2]
    assert isinstance(records[0], Prompt)
    assert records[0].where == "p.jsonl:3"
    assert isinstance(records[1], Rejected)
    assert records[1].message.startswith("p.jsonl:5: broken JSON at column ")
    assert isinstance(records[2], Prompt)
    assert records[2].where == "p.jsonl:6"


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_a_byte_order_mark_is_accepted(tmp_path: Path, name: str):
    text = json.dumps(PARIS) if name == "p.jsonl" else "prompt,target\nThe capital of France is, Paris\n"
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert only_prompt(tmp_path / name).target == " Paris"


def test_a_csv_record_over_several_lines_is_named_by_its_first(tmp_path: Path):
    rows = [["prompt", "target"], ["one\ntwo\n\nthree", "x"], ["", "y"], ["four", "z"]]
    first, second, third = read(write_csv(tmp_path / "p.csv", rows))
    assert isinstance(first, Prompt)
    assert (first.prompt, first.where) == ("one\ntwo\n\nthree", "p.csv:2")
    assert isinstance(second, Rejected)
    assert second.message.startswith("p.csv:6: ")
    assert isinstance(third, Prompt)
    assert third.where == "p.csv:7"


def test_a_very_long_line_or_cell_is_read(tmp_path: Path):
    long = "word " * 400_000
    for path in (
        write_jsonl(tmp_path / "p.jsonl", [{"prompt": long, "target": "x"}]),
        write_csv(tmp_path / "p.csv", [["prompt", "target"], [long, "x"]]),
    ):
        assert only_prompt(path).prompt == long


def test_an_unclosed_quote_in_a_csv_costs_only_its_own_line(tmp_path: Path):
    (tmp_path / "p.csv").write_text('prompt,target\na,"b\nc,d\n"e, f",g\nh,"i\nj,k\n')
    records = read(tmp_path / "p.csv")
    assert [record.error if isinstance(record, Rejected) else record.prompt for record in records] == [
        "bad-row",
        "c",
        "e, f",
        "bad-row",
        "j",
    ]
    assert [record.where for record in records if isinstance(record, Prompt)] == [
        "p.csv:3",
        "p.csv:4",
        "p.csv:6",
    ]


def test_limit_counts_records_and_rejections(tmp_path: Path):
    path = write_jsonl(tmp_path / "p.jsonl", [PARIS, 5, ROME])
    assert [type(record) for record in read(path, limit=2)] == [Prompt, Rejected]
    assert read(path, limit=0) == []


# Any content, every format

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
filled = texts.filter(lambda text: bool(text.strip()))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
others = st.dictionaries(
    texts.filter(lambda name: name not in {"prompt", "target", "subject", "id", "relation"}),
    json_values,
    max_size=3,
)


@given(st.lists(st.tuples(filled, texts, others), max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_records_come_back_in_order_through_jsonl(records: list[tuple[str, str, dict[str, Any]]]):
    lines = [json.dumps({"prompt": p, "target": t, **rest}, ensure_ascii=False) for p, t, rest in records]
    fsspec.filesystem("memory").pipe_file("/any.jsonl", "\n".join(lines).encode())
    result = read("memory://any.jsonl")
    assert [record.prompt_id for record in result] == list(range(len(records)))
    for record, (prompt, target, rest) in zip(result, records, strict=True):
        assert isinstance(record, Prompt)
        assert (record.prompt, record.target) == (prompt, target)
        assert (json.loads(record.meta) if record.meta else {}) == rest


@given(
    st.lists(
        st.tuples(filled, texts, st.text(st.characters(exclude_categories=["Cs"]), max_size=9)), max_size=8
    )
)
@settings(max_examples=60, deadline=None)
def test_any_records_come_back_in_order_through_csv(records: list[tuple[str, str, str]]):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("prompt", "target", "note"), *records])
    fsspec.filesystem("memory").pipe_file("/any.csv", text.getvalue().encode())
    result = read("memory://any.csv")
    assert [
        (record.prompt_id, record.prompt, record.target, record.meta)
        for record in result
        if isinstance(record, Prompt)
    ] == [
        (ordinal, prompt, target, json.dumps({"note": note}, ensure_ascii=False))
        for ordinal, (prompt, target, note) in enumerate(records)
    ]


@given(st.lists(st.binary(max_size=40), max_size=8))
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes_are_rejected_line_by_line_and_never_crash(lines: list[bytes]):
    content = b"\n".join(lines)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/noise.jsonl", content)
    physical = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert len(read("memory://noise.jsonl")) == sum(bool(line.strip()) for line in physical)
    memory.pipe_file("/noise.csv", b"prompt,target\n" + content)
    records = read("memory://noise.csv")
    assert [record.prompt_id for record in records] == list(range(len(records)))


def test_equal_content_has_an_equal_digest_in_every_format(tmp_path: Path):
    records = [
        {"prompt": f"Prompt {number},\n“quoted”", "target": f" {number}", "subject": "Prompt", "note": "é"}
        for number in range(50)
    ]
    digests = {
        surveyed(path).digest
        for path in (
            write_jsonl(tmp_path / "a.jsonl", records),
            write_csv(tmp_path / "b.csv", [list(records[0]), *(list(record.values()) for record in records)]),
            write_csv(tmp_path / "c.tsv", [list(records[0]), *(list(record.values()) for record in records)]),
            write_parquet(tmp_path / "d.parquet", records),
            write_dataset(tmp_path / "e", records),
        )
    }
    assert len(digests) == 1


@pytest.mark.parametrize("change", ["order", "target", "meta", "rejected", "missing"])
def test_any_change_of_content_changes_the_digest(tmp_path: Path, change: str):
    records: list[Any] = [PARIS, {**ROME, "note": 1}, 5]
    before = surveyed(write_jsonl(tmp_path / "a.jsonl", records)).digest
    records = {
        "order": [records[1], records[0], 5],
        "target": [{**PARIS, "target": "Paris"}, records[1], 5],
        "meta": [PARIS, {**ROME, "note": 2}, 5],
        "rejected": [PARIS, records[1], {}],
        "missing": records[:2],
    }[change]
    assert surveyed(write_jsonl(tmp_path / "a.jsonl", records)).digest != before


def test_the_digest_does_not_depend_on_the_name_or_blank_lines(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", [PARIS, 5, {"prompt": "a"}])
    (tmp_path / "sub: dir").mkdir()
    other = tmp_path / "sub: dir" / "b: c.jsonl"
    other.write_text("\n\n" + (tmp_path / "a.jsonl").read_text().replace("\n", "\r\n\r\n"))
    assert surveyed(other).digest == surveyed(tmp_path / "a.jsonl").digest


def test_a_survey_counts_records_rejections_and_characters(tmp_path: Path):
    result = surveyed(write_jsonl(tmp_path / "p.jsonl", [PARIS, 5, ROME, {}]))
    assert (result.prompts, result.rejected) == (4, 2)
    assert result.characters == sum(
        len(record[key]) for record in (PARIS, ROME) for key in ("prompt", "target")
    )
    assert result.first_rejected is not None
    assert (result.first_rejected.prompt_id, result.first_rejected.error) == (1, "not-an-object")


# Places


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.csv", "p.parquet", "dataset"])
def test_the_format_follows_from_the_name(tmp_path: Path, name: str):
    path = tmp_path / name
    if name.endswith((".jsonl", ".ndjson")):
        write_jsonl(path, [PARIS])
    elif name == "p.csv":
        write_csv(path, [list(PARIS), list(PARIS.values())])
    elif name == "p.parquet":
        write_parquet(path, [PARIS])
    else:
        write_dataset(path, [PARIS])
    assert (only_prompt(path).prompt, only_prompt(path).target) == tuple(PARIS.values())


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_files_are_read(tmp_path: Path, suffix: str):
    content = "".join(json.dumps(record) + "\n" for record in (PARIS, ROME)).encode()
    path = tmp_path / f"p.jsonl{suffix}"
    if suffix == ".zst":
        path.write_bytes(pa.compress(content, codec="zstd", asbytes=True))
    else:
        with fsspec.open(str(path), "wb", compression="infer") as stream:
            stream.write(content)  # pyright: ignore[reportAttributeAccessIssue]
    assert [getattr(record, "target", None) for record in read(path)] == [" Paris", " Rome"]


def test_object_stores_are_read_through_fsspec():
    fsspec.filesystem("memory").pipe_file("/bucket/p.csv.gz", gzip.compress(b"prompt,target\na,b\n"))
    (record,) = read("memory://bucket/p.csv.gz")
    assert isinstance(record, Prompt)
    assert record.where == "p.csv.gz:2"


def test_a_split_of_a_saved_dataset_dict_is_chosen_or_asked_for(tmp_path: Path):
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([PARIS])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "a"))
    datasets.DatasetDict({"dev": rows, "test": rows}).save_to_disk(str(tmp_path / "b"))
    assert only_prompt(tmp_path / "a").where == "a[0]"
    with pytest.raises(BacklensError, match=r"several splits .* /.*/b/dev, /.*/b/test$"):
        read(tmp_path / "b")
    assert only_prompt(tmp_path / "b" / "test").target == " Paris"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name:french:test", ("owner/name", "french", "test")),
    ],
)
def test_a_hub_id_may_name_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple[str, str | None, str]
):
    asked = []

    def load_dataset(path: str, name: str | None, split: str, streaming: bool):
        asked.append((path, name, split))
        assert streaming
        return datasets.Dataset.from_list([PARIS, {"prompt": "", "target": "x"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    good, bad = read(source)
    assert asked == [expected]
    assert isinstance(good, Prompt)
    assert good.target == " Paris"
    assert isinstance(bad, Rejected)
    assert bad.error == "empty-prompt"


# Memory


def test_memory_does_not_grow_with_the_input(tmp_path: Path):
    count = 12_000
    line = json.dumps({**PARIS, "note": "x" * 1500})
    (tmp_path / "p.jsonl").write_text(f"{line}\n" * count)
    (tmp_path / "p.csv").write_text(
        "prompt,target,note\n" + ("The capital of France is, Paris," + "x" * 1500 + "\n") * count
    )
    pq.write_table(
        pa.table({"prompt": ["a" * 1500] * count, "target": ["b"] * count}),
        tmp_path / "p.parquet",
        use_dictionary=False,
    )
    for name in ("p.jsonl", "p.csv", "p.parquet"):
        tracemalloc.start()
        seen = sum(1 for _ in read_prompts(str(tmp_path / name), "auto", PromptFields(), None))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seen == count
        assert peak < 6_000_000, name


def test_the_first_records_do_not_wait_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield json.dumps(PARIS).encode() + b"\n"

    class Endless(io.RawIOBase):
        def __init__(self):
            self._lines = endless()

        def readable(self) -> bool:
            return True

        def __next__(self) -> bytes:
            return next(self._lines)

    (tmp_path / "p.jsonl").touch()
    monkeypatch.setattr(LocalFileSystem, "open", lambda *_: Endless())
    records = read(tmp_path / "p.jsonl", limit=3)
    assert len(records) == 3
    assert asked == 3


def test_reading_twice_gives_the_same(tmp_path: Path):
    records: list[Any] = [PARIS, ROME, 5, {}] * 10
    random.Random(0).shuffle(records)
    path = write_jsonl(tmp_path / "p.jsonl", records)
    assert read(path) == read(path)
    assert surveyed(path) == surveyed(path)
