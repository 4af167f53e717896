"""What the faster kernels and the smaller weights change: numbers to know, unless they cannot be rounding."""

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.doctor.check import Check, at_most, told
from pipeline.doctor.rows import Rows, drift
from pipeline.doctor.trial import Factors, apart

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
