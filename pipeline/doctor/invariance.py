"""The same prompts in one batch and each by itself, padded on the right and on the left."""

from collections.abc import Iterator, Sequence

from pipeline.capture import Side
from pipeline.doctor.check import Check, at_most, skipped, told
from pipeline.doctor.rows import Rows, drift, rows_alone
from pipeline.doctor.trial import Factors, Trial, apart, together

RIGHT, LEFT, ROWS = "batch, right-padded", "batch, left-padded", "batch, projected"

LIMIT = 1e-4
HALF_LIMIT = 0.1
"""For weights in bfloat16 or float16, or inputs in 8 bits: in another batch products round differently."""


def padding_checks(trial: Trial, by_itself: Sequence[Factors]) -> Iterator[Check]:
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


def row_check(trial: Trial, in_batch: Rows) -> Iterator[Check]:
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


def _limit(trial: Trial) -> float:
    return HALF_LIMIT if trial.coarse else LIMIT


def _remedy(trial: Trial) -> str:
    if trial.loaded.model.config._attn_implementation != "eager":
        return "use --attention exact"
    if trial.half:
        return "use --dtype float32 where rows have to be comparable"
    if trial.coarse:
        return "use unquantized weights where rows have to be comparable"
    return "run each prompt by itself (--batch-tokens 1), and report it as a defect"
