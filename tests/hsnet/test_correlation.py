"""Hypercorrelations: published values, and the algebra the pipeline relies on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnet.correlation import (
    EPS,
    build_hypercorrelation,
    build_pyramid,
    correlate_all,
    correlate_rows,
    interpolate_mask,
    prepare_query,
)
from hsnet.errors import ShapeError

SIDES = {"res": (9, 5, 3), "vgg": (8, 4, 2), "tiny": (6, 3, 2)}


def correlate_objects(query, support, mask, eps=EPS, unit=False):
    """`correlate_rows` of every episode, with the positions it leaves out as zeros: (B, L, U, V, H, W)."""
    batch = []
    for episode in range(len(mask)):
        prepared = prepare_query(query[episode], eps, unit)
        values, inside = correlate_rows(prepared, support[episode], mask[episode], eps)
        whole = values.new_zeros(values.shape[1], mask[episode].numel(), *values.shape[2:])
        batch.append(whole.index_copy(1, inside, values.transpose(0, 1)).unflatten(1, mask.shape[1:]))
    return torch.stack(batch)


def load(golden, case):
    stored = np.load(golden / "b_correlation.npz")
    get = lambda name: torch.from_numpy(stored[f"{case}/{name}"])  # noqa: E731
    counts = [4, 6, 3] if case != "vgg" else [3, 3, 1]
    names = iter(range(sum(counts)))
    query, support = [], []
    for count in counts:  # stored per layer as (B, C, H, W), shallow to deep
        layers = [next(names) for _ in range(count)]
        for side, levels in (("q", query), ("s", support)):
            levels.append(torch.stack([get(f"{side}{n:02d}").permute(0, 2, 3, 1) for n in layers], 1))
    return query, support, get


@pytest.mark.parametrize("case", SIDES)
def test_pyramid_equals_the_published_one(golden, case):
    """Masking, eps, ReLU, layer order and level order; `tiny` has features of 1e-5, where eps decides."""
    query, support, get = load(golden, case)
    pyramid = build_pyramid(query, support, get("mask"))
    for name, level in zip(("corr_l4", "corr_l3", "corr_l2"), pyramid, strict=True):
        # 1e-6: float32 sums in another order. eps on the squared norm, or max instead of plus, moves `tiny` by > 0.1.
        torch.testing.assert_close(level.permute(0, 1, 4, 5, 2, 3), get(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", SIDES)
def test_interpolated_mask_equals_the_published_one(golden, case):
    _, _, get = load(golden, case)
    for side in SIDES[case]:
        assert torch.equal(interpolate_mask(get("mask"), (side, side)), get(f"mask_interp_{side}"))


episodes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "layers": st.integers(1, 3),
        "query": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "support": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "seed": st.integers(0, 2**31),
    }
)


def draw(batch, layers, query, support, seed, dtype=torch.float64):
    torch.manual_seed(seed)
    mask = (torch.rand(batch, *support) * (torch.rand(batch, *support) < 0.6)).to(dtype)
    return (
        torch.randn(batch, layers, *query, 5, dtype=dtype),
        torch.randn(batch, layers, *support, 5, dtype=dtype),
        mask,
    )


@settings(max_examples=50, deadline=None)
@given(episodes)
def test_object_positions_alone_give_the_plain_result(episode):
    query, support, mask = draw(**episode)
    plain = build_hypercorrelation(query, support, mask)
    torch.testing.assert_close(correlate_objects(query, support, mask), plain, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(episodes)
def test_masking_commutes_with_correlation(episode):
    """Masking the features before (Eq. 1) equals cutting the correlation after, where the mask is not minute."""
    query, support, mask = draw(**episode)
    before = build_hypercorrelation(query, support, mask, eps=0.0).nan_to_num(0.0)
    unmasked = build_hypercorrelation(query, support, torch.ones_like(mask), eps=0.0)
    after = unmasked * (mask > 0)[:, None, :, :, None, None]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(episodes)
def test_a_batch_is_its_single_episodes(episode):
    query, support, mask = draw(**episode)
    batch = correlate_objects(query, support, mask)
    for i in range(len(mask)):
        one = correlate_objects(query[i : i + 1], support[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], one, rtol=0, atol=1e-6)


def test_scale_of_a_position_does_not_matter():
    """Why a store may keep int8 codes and throw the scale away."""
    query, support, mask = draw(1, 2, (3, 3), (3, 3), seed=1)
    mask = (mask > 0).double()  # a mask of 0.01 makes the norm so small that eps shows
    scaled = correlate_objects(query * 100, support * (1 + torch.rand(1, 2, 3, 3, 1)) * 50, mask)
    torch.testing.assert_close(scaled, build_hypercorrelation(query, support, mask), rtol=0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(episodes)
def test_unit_features_are_not_normalised_again(episode):
    query, support, mask = draw(**episode)
    query, support = query / query.norm(dim=-1, keepdim=True), support / support.norm(dim=-1, keepdim=True)
    shorter = query[..., :3], support[..., :3]  # what a projection leaves
    expected = torch.einsum("blhwc,bluvc->bluvhw", *shorter).clamp(min=0) * (mask > 0)[:, None, :, :, None, None]
    for correlate in (build_hypercorrelation, correlate_objects):
        torch.testing.assert_close(correlate(*shorter, mask, unit=True), expected, rtol=0, atol=1e-12)
    batch = correlate_all(*shorter, mask, torch.float64, unit=True)
    torch.testing.assert_close(batch, expected, rtol=0, atol=1e-12)


def test_an_empty_mask_correlates_nowhere():
    query, support, mask = draw(2, 1, (3, 3), (3, 3), seed=2)
    assert correlate_objects(query, support, torch.zeros_like(mask)).count_nonzero() == 0
    assert build_hypercorrelation(query, support, torch.zeros_like(mask)).count_nonzero() == 0


def test_integer_codes_are_accepted():
    query, support, mask = draw(1, 2, (3, 3), (3, 3), seed=3)
    codes = [(x / x.abs().amax(-1, keepdim=True) * 127).round().to(torch.int8) for x in (query, support)]
    exact = build_hypercorrelation(query, support, (mask > 0).double()).float()
    torch.testing.assert_close(correlate_objects(*codes, (mask > 0).float()), exact, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("query", "support", "mask", "message"),
    [
        ((1, 2, 3, 3, 4), (1, 3, 3, 3, 4), (1, 3, 3), "differ in layers: 2 and 3"),
        ((1, 2, 3, 3, 4), (1, 2, 3, 3, 5), (1, 3, 3), "differ in channels: 4 and 5"),
        ((2, 2, 3, 3, 4), (1, 2, 3, 3, 4), (1, 3, 3), "differ in batch size: 2 and 1"),
        ((1, 2, 3, 3, 4), (1, 2, 3, 3, 4), (1, 4, 4), r"must be \(1, 3, 3\) like the support grid, got \(1, 4, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(query, support, mask, message):
    with pytest.raises(ShapeError, match=message):
        build_hypercorrelation(torch.ones(query), torch.ones(support), torch.ones(mask))
