"""A model's parts: its blocks and their matrices, final norm and head, checked to be complete.

Also the shapes of the matrices, and whether a layout agrees with them.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D, PretrainedConfig, PreTrainedModel

from backlens.errors import BacklensError
from backlens.models.experts import expert_matrices
from backlens.models.layout import LAYOUTS, Cut, Layout
from backlens.models.module_tree import find_blocks, find_tail, full_shape, matrix_paths
from backlens.terms import MODULES, READS


@dataclass(frozen=True, slots=True)
class Located:
    """The place of a module in a block: a submodule (in experts, a 3-D weight), or a part of its output."""

    path: str
    cut: Cut | None
    """The module's part of the output; None for all of it."""

    def part_of(self, output: Tensor) -> Tensor:
        """Cut the module's part out of the submodule's output."""
        return output if self.cut is None else self.cut(output)


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block."""

    module: nn.Module
    matrices: Mapping[str, Located]
    """By module name; a path is the name of a 3-D weight of `module`."""


@dataclass(frozen=True)
class Block:
    """One block and its matrices."""

    module: nn.Module
    matrices: Mapping[str, Located]
    """Matrices that see every token, by module name (`mlp.up` …); those of a shared expert are among them."""
    experts: Experts | None
    not_covered: Mapping[str, str]
    """Paths of matrices without a module name, and what they are."""

    @property
    def modules(self) -> frozenset[str]:
        return frozenset((*self.matrices, *(self.experts.matrices if self.experts else ())))


@dataclass(frozen=True)
class ModelParts:
    """The blocks' matrices, and the parts that turn the residual stream into logits."""

    blocks: tuple[Block, ...]
    embeddings: nn.Module
    final_norm: nn.Module | None
    """None if the head reads the last block's output directly."""
    project_out: nn.Module | None
    """A linear map between the final norm and the head, if there is one."""
    head: nn.Module
    d_model: int
    logit_scale: float
    """Factor on the head's output."""
    softcap: float | None
    """The model's logits are softcap · tanh(logits / softcap); the lens leaves that out."""

    @property
    def modules(self) -> tuple[str, ...]:
        return modules_of(self.blocks)

    @property
    def vocabulary(self) -> int:
        return full_shape(self.head_weight)[0]

    @property
    def rows(self) -> int:
        """Upper bound of the token ids that the model can both read and predict."""
        embedded = getattr(self.embeddings, "weight", None)
        return min(
            self.vocabulary, full_shape(embedded)[0] if isinstance(embedded, Tensor) else self.vocabulary
        )

    @property
    def head_weight(self) -> Tensor:
        """The head's own parameter, (vocabulary, width of the head's input)."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight


def layout_of(config: PretrainedConfig) -> Layout:
    """Return the known layout of a model's family. Raises BacklensError when there is none."""
    family = str(config.model_type)
    layout = LAYOUTS.get(family)
    if layout is None:
        raise BacklensError(
            f"model: family '{family}' is not known (known: {', '.join(sorted(LAYOUTS))}); `backlens doctor --model …` "
            "prints a description of its blocks to edit and give as --anatomy"
        )
    return layout


def find_parts(model: PreTrainedModel, layout: Layout | None = None) -> ModelParts:
    """Find the parts of `model` by a layout, by default that of its family. Runs a few tokens through the model.

    Raises BacklensError for a family without a layout, and when a block holds a matrix that the layout does not
    name: no table may leave out part of the model without saying so.
    """
    config = model.config
    layout = layout or layout_of(config)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings is None or head is None:
        raise BacklensError(
            f"model: this {config.model_type} has no language-model head; load a causal language model"
        )
    blocks = describe_blocks(model, layout)
    tail = find_tail(model, [block.module for block in blocks], head)
    return ModelParts(
        blocks=blocks,
        embeddings=embeddings,
        final_norm=tail.final_norm,
        project_out=tail.project_out,
        head=head,
        d_model=int(config.get_text_config().hidden_size),
        logit_scale=layout.logit_scale_in(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def describe_blocks(model: PreTrainedModel, layout: Layout) -> tuple[Block, ...]:
    """Find every block's matrices by module name. The model may be on the meta device: no weight is read.

    Raises BacklensError when a block holds a matrix that the layout does not name, or none that it names.
    """
    return tuple(
        _describe(module, index, layout, model.config) for index, module in enumerate(find_blocks(model))
    )


def unproven_cuts(layout: Layout | None, config: PretrainedConfig) -> dict[str, str]:
    """Find the cuts of fused matrices, by module name, that a layout gives and that are not known of the family.

    No check finds a wrong cut: Xᵀ Δ of any part is that part of the fused matrix's gradient. The cuts of known families
    are compared with their own code (`tests/families.py`).
    """
    if layout is None:
        return {}
    known = _cuts(LAYOUTS[config.model_type], config) if config.model_type in LAYOUTS else []
    return {
        module: f"{cut} of {path}"
        for module, path, cut in _cuts(layout, config)
        if (module, path, cut) not in known
    }


def _cuts(layout: Layout, config: PretrainedConfig) -> list[tuple[str, str, Cut]]:
    matrices = [(name, matrix) for name in layout.matrices for matrix in layout.alternatives(name)]
    cuts = [(name, matrix.path, matrix.cut_in(config)) for name, matrix in matrices]
    return [(name, path, cut) for name, path, cut in cuts if cut is not None]


def modules_of(blocks: Collection[Block]) -> tuple[str, ...]:
    """Return the modules that any block has, in the order of MODULES."""
    there = {module for block in blocks for module in block.modules}
    return tuple(module for module in MODULES if module in there)


def _describe(block: nn.Module, index: int, layout: Layout, config: PretrainedConfig) -> Block:
    paths = matrix_paths(block)
    matrices = {
        name: Located(matrix.path, matrix.cut_in(config))
        for name in layout.matrices
        for matrix in layout.alternatives(name)
        if matrix.path in paths
    }
    experts = None
    if layout.experts is not None and layout.experts in paths:
        module = block.get_submodule(layout.experts)
        experts = Experts(module, {n: Located(*at) for n, at in expert_matrices(module).items()})
    not_covered = {path: what for path, what in layout.not_covered.items() if path in paths}
    known = {matrix.path for matrix in matrices.values()} | not_covered.keys() | {layout.experts}
    unknown = [path for path in paths if path not in known]
    if unknown or not (matrices or experts):
        raise BacklensError(_incomplete(index, unknown, str(config.model_type)))
    return Block(block, matrices, experts, not_covered)


def _incomplete(index: int, unknown: Collection[str], family: str) -> str:
    problem = f"model: block {index} of this {family} does not fit its layout"
    if unknown:
        problem += f": no module name covers its {', '.join(unknown)}"
    else:
        problem += ": it has none of the layout's matrices"
    return f"{problem}; `backlens doctor --model …` prints a description to edit and give as --anatomy"


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a module that multiplies by one matrix; None for tables, convolutions and others."""
    stated = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(stated[0], int) and isinstance(stated[1], int):
        return stated[0], stated[1]
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return None
    wide, high = weight.shape if isinstance(module, Conv1D) else weight.shape[::-1]
    return wide, high


def expert_shape(experts: Any, weight: str) -> tuple[int, int]:
    """Return (in, out) of one expert's matrix in a 3-D weight."""
    shape = getattr(experts, weight).shape
    return (shape[1], shape[2]) if experts.is_transposed else (shape[2], shape[1])


def misfits(blocks: Sequence[Block], d_model: int) -> list[str]:
    """List how the blocks' matrices contradict their layout, one line each; empty if they agree.

    Modules that read the residual stream have d_model inputs, those that write to it d_model outputs; and the parts of
    a fused matrix hold every column of its output exactly once.
    """
    return [
        f"block {index}: {problem}"
        for index, block in enumerate(blocks)
        for problem in _misfits(block, d_model)
    ]


def _misfits(block: Block, d_model: int) -> Iterator[str]:
    by_path: dict[str, dict[str, Located]] = {}
    for module, located in block.matrices.items():
        by_path.setdefault(located.path, {})[module] = located
    for path, modules in by_path.items():
        found = matrix_shape(block.module.get_submodule(path))
        if found is None:
            yield f"{path} is no matrix, and cannot be {', '.join(modules)}"
            continue
        parts = {module: _columns(located, found[1]) for module, located in modules.items()}
        undivided = [module for module, columns in parts.items() if columns is None]
        if undivided:
            yield f"{path}: its {found[1]} outputs do not divide into the groups and pieces of {', '.join(undivided)}"
            continue
        held = {module: columns for module, columns in parts.items() if columns is not None}
        yield from _uncovered(path, found[1], held, path in block.not_covered)
        for module, columns in held.items():
            width = found[0] if module in READS else len(columns)
            if width != d_model:
                side = "reads" if module in READS else "writes"
                yield f"{module} ({path}) {side} a width of {width}, and the model's is {d_model}"


def _columns(located: Located, high: int) -> list[int] | None:
    """Return the module's columns in a fused output; None if the cut does not divide it."""
    if located.cut is not None and high % (located.cut.groups * located.cut.pieces):
        return None
    return located.part_of(torch.arange(high)).tolist()


def _uncovered(path: str, high: int, held: dict[str, list[int]], rest_is_stated: bool) -> Iterator[str]:
    times = Counter(column for columns in held.values() for column in columns)
    twice = sum(count > 1 for count in times.values())
    names = ", ".join(held)
    if twice:
        yield f"{path}: {twice} of its {high} outputs are in more than one of {names}"
    if len(times) < high and not rest_is_stated:
        yield f"{path}: {high - len(times)} of its {high} outputs are in none of {names}"
