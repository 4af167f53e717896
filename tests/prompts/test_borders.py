"""The border between prompt and target, for each kind of tokenizer, when a token would cross it.

The tokenizers are built by hand, so that what they join is known: " is", " Paris", " Fr", "ance", " France" and
runs of white space are tokens.
"""

import string
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from backlens.prompts.prompt import Prompt
from backlens.prompts.tokenize import Example, tokenize

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern by which the tiktoken tokenizer of Llama 3 splits texts."""

WORDS = [
    ["ance"],
    [" Fr"],
    [" Fr", "ance"],
    [" Paris"],
    ["Paris"],
    [" is"],
    [" 19"],
    ["\n\n"],
    [":", "\n\n"],
    ["  "],
]
"""Tokens, each with the two pieces that its last merge joins."""


def joined(words: Iterable[list[str]], space: str, newline: str) -> list[tuple[str, str]]:
    """Merges that build each word from its pieces, and each piece from letters."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [piece.replace(" ", space).replace("\n", newline) for piece in word]
        for parts in (*map(list, pieces), pieces):
            left = parts[0]
            for right in parts[1:]:
                merges[left, right] = None
                left += right
    return list(merges)


def byte_level_model(ignore_merges: bool = False) -> models.BPE:
    merges = joined(WORDS, "Ġ", "Ċ")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return models.BPE(vocabulary, merges, ignore_merges=ignore_merges)


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's."""
    backend = Tokenizer(byte_level_model())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def tiktoken() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 3's: it has its own pattern, and a word that is a token stays one token."""
    backend = Tokenizer(byte_level_model(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [*string.ascii_letters, *string.digits, *string.punctuation]
    tokens += [left + right for left, right in merges]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


# "▁ance" is the trap: what "ance" becomes where a space is put before every text.
SENTENCEPIECE_MERGES = [*joined(WORDS, "▁", "\n"), ("▁", "ance")]
SENTENCEPIECE_MERGES = [pair for pair in SENTENCEPIECE_MERGES if "\n" not in "".join(pair)]


def sentencepiece() -> PreTrainedTokenizerBase:
    """A tokenizer like Llama 2's, by its own class: the whole text is one piece, with an added space before it."""
    return LlamaTokenizer(vocab=sentencepiece_vocabulary(SENTENCEPIECE_MERGES), merges=SENTENCEPIECE_MERGES)


def sentencepiece_legacy() -> PreTrainedTokenizerFast:
    """The same tokenizer in the form of older files: a normalizer adds the space."""
    merges = SENTENCEPIECE_MERGES
    backend = Tokenizer(
        models.BPE(sentencepiece_vocabulary(merges), merges, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(  # pyright: ignore
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(  # pyright: ignore
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def sentencepiece_unigram() -> PreTrainedTokenizerFast:
    """A tokenizer like those of T5 and XGLM: the most probable pieces, with words split at spaces."""
    words = {"".join(word).replace(" ", "▁") for word in WORDS if "\n" not in "".join(word)} | {"▁ance"}
    pieces = [(token, -12.0) for token in sentencepiece_vocabulary([])] + [
        (word, -2.0) for word in sorted(words)
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")  # pyright: ignore
    backend.decoder = decoders.Sequence(  # pyright: ignore
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


KINDS = {
    "byte-level": byte_level(),
    "tiktoken": tiktoken(),
    "sentencepiece": sentencepiece(),
    "sentencepiece-legacy": sentencepiece_legacy(),
    "sentencepiece-unigram": sentencepiece_unigram(),
}
every_kind = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)


def divided(
    tokenizer: PreTrainedTokenizerBase, text: str, target: str, subject: str | None = None
) -> Example:
    """Ids without special tokens before them."""
    one = Prompt(0, text, target, "p.jsonl:1", subject=subject)
    (found,) = tokenize([one], tokenizer, prepend_bos="false", target_mode="first", context=None)
    assert isinstance(found, Example), found
    assert found.prompt is one
    return found


def own(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """Tokens as text, with plain spaces and line breaks."""
    tokens = [*tokenizer.convert_ids_to_tokens(list(ids))]
    signs = {"Ġ": " ", "▁": " ", "Ċ": "\n", "<0x0A>": "\n"}
    for sign, character in signs.items():
        tokens = [token.replace(sign, character) for token in tokens]
    return tokens


def spelled(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@every_kind
def test_a_target_continues_the_prompt_to_the_letter(tokenizer: PreTrainedTokenizerBase):
    for text, target, first in (
        ("France is", " Paris", " Paris"),
        ("1+1=", "2", "2"),
        ("1+1=", "Paris", "Paris"),
    ):
        found = divided(tokenizer, text, target)
        assert found.token_ids == own(tokenizer, text)
        assert pieces(tokenizer, found.target_ids) == [first]


@every_kind
def test_a_space_at_the_end_of_a_prompt_goes_to_the_target_that_is_joined_with_it(
    tokenizer: PreTrainedTokenizerBase,
):
    found, usual = divided(tokenizer, "France is ", "Paris"), divided(tokenizer, "France is", " Paris")
    assert pieces(tokenizer, own(tokenizer, "France is "))[-1] == " "  # what the loss would be taken at
    assert found.token_ids == usual.token_ids
    assert found.target_ids == usual.target_ids
    assert pieces(tokenizer, found.token_ids)[-1] == " is"
    assert pieces(tokenizer, found.target_ids) == [" Paris"]


@every_kind
def test_only_the_white_space_that_is_joined_with_the_target_goes_to_it(tokenizer: PreTrainedTokenizerBase):
    found = divided(tokenizer, "France is   ", "Paris")
    assert pieces(tokenizer, found.target_ids) == [" Paris"]
    assert found.token_ids == own(tokenizer, "France is  ")


@every_kind
@pytest.mark.parametrize(("text", "target"), [("France is\n", "Paris"), ("France is ", "4")])
def test_white_space_that_is_not_joined_with_the_target_stays(
    tokenizer: PreTrainedTokenizerBase, text: str, target: str
):
    found = divided(tokenizer, text, target)
    assert found.token_ids == own(tokenizer, text)
    assert pieces(tokenizer, found.target_ids) == [target]


@every_kind
def test_a_word_cut_by_the_border_keeps_the_prompts_tokens_and_gets_no_space(
    tokenizer: PreTrainedTokenizerBase,
):
    assert pieces(tokenizer, own(tokenizer, "is France"))[-1] == " France"  # the case at hand
    found = divided(tokenizer, "is Fr", "ance")
    assert found.token_ids == own(tokenizer, "is Fr")
    assert pieces(tokenizer, found.token_ids)[-1] == " Fr"
    assert pieces(tokenizer, found.target_ids) == ["ance"]


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("sentencepiece")])
def test_the_space_that_sentencepiece_puts_before_a_text_is_a_trap_here(name: str):
    assert pieces(KINDS[name], own(KINDS[name], "ance")) == [" ance"]


def test_punctuation_that_a_tokenizer_joins_with_line_breaks_stays_with_the_prompt():
    tokenizer = KINDS["tiktoken"]
    assert pieces(tokenizer, own(tokenizer, "is:\n\nParis")) == [
        "i",
        "s",
        ":\n\n",
        "Paris",
    ]  # the case at hand
    found = divided(tokenizer, "is:\n", "\nParis")
    assert found.token_ids == own(tokenizer, "is:\n")
    assert pieces(tokenizer, found.target_ids) == ["\n", "Paris"]


@every_kind
def test_a_prompt_of_white_space_is_not_left_empty(tokenizer: PreTrainedTokenizerBase):
    for text in (" ", "   ", "\n"):
        found = divided(tokenizer, text, "Paris")
        assert found.token_ids
        assert spelled(tokenizer, found.token_ids + found.target_ids).endswith("Paris")


@every_kind
def test_the_subject_is_where_it_was_when_the_space_after_it_moves(tokenizer: PreTrainedTokenizerBase):
    for subject in ("France", "France "):
        found = divided(tokenizer, "is in France ", "Paris", subject)
        assert pieces(tokenizer, found.target_ids) == [" Paris"]
        assert pieces(tokenizer, found.token_ids[found.subject_start : found.subject_end]) == [" France"]
        assert found.subject_end == len(found.token_ids)


ascii_text = st.text(st.sampled_from(string.printable), min_size=1, max_size=12)
likely_text = st.lists(
    st.sampled_from([" ", "\n", "is", "Fr", "ance", "Paris", "1", ":", "a"]), min_size=1, max_size=6
)
texts = ascii_text | likely_text.map("".join)


@every_kind
@given(text=texts, target=texts)
@settings(max_examples=250, deadline=None)
def test_any_prompt_and_target_are_spelled_by_their_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, target: str
):
    found = divided(tokenizer, text, target)
    assert found.target_ids
    # SentencePiece does not tell its own space at the beginning from the user's.
    whole = spelled(tokenizer, own(tokenizer, text + target))
    assert whole.lstrip(" ") == (text + target).lstrip(" ")
    assert spelled(tokenizer, found.token_ids + found.target_ids) == whole
    kept = text
    while found.token_ids != own(tokenizer, kept):
        assert kept[-1].isspace(), "only white space may move"
        kept = kept[:-1]
    moved = text[len(kept) :]
    if moved:  # then it is joined with what follows it
        together = own(tokenizer, text + target)
        assert found.token_ids + found.target_ids == together
        assert together[: len(own(tokenizer, text))] != own(tokenizer, text)
