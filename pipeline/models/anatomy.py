"""A loaded model's parts, found through its layout and checked to be complete."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import BacklensError
from pipeline.models.layout import LAYOUTS, Layout, Matrix


@dataclass(frozen=True)
class Anatomy:
    """The blocks' matrices, the final norm and the head of one model."""

    blocks: tuple[nn.Module, ...]
    matrices: Mapping[str, Matrix]
    """Module name (`mlp.up` …) → where it lives in every block."""
    embeddings: nn.Module
    final_norm: nn.Module
    head: nn.Module

    @property
    def unembedding(self) -> Tensor:
        """(vocabulary, d_model), the model's own parameter."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def d_model(self) -> int:
        return self.unembedding.shape[1]

    @property
    def vocabulary(self) -> int:
        return self.unembedding.shape[0]


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
    return Anatomy(blocks, layout.matrices, embeddings, _submodule(model, layout.final_norm, family), head)


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
