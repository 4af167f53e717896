"""Prompts that a caller has in memory: texts, token ids, or records, one or many."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from transformers import PreTrainedTokenizerBase

from backlens.config import PromptFields
from backlens.errors import BacklensError
from backlens.prompts.fields import Row, prompts_from_columns
from backlens.prompts.prompt import Prompt, Rejected
from backlens.prompts.tokenize import Example


def records_of(
    prompt: Any, target: Any, subject: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> list[Prompt | Example | Rejected]:
    """One record per prompt, in order, judged as the records of a file are.

    Texts become prompts to tokenize, token ids become examples as they are. Raises BacklensError for lists of different
    lengths, and for token ids that the model has no embedding of.
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
    """A list of the prompts' length. One text for all of them is refused: it is most often a mistake."""
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
