"""The demo model's tokenizer, and tokenized sentences that state facts."""

import random
from dataclasses import dataclass

from docs.demo_model.corpus import RELATIONS, Fact, World, filler_sentence
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from backlens.errors import BacklensError

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1150  # at most; the text has merges for about 1,070
CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Sentence:
    """A tokenized sentence, at the start of a text and after another sentence."""

    opening_ids: tuple[int, ...]
    following_ids: tuple[int, ...]
    """Ids with a leading space."""
    fact: int | None = None
    """Index of the fact in the world; None for filler."""
    tail: int = 0
    """Number of tokens from the object to the end, the object included."""


def train_tokenizer(world: World, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which each object is one token and each name is several.

    Words are repeated in the text and names are not. Pairs that occur fewer than `min_frequency` times are not merged,
    so syllables become tokens, and names do not.
    """
    rng = random.Random(seed)
    wordings = [template for relation in RELATIONS for template in relation.templates + relation.held_out]
    objects = [f" {choice}." for relation in RELATIONS for choice in relation.objects]
    text = [
        *(f"{name} and {name}." for name in world.people),
        *(template.format("it") for template in wordings for _ in range(30)),
        *(choice for choice in objects for _ in range(400)),
        *(filler_sentence(rng) for _ in range(3000)),
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            min_frequency=30,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[END_OF_TEXT],
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )
    _check_pieces(tokenizer, world)
    return tokenizer


def _check_pieces(tokenizer: PreTrainedTokenizerFast, world: World) -> None:
    split = [
        choice
        for relation in RELATIONS
        for choice in relation.objects
        if len(tokenizer.encode(f" {choice}")) != 1
    ]
    if split:
        raise BacklensError(f"tokenizer: {', '.join(split)} became several tokens; raise VOCABULARY")
    whole = [name for name in world.people if len(tokenizer.encode(name)) < 3]
    if whole:
        raise BacklensError(f"tokenizer: {', '.join(whole)} became fewer than 3 tokens; lower VOCABULARY")


def tokenize_facts(world: World, tokenizer: PreTrainedTokenizerFast) -> list[list[Sentence]]:
    """Per fact, its sentence in each training wording."""
    return [
        [
            sentence(tokenizer, f"{template.format(fact.subject)} {fact.object}.", index, fact)
            for template in fact.relation.templates
        ]
        for index, fact in enumerate(world.facts)
    ]


def sentence(
    tokenizer: PreTrainedTokenizerFast, text: str, index: int | None = None, fact: Fact | None = None
) -> Sentence:
    """The tokens of a text; `index` and `fact` are the fact that it states, if any."""
    tail = len(tokenizer.encode(f" {fact.object}.")) if fact else 0
    return Sentence(tuple(tokenizer.encode(text)), tuple(tokenizer.encode(f" {text}")), index, tail)
