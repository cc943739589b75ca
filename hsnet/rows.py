"""Activations of one pair of images, support position by support position, and the learner's layers on them.

The support mask empties most of a hypercorrelation: five in six support positions of a typical object correlate 0
with everything. After the first centre-pivot convolution those positions hold its bias, after the normalisation one
number per channel: still nothing that has to be written, read or multiplied. `Rows` keeps the positions that differ.
From the second convolution on every position is written down; the layout stays. A row is a (C, H, W) picture over the
query grid, so the query side of a convolution is a plain 2D convolution of rows and the support side matrix products
over the rows that a window meets. Nothing is permuted, and nothing is multiplied with padding.

The functions equal the layers of `hsnet.model` up to rounding, in gradients too.

Dimension key: n rows (support positions written down), C channels, U V support grid, H W query grid,
P positions of a convolution's output on its support grid, k kernel side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hsnet.conv4d import CenterPivotConv4d, support_matrix


@dataclass(frozen=True)
class Rows:
    """A (C, U, V, H, W) tensor, each channel of which holds one and the same number in many support positions."""

    values: Tensor
    """(n, C, H, W): the positions written down."""
    positions: Tensor
    """(n,) int64, ascending: where they lie on the support grid, counted row by row."""
    grid: tuple[int, int]
    """(U, V)."""
    fill: Tensor | None = None
    """(C,): the value at all other positions; None is 0."""

    @property
    def unwritten(self) -> int:
        return self.grid[0] * self.grid[1] - len(self.positions)

    def written(self) -> Rows:
        """The same with every position written down."""
        if self.unwritten == 0:
            return self
        count = self.grid[0] * self.grid[1]
        fill = self.values.new_zeros(self.values.shape[1]) if self.fill is None else self.fill
        everything = fill[:, None, None].expand(count, -1, *self.values.shape[2:])
        everywhere = torch.arange(count, device=self.positions.device)
        return Rows(everything.index_copy(0, self.positions, self.values), everywhere, self.grid)


@dataclass(frozen=True)
class Windows:
    """What a zero-padded k x k kernel meets at each of its P steps over the support grid of some `Rows`."""

    grid: tuple[int, int]
    """(U', V') of the output, P = U' V'."""
    rows: Sequence[Tensor]
    """P index lists: the rows under the kernel."""
    offsets: Sequence[Tensor]
    """P index lists: where in the kernel, counted row by row, each of them lies."""
    unwritten: Tensor
    """(P, k k) bool: the kernel meets a position of the grid that has no row."""
    pivots: Tensor
    """(P,) int64: the row under the kernel's centre, or n where there is none."""

    @classmethod
    def over(cls, rows: Rows, kernel_size: int, stride: int) -> Windows:
        count, pad = len(rows.positions), kernel_size // 2
        numbers = torch.full((rows.grid[0] * rows.grid[1],), count, device=rows.positions.device)
        numbers[rows.positions] = torch.arange(count, device=numbers.device)
        with_border = F.pad(numbers.view(rows.grid), (pad, pad, pad, pad), value=count + 1)
        steps = with_border.unfold(0, kernel_size, stride).unfold(1, kernel_size, stride)
        met = steps.flatten(2).flatten(0, 1)
        written = met < count
        sizes = written.sum(1).tolist()
        return cls(
            (steps.shape[0], steps.shape[1]),
            met[written].split(sizes),
            written.nonzero()[:, 1].split(sizes),
            met == count,
            met[:, kernel_size**2 // 2],
        )


def convolve(conv: CenterPivotConv4d, rows: Rows) -> Rows:
    """The centre-pivot convolution.

    Rows that are 0 elsewhere give rows that are the bias elsewhere. Rows with another fill give all positions: near
    the query's border the fill meets padding, and is no longer one number.
    """
    if rows.unwritten == 0 and rows.grid[0] * rows.grid[1] <= conv.kernel_size**2:
        return _convolve_small_grid(conv, rows)
    weights = _Weights.of(conv, rows.values.dtype)
    windows = Windows.over(rows, conv.kernel_size, conv.support_stride)
    everywhere = torch.arange(len(windows.rows), device=rows.positions.device)
    if rows.fill is None:
        positions = everywhere[torch.tensor([len(met) > 0 for met in windows.rows], device=everywhere.device)]
        constant = weights.bias.expand(len(positions), -1)
    else:
        positions = everywhere
        # Where the support kernel meets the fill, its part is one number per output position and channel.
        met = windows.unwritten.to(rows.fill.dtype)
        constant = weights.bias + torch.einsum("pj,ocj,c->po", met, weights.support.flatten(2), rows.fill)
    pivots = windows.pivots[positions]
    written = pivots < len(rows.positions)
    pictures = weights.over_query(rows.values[pivots[written]])
    # The last picture is that of all pivots which are not written down.
    fill = rows.values.new_zeros(rows.values.shape[1]) if rows.fill is None else rows.fill
    filled = fill[None, :, None, None].expand(1, -1, *rows.values.shape[2:])
    pictures = torch.cat([pictures, weights.over_query(filled)])
    values = pictures[torch.where(written, written.cumsum(0) - 1, len(pictures) - 1)]
    values += constant[:, :, None, None]
    kept = positions.tolist()
    values = _AddSupportSide.apply(
        values,
        rows.values,
        weights.support,
        [windows.rows[place] for place in kept],
        [windows.offsets[place] for place in kept],
    )
    return Rows(values, positions, windows.grid, weights.bias if rows.fill is None else None)


def normalise(norm: nn.GroupNorm, rows: Rows) -> Rows:
    """GroupNorm over the whole grid, what is not written down included, then ReLU."""
    fill = rows.values.new_zeros(rows.values.shape[1]) if rows.fill is None else rows.fill
    values, fill = _NormaliseRelu.apply(rows.values, fill, norm.weight, norm.bias, rows.unwritten, norm)
    return Rows(values, rows.positions, rows.grid, fill if rows.unwritten else None)


@dataclass(frozen=True)
class _Weights:
    """A convolution's weights as a layer on rows reads them."""

    query: Tensor
    """(C_out, C, k, k)."""
    support: Tensor
    """(C_out, C, k, k)."""
    bias: Tensor
    """(C_out,): of both sides together."""

    @classmethod
    def of(cls, conv: CenterPivotConv4d, dtype: torch.dtype) -> _Weights:
        assert conv.query.bias is not None
        assert conv.support.bias is not None
        return cls(
            conv.query.weight[:, :, 0].to(dtype),
            conv.support.weight[..., 0].to(dtype),
            (conv.query.bias + conv.support.bias).to(dtype),
        )

    def over_query(self, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """(n, C, H, W) -> (n, C_out, H, W)."""
        return F.conv2d(values, self.query, bias, padding=self.query.shape[-1] // 2)


def _convolve_small_grid(conv: CenterPivotConv4d, rows: Rows) -> Rows:
    """All positions written down and a kernel larger than the grid: the support side is one matrix."""
    weights, stride = _Weights.of(conv, rows.values.dtype), conv.support_stride
    numbers = rows.positions.view(rows.grid)[::stride, ::stride]
    pivots = rows.values if stride == 1 else rows.values[numbers.flatten()]
    values = weights.over_query(pivots, weights.bias)
    # (C_out, P, C, n) to (P C_out, n C)
    matrix = support_matrix(weights.support, rows.grid, stride).permute(1, 0, 3, 2).flatten(2).flatten(0, 1)
    flat = torch.addmm(values.flatten(2).flatten(0, 1), matrix, rows.values.flatten(2).flatten(0, 1))
    grid = (numbers.shape[0], numbers.shape[1])
    return Rows(flat.view_as(values), torch.arange(len(values), device=numbers.device), grid)


class _AddSupportSide(torch.autograd.Function):
    """Add the support side to (P, C_out, H, W), in place: one matrix product per position, over the rows it meets."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, values: Tensor, weight: Tensor, rows: Sequence[Tensor], offsets: Sequence[Tensor]
    ) -> Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(values, weight)
        ctx.rows, ctx.offsets = rows, offsets
        flat, kernel = values.flatten(2), _by_offset(weight)
        for place, met, where in zip(out.flatten(2), rows, offsets, strict=True):
            if len(met):
                place.addmm_(kernel[:, where].flatten(1), flat.index_select(0, met).flatten(0, 1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        flat, kernel = values.flatten(2), _by_offset(weight)
        for_values = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        for_kernel = torch.zeros_like(kernel)
        for place, met, where in zip(gradients[0].flatten(2), ctx.rows, ctx.offsets, strict=True):
            if not len(met):
                continue
            gathered = flat.index_select(0, met).flatten(0, 1)
            for_kernel.index_add_(1, where, (place @ gathered.t()).unflatten(1, (len(met), -1)))
            if for_values is not None:
                back = kernel[:, where].flatten(1).t() @ place
                for_values.index_add_(0, met, back.unflatten(0, (len(met), -1)))
        return (
            gradients[0],
            None if for_values is None else for_values.view_as(values),
            for_kernel.transpose(1, 2).reshape(weight.shape),
            None,
            None,
        )


def _by_offset(weight: Tensor) -> Tensor:
    """(C_out, C, k, k) -> (C_out, k k, C)."""
    return weight.flatten(2).transpose(1, 2).contiguous()


class _NormaliseRelu(torch.autograd.Function):
    """GroupNorm and ReLU of rows and fill, each counted as often as it occurs. Statistics are float32 or better."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, fill: Tensor, weight: Tensor, bias: Tensor, unwritten: int, norm: nn.GroupNorm
    ) -> tuple[Tensor, Tensor]:
        count, channels, height, width = values.shape
        places, width_of_group = height * width, channels // norm.num_groups
        mean, variance = _moments(values, fill.to(weight.dtype), unwritten, norm.num_groups)
        mean, scale = (part.repeat_interleave(width_of_group) for part in (mean, torch.rsqrt(variance + norm.eps)))
        factor = scale * weight
        offset = bias - mean * factor
        out = torch.addcmul(_each(offset, values), values, _each(factor, values)).relu_()
        filled = (offset + fill * factor).relu_().to(values.dtype)
        ctx.save_for_backward(values, fill, weight, mean, scale, out, filled)
        ctx.repeats = unwritten * places
        ctx.groups, ctx.elements = norm.num_groups, (count + unwritten) * places * width_of_group
        return out, filled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, fill, weight, mean, scale, out, filled = ctx.saved_tensors
        for_out = torch.ops.aten.threshold_backward(gradients[0], out, 0)
        for_fill = gradients[1] * (filled > 0)
        centred_fill = (fill - mean) * scale
        flat, flat_gradient = values.flatten(2), for_out.flatten(2)
        first = flat_gradient.sum((0, 2), dtype=weight.dtype)
        products = torch.bmm(flat.flatten(0, 1)[:, None], flat_gradient.flatten(0, 1)[:, :, None])
        second = (products.view(values.shape[:2]).sum(0, dtype=weight.dtype) - mean * first) * scale
        first, second = first + for_fill, second + for_fill * centred_fill

        def of_group(sums: Tensor) -> Tensor:
            spread = (weight * sums).view(ctx.groups, -1)
            return (spread.sum(1) / ctx.elements).repeat_interleave(spread.shape[1])

        # d values = scale (weight d out - level - slope x), with x = (values - mean) scale the normalised value
        level, slope = of_group(first), of_group(second)
        constant, linear = scale * (slope * scale * mean - level), -scale * scale * slope
        for_values = torch.addcmul(_each(constant, values), values, _each(linear, values))
        for_values.addcmul_(for_out, _each(scale * weight, values))
        fill_gradient = scale * (weight * for_fill - ctx.repeats * (level + slope * centred_fill))
        return for_values, fill_gradient.to(fill.dtype), second, first, None, None


def _each(channels: Tensor, values: Tensor) -> Tensor:
    """(C,) to be broadcast over (n, C, H, W) of another dtype."""
    return channels.to(values.dtype)[:, None, None]


def _moments(values: Tensor, fill: Tensor, unwritten: int, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group, (groups,) each in the dtype of `fill`."""
    count, channels, height, width = values.shape
    # One part for all positions not written down, then one for each row, combined by the law of total variance.
    parts = fill.view(1, groups, -1)
    means, variances = parts.mean(2), parts.var(2, correction=0)
    shares = means.new_full((1, 1), unwritten / (count + unwritten))
    if count:
        _, of_rows, scales = torch.native_group_norm(values, None, None, count, channels, height * width, groups, _TINY)
        means = torch.cat([means, of_rows.to(fill.dtype)])
        variances = torch.cat([variances, scales.to(fill.dtype) ** -2 - _TINY])
        shares = torch.cat([shares, shares.new_full((count, 1), 1 / (count + unwritten))])
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0).clamp_(min=0)


_TINY = 1e-20
"""In place of GroupNorm's own eps, which is added to the combined variance; keeps a constant row's variance finite."""
