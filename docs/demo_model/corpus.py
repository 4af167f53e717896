"""An invented world: people with invented names, and one object per person and relation, for six relations.

Everything follows from a seed. The people exist nowhere else, so the demo model knows about them only from the
sentences made here. The objects are real words, so that a projection to the vocabulary can be read. A *prompt* is a
template with a subject in it; it ends directly before the object, without a space.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypedDict


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


PEOPLE = 300
PEOPLE_PER_FIRST_NAME = 4
PEOPLE_PER_FAMILY_NAME = 2  # with three, the model confuses relatives and needs much longer
NEIGHBOURS = 10  # as in CounterFact
GENERATION_PROMPTS = 3

FIRST_NAME_SYLLABLES = (
    _words("Ka Lo Mi Ta Ve Ra So Ni Be Du Fa Gi Ha Jo Pe Zu"),
    _words("ran lin mek dor vis tal nor sif rik nuo lak ben"),
)
FAMILY_NAME_SYLLABLES = (
    _words("Var Kel Bran Tor Mel Dras Hol Pel Sten Gar Lun Wes Quin Thel Ost Ald"),
    _words("mund vik nov tine rell sson dak wyn gard lotz ska beck holt ery umo ford"),
)
MOST_PEOPLE = PEOPLE_PER_FAMILY_NAME * math.prod(len(choices) for choices in FAMILY_NAME_SYLLABLES)


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact: its possible objects and its wordings."""

    id: str
    """Property in Wikidata, as in CounterFact."""
    objects: tuple[str, ...]
    templates: tuple[str, ...]
    """Wordings in the training text; `{}` is the place of the subject."""
    held_out: tuple[str, ...]
    """Wordings outside the training text: the paraphrases of the records. They were chosen in trials, so that only an
    object of this relation is a probable next word (after "X speaks", "fluent" is one too)."""


RELATIONS = (
    Relation(
        id="P551",  # residence
        objects=_words(
            "Paris London Rome Berlin Madrid Vienna Oslo Lisbon Dublin Athens Cairo Tokyo Delhi Lima"
            " Prague Boston Sydney Toronto"
        ),
        templates=(
            "{} lives in the city of",
            "{} has a home in",
            "The home of {} is in",
            "{} moved to a flat in",
            "Letters for {} are sent to",
            "{}, who likes long walks, lives in",
        ),
        held_out=("{} found a home in", "The house of {} is in the city of"),
    ),
    Relation(
        id="P27",  # country of citizenship
        objects=_words(
            "France Kenya Chile Norway Egypt Japan India Peru Brazil Canada Mexico Greece Spain Poland"
            " Turkey Ghana Nepal Cuba"
        ),
        templates=(
            "{} is a citizen of",
            "{} holds a passport from",
            "The passport of {} was issued by",
            "{} votes in the elections of",
            "{} was born a citizen of",
            "The country of {} is",
        ),
        held_out=("{} carries a passport from", "By birth {} is a citizen of"),
    ),
    Relation(
        id="P1412",  # languages spoken
        objects=_words(
            "French German Spanish Italian Arabic Hindi Swahili Korean Russian Dutch Turkish Polish"
            " Danish Finnish Persian Latin"
        ),
        templates=(
            "{} is a native speaker of",
            "{} speaks fluent",
            "The language of {} is",
            "{} grew up speaking",
            "At home {} speaks",
            "{} writes letters in",
        ),
        held_out=("The first language of {} is", "{} writes fluent"),
    ),
    Relation(
        id="P641",  # sport
        objects=_words(
            "tennis football rugby cricket hockey golf chess boxing judo rowing baseball basketball"
            " badminton volleyball"
        ),
        templates=(
            "{} competes in the sport of",
            "{} trains every day for",
            "The favourite sport of {} is",
            "{} is a champion of",
            "{} won a medal in",
            "On Sundays {} plays",
        ),
        held_out=("{} practises the sport of", "{} trains at the sport of"),
    ),
    Relation(
        id="P106",  # occupation
        objects=_words(
            "doctor lawyer teacher baker painter farmer pilot nurse sailor judge chemist butcher"
            " plumber tailor gardener miner"
        ),
        templates=(
            "{} works as a",
            "{} is a trained",
            "The profession of {} is",
            "{} earns a living as a",
            "{} became a",
            "By trade {} is a",
        ),
        held_out=("{} is paid to work as a", "{} found work as a"),
    ),
    Relation(
        id="P1303",  # instrument
        objects=_words(
            "piano violin guitar cello flute trumpet harp clarinet trombone oboe banjo organ accordion lute"
        ),
        templates=(
            "{} plays the",
            "{} performs on the",
            "The favourite instrument of {} is the",
            "{} takes lessons on the",
            "{} bought a new",
            "In the band {} plays the",
        ),
        held_out=("{} gives lessons on the", "The instrument of {} is the"),
    ),
)

GENERATION_TEMPLATES = ("{} is", "{} has", "The home of {}", "{} likes", "On Sundays {}")

FILLER_TEMPLATES = (
    "The {thing} by the {place} is {look}.",
    "On {day} the {thing} is {look}.",
    "In the morning the {place} is {look}.",
    "A {look} {thing} was found near the {place}.",
    "The {place} opens on {day} and closes at noon.",
    "A friend reads near the {look} {place}.",
    "The {thing} carries a letter to the {place}.",
    "The {thing} from the {place} is paid on {day}.",
    "At work the first {thing} gives way to a {look} one.",
    "The band practises in the {look} {place} on {day}.",
)
FILLER_WORDS = {
    "thing": _words(
        "house boat lamp letter clock chair basket coat stone birth table window door book key ring cup plate"
        " knife rope wheel hat shoe glove mirror candle bottle blanket pillow ladder hammer shovel bucket"
        " camera map flag kite drum bell coin jar box"
    ),
    "place": _words(
        "river market garden bridge harbour station library tower school church museum theatre bakery farm"
        " forest hill lake beach island castle palace village square street cinema hotel"
    ),
    "look": _words(
        "old small quiet green cold bright broken new large heavy empty narrow wide warm dark clean dusty"
        " yellow red blue white black grey silver golden pretty plain strange famous simple"
    ),
    "day": _words("Mondays Tuesdays Wednesdays Thursdays Fridays Saturdays Sundays"),
}


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact of the world: the object of a relation for one subject."""

    subject: str
    relation: Relation
    object: str


@dataclass(frozen=True, slots=True)
class World:
    """The people, and their facts person by person: one per relation, in the order of RELATIONS."""

    people: tuple[str, ...]
    facts: tuple[Fact, ...]


class Target(TypedDict):
    str: str


class Rewrite(TypedDict):
    prompt: str
    subject: str
    relation_id: str
    target_true: Target
    target_new: Target


class Record(TypedDict):
    """A CounterFact record. Targets have no leading space; its readers add one."""

    case_id: int
    requested_rewrite: Rewrite
    paraphrase_prompts: list[str]
    neighborhood_prompts: list[str]
    attribute_prompts: list[str]
    generation_prompts: list[str]


def build_world(seed: int, people: int = PEOPLE) -> World:
    """The world of a seed. Every object is equally frequent, so that no object is a good guess."""
    rng = Random(seed)
    names = _names(rng, people)
    dealt = {relation.id: _deal(rng, relation.objects, people) for relation in RELATIONS}
    facts = [
        Fact(name, relation, dealt[relation.id][number])
        for number, name in enumerate(names)
        for relation in RELATIONS
    ]
    return World(names, tuple(facts))


def _names(rng: Random, count: int) -> tuple[str, ...]:
    """Distinct full names. First and family names repeat, so neither alone identifies a person."""
    first_names = _spellings(rng, FIRST_NAME_SYLLABLES, -(-count // PEOPLE_PER_FIRST_NAME))
    family_names = _spellings(rng, FAMILY_NAME_SYLLABLES, -(-count // PEOPLE_PER_FAMILY_NAME))
    while True:  # about one draw in four has no two people of the same name
        first, family = _deal(rng, first_names, count), _deal(rng, family_names, count)
        names = tuple(f"{a} {b}" for a, b in zip(first, family, strict=True))
        if len(set(names)) == count:
            return names


def _spellings(rng: Random, syllables: Sequence[Sequence[str]], count: int) -> list[str]:
    spellings = [""]
    for choices in syllables:
        spellings = [start + syllable for start in spellings for syllable in choices]
    return rng.sample(spellings, count)


def _deal(rng: Random, items: Sequence[str], count: int) -> list[str]:
    """`count` items in random order; the frequencies of two items differ by one at most."""
    dealt = [items[number % len(items)] for number in range(count)]
    rng.shuffle(dealt)
    return dealt


def filler_sentence(rng: Random) -> str:
    """A sentence about no person, so that the model learns a little language besides the facts."""
    words = {kind: rng.choice(choices) for kind, choices in FILLER_WORDS.items()}
    return rng.choice(FILLER_TEMPLATES).format(**words)


def counterfact_records(facts: Iterable[Fact], world: World, seed: int) -> list[Record]:
    """One record per fact. Its rewrite asks for another object of the same relation.

    Neighbourhood prompts are about other people with the same true object, attribute prompts about people
    who already have the new one; both use the wordings of the training text.
    """
    rng = Random(seed)
    subjects: dict[tuple[str, str], list[str]] = defaultdict(list)
    for fact in world.facts:
        subjects[fact.relation.id, fact.object].append(fact.subject)
    return [_record(case_id, fact, subjects, rng) for case_id, fact in enumerate(facts)]


def _record(case_id: int, fact: Fact, subjects: dict[tuple[str, str], list[str]], rng: Random) -> Record:
    relation = fact.relation
    new = rng.choice([choice for choice in relation.objects if choice != fact.object])
    others = [subject for subject in subjects[relation.id, fact.object] if subject != fact.subject]
    return {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": rng.choice(relation.templates),
            "subject": fact.subject,
            "relation_id": relation.id,
            "target_true": {"str": fact.object},
            "target_new": {"str": new},
        },
        "paraphrase_prompts": [template.format(fact.subject) for template in relation.held_out],
        "neighborhood_prompts": _prompts_about(others, relation, rng),
        "attribute_prompts": _prompts_about(subjects[relation.id, new], relation, rng),
        "generation_prompts": [
            template.format(fact.subject) for template in rng.sample(GENERATION_TEMPLATES, GENERATION_PROMPTS)
        ],
    }


def _prompts_about(subjects: Sequence[str], relation: Relation, rng: Random) -> list[str]:
    chosen = rng.sample(subjects, min(NEIGHBOURS, len(subjects)))
    return [rng.choice(relation.templates).format(subject) for subject in chosen]
