"""4D convolutions by name: the paper's centre-pivot kernel and the two that it is compared with.

Dimension key: B batch, C channels, U V support grid, H W query grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsnet.conv4d import CenterPivotConv4d, over_support, require_odd, require_pyramid_level


class DenseConv4d(nn.Module):
    """A 4D convolution with all k^4 weights.

    Args, input and output as `CenterPivotConv4d`; one bias.

    Computed as k 3D convolutions over (V, H, W), one for each row of the kernel in U, at the support positions that
    survive the stride only and without rows of padding. Memory: beside the output, one row in k of the input at a time
    (all of them while gradients are kept).

    Source: the "original 4D" of Min et al. 2021, Table 5, after Rocco et al. 2018. The paper's 702 G multiplications
    are those of every support position, which are then thrown away but for the strided ones; the results are the same.

    >>> DenseConv4d(3, 16, 5, support_stride=4)(torch.zeros(1, 3, 13, 13, 7, 7)).shape
    torch.Size([1, 16, 4, 4, 7, 7])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, support_stride: int = 1) -> None:
        super().__init__()
        require_odd(kernel_size)
        self.kernel_size = kernel_size
        self.support_stride = support_stride
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *(kernel_size,) * 4))
        self.bias = nn.Parameter(torch.empty(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch initialises its own convolutions
        nn.init.uniform_(self.bias, -1 / math.sqrt(self.weight[0].numel()), 1 / math.sqrt(self.weight[0].numel()))

    def forward(self, x: Tensor) -> Tensor:
        require_pyramid_level(x, self.weight.shape[1])
        side, stride, pad = self.kernel_size, self.support_stride, self.kernel_size // 2
        rows = x.shape[2]
        out_rows = -(-rows // stride)
        out: Tensor | None = None
        for offset in sorted(range(side), key=lambda offset: abs(offset - pad)):  # the centre first: it meets all rows
            # Output row i reads input row i stride + offset - pad, where there is one.
            first = max(0, -(-(pad - offset) // stride))
            end = min(out_rows, (rows - 1 - offset + pad) // stride + 1)
            if first >= end:
                continue
            start = first * stride + offset - pad
            met = x[:, :, start : start + (end - first - 1) * stride + 1 : stride].transpose(1, 2)
            part = F.conv3d(
                met.flatten(0, 1), self.weight[:, :, offset], stride=(stride, 1, 1), padding=(pad, pad, pad)
            ).unflatten(0, (len(x), -1))
            if out is None:
                out = part
            else:
                out[:, first:end] += part
        assert out is not None
        return (out + self.bias.to(out.dtype)[:, None, None, None]).transpose(1, 2)


class SeparableConv4d(nn.Module):
    """A 4D convolution as products of 2D ones: over the support grid, then over the query grid, and both again.

    Args, input and output as `CenterPivotConv4d`. Each 2D convolution keeps the channels of the input, a ReLU stands
    between the two pairs, and a 1 x 1 convolution (where `out_channels` are others) comes last. The stride is taken by
    the first convolution, so that everything after it is computed at surviving positions.

    A pair is Yang & Ramanan's separable 4D convolution: a 4D kernel that is the product of two 2D kernels. Which form
    the paper's Table 5 counted it does not say. Of those that were tried this one alone has its figures: 4.37 M
    parameters for ResNet-101 (paper: 4.4 M) and, within 1 %, its multiplications. One pair in place of two has 2.3 to
    2.9 M, whichever of the two widens the channels; Yang & Ramanan's residual block, whose second pair has the channels
    of the output, 5.4 M. The normalisations inside their pairs are left out: every convolution of a block here is
    followed by its own.

    Source: Yang & Ramanan 2019, Sec. 3.2; Min et al. 2021, Table 5.

    >>> SeparableConv4d(3, 16, 5, support_stride=4)(torch.zeros(1, 3, 13, 13, 7, 7)).shape
    torch.Size([1, 16, 4, 4, 7, 7])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, support_stride: int = 1) -> None:
        super().__init__()
        require_odd(kernel_size)
        pad = kernel_size // 2

        def support_side(stride: int) -> nn.Conv3d:
            sides, strides = (kernel_size, kernel_size, 1), (stride, stride, 1)
            return nn.Conv3d(in_channels, in_channels, sides, stride=strides, padding=(pad, pad, 0))

        def query_side() -> nn.Conv3d:
            return nn.Conv3d(in_channels, in_channels, (1, kernel_size, kernel_size), padding=(0, pad, pad))

        self.support = nn.ModuleList([support_side(support_stride), support_side(1)])
        self.query = nn.ModuleList([query_side(), query_side()])
        self.widen = nn.Identity() if out_channels == in_channels else nn.Conv3d(in_channels, out_channels, 1)
        self.in_channels = in_channels
        self.support_stride = support_stride

    def forward(self, x: Tensor) -> Tensor:
        require_pyramid_level(x, self.in_channels)
        grid = tuple(-(-side // self.support_stride) for side in x.shape[2:4])
        picture = x.shape[4:]
        for number, (support, query) in enumerate(zip(self.support, self.query, strict=True)):
            assert isinstance(support, nn.Conv3d)
            x = over_support(support, x.relu() if number else x)
            x = query(x.reshape(len(x), self.in_channels, -1, *picture)).unflatten(2, grid)
        return self.widen(x.flatten(2, 3)).unflatten(2, grid)


KERNELS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "center-pivot": CenterPivotConv4d,
    "original": DenseConv4d,
    "separable": SeparableConv4d,
}
"""Name -> a convolution made from (in_channels, out_channels, kernel_size, support_stride)."""
