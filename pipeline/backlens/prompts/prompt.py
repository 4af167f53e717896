"""A prompt as the user wrote it, the place where it names its subject, and the shards that prompts are divided into.

The place of the subject is the `{}` of the template, else where the subject stands as whole words. Words are compared
as they are read: composed and decomposed letters, kinds of space, of hyphen and of apostrophe are equal; upper and
lower case are equal only where nothing else is found. Of several places the last one counts, which is nearest to the
position of the loss. Scripts that are written without spaces have no whole words: there, any place counts.
"""

import functools
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from backlens.errors import BacklensError

SLOT = "{}"

_SAME = str.maketrans("‘’ʼ′‐‑‒–—−", "''''------")
_WITHOUT_SPACES = {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "BOPOMOFO", "HANGUL"}
_WITHOUT_SPACES |= {"THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE"}
"""First words of the Unicode names of scripts whose words are not parted. Korean parts words, but joins particles."""
_JOINS_WORDS = frozenset("-'&")
"""Between two letters, these make one word of two: Anne-Marie is not Anne."""
_JOINS_DIGITS = frozenset(".,:/")


@dataclass(frozen=True, slots=True)
class SubjectPlace:
    """The characters of a prompt that are its subject, from `start` up to `end`."""

    start: int
    end: int
    others: int = 0
    """Other places that name the subject as well."""

    def behind(self, text: str) -> "SubjectPlace":
        """The same place when `text` stands before the prompt."""
        return SubjectPlace(self.start + len(text), self.end + len(text), self.others)


def filled(template: str, subject: str) -> tuple[str, SubjectPlace | None]:
    """The template with the subject at its first `{}` (others are text), and where the subject is then."""
    # Not str.format: a prompt may hold other braces.
    before, _, after = template.partition(SLOT)
    named = subject.strip()
    start = len(before) + len(subject) - len(subject.lstrip())
    return before + subject + after, SubjectPlace(start, start + len(named)) if named else None


def find_subject(prompt: str, subject: str) -> SubjectPlace | None:
    """Where a prompt that has no slot names its subject; None if it does not."""
    for fold in (_alike, _alike_in_any_case):
        places = list(_places(prompt, subject.strip(), fold))
        # A part of a compound is the subject only where no word by itself is.
        for chosen in ([p for p in places if not _in_compound(prompt, *p)], places):
            if chosen:
                return SubjectPlace(*chosen[-1], others=len(chosen) - 1)
    return None


def subject_lines(absent: int, repeated: int, positions: str = "all") -> Iterator[str]:
    """What a report says about prompts that do not name their subject, or name it several times."""
    if absent:
        line = f"prompts that do not name their subject in whole words: {absent:,} (subject_start is null"
        lost = "; --positions subject+last: only their last position has rows in tokens"
        yield line + (lost if positions == "subject+last" else "") + ")"
    if repeated:
        yield (
            f"prompts that name their subject several times: {repeated:,} (the last place counts; "
            f"write {SLOT} in its place to choose another)"
        )


def _places(prompt: str, subject: str, fold: Callable[[str], str]) -> Iterator[tuple[int, int]]:
    """Characters of the prompt that read as the subject and do not begin or end within a word."""
    text, origins = _folded(prompt, fold)
    wanted, _ = _folded(subject, fold)
    at = text.find(wanted) if wanted else -1
    while at >= 0:
        stop = at + len(wanted)
        start, end = origins[at], origins[stop - 1] + 1
        # A character that folds into several is taken whole or not at all.
        whole = (at == 0 or origins[at - 1] < start) and (stop == len(text) or origins[stop] >= end)
        if whole and _is_border(prompt, start) and _is_border(prompt, end):
            yield start, end
        at = text.find(wanted, at + 1)


def _folded(text: str, fold: Callable[[str], str]) -> tuple[str, list[int]]:
    """The text as it is compared, and the place in `text` that each of its characters comes from."""
    letters: list[tuple[str, int]] = []
    for index, character in enumerate(text):
        for letter in fold(character):
            if letter == " " and letters and letters[-1][0] == " ":
                continue
            place = len(letters)
            # The order of marks over and under one letter says nothing (Unicode's canonical ordering).
            order = unicodedata.combining(letter)
            while order and place and unicodedata.combining(letters[place - 1][0]) > order:
                place -= 1
            letters.insert(place, (letter, index))
    return "".join(letter for letter, _ in letters), [index for _, index in letters]


@functools.lru_cache(maxsize=1 << 16)
def _alike(character: str) -> str:
    """The character decomposed; every space one space; nothing for what is not seen (a soft hyphen)."""
    if character.isspace():
        return " "
    if unicodedata.category(character) == "Cf":
        return ""
    return unicodedata.normalize("NFKD", character).translate(_SAME)


@functools.lru_cache(maxsize=1 << 16)
def _alike_in_any_case(character: str) -> str:
    return unicodedata.normalize("NFKD", _alike(character).casefold())


def _is_border(text: str, at: int) -> bool:
    """Whether no word goes on across this place."""
    if at in (0, len(text)):
        return True
    before, after = text[at - 1], text[at]
    if _is_mark(after):  # it belongs to the letter before
        return False
    return not (_is_word(before) and _is_word(after)) or _has_no_spaces(before) or _has_no_spaces(after)


def _in_compound(text: str, start: int, end: int) -> bool:
    """Whether the characters are one part of a word such as Anne-Marie, O'Brien, AT&T, C++ or 1.5.

    The possessive "Anne's" is none, nor is the elision "l'Italie".
    """
    ahead, behind = text[end : end + 2].translate(_SAME), text[max(0, start - 2) : start].translate(_SAME)
    possessive = ahead.lower() == "'s" and _is_border(text, end + 2)
    elision = behind[1:] == "'" and behind[0].islower()
    return (
        ahead[:1] in ("+", "#")
        or (len(ahead) == 2 and not possessive and _joins(ahead[0], text[end - 1], ahead[1]))
        or (len(behind) == 2 and not elision and _joins(behind[1], behind[0], text[start]))
    )


def _joins(character: str, before: str, after: str) -> bool:
    if character in _JOINS_DIGITS:
        return before.isdigit() and after.isdigit()
    return character in _JOINS_WORDS and _is_word(before) and _is_word(after)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_" or _is_mark(character)


@functools.lru_cache(maxsize=1 << 16)
def _has_no_spaces(character: str) -> bool:
    return not _WITHOUT_SPACES.isdisjoint(unicodedata.name(character, "").split())


@dataclass(frozen=True, slots=True)
class Prompt:
    """One (prompt, target) pair as the user wrote it, before tokenization."""

    prompt_id: int
    """Ordinal in the input, from 0. Rejected records count too, so ids are stable when a line is mended."""
    prompt: str
    target: str
    where: str
    """Where it came from, for messages: `prompts.jsonl:17`."""
    id: str | None = None
    subject: str | None = None
    relation: str | None = None
    meta: str | None = None
    """The input's other columns, as a JSON object."""
    slot: SubjectPlace | None = None
    """Where a template had its `{}`, with the subject in it now."""

    def subject_place(self) -> SubjectPlace | None:
        """Where `prompt` names the subject."""
        return self.slot or (None if self.subject is None else find_subject(self.prompt, self.subject))


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that could not be processed: one row of the `failures` table."""

    prompt_id: int
    stage: str
    """`read`, `tokenize` or `compute`."""
    error: str
    """A short, stable code such as `missing-field`."""
    message: str
    """One line: where, what, and what to do."""
    absent: str | None = None
    """The field that the record does not have at all, if that is why: the mark of a column with another name."""


@dataclass(frozen=True, slots=True)
class Shard:
    index: int
    records: tuple[Prompt | Rejected, ...]


def shards(records: Iterable[Prompt | Rejected], size: int) -> Iterator[Shard]:
    """Shard i holds records i·size to (i+1)·size − 1; only the last may hold fewer. One is held at a time."""
    if size < 1:
        raise BacklensError(f"--shard-prompts {size}: a shard holds at least one prompt; give 1 or more")
    return _cut(iter(records), size)


def _cut(records: Iterator[Prompt | Rejected], size: int) -> Iterator[Shard]:
    for index in itertools.count():
        taken = tuple(itertools.islice(records, size))
        if not taken:
            return
        yield Shard(index, taken)
