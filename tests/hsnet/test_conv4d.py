"""The 4D convolutions: published values of the centre-pivot one, and each against loops over a dense kernel."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnet.conv4d import CenterPivotConv4d
from hsnet.errors import ShapeError
from hsnet.kernels import KERNELS, DenseConv4d, SeparableConv4d


def query_first(x):
    """Between (B, C, H, W, U, V) of the published code and our (B, C, U, V, H, W); its own inverse."""
    return x.permute(0, 1, 4, 5, 2, 3)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("case", ["sq", "ns"])
def test_equals_the_published_layer(golden, case, kernel, stride):
    stored = np.load(golden / "a_conv4d.npz")
    get = lambda name: torch.from_numpy(stored[f"{case}/k{kernel}/{name}"])  # noqa: E731
    layer = CenterPivotConv4d(3, 4, kernel, stride)
    with torch.no_grad():
        layer.query.weight.copy_(get("conv1.weight").unsqueeze(2))
        layer.query.bias.copy_(get("conv1.bias"))
        layer.support.weight.copy_(get("conv2.weight").unsqueeze(4))
        layer.support.bias.copy_(get("conv2.bias"))
    x = query_first(torch.from_numpy(stored[f"{case}/x"])).contiguous().requires_grad_()
    y = query_first(layer(x))
    # 1e-5: the stored values are float64 rounded once, and the published float32 run itself differs by 2e-6.
    torch.testing.assert_close(y, get(f"s{stride}/y"), rtol=0, atol=1e-5)

    weight = np.random.RandomState(7).random_sample(y.shape) * 2 - 1
    (y * torch.from_numpy(weight).float()).sum().backward()
    # Gradients sum some thousand products of order one: 1e-4 is 1e-6 of their size.
    for name, value in {
        "conv1.weight": layer.query.weight.grad.squeeze(2),
        "conv1.bias": layer.query.bias.grad,
        "conv2.weight": layer.support.weight.grad.squeeze(4),
        "conv2.bias": layer.support.bias.grad,
    }.items():
        torch.testing.assert_close(value, get(f"s{stride}/grad_{name}"), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.norm().double(), get(f"s{stride}/grad_x_norm"), rtol=1e-6, atol=0)


def dense_conv4d(x, kernel, bias, stride):
    """A 4D convolution written out: (k, k, k, k) kernel over (U, V, H, W), padding k // 2, stride on U and V."""
    k = kernel.shape[-1]
    pad = k // 2
    grids = x.shape[2:]
    padded = torch.nn.functional.pad(x, (pad,) * 8)
    rows, columns = range(0, grids[0], stride), range(0, grids[1], stride)
    y = x.new_zeros(len(x), len(kernel), len(rows), len(columns), *grids[2:])
    for a, b, c, d in itertools.product(range(k), repeat=4):
        window = padded[:, :, a : a + grids[0], b : b + grids[1], c : c + grids[2], d : d + grids[3]]
        y += torch.einsum("oi,biuvhw->bouvhw", kernel[:, :, a, b, c, d], window[:, :, ::stride, ::stride])
    return y + bias[:, None, None, None, None]


sides = st.integers(1, 6)


@settings(max_examples=40, deadline=None)
@given(
    grids=st.tuples(sides, sides, sides, sides),
    batch=st.integers(1, 2),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
)
def test_is_a_dense_convolution_that_is_zero_off_the_pivots(grids, batch, kernel, stride, seed):
    """Eq. 3-5; grids up to 6x6 take both ways of the support side (convolution and matrix)."""
    torch.manual_seed(seed)
    layer = CenterPivotConv4d(2, 3, kernel, stride).double()
    x = torch.randn(batch, 2, *grids, dtype=torch.float64)
    centre = kernel // 2
    dense = torch.zeros(3, 2, kernel, kernel, kernel, kernel, dtype=torch.float64)
    dense[:, :, centre, centre] += layer.query.weight.detach()[:, :, 0]
    dense[:, :, :, :, centre, centre] += layer.support.weight.detach()[..., 0]
    expected = dense_conv4d(x, dense, (layer.query.bias + layer.support.bias).detach(), stride)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def conv2d_of_pictures(x, kernel, bias, stride=1):
    """A 2D convolution of (..., H, W) pictures, one (C, H, W) picture per (B, U, V)."""
    batch, _, *grid = x.shape[:4]
    pictures = x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    out = torch.nn.functional.conv2d(pictures, kernel, bias, stride=stride, padding=kernel.shape[-1] // 2)
    return out.unflatten(0, (batch, *grid)).permute(0, 3, 1, 2, 4, 5)


def separable_by_hand(layer, x):
    """2D convolutions of the support's pictures, then of the query's; again after a ReLU; then the channels."""
    for number, (support, query) in enumerate(zip(layer.support, layer.query, strict=True)):
        x = query_first(x.relu() if number else x)
        x = conv2d_of_pictures(x, support.weight[..., 0], support.bias, 1 if number else layer.support_stride)
        x = conv2d_of_pictures(query_first(x), query.weight[:, :, 0], query.bias)
    if isinstance(layer.widen, torch.nn.Conv3d):
        x = torch.einsum("oi,biuvhw->bouvhw", layer.widen.weight[..., 0, 0, 0], x)
        x = x + layer.widen.bias[:, None, None, None, None]
    return x


BY_HAND = {
    "original": lambda layer, x: dense_conv4d(x, layer.weight, layer.bias, layer.support_stride),
    "separable": separable_by_hand,
}


@pytest.mark.parametrize("kernel", BY_HAND)
@settings(max_examples=25, deadline=None)
@given(
    grids=st.tuples(sides, sides, sides, sides),
    batch=st.integers(1, 2),
    side=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2, 4, 8]),
    widths=st.sampled_from([(2, 3), (2, 2), (1, 4)]),
    seed=st.integers(0, 2**31),
)
def test_other_kernels_equal_the_loops_in_values_and_gradients(kernel, grids, batch, side, stride, widths, seed):
    torch.manual_seed(seed)
    layer = KERNELS[kernel](*widths, side, stride).double()
    x = torch.randn(batch, widths[0], *grids, dtype=torch.float64, requires_grad=True)
    ours, expected = layer(x), BY_HAND[kernel](layer, x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    weights = torch.sin(torch.arange(ours.numel(), dtype=x.dtype)).view_as(ours)
    inputs = [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_the_original_kernel_begins_as_torchs_own_convolutions_do():
    """Uniform within 1 / sqrt(inputs of an output): C k^4."""
    torch.manual_seed(0)
    layer, bound = DenseConv4d(4, 64, 3), (4 * 81) ** -0.5
    for values in (layer.weight.detach(), layer.bias.detach()):
        assert 0.9 * bound < float(values.abs().max()) <= bound


def test_a_separable_kernel_of_equal_channels_has_four_2d_kernels():
    assert sum(p.numel() for p in SeparableConv4d(8, 8, 3).parameters()) == 4 * (8 * 8 * 9 + 8)
    assert sum(p.numel() for p in SeparableConv4d(8, 16, 3).parameters()) == 4 * (8 * 8 * 9 + 8) + 8 * 16 + 16


@pytest.mark.parametrize("kernel", KERNELS)
def test_has_no_memory_of_an_earlier_size(kernel):
    """The published layer keeps the indices of its first input and returns garbage for 13 -> 14."""
    layer = KERNELS[kernel](1, 1, 3, 2)
    x = torch.randn(1, 1, 14, 14, 2, 2)
    expected = layer(x)
    layer(torch.randn(1, 1, 13, 13, 2, 2))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_refuses_what_it_cannot_read(kernel):
    layer = KERNELS[kernel](2, 3, 3, 1)
    with pytest.raises(ShapeError, match=r"Expected \(B, 2, U, V, H, W\), got \(1, 4, 5, 5, 5, 5\)"):
        layer(torch.zeros(1, 4, 5, 5, 5, 5))
    with pytest.raises(ShapeError, match="got 4"):
        KERNELS[kernel](1, 1, 4, 1)
