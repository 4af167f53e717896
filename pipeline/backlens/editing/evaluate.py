"""Evaluation of edits: metrics of CounterFact and zsRE, generated texts, and facts and texts that should not change.

CounterFact (arXiv 2202.05262, §3.3; `eval_utils_counterfact.py` and `summarize.py` of the authors' code) compares a new
and a true target after a prompt, each by its mean −log p over its tokens (teacher-forced):

* success: 1 if the new target is more probable than the true one, for the prompt (efficacy) and for paraphrases; 1 if
  the true one is more probable, in the neighbourhood. A case's figure is the mean over its prompts.
* accuracy: 1 if every token of the wanted target (new; true in the neighbourhood) is the most probable one.
* score S: the harmonic mean of the means of the three successes over cases (`summary`).

zsRE (`eval_utils_zsre.py`) has accuracies only: the share of the target's tokens that are the most probable ones,
teacher-forced; in the neighbourhood, for the answer to an unrelated question.

Generated texts follow `eval_utils_counterfact.py` too, with two differences: a regular expression splits words (the
authors use NLTK), and inverse document frequencies come from the reference texts (theirs come from Wikipedia).

All prompts of one or more cases run in a few padded batches. One row serves both targets where each is one token.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from backlens.config import PromptFields
from backlens.editing.activations import BATCH_TOKENS, Sequences, batches, encode, logits_of, read_texts
from backlens.editing.request import Metrics, Request
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel
from backlens.models.vocabulary import index_of
from backlens.prompts.fields import without_option
from backlens.prompts.prompt import Rejected
from backlens.prompts.read import read_prompts

TOKENS = 100
TOP_K = 5
STARTS = ("The", "In", "A", "On", "It", "At", "By", "One")


def generate(
    loaded: LoadedModel, prompts: Sequence[str], seed: int, tokens: int = TOKENS, top_k: int = TOP_K
) -> list[str]:
    """Each prompt with a sampled continuation, up to `tokens` tokens in all. The seed fixes the samples."""
    tokenizer, model = loaded.tokenizer, loaded.model
    ids = [list(each) for each in tokenizer(list(prompts))["input_ids"]]
    width = max(map(len, ids))
    device = loaded.device
    # padding stands before the prompt, because generated tokens are appended; a row repeats its first token
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
    """Prefixes for a prompt: the empty text, and `count` texts that the model generates (ROME, §3.1)."""
    if not count:
        return ("",)
    starts = [STARTS[number % len(STARTS)] for number in range(count)]
    return ("", *(f"{each.rstrip().rstrip('.')}. " for each in generate(loaded, starts, seed, tokens=10)))


def ngram_entropy(texts: Sequence[str]) -> float:
    """Mean over texts of 2/3 · H₂/2 + 4/3 · H₃/2, in bits; low for texts that repeat themselves."""
    return sum(_entropy(text) for text in texts) / len(texts)


def _entropy(text: str) -> float:
    words = re.findall(r"\w+|[^\w\s]", text)
    # the authors' code takes the mean of the two weighted entropies
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
    """Cosine of the TF-IDF vectors of the generated texts and of the references, each joined into one text."""
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
    """Facts (prompts and targets) and texts that edits should not change, in the form that is sent to workers."""

    facts: tuple[tuple[str, str], ...] = ()
    texts: tuple[str, ...] = ()

    @classmethod
    def read(cls, facts: str | None, texts: str | None) -> "Bystanders":
        """Read both from files. Raises BacklensError for the first record that cannot be read."""
        pairs: list[tuple[str, str]] = []
        for record in read_prompts(facts, "auto", PromptFields(), None) if facts is not None else ():
            if isinstance(record, Rejected):
                raise BacklensError(without_option(record))
            pairs.append((record.prompt, record.target))
        return cls(tuple(pairs), tuple(read_texts(texts)) if texts is not None else ())

    def digest(self) -> str | None:
        """SHA-256 of their content; None if there are no facts and no texts."""
        if not (self.facts or self.texts):
            return None
        return hashlib.sha256(json.dumps([self.facts, self.texts]).encode()).hexdigest()


class Untouched:
    """Bystanders as token ids: encoded once, measured after every edit."""

    def __init__(self, loaded: LoadedModel, bystanders: Bystanders) -> None:
        self._loaded = loaded
        encoded = encode(loaded, bystanders.facts, "--untouched") if bystanders.facts else []
        self._facts: Sequences = [(each.token_ids, each.target_ids) for each in encoded]
        ids: Sequence[Sequence[int]] = [loaded.tokenizer(text)["input_ids"] for text in bystanders.texts]
        self._texts: Sequences = [(each[:1], each[1:]) for each in ids if len(each) > 1]
        if bystanders.texts and not self._texts:
            raise BacklensError("--held-out: holds no text of two tokens or more")

    def measure(self) -> tuple[float | None, float | None]:
        """Accuracy on the facts (0 to 1), and perplexity per token of the texts; None if there are none."""
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


Kind = Literal["efficacy", "paraphrase", "neighbourhood"]
KINDS: tuple[Kind, ...] = ("efficacy", "paraphrase", "neighbourhood")


@dataclass(frozen=True, slots=True)
class Reading:
    """A target to score after a prompt: row of the batch, and token ids."""

    row: int
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A prompt of a case, and the targets that are compared there."""

    kind: Kind
    new: Reading | None
    true: Reading | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The evaluation prompts of one request as token ids: encoded once, run after every edit."""

    request: Request
    rows: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """(prompt, target) ids, without repeated rows."""
    questions: tuple[EvaluationPrompt, ...]


@dataclass(frozen=True, slots=True)
class TargetScores:
    """Scores of one target after a prompt."""

    nll: float
    """Mean −log p over the target's tokens, in nats."""
    correct: tuple[bool, ...]
    """True per token if it is the most probable one."""
    rank: int
    """Number of tokens that are more probable than the target's first one; 0 = predicted."""

    @property
    def probability(self) -> float:
        """Probability of the whole target."""
        return math.exp(-self.nll * len(self.correct))


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of one case, 0 to 1; None if the case has no prompts for it."""

    success: Mapping[Kind, float | None]
    """Success by kind; None for zsRE."""
    accuracy: Mapping[Kind, float | None]
    target: TargetScores
    """Scores of the new target after the prompt."""
    true: TargetScores | None
    """Scores of the true target after the prompt."""


def prepare(loaded: LoadedModel, request: Request) -> Evaluation:
    """Encode the evaluation prompts of a request. Raises BacklensError for a prompt without tokens."""
    prompts = list(_prompts(request))
    pairs = [(prompt, t) for _, prompt, *targets in prompts for t in targets if t is not None]
    encoded = iter(encode(loaded, pairs, request.where))
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    kept: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def reading(target: str | None) -> Reading | None:
        if target is None:
            return None
        example = next(encoded)
        key = (example.token_ids, example.target_ids[:-1])  # the input of the model
        if key not in rows:
            rows[key] = len(kept)
            kept.append((example.token_ids, example.target_ids))
        return Reading(rows[key], example.target_ids)

    questions = tuple(EvaluationPrompt(kind, reading(new), reading(true)) for kind, _, new, true in prompts)
    return Evaluation(request, tuple(kept), questions)


def _prompts(request: Request) -> Iterator[tuple[Kind, str, str | None, str | None]]:
    """Kind, prompt, new target and true target of every evaluation prompt."""
    new, true = request.target_new, request.target_true
    yield "efficacy", request.prompt, new, true
    for prompt in request.paraphrases:
        yield "paraphrase", prompt, new, true
    for prompt in request.neighbourhood:
        yield (
            "neighbourhood",
            prompt,
            new if request.metrics == "counterfact" else None,
            request.neighbourhood_target,
        )


@torch.no_grad()
def evaluate(
    loaded: LoadedModel, evaluations: Sequence[Evaluation], batch_tokens: int = BATCH_TOKENS
) -> list[Result]:
    """Run evaluations on the model with its present weights; one result per evaluation, in order."""
    wanted = [
        (number, reading)
        for number, each in enumerate(evaluations)
        for question in each.questions
        for reading in (question.new, question.true)
        if reading is not None
    ]
    first_row = [0]
    for each in evaluations:
        first_row.append(first_row[-1] + len(each.rows))
    by_row: dict[int, list[Reading]] = {}
    for number, reading in wanted:
        by_row.setdefault(first_row[number] + reading.row, []).append(reading)
    sequences = [row for each in evaluations for row in each.rows]
    answers: dict[tuple[int, tuple[int, ...]], TargetScores] = {}
    for indices, batch in batches(loaded, sequences, batch_tokens):
        logits = logits_of(loaded, batch)
        readings = [
            (place, index, reading) for place, index in enumerate(indices) for reading in by_row[index]
        ]
        for (_, index, reading), found in zip(
            readings, _answers(logits, readings, loaded.token_ids), strict=True
        ):
            answers[index, reading.target] = found

    def answer(number: int, reading: Reading | None) -> TargetScores | None:
        return None if reading is None else answers[first_row[number] + reading.row, reading.target]

    return [
        _result(each, [(q.kind, answer(n, q.new), answer(n, q.true)) for q in each.questions])
        for n, each in enumerate(evaluations)
    ]


def _answers(
    logits: torch.Tensor, readings: Sequence[tuple[int, int, Reading]], token_ids: Sequence[int]
) -> list[TargetScores]:
    """Scores of every reading, from the logits of its row. An id without a token is never the most probable one."""
    steps = max(len(reading.target) for _, _, reading in readings)
    rows = torch.tensor([place for place, _, _ in readings], device=logits.device)
    targets = torch.tensor(
        [[*r.target, *[r.target[-1]] * (steps - len(r.target))] for _, _, r in readings], device=logits.device
    )
    chosen = logits[rows, :steps]  # (reading, step, vocabulary)
    own = chosen.gather(-1, targets[..., None])
    nll = (chosen.logsumexp(-1) - own.squeeze(-1)).tolist()
    among = chosen[..., index_of(token_ids, chosen.shape[-1])]
    likeliest = torch.tensor(token_ids, device=logits.device)[among.argmax(-1)]
    correct = (likeliest == targets).tolist()
    ranks = (among[:, 0] > own[:, 0]).sum(-1).tolist()
    return [
        TargetScores(sum(n[: len(r.target)]) / len(r.target), tuple(c[: len(r.target)]), rank)
        for n, c, rank, (_, _, r) in zip(nll, correct, ranks, readings, strict=True)
    ]


def _result(
    evaluation: Evaluation, answers: Sequence[tuple[Kind, TargetScores | None, TargetScores | None]]
) -> Result:
    success: dict[Kind, float | None] = {}
    accuracy: dict[Kind, float | None] = {}
    for kind in KINDS:
        pairs = [(new, true) for of, new, true in answers if of == kind]
        compared = [(new.nll, true.nll) for new, true in pairs if new and true]
        won = [(true < new) if kind == "neighbourhood" else (new < true) for new, true in compared]
        success[kind] = _mean(won) if evaluation.request.metrics == "counterfact" else None
        wanted = [true if kind == "neighbourhood" else new for new, true in pairs]
        accuracy[kind] = _mean([_accuracy(each, evaluation.request.metrics) for each in wanted if each])
    _, target, true = answers[0]
    assert target is not None
    return Result(success, accuracy, target, true)


def _accuracy(answer: TargetScores, metrics: Metrics) -> float:
    if metrics == "counterfact":
        return float(all(answer.correct))
    return sum(answer.correct) / len(answer.correct)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over cases, 0 to 1."""

    cases: int
    success: Mapping[Kind, float | None]
    accuracy: Mapping[Kind, float | None]

    @property
    def score(self) -> float | None:
        """S: the harmonic mean of the three successes; None if one of them is None."""
        values = [each for each in self.success.values() if each is not None]
        if len(values) < len(KINDS):
            return None
        return len(values) / sum(1 / each for each in values) if all(values) else 0.0


def summary(results: Sequence[Result]) -> Summary:
    """Means over cases that have the figure."""

    def over(figures: Sequence[float | None]) -> float | None:
        return _mean([each for each in figures if each is not None])

    return Summary(
        len(results),
        {kind: over([each.success[kind] for each in results]) for kind in KINDS},
        {kind: over([each.accuracy[kind] for each in results]) for kind in KINDS},
    )
