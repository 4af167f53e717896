"""The one interface of all methods: `method(model, request, …) -> deltas`, several requests being edited at once."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from backlens.editing.delta import Delta
from backlens.editing.request import Request
from backlens.models.load import LoadedModel


class Method(Protocol):
    """Computes the deltas that write all the requests into the model, which is left as it was."""

    def __call__(self, loaded: LoadedModel, *requests: Request) -> tuple[Delta, ...]: ...


def target_embeddings(loaded: LoadedModel, token_ids: Sequence[int]) -> Float[Tensor, "token d_model"]:
    """The head's rows of some tokens, in the width of the residual stream."""
    weight = loaded.parts.head_weight
    return _in_the_residual_stream(loaded, weight[torch.as_tensor(token_ids, device=weight.device)].float())


def expected_embeddings(
    loaded: LoadedModel, probabilities: Float[Tensor, "*place vocabulary"]
) -> Float[Tensor, "*place d_model"]:
    """The mean of the head's rows under some distributions over tokens."""
    weight = loaded.parts.head_weight.float()
    return _in_the_residual_stream(loaded, probabilities.to(weight.device) @ weight)


def _in_the_residual_stream(loaded: LoadedModel, rows: Tensor) -> Tensor:
    if loaded.parts.project_out is None:
        return rows
    weight = loaded.parts.project_out.weight
    assert isinstance(weight, Tensor)
    return rows @ weight.float()
