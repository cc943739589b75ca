"""Layers on rows against the plain layers on whole tensors: values and gradients, in float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from hsnet.conv4d import CenterPivotConv4d
from hsnet.sparse import SparseActivations, Windows, convolve, normalise

cases = st.fixed_dictionaries(
    {
        "grid": st.tuples(st.integers(1, 7), st.integers(1, 7)),
        "query": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "shares": st.lists(st.sampled_from([0.0, 0.2, 0.6, 1.0]), min_size=1, max_size=3),
        "kernel": st.sampled_from([1, 3, 5]),
        "stride": st.integers(1, 4),
        "filled": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def rows_of(grid, query, shares, filled, channels=3):
    """One pair per share: the part of its support positions that is written down."""
    written = torch.rand(len(shares), grid[0] * grid[1]) < torch.tensor(shares)[:, None]
    pairs, positions = written.nonzero().unbind(1)
    values = torch.randn(len(positions), channels, *query, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(len(shares), channels, dtype=torch.float64, requires_grad=True) if filled else None
    return SparseActivations(values, pairs, positions, len(shares), grid, fill)


def whole(rows):
    """(B, C, U, V, H, W)"""
    return rows.completed().values.unflatten(0, (rows.count, *rows.grid)).permute(0, 3, 1, 2, 4, 5)


def gradients(out, inputs):
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True, materialize_grads=True)


def assert_equal_with_gradients(fast, plain, inputs):
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)
    for ours, theirs in zip(gradients(fast, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(cases)
@example({"grid": (2, 2), "query": (3, 4), "shares": [1.0, 1.0], "kernel": 3, "stride": 1, "filled": False, "seed": 0})
@example({"grid": (5, 4), "query": (3, 4), "shares": [0.3, 0.6], "kernel": 3, "stride": 2, "filled": True, "seed": 0})
def test_convolution_equals_the_plain_one(case):
    torch.manual_seed(case["seed"])
    rows = rows_of(case["grid"], case["query"], case["shares"], case["filled"])
    conv = CenterPivotConv4d(3, 4, case["kernel"], case["stride"]).double()
    inputs = [rows.values, *conv.parameters()] + ([rows.fill] if rows.fill is not None else [])
    assert_equal_with_gradients(whole(convolve(conv, rows)), conv(whole(rows)), inputs)


@settings(max_examples=60, deadline=None)
@given(cases)
@example({"grid": (4, 4), "query": (3, 3), "shares": [0.0], "kernel": 1, "stride": 1, "filled": True, "seed": 1})
def test_normalisation_equals_group_norm_and_relu(case):
    torch.manual_seed(case["seed"])
    rows = rows_of(case["grid"], case["query"], case["shares"], case["filled"], channels=8)
    norm = nn.GroupNorm(4, 8).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    inputs = [rows.values, *norm.parameters()] + ([rows.fill] if rows.fill is not None else [])
    plain = torch.relu(norm(whole(rows)))
    assert_equal_with_gradients(whole(normalise(norm, rows)), plain, inputs)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_normalisation_in_float32_stands_a_large_mean(offset):
    """Statistics from sums of squares would lose all digits here."""
    torch.manual_seed(0)
    values = torch.randn(5, 8, 6, 6) + offset
    rows = SparseActivations(values, torch.zeros(5, dtype=int), torch.arange(5), 1, (1, 9), torch.full((1, 8), offset))
    norm = nn.GroupNorm(4, 8)
    exact = torch.relu(norm.double()(whole(rows).double())).float()
    torch.testing.assert_close(whole(normalise(norm.float(), rows)), exact, rtol=0, atol=1e-3 if offset else 1e-5)


def test_rows_outside_the_object_are_neither_kept_nor_computed():
    """A single object position under a 3 x 3 kernel of stride 2 reaches at most four outputs of sixteen."""
    rows = SparseActivations(torch.randn(1, 2, 3, 3), torch.tensor([1]), torch.tensor([3 * 7 + 3]), 2, (7, 7))
    out = convolve(CenterPivotConv4d(2, 4, 3, 2), rows)
    assert (out.grid, out.pairs.tolist(), out.positions.tolist()) == ((4, 4), [1] * 4, [5, 6, 9, 10])
    assert len(out.values) == 4


def test_windows_know_rows_gaps_and_borders_apart():
    rows = SparseActivations(torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=int), torch.tensor([0, 3]), 1, (2, 2))
    windows = Windows.over(rows, 3, 1)
    assert windows.grid == (2, 2)
    assert [met.tolist() for met in windows.rows] == [[0, 1]] * 4
    assert [where.tolist() for where in windows.offsets] == [[4, 8], [3, 7], [1, 5], [0, 4]]
    assert windows.unwritten.sum(1).tolist() == [2, 2, 2, 2]
    assert windows.pivots.tolist() == [0, 2, 2, 1]


def test_bfloat16_rows_stay_bfloat16_and_near():
    torch.manual_seed(3)
    conv, norm = CenterPivotConv4d(3, 8, 3, 2), nn.GroupNorm(4, 8)
    rows = SparseActivations(torch.rand(9, 3, 5, 5), torch.zeros(9, dtype=int), torch.arange(0, 18, 2), 1, (5, 5))
    exact = normalise(norm, convolve(conv, rows))
    small = SparseActivations(rows.values.bfloat16().requires_grad_(), rows.pairs, rows.positions, 1, rows.grid)
    near = normalise(norm, convolve(conv, small))
    assert near.values.dtype == torch.bfloat16
    torch.testing.assert_close(near.values.float(), exact.values, rtol=0, atol=0.1)
    near.values.sum().backward()
    assert conv.support.weight.grad.dtype == torch.float32
