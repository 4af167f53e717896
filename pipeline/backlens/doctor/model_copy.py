"""A loaded copy of the model, the prompts it is checked with, and distances between the results of two copies."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from backlens.backward_lens import BackwardLens
from backlens.capture.batch import Side, make_batch
from backlens.capture.hooks import Gradient, capture
from backlens.columns import MatrixRows
from backlens.config import RunConfig
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel
from backlens.prompts.prompt import Prompt, Rejected
from backlens.prompts.read import read_prompts
from backlens.prompts.tokenize import Example, context_length, tokenize
from backlens.rows import RowOptions, sequence
from backlens.terms import WRITES

MOST_PROMPTS = 8
MOST_TOKENS = 512
"""Tokens of all prompts together, unless the first alone is longer."""

TEXTS = (
    ("I", " Zurich"),
    ("Hello", " seven"),
    ("The capital of France is", " Oslo"),
    ("2 + 2 =", " blue"),
    ("She opened the door and saw a", " because"),
    ("Water is made of oxygen and", " Kyoto"),
)
"""Prompts of different lengths, down to a single token in most vocabularies, and targets that few models expect."""

FLOOR = 1e-2
"""Share of a prompt's largest δ that smaller ones are compared with: rounding is relative to what the backward pass
carries, not to what is left of it."""

Place = tuple[int, str, int | None]
"""Layer, module, expert."""
Factors = Mapping[Place, tuple[Tensor, Tensor]]
"""(x, δ) of one prompt's tokens without padding, by matrix; on the CPU."""


@dataclass(frozen=True)
class ModelCopy:
    """A loaded copy of the model and the prompts."""

    loaded: LoadedModel
    lens: BackwardLens | None
    """None if the model's final norm and unembedding are no lens."""
    examples: tuple[Example, ...]
    probes: tuple[Example, ...]
    """The same prompts with unlikely targets. If a model is nearly certain of a target, the gradient is what rounding
    leaves of 1 − p, so that two computations of it differ."""

    @property
    def half(self) -> bool:
        """True if the weights have less than float32's precision."""
        return self.loaded.model.dtype != torch.float32

    @property
    def coarse(self) -> bool:
        """True if products have less than float32's precision: 8-bit layers round their inputs too."""
        return self.half or getattr(self.loaded.model, "is_loaded_in_8bit", False)

    @property
    def layers(self) -> range:
        return range(len(self.loaded.parts.blocks))


@dataclass(frozen=True, slots=True)
class Apart:
    """Distance between two sets of factors."""

    largest: float
    """Largest relative difference (Frobenius) of an x or a δ."""
    place: str
    rerouted: int
    """Number of prompts with a token that went to other experts; their factors are not compared."""
    prompts: int


def read_texts(config: RunConfig) -> list[Prompt]:
    """Read the first few prompts of the user, or take the built-in ones.

    Raises BacklensError when none can be read.
    """
    if config.prompts is None:
        pairs = enumerate(TEXTS)
        return [Prompt(i, prompt, target, f"built-in prompt {i}") for i, (prompt, target) in pairs]
    records = read_prompts(config.prompts, config.format, config.prompt_fields, None)
    first = list(itertools.islice(records, MOST_PROMPTS))
    prompts = [record for record in first if isinstance(record, Prompt)]
    _refuse_none(prompts, first, config.prompts)
    return prompts


def tokenized(texts: Sequence[Prompt], loaded: LoadedModel, config: RunConfig) -> tuple[Example, ...]:
    """Tokenize the prompts as a run does. Raises BacklensError if none can be used."""
    results = tokenize(
        texts,
        loaded.tokenizer,
        prepend_bos=config.prepend_bos,
        target_mode="first",
        context=context_length(loaded.model.config),
        rows=loaded.parts.rows,
        chat_template=config.chat_template,
    )
    examples = [result for result in results if isinstance(result, Example)]
    _refuse_none(examples, results, config.prompts or "prompts")
    ends = itertools.accumulate(len(example.token_ids) for example in examples)
    fitting = [example for example, end in zip(examples, ends, strict=True) if end <= MOST_TOKENS]
    return tuple(fitting or examples[:1])


@torch.no_grad()
def with_unlikely_targets(examples: Sequence[Example], loaded: LoadedModel) -> tuple[Example, ...]:
    """Give each prompt the token that the model expects least as its target."""
    tokens = torch.tensor(loaded.token_ids, device=loaded.device)
    ids = (torch.tensor([example.token_ids], device=loaded.model.device) for example in examples)
    logits = (loaded.model(input_ids=each, use_cache=False).logits[0, -1] for each in ids)
    least = [int(tokens[each[tokens].argmin()]) for each in logits]
    return tuple(replace(each, target_ids=(token,)) for each, token in zip(examples, least, strict=True))


def _refuse_none(good: Sequence[object], records: Sequence[object], source: str) -> None:
    if not good:
        problem = next((record.message for record in records if isinstance(record, Rejected)), None)
        raise BacklensError(problem or f"prompts: {source} holds no prompts")


def alone(copy: ModelCopy) -> list[Factors]:
    """Factors of every prompt, each in a batch of its own."""
    return [factors for example in copy.probes for factors in _captured(copy, [example], "right")]


def together(copy: ModelCopy, side: Side) -> list[Factors]:
    """Factors of every prompt, all of them in one batch padded on `side`."""
    return _captured(copy, copy.probes, side)


def _captured(copy: ModelCopy, examples: Sequence[Example], side: Side) -> list[Factors]:
    batch = make_batch([sequence(example, "first") for example in examples], copy.loaded.model.device, side)
    found: list[dict[Place, tuple[Tensor, Tensor]]] = [{} for _ in examples]

    def keep(group: Sequence[Gradient]) -> None:
        for gradient in group:
            place = gradient.layer, gradient.module, gradient.expert
            slots = gradient.slots
            for prompt, own, x, vjp in zip(slots.prompts, slots.mask, gradient.x, gradient.vjp, strict=True):
                found[int(prompt)][place] = x[own].float().cpu(), vjp[own].float().cpu()

    capture(copy.loaded, batch, copy.layers, copy.loaded.parts.modules, keep)
    return [*found]


def apart(found: Sequence[Factors], expected: Sequence[Factors]) -> Apart:
    """Largest relative difference over all prompts and matrices."""
    largest, place, rerouted = 0.0, "", 0
    for ours, theirs in zip(found, expected, strict=True):
        if _tokens_by_matrix(ours) != _tokens_by_matrix(theirs):
            rerouted += 1
            continue
        floor = FLOOR * max(float(vjp.norm()) for _, vjp in theirs.values())
        for key, (x, vjp) in theirs.items():
            for ours_at, at, least in zip(ours[key], (x, vjp), (0.0, floor), strict=True):
                difference = float((ours_at - at).norm()) / max(float(at.norm()), least, 1e-30)
                if math.isnan(difference):
                    return Apart(difference, place_name(key), rerouted, len(expected))
                if difference > largest:
                    largest, place = difference, place_name(key)
    return Apart(largest, place, rerouted, len(expected))


def _tokens_by_matrix(factors: Factors) -> dict[Place, int]:
    return {place: len(x) for place, (x, _) in factors.items()}


def place_name(place: Place) -> str:
    layer, module, expert = place
    return f"layer {layer} {module}" + ("" if expert is None else f", expert {expert}")


Key = tuple[int, int, str, int | None, int]
"""Prompt, layer, module, expert, position."""


@dataclass(frozen=True)
class Rows:
    """Rows of `tokens` that have a projection."""

    index: dict[Key, int]
    ids: np.ndarray
    """Shape (row, 2, k): top, then bottom."""
    scores: np.ndarray
    norms: np.ndarray
    """Length of each row's δ if that is the projected vector, else infinity."""


@dataclass(frozen=True)
class Drift:
    """Distance of rows from those expected of the same tokens."""

    scores: np.ndarray
    """Largest difference of a listed token's score in each row, relative to the row's largest score."""
    beyond_rounding: np.ndarray
    """The same, scaled down for a δ that is smaller than FLOOR times its prompt's largest."""
    overlap: np.ndarray
    """Share of each row's listed tokens that the other side lists too."""
    missing: int
    """Number of rows that only one side has."""


def rows_alone(copy: ModelCopy) -> Rows:
    """Rows of every prompt, each in a batch of its own."""
    return _rows(copy, [[example] for example in copy.examples], "right")


def rows_together(copy: ModelCopy, side: Side = "right") -> Rows:
    """Rows of all prompts in one batch padded on `side`."""
    return _rows(copy, [copy.examples], side)


def _rows(copy: ModelCopy, batches: Sequence[Sequence[Example]], side: Side) -> Rows:
    assert copy.lens is not None
    modules = copy.loaded.parts.modules
    options = RowOptions(tuple(copy.layers), modules, top_k=min(10, copy.lens.lens.vocabulary), neurons=0)
    computed = [copy.lens.rows(examples, options, side=side) for examples in batches]
    blocks = [block for rows in computed for block in rows.blocks["tokens"]]
    keys = [key for block in blocks for key in _keys(block)]
    there = [block.projections.columns for block in blocks if block.projections is not None]
    ids = [np.stack([found["top_ids"], found["bottom_ids"]], axis=1) for found in there]
    scores = [np.stack([found["top_scores"], found["bottom_scores"]], axis=1) for found in there]
    norms = np.concatenate([_norms(block) for block in blocks])
    return Rows(
        {key: row for row, key in enumerate(keys)}, np.concatenate(ids), np.concatenate(scores), norms
    )


def _keys(block: MatrixRows) -> list[Key]:
    if block.projections is None:
        return []
    valid = block.projections.valid
    prompts, positions = (block.columns[name][valid].tolist() for name in ("prompt_id", "position"))
    matrix = block.layer, block.module, block.expert
    return [(prompt, *matrix, position) for prompt, position in zip(prompts, positions, strict=True)]


def _norms(block: MatrixRows) -> np.ndarray:
    assert block.projections is not None
    norms = block.columns["vjp_norm"][block.projections.valid]
    return norms if block.module in WRITES else np.full_like(norms, np.inf)


def drift(found: Rows, expected: Rows) -> Drift:
    """Compare rows by token, not by place in the list: a token that left a list has at most the list's last score."""
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
    """Length of the largest δ of each row's prompt."""
    prompts = np.array([key[0] for key in keys], dtype=np.int64)
    finite = np.where(np.isfinite(norms), norms, 0.0)
    largest = {prompt: finite[prompts == prompt].max() for prompt in set(prompts.tolist())}
    return np.maximum([largest[prompt] for prompt in prompts.tolist()], 1e-30)
