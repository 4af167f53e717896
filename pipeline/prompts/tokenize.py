"""From prompts to token ids: where the loss is taken, what the target is, which tokens the subject is.

The last token of a prompt is the position of the loss, so nothing may come after the user's own text. Prompt and
target are read as one text; where a token of it reaches over the border between them, `_divided_at_border` says
what becomes of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import BacklensError
from pipeline.prompts.record import Prompt, Rejected
from pipeline.prompts.written import Span, Written, as_chat, as_it_stands

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

PrependBos = Literal["auto", "true", "false"]
TargetMode = Literal["first", "all"]

_CARRIERS = ("\n", "a", ".", "0")
"""Texts to put before a target, so that it is not at the beginning; the first that keeps its own tokens serves."""


@dataclass(frozen=True, slots=True)
class Example:
    prompt: Prompt
    token_ids: tuple[int, ...]
    """The prompt's, special tokens at its front included. The loss is taken at the last one."""
    target_ids: tuple[int, ...]
    """The whole target's, in either target mode; never empty."""
    subject_start: int | None
    subject_end: int | None
    """Half-open range of positions in `token_ids`; None where the prompt does not hold its subject."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A text's own tokens, without special ones."""

    ids: tuple[int, ...]
    offsets: tuple[Span, ...] | None
    """Half-open character range of each token; None from tokenizers written in Python."""


def tokenize(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prepend_bos: PrependBos,
    target_mode: TargetMode,
    context: int | None,
    rows: int | None = None,
    chat_template: bool = False,
) -> list[Example | Rejected]:
    """One result for each prompt, in order. The tokenizer is left as it was.

    The model has `rows` embeddings, and reads `context` positions; None where either is not known.

    Raises BacklensError when the tokenizer lacks the beginning-of-sequence token or the chat template asked for.
    """
    if not prompts:
        return []
    with _settings_kept(tokenizer):
        written = as_chat(prompts, tokenizer) if chat_template else [as_it_stands(p) for p in prompts]
        # A chat template writes the special tokens itself.
        lead = _lead(tokenizer, prepend_bos, () if chat_template else _default_lead(tokenizer, prompts))
        # "<s>" written out in the text
        drop_bos = prepend_bos == "true" or (chat_template and prepend_bos == "false")
        divided = iter(_divided([one for one in written if isinstance(one, Written)], tokenizer))
        results: list[Example | Rejected] = []
        for one in written:
            if isinstance(one, Rejected):
                results.append(one)
                continue
            parts = next(divided)
            own_ids = parts.own.ids
            body = _without_leading(own_ids, tokenizer.bos_token_id) if drop_bos else own_ids
            start, end = _subject_positions(one, parts, len(lead) - (len(own_ids) - len(body)), tokenizer)
            example = Example(one.prompt, lead + body, parts.target_ids, start, end)
            refusal = _refusal(example, own_ids, target_mode, context)
            results.append(refusal or _without_embedding(example, rows, tokenizer) or example)
        return results


def context_length(config: "PreTrainedConfig") -> int | None:
    """The most positions the model states it can read; None where it states none."""
    text = config.get_text_config()
    stated = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((length for length in stated if isinstance(length, int) and length > 0), None)


def _refusal(
    example: Example, own_ids: tuple[int, ...], target_mode: TargetMode, context: int | None
) -> Rejected | None:
    if not own_ids:
        return _rejected(example, "empty-prompt", "the prompt has no tokens; give it a text")
    if not example.target_ids:
        return _rejected(example, "empty-target", "the target has no tokens; give it a text")
    positions = len(example.token_ids)
    if target_mode == "all":  # teacher forcing feeds every target token but the last
        positions += len(example.target_ids) - 1
    if context is None or positions <= context:
        return None
    remedy = "shorten it or leave it out"
    if len(example.token_ids) <= context:
        remedy += ", or use --target-mode first"
    problem = f"too long: {positions} positions, but the model reads at most {context}; {remedy}"
    return _rejected(example, "too-long", problem)


def _without_embedding(
    example: Example, rows: int | None, tokenizer: "PreTrainedTokenizerBase"
) -> Rejected | None:
    """Refuses a token that was added to the tokenizer and not to the model, which would fail on it."""
    beyond = [
        index for index in (*example.token_ids, *example.target_ids) if rows is not None and index >= rows
    ]
    if not beyond:
        return None
    problem = (
        f"token {tokenizer.convert_ids_to_tokens(beyond[0])!r} has id {beyond[0]}, but the model has embeddings for "
        f"ids up to {(rows or 0) - 1}; leave it out, or resize the model's embeddings and train them"
    )
    return _rejected(example, "no-embedding", problem)


def _rejected(example: Example, code: str, problem: str) -> Rejected:
    prompt = example.prompt
    return Rejected(prompt.prompt_id, "tokenize", code, f"{prompt.where}: {problem}")


def _lead(
    tokenizer: "PreTrainedTokenizerBase", prepend_bos: PrependBos, lead: tuple[int, ...]
) -> tuple[int, ...]:
    """The ids put before every prompt; `lead` if the user does not say otherwise."""
    if prepend_bos == "auto":
        return lead
    bos = tokenizer.bos_token_id
    if prepend_bos == "false":
        return _without_leading(lead, bos)
    if not isinstance(bos, int):
        raise BacklensError(
            "--prepend-bos true: this model's tokenizer has no beginning-of-sequence token; use auto or false"
        )
    return (bos, *_without_leading(lead, bos))


def _default_lead(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """The special tokens that the tokenizer itself puts in front.

    Those that it appends (an end-of-sequence or separator token) are left away: after one of them the last
    position would be the appended token, and the loss would ask what follows the end of a text.
    """
    # Told from a neutral text first: a prompt may itself spell a special token out.
    for text in ("a", *(prompt.prompt for prompt in prompts)):
        plain = tuple(_call(tokenizer, [text])["input_ids"][0])
        if not plain:
            continue
        full = tuple(_call(tokenizer, [text], special=True)["input_ids"][0])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
    return ()


def _without_leading(ids: tuple[int, ...], bos: Any) -> tuple[int, ...]:
    start = 0
    while start < len(ids) and ids[start] == bos:
        start += 1
    return ids[start:]


@dataclass(frozen=True, slots=True)
class _Divided:
    """A text's tokens: those of the prompt, and those of the target."""

    text: str
    """What the prompt's tokens spell."""
    own: _Encoded
    target_ids: tuple[int, ...]


def _divided(written: Sequence[Written], tokenizer: "PreTrainedTokenizerBase") -> list[_Divided]:
    if not written:
        return []
    alone = _encoded(tokenizer, [one.text for one in written])
    joint = _encoded(tokenizer, [one.text + one.target for one in written])
    return [
        _divided_at_border(one, own, both.ids, tokenizer)
        for one, own, both in zip(written, alone, joint, strict=True)
    ]


def _divided_at_border(
    written: Written, own: _Encoded, joint_ids: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase"
) -> _Divided:
    """The tokens of both as one text, as the model would have seen it, cut where the prompt ends.

    A token may reach over that border. If it takes only white space from the prompt ("is " + "Paris" is read as
    "is", " Paris"), the space goes to the target, which is lm-evaluation-harness's rule too: a model that has read a
    space by itself expects no word after it. Else ("Fr" + "ance") the prompt keeps its tokens.
    """
    if joint_ids[: len(own.ids)] == own.ids:
        return _Divided(written.text, own, joint_ids[len(own.ids) :])
    for moved in range(1, written.movable + 1):
        text = written.text[:-moved]
        (kept,) = _encoded(tokenizer, [text])
        if kept.ids and joint_ids[: len(kept.ids)] == kept.ids:
            return _Divided(text, kept, joint_ids[len(kept.ids) :])
    return _Divided(written.text, own, _continuation(written.target, own.ids, tokenizer))


def _continuation(
    target: str, own_ids: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, ...]:
    """The target's own tokens as they are in the middle of a text.

    At its beginning, SentencePiece and its like put a space there that nobody wrote.
    """
    candidates: list[tuple[int, ...]] = []
    for carrier in _CARRIERS:
        before, through = (tuple(ids) for ids in _call(tokenizer, [carrier, carrier + target])["input_ids"])
        if before and through[: len(before)] == before:
            candidates.append(through[len(before) :])
    candidates.append(tuple(_call(tokenizer, [target])["input_ids"][0]))
    wanted = _spelled(tokenizer, own_ids) + target
    spelling = (ids for ids in candidates if _spelled(tokenizer, own_ids + ids) == wanted)
    # A tokenizer that changes texts (to lower case, say) spells nothing as it was written.
    return next(spelling, candidates[0])


def _spelled(tokenizer: "PreTrainedTokenizerBase", ids: tuple[int, ...]) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _subject_positions(
    written: Written, divided: _Divided, shift: int, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, int] | tuple[None, None]:
    """The tokens of the subject, `shift` places right of their place in the text."""
    own = divided.own
    characters = written.subject_characters()
    if characters is None:
        return None, None
    if own.offsets is None:
        span = _span_by_prefixes(divided.text, characters, own.ids, tokenizer)
    else:
        span = _span_by_offsets(characters, own.offsets)
    # Below zero: the subject is a written-out bos that was taken away.
    if span is None or span[0] + shift < 0:
        return None, None
    return span[0] + shift, span[1] + shift


def _span_by_offsets(characters: Span, offsets: tuple[Span, ...]) -> Span | None:
    """Tokens that share a character with the range; a space before a word may be part of the word's token."""
    start, end = characters
    inside = [
        index for index, (first, last) in enumerate(offsets) if first < last and first < end and start < last
    ]
    return (inside[0], inside[-1] + 1) if inside else None


def _span_by_prefixes(
    text: str, characters: Span, ids: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase"
) -> Span | None:
    """Without offsets: count the tokens before the subject and up to its end, where tokens end there."""
    start, end = characters
    texts = [
        text[:end],
        text[:start],
        text[:start].rstrip(),
    ]  # the space before may be part of its first token
    through, *befores = (tuple(tokens) for tokens in _call(tokenizer, texts)["input_ids"])
    if ids[: len(through)] != through:
        return None
    counts = [len(before) for before in befores if ids[: len(before)] == before]
    return (counts[0], len(through)) if counts and counts[0] < len(through) else None


def _encoded(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[_Encoded]:
    fast = bool(tokenizer.is_fast)
    batch = _call(tokenizer, texts, offsets=fast)
    offsets = batch["offset_mapping"] if fast else [None] * len(texts)
    return [
        _Encoded(tuple(ids), None if spans is None else tuple(spans))
        for ids, spans in zip(batch["input_ids"], offsets, strict=True)
    ]


def _call(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, special: bool = False, offsets: bool = False
) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,  # no "sequence longer than" warning: `too-long` says it, with place and remedy
    )


@contextmanager
def _settings_kept(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """A fast tokenizer forgets its padding and truncation when called without them; put them back."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.is_fast or backend is None:
        yield
        return
    padding, truncation = backend.padding, backend.truncation
    encode_special_tokens = backend.encode_special_tokens
    try:
        yield
    finally:
        backend.encode_special_tokens = encode_special_tokens
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
