"""All checks of one model, with one copy of it in memory at a time.

The copy that a run would load comes first. Exactness is checked in float32: if the weights are in half precision and
there is room, a copy in float32 is loaded for that. A copy leaves its results behind, and later copies are compared
with them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from backlens.backward_lens import BackwardLens
from backlens.capture.packing import free_memory, release_all
from backlens.config import RunConfig
from backlens.demo import MODEL
from backlens.doctor.checks import (
    ATTENTION,
    LEFT,
    MEMORY,
    RIGHT,
    ROWS,
    SCORES,
    TIME,
    TOKENS,
    Check,
    at_most,
    attempted,
    attention_check,
    check_blocks,
    cost_checks,
    half_checks,
    info,
    padding_checks,
    row_check,
    skipped,
)
from backlens.doctor.gradients import BIASES, WEIGHTS, gradient_checks
from backlens.doctor.gradients import REMEDY as WRONG_TABLES
from backlens.doctor.model_copy import (
    Factors,
    ModelCopy,
    Rows,
    alone,
    read_texts,
    rows_together,
    tokenized,
    with_unlikely_targets,
)
from backlens.engine.plan import model_source
from backlens.errors import BacklensError
from backlens.models.checkpoint import ModelSource, refuse_pickle
from backlens.models.load import LoadedModel, empty_model, load_config, load_model
from backlens.models.recognition import ProposedLayout, SeenBlock
from backlens.projection.lens import Lens, lens_error, lens_tolerance, make_lens
from backlens.prompts.prompt import Prompt
from backlens.prompts.tokenize import Example

LENS = "lens"
WRONG_SCORES = (
    "scores would not be this model's: something between its last block and its logits is unknown to us"
)


def lens_check(loaded: LoadedModel, lens: Lens) -> Iterator[Check]:
    """Compare the lens of the last hidden state with the model's logits."""
    error, limit = lens_error(loaded.model, loaded.parts, lens), lens_tolerance(loaded.model)
    detail = "the lens of the last hidden state against the model's logits, largest difference, relative"
    yield at_most(LENS, error, limit, detail, WRONG_SCORES)


BOS, SPELLED_OUT, VOCABULARY = "beginning of sequence", "beginning written out", "vocabulary"


def vocabulary_check(loaded: LoadedModel, config: RunConfig) -> Check:
    """Count rows of the unembedding that are no tokens, and tokens that have no embedding."""
    rows = loaded.parts.vocabulary
    padding = rows - len(loaded.token_ids)
    kept = "in lists and ranks" if config.vocabulary == "model" else "left out of lists and ranks"
    detail = f"of the unembedding's {rows:,} rows are no tokens, {kept} (--vocabulary {config.vocabulary})"
    beyond = [index for index in loaded.tokenizer.get_vocab().values() if index >= loaded.parts.rows]
    if not beyond:
        return info(VOCABULARY, padding, detail)
    some = ", ".join(repr(loaded.tokenizer.convert_ids_to_tokens(index)) for index in sorted(beyond)[:3])
    detail += (
        f"; {len(beyond):,} of the tokenizer's tokens have no embedding ({some}…): prompts with them fail"
    )
    return info(
        VOCABULARY, padding, detail, "leave such tokens out, or resize the model's embeddings and train them"
    )


def token_checks(loaded: LoadedModel, examples: Sequence[Example], config: RunConfig) -> Iterator[Check]:
    """Count the beginning-of-sequence tokens at the front of prompts, also if a prompt spells one out."""
    bos, spelled = loaded.tokenizer.bos_token_id, loaded.tokenizer.bos_token
    if not isinstance(bos, int) or not isinstance(spelled, str):
        yield info(BOS, None, "the tokenizer has no such token")
        return
    most = max(_leading(example, bos) for example in examples)
    detail = f"most {spelled} tokens at the front of a prompt (--prepend-bos {config.prepend_bos})"
    if most > 1:
        yield Check(BOS, "FAIL", detail, most, 1, _take_one_away(config))
    elif most == 0 and loaded.model.config.get_text_config().bos_token_id is not None:
        yield info(BOS, 0, detail, "if the model was trained with it in front: --prepend-bos true")
    else:
        yield Check(BOS, "pass", detail, most, 1)
    if config.chat_template:
        return
    (spelling,) = tokenized([Prompt(0, f"{spelled}A", " b", "built-in prompt")], loaded, config)
    count = _leading(spelling, bos)
    detail = f"{spelled} tokens at the front of a prompt that begins with {spelled} itself"
    if count > 1:
        yield info(SPELLED_OUT, count, detail, "do not write it into prompts, or use --prepend-bos true")
    else:
        yield Check(SPELLED_OUT, "pass", detail, count, 1)


def _leading(example: Example, bos: int) -> int:
    ids = example.token_ids
    return next((place for place, token in enumerate(ids) if token != bos), len(ids))


def _take_one_away(config: RunConfig) -> str:
    return "use --prepend-bos true for exactly one" if config.prepend_bos != "true" else "mend the tokenizer"


ROOM = 1.2
"""Free memory that a copy needs, per byte of its weights."""
NO_ROWS = "no rows could be made; see what failed"

TABLE = (
    *(WEIGHTS, BIASES, LENS, RIGHT, LEFT, ROWS, ATTENTION),
    *(SCORES, TOKENS, VOCABULARY, BOS, SPELLED_OUT, MEMORY, TIME),
)
"""Order of the checks after those of the blocks: each name, or how it begins."""

Note = Callable[[str], None]
"""Receives a few words about what is being done."""


@dataclass(frozen=True)
class Diagnosis:
    """Every check of a model, in the order of the table."""

    model: str
    family: str
    device: str
    checks: tuple[Check, ...]
    blocks: tuple[SeenBlock, ...]
    proposed: ProposedLayout | None
    """A description to edit if the blocks were not recognized; then nothing else was checked."""
    unproven_cuts: Mapping[str, str]
    """Parts of fused matrices that a description gives and no check proves, by module."""

    @property
    def healthy(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return plain values; a number that is not finite is null."""
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
            "like": list(self.proposed.like) if self.proposed else [],
            "draft": self.proposed.text if self.proposed else None,
            "unproven_cuts": dict(self.unproven_cuts),
        }


def examine(config: RunConfig, note: Note) -> Diagnosis:
    """Check the model that `config` names, with its first few prompts or the built-in ones.

    Raises BacklensError if the model cannot be loaded or no prompt can be used.
    """
    config = config if config.model is not None else replace(config, model=str(MODEL))
    source = model_source(config)
    model_config = load_config(source)
    refuse_pickle(source)
    texts = read_texts(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    skeleton = empty_model(source, model_config)
    blocks = check_blocks(skeleton, source.layout)
    checks = blocks.checks
    if blocks.recognized:
        copies = _LoadedCopies(config, source, texts, device, sum(p.numel() for p in skeleton.parameters()))
        del skeleton
        checks += copies.checks(note)
    family = str(model_config.model_type)
    return Diagnosis(source.path, family, str(device), checks, blocks.seen, blocks.proposed, blocks.unproven)


@dataclass(frozen=True)
class _Reference:
    """Results of the first copy, which later copies are compared with."""

    dtype: torch.dtype
    kernel: str
    examples: tuple[Example, ...]
    probes: tuple[Example, ...]
    factors: Sequence[Factors]
    rows: Rows | None


@dataclass(frozen=True)
class _LoadedCopies:
    """A model whose blocks were recognized; its copies are loaded one after the other."""

    config: RunConfig
    source: ModelSource
    texts: Sequence[Prompt]
    device: torch.device
    weights: int
    """Number of weights."""

    def checks(self, note: Note) -> tuple[Check, ...]:
        found, reference = self._as_it_runs(note)
        release_all()
        found += attempted(ATTENTION, "", lambda: self._attention(reference, note))
        release_all()
        if reference.dtype == torch.float32:
            found += attempted(SCORES, "", lambda: self._in_bfloat16(reference, note))
        else:
            found += attempted(WEIGHTS, "", lambda: self._in_float32(reference, note))
        return tuple(sorted(found, key=_place_in_table))

    def _as_it_runs(self, note: Note) -> tuple[tuple[Check, ...], _Reference]:
        """Check the copy that a run would load."""
        loaded = load_model(self.source, self.device)
        lens, found = self._lens_of(loaded)
        examples = tokenized(self.texts, loaded, self.config)
        copy = ModelCopy(loaded, lens, examples, with_unlikely_targets(examples, loaded))
        found += attempted(BOS, "", lambda: token_checks(loaded, examples, self.config))
        found += (vocabulary_check(loaded, self.config),)
        if not copy.half:
            note("comparing gradients with autograd's")
            found += attempted(WEIGHTS, WRONG_TABLES, lambda: gradient_checks(copy))
        note("computing prompts alone and in batches")
        batches, factors, rows = _batches(copy)
        found += batches
        if rows is None:
            found += skipped(MEMORY, NO_ROWS), skipped(TIME, NO_ROWS)
        else:
            note("measuring memory and time")
            found += tuple(cost_checks(copy, self.texts, self.config))
        kernel = str(loaded.model.config._attn_implementation)
        return found, _Reference(loaded.model.dtype, kernel, examples, copy.probes, factors, rows)

    def _attention(self, reference: _Reference, note: Note) -> Iterator[Check]:
        other = "exact" if self.source.attention == "fast" else "fast"
        reason = self._no_room(reference.dtype) if reference.factors else NO_ROWS
        if reason:
            yield skipped(ATTENTION, reason)
            return
        note(f"loading the model again, with {other} attention")
        copy = self._copy(replace(self.source, attention=other), reference)
        kernel = str(copy.loaded.model.config._attn_implementation)
        if kernel == reference.kernel:
            yield skipped(ATTENTION, f"this architecture has one kernel only ({kernel})")
        elif other == "fast":
            yield from attention_check(alone(copy), reference.factors, kernel, copy.half)
        else:
            yield from attention_check(reference.factors, alone(copy), reference.kernel, copy.half)

    def _in_float32(self, reference: _Reference, note: Note) -> Iterator[Check]:
        """Check gradients, and what half precision changes, if a run's weights are in half precision."""
        no_room = self._no_room(torch.float32)
        note(f"loading the model again{'' if no_room else ', in float32'}")
        copy = self._copy(self.source if no_room else replace(self.source, dtype="float32"), reference)
        yield from gradient_checks(copy, f" ({no_room})" if no_room else "")
        if no_room or reference.rows is None or copy.lens is None:
            yield from (skipped(name, no_room or NO_ROWS) for name in (SCORES, TOKENS))
        else:
            yield from half_checks(reference.rows, rows_together(copy), _name(reference.dtype))

    def _in_bfloat16(self, reference: _Reference, note: Note) -> Iterator[Check]:
        no_room = self._no_room(torch.bfloat16)
        if no_room or reference.rows is None:
            yield from (skipped(name, no_room or NO_ROWS) for name in (SCORES, TOKENS))
            return
        note("loading the model again, in bfloat16")
        copy = self._copy(replace(self.source, dtype="bfloat16"), reference)
        yield from half_checks(rows_together(copy), reference.rows, "bfloat16")

    def _copy(self, source: ModelSource, reference: _Reference) -> ModelCopy:
        """Load another copy for the same tokens."""
        loaded = load_model(source, self.device)
        return ModelCopy(loaded, self._lens_of(loaded)[0], reference.examples, reference.probes)

    def _lens_of(self, loaded: LoadedModel) -> tuple[BackwardLens | None, tuple[Check, ...]]:
        tokens = loaded.token_ids if self.config.vocabulary == "tokenizer" else None
        try:
            lens = make_lens(loaded.parts, "raw", tokens)
        except BacklensError as error:
            return None, (Check(LENS, "FAIL", str(error), remedy=WRONG_SCORES),)
        checks = attempted(LENS, WRONG_SCORES, lambda: lens_check(loaded, lens))
        return BackwardLens.from_parts(loaded, lens), checks

    def _no_room(self, dtype: torch.dtype) -> str:
        """Reason why a copy of the weights in this type is not loaded; empty if there is room for it."""
        need, free = ROOM * self.weights * dtype.itemsize, free_memory(self.device)
        if need <= free:
            return ""
        return f"a copy in {_name(dtype)} needs {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _place_in_table(check: Check) -> int:
    return next(place for place, name in enumerate(TABLE) if check.name.startswith(name))


def _batches(copy: ModelCopy) -> tuple[tuple[Check, ...], Sequence[Factors], Rows | None]:
    """Return the checks of batches, the factors of every prompt alone, and the rows of all in one batch."""
    try:
        factors = alone(copy)
        rows = None if copy.lens is None else rows_together(copy)
    except BacklensError as error:
        return (Check(RIGHT, "FAIL", str(error), remedy=WRONG_TABLES),), (), None
    projected = (skipped(ROWS, NO_ROWS),) if rows is None else tuple(row_check(copy, rows))
    return (*padding_checks(copy, factors), *projected), factors, rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
