"""JSON arrays of records: plain ones, and the CounterFact and zsRE files of the literature on editing facts.

CounterFact (arXiv 2202.05262) and zsRE (in the form of the same authors) are read here alone: each record gives the
prompt, and the prompts that an edit of this fact is evaluated with.

Arrays are loaded whole, because the standard parser cannot read one piece by piece. Millions of prompts belong into
JSON Lines.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from backlens.config import PromptFields
from backlens.errors import BacklensError
from backlens.prompts.fields import (
    Row,
    UnfitError,
    checked_prompt,
    checked_target,
    id_text,
    meta,
    name_it,
    no_field,
    optional_text,
    prompt_and_subject,
    rejected,
    text,
)
from backlens.prompts.jsonl_csv import load_json
from backlens.prompts.prompt import SLOT, Prompt, Rejected, filled
from backlens.prompts.source import Source, one_line

_PEEK_BYTES = 1 << 16

ReadRecord = Callable[[Row, PromptFields], Prompt]


@dataclass(frozen=True, slots=True)
class EvaluationPrompts:
    """Prompts that tell whether an edit changed one fact and nothing else. Targets begin with a space."""

    target_true: str | None = None
    """The target before the edit, if the record names it."""
    paraphrases: tuple[str, ...] = ()
    """Other wordings of the prompt, which should give the new target too."""
    neighbourhood: tuple[str, ...] = ()
    """Prompts about other subjects, whose targets should stay."""
    neighbourhood_target: str | None = None
    """Target of the neighbourhood: CounterFact's true target, zsRE's answer to an unrelated question."""
    generation: tuple[str, ...] = ()
    """Beginnings of texts about the subject."""
    references: tuple[str, ...] = ()
    """Texts that are true of the new target, which generated texts are compared with."""


def counterfact_prompts(source: Source, fields: PromptFields) -> Iterator[Prompt | Rejected]:
    """Read a CounterFact file. The target is `target_new`; `fields.target` may name `target_true` instead."""
    return _judged(array_rows(source), fields, counterfact_prompt)


def zsre_prompts(source: Source, fields: PromptFields) -> Iterator[Prompt | Rejected]:
    """Read a zsRE file. The target is in `answers`; `fields.target` may name `alt` or any other key instead."""
    return _judged(array_rows(source), fields, zsre_prompt)


def _judged(
    rows: Iterable[Row | Rejected], fields: PromptFields, read: ReadRecord
) -> Iterator[Prompt | Rejected]:
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            yield read(row, fields)
        except UnfitError as unfit:
            yield unfit.rejected(row)
        except RecursionError:
            yield rejected(
                row.prompt_id, row.where, "broken-json", "nested too deeply to be read; flatten it"
            )


def counterfact_prompt(row: Row, fields: PromptFields) -> Prompt:
    """The prompt of one CounterFact record. Raises UnfitError where the record lacks a field."""
    rewrite = nested(row.values, "requested_rewrite")
    prompt_name, subject_name = fields.prompt or "prompt", fields.subject or "subject"
    target_name, id_name = fields.target or "target_new", fields.id or "case_id"
    prompt = text(rewrite, prompt_name, "prompt")
    slot = None
    if SLOT in prompt:
        prompt, slot = filled(prompt, text(rewrite, subject_name, "subject"))
    target = text(nested(rewrite, target_name), "str", "target")
    used = {prompt_name, subject_name, "relation_id"}
    others = {key: value for key, value in row.values.items() if key not in {id_name, "requested_rewrite"}}
    others |= {key: value for key, value in rewrite.items() if key not in used}
    return Prompt(
        row.prompt_id,
        checked_prompt(prompt, f"requested_rewrite.{prompt_name}"),
        with_space(prompt, checked_target(target, f"requested_rewrite.{target_name}.str")),
        row.where,
        id=id_text(row.values, id_name),
        subject=optional_text(rewrite, subject_name),
        relation=optional_text(rewrite, "relation_id"),
        meta=meta(others),
        slot=slot,
    )


def counterfact_evaluation(row: Row, prompt: str) -> EvaluationPrompts:
    """The evaluation prompts of one CounterFact record, whose prompt is `prompt`."""
    rewrite = nested(row.values, "requested_rewrite")
    true = None
    if "target_true" in rewrite:
        true = with_space(prompt, text(nested(rewrite, "target_true"), "str", "target"))
    return EvaluationPrompts(
        target_true=true,
        paraphrases=texts(row.values, "paraphrase_prompts"),
        neighbourhood=texts(row.values, "neighborhood_prompts"),
        neighbourhood_target=true,
        generation=texts(row.values, "generation_prompts"),
        references=texts(row.values, "reference_texts"),
    )


def zsre_prompt(row: Row, fields: PromptFields) -> Prompt:
    """The prompt of one zsRE record. Raises UnfitError where the record lacks a field."""
    prompt_name, target_name = fields.prompt or "src", fields.target or "answers"
    subject_name, id_name = fields.subject or "subject", fields.id or "id"
    target = row.values.get(target_name)
    if (
        isinstance(target, list) and target
    ):  # several wordings of one answer; CounterFact's authors take the first
        target = text({target_name: target[0]}, target_name, "target")
    elif target == []:
        raise UnfitError("missing-field", f"field {target_name!r} is an empty list; give it an answer")
    else:
        target = text(row.values, target_name, "target")
    prompt, subject, slot = prompt_and_subject(row.values, prompt_name, subject_name)
    used = {prompt_name, subject_name, id_name, "relation"}
    return Prompt(
        row.prompt_id,
        prompt,
        with_space(prompt, checked_target(target, target_name)),
        row.where,
        id=id_text(row.values, id_name),
        subject=subject,
        relation=optional_text(row.values, "relation"),
        meta=meta({key: value for key, value in row.values.items() if key not in used}),
        slot=slot,
    )


def zsre_evaluation(row: Row, prompt: str) -> EvaluationPrompts:
    """The evaluation prompts of one zsRE record, as CounterFact's authors read them: `loc` asks about another fact."""
    around = f"{text(row.values, 'loc', 'prompt')}?" if row.values.get("loc") else None
    answer = text(row.values, "loc_ans", "target") if around else None
    return EvaluationPrompts(
        paraphrases=(text(row.values, "rephrase", "prompt"),) if row.values.get("rephrase") else (),
        neighbourhood=(around,) if around else (),
        neighbourhood_target=with_space(around, answer) if around and answer else None,
    )


def texts(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts; empty if there is no such field."""
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
        raise UnfitError("bad-type", f"field {name!r} is not a list of texts; write a list")
    return tuple(found)


def nested(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name)
    if isinstance(value, Mapping):
        return value
    if name in values:
        raise UnfitError("missing-field", f"field {name!r} is not an object; see the CounterFact format")
    if name == "requested_rewrite":
        raise UnfitError("missing-field", no_field(name, values), name, "; name another --format")
    raise UnfitError("missing-field", no_field(name, values), name, name_it(name, "target", values))


def with_space(prompt: str, target: str) -> str:
    """The target with the space that parts it from the prompt: these files hold bare words."""
    return target if target.startswith(" ") or prompt[-1].isspace() else " " + target


def array_rows(source: Source) -> Iterator[Row | Rejected]:
    """The records of a JSON array, in order. Raises BacklensError where the file is none."""
    for index, values in enumerate(_loaded(source)):
        where = f"{source.name}[{index}]"
        if isinstance(values, dict):
            yield Row(index, where, values)
        else:
            yield rejected(index, where, "not-an-object", "not an object; each record is written {…}")


def _loaded(source: Source) -> list[Any]:
    with source.open() as stream:
        content = source.reading(stream.read)
    try:
        array = load_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BacklensError(f"{source.name}:{line}: not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise BacklensError(
            f"{source.name}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}; mend the file "
            "(one object per line is --format jsonl)"
        ) from error
    except (RecursionError, ValueError) as error:
        raise BacklensError(f"{source.name}: JSON that cannot be read: {one_line(str(error))}") from error
    if not isinstance(array, list):
        raise BacklensError(f"{source.name}: not a JSON array of records; write [{{…}}, {{…}}]")
    return array


def first_record(source: Source) -> Any:
    """The first record of an array, read without the rest; None if there is none."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    start, size = "", _PEEK_BYTES
    with source.open() as stream:
        while chunk := source.reading(partial(stream.read, size)):
            start += decoder.decode(chunk)
            try:
                return json.JSONDecoder().raw_decode(start.lstrip()[1:].lstrip())[0]
            except (ValueError, RecursionError):
                size *= 2  # the record is cut off: read on
    return None
