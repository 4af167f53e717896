"""From a record's columns to a `Prompt`, or to the reason why it is none."""

import contextlib
import datetime
import difflib
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import PromptFields
from pipeline.errors import BacklensError
from pipeline.prompts.record import Prompt, Rejected
from pipeline.prompts.source import one_line

Role = Literal["prompt", "target", "subject", "id", "relation"]

# Names that data sets in the wild give to what we call prompt, target, …; only ever used as advice.
_OTHER_NAMES: dict[Role, tuple[str, ...]] = {
    "prompt": ("text", "question", "input", "src", "query", "instruction", "context", "sentence"),
    "target": ("answer", "answers", "label", "completion", "output", "object", "response", "target_new"),
    "subject": ("entity", "subj", "head"),
    "id": ("case_id", "uid", "key", "index"),
    "relation": ("relation_id", "predicate", "rel"),
}
_NAMES_REMEMBERED = 100
_NAMES_SHOWN = 12
_LONGEST_NAME_SHOWN = 40


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the input, decoded but not yet judged."""

    prompt_id: int
    where: str
    values: Mapping[str, Any]


class UnfitError(Exception):
    """Why a record is not a prompt: a stable code, and the problem with its remedy."""

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(problem)
        self.code = code
        self.problem = problem


def rejected(prompt_id: int, where: str, code: str, problem: str) -> Rejected:
    return Rejected(prompt_id, "read", code, one_line(f"{where}: {problem}"))


def prompts_from_columns(
    rows: Iterable[Row | Rejected], fields: PromptFields, name: str
) -> Iterator[Prompt | Rejected]:
    """Judge each record in order.

    `subject` and `id` are optional, so one record may lack them; but a name the user typed that no record
    has is a typo, and is said at the end of the input.
    """
    unseen: dict[Role, str] = {}
    if fields.subject is not None:
        unseen["subject"] = fields.subject
    if fields.id is not None:
        unseen["id"] = fields.id
    found: dict[str, None] = {}
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        if unseen:
            unseen = {role: field for role, field in unseen.items() if field not in row.values}
            if len(found) < _NAMES_REMEMBERED:
                found |= dict.fromkeys(row.values)
        yield _judged(row, fields)
    if found and unseen:
        role, field = next(iter(unseen.items()))
        raise BacklensError(one_line(f"{name}: in every record, {no_field(field, role, found)}"))


def _judged(row: Row, fields: PromptFields) -> Prompt | Rejected:
    try:
        return _prompt(row, fields)
    except UnfitError as unfit:
        return rejected(row.prompt_id, row.where, unfit.code, unfit.problem)
    except RecursionError:
        return rejected(row.prompt_id, row.where, "broken-json", "nested too deeply to be read; flatten it")


def _prompt(row: Row, fields: PromptFields) -> Prompt:
    used = {"prompt": fields.prompt or "prompt", "target": fields.target or "target"}
    prompt = checked_prompt(text(row.values, used["prompt"], "prompt"), used["prompt"])
    target = checked_target(text(row.values, used["target"], "target"), used["target"])
    optional: dict[str, str | None] = {}
    choices: tuple[tuple[Role, str | None], ...] = (
        ("subject", fields.subject),
        ("id", fields.id),
        ("relation", None),
    )
    for role, chosen in choices:
        name = chosen or role
        happens_to_be_named_so = name in used.values() or not _can_be_text(row.values.get(name))
        if chosen is None and happens_to_be_named_so:
            continue
        used[role] = name
        optional[role] = optional_text(row.values, name)
    taken = set(used.values())
    others = {name: value for name, value in row.values.items() if name not in taken}
    return Prompt(row.prompt_id, prompt, target, row.where, meta=meta(others), **optional)


def text(values: Mapping[str, Any], name: str, role: Role) -> str:
    """A required text, exactly as it was written."""
    if name not in values:
        raise UnfitError("missing-field", no_field(name, role, values))
    value = values[name]
    if value is None:
        raise UnfitError("missing-field", f"field {name!r} is null; give it a text, or remove the record")
    if not isinstance(value, str):
        raise UnfitError("not-text", f"field {name!r} is {_kind(value)}, not text; put it in quotes")
    return _encodable(value, name)


def optional_text(values: Mapping[str, Any], name: str) -> str | None:
    """A text or a number, as text; None where there is nothing."""
    value = values.get(name)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if not _can_be_text(value):
        raise UnfitError("not-text", f"field {name!r} is {_kind(value)}, not text; put it in quotes")
    return _encodable(str(value), name)


def checked_prompt(prompt: str, name: str) -> str:
    if not prompt.strip():
        raise UnfitError("empty-prompt", f"field {name!r} is empty; give it a text, or remove the record")
    return prompt


def checked_target(target: str, name: str) -> str:
    if not target:
        raise UnfitError("empty-target", f"field {name!r} is empty; give it a text, or remove the record")
    return target


def no_field(name: str, role: Role, values: Mapping[str, Any]) -> str:
    """`no field 'target' (found: prompt, answer); name it with --target-field answer`"""
    found = [str(key) for key in values]
    shown = [key[:_LONGEST_NAME_SHOWN] for key in found[:_NAMES_SHOWN]]
    if len(found) > _NAMES_SHOWN:
        shown.append("…")
    if role == "relation":
        return f"no field {name!r} (found: {', '.join(shown) or 'none'})"
    candidate = _likely_name(name, role, found)
    argument = "FIELD" if candidate is None else shlex.quote(candidate)
    return f"no field {name!r} (found: {', '.join(shown) or 'none'}); name it with --{role}-field {argument}"


def _likely_name(name: str, role: Role, found: list[str]) -> str | None:
    other_roles = {other for other in _OTHER_NAMES if other != role}
    free = {key.lower(): key for key in found if key not in other_roles}
    for wanted in (name, role):
        for key in difflib.get_close_matches(wanted.lower(), list(free), n=1, cutoff=0.7):
            return free[key]
    return next((free[key] for key in _OTHER_NAMES[role] if key in free), None)


def _can_be_text(value: object) -> bool:
    return value is None or (isinstance(value, str | int | float) and not isinstance(value, bool))


def _kind(value: object) -> str:
    match value:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case dict():
            return "an object"
        case list() | tuple():
            return "a list"
        case _:
            return f"of type {type(value).__name__}"


def _encodable(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON may spell half a surrogate pair; neither tokenizers nor Parquet can hold one.
        raise UnfitError(
            "not-utf8",
            f"field {name!r} has half of a surrogate pair (\\u{ord(value[error.start]):04x}) at character "
            f"{error.start}, which is no character; write the pair whole",
        ) from None
    return value


def meta(values: Mapping[str, Any]) -> str | None:
    """The other columns as strict JSON with sorted keys, so that equal content is an equal string."""
    if not values:
        return None
    return json.dumps(_jsonable(values), ensure_ascii=False, sort_keys=True, allow_nan=False)


def _jsonable(value: Any) -> Any:
    """The nearest thing that every JSON reader accepts; what JSON has no word for becomes a string."""
    match value:
        case None | bool() | int():
            return value
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {_jsonable(str(key)): _jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [_jsonable(item) for item in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
        case bytes():
            with contextlib.suppress(UnicodeDecodeError):
                return value.decode("utf-8")
            return value.hex()
        case _:
            return _jsonable(str(value))
