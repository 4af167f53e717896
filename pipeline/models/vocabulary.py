"""What every token id stands for, as bytes and as text."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[int, ...]:
    """The ids below `rows` that stand for a token, ascending. An unembedding is often padded with rows that do not."""
    own = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    return tuple(sorted(index for index in own if index < rows))


def index_of(ids: Sequence[int] | None, rows: int) -> slice | list[int]:
    """An index of these of `rows` rows, or of all for None: a slice where they are the first, which copies nothing."""
    if ids is None:
        return slice(rows)
    return slice(len(ids)) if list(ids) == list(range(len(ids))) else list(ids)


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[bytes]]:
    """Text and bytes of the ids 0 … size − 1; an id that the tokenizer does not have is empty.

    A token is not decoded by itself: SentencePiece would drop its leading space. Its stored form is turned back
    into bytes by the rule of the tokenizer's kind, and the text is those bytes, U+FFFD where they are no UTF-8.
    """
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    to_bytes = _byte_level if _is_byte_level(tokenizer) else _metaspace
    ids = list(range(size))
    forms = [form if isinstance(form, str) else "" for form in _tokens(tokenizer, ids)]
    contents = [
        added[i].encode() if i in added else to_bytes(form) for i, form in zip(ids, forms, strict=True)
    ]
    return [content.decode("utf-8", errors="replace") for content in contents], contents


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str | None]:
    by_id: Mapping[int, str] = {index: form for form, index in tokenizer.get_vocab().items()}
    return [by_id.get(index) for index in ids]


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # tokenizers written in Python: GPT-2's keeps the table it maps bytes with
        return hasattr(tokenizer, "byte_decoder")
    state = json.loads(backend.to_str())
    return '"ByteLevel"' in json.dumps([state.get("decoder"), state.get("pre_tokenizer")])


def _byte_level(form: str) -> bytes:
    """GPT-2's reversible alphabet: each character is one byte."""
    table = _BYTE_OF
    return bytes(table[c] for c in form) if all(c in table for c in form) else form.encode()


def _metaspace(form: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(form)
    return bytes([int(match[1], 16)]) if match else form.replace("▁", " ").encode()


def _alphabet() -> Mapping[str, int]:
    """Printable bytes stand for themselves; the others, in order, for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF: Mapping[str, int] = _alphabet()
