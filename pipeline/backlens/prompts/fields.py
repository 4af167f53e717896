"""Conversion of a record's fields to a `Prompt`, or to the reason why it is rejected.

The records come from a file, or from a caller's memory: texts, token ids or mappings, one or many.
"""

import contextlib
import datetime
import difflib
import itertools
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from backlens.config import PromptFields
from backlens.errors import BacklensError
from backlens.prompts.prompt import SLOT, Prompt, Rejected, SubjectPlace, filled
from backlens.prompts.source import one_line
from backlens.prompts.tokenize import Example

Role = Literal["prompt", "target", "subject", "id", "relation"]

# Names that public data sets use for our fields. Only advice in error messages is taken from them.
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
    """One record of the input, decoded but not checked."""

    prompt_id: int
    where: str
    values: Mapping[str, Any]


class UnfitError(Exception):
    """The reason why a record is not a prompt: a stable code, and the problem with its remedy."""

    def __init__(self, code: str, problem: str, absent: str | None = None, remedy: str = "") -> None:
        super().__init__(problem)
        self.code = code
        self.problem = problem
        self.absent = absent
        """Name of the field that the record lacks."""
        self.remedy = remedy
        """Option of `backlens run` that names another column, if that may help."""

    def rejected(self, row: Row) -> Rejected:
        return rejected(row.prompt_id, row.where, self.code, self.problem + self.remedy, self.absent)


def rejected(prompt_id: int, where: str, code: str, problem: str, absent: str | None = None) -> Rejected:
    return Rejected(prompt_id, "read", code, one_line(f"{where}: {problem}"), absent)


def prompts_from_columns(
    rows: Iterable[Row | Rejected], fields: PromptFields, name: str
) -> Iterator[Prompt | Rejected]:
    """Convert each record to a prompt or a rejection, in order.

    `subject` and `id` are optional, so a record may lack them. But a name that the user typed and that no record has is
    an error: raises BacklensError at the end of the input.
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
        problem = no_field(field, found) + name_it(field, role, found)
        raise BacklensError(one_line(f"{name}: in every record, {problem}"))


def _judged(row: Row, fields: PromptFields) -> Prompt | Rejected:
    try:
        return column_prompt(row, fields)
    except UnfitError as unfit:
        return unfit.rejected(row)
    except RecursionError:
        return rejected(row.prompt_id, row.where, "broken-json", "nested too deeply to be read; flatten it")


def column_prompt(row: Row, fields: PromptFields) -> Prompt:
    """The prompt of a record whose columns are texts. Raises UnfitError where the record lacks one."""
    values = row.values
    required = (fields.prompt or "prompt", fields.target or "target")

    def name_of(role: Role, chosen: str | None, fits: bool) -> str | None:
        """The optional column that the user chose, or the one with the default name if its value fits."""
        return chosen or (role if fits and role not in required else None)

    subject_name = name_of("subject", fields.subject, _can_be_text(values.get("subject")))
    id_name = name_of("id", fields.id, True)
    relation_name = name_of("relation", None, _can_be_text(values.get("relation")))
    prompt, subject, slot = prompt_and_subject(values, required[0], subject_name)
    target = checked_target(text(values, required[1], "target"), required[1])
    taken = {*required, subject_name, id_name, relation_name}
    return Prompt(
        row.prompt_id,
        prompt,
        target,
        row.where,
        id=None if id_name is None else id_text(values, id_name),
        subject=subject,
        relation=None if relation_name is None else optional_text(values, relation_name),
        meta=meta({name: value for name, value in values.items() if name not in taken}),
        slot=slot,
    )


def text(values: Mapping[str, Any], name: str, role: Role) -> str:
    """A required text, exactly as in the record. Raises UnfitError if there is none."""
    if name not in values:
        raise UnfitError("missing-field", no_field(name, values), name, name_it(name, role, values))
    value = values[name]
    if value is None:
        raise UnfitError("missing-field", f"field {name!r} is null; give it a text, or remove the record")
    if isinstance(value, bytes):
        return _decoded(value, name)
    if not isinstance(value, str):
        raise UnfitError("not-text", f"field {name!r} is {_kind(value)}, not text; put it in quotes")
    return _encodable(value, name)


def optional_text(values: Mapping[str, Any], name: str) -> str | None:
    """A text, a number, a date, … as text; None if the field is absent or empty."""
    value = values.get(name)
    if isinstance(value, bytes):
        return _decoded(value, name)
    if not _can_be_text(value):
        raise UnfitError("not-text", f"field {name!r} is {_kind(value)}, not text; put it in quotes")
    return id_text(values, name)


def id_text(values: Mapping[str, Any], name: str) -> str | None:
    """A record's own id as text, whatever its type: it identifies the record for the user."""
    value = values.get(name)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return _encodable(value, name)
    plain = _jsonable(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, sort_keys=True)


def prompt_and_subject(
    values: Mapping[str, Any], prompt_name: str, subject_name: str | None
) -> tuple[str, str | None, SubjectPlace | None]:
    """The prompt, its subject if it has one, and the place of the subject if the prompt has a slot for it."""
    prompt = text(values, prompt_name, "prompt")
    subject = None if subject_name is None else optional_text(values, subject_name)
    slot = None
    if subject is not None and SLOT in prompt:
        prompt, slot = filled(prompt, subject)
    return checked_prompt(prompt, prompt_name), subject, slot


def checked_prompt(prompt: str, name: str) -> str:
    if not prompt.strip():
        raise UnfitError("empty-prompt", f"field {name!r} is empty; give it a text, or remove the record")
    return prompt


def checked_target(target: str, name: str) -> str:
    if not target:
        raise UnfitError("empty-target", f"field {name!r} is empty; give it a text, or remove the record")
    return target


def no_field(name: str, values: Mapping[str, Any]) -> str:
    """`no field 'target' (found: prompt, answer)`"""
    shown = [str(key)[:_LONGEST_NAME_SHOWN] for key in itertools.islice(values, _NAMES_SHOWN)]
    if len(values) > _NAMES_SHOWN:
        shown.append("…")
    return f"no field {name!r} (found: {', '.join(shown) or 'none'})"


def name_it(name: str, role: Role, values: Mapping[str, Any]) -> str:
    """`; name it with --target-field answer`"""
    if role == "relation":
        return ""
    candidate = _likely_name(name, role, [str(key) for key in values])
    return f"; name it with --{role}-field {'FIELD' if candidate is None else shlex.quote(candidate)}"


def without_option(record: Rejected) -> str:
    """The message of a rejection for a command without options that name columns."""
    if record.absent is None:
        return record.message
    problem, _, _ = record.message.partition("; name it with --")
    return f"{problem}; rename the one that holds the {record.absent!r}"


def _likely_name(name: str, role: Role, found: list[str]) -> str | None:
    other_roles = {other for other in _OTHER_NAMES if other != role}
    free = {key.lower(): key for key in found if key not in other_roles}
    for wanted in (name, role):
        for key in difflib.get_close_matches(wanted.lower(), list(free), n=1, cutoff=0.7):
            return free[key]
    return next((free[key] for key in _OTHER_NAMES[role] if key in free), None)


def _can_be_text(value: object) -> bool:
    return not isinstance(value, bool | Mapping | list | tuple)


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


def _decoded(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnfitError(
            "not-utf8",
            f"byte {value[error.start]:#04x} in field {name!r} is not UTF-8; rewrite the record as UTF-8",
        ) from None


def _encodable(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; tokenizers and Parquet cannot hold it.
        raise UnfitError(
            "not-utf8",
            f"field {name!r} has half of a surrogate pair (\\u{ord(value[error.start]):04x}) at character "
            f"{error.start}, which is no character; write the pair whole",
        ) from None
    return value


def meta(values: Mapping[str, Any]) -> str | None:
    """The other columns as strict JSON with sorted keys, so that equal content gives an equal string."""
    if not values:
        return None
    return json.dumps(_jsonable(values), ensure_ascii=False, sort_keys=True, allow_nan=False)


def _jsonable(value: Any) -> Any:
    """The value in a form that every JSON reader accepts. Unlike `printable.plain`, it loses nothing: a value that JSON
    cannot hold becomes a string."""
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


def records_of(
    prompt: Any, target: Any, subject: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> list[Prompt | Example | Rejected]:
    """One result per prompt, in order, checked like the records of a file.

    Texts become prompts, which are tokenized later; token ids become examples. `vocabulary` is the number of the
    model's embeddings. Raises BacklensError for lists of different lengths, and for token ids without an embedding.
    """
    prompts, targets, subjects = _as_lists(prompt, target, subject)
    records: list[Prompt | Example | Rejected] = []
    rows: list[Row] = []
    for number, (one, its_target, its_subject) in enumerate(zip(prompts, targets, subjects, strict=True)):
        if _is_ids(one):
            records.append(_example(number, one, its_target, tokenizer, vocabulary))
            continue
        values = one if isinstance(one, Mapping) else {"prompt": one, "target": its_target}
        if its_subject is not None:
            values = {**values, "subject": its_subject}
        rows.append(Row(number, f"prompt {number}", values))
    judged = prompts_from_columns(rows, PromptFields(), "prompts")
    return sorted([*records, *judged], key=_number)


def _number(record: Prompt | Example | Rejected) -> int:
    return record.prompt.prompt_id if isinstance(record, Example) else record.prompt_id


def _as_lists(prompt: Any, target: Any, subject: Any) -> tuple[list[Any], list[Any], list[Any]]:
    if isinstance(prompt, str | Mapping) or _is_ids(prompt):
        return [prompt], [target], [subject]
    prompts = list(prompt)
    if not prompts:
        raise BacklensError("prompt: the list is empty; give at least one prompt")
    return prompts, _beside("target", target, prompts), _beside("subject", subject, prompts)


def _beside(name: str, values: Any, prompts: Sequence[Any]) -> list[Any]:
    """A list as long as the prompts. One text for all prompts is refused, because it is most often a mistake."""
    if values is None:
        return [None] * len(prompts)
    if isinstance(values, str | Integral) or len(values) != len(prompts):
        raise BacklensError(f"{name}: {len(prompts)} prompts need a list of as many, one for each")
    return list(values)


def _is_ids(value: Any) -> bool:
    return (
        not isinstance(value, str | Mapping)
        and hasattr(value, "__len__")
        and len(value) > 0
        and all(isinstance(item, Integral) for item in _items(value))
    )


def _items(value: Any) -> list[Any]:
    return value.tolist() if hasattr(value, "tolist") else list(value)


def _example(
    number: int, ids: Any, target: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> Example:
    token_ids = tuple(int(token) for token in _items(ids))
    target_ids = (int(target),) if isinstance(target, Integral) else tuple(map(int, _items(target or ())))
    if not target_ids:
        raise BacklensError(
            f"target: prompt {number} is a list of token ids; give its target as token ids too"
        )
    unknown = [token for token in (*token_ids, *target_ids) if not 0 <= token < vocabulary]
    if unknown:
        raise BacklensError(
            f"prompt {number}: the model has no token {unknown[0]}; its ids are 0 to {vocabulary - 1}"
        )
    text, its_target = (str(tokenizer.decode(list(some))) for some in (token_ids, target_ids))
    return Example(Prompt(number, text, its_target, f"prompt {number}"), token_ids, target_ids, None, None)
