"""A loaded model's parts, found through its layout and checked to be complete."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import BacklensError
from pipeline.models.layout import LAYOUTS, Cut, Layout


@dataclass(frozen=True, slots=True)
class Located:
    """Where a module is in every block of this model."""

    path: str
    cut: Cut | None
    """Its part of the submodule's output; None for all of it."""

    def part_of(self, output: Tensor) -> Tensor:
        return output if self.cut is None else self.cut(output)


@dataclass(frozen=True)
class Anatomy:
    """The blocks' matrices, and what turns the residual stream into logits."""

    blocks: tuple[nn.Module, ...]
    matrices: Mapping[str, Located]
    """By module name (`mlp.up` …)."""
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
    def vocabulary(self) -> int:
        return self.head_weight.shape[0]

    @property
    def head_weight(self) -> Tensor:
        """(vocabulary, width of the head's input), the model's own parameter."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of `model`.

    Raises BacklensError for a family without a layout, and when a block holds a matrix that the layout does not
    name: a table that silently left out part of the model would be worse than none.
    """
    family = str(model.config.model_type)
    layout = LAYOUTS.get(family)
    if layout is None:
        raise BacklensError(f"model: family '{family}' is not known (known: {', '.join(sorted(LAYOUTS))})")
    blocks = tuple(_submodule(model, layout.blocks, family).children())
    for index, block in enumerate(blocks):
        _check_complete(block, index, layout, family)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings is None or head is None:
        raise BacklensError(f"model: this {family} has no language-model head; load a causal language model")
    config = model.config
    return Anatomy(
        blocks=blocks,
        matrices={
            name: Located(matrix.path, matrix.cut(config) if matrix.cut else None)
            for name, matrix in layout.matrices.items()
        },
        embeddings=embeddings,
        final_norm=_optional(model, layout.final_norm, family),
        project_out=_optional(model, layout.project_out, family) if layout.project_out else None,
        head=head,
        d_model=int(config.hidden_size),
        logit_scale=layout.logit_scale(config) if layout.logit_scale else 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _optional(model: nn.Module, path: str, family: str) -> nn.Module | None:
    """A part that some models of a family leave out: OPT-350m has no final norm, the others no project_out."""
    parent, _, name = path.rpartition(".")
    if getattr(_submodule(model, parent, family), name, None) is None:
        return None
    return _submodule(model, path, family)


def _submodule(model: nn.Module, path: str, family: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise BacklensError(f"model: a {family} should have '{path}', this one does not ({error})") from error


def _check_complete(block: nn.Module, index: int, layout: Layout, family: str) -> None:
    known = {matrix.path for matrix in layout.matrices.values()}
    found = {name.rpartition(".")[0] for name, weight in block.named_parameters() if weight.ndim > 1}
    if found != known:
        missing, unknown = sorted(known - found), sorted(found - known)
        raise BacklensError(
            f"model: block {index} is not a {family} block as we know it"
            + (f"; it lacks {', '.join(missing)}" if missing else "")
            + (f"; it also has {', '.join(unknown)}, which no module name covers" if unknown else "")
        )
