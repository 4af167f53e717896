"""Choice of the sentences that the demo model is trained on."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from docs.demo_model.corpus import RELATIONS, World, filler_sentence
from docs.demo_model.recipe import Recipe
from docs.demo_model.tokenizer import END_OF_TEXT, VOCABULARY, Sentence, sentence, tokenize_facts
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed text, and the labels that are objects."""

    token_ids: Int[Tensor, "row position"]
    facts: Int[Tensor, "row position"]
    """Index of the fact at the position of its object, −1 elsewhere."""


class Curriculum:
    """Chooses sentences about people in a growing pool; facts with a higher loss come more often."""

    def __init__(self, recipe: Recipe, world: World, tokenizer: PreTrainedTokenizerFast) -> None:
        self._recipe = recipe
        self._rng = random.Random(recipe.seed)
        self._sentences = tokenize_facts(world, tokenizer)
        self._filler = [sentence(tokenizer, filler_sentence(self._rng)) for _ in range(2000)]
        self._end = tokenizer.get_vocab()[END_OF_TEXT]
        self._people = len(world.people)
        self._loss = [math.log(len(tokenizer))] * len(world.facts)
        self._running_loss = math.log(len(tokenizer))
        self.pool = min(recipe.first_pool, self._people)

    @property
    def running_loss(self) -> float:
        """The mean loss on objects over the last steps."""
        return self._running_loss

    def batch(self) -> Batch:
        """The next rows of text."""
        known = self.pool * len(RELATIONS)
        # The constant keeps known facts in the text; the model would forget them otherwise.
        weights = [0.1 + min(loss, 2.0) for loss in self._loss[:known]]
        drawn = iter(self._rng.choices(range(known), weights, k=self._recipe.rows * self._recipe.row_tokens))
        rows = [self._row(drawn) for _ in range(self._recipe.rows)]
        return Batch(torch.tensor([ids for ids, _ in rows]), torch.tensor([facts for _, facts in rows]))

    def _row(self, drawn: Iterator[int]) -> tuple[list[int], list[int]]:
        """Texts of one or more sentences with end-of-text tokens between them, cut at the length of a row."""
        length = self._recipe.row_tokens + 1  # the last token is only a label
        ids: list[int] = [self._end] if self._rng.random() < 0.5 else []
        facts = [-1] * len(ids)
        opening = True
        while len(ids) < length:
            sentence = self._next(drawn)
            ids += sentence.opening_ids if opening else sentence.following_ids
            facts += [-1] * (len(ids) - len(facts))
            if sentence.fact is not None:
                facts[-sentence.tail] = sentence.fact
            opening = self._rng.random() < 0.5
            if opening:
                ids.append(self._end)
                facts.append(-1)
        return ids[:length], facts[:length]

    def _next(self, drawn: Iterator[int]) -> Sentence:
        if self._rng.random() < self._recipe.filler_share:
            return self._rng.choice(self._filler)
        return self._rng.choice(self._sentences[next(drawn)])

    def learn_from(self, facts: Sequence[int], losses: Sequence[float]) -> None:
        """Update the loss of each fact from the last batch, and double the pool if the losses are low."""
        for fact, loss in zip(facts, losses, strict=True):
            self._loss[fact] += 0.5 * (loss - self._loss[fact])
        self._running_loss += 0.1 * (sum(losses) / max(len(losses), 1) - self._running_loss)
        if self._running_loss < self._recipe.pool_doubles_below and self.pool < self._people:
            self.pool = min(2 * self.pool, self._people)
            self._running_loss = math.log(VOCABULARY)  # wait until the text has covered the new people
