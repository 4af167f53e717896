"""Rows of the tables as columns of NumPy arrays, one block per table, layer and module: what `extract.py` makes and
`columns.py` turns into Arrow."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.projection import Selection


@dataclass(frozen=True)
class Projections:
    """Projection columns of a block's rows: a selection for the valid rows, nulls for the others."""

    valid: np.ndarray
    top_ids: np.ndarray
    top_scores: np.ndarray
    bottom_ids: np.ndarray
    bottom_scores: np.ndarray
    target_score: np.ndarray
    target_rank: np.ndarray

    @classmethod
    def of(cls, selection: Selection, valid: Bool[Tensor, " row"]) -> "Projections":
        columns = {name: getattr(selection, name).cpu().numpy() for name in Selection.__dataclass_fields__}
        return cls(valid=valid.cpu().numpy(), **columns)

    def of_mixes(self, shape: torch.Size, mixes: slice) -> "Projections":
        """The rows of some of every prompt's mixes, out of rows laid out (prompt, mix)."""
        keep = np.zeros(shape, dtype=bool)
        keep[:, mixes] = True
        flat = keep.ravel()
        kept = flat[self.valid]
        columns = {
            name: getattr(self, name)[kept] for name in Projections.__dataclass_fields__ if name != "valid"
        }
        return Projections(valid=self.valid[flat], **columns)


@dataclass(frozen=True)
class Ragged:
    """A list per row: every row's values end to end, and how many each row has."""

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, values: Float[Tensor, "row value"], lengths: np.ndarray | None = None) -> "Ragged":
        """The first `lengths[i]` values of row i; the whole rows when no lengths are given."""
        array = values.cpu().numpy()
        if lengths is None:
            lengths = np.full(len(array), array.shape[1])
        return cls(array[np.arange(array.shape[1]) < lengths[:, None]], lengths)


@dataclass(frozen=True)
class Block:
    """Rows of one table for one weight matrix: plain columns, then lists, then projection columns."""

    layer: int
    module: str
    expert: int | None
    columns: dict[str, np.ndarray]
    lists: dict[str, Ragged] = field(default_factory=dict)
    projections: Projections | None = None
