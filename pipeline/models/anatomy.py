"""A loaded model's parts: found by structure and by its layout, and checked to be complete."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.errors import BacklensError
from pipeline.models.experts import expert_matrices
from pipeline.models.layout import LAYOUTS, MODULES, Cut, Layout
from pipeline.models.structure import find_blocks, find_tail, full_shape, matrix_paths


@dataclass(frozen=True, slots=True)
class Located:
    """Where a module is in a block: a submodule (or, in experts, a 3-D weight), or a part of its output."""

    path: str
    cut: Cut | None
    """Its part of the output; None for all of it."""

    def part_of(self, output: Tensor) -> Tensor:
        return output if self.cut is None else self.cut(output)


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block."""

    module: nn.Module
    matrices: Mapping[str, Located]
    """By module name; paths are names of 3-D weights of `module`."""


@dataclass(frozen=True)
class Block:
    """One block and its matrices."""

    module: nn.Module
    matrices: Mapping[str, Located]
    """By module name (`mlp.up` …): those that see every token. A shared expert's are among them."""
    experts: Experts | None
    not_covered: Mapping[str, str]
    """Paths of matrices that no module name stands for, and what they are."""

    @property
    def modules(self) -> frozenset[str]:
        return frozenset((*self.matrices, *(self.experts.matrices if self.experts else ())))


@dataclass(frozen=True)
class Anatomy:
    """The blocks' matrices, and what turns the residual stream into logits."""

    blocks: tuple[Block, ...]
    embeddings: nn.Module
    final_norm: nn.Module | None
    """None where the head reads the last block's output as it is."""
    project_out: nn.Module | None
    """A linear map between the final norm and the head."""
    head: nn.Module
    d_model: int
    logit_scale: float
    """What the head's output is multiplied by."""
    softcap: float | None
    """The model's logits are softcap · tanh(logits / softcap); the lens is before that."""

    @property
    def modules(self) -> tuple[str, ...]:
        return modules_of(self.blocks)

    @property
    def vocabulary(self) -> int:
        return full_shape(self.head_weight)[0]

    @property
    def rows(self) -> int:
        """Token ids that the model can both read and predict are below this."""
        embedded = getattr(self.embeddings, "weight", None)
        return min(
            self.vocabulary, full_shape(embedded)[0] if isinstance(embedded, Tensor) else self.vocabulary
        )

    @property
    def head_weight(self) -> Tensor:
        """(vocabulary, width of the head's input), the model's own parameter."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight


def layout_of(config: PretrainedConfig) -> Layout:
    """The layout known for a model's family. Raises BacklensError when there is none."""
    family = str(config.model_type)
    layout = LAYOUTS.get(family)
    if layout is None:
        raise BacklensError(
            f"model: family '{family}' is not known (known: {', '.join(sorted(LAYOUTS))}); `backlens doctor --model …` "
            "prints a description of its blocks to edit and give as --anatomy"
        )
    return layout


def anatomy(model: PreTrainedModel, layout: Layout | None = None) -> Anatomy:
    """Find the parts of `model`, by the layout of its family unless one is given; runs a few tokens through it.

    Raises BacklensError for a family without a layout, and when a block holds a matrix that the layout does not
    name: a table that silently left out part of the model would be worse than none.
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
    return Anatomy(
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
    """Every block's matrices by module name. Weights are not looked at: a model on the meta device will do.

    Raises BacklensError when a block holds a matrix that the layout does not name, or none that it does.
    """
    return tuple(
        _describe(module, index, layout, model.config) for index, module in enumerate(find_blocks(model))
    )


def unproven_cuts(layout: Layout | None, config: PretrainedConfig) -> dict[str, str]:
    """By module name, the cuts of fused matrices that a description gives and that are not known of the family.

    No check tells a wrong cut: the parts' Xᵀ Δ are parts of the fused matrix's gradient whichever they are. Those of
    known families are compared with their own code (`tests/families.py`).
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
    """The modules that any block has, in the order of MODULES."""
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
    problem = f"model: block {index} of this {family} is not as we know it"
    if unknown:
        problem += f": no module name covers its {', '.join(unknown)}"
    else:
        problem += ": it has none of the matrices that we know"
    return f"{problem}; `backlens doctor --model …` prints a description to edit and give as --anatomy"
