"""Why an edit works: what it adds, in tokens; where it acts; and how it lies to the gradient and to other edits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.editing.delta import Delta, merged
from pipeline.editing.forward import down_input, subject_last, values_at, wordings
from pipeline.editing.gradient import gradients
from pipeline.editing.options import Place
from pipeline.editing.request import Request
from pipeline.lens import Lens, make_lens
from pipeline.models.layout import WRITES
from pipeline.models.load import LoadedModel
from pipeline.models.vocabulary import vocabulary

TOKENS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Added:
    """One change through the lens: the leading direction of its residual side, with the sign it has in what the edit
    adds at the position that it is made for."""

    method: str
    layer: int
    module: str
    norm: float
    top: tuple[str, ...]
    bottom: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cosine:
    """⟨A, B⟩ / (‖A‖ ‖B‖) over all entries of two changes of one matrix."""

    method: str
    layer: int
    module: str
    other: str
    cosine: float


@dataclass(frozen=True, slots=True)
class Explanation:
    added: tuple[Added, ...]
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    """The prompt's."""
    norms: tuple[tuple[float, ...], ...]
    """By position and layer: the length of what the first method adds to FF2's output there."""
    cosines: tuple[Cosine, ...]


def explain(
    loaded: LoadedModel,
    request: Request,
    deltas: Mapping[str, Sequence[Delta]],
    places: Mapping[str, Place] | None = None,
) -> Explanation:
    """Explain the first of several methods' deltas for one request; the others stand beside it.

    `places` says by method which position the edit is made for: the prompt's last unless it is said.
    """
    lens = make_lens(loaded.anatomy, "raw", loaded.token_ids)
    texts, _ = vocabulary(loaded.tokenizer, loaded.anatomy.vocabulary)
    first = next(iter(deltas))
    (example,) = wordings(loaded, request, ("",))
    of = {name: merged(each) for name, each in deltas.items()}
    layers = tuple(sorted({delta.layer for delta in of[first] if delta.module in WRITES}))
    sequence = [(example.token_ids, example.target_ids)]
    positions = list(range(len(example.token_ids)))
    by_layer: list[Tensor] = []
    for index in layers:
        (x,) = values_at(loaded, sequence, [positions], down_input(loaded, index))
        moved = sum((x @ d.u.T) @ d.v for d in of[first] if (d.layer, d.module) == (index, "mlp.down"))
        assert isinstance(moved, Tensor)
        by_layer.append(moved.norm(dim=-1))
    last = len(example.token_ids) - 1
    position = {
        name: subject_last(example, request.where) if places and places.get(name) == "subject" else last
        for name in of
    }

    def key(name: str, delta: Delta) -> Tensor:
        site = down_input(loaded, delta.layer, delta.module)
        return values_at(loaded, sequence, [[position[name]]], site)[0][0]

    norms = torch.stack(by_layer, -1).tolist() if by_layer else [[] for _ in positions]
    return Explanation(
        tuple(
            _added(lens, texts, name, delta, key(name, delta)) for name, each in of.items() for delta in each
        ),
        layers,
        tuple(texts[token] for token in example.token_ids),
        tuple(tuple(row) for row in norms),
        tuple(_cosines(loaded, request, of)),
    )


def _added(lens: Lens, texts: Sequence[str], method: str, delta: Delta, key: Float[Tensor, " d_in"]) -> Added:
    direction = _leading(delta, key).to(lens.unembedding.device)
    scale = lens.norm.scale(direction.square().sum(), lens.norm.centre(direction).square().sum())
    scores = scale * (lens.unembedding.float() @ lens.linear(direction)) + lens.constant
    order: list[int] = lens.tokens(scores.argsort(descending=True)).tolist()
    top, bottom = order[:TOKENS_SHOWN], order[-TOKENS_SHOWN:][::-1]
    return Added(
        method,
        delta.layer,
        delta.module,
        delta.norm(),
        tuple(texts[token] for token in top),
        tuple(texts[token] for token in bottom),
    )


def _leading(delta: Delta, key: Float[Tensor, " d_in"]) -> Float[Tensor, " d_model"]:
    """The residual side's leading direction.

    A singular direction has no sign of its own. What a matrix that writes adds at the edited position, and what one
    that reads sees there (`key`), has a part along the direction; the sign is the one that makes this part positive.
    """
    direction = _unsigned(delta)
    at_key = (key @ delta.u.T) @ delta.v if delta.module in WRITES else key
    return -direction if float(at_key.double() @ direction.double()) < 0 else direction


def _unsigned(delta: Delta) -> Float[Tensor, " d_model"]:
    if len(delta.u) == 1:
        return (delta.v if delta.module in WRITES else delta.u)[0]
    left, values, right = torch.linalg.svd(delta.matrix(), full_matrices=False)
    return values[0] * (right[0] if delta.module in WRITES else left[:, 0])


def _cosines(loaded: LoadedModel, request: Request, of: Mapping[str, Sequence[Delta]]) -> list[Cosine]:
    """Each method with the true descent direction −G, and with every method before it."""
    keys = {(delta.layer, delta.module) for each in of.values() for delta in each}
    layers, modules = sorted({key[0] for key in keys}), sorted({key[1] for key in keys})
    factors, _ = gradients(loaded, [request], layers, modules)
    rows: list[Cosine] = []
    for number, (name, each) in enumerate(of.items()):
        for delta in each:
            key = (delta.layer, delta.module)
            x, vjp = factors[key]
            rows.append(Cosine(name, *key, "gradient descent", _cosine(delta, Delta(*key, x, -vjp))))
            for other, theirs in list(of.items())[:number]:
                rows += [
                    Cosine(name, *key, other, _cosine(delta, d)) for d in theirs if (d.layer, d.module) == key
                ]
    return rows


def _cosine(one: Delta, other: Delta) -> float:
    u, v = one.u.double() @ other.u.double().T, one.v.double() @ other.v.double().T
    return float((u * v).sum() / max(one.norm() * other.norm(), 1e-300))
