"""The plan of a run: its options applied to the model's configuration and the prompts, and its fingerprint.

It also says how large the weight matrices are whose gradients are computed, and how many tokens reach each.
"""

import hashlib
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from backlens import demo
from backlens.config import ResolvedConfig, RunConfig, parse_max_memory
from backlens.engine.worker import RunSetup
from backlens.errors import BacklensError
from backlens.models.blocks import (
    Block,
    Located,
    describe_blocks,
    expert_shape,
    layout_of,
    matrix_shape,
    misfits,
    modules_of,
    unproven_cuts,
)
from backlens.models.checkpoint import ModelSource, Proof, commit_of, pinned, refuse_pickle, weights_here
from backlens.models.device_map import DeviceMapOptions
from backlens.models.layout import read_layout
from backlens.models.load import empty_model, load_config, load_tokenizer, verify_checkpoint
from backlens.models.vocabulary import token_ids
from backlens.models.zero3 import Zero3, refuse_unpartitionable
from backlens.prompts.chat import chat_template
from backlens.prompts.read import Survey, survey
from backlens.rows import RowOptions
from backlens.store.directory import Directory
from backlens.store.run_record import FingerprintValue, ShardPlan
from backlens.terms import READS, parse_layers, parse_modules


@dataclass(frozen=True, slots=True)
class MatrixSize:
    """One module of one layer; for experts, all those of the layer together."""

    layer: int
    module: str
    wide: int
    """Width of the input."""
    high: int
    """Width of the output."""
    experts: int = 1
    chosen: int = 1
    """Experts per token."""
    routed: bool = False
    """True for the matrices of experts."""

    @property
    def neurons(self) -> int:
        return self.high if self.module in READS else self.wide

    @property
    def leads(self) -> bool:
        """False for gate, k and v: their inputs are those of up and q, and are projected once."""
        return self.module not in ("mlp.gate", "attn.k", "attn.v")

    def kept(self, neurons: int) -> int:
        """Return how many neurons of a matrix are kept when `neurons` are requested (−1: all)."""
        return self.neurons if neurons < 0 else min(neurons, self.neurons)

    def tokens(self, tokens: float) -> float:
        """Return the rows that this many tokens make: one per expert that a token is routed to."""
        return tokens * self.chosen

    def seen_by(self, tokens: float) -> float:
        """Return the expected number of matrices that a prompt of this many tokens reaches, with random routing."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** tokens)


def matrices_of(blocks: Sequence[Block], wanted: RowOptions, config: PretrainedConfig) -> list[MatrixSize]:
    """Return the matrices that the run computes."""
    return [
        size
        for layer in wanted.layers
        for size in _sizes(layer, blocks[layer], config)
        if size.module in wanted.modules
    ]


def every_matrix(blocks: Sequence[Block], config: PretrainedConfig) -> list[MatrixSize]:
    """Return all matrices of the model that have a module name."""
    return [size for layer, block in enumerate(blocks) for size in _sizes(layer, block, config)]


def neuron_facts(blocks: Sequence[Block], config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the neurons per module for `run.json`, with one entry for layers of equal numbers."""
    layers: dict[tuple[str, int | None, int], list[int]] = {}
    for size in every_matrix(blocks, config):
        key = (size.module, size.experts if size.routed else None, size.neurons)
        layers.setdefault(key, []).append(size.layer)
    return [
        {"module": module, "experts": experts, "neurons": neurons, "layers": own}
        for (module, experts, neurons), own in layers.items()
    ]


def _sizes(layer: int, block: Block, config: PretrainedConfig) -> Iterator[MatrixSize]:
    for module, located in block.matrices.items():
        found = matrix_shape(block.module.get_submodule(located.path))
        assert found is not None
        yield MatrixSize(layer, module, found[0], _part(found[1], located))
    if block.experts is not None:
        experts, chosen = block.experts.module, int(config.get_text_config().num_experts_per_tok)
        for module, located in block.experts.matrices.items():
            wide, high = expert_shape(experts, located.path)
            count = len(getattr(experts, located.path))
            yield MatrixSize(layer, module, wide, _part(high, located), count, chosen, True)


def _part(high: int, located: Located) -> int:
    return located.cut.width(high) if located.cut else high


MOST_SHARD_PROMPTS = 256
SHARD_ROWS = 1_000_000
"""Rows that a shard should not exceed by much: they stay in memory until they are written."""
CHARACTERS_PER_TOKEN = 3.5


@dataclass(frozen=True)
class RunPlan:
    """Everything that will run."""

    config: ResolvedConfig
    source: ModelSource
    model_config: PretrainedConfig
    survey: Survey
    shards: ShardPlan
    options: RowOptions
    blocks: tuple[Block, ...]
    """The model's blocks, without weights."""
    token_ids: tuple[int, ...] | None
    """The tokens in lists and ranks, ascending; None for every row of the unembedding."""
    norm_floor: float = 0.0
    """Length of a vector below which the final norm's bias leads its lists; 0 without a bias."""

    @property
    def rows(self) -> int:
        """Rows of the unembedding."""
        return int(self.model_config.vocab_size)

    @property
    def tokens(self) -> int:
        """Number of tokens in lists and ranks."""
        return self.rows if self.token_ids is None else len(self.token_ids)

    @property
    def model_facts(self) -> dict[str, Any]:
        config = self.model_config
        return {
            "name": self.source.path,
            "family": str(config.model_type),
            "layers": int(config.num_hidden_layers),
            "d_model": int(config.hidden_size),
            "vocabulary": self.rows,
            "tokens": self.tokens,
            "norm_floor": self.norm_floor,
            "revision": commit_of(self.source),
            "modules": list(self.options.modules),
            "not_covered": {path: what for block in self.blocks for path, what in block.not_covered.items()},
            "neurons": neuron_facts(self.blocks, config),
            "unproven_cuts": self.unproven_cuts,
        }

    @property
    def unproven_cuts(self) -> dict[str, str]:
        """Parts of fused matrices, by module, that --anatomy states and nothing proves."""
        cuts = unproven_cuts(self.source.layout, self.model_config)
        return {module: cut for module, cut in cuts.items() if module in self.options.modules}

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines about this model that a reader of the results should know."""
        said = []
        if self.unproven_cuts:
            cuts = ", ".join(f"{module} ({cut})" for module, cut in self.unproven_cuts.items())
            said.append(f"unproven parts of fused matrices, by --anatomy: {cuts}")
        if left_out := self.rows - self.tokens:
            said.append(
                f"{left_out:,} of the unembedding's {self.rows:,} rows are no tokens and in no list or rank "
                "(--vocabulary model keeps them)"
            )
        return tuple(said)

    def setup(self, directory: Directory, proof: Proof) -> RunSetup:
        """Return the setup of the workers; `proof` belongs to the model of this plan."""
        return RunSetup(
            model=pinned(self.source, proof),
            device_map=spread_of(self.config),
            zero3=zero3_of(self.config),
            options=self.options,
            scaling=self.config.scaling,
            vocabulary=self.config.vocabulary,
            prepend_bos=self.config.prepend_bos,
            chat_template=self.config.chat_template,
            batch_tokens=self.config.batch_tokens,
            on_error=self.config.on_error,
            directory=directory,
        )


def make_plan(config: RunConfig, assumed: Survey | None = None) -> RunPlan:
    """Plan a run: read the model's configuration and every prompt once, and load no weights.

    `assumed` replaces the prompts, of which none are read.

    Raises BacklensError if the model, the prompts, a layer or a module does not exist, and with `--on-error fail` if a
    prompt cannot be read.
    """
    config = config.with_demo_defaults()
    if assumed is None and is_pipe(config.prompts):
        raise BacklensError(
            f"--prompts {config.prompts}: a plan reads the prompts twice; write them to a file"
        )
    source = model_source(config)
    model_config = load_config(source)
    refuse_pickle(source)
    if weights_here(source):
        verify_checkpoint(source, model_config)
    if config.sharding == "zero3":
        refuse_unpartitionable(model_config, config.dtype)
    if config.chat_template:
        chat_template(load_tokenizer(source))
    layout = source.layout or layout_of(model_config)
    model = empty_model(source, model_config)
    blocks = describe_blocks(model, layout)
    problems = misfits(blocks, int(model_config.get_text_config().hidden_size))
    if problems:
        raise BacklensError(
            f"model: its description does not fit: {problems[0]}; `backlens doctor` lists them all"
        )
    options = RowOptions(
        layers=parse_layers(config.layers, int(model_config.num_hidden_layers)),
        modules=parse_modules(config.modules, modules_of(blocks)),
        positions=config.positions,
        top_k=config.top_k,
        target_mode=config.target_mode,
        neurons=config.neurons,
        save_factors=config.save_factors,
        screening=config.screening,
        activation_checkpointing=config.activation_checkpointing,
    )
    rows = int(model_config.vocab_size)
    # Assumed prompts need no tokenizer.
    chosen = (
        token_ids(load_tokenizer(source), rows) if config.vocabulary == "tokenizer" and not assumed else None
    )
    if config.top_k > (rows if chosen is None else len(chosen)):
        counted = (
            f"has {rows} tokens"
            if chosen is None
            else f"has {len(chosen)} tokens (--vocabulary model: {rows})"
        )
        raise BacklensError(f"--top-k {config.top_k}: the vocabulary {counted}")
    found = assumed or survey(config.prompts, config.format, config.prompt_fields, config.limit)
    if found.first_rejected is not None and config.on_error == "fail":
        raise BacklensError(f"{found.first_rejected.message} (--on-error fail)")
    if not found.prompts:
        raise BacklensError(f"prompts: {config.prompts} holds no prompts")
    size = config.shard_prompts or default_shard_prompts(
        found, options, matrices_of(blocks, options, model_config)
    )
    shards = ShardPlan(found.prompts, -(-found.prompts // size), size)
    floor = norm_floor(model, blocks) if config.scaling == "raw" else 0.0  # unit vectors are longer
    return RunPlan(config, source, model_config, found, shards, options, blocks, chosen, floor)


def norm_floor(model: PreTrainedModel, blocks: Sequence[Block]) -> float:
    """Return √(ε d): the final norm shrinks a shorter vector to less than 1/√2 of its size, but not its own bias.

    Without a bias behind the blocks the lists do not depend on the length, and the result is 0.
    """
    inside = {id(module) for block in blocks for module in block.module.modules()}
    behind = [module for module in model.modules() if id(module) not in inside]
    eps = [
        getattr(module, name)
        for module in behind
        for name in ("eps", "variance_epsilon", "epsilon")
        if isinstance(getattr(module, name, None), float)
    ]
    has_bias = any(isinstance(getattr(module, "bias", None), Tensor) for module in behind)
    return math.sqrt(eps[-1] * int(model.config.get_text_config().hidden_size)) if eps and has_bias else 0.0


def model_source(config: RunConfig) -> ModelSource:
    """Return the model that the options name, or the demo's, and how to load it."""
    return ModelSource(
        config.model or str(demo.MODEL),
        config.revision,
        config.dtype,
        config.attention,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        layout=read_layout(config.anatomy) if config.anatomy is not None else None,
    )


def is_pipe(path: str) -> bool:
    """Tell whether a path can be read only once: a pipe, a process substitution, a terminal."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def spread_of(config: RunConfig) -> DeviceMapOptions | None:
    """Return how a copy of the model is divided over devices; not in the fingerprint, as rows are equal."""
    if config.sharding != "accelerate":
        return None
    offload = os.path.abspath(config.offload) if config.offload is not None else None
    return DeviceMapOptions(parse_max_memory(config.max_memory), offload)


def zero3_of(config: RunConfig) -> Zero3 | None:
    """Return how a copy of the model is divided over processes; not in the fingerprint, as rows are equal."""
    return Zero3(config.ranks_per_replica, config.offload_to_cpu) if config.sharding == "zero3" else None


def fingerprint(plan: RunPlan, proof: Proof) -> dict[str, FingerprintValue]:
    """Return everything that changes results, in the words of the command line."""
    config = plan.config
    values: dict[str, FingerprintValue] = {
        "model": f"weights {proof.weights[:16]}",
        "tokenizer": proof.tokenizer[:16],
        "prompts": f"content {plan.survey.digest[:16]}",
        "number of prompts": plan.survey.prompts,
        "dtype": config.dtype,
        "attention": config.attention,
        "prepend-bos": config.prepend_bos,
        "target-mode": config.target_mode,
        "layers": ",".join(map(str, plan.options.layers)),
        "modules": ",".join(plan.options.modules),
        "positions": config.positions,
        "scaling": config.scaling,
        "vocabulary": config.vocabulary,
        "top-k": config.top_k,
        "neurons": config.neurons,
        "save-factors": config.save_factors,
        "shard-prompts": plan.shards.shard_prompts,
    }
    if plan.source.layout is not None:
        values["anatomy"] = hashlib.sha256(repr(plan.source.layout).encode()).hexdigest()[:16]
    if config.chat_template:
        values["chat-template"] = hashlib.sha256(
            chat_template(load_tokenizer(plan.source)).encode()
        ).hexdigest()[:16]
    return values


def default_shard_prompts(found: Survey, wanted: RowOptions, matrices: Sequence[MatrixSize]) -> int:
    """Return the prompts per shard, by the expected rows per prompt; depends on the input alone, as a resume must."""
    tokens = 1 + found.characters / CHARACTERS_PER_TOKEN / max(1, found.prompts - found.rejected)
    rows = sum(
        matrix.tokens(tokens) + matrix.seen_by(tokens) * matrix.kept(wanted.neurons) for matrix in matrices
    )
    return max(1, min(MOST_SHARD_PROMPTS, int(SHARD_ROWS / rows)))
