"""Activations support position by support position, and the learner's layers on them.

The support mask empties most of a hypercorrelation: five in six support positions of a typical object correlate 0
with everything. After the first centre-pivot convolution those positions hold its bias, after the normalisation one
number per channel: still nothing that has to be written, read or multiplied. `SparseActivations` keeps the positions
that differ. From the second convolution on every position is written down; the layout stays. A row is a (C, H, W)
picture over the query grid, so the query side of a convolution is a plain 2D convolution of rows and the support side
matrix products over the rows that a window meets. Nothing is permuted, and nothing is multiplied with padding.

The functions equal the layers of `hsnet.model` up to rounding, in gradients too.

Dimension key: B pairs of a query and a support, n rows (support positions written down, of all pairs together),
C channels, U V support grid, H W query grid, P = U V, k kernel side.
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
class SparseActivations:
    """A (B, C, U, V, H, W) tensor that in most support positions of a pair holds one number per channel."""

    values: Tensor
    """(n, C, H, W): the positions written down, pair by pair."""
    pairs: Tensor
    """(n,) int64, ascending: which pair each row is of."""
    positions: Tensor
    """(n,) int64, ascending within a pair: where on the support grid, counted row by row."""
    count: int
    """B."""
    grid: tuple[int, int]
    """(U, V)."""
    fill: Tensor | None = None
    """(B, C): the value at all other positions; None is 0."""

    @classmethod
    def complete(cls, values: Tensor, count: int, grid: tuple[int, int]) -> SparseActivations:
        """Rows with every position of B pairs written down."""
        pairs, positions = _divide(torch.arange(len(values), device=values.device), grid[0] * grid[1])
        return cls(values, pairs, positions, count, grid)

    @property
    def is_complete(self) -> bool:
        return len(self.values) == self.count * self.grid[0] * self.grid[1]

    def numbers(self) -> Tensor:
        """(B, P) int64: the row of each position, or n where it is not written down."""
        table = torch.full((self.count, self.grid[0] * self.grid[1]), len(self.values), device=self.pairs.device)
        table[self.pairs, self.positions] = torch.arange(len(self.values), device=self.pairs.device)
        return table

    def completed(self) -> SparseActivations:
        """The same with every position written down."""
        if self.is_complete:
            return self
        fill = self.values.new_zeros(self.count, self.values.shape[1]) if self.fill is None else self.fill
        size, shape = self.grid[0] * self.grid[1], self.values.shape[1:]
        everything = fill[:, None, :, None, None].expand(-1, size, *shape).flatten(0, 1)
        values = everything.index_copy(0, self.pairs * size + self.positions, self.values)
        return SparseActivations.complete(values, self.count, self.grid)


@dataclass(frozen=True)
class Windows:
    """What a zero-padded k x k kernel meets at each of its P' steps over the support grids of activations."""

    grid: tuple[int, int]
    """(U', V') of the output, P' = U' V'."""
    rows: Sequence[Tensor]
    """B P' index lists: the rows under the kernel."""
    offsets: Sequence[Tensor]
    """B P' index lists: where in the kernel, counted row by row, each of them lies."""
    unwritten: Tensor
    """(B P', k k) bool: the kernel meets a position of the grid that has no row."""
    pivots: Tensor
    """(B P',) int64: the row under the kernel's centre, or n where there is none."""

    @classmethod
    def over(cls, rows: SparseActivations, kernel_size: int, stride: int) -> Windows:
        count, pad = len(rows.values), kernel_size // 2
        with_border = F.pad(rows.numbers().unflatten(1, rows.grid), (pad, pad, pad, pad), value=count + 1)
        steps = with_border.unfold(1, kernel_size, stride).unfold(2, kernel_size, stride)
        met = steps.flatten(3).flatten(0, 2)
        written = met < count
        sizes = written.sum(1).tolist()
        return cls(
            (steps.shape[1], steps.shape[2]),
            met[written].split(sizes),
            written.nonzero()[:, 1].split(sizes),
            met == count,
            met[:, kernel_size**2 // 2],
        )


def convolve(conv: CenterPivotConv4d, rows: SparseActivations) -> SparseActivations:
    """The centre-pivot convolution.

    Rows that are 0 elsewhere give rows that are the bias elsewhere. Rows with another fill give all positions: near
    the query's border the fill meets padding, and is no longer one number.
    """
    if rows.is_complete and rows.grid[0] * rows.grid[1] <= conv.kernel_size**2:
        return _convolve_small_grid(conv, rows)
    weights = _Weights.of(conv, rows.values.dtype)
    windows = Windows.over(rows, conv.kernel_size, conv.support_stride)
    steps = torch.arange(len(windows.rows), device=rows.pairs.device)
    if rows.fill is None:
        steps = steps[torch.tensor([len(met) > 0 for met in windows.rows], device=steps.device)]
        constant = weights.bias.expand(len(steps), -1)
        fill = rows.values.new_zeros(rows.count, rows.values.shape[1])
    else:
        fill = rows.fill
        # Where the support kernel meets the fill, its part is one number per output position and channel.
        met = windows.unwritten.to(fill.dtype).unflatten(0, (rows.count, -1))
        constant = weights.bias + torch.einsum("bpj,ocj,bc->bpo", met, weights.support.flatten(2), fill).flatten(0, 1)
    pairs, positions = _divide(steps, len(windows.rows) // rows.count)
    pivots = windows.pivots[steps]
    written = pivots < len(rows.values)
    # Pictures of the pivots written down, then for each pair the one of all its pivots that are not.
    filled = fill[:, :, None, None].expand(-1, -1, *rows.values.shape[2:])
    pictures = torch.cat([weights.over_query(rows.values[pivots[written]]), weights.over_query(filled)])
    values = pictures[torch.where(written, written.cumsum(0) - 1, len(pictures) - rows.count + pairs)]
    values += constant[:, :, None, None]
    kept = steps.tolist()
    values = _AddSupportSide.apply(
        values,
        rows.values,
        weights.support,
        [windows.rows[step] for step in kept],
        [windows.offsets[step] for step in kept],
    )
    new_fill = weights.bias.expand(rows.count, -1) if rows.fill is None else None
    return SparseActivations(values, pairs, positions, rows.count, windows.grid, new_fill)


def normalise(norm: nn.GroupNorm, rows: SparseActivations) -> SparseActivations:
    """GroupNorm of each pair over its whole grid, what is not written down included, then ReLU."""
    fill = rows.values.new_zeros(rows.count, rows.values.shape[1]) if rows.fill is None else rows.fill
    size = rows.grid[0] * rows.grid[1]
    values, fill = _NormaliseRelu.apply(rows.values, fill, norm.weight, norm.bias, rows.pairs, size, norm)
    return SparseActivations(
        values, rows.pairs, rows.positions, rows.count, rows.grid, None if rows.is_complete else fill
    )


def _divide(numbers: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Numbers counted over all pairs -> (pair, position), `size` positions each."""
    return numbers // size, numbers % size


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


def _convolve_small_grid(conv: CenterPivotConv4d, rows: SparseActivations) -> SparseActivations:
    """All positions written down and a kernel larger than the grid: the support side is one matrix."""
    weights, stride = _Weights.of(conv, rows.values.dtype), conv.support_stride
    numbers = rows.numbers().unflatten(1, rows.grid)[:, ::stride, ::stride]
    pivots = rows.values if stride == 1 else rows.values[numbers.flatten()]
    values = weights.over_query(pivots, weights.bias)
    # (C_out, P', C, P) to (P' C_out, P C)
    matrix = support_matrix(weights.support, rows.grid, stride).permute(1, 0, 3, 2).flatten(2).flatten(0, 1)
    flat = torch.baddbmm(
        values.view(rows.count, -1, values[0, 0].numel()),
        matrix.expand(rows.count, -1, -1),
        rows.values.reshape(rows.count, -1, values[0, 0].numel()),
    )
    return SparseActivations.complete(flat.view_as(values), rows.count, (numbers.shape[1], numbers.shape[2]))


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
        for target, met, where in zip(out.flatten(2), rows, offsets, strict=True):
            if len(met):
                target.addmm_(kernel[:, where].flatten(1), flat.index_select(0, met).flatten(0, 1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        flat, kernel = values.flatten(2), _by_offset(weight)
        for_values = torch.zeros_like(flat) if ctx.needs_input_grad[1] else None
        for_kernel = torch.zeros_like(kernel)
        for gradient, met, where in zip(gradients[0].flatten(2), ctx.rows, ctx.offsets, strict=True):
            if not len(met):
                continue
            gathered = flat.index_select(0, met).flatten(0, 1)
            for_kernel.index_add_(1, where, (gradient @ gathered.t()).unflatten(1, (len(met), -1)))
            if for_values is not None:
                back = kernel[:, where].flatten(1).t() @ gradient
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
        ctx: Any,
        values: Tensor,
        fill: Tensor,
        weight: Tensor,
        bias: Tensor,
        pairs: Tensor,
        size: int,
        norm: nn.GroupNorm,
    ) -> tuple[Tensor, Tensor]:
        channels, height, width = values.shape[1:]
        width_of_group = channels // norm.num_groups
        unwritten = size - torch.bincount(pairs, minlength=len(fill)).to(weight.dtype)[:, None]
        mean, variance = _moments(values, fill.to(weight.dtype), pairs, unwritten / size, size, norm.num_groups)
        mean, scale = (
            part.repeat_interleave(width_of_group, 1) for part in (mean, torch.rsqrt(variance + norm.eps))
        )  # (B, C)
        factor = scale * weight
        offset = bias - mean * factor
        out = torch.addcmul(_each(offset, pairs, values), values, _each(factor, pairs, values)).relu_()
        filled = (offset + fill * factor).relu_().to(values.dtype)
        ctx.save_for_backward(values, fill, weight, mean, scale, out, filled, pairs, unwritten)
        ctx.groups, ctx.places, ctx.elements = norm.num_groups, height * width, size * height * width * width_of_group
        return out, filled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, fill, weight, mean, scale, out, filled, pairs, unwritten = ctx.saved_tensors
        for_out = torch.ops.aten.threshold_backward(gradients[0], out, 0)
        for_fill = gradients[1] * (filled > 0)
        centred_fill = (fill - mean) * scale
        flat, flat_gradient = values.flatten(2), for_out.flatten(2)
        products = torch.bmm(flat.flatten(0, 1)[:, None], flat_gradient.flatten(0, 1)[:, :, None])
        sums, sums_of_products = (
            torch.zeros_like(mean).index_add_(0, pairs, of_rows.to(mean.dtype))
            for of_rows in (flat_gradient.sum(2, dtype=mean.dtype), products.view(values.shape[:2]))
        )
        # (B, C): what the gradient sums to, alone and times x = (values - mean) scale, the normalised value
        first = sums + for_fill
        second = (sums_of_products - mean * sums) * scale + for_fill * centred_fill

        def of_group(sums: Tensor) -> Tensor:
            spread = (weight * sums).view(len(sums), ctx.groups, -1)
            return (spread.sum(2) / ctx.elements).repeat_interleave(spread.shape[2], 1)

        # d values = scale (weight d out - level - slope x)
        level, slope = of_group(first), of_group(second)
        constant, linear = scale * (slope * scale * mean - level), -scale * scale * slope
        for_values = torch.addcmul(_each(constant, pairs, values), values, _each(linear, pairs, values))
        for_values.addcmul_(for_out, _each(scale * weight, pairs, values))
        fill_gradient = scale * (weight * for_fill - ctx.places * unwritten * (level + slope * centred_fill))
        return for_values, fill_gradient.to(fill.dtype), second.sum(0), first.sum(0), None, None, None


def _each(channels: Tensor, pairs: Tensor, values: Tensor) -> Tensor:
    """(B, C) to be broadcast over rows (n, C, H, W) of another dtype."""
    return channels.to(values.dtype)[pairs][:, :, None, None]


def _moments(
    values: Tensor, fill: Tensor, pairs: Tensor, share: Tensor, size: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each pair's groups, (B, groups) each in the dtype of `fill`.

    `share` (B, 1) is that of the positions not written down: together they are one part, every row is another. Parts
    are combined by the law of total variance, so that a large mean costs no digits.
    """
    parts = fill.view(len(fill), groups, -1)
    fill_means, fill_variances = parts.mean(2), parts.var(2, correction=0)
    if not len(values):
        return fill_means, fill_variances
    count, channels, height, width = values.shape
    _, means, scales = torch.native_group_norm(values, None, None, count, channels, height * width, groups, _TINY)
    means, variances = means.to(fill.dtype), scales.to(fill.dtype) ** -2 - _TINY
    mean = (share * fill_means).index_add(0, pairs, means / size)
    variance = share * (fill_variances + (fill_means - mean).square())
    variance = variance.index_add(0, pairs, (variances + (means - mean[pairs]).square()) / size)
    return mean, variance.clamp_(min=0)


_TINY = 1e-20
"""Replaces GroupNorm's own eps, which is added to the combined variance; keeps a constant row's variance finite."""
