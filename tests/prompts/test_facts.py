"""Prompts from CounterFact and zsRE."""

import json
from pathlib import Path
from typing import Any

from backlens.config import PromptFields
from backlens.prompts.prompt import Rejected
from tests.prompts.inputs import (
    only_prompt,
    read,
)

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is {x} or {}",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle {} Darrieux",
    },
    "paraphrase_prompts": ["Danielle was born in"],
    "neighborhood_prompts": ["Léon is a speaker of"],
}
ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "answers": ["Illinois Institute of Technology", "IIT"],
    "alt": "University of Michigan",
    "loc": "nq question: who played desmond",
}


def write_array(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def test_counterfact_is_recognised_and_its_subject_put_into_the_prompt(tmp_path: Path):
    prompt = only_prompt(write_array(tmp_path / "facts.json", [COUNTERFACT]))
    # The first pair of braces is the place of the subject; any others are text.
    assert prompt.prompt == "The mother tongue of Danielle {} Darrieux is {x} or {}"
    assert (prompt.target, prompt.subject) == (" English", "Danielle {} Darrieux")
    assert (prompt.id, prompt.relation, prompt.where) == ("7", "P103", "facts.json[0]")
    assert json.loads(prompt.meta or "") == {
        "paraphrase_prompts": ["Danielle was born in"],
        "neighborhood_prompts": ["Léon is a speaker of"],
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
    }


def test_the_true_target_of_counterfact_can_be_chosen(tmp_path: Path):
    path = write_array(tmp_path / "facts.json", [COUNTERFACT])
    assert only_prompt(path, PromptFields(target="target_true")).target == " French"


def test_a_leading_space_is_not_added_twice(tmp_path: Path):
    path = write_array(tmp_path / "facts.json", [{**ZSRE, "answers": [" Rome"]}])
    assert only_prompt(path).target == " Rome"


def test_a_space_at_the_end_of_the_prompt_is_not_doubled(tmp_path: Path):
    path = write_array(tmp_path / "facts.json", [{**ZSRE, "src": "He attended ", "answers": ["Rome"]}])
    assert (only_prompt(path).prompt, only_prompt(path).target) == ("He attended ", "Rome")


def test_zsre_is_recognised(tmp_path: Path):
    path = write_array(tmp_path / "zsre.json", [ZSRE])
    prompt = only_prompt(path)
    assert prompt.prompt == "What university did Watts Humphrey attend?"
    assert (prompt.target, prompt.subject) == (" Illinois Institute of Technology", "Watts Humphrey")
    assert json.loads(prompt.meta or "") == {key: ZSRE[key] for key in ("answers", "alt", "loc")}
    assert only_prompt(path, PromptFields(target="alt")).target == " University of Michigan"


def test_bad_facts_are_rejected_with_their_index(tmp_path: Path):
    rewrite = COUNTERFACT["requested_rewrite"]
    assert isinstance(rewrite, dict)

    def changed(**changes: Any) -> dict[str, Any]:
        return {**COUNTERFACT, "requested_rewrite": {**rewrite, **changes}}

    records = [
        COUNTERFACT,
        3,
        {"case_id": 1},
        changed(target_new=None),
        changed(target_new={"str": ""}),
        changed(subject=None),
        changed(prompt=5),
        changed(prompt=" "),
    ]
    results = read(write_array(tmp_path / "facts.json", records))
    assert [getattr(result, "error", None) for result in results] == [
        None,
        "not-an-object",
        "missing-field",
        "missing-field",
        "empty-target",
        "missing-field",
        "not-text",
        "empty-prompt",
    ]
    assert all(
        result.message.startswith(f"facts.json[{index}]: ")
        for index, result in enumerate(results)
        if isinstance(result, Rejected)
    )


def test_the_first_record_is_peeked_at_however_long_it_is(tmp_path: Path):
    long = {"a": "é" * 300_000, **COUNTERFACT}
    assert only_prompt(write_array(tmp_path / "facts.json", [long])).id == "7"
