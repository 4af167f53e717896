"""Training of MEND's editor (Mitchell et al., arXiv 2110.11309, §3.1 and algorithm 1).

A step takes some edits, each with its own edited model: the editor's output is added as low-rank factors to the outputs
of the layers, so the model's weights do not change and have no gradient. The loss of a step is

    L = L_e + c_loc · L_loc
    L_e    −log p(new target) after the prompt and its paraphrases, under the edit       equation 4a
    L_loc  KL(before ‖ after) of the next token after unrelated prompts and in texts     equation 4b

which differs from the paper in the term that is weighted (c_edit · L_e + L_loc there). Only the editor is trained.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from backlens.capture.batch import Batch, make_batch
from backlens.editing.activations import encode, logits_of
from backlens.editing.delta import matrix
from backlens.editing.methods.mend import EditFactors, Editor, Shape, edit_factors, factors_added, raw_factors
from backlens.editing.request import Request
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel

FEED_FORWARD = ("mlp.up", "mlp.gate", "mlp.down")
NORMALISED_OVER = 256
"""Number of edits whose factors give the normalisation."""
AT_ONCE = 32
"""Number of these edits whose factors are in memory at the same time."""
RATES = tuple(10.0**power for power in (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2))
"""Learning rates of the plain gradient; the best one on the first edits is the initial α."""

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]


@dataclass(frozen=True, slots=True)
class Training:
    """Settings of the training of an editor."""

    layers: tuple[int, ...]
    rank: int = 64
    steps: int = 500
    batch: int = 8
    """Edits per step."""
    lr: float = 3e-3
    """Adam's learning rate; it falls linearly to zero."""
    locality: float = 1.0
    """c_loc. The paper's c_edit of 0.1 equals a c_loc of 10."""
    unrelated: int = 4
    """Number of unrelated prompts, and of texts, per edit of a step."""
    swapped: float = 0.5
    """Share of edits that get the target of another edit."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Lesson:
    """Training data of one edit as token ids: targets that it should give, and predictions that it should keep."""

    request: Request
    said: Rows
    kept: Rows


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of a step, in nats."""

    edit: float
    locality: float


def train(
    loaded: LoadedModel,
    requests: Sequence[Request],
    texts: Sequence[str],
    training: Training,
    report: Callable[[int, Losses], None],
) -> Editor:
    """Train an editor for the feed-forward matrices of some layers on `requests`; `report` receives every step.

    Raises BacklensError if there are no texts and some requests have no neighbourhood.
    """
    torch.manual_seed(training.seed)
    draw = random.Random(training.seed)
    editor = Editor(feed_forward_shapes(loaded, training.layers), training.rank).to(loaded.device)
    _measure_normalisation(loaded, editor, requests)
    kept_texts = [row for row in _text_rows(loaded, texts) if len(row[0]) + len(row[1]) > 1]
    if not kept_texts and not all(request.neighbourhood for request in requests):
        raise BacklensError(
            "train-mend: give --text, or edits with a neighbourhood: an editor has to learn what to leave alone"
        )
    _begin_with_the_best_rate(loaded, editor, _lessons(loaded, requests, kept_texts, training, draw))
    optimizer = torch.optim.Adam(editor.parameters(), lr=training.lr)
    for step in range(training.steps):
        lessons = _lessons(loaded, requests, kept_texts, training, draw)
        edit, locality = losses(loaded, editor, lessons)
        optimizer.param_groups[0]["lr"] = training.lr * (1 - step / training.steps)
        optimizer.zero_grad()
        (edit + training.locality * locality).backward()
        torch.nn.utils.clip_grad_norm_(editor.parameters(), 1.0)
        optimizer.step()
        report(step + 1, Losses(float(edit.detach()), float(locality.detach())))
    return editor.requires_grad_(False)


def feed_forward_shapes(loaded: LoadedModel, layers: Sequence[int]) -> list[Shape]:
    shapes: list[Shape] = []
    for layer in layers:
        matrix(loaded, layer, "mlp.down")  # raises if it cannot be edited
        for module in FEED_FORWARD:
            if module in loaded.parts.blocks[layer].matrices:
                shapes.append(Shape(layer, module, *matrix(loaded, layer, module).read().shape))
    return shapes


def losses(
    loaded: LoadedModel, editor: Editor, lessons: Sequence[Lesson]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """L_e and L_loc in nats: means over the prompts of an edit, then over edits; with a graph to the parameters."""
    with torch.enable_grad():
        factors = edit_factors(loaded, editor, [lesson.request for lesson in lessons])
        said = _scores(loaded, [lesson.said for lesson in lessons], factors)
        nll = -said.scores.gather(-1, said.batch.targets[..., None]).squeeze(-1)
        edit = said.mean(nll)
        kept = _scores(loaded, [lesson.kept for lesson in lessons], factors)
        with torch.no_grad():
            before = logits_of(loaded, kept.batch).log_softmax(-1)
        locality = kept.mean((before.exp() * (before - kept.scores)).sum(-1))
    return edit, locality


@dataclass(frozen=True, eq=False)
class _Scores:
    """Log probabilities of the rows of edits, each under its own edit."""

    scores: Float[Tensor, "row step vocabulary"]
    batch: Batch
    share: Float[Tensor, " row"]
    """1 / (number of rows of the same edit × number of edits)."""

    def mean(self, values: Float[Tensor, "row step"]) -> Float[Tensor, ""]:
        """Mean over the steps of a row, then over the rows of an edit, then over edits."""
        mask = self.batch.target_mask
        return ((values * mask).sum(-1) / mask.sum(-1) * self.share).sum()


def _scores(loaded: LoadedModel, rows: Sequence[Rows], factors: EditFactors) -> _Scores:
    flat = [row for each in rows for row in each]
    batch = make_batch(flat, loaded.device)
    owner = torch.tensor([number for number, each in enumerate(rows) for _ in each], device=loaded.device)
    share = torch.tensor([1 / len(each) / len(rows) for each in rows for _ in each], device=loaded.device)
    shape = (batch.mask.shape[0], batch.mask.shape[1])
    with factors_added(loaded, factors, owner, shape):
        return _Scores(logits_of(loaded, batch).log_softmax(-1), batch, share)


def _measure_normalisation(loaded: LoadedModel, editor: Editor, requests: Sequence[Request]) -> None:
    some = requests[:: max(1, len(requests) // NORMALISED_OVER)]
    pairs: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {key: [] for key in editor.shapes}
    for start in range(0, len(some), AT_ONCE):
        chunk = some[start : start + AT_ONCE]
        raw = raw_factors(loaded, chunk, editor.layers, editor.modules_edited)
        for key, found in pairs.items():
            found.append((raw[key][0].flatten(0, 1), raw[key][1].flatten(0, 1)))
    for key, found in pairs.items():
        editor.normalise(key, torch.cat([x for x, _ in found]), torch.cat([vjp for _, vjp in found]))


@torch.no_grad()
def _begin_with_the_best_rate(loaded: LoadedModel, editor: Editor, lessons: Sequence[Lesson]) -> None:
    """Set α to the rate with the lowest L_e + L_loc of the untrained editor, which is the plain gradient."""
    found: dict[float, float] = {}
    for rate in RATES:
        editor.begin_at(rate)
        edit, locality = losses(loaded, editor, lessons)
        found[rate] = float(edit + locality)
    best = min(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)
    editor.begin_at(best)


def _text_rows(loaded: LoadedModel, texts: Sequence[str]) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Rows that compare every next token of a text."""
    ids = [loaded.tokenizer(text)["input_ids"] for text in texts]
    return [(each[:1], each[1:]) for each in ids if len(each) > 1]


def _lessons(
    loaded: LoadedModel, requests: Sequence[Request], texts: Rows, training: Training, draw: random.Random
) -> list[Lesson]:
    """Random edits, each with unrelated prompts and texts.

    To prevent that a few hundred edits are memorised, the gradient comes from a random wording of the prompt, and a
    share of the edits get the target of another edit.
    """
    chosen = draw.sample(list(requests), min(training.batch, len(requests)))
    made: list[Lesson] = []
    for request in chosen:
        other = draw.choice(requests).target_new if draw.random() < training.swapped else request.target_new
        made.append(_lesson(loaded, replace(request, target_new=other), texts, training.unrelated, draw))
    return made


def _lesson(
    loaded: LoadedModel, request: Request, texts: Rows, unrelated: int, draw: random.Random
) -> Lesson:
    wordings = (request.prompt, *request.paraphrases)
    said = [(prompt, request.target_new) for prompt in wordings]
    asked = replace(request, prompt=draw.choice(wordings), subject=None, slot=None)
    around = draw.sample(request.neighbourhood, min(unrelated, len(request.neighbourhood)))
    # only the prediction at the end of these prompts is compared; the target is not read
    kept = [(prompt, request.target_new) for prompt in around]
    rows = [(e.token_ids, e.target_ids) for e in encode(loaded, said, request.where)]
    left = [(e.token_ids, e.target_ids[:1]) for e in encode(loaded, kept, request.where)] if kept else []
    return Lesson(asked, rows, [*left, *draw.sample(list(texts), min(unrelated, len(texts)))])
