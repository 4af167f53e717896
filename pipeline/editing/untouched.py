"""What edits should leave alone, and how far they did."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.config import PromptFields
from pipeline.editing.covariance import read_texts
from pipeline.editing.forward import Sequences, batches, encode, logits_of
from pipeline.errors import BacklensError
from pipeline.models.load import LoadedModel
from pipeline.prompts.fields import without_option
from pipeline.prompts.read import read_prompts
from pipeline.prompts.record import Rejected


@dataclass(frozen=True, slots=True)
class Bystanders:
    """Facts that nobody edits (prompts and targets), and texts, in the form in which they are sent to workers."""

    facts: tuple[tuple[str, str], ...] = ()
    texts: tuple[str, ...] = ()

    @classmethod
    def read(cls, facts: str | None, texts: str | None) -> "Bystanders":
        """Raises BacklensError that names what cannot be read."""
        pairs: list[tuple[str, str]] = []
        for record in read_prompts(facts, "auto", PromptFields(), None) if facts is not None else ():
            if isinstance(record, Rejected):
                raise BacklensError(without_option(record))
            pairs.append((record.prompt, record.target))
        return cls(tuple(pairs), tuple(read_texts(texts)) if texts is not None else ())

    def digest(self) -> str | None:
        """Of what they say; None where there is nothing."""
        if not (self.facts or self.texts):
            return None
        return hashlib.sha256(json.dumps([self.facts, self.texts]).encode()).hexdigest()


class Untouched:
    """Bystanders as a model's token ids, encoded once and measured after every edit."""

    def __init__(self, loaded: LoadedModel, bystanders: Bystanders) -> None:
        self._loaded = loaded
        encoded = encode(loaded, bystanders.facts, "--untouched") if bystanders.facts else []
        self._facts: Sequences = [(each.token_ids, each.target_ids) for each in encoded]
        ids: Sequence[Sequence[int]] = [loaded.tokenizer(text)["input_ids"] for text in bystanders.texts]
        self._texts: Sequences = [(each[:1], each[1:]) for each in ids if len(each) > 1]
        if bystanders.texts and not self._texts:
            raise BacklensError("--held-out: holds no text of two tokens or more")

    def measure(self) -> tuple[float | None, float | None]:
        """Accuracy on the facts, and perplexity of the texts, per token; None where there are none."""
        return (self._accuracy() if self._facts else None), (self._perplexity() if self._texts else None)

    @torch.no_grad()
    def _accuracy(self) -> float:
        right = 0
        for _, batch in batches(self._loaded, self._facts):
            hit = logits_of(self._loaded, batch).argmax(-1) == batch.targets
            right += int((hit | ~batch.target_mask).all(-1).sum())
        return right / len(self._facts)

    @torch.no_grad()
    def _perplexity(self) -> float:
        total, tokens = 0.0, 0
        for _, batch in batches(self._loaded, self._texts):
            scores = logits_of(self._loaded, batch).log_softmax(-1)
            nll = -scores.gather(-1, batch.targets[..., None]).squeeze(-1)
            total += float(nll[batch.target_mask].double().sum())
            tokens += int(batch.target_mask.sum())
        return math.exp(min(total / tokens, 700.0))
