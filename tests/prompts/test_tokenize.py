"""Tokenization: position of the loss, tokens of the target and of the subject."""

import itertools
import logging
from dataclasses import replace
from typing import Any, Literal

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BloomConfig,
    ByT5Tokenizer,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from backlens.errors import BacklensError
from backlens.prompts.prompt import Prompt, Rejected, SubjectPlace
from backlens.prompts.tokenize import Example, context_length, tokenize

CORPUS = [
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Peru is Lima.",
    "The mother tongue of Danielle Darrieux is French. Léon Blum speaks English; so does Amélie.",
    "capital capitals capitalism French Frenchman Paris Parisian Rome Roman München 東京 Tokyo",
] * 3


def byte_level(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's: tokens are byte strings, and a space belongs to the word after it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return trained(tokenizer, trainer, template)


def metaspace(template: str | None = "<s> $A") -> PreTrainedTokenizerFast:
    """A tokenizer like SentencePiece's: ▁ is a space, one is added before the text, and <s> before both."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    # Zero-width spaces vanish: texts of one character can have no tokens.
    tokenizer.normalizer = normalizers.Replace("\u200b", "")  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # pyright: ignore
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False
    )
    return trained(tokenizer, trainer, template)


def trained(tokenizer: tokenizers.Tokenizer, trainer: Any, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(CORPUS, trainer)
    if template is not None:
        specials = [("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single=template, special_tokens=specials
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


BYTES = byte_level()
SPACES = metaspace()
PYTHON = ByT5Tokenizer()
TOKENIZERS = {"bytes": BYTES, "spaces": SPACES, "python": PYTHON}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def prompt(text: str, target: str = " Paris", subject: str | None = None, number: int = 0) -> Prompt:
    return Prompt(number, text, target, f"p.jsonl:{number + 1}", subject=subject)


def examples(
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    prepend_bos: Literal["auto", "true", "false"] = "auto",
    target_mode: Literal["first", "all"] = "first",
    context: int | None = None,
) -> list[Example | Rejected]:
    return tokenize(prompts, tokenizer, prepend_bos=prepend_bos, target_mode=target_mode, context=context)


def example(
    one: Prompt, tokenizer: PreTrainedTokenizerBase, prepend_bos: Literal["auto", "true", "false"] = "auto"
) -> Example:
    (result,) = examples([one], tokenizer, prepend_bos)
    assert isinstance(result, Example), result
    return result


def rejection(one: Prompt, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Rejected:
    (result,) = examples([one], tokenizer, **options)
    assert isinstance(result, Rejected), result
    return result


def spelled(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


# Prompt ids


@pytest.mark.parametrize("tokenizer", [BYTES, SPACES], ids=["bytes", "spaces"])
@pytest.mark.parametrize("text", ["The capital of France is", "<s>The</s>", " a  b ", "Léon 東京", "\n"])
def test_a_prompt_has_the_ids_that_the_tokenizer_gives_it_by_default(
    tokenizer: PreTrainedTokenizerFast, text: str
):
    assert example(prompt(text), tokenizer).token_ids == tuple(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>", "$A </s> </s>"])
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_nothing_that_the_tokenizer_appends_comes_after_the_prompt(make: Any, template: str):
    tokenizer = make(template)
    plain = tuple(tokenizer("The capital of France is", add_special_tokens=False)["input_ids"])
    lead = (tokenizer.bos_token_id,) if template.startswith("<s>") else ()
    found = example(prompt("The capital of France is", subject="France"), tokenizer)
    assert found.token_ids == lead + plain
    assert spelled(tokenizer, found.token_ids[found.subject_start : found.subject_end]).strip() == "France"


def test_an_end_token_that_the_user_wrote_stays():
    tokenizer = byte_level("$A </s>")
    assert example(prompt("The end</s>"), tokenizer).token_ids[-1] == tokenizer.eos_token_id


def test_a_python_tokenizer_that_appends_an_end_token_is_handled():
    assert PYTHON("abc")["input_ids"][-1] == PYTHON.eos_token_id
    assert spelled(PYTHON, example(prompt("abc", "de"), PYTHON).token_ids) == "abc"
    assert spelled(PYTHON, example(prompt("abc", "de"), PYTHON).target_ids) == "de"


@pytest.mark.parametrize("text", ["The capital", "<s>The capital", "<s><s>The capital"])
@pytest.mark.parametrize("tokenizer", [BYTES, SPACES], ids=["bytes", "spaces"])
def test_prepend_bos_true_gives_exactly_one(tokenizer: PreTrainedTokenizerFast, text: str):
    found = example(prompt(text, subject="capital"), tokenizer, "true")
    assert found.token_ids.count(tokenizer.bos_token_id) == 1
    assert found.token_ids[0] == tokenizer.bos_token_id
    assert spelled(tokenizer, found.token_ids[found.subject_start : found.subject_end]).strip() == "capital"


@pytest.mark.parametrize("tokenizer", [BYTES, SPACES], ids=["bytes", "spaces"])
def test_prepend_bos_false_gives_none(tokenizer: PreTrainedTokenizerFast):
    found = example(prompt("The capital", subject="capital"), tokenizer, "false")
    assert tokenizer.bos_token_id not in found.token_ids
    assert found.subject_end == len(found.token_ids)


def test_prepend_bos_true_needs_a_tokenizer_that_has_one():
    with pytest.raises(
        BacklensError, match=r"^--prepend-bos true: .* no beginning-of-sequence token; use auto"
    ):
        examples([prompt("a")], PYTHON, "true")


# Target ids


@every_tokenizer
def test_prompt_and_target_together_are_the_text_as_one(tokenizer: PreTrainedTokenizerBase):
    found = example(prompt("The capital of France is", " Paris."), tokenizer, "false")
    whole = tokenizer("The capital of France is Paris.", add_special_tokens=False)["input_ids"]
    assert [*found.token_ids, *found.target_ids] == list(whole)


def test_a_target_of_several_tokens_is_kept_whole_in_both_modes():
    one = prompt("The capital of France is", " Parisian München")
    first, whole = (examples([one], BYTES, target_mode=mode)[0] for mode in ("first", "all"))
    assert first == whole
    assert isinstance(first, Example)
    assert len(first.target_ids) > 1
    assert spelled(BYTES, first.target_ids) == " Parisian München"


def test_a_target_that_merges_with_the_prompt_is_tokenized_by_itself():
    text, target = "The cap", "ital of France"
    own = BYTES(text)["input_ids"]
    assert BYTES(text + target)["input_ids"][: len(own)] != own  # the case at hand
    found = example(prompt(text, target), BYTES)
    assert list(found.token_ids) == own
    assert list(found.target_ids) == BYTES(target)["input_ids"]


# Refusals


def test_a_target_without_tokens_is_rejected():
    found = rejection(prompt("The capital", "\u200b", number=4), SPACES)
    assert (found.prompt_id, found.stage, found.error) == (4, "tokenize", "empty-target")
    assert found.message.startswith("p.jsonl:5: the target has no tokens")


def test_a_prompt_without_tokens_is_rejected_even_if_special_tokens_are_added():
    found = rejection(prompt("\u200b", " Paris"), SPACES)
    assert (found.stage, found.error) == ("tokenize", "empty-prompt")


def test_a_prompt_longer_than_the_context_is_rejected_with_both_numbers_and_a_remedy():
    one = prompt("The capital of France is", number=6)
    length = len(example(one, BYTES).token_ids)
    assert isinstance(examples([one], BYTES, context=length)[0], Example)
    found = rejection(one, BYTES, context=length - 1)
    assert (found.stage, found.error) == ("tokenize", "too-long")
    assert found.message == (
        f"p.jsonl:7: too long: {length} positions, but the model reads at most {length - 1}; "
        "shorten it or leave it out"
    )


def test_in_mode_all_every_target_token_but_the_last_needs_a_position():
    one = prompt("The capital of France is", " Parisian München")
    found = example(one, BYTES)
    needed = len(found.token_ids) + len(found.target_ids) - 1
    assert needed > len(found.token_ids)
    assert isinstance(examples([one], BYTES, target_mode="all", context=needed)[0], Example)
    assert isinstance(examples([one], BYTES, target_mode="first", context=needed - 1)[0], Example)
    refused = rejection(one, BYTES, target_mode="all", context=needed - 1)
    assert f"{needed} positions" in refused.message
    assert refused.message.endswith("or use --target-mode first")


def test_each_prompt_has_one_result_in_order_whatever_its_neighbours():
    prompts = [
        prompt(text, number=number)
        for number, text in enumerate(["The capital of", "\u200b", "France " * 20, "is", "Paris"])
    ]
    together = examples(prompts, SPACES, context=12)
    assert together == list(
        itertools.chain.from_iterable(examples([one], SPACES, context=12) for one in prompts)
    )
    assert [getattr(result, "error", None) for result in together] == [
        None,
        "empty-prompt",
        "too-long",
        None,
        None,
    ]
    assert examples([], SPACES) == []


# Subjects


@every_tokenizer
@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("France is", "France"),
        ("The capital of France is", "France"),
        ("Danielle Darrieux", "Danielle Darrieux"),
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("France and France", "France"),
        ("In 東京, Léon", "東京"),
    ],
)
def test_the_subject_is_the_shortest_run_of_tokens_that_spells_it(
    tokenizer: PreTrainedTokenizerBase, text: str, subject: str
):
    found = example(prompt(text, subject=subject), tokenizer)
    ids, start, end = found.token_ids, found.subject_start, found.subject_end
    assert start is not None
    assert end is not None
    assert spelled(tokenizer, ids[start:end]).strip() == subject
    assert subject not in spelled(tokenizer, ids[start + 1 : end])
    assert subject not in spelled(tokenizer, ids[start : end - 1])
    assert subject not in spelled(tokenizer, ids[start + 1 :])  # the last occurrence


@every_tokenizer
def test_a_subject_that_does_not_occur_has_no_positions(tokenizer: PreTrainedTokenizerBase):
    for subject in (None, "Peru", "Franc", "ital"):
        found = example(prompt("The capital of France is", subject=subject), tokenizer)
        assert (found.subject_start, found.subject_end) == (None, None)


def test_a_subject_inside_a_token_is_that_token():
    one = replace(prompt("The capital of"), slot=SubjectPlace(5, 9))
    found = example(one, BYTES)
    assert spelled(BYTES, found.token_ids[found.subject_start : found.subject_end]) == " capital"


letters = st.text(st.sampled_from("abcdé東 ▁\n.Paris"), min_size=1, max_size=12)


@given(letters, letters, letters)
@settings(max_examples=150, deadline=None)
def test_subject_positions_agree_with_counting_bytes(before: str, subject: str, after: str):
    text = before + subject + after + "."  # white space at the end could go to the target
    alphabet = {letter: byte for byte, letter in bytes_to_letters().items()}  # as the tokens are written
    first_byte = len(before.encode())
    last_byte = first_byte + len(subject.encode())
    place = SubjectPlace(len(before), len(before + subject))
    found = example(replace(prompt(text), slot=place), BYTES)
    pieces = [
        bytes(alphabet[letter] for letter in token)
        for token in BYTES.convert_ids_to_tokens(list(found.token_ids))
    ]
    assert b"".join(pieces) == text.encode()
    ends = list(itertools.accumulate(len(piece) for piece in pieces))
    touching = [
        index for index, end in enumerate(ends) if end > first_byte and end - len(pieces[index]) < last_byte
    ]
    assert (found.subject_start, found.subject_end) == (touching[0], touching[-1] + 1)


def bytes_to_letters() -> dict[int, str]:
    """The printable characters that stand for the 256 bytes in GPT-2's tokenizer."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(hidden)
    }


@given(st.lists(st.tuples(letters, letters), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_prompt_and_target_are_spelled_by_their_ids(pairs: list[tuple[str, str]]):
    prompts = [prompt(text, target, number=number) for number, (text, target) in enumerate(pairs)]
    for one, result in zip(prompts, examples(prompts, BYTES), strict=True):
        assert isinstance(result, Example)
        assert result.prompt is one
        assert spelled(BYTES, result.token_ids + result.target_ids) == one.prompt + one.target
        assert spelled(BYTES, result.token_ids).rstrip() == one.prompt.rstrip()


# Manners


def test_the_tokenizer_is_left_as_it_was_and_its_truncation_is_not_obeyed():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(3, stride=1, direction="left")
    tokenizer.backend_tokenizer.enable_padding(length=30, pad_id=1, pad_token="</s>", direction="left")
    before = tokenizer.backend_tokenizer.to_str()
    one = prompt("The capital of France is", subject="France")
    assert example(one, tokenizer) == example(one, BYTES)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_long_prompts_do_not_make_the_tokenizer_warn(caplog: pytest.LogCaptureFixture):
    tokenizer = byte_level()
    tokenizer.model_max_length = 4
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        examples([prompt("The capital of France is " * 9)], tokenizer, context=4)
    assert caplog.records == []
    assert not tokenizer.deprecation_warnings


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_positions=77), 77),
        (LlamaConfig(max_position_embeddings=99), 99),
        (LlavaConfig(text_config=LlamaConfig(max_position_embeddings=55)), 55),
        (BloomConfig(), None),
    ],
    ids=["alias", "plain", "multimodal", "unstated"],
)
def test_the_context_is_what_the_configuration_states(config: Any, expected: int | None):
    assert context_length(config) == expected
