"""Prompts as messages to a chat model: templates as models have them, and the ids that transformers gives for them."""

from typing import Any

import pytest

from backlens.errors import BacklensError
from backlens.prompts.prompt import Prompt, Rejected, filled
from backlens.prompts.tokenize import Example, PrependBos, tokenize
from tests.prompts.test_tokenize import BYTES, byte_level, metaspace, spelled

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n\n"
    "{{ message['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
CONTROL = (
    "{{ bos_token }}{{ messages[0].content }}<|im_end|>{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
WORDS = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n{{ messages[0].content }}"

TEMPLATES = {"chatml": CHATML, "llama-3": LLAMA_3, "control": CONTROL, "words": WORDS, "dated": DATED}


def chatty(template: Any, make: Any = byte_level, lead: str | None = None) -> Any:
    tokenizer = make(lead)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def asked(
    tokenizer: Any, text: str, target: str = " Paris", subject: str | None = None, bos: PrependBos = "auto"
) -> Example:
    one = Prompt(0, text, target, "p.jsonl:1", subject=subject)
    (found,) = tokenize(
        [one], tokenizer, prepend_bos=bos, target_mode="first", context=None, chat_template=True
    )
    assert isinstance(found, Example), found
    assert found.prompt is one
    return found


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA_3, CONTROL, WORDS], ids=["chatml", "llama-3", "control", "words"]
)
@pytest.mark.parametrize("lead", [None, "<s> $A"])
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_the_ids_are_those_of_the_tokenizers_own_template(make: Any, lead: str | None, template: str):
    tokenizer = chatty(template, make, lead)
    messages = [{"role": "user", "content": "The capital of France is"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(asked(tokenizer, "The capital of France is").token_ids) == theirs
    assert theirs.count(tokenizer.bos_token_id) == (0 if template == CHATML else 1)


@pytest.mark.parametrize(
    ("template", "target", "answer"),
    [
        (CHATML, " Paris", "Paris"),
        (CHATML, "Paris", "Paris"),
        (CHATML, "  Paris", " Paris"),
        (CHATML, " ", " "),
        (CONTROL, " Paris", "Paris"),
        (WORDS, " Paris", " Paris"),
        (WORDS, "Paris", "Paris"),
    ],
)
def test_an_answer_begins_with_a_space_only_after_a_word(template: str, target: str, answer: str):
    found = asked(chatty(template), "The capital of France is", target)
    assert spelled(BYTES, found.target_ids) == answer


def test_the_white_space_of_a_template_stays_in_the_prompt():
    tokenizer = chatty("{{ messages[0].content }} ASSISTANT: ")
    found = asked(tokenizer, "The capital of France is", "Paris")
    assert spelled(tokenizer, found.token_ids) == "The capital of France is ASSISTANT: "
    assert spelled(tokenizer, found.target_ids) == "Paris"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_the_subject_is_looked_for_in_the_users_message_alone(make: Any, template: str):
    tokenizer = chatty(template, make)
    for subject in ("user", "France", "Today"):  # two of them are words of templates, before the message
        found = asked(tokenizer, f" that is {subject} now? ", subject=subject)
        assert found.subject_start is not None
        assert spelled(tokenizer, found.token_ids[found.subject_start : found.subject_end]).strip() == subject
        assert spelled(tokenizer, found.token_ids[: found.subject_end]).endswith(f"that is {subject}")
    found = asked(tokenizer, "The capital of France is", subject="assistant")
    assert (found.subject_start, found.subject_end) == (None, None)


@pytest.mark.parametrize(
    "template", [*TEMPLATES.values(), "{{ messages[0].content | replace('France', 'FRANCE') }}"]
)
def test_a_slot_is_found_in_a_template_too(template: str):
    text, place = filled("  What France means to {} is ", "France")
    one = Prompt(0, text, " much", "p.jsonl:1", subject="France", slot=place)
    tokenizer = chatty(template)
    (found,) = tokenize(
        [one], tokenizer, prepend_bos="auto", target_mode="first", context=None, chat_template=True
    )
    assert isinstance(found, Example)
    before = spelled(tokenizer, found.token_ids[: found.subject_end])
    assert before.lower().endswith("what france means to france")


@pytest.mark.parametrize(("bos", "count"), [("auto", 1), ("true", 1), ("false", 0)])
def test_prepend_bos_overrides_the_template(bos: PrependBos, count: int):
    tokenizer = chatty(LLAMA_3, lead="<s> $A")
    found = asked(tokenizer, "The capital", subject="capital", bos=bos)
    assert found.token_ids.count(tokenizer.bos_token_id) == count
    assert spelled(tokenizer, found.token_ids[found.subject_start : found.subject_end]) == " capital"
    without = asked(chatty(CHATML), "The capital", bos=bos)
    assert without.token_ids.count(tokenizer.bos_token_id) == (bos == "true")


def test_a_date_in_a_template_does_not_change_with_the_day():
    tokenizer = chatty(DATED)
    assert spelled(tokenizer, asked(tokenizer, "Well?").token_ids) == "Today is 26 Jul 2024.\nWell?"


def test_of_several_templates_the_default_is_taken():
    tokenizer = chatty({"default": WORDS, "tool_use": CHATML})
    assert spelled(tokenizer, asked(tokenizer, "Well?").token_ids) == "<s>[INST] Well? [/INST]"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template"),
        ({"rag": WORDS, "tool_use": CHATML}, "cannot be used: .* no default"),
        ("{{ messages[0]. }}", "cannot be used: "),
        ("{{ raise_exception('only tools') }}", "cannot be used: only tools"),
        ("{{ messages[0].content.text }}", "leaves a user's message out"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_once(template: Any, words: str):
    with pytest.raises(
        BacklensError, match=rf"^--chat-template: .*{words}.*; leave the option out"
    ) as refused:
        asked(chatty(template), "Well?")
    assert "\n" not in str(refused.value)


def test_a_message_that_a_template_refuses_is_a_failure_among_the_others():
    tokenizer = chatty(
        "{% if 'bad' in messages[0].content %}{{ raise_exception('No.') }}{% endif %}" + CHATML
    )
    prompts = [
        Prompt(n, text, " Paris", f"p.jsonl:{n + 1}") for n, text in enumerate(["one", "bad", "three"])
    ]
    options: Any = {"prepend_bos": "auto", "target_mode": "first", "context": None, "chat_template": True}
    first, second, third = tokenize(prompts, tokenizer, **options)
    assert [first, third] == [tokenize([one], tokenizer, **options)[0] for one in (prompts[0], prompts[2])]
    assert isinstance(second, Rejected)
    assert (second.prompt_id, second.stage, second.error) == (1, "tokenize", "chat-template")
    assert second.message == "p.jsonl:2: the chat template refuses it: No.; change it or leave it out"
