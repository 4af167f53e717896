"""Checks of the doctor.

They concern a model's blocks, its numbers in batches, what faster kernels and smaller weights change, and the memory
and time that prompts take on this machine.
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
"""`info`: a number that no promise depends on. `skip`: not checked; the detail says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's table."""

    name: str
    status: Status
    detail: str
    """The quantity that was measured and where it was worst, or the reason why it was not measured."""
    measured: float | None = None
    limit: float | None = None
    """Largest value that passes."""
    remedy: str = ""
    """Advice for a check that did not pass."""

    @property
    def passed(self) -> bool | None:
        """True or False for a check with a limit, None for any other."""
        return {"pass": True, "FAIL": False}.get(self.status)

    def as_json(self) -> dict[str, Any]:
        """Return plain values; a number that is not finite is null."""
        finite = self.measured is not None and math.isfinite(self.measured)
        return asdict(self) | {"passed": self.passed, "measured": self.measured if finite else None}


def at_most(name: str, measured: float, limit: float, detail: str, remedy: str) -> Check:
    """Make a check that passes up to `limit` and fails for NaN."""
    return Check(name, "pass" if measured <= limit else "FAIL", detail, measured, limit, remedy)


def info(name: str, measured: float | None, detail: str, remedy: str = "") -> Check:
    """Make a line with a number that no promise depends on."""
    return Check(name, "info", detail, measured, remedy=remedy)


def skipped(name: str, reason: str, remedy: str = "") -> Check:
    """Make a line that says why something was not checked."""
    return Check(name, "skip", reason, remedy=remedy)


def attempted(name: str, remedy: str, checks: Callable[[], Iterable[Check]]) -> tuple[Check, ...]:
    """Run `checks`; a BacklensError that stops them becomes a failed check called `name`."""
    try:
        return tuple(checks())
    except BacklensError as error:
        return (Check(name, "FAIL", str(error), remedy=remedy),)


FOUND, WIDTHS, CUTS = "modules", "widths", "cuts"
DESCRIBE = "save the description below to a file, correct it, and pass it as --anatomy FILE"


@dataclass(frozen=True)
class BlockChecks:
    """Checks of the model's blocks that read no weights."""

    checks: tuple[Check, ...]
    seen: tuple[SeenBlock, ...] = ()
    """The blocks with their matrices; empty if no blocks were found."""
    proposed: ProposedLayout | None = None
    """A description to edit; None if nothing is wrong or no blocks were found."""
    unproven: Mapping[str, str] = field(default_factory=dict)
    """Cuts of fused matrices that no check proves, by module; of the description in use, else of `proposed`."""

    @property
    def recognized(self) -> bool:
        return all(check.passed is not False for check in self.checks)


def check_blocks(model: PreTrainedModel, layout: Layout | None) -> BlockChecks:
    """Find every block's matrices by `layout`, or by that of the model's family; no weights are needed."""
    try:
        seen = see_blocks(model)
    except BacklensError as error:
        return BlockChecks(
            (Check(FOUND, "FAIL", str(error), remedy="no description of blocks can help here"),)
        )
    try:
        blocks = describe_blocks(model, layout or layout_of(model.config))
    except BacklensError as error:
        return _proposed(model, seen, (Check(FOUND, "FAIL", str(error), remedy=DESCRIBE),))
    checks = (_found(blocks), _widths(blocks, int(model.config.get_text_config().hidden_size)))
    unproven = unproven_cuts(layout, model.config)
    checked = BlockChecks((*checks, *_cuts("--anatomy", unproven)), seen, unproven=unproven)
    return checked if checked.recognized else _proposed(model, seen, checks)


def _proposed(model: PreTrainedModel, seen: Sequence[SeenBlock], checks: Sequence[Check]) -> BlockChecks:
    proposed = propose_layout(model)
    unproven = unproven_cuts(proposed.layout, model.config)
    return BlockChecks((*checks, *_cuts("the description below", unproven)), tuple(seen), proposed, unproven)


def _cuts(source: str, unproven: Mapping[str, str]) -> Iterator[Check]:
    """List cuts that no check proves: Xᵀ Δ agrees with autograd under any cut."""
    if unproven:
        said = ", ".join(f"{module} ({cut})" for module, cut in unproven.items())
        detail = f"unproven parts of fused matrices, by {source}: {said}"
        remedy = (
            "compare them with the model's code: no check tells a wrong cut, and run.json says so of a run"
        )
        yield info(CUTS, len(unproven), detail, remedy)


def _found(blocks: Sequence[Block]) -> Check:
    experts = max((_experts(block) for block in blocks), default=0)
    count = sum(
        len(block.matrices) + (_experts(block) * len(block.experts.matrices) if block.experts else 0)
        for block in blocks
    )
    detail = f"matrices in {len(blocks)} blocks: {', '.join(modules_of(blocks))}"
    if experts:
        detail += f"; up to {experts} experts per block"
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
"""Limit for weights in bfloat16 or float16, or inputs in 8 bits: products in another batch round differently."""


def padding_checks(copy: ModelCopy, by_itself: Sequence[Factors]) -> Iterator[Check]:
    """Compare x and δ of a batch with those of each prompt alone, for both padding sides."""
    if len(copy.examples) < 2:
        yield from (
            skipped(name, "there is only one prompt", "give more --prompts") for name in (RIGHT, LEFT)
        )
        return
    sides: tuple[tuple[str, Side], ...] = ((RIGHT, "right"), (LEFT, "left"))
    for name, side in sides:
        found = apart(together(copy, side), by_itself)
        what = f"x and δ of {found.prompts} prompts against each by itself, largest difference, relative"
        if found.rerouted == found.prompts and copy.coarse:
            yield info(name, None, "rounding sent a token of every prompt to other experts", _remedy(copy))
            continue
        if found.place:
            what += f"; worst: {found.place}"
        if found.rerouted:
            what += f"; not compared: {found.rerouted} prompts of which a token came to other experts"
        largest = found.largest if copy.coarse or not found.rerouted else float("inf")
        yield at_most(name, largest, _limit(copy), what, _remedy(copy))


def row_check(copy: ModelCopy, in_batch: Rows) -> Iterator[Check]:
    """Compare the scores of a batch's rows with those of each prompt alone, token by token."""
    if len(copy.examples) < 2:
        yield skipped(ROWS, "there is only one prompt", "give more --prompts")
        return
    found = drift(in_batch, rows_alone(copy))
    what = f"scores of {len(found.scores):,} rows' top and bottom tokens, largest difference, relative"
    if found.missing:
        what += f"; {found.missing} rows are on one side only"
    largest = float(found.beyond_rounding.max(initial=0.0))
    if found.missing and not copy.coarse:
        largest = float("inf")
    if copy.coarse and largest > HALF_LIMIT:  # These are the top scores of a vector that is mostly rounding.
        yield info(ROWS, largest, what, _remedy(copy))
    else:
        yield at_most(ROWS, largest, _limit(copy), what, _remedy(copy))


def _limit(copy: ModelCopy) -> float:
    return HALF_LIMIT if copy.coarse else LIMIT


def _remedy(copy: ModelCopy) -> str:
    if copy.loaded.model.config._attn_implementation != "eager":
        return "use --attention exact"
    if copy.half:
        return "use --dtype float32 where rows have to be comparable"
    if copy.coarse:
        return "use unquantized weights where rows have to be comparable"
    return "run each prompt by itself (--batch-tokens 1), and report it as a defect"


ATTENTION = "exact and fast attention"
ANOTHER_MODEL = 1e-2
"""Largest difference of two kernels in float32 that compute the same thing."""
SCORES, TOKENS = "half precision, scores", "half precision, top tokens"


def attention_check(
    found: Sequence[Factors], expected: Sequence[Factors], kernel: str, half: bool
) -> Iterator[Check]:
    """Compare x and δ with the model's own kernel and with the exact one."""
    between = apart(found, expected)
    detail = f"x and δ with {kernel} and with eager attention, largest difference, relative"
    if between.place:
        detail += f"; worst: {between.place}"
    if between.rerouted:
        detail += f"; not compared: {between.rerouted} prompts of which a token came to other experts"
    if between.largest <= ANOTHER_MODEL or half:
        yield info(
            ATTENTION, between.largest, detail, "--attention exact, the default, does not depend on the batch"
        )
        return
    remedy = "this is no rounding: one of the two is wrong in this version of transformers; find out before you use it"
    yield at_most(ATTENTION, between.largest, ANOTHER_MODEL, detail, remedy)


def half_checks(half: Rows, full: Rows, dtype: str) -> Iterator[Check]:
    """Compare scores and top tokens of weights in half precision with those in float32."""
    found = drift(half, full)
    median = float(np.median(found.scores)) if len(found.scores) else 0.0
    mean = float(found.overlap.mean()) if len(found.overlap) else 1.0
    remedy = "--dtype float32, where the device has room for it"
    missing = f"; {found.missing} rows are on one side only" if found.missing else ""
    detail = f"{dtype} against float32, median difference over {len(found.scores):,} rows, relative{missing}"
    yield info(SCORES, median, detail, remedy)
    detail = (
        f"{dtype} against float32, share of the top and bottom {full.ids.shape[-1]} tokens that stay listed"
    )
    yield info(TOKENS, mean, detail, remedy)


MEMORY, TIME = "memory", "time"
SMALL = 128
"""Tokens in the smaller of two batches."""
LARGER = 3
"""Factor between the two batches. Their difference leaves out what a batch of any size takes."""
SECONDS_BETWEEN_LOOKS = 0.002


@dataclass
class _Peak:
    """Most bytes in use above those at the start; None if the system does not say."""

    bytes: int | None = None


def cost_checks(copy: ModelCopy, texts: Sequence[Prompt], config: RunConfig) -> Iterator[Check]:
    """Measure memory and the seconds of each stage, per 1,000 tokens."""
    assert copy.lens is not None
    modules = tuple(name for name in copy.loaded.parts.modules if name.startswith("mlp"))
    options = RowOptions(tuple(copy.layers), modules or copy.loaded.parts.modules)
    peaks, seconds, tokens = [], {}, []
    for batch in _two_batches(copy.examples):
        release_freed_memory()
        with _peak_of(copy.loaded.model.device) as peak:
            seconds = copy.lens.rows(batch, options).seconds
        peaks.append(peak.bytes)
        tokens.append(len(batch) * len(batch[0].token_ids))
    yield _memory(peaks, tokens, str(copy.loaded.model.device))
    started = time.perf_counter()
    tokenized(texts, copy.loaded, config)
    taken = time.perf_counter() - started
    yield _time("tokenize", 1000 * taken / sum(len(example.token_ids) for example in copy.examples), options)
    for stage in ("model", "factors", "lens", "rows"):
        yield _time(stage, 1000 * seconds[stage] / tokens[-1], options)


def _time(stage: str, seconds: float, options: RowOptions) -> Check:
    said = f"seconds per 1,000 tokens, {stage}" + (
        "" if stage == "tokenize" else f" ({', '.join(options.modules)})"
    )
    return info(f"{TIME}, {stage}", seconds, said)


def _memory(peaks: Sequence[int | None], tokens: Sequence[int], device: str) -> Check:
    small, large = peaks
    if small is None or large is None:
        return skipped(MEMORY, "this system does not say how much memory a process uses")
    mib = max(0.0, (large - small) / (tokens[1] - tokens[0]) * 1000 / 2**20)
    detail = (
        f"MiB on {device} per 1,000 tokens of a batch, padding included; "
        f"a batch of {tokens[1]:,} took {large / 2**20:,.0f} MiB above the weights"
    )
    return info(MEMORY, mib, detail, "less: a smaller --batch-tokens")


def _two_batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Repeat the prompts, longest first: a batch of SMALL tokens, padding included, and one LARGER times as large."""
    longest_first = sorted(examples, key=lambda example: -len(example.token_ids))
    count = -(-SMALL // len(longest_first[0].token_ids))
    for size in (count, LARGER * count):
        yield [*islice(cycle(longest_first), size)]


@contextmanager
def _peak_of(device: torch.device) -> Iterator[_Peak]:
    """Measure the most memory in use inside the block: of the device or, on a CPU, of the process."""
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
    """Resident bytes of this process; None where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
