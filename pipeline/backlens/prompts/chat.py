"""The text that the model reads for a prompt: as the user wrote it, or as a message in a chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from backlens.errors import BacklensError
from backlens.prompts.prompt import Prompt, Rejected, find_subject
from backlens.prompts.source import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_MARK = "backlensmessage"
"""A message that no template changes or contains: its place in the rendered text is the place of messages."""

_FIXED_DATE = """{% macro strftime_now(format) %}{{ format
    | replace("%d", "26") | replace("%m", "07") | replace("%b", "Jul") | replace("%B", "July")
    | replace("%Y", "2024") | replace("%y", "24") | replace("%A", "Friday") | replace("%a", "Fri")
    | replace("%H", "00") | replace("%M", "00") | replace("%S", "00") }}{% endmacro %}"""
"""A fixed date for templates that write the current one, because rows must not depend on the day of the run.

It is the default date of Llama 3's template.
"""


@dataclass(frozen=True, slots=True)
class PromptText:
    """The text before the position of the loss, and the target after it."""

    prompt: Prompt
    text: str
    target: str
    own: Span
    """Characters of `text` that are the user's prompt; the subject is searched for there."""
    movable: int
    """Number of white space characters at the end of `text` that may move to the target if the tokenizer joins them."""

    def subject_characters(self) -> Span | None:
        """The characters of `text` that are the prompt's subject; None if there are none."""
        prompt, (start, end) = self.prompt, self.own
        core = prompt.prompt.strip()  # templates remove white space
        at = self.text.find(core, start, end)
        if at >= 0:
            shift, place = at - prompt.prompt.index(core), prompt.subject_place()
        else:  # the template changes the message
            shift, place = start, find_subject(self.text[start:end], prompt.subject or "")
        return None if place is None else (place.start + shift, place.end + shift)


def as_it_stands(prompt: Prompt) -> PromptText:
    """The prompt as the user wrote it."""
    text = prompt.prompt
    return PromptText(prompt, text, prompt.target, (0, len(text)), len(text) - len(text.rstrip()))


def as_chat(prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase") -> list[PromptText | Rejected]:
    """Each prompt as the only message of a user, up to the place where the model's answer begins.

    Raises BacklensError as `chat_template` does.
    """
    template = chat_template(tokenizer)
    head, _, tail = _rendered(_MARK, template, tokenizer).partition(_MARK)
    added: Any = tokenizer.added_tokens_encoder
    control = tuple(added)
    results: list[PromptText | Rejected] = []
    for prompt in prompts:
        try:
            text = _rendered(prompt.prompt, template, tokenizer)
        except (jinja2.TemplateError, TypeError) as error:
            problem = f"{prompt.where}: the chat template refuses it: {error}; change it or leave it out"
            results.append(Rejected(prompt.prompt_id, "tokenize", "chat-template", one_line(problem)))
            continue
        around = text.startswith(head) and text.endswith(tail)
        own = (len(head), len(text) - len(tail)) if around else (0, len(text))
        follows_word = not (text[-1:].isspace() or text.endswith(control))
        target = prompt.target if follows_word else _without_space(prompt.target)
        # White space of the template stays: the model answers after it.
        results.append(PromptText(prompt, text, target, own, movable=0))
    return results


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's chat template. Raises BacklensError if it has none, or none that can be used."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise BacklensError(
            f"--chat-template: the tokenizer of {name} has no chat template; leave the option out, or give --model "
            "a model that was trained to chat"
        )
    try:
        template = tokenizer.get_chat_template()
        complete = _MARK in _rendered(_MARK, template, tokenizer)
    except (jinja2.TemplateError, TypeError, ValueError, ImportError) as error:
        raise BacklensError(
            one_line(f"--chat-template: the template of {name} cannot be used: {error}; leave the option out")
        ) from error
    if not complete:
        raise BacklensError(
            f"--chat-template: the template of {name} leaves a user's message out; leave the option out"
        )
    return template


def _rendered(message: str, template: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        chat_template=_FIXED_DATE + template,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert isinstance(text, str)
    return text


def _without_space(target: str) -> str:
    """The target without its first space, which parts it from a word before it; an answer has no such space."""
    return target[1:] if target.startswith(" ") and len(target) > 1 else target
