"""A neuron's own weights: the vector of width d_model with which it reads the residual stream, or writes to it.

For y = x W of a module that reads (`mlp.up`, …) it is a column of W, of one that writes (`mlp.down`, `attn.o`) a row,
so every module's neurons come as (neuron, d_model), whichever way its weight is stored.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Conv1D

from pipeline.models.anatomy import Block
from pipeline.models.layout import READS
from pipeline.models.widths import widths


def neuron_weights(block: Block, module: str, expert: int | None) -> Float[Tensor, "neuron d_model"]:
    """Those of a whole module, or of one expert's, in the dtype in which they compute.

    Raises KeyError when the block has no such module.
    """
    if expert is None:
        located = block.matrices[module]
        matrix = _matrix(block.module.get_submodule(located.path))
    else:
        if block.experts is None:
            raise KeyError(module)
        located = block.experts.matrices[module]
        experts: Any = block.experts.module
        weight = getattr(experts, located.path)[expert]
        matrix = weight if experts.is_transposed else weight.mT
    part = located.part_of(matrix)
    return part.mT if module in READS else part


@torch.no_grad()
def _matrix(module: nn.Module) -> Float[Tensor, "d_in d_out"]:
    """W of y = x W + b."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_floating_point() and weight.ndim == 2:
        return weight if isinstance(module, Conv1D) else weight.mT
    # Packed into other types and shapes (8 and 4 bits), it is what the module makes of each unit vector.
    found = widths(module)
    assert found is not None
    bias = getattr(module, "bias", None)
    wide = bias.dtype if isinstance(bias, Tensor) else torch.float32
    output = module(torch.eye(found[0], device=weight.device, dtype=wide))
    return output - bias if isinstance(bias, Tensor) else output
