"""A configuration resolved against the model's configuration and the prompts: what will run, and its fingerprint."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.config import RunConfig, parse_max_memory
from pipeline.engine.extract import Wanted
from pipeline.engine.sizes import MatrixSize, matrices_of, neuron_facts
from pipeline.engine.worker import Job
from pipeline.errors import BacklensError, nearest
from pipeline.models.anatomy import Block, describe_blocks, layout_of, modules_of, unproven_cuts
from pipeline.models.checkpoint import ModelSource, Proof, commit_of, pinned, refuse_pickle, weights_here
from pipeline.models.layout import MODULES
from pipeline.models.layout_file import read_layout
from pipeline.models.load import empty_model, load_config, load_tokenizer, verify_checkpoint
from pipeline.models.spread import Spread
from pipeline.models.vocabulary import token_ids
from pipeline.models.widths import misfits
from pipeline.models.zero3 import Zero3, refuse_unpartitionable
from pipeline.prompts.survey import Survey, survey
from pipeline.prompts.written import chat_template
from pipeline.store.files import Directory
from pipeline.store.rundir import FingerprintValue
from pipeline.store.rundir import Plan as ShardPlan

MOST_SHARD_PROMPTS = 256
SHARD_ROWS = 1_000_000
"""Rows that a shard should not exceed by much: they are held in memory until they are written."""
CHARACTERS_PER_TOKEN = 3.5


@dataclass(frozen=True)
class RunPlan:
    """What a configuration comes to."""

    config: RunConfig
    source: ModelSource
    model_config: PretrainedConfig
    survey: Survey
    shards: ShardPlan
    wanted: Wanted
    blocks: tuple[Block, ...]
    """The model's blocks, without weights."""
    token_ids: tuple[int, ...] | None
    """The tokens in lists and ranks, ascending; None for every row of the unembedding."""

    norm_floor: float = 0.0
    """The length below which a vector's lists are led by the final norm's bias; 0 if it has none."""

    @property
    def rows(self) -> int:
        """Of the unembedding."""
        return int(self.model_config.vocab_size)

    @property
    def tokens(self) -> int:
        """How many are in lists and ranks."""
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
            "modules": list(self.wanted.modules),
            "not_covered": {path: what for block in self.blocks for path, what in block.not_covered.items()},
            "neurons": neuron_facts(self.blocks, config),
            "unproven_cuts": self.unproven_cuts,
        }

    @property
    def unproven_cuts(self) -> dict[str, str]:
        """By module that is asked for, the parts of fused matrices that --anatomy gives and nothing proves."""
        cuts = unproven_cuts(self.source.layout, self.model_config)
        return {module: cut for module, cut in cuts.items() if module in self.wanted.modules}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader of the results should know of this model, a line each."""
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

    def job(self, directory: Directory, proof: Proof) -> Job:
        """What every worker is told; `proof` is of the model that the plan was made for."""
        return Job(
            model=pinned(self.source, proof),
            spread=spread_of(self.config),
            zero3=zero3_of(self.config),
            wanted=self.wanted,
            scaling=self.config.scaling,
            vocabulary=self.config.vocabulary,
            prepend_bos=self.config.prepend_bos,
            chat_template=self.config.chat_template,
            screening=self.config.screening,
            batch_tokens=self.config.batch_tokens,
            activation_checkpointing=self.config.activation_checkpointing,
            on_error=self.config.on_error,
            directory=directory,
        )


def make_plan(config: RunConfig, assumed: Survey | None = None) -> RunPlan:
    """Resolve `config`: reads the model's configuration and every prompt once, loads no weights.

    With `assumed`, prompts are as it says and none are read.

    Raises BacklensError when model, prompts, layers or modules are not to be had, or, with `--on-error fail`,
    when a prompt cannot be read.
    """
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
    wanted = Wanted(
        layers=parse_layers(config.layers, int(model_config.num_hidden_layers)),
        modules=parse_modules(config.modules, modules_of(blocks)),
        positions=config.positions,
        top_k=config.top_k,
        target_mode=config.target_mode,
        neurons=config.neurons,
        save_factors=config.save_factors,
    )
    rows = int(model_config.vocab_size)
    # Prompts that are only assumed need no tokenizer.
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
    found = assumed or _survey(config)
    if found.first_rejected is not None and config.on_error == "fail":
        raise BacklensError(f"{found.first_rejected.message} (--on-error fail)")
    if not found.prompts:
        raise BacklensError(f"prompts: {config.prompts} holds no prompts")
    size = config.shard_prompts or default_shard_prompts(
        found, wanted, matrices_of(blocks, wanted, model_config)
    )
    shards = ShardPlan(found.prompts, -(-found.prompts // size), size)
    floor = norm_floor(model, blocks) if config.scaling == "raw" else 0.0  # a unit vector is long enough
    return RunPlan(config, source, model_config, found, shards, wanted, blocks, chosen, floor)


def norm_floor(model: PreTrainedModel, blocks: Sequence[Block]) -> float:
    """sqrt(ε d): a shorter vector reaches the logits at less than 1/√2 of its size, the final norm's bias at all of it.

    Without any bias behind the blocks there is none to lead the lists, which then do not depend on the length.
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


def _survey(config: RunConfig) -> Survey:
    assert config.prompts is not None
    return survey(config.prompts, config.format, config.prompt_fields, config.limit)


def model_source(config: RunConfig) -> ModelSource:
    """Which model a configuration names, and how to load it."""
    assert config.model is not None
    return ModelSource(
        config.model,
        config.revision,
        config.dtype,
        config.attention,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        layout=read_layout(config.anatomy) if config.anatomy is not None else None,
    )


def spread_of(config: RunConfig) -> Spread | None:
    """How a copy of the model is to be spread over devices. No part of the fingerprint: rows are the same."""
    if config.sharding != "accelerate":
        return None
    offload = os.path.abspath(config.offload) if config.offload is not None else None
    return Spread(parse_max_memory(config.max_memory), offload)


def zero3_of(config: RunConfig) -> Zero3 | None:
    """Over how many processes a copy of the model is to be partitioned. No part of the fingerprint either."""
    return Zero3(config.ranks_per_replica, config.offload_to_cpu) if config.sharding == "zero3" else None


def fingerprint(plan: RunPlan, proof: Proof) -> dict[str, FingerprintValue]:
    """Everything that changes results, in the words of the command line."""
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
        "layers": ",".join(map(str, plan.wanted.layers)),
        "modules": ",".join(plan.wanted.modules),
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


def default_shard_prompts(found: Survey, wanted: Wanted, matrices: Sequence[MatrixSize]) -> int:
    """By the rows that a prompt is expected to make; a function of the input alone, so that a resume agrees."""
    tokens = 1 + found.characters / CHARACTERS_PER_TOKEN / max(1, found.prompts - found.rejected)
    rows = sum(
        matrix.tokens(tokens) + matrix.seen_by(tokens) * matrix.kept(wanted.neurons) for matrix in matrices
    )
    return max(1, min(MOST_SHARD_PROMPTS, int(SHARD_ROWS / rows)))


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """`all`, or indices and ranges such as `0-5,11`, in ascending order."""
    if text.strip() == "all":
        return tuple(range(count))
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise BacklensError(f'--layers "{text}": \'{part}\' is no layer; write "all" or e.g. "0-5,11"')
        start, stop = int(first), int(last if dash else first)
        if start > stop or stop >= count:
            raise BacklensError(f'--layers "{text}": the model has layers 0 to {count - 1}')
        chosen.update(range(start, stop + 1))
    return tuple(sorted(chosen))


def parse_modules(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """`mlp`, `attn`, `all`, or names of modules, in the order of MODULES."""
    chosen: set[str] = set()
    for part in map(str.strip, text.split(",")):
        matching = [name for name in known if part in ("all", name, name.partition(".")[0])]
        if not matching:
            raise BacklensError(
                f"--modules \"{text}\": no module '{part}' (there are {', '.join(known)}){nearest(part, known)}"
            )
        chosen.update(matching)
    return tuple(name for name in MODULES if name in chosen)
