"""Rows of one batch: capture, factors, lens and projection, group by group as the backward pass arrives.

On GPUs each lens has a thread of its own beside the model's: the backward pass goes on to the previous GPU's blocks
while this GPU projects. Factors that wait to be projected replace what the pass has freed by then: a Llama's factors
are two thirds of what autograd kept of its blocks. Under activation checkpointing autograd keeps next to nothing, so
each group is projected at once, and one GPU works at a time.

Rows are columns of NumPy arrays, one `MatrixRows` per table and weight matrix; `columns.py` turns them into Arrow.
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

from backlens.capture.batch import Batch, Slots
from backlens.capture.factors import (
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
from backlens.capture.hooks import Gradient, capture
from backlens.capture.loss import NLL, LossFunction
from backlens.columns import BatchRows, MatrixRows, Projections, Ragged
from backlens.models.load import LoadedModel
from backlens.projection.lens import Lens
from backlens.projection.project import TopK, Vectors, project
from backlens.projection.scores import Screening
from backlens.projection.threads import at_once, device_threads
from backlens.projection.topk import extremes
from backlens.prompts.tokenize import Example, TargetMode
from backlens.terms import READS

Positions = Literal["all", "last", "subject+last"]


@dataclass(frozen=True, slots=True)
class RowOptions:
    """The rows of a prompt, and how they are computed; all but `loss` are flags of `backlens run` by these names."""

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    positions: Positions = "all"
    top_k: int = 10
    target_mode: TargetMode = "first"
    loss: LossFunction = NLL
    neurons: int = 16
    """Neurons per prompt, layer and module, by gradient norm; −1 for all."""
    save_factors: bool = False
    screening: Screening = "float32"
    """Type of the products that pick tokens to be scored exactly; lists and ranks do not depend on it."""
    activation_checkpointing: bool = False
    """Keep only the blocks' inputs in the forward pass, and compute each block again in the backward pass."""


def sequence(example: Example, target_mode: TargetMode) -> tuple[Sequence[int], Sequence[int]]:
    """Return the prompt's token ids, and the target ids that the loss is taken over."""
    return example.token_ids, example.target_ids[:1] if target_mode == "first" else example.target_ids


@torch.no_grad()
def batch_rows(
    loaded: LoadedModel,
    lenses: Sequence[Lens],
    examples: Sequence[Example],
    batch: Batch,
    options: RowOptions,
    *,
    threads: bool | None = None,
) -> BatchRows:
    """Compute every row of a padded batch.

    The first lens is the model's own; the others are its copies on further devices, for the vectors of these devices.
    Vectors of a device without a lens go to the first one. With `threads`, each lens projects in a thread beside the
    model's: by default on GPUs, unless activations are checkpointed.
    """
    started = time.perf_counter()
    chosen = chosen_positions(examples, batch, options.positions)
    home = lenses[0].unembedding.device
    collectors = {
        device: RowCollector(lens, batch.to(device), options, chosen.to(device), examples)
        for device, lens in ((lens.unembedding.device, lens) for lens in lenses)
    }
    if threads is None:
        threads = home.type != "cpu" and not options.activation_checkpointing
    with device_threads(collectors) if threads else nullcontext(at_once) as hand_over:

        def consume(gradients: Sequence[Gradient]) -> None:
            device = gradients[0].vjp.device
            device = device if device in collectors else home
            hand_over(device, partial(collectors[device].add, gradients))

        outcome = capture(
            loaded,
            batch,
            options.layers,
            options.modules,
            consume,
            loss=options.loss,
            activation_checkpointing=options.activation_checkpointing,
            scored=lenses[0].scored,
        )
    # Rows are in the order of the lenses and of each one's groups, whichever finished first.
    finite = outcome.loss.isfinite()
    blocks: defaultdict[str, list[MatrixRows]] = defaultdict(list)
    for collector in collectors.values():
        finite &= collector.finite.to(finite.device)
        for table, some in collector.blocks.items():
            blocks[table] += some
    seconds = _seconds([each.seconds for each in collectors.values()], threads)
    seconds["model"] = time.perf_counter() - started - sum(seconds.values())
    return BatchRows(outcome, finite, dict(blocks), seconds)


def _seconds(of_each: Sequence[Mapping[str, float]], threads: bool) -> dict[str, float]:
    """Return the seconds of the busiest thread, or the sums of collectors that worked one after the other."""
    if threads:
        return dict(max(of_each, key=lambda seconds: sum(seconds.values())))
    stages = dict.fromkeys(stage for each in of_each for stage in each)
    return {stage: sum(each.get(stage, 0.0) for each in of_each) for stage in stages}


def chosen_positions(
    examples: Sequence[Example], batch: Batch, positions: Positions
) -> Bool[Tensor, "prompt position"]:
    """Find the tokens of a batch that get a row in `tokens`."""
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


class RowCollector:
    """Makes a batch's rows of the gradients that one lens projects; runs in one thread at a time."""

    def __init__(
        self,
        lens: Lens,
        batch: Batch,
        options: RowOptions,
        chosen: Bool[Tensor, "prompt position"],
        examples: Sequence[Example],
    ) -> None:
        self.blocks: defaultdict[str, list[MatrixRows]] = defaultdict(list)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.finite = torch.ones(len(examples), dtype=torch.bool, device=batch.mask.device)
        self._lens = lens
        self._batch = batch
        self._options = options
        self._chosen = chosen
        self._prompt_ids = torch.tensor([example.prompt.prompt_id for example in examples])
        self._every_token: dict[torch.device, _Tokens] = {}
        """By device: a model may lie on several."""

    @torch.no_grad()
    def add(self, gradients: Sequence[Gradient]) -> None:
        """Add the rows of gradients that share their input."""
        started = time.perf_counter()
        group = self._factor(gradients)
        factored = time.perf_counter()
        home = self._lens.unembedding.device
        own, mixed = project(
            group.vectors.to(home),
            self._lens,
            self._batch.targets[gradients[0].slots.prompts.to(home), 0],
            min(self._options.top_k, self._lens.vocabulary),
            screening=self._options.screening,
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
        mapped = self._lens.basis(residual, gradients[0].layer)
        mapped_gram = residual_gram if mapped is residual else gram(mapped)
        centred_gram = gram(norm.centre(mapped)) if norm.centred else mapped_gram
        modules = [_Module.of(part, residual_gram, self._options.neurons) for part in parts]

        mixes_BKT = torch.cat([module.mixes for module in modules], dim=1)
        wide = mixes_BKT.double()
        mix_squared = _quadratic(wide, mapped_gram)
        mix_scale = self._lens.scale(mix_squared, _quadratic(wide, centred_gram))
        mix_wanted = torch.cat([module.mix_wanted for module in modules], dim=1)
        if mapped is not residual:  # a basis may map a vector to zero
            mix_wanted &= mix_squared > 0
        squared = mapped_gram.diagonal(dim1=-2, dim2=-1)
        scale = self._lens.scale(squared, centred_gram.diagonal(dim1=-2, dim2=-1))
        tokens = self._tokens(slots, gradients[0].expert)
        vectors = Vectors(
            residual=mapped,
            scale=scale,
            wanted=tokens.chosen & (squared > 0),
            mixes=mixes_BKT,
            mix_scale=mix_scale,
            mix_wanted=mix_wanted,
        )
        return _Group(tokens, vectors, modules, residual_gram)

    def _emit(self, group: "_Group", own: TopK, mixed: TopK) -> None:
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
        if self._options.save_factors:
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
    ) -> MatrixRows:
        factors = module.factors
        arrays = {name: column.cpu().numpy() for name, column in columns.items()}
        return MatrixRows(factors.layer, factors.module, factors.expert, arrays, projections=projections)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Columns of the tokens in some slots."""

    slots: Slots
    chosen: Bool[Tensor, "row slot"]
    """Tokens that get a row in `tokens`."""
    positions: Int[Tensor, "row slot"]
    """Positions in the prompts; padding is not counted."""
    token_ids: Int[Tensor, "row slot"]
    prompt_ids: Int[Tensor, " row"]

    @property
    def counts(self) -> np.ndarray:
        """Number of tokens per prompt."""
        return self.slots.mask.sum(-1).cpu().numpy()


@dataclass(frozen=True)
class _Module:
    """One module of a group: its statistics, and the mixes to project (leading direction, then neurons)."""

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
    def of(cls, factors: Factors, residual_gram: Tensor, neurons: int) -> "_Module":
        wide = factors.other.double()
        other_gram = gram(wide)
        found = spectrum(factors, residual_gram, other_gram)
        width = factors.other.shape[-1]
        count = width if neurons < 0 else min(neurons, width)
        indices = torch.zeros(len(factors.other), 0, dtype=torch.long, device=factors.other.device)
        norms = indices.float()
        mixes_BKT = found.leading[:, None]
        if count:
            norms, indices = extremes(neuron_norms(wide, residual_gram), count, largest=True)
            index = indices[:, None].expand(-1, factors.other.shape[1], -1)
            mixes_BKT = torch.cat([mixes_BKT, factors.other.gather(-1, index).mT], dim=1)
        mix_wanted = torch.cat([(found.values[:, :1] > 0), norms > 0], dim=1)
        grad_norm = frobenius(residual_gram, other_gram)
        position_norms = norms_of(residual_gram), norms_of(other_gram)
        return cls(factors, found, grad_norm, position_norms, indices, norms, mixes_BKT, mix_wanted)


@dataclass(frozen=True)
class _Group:
    tokens: _Tokens
    vectors: Vectors
    modules: list[_Module]
    residual_gram: Float[Tensor, "prompt position position"]


def _quadratic(mixes_BKT: Tensor, gram_BTT: Tensor) -> Float[Tensor, "prompt mix"]:
    """Compute a K aᵀ of every mix a: the squared length of the mixed vector."""
    return ((mixes_BKT @ gram_BTT) * mixes_BKT).sum(-1).clamp_min(0)
