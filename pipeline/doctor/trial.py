"""A copy of the model and the prompts it is tried on; and how far two answers to the same prompts are apart."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.capture import Gradient, Side, capture, make_batch
from pipeline.config import RunConfig
from pipeline.engine.extract import sequence
from pipeline.errors import BacklensError
from pipeline.lens import Lens
from pipeline.models.load import LoadedModel
from pipeline.prompts.read import read_prompts
from pipeline.prompts.record import Prompt, Rejected
from pipeline.prompts.tokenize import Example, context_length, tokenize

MOST_PROMPTS = 8
MOST_TOKENS = 512
"""Of all prompts together, unless the first alone is longer."""

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
"""A δ that is smaller than this part of its prompt's largest is measured against that part: rounding is relative to
what the backward pass carries, not to what is left of it."""

Place = tuple[int, str, int | None]
"""Layer, module, expert."""
Factors = Mapping[Place, tuple[Tensor, Tensor]]
"""(x, δ) of one prompt's own tokens, by matrix; on the CPU."""


@dataclass(frozen=True)
class Trial:
    """A loaded copy of the model, its lens if it has one, and the prompts."""

    loaded: LoadedModel
    lens: Lens | None
    examples: tuple[Example, ...]
    probes: tuple[Example, ...]
    """The same prompts with unlikely targets, for what is promised of any target: where a model is nearly certain of
    its target, a gradient is what rounding leaves of 1 − p."""

    @property
    def half(self) -> bool:
        """Whether the weights have less than float32's precision."""
        return self.loaded.model.dtype != torch.float32

    @property
    def coarse(self) -> bool:
        """Whether its products have less: 8-bit layers round their inputs too, whatever their weights' type."""
        return self.half or getattr(self.loaded.model, "is_loaded_in_8bit", False)

    @property
    def layers(self) -> range:
        return range(len(self.loaded.anatomy.blocks))


@dataclass(frozen=True, slots=True)
class Apart:
    """How far two sets of factors are apart."""

    largest: float
    """Largest relative difference (Frobenius) of an x or a δ."""
    place: str
    rerouted: int
    """Prompts of which a token came to other experts; their factors are not compared."""
    prompts: int


def read_texts(config: RunConfig) -> list[Prompt]:
    """The first few prompts of the user's, or short texts of ours.

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
    """The prompts as the model is given them. Raises BacklensError when none can be used."""
    results = tokenize(
        texts,
        loaded.tokenizer,
        prepend_bos=config.prepend_bos,
        target_mode="first",
        context=context_length(loaded.model.config),
        rows=loaded.anatomy.rows,
        chat_template=config.chat_template,
    )
    examples = [result for result in results if isinstance(result, Example)]
    _refuse_none(examples, results, config.prompts or "prompts")
    ends = itertools.accumulate(len(example.token_ids) for example in examples)
    fitting = [example for example, end in zip(examples, ends, strict=True) if end <= MOST_TOKENS]
    return tuple(fitting or examples[:1])


@torch.no_grad()
def with_unlikely_targets(examples: Sequence[Example], loaded: LoadedModel) -> tuple[Example, ...]:
    """The prompts with the token that the model expects least."""
    tokens = torch.tensor(loaded.token_ids, device=loaded.device)
    ids = (torch.tensor([example.token_ids], device=loaded.model.device) for example in examples)
    logits = (loaded.model(input_ids=each, use_cache=False).logits[0, -1] for each in ids)
    least = [int(tokens[each[tokens].argmin()]) for each in logits]
    return tuple(replace(each, target_ids=(token,)) for each, token in zip(examples, least, strict=True))


def _refuse_none(good: Sequence[object], records: Sequence[object], source: str) -> None:
    if not good:
        problem = next((record.message for record in records if isinstance(record, Rejected)), None)
        raise BacklensError(problem or f"prompts: {source} holds no prompts")


def alone(trial: Trial) -> list[Factors]:
    """Every prompt's factors, each in a batch of its own."""
    return [factors for example in trial.probes for factors in _captured(trial, [example], "right")]


def together(trial: Trial, side: Side) -> list[Factors]:
    """Every prompt's factors, all of them in one batch, padded on one side."""
    return _captured(trial, trial.probes, side)


def _captured(trial: Trial, examples: Sequence[Example], side: Side) -> list[Factors]:
    batch = make_batch([sequence(example, "first") for example in examples], trial.loaded.model.device, side)
    found: list[dict[Place, tuple[Tensor, Tensor]]] = [{} for _ in examples]

    def keep(group: Sequence[Gradient]) -> None:
        for gradient in group:
            place = gradient.layer, gradient.module, gradient.expert
            slots = gradient.slots
            for prompt, own, x, vjp in zip(slots.prompts, slots.mask, gradient.x, gradient.vjp, strict=True):
                found[int(prompt)][place] = x[own].float().cpu(), vjp[own].float().cpu()

    capture(trial.loaded, batch, trial.layers, trial.loaded.anatomy.modules, keep)
    return [*found]


def apart(found: Sequence[Factors], expected: Sequence[Factors]) -> Apart:
    """The largest relative difference over all prompts and matrices."""
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
