"""The place of the subject in a prompt: the slot of its template, else whole words."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backlens.prompts.prompt import SubjectPlace, filled, find_subject


def named(prompt: str, subject: str) -> str | None:
    """The prompt with its subject in brackets."""
    place = find_subject(prompt, subject)
    if place is None:
        return None
    return f"{prompt[: place.start]}[{prompt[place.start : place.end]}]{prompt[place.end :]}"


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("Dana, friend of Dan, is", "Dan", "Dana, friend of [Dan], is"),
        ("Jordan's capital is", "Jordan", "[Jordan]'s capital is"),
        ("Jordan’s capital is", "Jordan", "[Jordan]’s capital is"),
        ("Paris met Paris in", "Paris", "Paris met [Paris] in"),
        ('The "Times" is', "Times", 'The "[Times]" is'),
        ("Paris-based firms", "Paris", "[Paris]-based firms"),
        ("Mary-Ann, sister of Mary (not Mary-Lou)", "Mary", "Mary-Ann, sister of [Mary] (not Mary-Lou)"),
        ("l'Italie et l'Italie", "Italie", "l'Italie et l'[Italie]"),
        ("C++ came after C and before C#", "C", "C++ came after [C] and before C#"),
        ("C++ is", "C++", "[C++] is"),
        ("Apollo 11 came after Apollo 1 and", "Apollo 1", "Apollo 11 came after [Apollo 1] and"),
        ("3.5 and 5 are", "5", "3.5 and [5] are"),
        ("the U.S. is", "U.S.", "the [U.S.] is"),
        (" Ann ", " Ann ", " [Ann] "),
    ],
)
def test_the_last_whole_word_counts(prompt: str, subject: str, expected: str):
    assert named(prompt, subject) == expected


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Dana is", "Dan"),
        ("Jordans are", "Jordan"),
        ("Apollo 11 is", "Apollo 1"),
        ("Rosemary", "Mary"),
        ("Léon is", "Leo"),
        (unicodedata.normalize("NFD", "René is"), "Rene"),
        ("हिन्दी", "हिन्"),
        ("x is", " "),
    ],
)
def test_a_part_of_a_word_is_not_the_subject(prompt: str, subject: str):
    assert find_subject(prompt, subject) is None


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        (unicodedata.normalize("NFD", "a Léon é"), "Léon", unicodedata.normalize("NFD", "a [Léon] é")),
        ("a Léon é", unicodedata.normalize("NFD", "Léon"), "a [Léon] é"),
        ("in New\u00a0York is", "New York", "in [New\u00a0York] is"),
        ("in New York is", "New\u202fYork", "in [New York] is"),
        ("in New  York is", "New York", "in [New  York] is"),
        ("O’Brien is", "O'Brien", "[O’Brien] is"),
        ("Anne\u2011Marie is", "Anne-Marie", "[Anne\u2011Marie] is"),
        ("Zo\u00adë is", "Zoë", "[Zo\u00adë] is"),
        ("ＮＡＳＡ is", "NASA", "[ＮＡＳＡ] is"),
        (unicodedata.normalize("NFD", "서울은"), "서울", unicodedata.normalize("NFD", "[서울]은")),
        ("in new york is", "New York", "in [new york] is"),
        ("STRASSE in", "Straße", "[STRASSE] in"),
        ("polish and Polish are", "polish", "[polish] and Polish are"),
    ],
)
def test_what_reads_alike_is_the_subject_and_the_place_is_in_the_prompts_own_characters(
    prompt: str, subject: str, expected: str
):
    assert named(prompt, subject) == expected


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("中国的首都是", "中国", "[中国]的首都是"),
        ("東京タワーは東京2020", "東京", "東京タワーは[東京]2020"),
        ("ประเทศไทยอยู่ใน", "ไทย", "ประเทศ[ไทย]อยู่ใน"),
        ("パリはフランスの", "フランス", "パリは[フランス]の"),
        ("서울은 어느", "서울", "[서울]은 어느"),
        ("法国的Paris是", "Paris", "法国的[Paris]是"),
    ],
)
def test_scripts_without_spaces_have_no_word_borders(prompt: str, subject: str, expected: str):
    assert named(prompt, subject) == expected


def test_further_places_are_counted():
    assert find_subject("Dan and Dan, not Dana, and Dan", "Dan") == SubjectPlace(27, 30, others=2)


def test_the_slot_is_the_place_whatever_else_the_prompt_says():
    prompt, place = filled("What the Jordan river means to {} is {}", " Jordan ")
    assert prompt == "What the Jordan river means to  Jordan  is {}"
    assert place == SubjectPlace(32, 38)


WORDS = ["Dan", "Dana", "Léon", "Jordan", "Jor", "dan", "Zürich", "7", "77"]
GAPS = [" ", ", ", "\u00a0", ". ", " (", "  ", "\n"]


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=8),
    st.lists(st.sampled_from(GAPS), min_size=8, max_size=8),
    st.sampled_from(WORDS),
    st.sampled_from(["NFC", "NFD"]),
    st.sampled_from(["NFC", "NFD"]),
)
def test_it_agrees_with_a_list_of_the_words(words, gaps, subject, form, other_form):
    words = [unicodedata.normalize(form, word) for word in words]
    text = "".join(word + gap for word, gap in zip(words, gaps, strict=False))
    alike = [index for index, word in enumerate(words) if unicodedata.normalize("NFC", word) == subject]
    alike = alike or [index for index, word in enumerate(words) if word.lower() == subject.lower()]
    place = find_subject(text, unicodedata.normalize(other_form, subject))
    if not alike:
        assert place is None
        return
    start = sum(len(word) + len(gap) for word, gap in zip(words[: alike[-1]], gaps, strict=False))
    assert place == SubjectPlace(start, start + len(words[alike[-1]]), others=len(alike) - 1)


@given(st.text(), st.text())
def test_any_texts_have_a_place_within_them_or_none(prompt: str, subject: str):
    place = find_subject(prompt, subject)
    assert place is None or 0 <= place.start < place.end <= len(prompt)


@given(st.text(), st.text(), st.text())
def test_a_slot_holds_its_subject(before: str, subject: str, after: str):
    before = before.replace("{", "")
    prompt, place = filled(before + "{}" + after, subject)
    assert prompt == before + subject + after
    assert (prompt[place.start : place.end] if place else "") == subject.strip()
