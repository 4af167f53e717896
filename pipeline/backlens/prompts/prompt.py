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
"""First words of the Unicode names of scripts without spaces between words. Korean has spaces, but joins particles."""
_JOINS_WORDS = frozenset("-'&")
"""Characters that join two words into one: Anne-Marie is not Anne."""
_JOINS_DIGITS = frozenset(".,:/")


@dataclass(frozen=True, slots=True)
class SubjectPlace:
    """The characters of a prompt that are its subject, from `start` up to `end`."""

    start: int
    end: int
    others: int = 0
    """Number of other places that name the subject."""

    def behind(self, text: str) -> "SubjectPlace":
        """The same place when `text` is put before the prompt."""
        return SubjectPlace(self.start + len(text), self.end + len(text), self.others)


def filled(template: str, subject: str) -> tuple[str, SubjectPlace | None]:
    """The template with the subject in its first `{}` (others are text), and the place of the subject."""
    # `str.format` would read other braces in the prompt.
    before, _, after = template.partition(SLOT)
    named = subject.strip()
    start = len(before) + len(subject) - len(subject.lstrip())
    return before + subject + after, SubjectPlace(start, start + len(named)) if named else None


def find_subject(prompt: str, subject: str) -> SubjectPlace | None:
    """The place where a prompt without a slot names its subject; None if it does not."""
    for fold in (_alike, _alike_in_any_case):
        places = list(_places(prompt, subject.strip(), fold))
        # A part of a compound is the subject only if no separate word is.
        for chosen in ([p for p in places if not _in_compound(prompt, *p)], places):
            if chosen:
                return SubjectPlace(*chosen[-1], others=len(chosen) - 1)
    return None


def subject_lines(absent: int, repeated: int, positions: str = "all") -> Iterator[str]:
    """Lines of a report about prompts that do not name their subject, or name it several times."""
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
    """Characters of the prompt that equal the subject and do not begin or end within a word."""
    text, origins = _folded(prompt, fold)
    wanted, _ = _folded(subject, fold)
    at = text.find(wanted) if wanted else -1
    while at >= 0:
        stop = at + len(wanted)
        start, end = origins[at], origins[stop - 1] + 1
        # A character that becomes several is matched whole or not at all.
        whole = (at == 0 or origins[at - 1] < start) and (stop == len(text) or origins[stop] >= end)
        if whole and _is_border(prompt, start) and _is_border(prompt, end):
            yield start, end
        at = text.find(wanted, at + 1)


def _folded(text: str, fold: Callable[[str], str]) -> tuple[str, list[int]]:
    """The text in the form that is compared, and the index in `text` of each of its characters."""
    letters: list[tuple[str, int]] = []
    for index, character in enumerate(text):
        for letter in fold(character):
            if letter == " " and letters and letters[-1][0] == " ":
                continue
            place = len(letters)
            # Marks over and under one letter are sorted (Unicode's canonical ordering).
            order = unicodedata.combining(letter)
            while order and place and unicodedata.combining(letters[place - 1][0]) > order:
                place -= 1
            letters.insert(place, (letter, index))
    return "".join(letter for letter, _ in letters), [index for _, index in letters]


@functools.lru_cache(maxsize=1 << 16)
def _alike(character: str) -> str:
    """The character decomposed; any space becomes one space; an invisible one (a soft hyphen) becomes empty."""
    if character.isspace():
        return " "
    if unicodedata.category(character) == "Cf":
        return ""
    return unicodedata.normalize("NFKD", character).translate(_SAME)


@functools.lru_cache(maxsize=1 << 16)
def _alike_in_any_case(character: str) -> str:
    return unicodedata.normalize("NFKD", _alike(character).casefold())


def _is_border(text: str, at: int) -> bool:
    """True if no word continues across this place."""
    if at in (0, len(text)):
        return True
    before, after = text[at - 1], text[at]
    if _is_mark(after):  # a mark belongs to the letter before it
        return False
    return not (_is_word(before) and _is_word(after)) or _has_no_spaces(before) or _has_no_spaces(after)


def _in_compound(text: str, start: int, end: int) -> bool:
    """True if the characters are a part of a word such as Anne-Marie, O'Brien, AT&T, C++ or 1.5.

    The possessive "Anne's" and the elision "l'Italie" do not count.
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
    """Ordinal in the input, from 0. Rejected records count too, so that ids stay the same when a line is corrected."""
    prompt: str
    target: str
    where: str
    """Place in the input, for messages: `prompts.jsonl:17`."""
    id: str | None = None
    subject: str | None = None
    relation: str | None = None
    meta: str | None = None
    """Other columns of the input, as a JSON object."""
    slot: SubjectPlace | None = None
    """Place of the template's `{}`, which now holds the subject."""

    def subject_place(self) -> SubjectPlace | None:
        """The place in `prompt` that names the subject."""
        return self.slot or (None if self.subject is None else find_subject(self.prompt, self.subject))


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that could not be processed: one row of the `failures` table."""

    prompt_id: int
    stage: str
    """Stage that failed: `read`, `tokenize` or `compute`."""
    error: str
    """Short, stable code such as `missing-field`."""
    message: str
    """One line: where, what is wrong, and what to do."""
    absent: str | None = None
    """Name of the field that the record lacks, if that is the reason: the column may have another name."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A contiguous range of records: the unit of work and of commit."""

    index: int
    records: tuple[Prompt | Rejected, ...]


def shards(records: Iterable[Prompt | Rejected], size: int) -> Iterator[Shard]:
    """Divide records into shards: shard i holds records i·size to (i+1)·size − 1; the last may hold fewer.

    Memory holds one shard at a time.
    """
    if size < 1:
        raise BacklensError(f"--shard-prompts {size}: a shard holds at least one prompt; give 1 or more")
    return _cut(iter(records), size)


def _cut(records: Iterator[Prompt | Rejected], size: int) -> Iterator[Shard]:
    for index in itertools.count():
        taken = tuple(itertools.islice(records, size))
        if not taken:
            return
        yield Shard(index, taken)
