"""The sign of what an edit adds: that of its effect at the position it is made for, whatever gives the directions."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from pipeline.editing.closed_form import Memit, Rome
from pipeline.editing.covariance import Moments
from pipeline.editing.delta import Delta, merged
from pipeline.editing.explain import Added, explain
from pipeline.editing.forward_shift import ForwardShift
from pipeline.editing.gradient import FineTune, GradientShift
from pipeline.editing.method import Method
from pipeline.editing.request import Request
from pipeline.models.load import LoadedModel

LAYER = 5
CASES = range(5)


def methods(moments: Moments) -> dict[str, Method]:
    return {
        "forward-shift": ForwardShift((LAYER,), 1.6),
        "gradient-shift": GradientShift((LAYER,), 32.0, ("mlp.down",)),
        "finetune": FineTune((LAYER,)),
        "rome": Rome(LAYER, moments, place="last"),
        "memit": Memit((LAYER,), moments, place="last"),
    }


def added(loaded: LoadedModel, request: Request, deltas: Sequence[Delta], place: str = "last") -> Added:
    found = explain(loaded, request, {"it": deltas}, {"it": "subject" if place == "subject" else "last"})
    return found.added[0]


@pytest.mark.parametrize("name", ["forward-shift", "gradient-shift", "finetune", "rome", "memit"])
def test_the_new_target_is_added_and_not_taken_away(
    name: str, demo: LoadedModel, requests: list[Request], moments: Moments
) -> None:
    for case in CASES:
        found = added(demo, requests[case], methods(moments)[name](demo, requests[case]))
        assert requests[case].target_new in found.top, (case, found)
        assert requests[case].target_new not in found.bottom


def inputs(loaded: LoadedModel, request: Request, module: str) -> torch.Tensor:
    """What a module of the layer reads of the prompt, by a hook of our own."""
    block = loaded.anatomy.blocks[LAYER]
    kept: list[torch.Tensor] = []
    hook = block.module.get_submodule(block.matrices[module].path).register_forward_hook(
        lambda _module, args, _output: kept.append(args[0][0])
    )
    with torch.no_grad():
        loaded.model(torch.tensor([loaded.tokenizer(request.prompt)["input_ids"]]))
    hook.remove()
    return kept[0]


def listed(loaded: LoadedModel, vector: torch.Tensor) -> tuple[list[str], list[str]]:
    """The five tokens that the model's own norm and head score highest and lowest."""
    norm = loaded.anatomy.final_norm
    assert norm is not None
    with torch.no_grad():
        order = loaded.anatomy.head(norm(vector)).argsort(descending=True).tolist()
    texts = [str(loaded.tokenizer.decode([token])) for token in (*order[:5], *order[-5:])]
    return texts[:5], texts[:4:-1]


@pytest.mark.parametrize("module", ["mlp.down", "mlp.up"])
@pytest.mark.parametrize("position", ["last", "subject"])
def test_a_direction_has_the_sign_of_the_edited_positions_part_along_it(
    module: str, position: str, demo: LoadedModel, requests: list[Request]
) -> None:
    """For a matrix of full rank, given in factors that say nothing of it, and for its negative."""
    request = next(each for each in requests if each.subject)
    assert request.subject is not None
    x = inputs(demo, request, module)
    end = request.prompt.index(request.subject) + len(request.subject)
    place = (
        len(demo.tokenizer(request.prompt[:end])["input_ids"]) - 1 if position == "subject" else len(x) - 1
    )
    width = {"mlp.down": (x.shape[1], demo.anatomy.d_model), "mlp.up": (x.shape[1], 4 * x.shape[1])}[module]
    change = 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    for sign in (1.0, -1.0):
        if module == "mlp.down":
            part = float(x[place] @ (sign * change) @ right[0])
            direction = right[0]
        else:
            part, direction = float(x[place] @ left[:, 0]), left[:, 0]
        direction = values[0] * direction * (1 if part > 0 else -1)
        for delta in (Delta.full(LAYER, module, sign * change), _turned(sign * change, module)):
            found = added(demo, request, [delta], position)
            top, bottom = listed(demo, direction)
            assert list(found.top) == top
            assert list(found.bottom) == bottom


def _turned(change: torch.Tensor, module: str) -> Delta:
    """The same matrix in factors of other signs."""
    delta = Delta.full(LAYER, module, change)
    signs = torch.ones(len(delta.u), 1)
    signs[::3] = -1
    return replace(delta, u=delta.u * signs, v=delta.v * signs)


def test_a_change_of_rank_one_is_signed_alike(demo: LoadedModel, requests: list[Request]) -> None:
    (delta,) = merged(ForwardShift((LAYER,), 1.6)(demo, requests[0]))
    turned = replace(delta, u=-delta.u, v=-delta.v)
    assert added(demo, requests[0], [delta]) == added(demo, requests[0], [turned])
    away = replace(delta, v=-delta.v)
    assert requests[0].target_new in added(demo, requests[0], [away]).bottom
