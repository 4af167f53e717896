"""Memory and time that prompts take on this machine, as `backlens run` computes them by default."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch

from backlens.backward_lens import BackwardLens
from backlens.capture.memory import release_freed_memory
from backlens.config import RunConfig
from backlens.doctor.checks import Check, skipped, told
from backlens.doctor.model_copy import ModelCopy, tokenized
from backlens.prompts.prompt import Prompt
from backlens.prompts.tokenize import Example
from backlens.rows import RowOptions

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
