"""From one batch to rows: capture, factors, lens and projection, group by group as the backward pass arrives.

On GPUs that is done in a thread for each lens, beside the model's own: the pass goes on to the previous GPU's blocks
while this GPU projects. What waits to be projected takes the place of what the pass has freed by then: a Llama's
factors are two thirds of what autograd kept of its blocks. Where blocks are recomputed it keeps next to nothing, so
there each group is done where it arrives, and one GPU works at a time.

Rows leave as columns of NumPy arrays, one block per table, layer and module; nothing here knows Arrow or files.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.capture import Batch, Gradient, Outcome, Slots, capture, make_batch
from pipeline.engine.blocks import Block, Projections, Ragged
from pipeline.engine.device_threads import at_once, device_threads
from pipeline.factors import (
    Factors,
    Spectrum,
    factors_of,
    frobenius,
    gram,
    main_positions,
    neuron_norms,
    norms_of,
    spectrum,
)
from pipeline.lens import Lens
from pipeline.models.layout import READS
from pipeline.models.load import LoadedModel
from pipeline.projection import Selection, Vectors, extremes, project
from pipeline.prompts.tokenize import Example, TargetMode
from pipeline.screening import Precision

Positions = Literal["all", "last", "subject+last"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is computed of every prompt."""

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    positions: Positions = "all"
    top_k: int = 10
    target_mode: TargetMode = "first"
    neurons: int = 16
    """Neurons kept per prompt, layer and module, by gradient norm; −1 keeps all."""
    save_factors: bool = False


@dataclass(frozen=True)
class Extracted:
    """One batch's rows; `finite` is False for prompts whose numbers overflowed, whose rows mean nothing."""

    outcome: Outcome
    finite: Bool[Tensor, " prompt"]
    blocks: dict[str, list[Block]]
    seconds: dict[str, float]
    """By stage; together the time that the batch took. With several threads, those of the busiest."""


def extract(
    loaded: LoadedModel,
    lens: Lens,
    examples: Sequence[Example],
    wanted: Wanted,
    *,
    copies: Sequence[Lens] = (),
    screening: Precision = "float32",
    recompute: bool = False,
    threads: bool | None = None,
) -> Extracted:
    """Compute every row of a batch of prompts; `screening` as in `project`, `recompute` as in `capture`.

    `copies` are of the lens, on other devices, for what arises there; everything else is brought to `lens`. `threads`
    says whether to project beside the model's thread: by default on GPUs, unless blocks are recomputed.
    """
    batch = make_batch([sequence(example, wanted.target_mode) for example in examples], loaded.device)
    return extract_batch(
        loaded,
        lens,
        examples,
        batch,
        wanted,
        copies=copies,
        screening=screening,
        recompute=recompute,
        threads=threads,
    )


def sequence(example: Example, target_mode: TargetMode) -> tuple[Sequence[int], Sequence[int]]:
    """The prompt's ids and the target ids that the loss is taken over."""
    return example.token_ids, example.target_ids[:1] if target_mode == "first" else example.target_ids


@torch.no_grad()
def extract_batch(
    loaded: LoadedModel,
    lens: Lens,
    examples: Sequence[Example],
    batch: Batch,
    wanted: Wanted,
    *,
    copies: Sequence[Lens] = (),
    screening: Precision = "float32",
    recompute: bool = False,
    threads: bool | None = None,
) -> Extracted:
    """As `extract`, for a batch padded by the caller (either side)."""
    started = time.perf_counter()
    chosen = chosen_positions(examples, batch, wanted.positions)
    home = lens.unembedding.device
    extractions = {
        device: Extraction(each, batch.to(device), wanted, chosen.to(device), examples, screening)
        for device, each in ((each.unembedding.device, each) for each in (lens, *copies))
    }
    if threads is None:
        threads = home.type != "cpu" and not recompute
    with device_threads(extractions) if threads else nullcontext(at_once) as hand_over:

        def consume(gradients: Sequence[Gradient]) -> None:
            arisen = gradients[0].vjp.device
            device = arisen if arisen in extractions else home
            hand_over(device, partial(extractions[device].add, gradients))

        outcome = capture(
            loaded, batch, wanted.layers, wanted.modules, consume, recompute=recompute, scored=lens.scored
        )
    # In the order of the lenses and of each one's groups, whichever was done first.
    finite = outcome.loss.isfinite()
    blocks: defaultdict[str, list[Block]] = defaultdict(list)
    for extraction in extractions.values():
        finite &= extraction.finite.to(finite.device)
        for table, some in extraction.blocks.items():
            blocks[table] += some
    seconds = _seconds([each.seconds for each in extractions.values()], threads)
    seconds["model"] = time.perf_counter() - started - sum(seconds.values())
    return Extracted(outcome, finite, dict(blocks), seconds)


def _seconds(of_each: Sequence[Mapping[str, float]], side_by_side: bool) -> dict[str, float]:
    """Those of the busiest, or of one after the other."""
    if side_by_side:
        return dict(max(of_each, key=lambda seconds: sum(seconds.values())))
    stages = dict.fromkeys(stage for each in of_each for stage in each)
    return {stage: sum(each.get(stage, 0.0) for each in of_each) for stage in stages}


def chosen_positions(
    examples: Sequence[Example], batch: Batch, positions: Positions
) -> Bool[Tensor, "prompt position"]:
    if positions == "all":
        return batch.mask
    index = batch.mask.cumsum(-1) - 1
    chosen = torch.zeros_like(batch.mask)
    for row, example in enumerate(examples):
        chosen[row] |= index[row] == len(example.token_ids) - 1
        if (
            positions == "subject+last"
            and example.subject_start is not None
            and example.subject_end is not None
        ):
            chosen[row] |= (index[row] >= example.subject_start) & (index[row] < example.subject_end)
    return chosen & batch.mask


class Extraction:
    """Collects a batch's rows as groups of gradients arrive that one lens projects; in one thread at a time."""

    def __init__(
        self,
        lens: Lens,
        batch: Batch,
        wanted: Wanted,
        chosen: Bool[Tensor, "prompt position"],
        examples: Sequence[Example],
        screening: Precision,
    ) -> None:
        self.blocks: defaultdict[str, list[Block]] = defaultdict(list)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.finite = torch.ones(len(examples), dtype=torch.bool, device=batch.mask.device)
        self._lens = lens
        self._batch = batch
        self._wanted = wanted
        self._screening: Precision = screening
        self._chosen = chosen
        self._prompt_ids = torch.tensor([example.prompt.prompt_id for example in examples])
        self._every_token: dict[torch.device, _Tokens] = {}
        """By device: a model may be spread over several."""

    @torch.no_grad()
    def add(self, gradients: Sequence[Gradient]) -> None:
        """Consume the gradients of modules that share their residual side."""
        started = time.perf_counter()
        group = self._factor(gradients)
        factored = time.perf_counter()
        home = self._lens.unembedding.device
        own, mixed = project(
            group.vectors.to(home),
            self._lens,
            self._batch.targets[gradients[0].slots.prompts.to(home), 0],
            min(self._wanted.top_k, self._lens.vocabulary),
            precision=self._screening,
        )
        projected = time.perf_counter()
        self._emit(group, own, mixed)
        self.seconds["factors"] += factored - started
        self.seconds["lens"] += projected - factored
        self.seconds["rows"] += time.perf_counter() - projected

    def _tokens(self, slots: Slots, expert: int | None) -> "_Tokens":
        device = slots.mask.device
        if expert is None and device in self._every_token:
            return self._every_token[device]
        here = slots.to(self._batch.mask.device)
        prompts = here.prompts[:, None]
        positions = (self._batch.mask.cumsum(-1) - 1)[prompts, here.columns].clamp_min(0)
        tokens = _Tokens(
            slots=slots,
            chosen=(self._chosen[prompts, here.columns] & here.mask).to(device),
            positions=positions.to(device),
            token_ids=self._batch.input_ids[prompts, here.columns].to(device),
            prompt_ids=self._prompt_ids[slots.prompts.cpu()],
        )
        if expert is None:
            self._every_token[device] = tokens
        return tokens

    def _factor(self, gradients: Sequence[Gradient]) -> "_Group":
        slots, parts = gradients[0].slots, factors_of(gradients)
        for part in parts:
            self.finite[slots.prompts.to(self.finite.device)] &= part.finite.to(self.finite.device)
        residual = parts[0].residual
        residual_gram = gram(residual)
        norm = self._lens.norm
        centred_gram = gram(norm.centre(residual)) if norm.centred else residual_gram
        modules = [_Module.of(part, residual_gram, self._wanted.neurons) for part in parts]

        mixes_BKT = torch.cat([module.mixes for module in modules], dim=1)
        wide = mixes_BKT.double()
        mix_scale = self._lens.scale(_quadratic(wide, residual_gram), _quadratic(wide, centred_gram))
        squared = residual_gram.diagonal(dim1=-2, dim2=-1)
        scale = self._lens.scale(squared, centred_gram.diagonal(dim1=-2, dim2=-1))
        tokens = self._tokens(slots, gradients[0].expert)
        vectors = Vectors(
            residual=residual,
            scale=scale,
            wanted=tokens.chosen & (squared > 0),
            mixes=mixes_BKT,
            mix_scale=mix_scale,
            mix_wanted=torch.cat([module.mix_wanted for module in modules], dim=1),
        )
        return _Group(tokens, vectors, modules, residual_gram)

    def _emit(self, group: "_Group", own: Selection, mixed: Selection) -> None:
        token_projections = Projections.of(own, group.vectors.wanted[group.tokens.chosen])
        per_mix = Projections.of(mixed, group.vectors.mix_wanted.flatten())
        shape = group.vectors.mix_wanted.shape
        first = 0
        for module in group.modules:
            self._emit_tokens(module, group.tokens, token_projections)
            self._emit_layer(module, group.tokens, per_mix.of_mixes(shape, slice(first, first + 1)))
            neurons = module.neurons.shape[1]
            if neurons:
                projections = per_mix.of_mixes(shape, slice(first + 1, first + 1 + neurons))
                self._emit_neurons(module, group, projections)
            first += 1 + neurons

    def _emit_tokens(self, module: "_Module", tokens: "_Tokens", projections: Projections) -> None:
        factors, chosen = module.factors, tokens.chosen
        columns = {
            "prompt_id": tokens.prompt_ids.repeat_interleave(chosen.sum(-1).cpu()),
            "position": tokens.positions[chosen],
            "token_id": tokens.token_ids[chosen],
        }
        reads = factors.module in READS
        x_norms, vjp_norms = module.position_norms if reads else module.position_norms[::-1]
        norms = {"input_norm": x_norms[chosen], "vjp_norm": vjp_norms[chosen]}
        self.blocks["tokens"].append(self._block(module, columns | norms, projections))
        if self._wanted.save_factors:
            block = self._block(module, {name: columns[name] for name in ("prompt_id", "position")})
            block.lists.update(x=Ragged.of(factors.x[chosen]), delta=Ragged.of(factors.vjp[chosen]))
            self.blocks["factors"].append(block)

    def _emit_layer(self, module: "_Module", tokens: "_Tokens", projections: Projections) -> None:
        spectrum = module.spectrum
        columns = {"prompt_id": tokens.prompt_ids, "rank": spectrum.rank, "grad_norm": module.grad_norm}
        block = self._block(module, columns, projections)
        narrowest = min(module.factors.residual.shape[-1], module.factors.other.shape[-1])
        block.lists["singular_values"] = Ragged.of(spectrum.values, np.minimum(tokens.counts, narrowest))
        self.blocks["layers"].append(block)

    def _emit_neurons(self, module: "_Module", group: "_Group", projections: Projections) -> None:
        count = module.neurons.shape[1]
        main = main_positions(module.mixes[:, 1:], group.residual_gram)
        columns = {
            "prompt_id": group.tokens.prompt_ids.repeat_interleave(count),
            "neuron": module.neurons.flatten(),
            "grad_norm": module.neuron_norms.flatten(),
            "main_position": group.tokens.positions.gather(1, main).flatten(),
        }
        self.blocks["neurons"].append(self._block(module, columns, projections))

    @staticmethod
    def _block(
        module: "_Module", columns: dict[str, Tensor], projections: Projections | None = None
    ) -> Block:
        factors = module.factors
        arrays = {name: column.cpu().numpy() for name, column in columns.items()}
        return Block(factors.layer, factors.module, factors.expert, arrays, projections=projections)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """What the tables say of the tokens in some slots."""

    slots: Slots
    chosen: Bool[Tensor, "row slot"]
    """Tokens that get a row in `tokens`."""
    positions: Int[Tensor, "row slot"]
    """A column of a left-padded batch is not a position."""
    token_ids: Int[Tensor, "row slot"]
    prompt_ids: Int[Tensor, " row"]

    @property
    def counts(self) -> np.ndarray:
        return self.slots.mask.sum(-1).cpu().numpy()


@dataclass(frozen=True)
class _Module:
    """One module's share of a group: its statistics, and the mixes to project (leading direction, then neurons)."""

    factors: Factors
    spectrum: Spectrum
    grad_norm: Float[Tensor, " prompt"]
    position_norms: tuple[Float[Tensor, "prompt position"], Float[Tensor, "prompt position"]]
    """Lengths of the residual side's vectors, and of the other side's."""
    neurons: Int[Tensor, "prompt neuron"]
    neuron_norms: Float[Tensor, "prompt neuron"]
    mixes: Float[Tensor, "prompt mix position"]
    mix_wanted: Bool[Tensor, "prompt mix"]

    @classmethod
    def of(cls, factors: Factors, residual_gram: Tensor, kept: int) -> "_Module":
        wide = factors.other.double()
        other_gram = gram(wide)
        found = spectrum(factors, residual_gram, other_gram)
        width = factors.other.shape[-1]
        kept = width if kept < 0 else min(kept, width)
        neurons = torch.zeros(len(factors.other), 0, dtype=torch.long, device=factors.other.device)
        norms = neurons.float()
        mixes_BKT = found.leading[:, None]
        if kept:
            norms, neurons = extremes(neuron_norms(wide, residual_gram), kept, largest=True)
            index = neurons[:, None].expand(-1, factors.other.shape[1], -1)
            mixes_BKT = torch.cat([mixes_BKT, factors.other.gather(-1, index).mT], dim=1)
        mix_wanted = torch.cat([(found.values[:, :1] > 0), norms > 0], dim=1)
        grad_norm = frobenius(residual_gram, other_gram)
        position_norms = norms_of(residual_gram), norms_of(other_gram)
        return cls(factors, found, grad_norm, position_norms, neurons, norms, mixes_BKT, mix_wanted)


@dataclass(frozen=True)
class _Group:
    tokens: _Tokens
    vectors: Vectors
    modules: list[_Module]
    residual_gram: Float[Tensor, "prompt position position"]


def _quadratic(mixes_BKT: Tensor, gram_BTT: Tensor) -> Float[Tensor, "prompt mix"]:
    """a K aᵀ of every mix: the squared length of the mixed vector."""
    return ((mixes_BKT @ gram_BTT) * mixes_BKT).sum(-1).clamp_min(0)
