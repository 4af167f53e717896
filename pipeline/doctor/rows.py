"""Projected rows of the prompts, and how far two sets of them are apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.capture import Side, make_batch
from pipeline.doctor.trial import FLOOR, Trial
from pipeline.engine.blocks import Block
from pipeline.engine.extract import Wanted, extract_batch, sequence
from pipeline.models.layout import WRITES
from pipeline.prompts.tokenize import Example

Key = tuple[int, int, str, int | None, int]
"""Prompt, layer, module, expert, position."""


@dataclass(frozen=True)
class Rows:
    """The rows of `tokens` that have a projection."""

    index: dict[Key, int]
    ids: np.ndarray
    """(row, 2, k): top, then bottom."""
    scores: np.ndarray
    norms: np.ndarray
    """Of each row's δ where that is what is projected, else infinite."""


@dataclass(frozen=True)
class Drift:
    """How far rows are from those expected of the same tokens."""

    scores: np.ndarray
    """Largest difference of a listed token's score in each row, relative to the row's largest score."""
    beyond_rounding: np.ndarray
    """The same, less by as much as a δ is smaller than FLOOR of its prompt's largest."""
    overlap: np.ndarray
    """Share of each row's listed tokens that are in the other's lists."""
    missing: int
    """Rows that only one side has."""


def rows_alone(trial: Trial) -> Rows:
    """Every prompt in a batch of its own."""
    return _rows(trial, [[example] for example in trial.examples], "right")


def rows_together(trial: Trial, side: Side = "right") -> Rows:
    """All prompts in one batch."""
    return _rows(trial, [trial.examples], side)


def _rows(trial: Trial, batches: Sequence[Sequence[Example]], side: Side) -> Rows:
    assert trial.lens is not None
    modules = trial.loaded.anatomy.modules
    wanted = Wanted(tuple(trial.layers), modules, top_k=min(10, trial.lens.vocabulary), neurons=0)
    blocks: list[Block] = []
    for examples in batches:
        sequences = [sequence(example, "first") for example in examples]
        batch = make_batch(sequences, trial.loaded.model.device, side)
        blocks += extract_batch(trial.loaded, trial.lens, examples, batch, wanted).blocks["tokens"]
    keys = [key for block in blocks for key in _keys(block)]
    there = [block.projections for block in blocks if block.projections is not None]
    ids = [np.stack([found.top_ids, found.bottom_ids], axis=1) for found in there]
    scores = [np.stack([found.top_scores, found.bottom_scores], axis=1) for found in there]
    norms = np.concatenate([_norms(block) for block in blocks])
    return Rows(
        {key: row for row, key in enumerate(keys)}, np.concatenate(ids), np.concatenate(scores), norms
    )


def _keys(block: Block) -> list[Key]:
    if block.projections is None:
        return []
    valid = block.projections.valid
    prompts, positions = (block.columns[name][valid].tolist() for name in ("prompt_id", "position"))
    matrix = block.layer, block.module, block.expert
    return [(prompt, *matrix, position) for prompt, position in zip(prompts, positions, strict=True)]


def _norms(block: Block) -> np.ndarray:
    assert block.projections is not None
    norms = block.columns["vjp_norm"][block.projections.valid]
    return norms if block.module in WRITES else np.full_like(norms, np.inf)


def drift(found: Rows, expected: Rows) -> Drift:
    """Compare by token, not by place in the list: a token that left a list had at most the score that ends it."""
    common = [key for key in expected.index if key in found.index]
    ours, theirs = ([rows.index[key] for key in common] for rows in (found, expected))
    ids, scores = expected.ids[theirs], expected.scores[theirs]
    same = ids[:, :, :, None] == found.ids[ours][:, :, None, :]
    listed = same.any(-1)
    their_scores = np.where(
        listed, (same * found.scores[ours][:, :, None, :]).sum(-1), found.scores[ours][:, :, -1:]
    )
    scale = np.abs(scores).max((1, 2), initial=0.0)
    differences = np.abs(their_scores - scores).max((1, 2), initial=0.0) / np.maximum(scale, 1e-30)
    norms = expected.norms[theirs]
    trust = np.minimum(1.0, norms / (FLOOR * _largest_of_prompt(common, norms)))
    missing = len(expected.index) + len(found.index) - 2 * len(common)
    return Drift(differences, differences * trust, listed.mean((1, 2)), missing)


def _largest_of_prompt(keys: Sequence[Key], norms: np.ndarray) -> np.ndarray:
    """The largest δ of each row's prompt."""
    prompts = np.array([key[0] for key in keys], dtype=np.int64)
    finite = np.where(np.isfinite(norms), norms, 0.0)
    largest = {prompt: finite[prompts == prompt].max() for prompt in set(prompts.tolist())}
    return np.maximum([largest[prompt] for prompt in prompts.tolist()], 1e-30)
