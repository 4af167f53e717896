"""What an edit did: the metrics of CounterFact and zsRE, as their authors define and compute them.

CounterFact (arXiv 2202.05262, §3.3; `eval_utils_counterfact.py` and `summarize.py` of the authors' code), for a prompt
with a new and a true target, each scored by its mean −log p over its tokens (teacher-forced):

* success: of the prompt (efficacy) and of paraphrases, new is more probable than true; of the neighbourhood, true
  is more probable than new. A case's figure is the mean over its prompts.
* accuracy: every token of the wanted target (new; true in the neighbourhood) is the likeliest one.
* score S: the harmonic mean of the three successes' means over cases (`summary`).

zsRE (`eval_utils_zsre.py`) has accuracies only: the share of the target's tokens that are the likeliest ones,
teacher-forced; in the neighbourhood, of the answer to an unrelated question.

All prompts of a case, or of several, run as a few padded batches, and prompts whose targets are one token each are read
for both targets at once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.editing.forward import BATCH_TOKENS, batches, encode, logits_of
from pipeline.editing.request import Metrics, Request
from pipeline.models.load import LoadedModel
from pipeline.models.vocabulary import index_of

Kind = Literal["efficacy", "paraphrase", "neighbourhood"]
KINDS: tuple[Kind, ...] = ("efficacy", "paraphrase", "neighbourhood")


@dataclass(frozen=True, slots=True)
class Reading:
    """A target to be scored after a prompt: which row of the batch, and which tokens."""

    row: int
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt of a case, and the targets that are compared there."""

    kind: Kind
    new: Reading | None
    true: Reading | None


@dataclass(frozen=True, slots=True)
class Exam:
    """All that is asked about one request, as token ids: made once, asked after every edit."""

    request: Request
    rows: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """(prompt, target) ids, each different row once."""
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """How the model takes a target."""

    nll: float
    """Mean −log p over the target's tokens, in nats."""
    correct: tuple[bool, ...]
    """Of each token, whether it is the likeliest one."""
    rank: int
    """Tokens that are likelier than the target's first."""

    @property
    def probability(self) -> float:
        """Of the whole target."""
        return math.exp(-self.nll * len(self.correct))


@dataclass(frozen=True, slots=True)
class Result:
    """One case's figures, 0 to 1; None where there is nothing to tell it from."""

    success: Mapping[Kind, float | None]
    """Probability form; None for zsRE."""
    accuracy: Mapping[Kind, float | None]
    target: Answer
    """The new target after the prompt itself."""
    true: Answer | None
    """The true one."""


def exam(loaded: LoadedModel, request: Request) -> Exam:
    """Encode what is asked about a request."""
    asked = list(_asked(request))
    pairs = [(prompt, t) for _, prompt, *targets in asked for t in targets if t is not None]
    encoded = iter(encode(loaded, pairs, request.where))
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    kept: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def reading(target: str | None) -> Reading | None:
        if target is None:
            return None
        example = next(encoded)
        key = (example.token_ids, example.target_ids[:-1])  # what the model is fed
        if key not in rows:
            rows[key] = len(kept)
            kept.append((example.token_ids, example.target_ids))
        return Reading(rows[key], example.target_ids)

    questions = tuple(Question(kind, reading(new), reading(true)) for kind, _, new, true in asked)
    return Exam(request, tuple(kept), questions)


def _asked(request: Request) -> Iterator[tuple[Kind, str, str | None, str | None]]:
    """Kind, prompt, new and true target."""
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
def ask(loaded: LoadedModel, exams: Sequence[Exam], batch_tokens: int = BATCH_TOKENS) -> list[Result]:
    """Put the questions to the model as it is now."""
    wanted = [
        (number, reading)
        for number, each in enumerate(exams)
        for question in each.questions
        for reading in (question.new, question.true)
        if reading is not None
    ]
    first_row = [0]
    for each in exams:
        first_row.append(first_row[-1] + len(each.rows))
    by_row: dict[int, list[Reading]] = {}
    for number, reading in wanted:
        by_row.setdefault(first_row[number] + reading.row, []).append(reading)
    sequences = [row for each in exams for row in each.rows]
    answers: dict[tuple[int, tuple[int, ...]], Answer] = {}
    for indices, batch in batches(loaded, sequences, batch_tokens):
        logits = logits_of(loaded, batch)
        readings = [
            (place, index, reading) for place, index in enumerate(indices) for reading in by_row[index]
        ]
        for (_, index, reading), found in zip(
            readings, _answers(logits, readings, loaded.token_ids), strict=True
        ):
            answers[index, reading.target] = found

    def answer(number: int, reading: Reading | None) -> Answer | None:
        return None if reading is None else answers[first_row[number] + reading.row, reading.target]

    return [
        _result(each, [(q.kind, answer(n, q.new), answer(n, q.true)) for q in each.questions])
        for n, each in enumerate(exams)
    ]


def _answers(
    logits: torch.Tensor, readings: Sequence[tuple[int, int, Reading]], token_ids: Sequence[int]
) -> list[Answer]:
    """Every reading's answer, from the logits of their rows. An id that is no token is never the likeliest."""
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
        Answer(sum(n[: len(r.target)]) / len(r.target), tuple(c[: len(r.target)]), rank)
        for n, c, rank, (_, _, r) in zip(nll, correct, ranks, readings, strict=True)
    ]


def _result(exam: Exam, answers: Sequence[tuple[Kind, Answer | None, Answer | None]]) -> Result:
    success: dict[Kind, float | None] = {}
    accuracy: dict[Kind, float | None] = {}
    for kind in KINDS:
        pairs = [(new, true) for of, new, true in answers if of == kind]
        compared = [(new.nll, true.nll) for new, true in pairs if new and true]
        won = [(true < new) if kind == "neighbourhood" else (new < true) for new, true in compared]
        success[kind] = _mean(won) if exam.request.metrics == "counterfact" else None
        wanted = [true if kind == "neighbourhood" else new for new, true in pairs]
        accuracy[kind] = _mean([_accuracy(each, exam.request.metrics) for each in wanted if each])
    _, target, true = answers[0]
    assert target is not None
    return Result(success, accuracy, target, true)


def _accuracy(answer: Answer, metrics: Metrics) -> float:
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
        """S: the harmonic mean of the three successes; None where one is not known."""
        values = [each for each in self.success.values() if each is not None]
        if len(values) < len(KINDS):
            return None
        return len(values) / sum(1 / each for each in values) if all(values) else 0.0


def summary(results: Sequence[Result]) -> Summary:
    def over(figures: Sequence[float | None]) -> float | None:
        return _mean([each for each in figures if each is not None])

    return Summary(
        len(results),
        {kind: over([each.success[kind] for each in results]) for kind in KINDS},
        {kind: over([each.accuracy[kind] for each in results]) for kind in KINDS},
    )
