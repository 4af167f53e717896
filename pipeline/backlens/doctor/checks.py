"""What one check found.

Is every matrix of the model's blocks known, and does what is said of them fit their widths?

The same prompts in one batch and each by itself, padded on the right and on the left.

What the faster kernels and the smaller weights change: numbers to know, unless they cannot be rounding.

Memory and time that prompts take on this machine, as `backlens run` computes them by default.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from backlens.backward_lens import BackwardLens
from backlens.capture.batch import Side
from backlens.capture.packing import release_freed_memory
from backlens.config import RunConfig
from backlens.doctor.model_copy import Factors, ModelCopy, Rows, apart, drift, rows_alone, together, tokenized
from backlens.errors import BacklensError
from backlens.models.blocks import Block, describe_blocks, layout_of, misfits, modules_of, unproven_cuts
from backlens.models.layout import Layout
from backlens.models.recognition import ProposedLayout, SeenBlock, propose_layout, see_blocks
from backlens.prompts.prompt import Prompt
from backlens.prompts.tokenize import Example
from backlens.rows import RowOptions

Status = Literal["pass", "FAIL", "info", "skip"]
"""`info`: a number to know, which no promise depends on. `skip`: not looked at, and why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's table."""

    name: str
    status: Status
    detail: str
    """What was measured, and where it was worst; or why it was not."""
    measured: float | None = None
    limit: float | None = None
    """The largest value that passes."""
    remedy: str = ""
    """What to do about it; of no use where it passed."""

    @property
    def passed(self) -> bool | None:
        """None where nothing was to be passed."""
        return {"pass": True, "FAIL": False}.get(self.status)

    def as_json(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is null."""
        finite = self.measured is not None and math.isfinite(self.measured)
        return asdict(self) | {"passed": self.passed, "measured": self.measured if finite else None}


def at_most(name: str, measured: float, limit: float, detail: str, remedy: str) -> Check:
    """Passes up to `limit`; not for NaN."""
    return Check(name, "pass" if measured <= limit else "FAIL", detail, measured, limit, remedy)


def told(name: str, measured: float | None, detail: str, remedy: str = "") -> Check:
    """A number to know."""
    return Check(name, "info", detail, measured, remedy=remedy)


def skipped(name: str, reason: str, remedy: str = "") -> Check:
    return Check(name, "skip", reason, remedy=remedy)


def attempted(name: str, remedy: str, look: Callable[[], Iterable[Check]]) -> tuple[Check, ...]:
    """What `look` finds; a problem of the model's that stops it is a failure of `name`."""
    try:
        return tuple(look())
    except BacklensError as error:
        return (Check(name, "FAIL", str(error), remedy=remedy),)


FOUND, WIDTHS, CUTS = "modules", "widths", "cuts"
DESCRIBE = "save the description below to a file, correct it, and pass it as --anatomy FILE"


@dataclass(frozen=True)
class Structure:
    """What the model's structure says, before any weight is read."""

    checks: tuple[Check, ...]
    seen: tuple[SeenBlock, ...] = ()
    """The blocks as they are; empty when they cannot be told."""
    draft: ProposedLayout | None = None
    """A description to edit; None where nothing is wrong, or no blocks were found."""
    unproven: Mapping[str, str] = field(default_factory=dict)
    """Cuts of fused matrices that nothing proves, of the description in use or else of the draft, by module."""

    @property
    def understood(self) -> bool:
        return all(check.passed is not False for check in self.checks)


def look_at_blocks(model: PreTrainedModel, layout: Layout | None) -> Structure:
    """Find every block's matrices by `layout`, or that of the model's family; the meta device will do."""
    try:
        seen = see_blocks(model)
    except BacklensError as error:
        return Structure((Check(FOUND, "FAIL", str(error), remedy="no description of blocks can help here"),))
    try:
        blocks = describe_blocks(model, layout or layout_of(model.config))
    except BacklensError as error:
        return _drafted(model, seen, (Check(FOUND, "FAIL", str(error), remedy=DESCRIBE),))
    checks = (_found(blocks), _widths(blocks, int(model.config.get_text_config().hidden_size)))
    unproven = unproven_cuts(layout, model.config)
    structure = Structure((*checks, *_cuts("--anatomy", unproven)), seen, unproven=unproven)
    return structure if structure.understood else _drafted(model, seen, checks)


def _drafted(model: PreTrainedModel, seen: Sequence[SeenBlock], checks: Sequence[Check]) -> Structure:
    draft = propose_layout(model)
    unproven = unproven_cuts(draft.layout, model.config)
    return Structure((*checks, *_cuts("the description below", unproven)), tuple(seen), draft, unproven)


def _cuts(source: str, unproven: Mapping[str, str]) -> Iterator[Check]:
    """Xᵀ Δ agrees with autograd under any cut, so the other checks say nothing of it."""
    if unproven:
        said = ", ".join(f"{module} ({cut})" for module, cut in unproven.items())
        detail = f"unproven parts of fused matrices, by {source}: {said}"
        remedy = (
            "compare them with the model's code: no check tells a wrong cut, and run.json says so of a run"
        )
        yield told(CUTS, len(unproven), detail, remedy)


def _found(blocks: Sequence[Block]) -> Check:
    experts = max((_experts(block) for block in blocks), default=0)
    count = sum(
        len(block.matrices) + (_experts(block) * len(block.experts.matrices) if block.experts else 0)
        for block in blocks
    )
    detail = f"matrices in {len(blocks)} blocks: {', '.join(modules_of(blocks))}"
    if experts:
        detail += f"; up to {experts} experts a block"
    left_out = {path: what for block in blocks for path, what in block.not_covered.items()}
    if left_out:
        detail += f"; not covered: {', '.join(f'{path} ({what})' for path, what in left_out.items())}"
    return Check(FOUND, "pass", detail, count)


def _experts(block: Block) -> int:
    if block.experts is None:
        return 0
    path = next(iter(block.experts.matrices.values())).path
    return len(getattr(block.experts.module, path))


def _widths(blocks: Sequence[Block], d_model: int) -> Check:
    problems = misfits(blocks, d_model)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Check(WIDTHS, "FAIL", f"{problems[0]}{more}", len(problems), 0, DESCRIBE)
    cut = {located.path for block in blocks for located in block.matrices.values() if located.cut is not None}
    shared = f"; of {', '.join(sorted(cut))}, every output is in one module" if cut else ""
    return Check(WIDTHS, "pass", f"matrices that do not fit the residual stream{shared}", 0, 0)


RIGHT, LEFT, ROWS = "batch, right-padded", "batch, left-padded", "batch, projected"

LIMIT = 1e-4
HALF_LIMIT = 0.1
"""For weights in bfloat16 or float16, or inputs in 8 bits: in another batch products round differently."""


def padding_checks(trial: ModelCopy, by_itself: Sequence[Factors]) -> Iterator[Check]:
    """x and δ of a batch against those of each prompt by itself."""
    if len(trial.examples) < 2:
        yield from (
            skipped(name, "there is only one prompt", "give more --prompts") for name in (RIGHT, LEFT)
        )
        return
    sides: tuple[tuple[str, Side], ...] = ((RIGHT, "right"), (LEFT, "left"))
    for name, side in sides:
        found = apart(together(trial, side), by_itself)
        what = f"x and δ of {found.prompts} prompts against each by itself, largest difference, relative"
        if found.rerouted == found.prompts and trial.coarse:
            yield told(name, None, "rounding sent a token of every prompt to other experts", _remedy(trial))
            continue
        if found.place:
            what += f"; worst: {found.place}"
        if found.rerouted:
            what += f"; not compared: {found.rerouted} prompts of which a token came to other experts"
        largest = found.largest if trial.coarse or not found.rerouted else float("inf")
        yield at_most(name, largest, _limit(trial), what, _remedy(trial))


def row_check(trial: ModelCopy, in_batch: Rows) -> Iterator[Check]:
    """Scores of a batch's rows, token by token, against those of each prompt by itself."""
    if len(trial.examples) < 2:
        yield skipped(ROWS, "there is only one prompt", "give more --prompts")
        return
    found = drift(in_batch, rows_alone(trial))
    what = f"scores of {len(found.scores):,} rows' top and bottom tokens, largest difference, relative"
    if found.missing:
        what += f"; {found.missing} rows are on one side only"
    largest = float(found.beyond_rounding.max(initial=0.0))
    if found.missing and not trial.coarse:
        largest = float("inf")
    if trial.coarse and largest > HALF_LIMIT:  # top scores of a vector that is mostly rounding
        yield told(ROWS, largest, what, _remedy(trial))
    else:
        yield at_most(ROWS, largest, _limit(trial), what, _remedy(trial))


def _limit(trial: ModelCopy) -> float:
    return HALF_LIMIT if trial.coarse else LIMIT


def _remedy(trial: ModelCopy) -> str:
    if trial.loaded.model.config._attn_implementation != "eager":
        return "use --attention exact"
    if trial.half:
        return "use --dtype float32 where rows have to be comparable"
    if trial.coarse:
        return "use unquantized weights where rows have to be comparable"
    return "run each prompt by itself (--batch-tokens 1), and report it as a defect"


ATTENTION = "exact and fast attention"
ANOTHER_MODEL = 1e-2
"""In float32, kernels that are further apart do not compute the same thing."""
SCORES, TOKENS = "half precision, scores", "half precision, top tokens"


def attention_check(
    found: Sequence[Factors], expected: Sequence[Factors], kernel: str, half: bool
) -> Iterator[Check]:
    """x and δ with the model's own kernel against those with the exact one."""
    between = apart(found, expected)
    detail = f"x and δ with {kernel} and with eager attention, largest difference, relative"
    if between.place:
        detail += f"; worst: {between.place}"
    if between.rerouted:
        detail += f"; not compared: {between.rerouted} prompts of which a token came to other experts"
    if between.largest <= ANOTHER_MODEL or half:
        yield told(
            ATTENTION, between.largest, detail, "--attention exact, the default, does not depend on the batch"
        )
        return
    remedy = "this is no rounding: one of the two is wrong in this version of transformers; find out before you use it"
    yield at_most(ATTENTION, between.largest, ANOTHER_MODEL, detail, remedy)


def half_checks(half: Rows, full: Rows, dtype: str) -> Iterator[Check]:
    """Scores and top tokens of weights in half precision against float32."""
    found = drift(half, full)
    median = float(np.median(found.scores)) if len(found.scores) else 0.0
    mean = float(found.overlap.mean()) if len(found.overlap) else 1.0
    remedy = "--dtype float32, where the device has room for it"
    missing = f"; {found.missing} rows are on one side only" if found.missing else ""
    detail = f"{dtype} against float32, median difference over {len(found.scores):,} rows, relative{missing}"
    yield told(SCORES, median, detail, remedy)
    detail = (
        f"{dtype} against float32, share of the top and bottom {full.ids.shape[-1]} tokens that stay listed"
    )
    yield told(TOKENS, mean, detail, remedy)


MEMORY, TIME = "memory", "time"
SMALL = 128
"""Tokens of the smaller of two batches."""
LARGER = 3
"""How many times as many the other has: the difference is what tokens take, without what any batch takes."""
SECONDS_BETWEEN_LOOKS = 0.002


@dataclass
class _Peak:
    """Bytes above what was in use at the start; None where the system does not say."""

    bytes: int | None = None


def cost_checks(trial: ModelCopy, texts: Sequence[Prompt], config: RunConfig) -> Iterator[Check]:
    """Memory, then the seconds of each stage, per 1,000 tokens."""
    assert trial.lens is not None
    modules = tuple(name for name in trial.loaded.parts.modules if name.startswith("mlp"))
    lens = BackwardLens.from_parts(trial.loaded, trial.lens)
    options = RowOptions(tuple(trial.layers), modules or trial.loaded.parts.modules)
    peaks, seconds, tokens = [], {}, []
    for batch in _batches(trial.examples):
        release_freed_memory()
        with _peak_of(trial.loaded.model.device) as peak:
            seconds = lens.rows(batch, options).seconds
        peaks.append(peak.bytes)
        tokens.append(len(batch) * len(batch[0].token_ids))
    yield _memory(peaks, tokens, str(trial.loaded.model.device))
    started = time.perf_counter()
    tokenized(texts, trial.loaded, config)
    taken = time.perf_counter() - started
    yield _time("tokenize", 1000 * taken / sum(len(example.token_ids) for example in trial.examples), options)
    for stage in ("model", "factors", "lens", "rows"):
        yield _time(stage, 1000 * seconds[stage] / tokens[-1], options)


def _time(stage: str, seconds: float, options: RowOptions) -> Check:
    said = f"seconds per 1,000 tokens, {stage}" + (
        "" if stage == "tokenize" else f" ({', '.join(options.modules)})"
    )
    return told(f"{TIME}, {stage}", seconds, said)


def _memory(peaks: Sequence[int | None], tokens: Sequence[int], device: str) -> Check:
    small, large = peaks
    if small is None or large is None:
        return skipped(MEMORY, "this system does not say how much memory a process uses")
    mib = max(0.0, (large - small) / (tokens[1] - tokens[0]) * 1000 / 2**20)
    detail = (
        f"MiB on {device} for every 1,000 tokens of a batch, padding included; "
        f"a batch of {tokens[1]:,} took {large / 2**20:,.0f} MiB above the weights"
    )
    return told(MEMORY, mib, detail, "less: a smaller --batch-tokens")


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """The prompts, longest first, over and over: a batch of SMALL tokens with their padding, and one LARGER."""
    longest_first = sorted(examples, key=lambda example: -len(example.token_ids))
    count = -(-SMALL // len(longest_first[0].token_ids))
    for size in (count, LARGER * count):
        yield [*islice(cycle(longest_first), size)]


@contextmanager
def _peak_of(device: torch.device) -> Iterator[_Peak]:
    """The most memory in use inside, on the device or, on a CPU, of the process."""
    peak = _Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    before = _resident()
    if before is None:
        yield peak
        return
    peak.bytes, stop = 0, threading.Event()

    def watch() -> None:
        while True:
            peak.bytes = max(peak.bytes or 0, (_resident() or 0) - before)
            if stop.wait(SECONDS_BETWEEN_LOOKS):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def _resident() -> int | None:
    """Bytes of this process that are in memory; None where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
