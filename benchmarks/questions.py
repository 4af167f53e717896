"""The prompts, tokens and neurons that benchmarks of a run of `benchmarks.atlas` ask about, always the same."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.shape import word

from backlens.atlas import Atlas

TIMES = 8
"""Subjects per kind; for pages the last one warms up the server."""
MOST_KEPT_FIRST = """
SELECT concat_ws('.', layer, module, neuron) AS address
FROM neuron_summary ORDER BY prompts DESC, layer, module, neuron
"""


@dataclass(frozen=True)
class Subjects:
    """The subjects of questions."""

    prompts: Sequence[int]
    common: Sequence[str]
    """The most frequent tokens."""
    rare: Sequence[str]
    """Tokens of about the median frequency."""
    neurons: Sequence[str]
    strongest: Sequence[str]
    """The neurons that are kept for the most prompts."""


def choose_subjects(folder: str) -> Subjects:
    """Choose subjects at random, with a fixed seed."""
    chosen = random.Random(0)
    atlas = Atlas(folder)
    addresses = atlas.sql(MOST_KEPT_FIRST, 1_000_000).column("address").to_pylist()
    return Subjects(
        prompts=chosen.sample(range(atlas.snapshot.record.plan.prompts), TIMES),
        common=[word(rank) for rank in range(TIMES)],
        rare=[word(20_000 + rank) for rank in range(TIMES)],
        neurons=chosen.sample(addresses, TIMES),
        strongest=addresses[:TIMES],
    )
