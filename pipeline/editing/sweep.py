"""Sweeps: methods × layers × learning rates × cases, in shards that are committed and resumed as a run's are.

The grid is laid out once: trials in order, the cases of each in groups that are edited into the model together, and
groups in shards of about SHARD_CASES cases. A shard's rows do not depend on any other's, so a sweep that was stopped
goes on with the shards that have no commit (`pipeline.store.commit` says what a crash leaves).
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import product

import pyarrow as pa
import torch

from pipeline.config import PromptFields
from pipeline.editing.covariance import read_texts
from pipeline.editing.evaluate import Exam, Result, ask, exam
from pipeline.editing.forward import batches, encode, logits_of
from pipeline.editing.method import Method
from pipeline.editing.options import EditOptions, MethodName
from pipeline.editing.request import Request
from pipeline.editing.text import generate, ngram_entropy, reference_score
from pipeline.editing.tools import Tools, make_method, make_tools
from pipeline.editing.weights import edited, weights_digest
from pipeline.engine.versions import package_versions
from pipeline.errors import BacklensError
from pipeline.models.load import LoadedModel
from pipeline.prompts.read import read_prompts
from pipeline.prompts.record import Rejected
from pipeline.store.commit import SWEEP_TABLES, ShardCommit, commit_shard
from pipeline.store.files import Directory
from schemas.tables import EDITS

SHARD_CASES = 50


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of the grid."""

    index: int
    method: MethodName
    layer: int
    lr: float | None
    at_once: int


@dataclass(frozen=True, slots=True)
class Work:
    """One shard: a trial, and groups of cases (half-open ranges of the input)."""

    shard: int
    trial: Trial
    groups: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """What a sweep goes through."""

    methods: tuple[MethodName, ...]
    layers: tuple[int, ...]
    rates: tuple[float | None, ...]
    at_once: tuple[int, ...]

    def trials(self) -> list[Trial]:
        points = product(self.methods, self.layers, self.rates, self.at_once)
        return [Trial(index, *point) for index, point in enumerate(points)]

    def shards(self, cases: int) -> list[Work]:
        """Every trial's cases in groups of `at_once`; a last group may be smaller only if it is the first."""
        work: list[Work] = []
        for trial in self.trials():
            size = trial.at_once
            if size > cases:
                raise BacklensError(f"--at-once {size}: there are {cases} cases")
            groups = [(start, start + size) for start in range(0, cases - size + 1, size)]
            step = max(1, SHARD_CASES // size)
            for first in range(0, len(groups), step):
                work.append(Work(len(work), trial, tuple(groups[first : first + step])))
        return work


@dataclass(frozen=True, slots=True)
class Side:
    """What else is measured of an edited model."""

    untouched: str | None = None
    held_out: str | None = None
    generate: bool = False


class Sweeper:
    """Holds the model and turns shards of the grid into committed files."""

    def __init__(
        self, loaded: LoadedModel, requests: Sequence[Request], options: EditOptions, grid: Grid, side: Side
    ) -> None:
        self._loaded, self._requests, self._options, self._side = loaded, requests, options, side
        self._tools: Tools = make_tools(options, loaded, grid.methods, grid.layers)
        self._exams: dict[int, tuple[Exam, Result]] = {}
        self._digest = weights_digest(loaded)
        self._untouched = Untouched(loaded, side.untouched, side.held_out)

    def run(self, work: Work, directory: Directory) -> ShardCommit:
        """Compute and commit one shard. Raises BacklensError if the weights are not what they were."""
        trial = work.trial
        method = make_method(self._options, self._tools, trial.method, trial.layer, trial.lr)
        rows = [row for group in work.groups for row in self._group(trial, method, *group)]
        if weights_digest(self._loaded) != self._digest:
            raise BacklensError(
                "edit: the weights were not restored to what they were; nothing of this shard is kept"
            )
        return commit_shard(
            directory,
            work.shard,
            {"edits": pa.Table.from_pylist(rows, schema=EDITS.schema)},
            first_prompt=work.groups[0][0],
            prompts=len(rows),
            versions=package_versions(),
            always=SWEEP_TABLES,
        )

    def _group(self, trial: Trial, method: Method, first: int, stop: int) -> Iterator[dict[str, object]]:
        requests = self._requests[first:stop]
        exams = [self._exam(request) for request in requests]
        started = time.perf_counter()
        deltas = method(self._loaded, *requests)
        made = time.perf_counter()
        with edited(self._loaded, deltas):
            results = ask(self._loaded, [each for each, _ in exams])
            asked = time.perf_counter()
            beyond = self._untouched.measure() if trial.at_once > 1 else (None, None)
            texts = [self._texts(request) for request in requests]
        norm = math.sqrt(sum(delta.norm() ** 2 for delta in deltas))
        for request, (_, before), result, (entropy, reference) in zip(
            requests, exams, results, texts, strict=True
        ):
            yield {
                "trial": trial.index,
                "prompt_id": request.prompt_id,
                "method": trial.method,
                "layer": trial.layer,
                "lr": trial.lr,
                "at_once": trial.at_once,
                **dict(result.success),
                **{f"{kind}_accuracy": value for kind, value in result.accuracy.items()},
                "target_prob": result.target.probability,
                "target_rank": result.target.rank,
                "target_prob_before": before.target.probability,
                "target_rank_before": before.target.rank,
                "delta_norm": norm,
                "entropy": entropy,
                "reference": reference,
                "untouched": beyond[0],
                "perplexity": beyond[1],
                "seconds_edit": (made - started) / len(requests),
                "seconds_evaluate": (asked - made) / len(requests),
            }

    def _exam(self, request: Request) -> tuple[Exam, Result]:
        """The case's questions, and what the unedited model says to them: found once."""
        if request.prompt_id not in self._exams:
            made = exam(self._loaded, request)
            self._exams[request.prompt_id] = made, ask(self._loaded, [made])[0]
        return self._exams[request.prompt_id]

    def _texts(self, request: Request) -> tuple[float | None, float | None]:
        if not (self._side.generate and request.generation):
            return None, None
        texts = generate(self._loaded, request.generation, seed=request.prompt_id)
        reference = reference_score(texts, request.references) if request.references else None
        return ngram_entropy(texts), reference


@dataclass(frozen=True, eq=False)
class Untouched:
    """What edits should leave alone: facts (prompts and targets) and texts."""

    loaded: LoadedModel
    facts: str | None
    texts: str | None

    def measure(self) -> tuple[float | None, float | None]:
        """Accuracy on the facts, and perplexity of the texts, per token."""
        return (self._accuracy() if self.facts else None), (self._perplexity() if self.texts else None)

    @torch.no_grad()
    def _accuracy(self) -> float:
        right = 0
        for _, batch in batches(self.loaded, self._facts):
            hit = logits_of(self.loaded, batch).argmax(-1) == batch.targets
            right += int((hit | ~batch.target_mask).all(-1).sum())
        return right / len(self._facts)

    @torch.no_grad()
    def _perplexity(self) -> float:
        total, tokens = 0.0, 0
        for _, batch in batches(self.loaded, self._texts):
            scores = logits_of(self.loaded, batch).log_softmax(-1)
            nll = -scores.gather(-1, batch.targets[..., None]).squeeze(-1)
            total += float(nll[batch.target_mask].double().sum())
            tokens += int(batch.target_mask.sum())
        return math.exp(min(total / tokens, 700.0))

    @cached_property
    def _facts(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        assert self.facts is not None
        pairs: list[tuple[str, str]] = []
        for record in read_prompts(self.facts, "auto", PromptFields(), None):
            if isinstance(record, Rejected):
                raise BacklensError(record.message)
            pairs.append((record.prompt, record.target))
        return [(e.token_ids, e.target_ids) for e in encode(self.loaded, pairs, self.facts)]

    @cached_property
    def _texts(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        assert self.texts is not None
        encoded = [self.loaded.tokenizer(text)["input_ids"] for text in read_texts(self.texts)]
        split = [(ids[:1], ids[1:]) for ids in encoded if len(ids) > 1]
        if not split:
            raise BacklensError(f"--held-out {self.texts}: holds no text of two tokens or more")
        return split


def content_digest(requests: Sequence[Request]) -> str:
    """Of what the requests say, not of the file."""
    said = [[v for k, v in asdict(r).items() if k != "where"] for r in requests]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def option_values(options: EditOptions) -> dict[str, str | int | float | bool | None]:
    """The options that change results, by flag."""
    own = ("model", "revision", "edits", "format", "limit", "statistics", "text", "trust_remote_code")
    return {f.name.replace("_", "-"): getattr(options, f.name) for f in fields(options) if f.name not in own}
