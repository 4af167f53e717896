"""Recall of a demo model: the facts that it knows, and the choice of those that are shipped with it."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from docs.demo_model.corpus import RELATIONS, Fact, Record, World, counterfact_records
from docs.demo_model.recipe import Recipe
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Cloze:
    """A prompt and the object that should follow it."""

    prompt: str
    answer: str


def recalled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, clozes: Sequence[Cloze]
) -> list[bool]:
    """Per cloze, True if the answer is the most probable next token."""
    by_length: dict[int, list[int]] = defaultdict(list)  # equal lengths need no padding
    encoded: list[list[int]] = [tokenizer.encode(cloze.prompt) for cloze in clozes]
    for index, ids in enumerate(encoded):
        by_length[len(ids)].append(index)
    answers = [tokenizer.encode(f" {cloze.answer}") for cloze in clozes]
    hits = [False] * len(clozes)
    for indices in by_length.values():
        for start in range(0, len(indices), 256):
            chunk = indices[start : start + 256]
            likeliest = next_token_scores(model, torch.tensor([encoded[i] for i in chunk])).argmax(-1)
            for index, token in zip(chunk, likeliest.tolist(), strict=True):
                hits[index] = [token] == answers[index]
    return hits


@torch.inference_mode()
def next_token_scores(
    model: PreTrainedModel, token_ids: Int[Tensor, "prompt position"]
) -> Float[Tensor, "prompt vocabulary"]:
    """The logits after each prompt."""
    return model(input_ids=token_ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def clozes_of(facts: Iterable[Fact], held_out: bool) -> list[Cloze]:
    """Every fact in every wording: those of the training text, or the held-out ones."""
    return [
        Cloze(template.format(fact.subject), fact.object)
        for fact in facts
        for template in (fact.relation.held_out if held_out else fact.relation.templates)
    ]


@dataclass(frozen=True, slots=True)
class Recall:
    """Share of clozes with the right answer, 0 to 1, for training and held-out wordings."""

    train: float
    held_out: float


def measure_recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> Recall:
    """Recall over all people, relations and wordings, in float32."""
    shares = []
    for held_out in (False, True):
        hits = recalled(model, tokenizer, clozes_of(world.facts, held_out))
        shares.append(sum(hits) / len(hits))
    return Recall(*shares)


def choose_records(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, recipe: Recipe
) -> list[Record]:
    """Records of facts that the model recalls for the record's own prompt; equally many per relation."""
    facts = list(world.facts)
    random.Random(recipe.seed).shuffle(facts)
    records = counterfact_records(facts, world, recipe.seed)
    rewrites = [record["requested_rewrite"] for record in records]
    clozes = [Cloze(r["prompt"].format(r["subject"]), r["target_true"]["str"]) for r in rewrites]
    left = dict.fromkeys((relation.id for relation in RELATIONS), recipe.records // len(RELATIONS))
    chosen: list[Record] = []
    for record, hit in zip(records, recalled(model, tokenizer, clozes), strict=True):
        relation_id = record["requested_rewrite"]["relation_id"]
        if hit and left[relation_id]:
            left[relation_id] -= 1
            chosen.append({**record, "case_id": len(chosen)})
    return chosen
