"""Reading of requests: the place of the subject, which is the position of ROME's key, and refusals."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from backlens.cli.main import call
from backlens.editing.activations import subject_last, wordings
from backlens.editing.evaluate import Bystanders
from backlens.editing.request import read_requests
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel


def requested(tmp_path: Path, prompt: str, subject: str | None, name: str = "e.jsonl") -> Any:
    record = {"prompt": prompt, "subject": subject, "target_new": "Lima"}
    (tmp_path / name).write_text(json.dumps([record] if name.endswith(".json") else record))
    (request,) = read_requests(str(tmp_path / name))
    return request


@pytest.mark.parametrize("prefix", ["", "Dan said it. "])
@pytest.mark.parametrize(
    ("prompt", "subject", "until"),
    [
        ("Dana, friend of {}, lives", "Dan", "Dana, friend of Dan"),
        ("{}, friend of Dan, lives", "Dan", "Dan"),
        ("Dana, friend of Dan, lives", "Dan", "Dana, friend of Dan"),
        ("Dan met Dan in", "Dan", "Dan met Dan"),
        ("Dan's friend lives", "Dan", "Dan"),
        ("In New\u00a0York lives", "New York", "In New\u00a0York"),
        ("Dan, DAN lives", "dAN", "Dan, DAN"),
    ],
)
def test_the_key_is_at_the_end_of_the_subject(
    demo: LoadedModel, tmp_path: Path, prompt: str, subject: str, until: str, prefix: str
):
    request = requested(tmp_path, prompt, subject)
    (example,) = wordings(demo, request, [prefix])
    ids = list(example.token_ids[: subject_last(example, "here") + 1])
    said = demo.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    expected = demo.tokenizer.decode(
        demo.tokenizer(prefix + until)["input_ids"], clean_up_tokenization_spaces=False
    )
    assert said == expected


def test_an_array_of_edits_is_read_like_json_lines(tmp_path: Path):
    one = requested(tmp_path, "{} is in", "Dan", "e.json")
    assert (one.prompt, one.target_new, one.where) == ("Dan is in", " Lima", "e.json[0]")


def test_a_subject_of_other_normal_form_is_found(tmp_path: Path):
    request = requested(tmp_path, "Léon is in", unicodedata.normalize("NFD", "Léon"))
    assert request.subject_place().end == 4


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"text": "a", "target_new": "b"},
            "no field 'prompt' (found: text, target_new); rename the one that holds the 'prompt'",
        ),
        (
            {"prompt": "{} is", "target_new": "b"},
            "no field 'subject' (found: prompt, target_new); rename the one that holds the 'subject'",
        ),
        (
            {"prompt": "Dana is", "subject": "Dan", "target_new": "b"},
            "the prompt does not hold its subject 'Dan' in whole words; write {} there",
        ),
    ],
)
def test_what_cannot_be_an_edit_is_refused_in_words_of_its_own(
    record: dict[str, str], problem: str, tmp_path: Path, capsys: Any
):
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(BacklensError) as caught:
        read_requests(str(path))
    assert str(caught.value) == f"e.jsonl:1: {problem}"
    assert call(["edit", "--model", str(tmp_path / "no model"), "--edits", str(path)]) == 2  # before it loads
    assert capsys.readouterr().err == f"backlens: e.jsonl:1: {problem}\n"


@pytest.mark.parametrize(
    ("prompt", "subject", "problem"),
    [("Dana is", "Dan", "in whole words"), ("{}", "", "--prompt is empty"), (" ", "x", "--prompt is empty")],
)
def test_a_typed_prompt_names_its_subject(prompt: str, subject: str, problem: str, capsys: Any):
    assert call(["edit", "--prompt", prompt, "--subject", subject, "--target-new", "Lima"]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_that_a_subject_is_named_twice_is_said(capsys: Any):
    typed = ["--prompt", "Dan met Dan in", "--subject", "Dan", "--target-new", "Lima"]
    assert call(["edit", *typed, "--lr", "8", "--normalise", "length"]) == 0
    assert "prompts that name their subject several times: 1" in capsys.readouterr().err


def test_a_file_of_bystanders_without_prompts_is_refused_in_words_of_its_own(tmp_path: Path):
    (tmp_path / "f.jsonl").write_text('{"text": "a", "target": "b"}')
    with pytest.raises(BacklensError) as caught:
        Bystanders.read(str(tmp_path / "f.jsonl"), None)
    assert str(caught.value) == (
        "f.jsonl:1: no field 'prompt' (found: text, target); rename the one that holds the 'prompt'"
    )
