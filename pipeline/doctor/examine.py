"""All checks of one model, with one copy of it in memory at a time.

The copy that a run would load comes first. Exactness is checked in float32: where its weights are in half precision,
a copy in float32 is loaded for that, if there is room for it. Copies that are compared leave their answers behind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.config import RunConfig
from pipeline.demo import MODEL
from pipeline.doctor.blocks import look_at_blocks
from pipeline.doctor.check import Check, attempted, skipped
from pipeline.doctor.cost import MEMORY, TIME, cost_checks
from pipeline.doctor.gradients import BIASES, WEIGHTS, gradient_checks
from pipeline.doctor.gradients import REMEDY as WRONG_TABLES
from pipeline.doctor.invariance import LEFT, RIGHT, ROWS, padding_checks, row_check
from pipeline.doctor.logits import LENS, lens_check
from pipeline.doctor.logits import REMEDY as WRONG_SCORES
from pipeline.doctor.precision import ATTENTION, SCORES, TOKENS, attention_check, half_checks
from pipeline.doctor.room import free_memory, give_back_memory
from pipeline.doctor.rows import Rows, rows_together
from pipeline.doctor.tokens import BOS, VOCABULARY, WRITTEN, token_checks, vocabulary_check
from pipeline.doctor.trial import Factors, Trial, alone, read_texts, tokenized, with_unlikely_targets
from pipeline.engine.plan import model_source
from pipeline.errors import BacklensError
from pipeline.lens import Lens, make_lens
from pipeline.models.checkpoint import ModelSource, refuse_pickle
from pipeline.models.draft import Draft, SeenBlock
from pipeline.models.load import LoadedModel, empty_model, load_config, load_model
from pipeline.prompts.record import Prompt
from pipeline.prompts.tokenize import Example

ROOM = 1.2
"""Of a copy's weights, the memory that has to be free for it."""
NO_ROWS = "no rows could be made; see what failed"

TABLE = (
    *(WEIGHTS, BIASES, LENS, RIGHT, LEFT, ROWS, ATTENTION),
    *(SCORES, TOKENS, VOCABULARY, BOS, WRITTEN, MEMORY, TIME),
)
"""The order of the checks, behind those of the structure; each name, or what it begins with."""

Note = Callable[[str], None]
"""Told what is being done, in a few words."""


@dataclass(frozen=True)
class Diagnosis:
    """Every check of a model, in the order of the table."""

    model: str
    family: str
    device: str
    checks: tuple[Check, ...]
    blocks: tuple[SeenBlock, ...]
    draft: Draft | None
    """A description of the blocks to edit, where they are not understood; then nothing else was checked."""
    unproven_cuts: Mapping[str, str]
    """By module, the parts of fused matrices that a description gives and no check proves."""

    @property
    def healthy(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is null."""
        return {
            "model": self.model,
            "family": self.family,
            "device": self.device,
            "healthy": self.healthy,
            "checks": [check.as_json() for check in self.checks],
            "blocks": [
                {
                    "layers": list(block.layers),
                    "matrices": [{"path": each.path, "shape": each.shape} for each in block.matrices],
                }
                for block in self.blocks
            ],
            "like": list(self.draft.like) if self.draft else [],
            "draft": self.draft.text if self.draft else None,
            "unproven_cuts": dict(self.unproven_cuts),
        }


def examine(config: RunConfig, note: Note) -> Diagnosis:
    """Check the model that `config` names; the prompts are its first few, or ours.

    Raises BacklensError when the model cannot be loaded, or no prompt used.
    """
    config = config if config.model is not None else replace(config, model=str(MODEL))
    source = model_source(config)
    model_config = load_config(source)
    refuse_pickle(source)
    texts = read_texts(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    skeleton = empty_model(source, model_config)
    structure = look_at_blocks(skeleton, source.layout)
    checks = structure.checks
    if structure.understood:
        patient = _Patient(config, source, texts, device, sum(p.numel() for p in skeleton.parameters()))
        del skeleton
        checks += patient.checks(note)
    family = str(model_config.model_type)
    return Diagnosis(
        source.path, family, str(device), checks, structure.seen, structure.draft, structure.unproven
    )


@dataclass(frozen=True)
class _Answers:
    """What a copy leaves behind to compare others with."""

    dtype: torch.dtype
    kernel: str
    examples: tuple[Example, ...]
    probes: tuple[Example, ...]
    factors: Sequence[Factors]
    rows: Rows | None


@dataclass(frozen=True)
class _Patient:
    """A model whose blocks are understood, and what it is tried with."""

    config: RunConfig
    source: ModelSource
    texts: Sequence[Prompt]
    device: torch.device
    weights: int
    """How many there are."""

    def checks(self, note: Note) -> tuple[Check, ...]:
        found, answers = self._as_it_runs(note)
        give_back_memory()
        found += attempted(ATTENTION, "", lambda: self._attention(answers, note))
        give_back_memory()
        if answers.dtype == torch.float32:
            found += attempted(SCORES, "", lambda: self._in_bfloat16(answers, note))
        else:
            found += attempted(WEIGHTS, "", lambda: self._in_float32(answers, note))
        return tuple(sorted(found, key=_place_in_table))

    def _as_it_runs(self, note: Note) -> tuple[tuple[Check, ...], _Answers]:
        """The copy that a run would load, with everything that only it can say."""
        loaded = load_model(self.source, self.device)
        lens, found = self._lens_of(loaded)
        examples = tokenized(self.texts, loaded, self.config)
        trial = Trial(loaded, lens, examples, with_unlikely_targets(examples, loaded))
        found += attempted(BOS, "", lambda: token_checks(loaded, examples, self.config))
        found += (vocabulary_check(loaded, self.config),)
        if not trial.half:
            note("comparing gradients with autograd's")
            found += attempted(WEIGHTS, WRONG_TABLES, lambda: gradient_checks(trial))
        note("trying prompts alone and in batches")
        batches, factors, rows = _batches(trial)
        found += batches
        if rows is None:
            found += skipped(MEMORY, NO_ROWS), skipped(TIME, NO_ROWS)
        else:
            note("measuring memory and time")
            found += tuple(cost_checks(trial, self.texts, self.config))
        kernel = str(loaded.model.config._attn_implementation)
        return found, _Answers(loaded.model.dtype, kernel, examples, trial.probes, factors, rows)

    def _attention(self, answers: _Answers, note: Note) -> Iterator[Check]:
        other = "exact" if self.source.attention == "fast" else "fast"
        reason = self._no_room(answers.dtype) if answers.factors else NO_ROWS
        if reason:
            yield skipped(ATTENTION, reason)
            return
        note(f"loading the model again, with {other} attention")
        trial = self._copy(replace(self.source, attention=other), answers)
        kernel = str(trial.loaded.model.config._attn_implementation)
        if kernel == answers.kernel:
            yield skipped(ATTENTION, f"this architecture has one kernel only ({kernel})")
        elif other == "fast":
            yield from attention_check(alone(trial), answers.factors, kernel, trial.half)
        else:
            yield from attention_check(answers.factors, alone(trial), answers.kernel, trial.half)

    def _in_float32(self, answers: _Answers, note: Note) -> Iterator[Check]:
        """Gradients, and what half precision changes, where the run's own weights are in half precision."""
        no_room = self._no_room(torch.float32)
        note(f"loading the model again{'' if no_room else ', in float32'}")
        trial = self._copy(self.source if no_room else replace(self.source, dtype="float32"), answers)
        yield from gradient_checks(trial, f" ({no_room})" if no_room else "")
        if no_room or answers.rows is None or trial.lens is None:
            yield from (skipped(name, no_room or NO_ROWS) for name in (SCORES, TOKENS))
        else:
            yield from half_checks(answers.rows, rows_together(trial), _name(answers.dtype))

    def _in_bfloat16(self, answers: _Answers, note: Note) -> Iterator[Check]:
        no_room = self._no_room(torch.bfloat16)
        if no_room or answers.rows is None:
            yield from (skipped(name, no_room or NO_ROWS) for name in (SCORES, TOKENS))
            return
        note("loading the model again, in bfloat16")
        trial = self._copy(replace(self.source, dtype="bfloat16"), answers)
        yield from half_checks(rows_together(trial), answers.rows, "bfloat16")

    def _copy(self, source: ModelSource, answers: _Answers) -> Trial:
        """Another copy, tried on the same tokens."""
        loaded = load_model(source, self.device)
        return Trial(loaded, self._lens_of(loaded)[0], answers.examples, answers.probes)

    def _lens_of(self, loaded: LoadedModel) -> tuple[Lens | None, tuple[Check, ...]]:
        tokens = loaded.token_ids if self.config.vocabulary == "tokenizer" else None
        try:
            lens = make_lens(loaded.anatomy, "raw", tokens)
        except BacklensError as error:
            return None, (Check(LENS, "FAIL", str(error), remedy=WRONG_SCORES),)
        return lens, attempted(LENS, WRONG_SCORES, lambda: lens_check(loaded, lens))

    def _no_room(self, dtype: torch.dtype) -> str:
        """Why a copy of the weights in this type is not loaded; empty if it can be."""
        need, free = ROOM * self.weights * dtype.itemsize, free_memory(self.device)
        if need <= free:
            return ""
        return f"a copy in {_name(dtype)} needs {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _place_in_table(check: Check) -> int:
    return next(place for place, name in enumerate(TABLE) if check.name.startswith(name))


def _batches(trial: Trial) -> tuple[tuple[Check, ...], Sequence[Factors], Rows | None]:
    """The checks of batches, every prompt's factors by itself, and the rows of all; none where none can be had."""
    try:
        factors = alone(trial)
        rows = None if trial.lens is None else rows_together(trial)
    except BacklensError as error:
        return (Check(RIGHT, "FAIL", str(error), remedy=WRONG_TABLES),), (), None
    projected = (skipped(ROWS, NO_ROWS),) if rows is None else tuple(row_check(trial, rows))
    return (*padding_checks(trial, factors), *projected), factors, rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
