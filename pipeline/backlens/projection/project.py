"""Exact top-k, bottom-k, target score and target rank of many vectors through the lens.

All vectors of a group are projected together, tile by tile of the vocabulary. A pass in float32 with a proven error
settles nearly every token: those certainly outside a list, and those certainly above or below the target. The few
others are scored in float64 and rounded to float32, as scores are defined; so lists and ranks are those of a full sort
of these scores, and do not depend on tiles or batches. Rows that leave too many tokens in doubt (all scores equal,
lengths near overflow) are scored over the whole vocabulary in float64.

Order is by score, then by smaller token id.

Shapes: B prompts, T positions, K mixes per prompt, R rows screened, V vocabulary, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from backlens.projection.candidates import PAIRS, Candidates, compiled_for
from backlens.projection.lens import Lens
from backlens.projection.scores import (
    ApproximateScores,
    ExactScores,
    MixBatch,
    Prepared,
    ScoredRows,
    Screening,
    prepare,
)
from backlens.projection.threads import CpuThreads, cpu_threads, parts
from backlens.projection.topk import GROUP, Extremes, first_of_rows

BLOCK = 1024
"""Tokens of the narrowest tile."""

SMALL = 2048
"""Vocabularies up to this size are scored in float64 at once."""

ROWS, WIDTH = 256, 8192
"""Rows and tokens scored in float64 at once."""

MIXED_ROWS = 2**14
"""Rows at once where mixes are not stored: each needs a share of the room for pairs."""

MANY = 2000
"""With more tokens in doubt than this, scoring a row's whole vocabulary is cheaper."""


@dataclass(frozen=True)
class Vectors:
    """Vectors to project, in the lens's basis: a batch's residual-side vectors, and mixes of each prompt's."""

    residual: Float[Tensor, "prompt position d_model"]
    scale: Float[Tensor, "prompt position"]
    """s(v) of each residual vector."""
    wanted: Bool[Tensor, "prompt position"]
    """True for residual vectors that are projected themselves, not only as terms of mixes."""
    mixes: Float[Tensor, "prompt mix position"]
    """Coefficients of the mixed vectors over their prompt's positions."""
    mix_scale: Float[Tensor, "prompt mix"]
    """s(v) of each mixed vector."""
    mix_wanted: Bool[Tensor, "prompt mix"]
    """False for mixes that are zero."""

    @classmethod
    def alone(cls, vectors: Float[Tensor, "vector d_model"], lens: Lens) -> "Vectors":
        """Make vectors that belong to no prompt and have no mixes; zero vectors are not projected."""
        wide = vectors.double()
        squared, centred = (each.square().sum(-1) for each in (wide, lens.norm.centre(wide)))
        nothing = vectors.new_zeros(1, 0, len(vectors))
        return cls(
            residual=vectors[None],
            scale=lens.scale(squared, centred)[None],
            wanted=(squared > 0)[None],
            mixes=nothing,
            mix_scale=nothing[..., 0],
            mix_wanted=nothing[..., 0].bool(),
        )

    def to(self, device: torch.device) -> "Vectors":
        return Vectors(*(getattr(self, name).to(device) for name in Vectors.__dataclass_fields__))

    def __getitem__(self, prompts: slice) -> "Vectors":
        return Vectors(*(getattr(self, name)[prompts] for name in Vectors.__dataclass_fields__))


@dataclass(frozen=True)
class TopK:
    """The ends of each vector's scores, and the target's place; each field is a column of the tables.

    `store.tables.projection_columns` declares the columns. Fields that end in `_ids` are token ids.
    """

    top_ids: Int[Tensor, "vector k"]
    top_scores: Float[Tensor, "vector k"]
    bottom_ids: Int[Tensor, "vector k"]
    bottom_scores: Float[Tensor, "vector k"]
    target_score: Float[Tensor, " vector"]
    target_rank: Int[Tensor, " vector"]
    """Number of tokens with a strictly larger score."""

    def columns(self) -> dict[str, Tensor]:
        """Return the fields by name, each with one row per vector."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __getitem__(self, rows: Tensor | slice) -> "TopK":
        return TopK(**{name: column[rows] for name, column in self.columns().items()})


def project(
    vectors: Vectors,
    lens: Lens,
    targets: Int[Tensor, " prompt"],
    k: int,
    tile_bytes: int | None = None,
    prepared: Prepared | None = None,
    screening: Screening = "float32",
) -> tuple[TopK, TopK]:
    """Project the wanted residual vectors and the wanted mixes, in the order (prompt, position) and (prompt, mix).

    `targets` are token ids, `k` is the length of the lists. `tile_bytes` bounds the scores that a thread holds at once;
    the default suits a CPU's cache or a GPU's memory. Prompts with too many rows for that (every neuron as a mix) are
    projected a few at a time. `prepared` is `prepare(lens)`, looked up if not given. `screening` is the type of the
    products that screen; the result does not depend on it. GPUs multiply bfloat16 many times as fast.

    Raises ValueError for a target that the lens does not score.
    """
    prepared = prepared or prepare(lens)
    device = lens.unembedding.device
    if tile_bytes is None:
        tile_bytes = 2**30 if device.type == "cuda" else 2**21
    targets = lens.rows(targets)
    rows = vectors.residual.shape[1] + vectors.mixes.shape[1]
    size = max(1, MIXED_ROWS // rows if compiled_for(device) else tile_bytes // (4 * BLOCK * rows))
    found = []
    with cpu_threads(device) as threads:
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            scored = scored_rows(vectors[part], lens, targets[part])
            projection = _Projection(scored, lens, k, threads)
            if lens.vocabulary > SMALL:
                projection.screen(ApproximateScores(scored, lens, prepared, screening), tile_bytes)
            own = int(scored.wanted[: len(scored.base)].sum())
            both = projection.finish()
            found.append((both[:own], both[own:]))
    own, mixed = zip(*found, strict=True)
    return _with_tokens(_concatenated(own), lens), _with_tokens(_concatenated(mixed), lens)


def _with_tokens(found: TopK, lens: Lens) -> TopK:
    """Turn rows of the lens into token ids; both ascend together, so ties keep their order."""
    return TopK(
        **{
            name: lens.tokens(column) if name.endswith("_ids") else column
            for name, column in found.columns().items()
        }
    )


def _concatenated(found: Sequence[TopK]) -> TopK:
    if len(found) == 1:
        return found[0]
    columns = [each.columns() for each in found]
    return TopK(**{name: torch.cat([each[name] for each in columns]) for name in columns[0]})


def scored_rows(vectors: Vectors, lens: Lens, targets: Int[Tensor, " prompt"]) -> ScoredRows:
    """Lay out the rows of a batch: residual vectors that are wanted or mixed, then every mix.

    Base rows include their own s(v). So a mix Σ aᵢ vᵢ has the coefficients aᵢ · s(mix) / s(vᵢ), and its scores need no
    scaling of their own.
    """
    used = (vectors.wanted | (vectors.mixes != 0).any(1)) & (vectors.residual != 0).any(-1)
    wanted = vectors.wanted & used
    scale = vectors.scale.double()
    base = lens.linear(vectors.residual[used].double()) * scale[used][:, None]
    ratio_BKT = vectors.mix_scale.double()[..., None] / scale[:, None]
    is_term = used[:, None] & vectors.mix_wanted[..., None]
    mixes_BKT = (vectors.mixes * ratio_BKT).masked_fill(~is_term, 0.0)
    mixes = vectors.mixes.shape[1]
    scored = ScoredRows(
        base,
        _runs(mixes_BKT, used),
        base,
        torch.cat([targets.repeat_interleave(used.sum(-1)), targets.repeat_interleave(mixes)]),
        torch.cat([wanted[used], vectors.mix_wanted.flatten()]),
    )
    wide = torch.cat([base, *(part.flatten(0, 1) for part in scored.mixed(base))])
    return replace(scored, wide=wide)


def _runs(mixes_BKT: Tensor, used: Bool[Tensor, "prompt position"]) -> list[MixBatch]:
    if not mixes_BKT.shape[1]:
        return []
    counts, lengths = used.sum(-1).unique_consecutive(return_counts=True)
    runs, prompt, row = [], 0, 0
    for count, length in zip(counts.tolist(), lengths.tolist(), strict=True):
        some = slice(prompt, prompt + length)
        mixes = mixes_BKT[some].mT[used[some]].unflatten(0, (length, count)).mT.contiguous()
        runs.append(MixBatch(slice(row, row + length * count), mixes))
        prompt, row = prompt + length, row + length * count
    return runs


class _Projection:
    """The projection of some rows: one approximate pass over the vocabulary, then exact scores of tokens in doubt."""

    def __init__(self, scored: ScoredRows, lens: Lens, k: int, threads: CpuThreads) -> None:
        self._scored, self._lens, self._k, self._threads = scored, lens, k, threads
        self._exact = ExactScores(scored, lens, threads)
        every = torch.arange(len(scored.targets), device=scored.targets.device)
        self._target_score = self._exact.of_pairs(every, scored.targets)
        self._screened = torch.zeros_like(scored.wanted)
        self._candidates = self._no_candidates(torch.zeros_like(self._target_score), PAIRS)

    def _no_candidates(self, error: Float[Tensor, " row"], room: int) -> Candidates:
        return Candidates(self._target_score, self._screened, error.double(), self._k, room)

    def screen(self, approximate: ApproximateScores, tile_bytes: int) -> None:
        """Score every token approximately; count those above the target, and collect those in doubt."""
        self._screened = self._scored.wanted & approximate.sound()
        if not self._screened.any():
            return
        shares = _shares(self._lens.vocabulary, self._threads.count)
        held = self._scored.base if compiled_for(self._screened.device) else self._screened
        widest = max(tile_bytes // (4 * len(held)) // BLOCK, 1) * BLOCK

        def screened(share: tuple[int, int]) -> Candidates:
            candidates = self._no_candidates(approximate.error(*share), PAIRS // len(shares))
            for start, stop in _tiles(*share, widest):
                candidates.add(approximate.tile(start, stop), start)
            return candidates

        self._candidates, *others = self._threads.run([partial(screened, share) for share in shares])
        for other in others:
            self._candidates.join(other)

    def finish(self) -> TopK:
        """Return the result of the wanted rows."""
        settled, found = self._settled()
        rest = (self._scored.wanted & ~settled).nonzero().squeeze(-1)
        parts = [found, *(self._whole(rows) for rows in rest.split(ROWS) if len(rows))]
        rows = torch.cat([settled.nonzero().squeeze(-1), rest])
        return _concatenated(parts)[rows.argsort()]

    def _settled(self) -> tuple[Bool[Tensor, " row"], TopK]:
        """Settle the rows with few tokens in doubt, by exact scores of these tokens."""
        rows = len(self._screened)
        doubtful, doubtful_ids = self._candidates.doubtful()
        places, ids = self._candidates.candidates()
        settled = self._screened & ~self._candidates.given_up()
        settled &= doubtful.bincount(minlength=rows) <= MANY
        settled &= (places.bincount(minlength=2 * rows) <= MANY).view(2, -1).all(0)
        if not settled.equal(self._screened):
            few = settled[doubtful]
            doubtful, doubtful_ids = doubtful[few], doubtful_ids[few]
            few = settled[places % rows]
            places, ids = places[few], ids[few]

        scores = self._exact.of_pairs(torch.cat([doubtful, places % rows]), torch.cat([doubtful_ids, ids]))
        above = scores[: len(doubtful)] > self._target_score[doubtful]
        rank = self._candidates.above + doubtful[above].bincount(minlength=rows)
        signed = scores[len(doubtful) :] * torch.where(places < rows, 1.0, -1.0)
        ids, signed = first_of_rows(places, ids, signed, self._k)
        top_ids, bottom_ids = ids.int().chunk(2)
        top, bottom = signed.chunk(2)
        done = settled.nonzero().squeeze(-1)
        return settled, TopK(top_ids, top, bottom_ids, -bottom, self._target_score[done], rank[done].int())

    def _whole(self, rows: Int[Tensor, " row"]) -> TopK:
        """Score some rows over the whole vocabulary, exactly."""
        best, worst = Extremes(self._k, largest=True), Extremes(self._k, largest=False)
        targets, target_score = self._scored.targets[rows], self._target_score[rows]
        above = torch.zeros_like(targets)
        for start in range(0, self._lens.vocabulary, WIDTH):
            scores = self._exact.of_tile(rows, start, min(start + WIDTH, self._lens.vocabulary))
            # a product in another order may differ in the last bit; the target must not be above itself
            inside = ((targets >= start) & (targets < start + scores.shape[1])).nonzero().squeeze(-1)
            scores[inside, targets[inside] - start] = target_score[inside]
            above += (scores > target_score[:, None]).sum(-1)
            best.add(scores, start)
            worst.add(scores, start)
        return TopK(*best.sorted(), *worst.sorted(), target_score, above.int())


def _shares(vocabulary: int, count: int) -> list[tuple[int, int]]:
    """Cut the vocabulary into about equal parts of whole groups; the last part also gets the rest."""
    found = [(GROUP * part.start, GROUP * part.stop) for part in parts(vocabulary // GROUP, count)]
    return [*found[:-1], (found[-1][0], vocabulary)]


def _tiles(first: int, last: int, widest: int) -> list[tuple[int, int]]:
    """Cut a part into tiles of whole groups, and the rest."""
    whole = last // GROUP * GROUP
    tiles = [(start, min(start + widest, whole)) for start in range(first, whole, widest)]
    return [*tiles, (whole, last)] if whole < last else tiles
