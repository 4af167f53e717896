"""Texts that an edited model goes on to write, and CounterFact's two figures about them.

From the authors' `eval_utils_counterfact.py`. Words are split by a regular expression where they use NLTK, and the
inverse document frequencies are of the reference texts at hand where theirs are of Wikipedia.

What edits should leave alone, and how far they did.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from backlens.config import PromptFields
from backlens.editing.covariance import read_texts
from backlens.editing.forward import Sequences, batches, encode, logits_of
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel
from backlens.prompts.fields import without_option
from backlens.prompts.prompt import Rejected
from backlens.prompts.read import read_prompts

TOKENS = 100
TOP_K = 5
STARTS = ("The", "In", "A", "On", "It", "At", "By", "One")


def generate(
    loaded: LoadedModel, prompts: Sequence[str], seed: int, tokens: int = TOKENS, top_k: int = TOP_K
) -> list[str]:
    """A sampled continuation of each prompt (with the prompt), up to `tokens` tokens in all; as the seed says."""
    tokenizer, model = loaded.tokenizer, loaded.model
    ids = [list(each) for each in tokenizer(list(prompts))["input_ids"]]
    width = max(map(len, ids))
    device = loaded.device
    # generated tokens are appended, so padding goes in front; a row is padded with its own first token
    rows = torch.tensor([[each[0]] * (width - len(each)) + each for each in ids], device=device)
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in ids], device=device)
    end = getattr(model.config, "eos_token_id", None)
    pad = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        made = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=rows,
            attention_mask=mask,
            max_new_tokens=max(1, tokens - width),
            do_sample=top_k > 1,
            top_k=top_k if top_k > 1 else None,
            pad_token_id=pad,
            eos_token_id=end,
        )
    kept = [row[width - len(each) :] for row, each in zip(made.tolist(), ids, strict=True)]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in kept]


def sample_prefixes(loaded: LoadedModel, count: int, seed: int = 0) -> tuple[str, ...]:
    """The empty text, and `count` that the model makes itself, to stand before a prompt (ROME, §3.1)."""
    if not count:
        return ("",)
    starts = [STARTS[number % len(STARTS)] for number in range(count)]
    return ("", *(f"{each.rstrip().rstrip('.')}. " for each in generate(loaded, starts, seed, tokens=10)))


def ngram_entropy(texts: Sequence[str]) -> float:
    """Mean over texts of 2/3 · H₂/2 + 4/3 · H₃/2, in bits: low where a text repeats itself."""
    return sum(_entropy(text) for text in texts) / len(texts)


def _entropy(text: str) -> float:
    words = re.findall(r"\w+|[^\w\s]", text)
    # the authors take the mean of the two weighted entropies
    weighted = [
        weight * _bits(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values())
        for n, weight in ((2, 2 / 3), (3, 4 / 3))
    ]
    return sum(weighted) / 2


def _bits(counts: Iterable[int]) -> float:
    counts = list(counts)
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts)


def reference_score(texts: Sequence[str], references: Sequence[str]) -> float:
    """Cosine of the TF-IDF vectors of the generated texts and of the references, each joined into one."""
    frequency = Counter(word for each in references for word in set(_terms(each)))
    ours, theirs = (Counter(_terms(" ".join(each))) for each in (texts, references))
    weight = {w: math.log((1 + len(references)) / (1 + frequency[w])) + 1 for w in {*ours, *theirs}}
    dot = sum(ours[w] * theirs[w] * weight[w] ** 2 for w in ours)
    norms = [math.sqrt(sum((c[w] * weight[w]) ** 2 for w in c)) for c in (ours, theirs)]
    return dot / (norms[0] * norms[1]) if all(norms) else 0.0


def _terms(text: str) -> list[str]:
    return re.findall(r"\b\w\w+\b", text.lower())


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
