"""Exact selection: against a full sort in plain Python, however the vocabulary is cut."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.lens import Lens, Norm
from pipeline.projection import GROUP, Vectors, extremes, project

finite = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)


def brute_force(row: list[float], k: int, largest: bool) -> list[int]:
    sign = -1.0 if largest else 1.0
    return sorted(range(len(row)), key=lambda token: (sign * row[token], token))[:k]


@given(
    rows=st.integers(1, 400).flatmap(
        lambda width: st.lists(
            st.lists(st.one_of(finite, st.sampled_from([0.0, -0.0, 1.0])), min_size=width, max_size=width),
            min_size=1,
            max_size=3,
        )
    ),
    k=st.integers(1, 12),
    largest=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_extremes_are_those_of_a_full_sort_with_ties_to_the_smaller_id(
    rows: list[list[float]], k: int, largest: bool
) -> None:
    k = min(k, len(rows[0]))
    scores = torch.tensor(rows)
    values, ids = extremes(scores, k, largest)
    assert ids.tolist() == [brute_force(row, k, largest) for row in scores.tolist()]
    assert values.tolist() == [[row[i] for i in brute_force(row, k, largest)] for row in scores.tolist()]


@given(
    seed=st.integers(0, 10**6),
    levels=st.integers(1, 40),
    width=st.integers(30 * GROUP, 40 * GROUP),
    largest=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_extremes_stay_exact_when_group_maxima_are_full_of_ties(
    seed: int, levels: int, width: int, largest: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (3, width), generator=generator).float()
    _, ids = extremes(scores, 10, largest)
    assert ids.tolist() == [brute_force(row, 10, largest) for row in scores.tolist()]


def random_lens(vocabulary: int, d_model: int, centred: bool, generator: torch.Generator) -> Lens:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    norm = Norm(normal(d_model), normal(d_model), 1e-5, centred)
    unembedding = normal(vocabulary, d_model)
    return Lens(norm, unembedding, unembedding @ norm.bias, "raw")


@given(seed=st.integers(0, 10**6), centred=st.booleans(), tile_bytes=st.sampled_from([1, 2**16, 2**30]))
@settings(max_examples=25, deadline=None)
def test_projection_does_not_depend_on_how_the_vocabulary_is_tiled(
    seed: int, centred: bool, tile_bytes: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lens = random_lens(3001, 16, centred, generator)
    residual = torch.randn(2, 4, 16, generator=generator)
    residual[1, 3] = 0
    mixes = torch.randn(2, 3, 4, generator=generator)
    mixed = mixes.double() @ residual.double()
    targets = torch.tensor([7, 2999])
    centre = lens.norm.centre

    def scales(vectors: Tensor) -> Tensor:
        vectors = vectors.double()
        return lens.scale(vectors.square().sum(-1), centre(vectors).square().sum(-1))

    vectors = Vectors(
        residual, scales(residual), residual.norm(dim=-1) > 0, mixes, scales(mixed), mixes.any(-1)
    )
    own, mix = project(vectors, lens, targets, 10, tile_bytes)
    wanted = torch.cat([residual[0].double(), residual[1, :3].double(), *mixed])
    wanted_targets = torch.tensor([7] * 4 + [2999] * 3 + [7] * 3 + [2999] * 3)
    linear = lens.norm(wanted) - lens.norm.bias
    scores = (linear @ lens.unembedding.double().T + lens.constant).float()
    top_ids = torch.cat([own.top_ids, mix.top_ids])
    assert torch.equal(top_ids.long(), scores.sort(dim=-1, descending=True, stable=True).indices[:, :10])
    bottom_ids = torch.cat([own.bottom_ids, mix.bottom_ids])
    assert torch.equal(bottom_ids.long(), scores.sort(dim=-1, stable=True).indices[:, :10])
    target = scores.gather(1, wanted_targets[:, None])
    ranks = torch.cat([own.target_rank, mix.target_rank])
    assert torch.equal(ranks.long(), (scores > target).sum(-1))
    assert torch.allclose(torch.cat([own.target_score, mix.target_score]), target[:, 0], atol=1e-4)


def test_a_target_in_the_top_list_has_the_lists_own_score_and_place() -> None:
    generator = torch.Generator().manual_seed(0)
    lens = random_lens(5000, 64, True, generator)
    residual = torch.randn(64, 1, 64, generator=generator)
    targets = (lens.norm(residual[:, 0]) @ lens.unembedding.T).argsort(-1, descending=True)[:, 4]
    squares = residual.square().sum(-1), lens.norm.centre(residual).square().sum(-1)
    none = residual.new_zeros(64, 0, 1)
    vectors = Vectors(
        residual,
        lens.scale(*squares),
        torch.ones(64, 1, dtype=torch.bool),
        none,
        none[..., 0],
        none[..., 0].bool(),
    )
    own, _ = project(vectors, lens, targets, 10)
    for row in range(64):
        place = own.top_ids[row].tolist().index(targets[row])
        assert own.target_rank[row] == place
        assert own.target_score[row] == own.top_scores[row, place]


@given(
    seed=st.integers(0, 10**6),
    kept=st.sampled_from(["first", "gaps", "last"]),
    tile_bytes=st.sampled_from([1, 2**30]),
)
@settings(max_examples=25, deadline=None)
def test_a_lens_of_some_tokens_gives_the_full_projection_over_these_ids(
    seed: int, kept: str, tile_bytes: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    full = random_lens(3400, 16, False, generator)
    full.unembedding[1::5] = full.unembedding[0]  # ties go to the smaller id, as the tokenizer counts ids
    full = replace(full, constant=full.unembedding @ full.norm.bias)
    among = torch.randperm(3400, generator=generator)[:2900].sort().values
    ids = {"first": torch.arange(2900), "gaps": among, "last": torch.arange(500, 3400)}[kept]
    some = Lens(full.norm, full.unembedding[ids], full.constant[ids], "raw", ids=ids)
    residual = torch.randn(2, 4, 16, generator=generator)
    scale = some.scale(residual.square().sum(-1), residual.square().sum(-1))
    nothing = torch.zeros(2, 0, 4)
    every = torch.ones(2, 4, dtype=torch.bool)
    vectors = Vectors(residual, scale, every, nothing, nothing[..., 0], nothing[..., 0].bool())
    targets = ids[torch.tensor([7, 2888])]
    found, _ = project(vectors, some, targets, 10, tile_bytes)
    whole, _ = project(vectors, full, targets, 3400, tile_bytes)
    allowed = set(ids.tolist())
    for row in range(8):
        in_order = [token for token in whole.top_ids[row].tolist() if token in allowed]
        assert found.top_ids[row].tolist() == in_order[:10]
        upwards = [token for token in whole.bottom_ids[row].tolist() if token in allowed]
        assert found.bottom_ids[row].tolist() == upwards[:10]
        places = {token: place for place, token in enumerate(whole.top_ids[row].tolist())}
        scores = {t: whole.top_scores[row, places[t]].item() for t in in_order}
        own = scores[int(targets[row // 4])]
        assert found.target_score[row].item() == own
        assert found.target_rank[row].item() == sum(score > own for score in scores.values())


def test_a_target_that_is_no_token_is_refused() -> None:
    full = random_lens(50, 4, False, torch.Generator().manual_seed(0))
    lens = replace(full, ids=torch.arange(0, 100, 2))
    assert lens.rows(torch.tensor([0, 98])).tolist() == [0, 49]
    for token in (1, 99, 100):
        with pytest.raises(ValueError, match=rf"token {token} is not in the tokenizer's vocabulary"):
            lens.rows(torch.tensor([2, token]))
