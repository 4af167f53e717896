"""What benchmarks ask a run of `benchmarks.atlas` about: the same prompts, tokens and neurons each time."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.shape import word

from backlens.atlas import Atlas

TIMES = 8
"""Of each kind; in pages the last is to warm up with."""
MOST_KEPT_FIRST = """
SELECT concat_ws('.', layer, module, neuron) AS address
FROM neuron_summary ORDER BY prompts DESC, layer, module, neuron
"""


@dataclass(frozen=True)
class Asked:
    """Whom questions are about."""

    prompts: Sequence[int]
    common: Sequence[str]
    """The most frequent tokens."""
    rare: Sequence[str]
    """Tokens of about the median frequency."""
    neurons: Sequence[str]
    strongest: Sequence[str]
    """Those that are kept for the most prompts."""


def what_to_ask(folder: str) -> Asked:
    """Chosen at random, but always alike."""
    chosen = random.Random(0)
    atlas = Atlas(folder)
    addresses = atlas.sql(MOST_KEPT_FIRST, 1_000_000).column("address").to_pylist()
    return Asked(
        prompts=chosen.sample(range(atlas.snapshot.record.plan.prompts), TIMES),
        common=[word(rank) for rank in range(TIMES)],
        rare=[word(20_000 + rank) for rank in range(TIMES)],
        neurons=chosen.sample(addresses, TIMES),
        strongest=addresses[:TIMES],
    )
