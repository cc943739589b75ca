"""How many multiply-adds an episode needs once exact savings are made: the limit a time is compared with.

Left out because they are exactly zero or constant: correlation outside the object, kernel weights that meet padding,
and, in the first convolutions, everything that meets a support position outside the object (the bias is all that comes
of it). Counted in full: every later convolution. Normalisation, resizing and the loss are not multiplications worth
counting; that a real kernel cannot leave out every zero is its loss, not the limit's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsnet.backbone import backbone_spec
from hsnet.correlation import interpolate_mask
from hsnet.model import CHANNELS, MIX_CONVOLUTIONS, SQUEEZE_KERNELS, SQUEEZE_STRIDES

PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
}
"""Part of a device's name -> dense bfloat16 teraflops its maker states (a multiply-add is two); first match."""


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one 1-shot episode, forward."""

    correlation: int
    first: int
    """The first convolution of every squeeze block, whose input needs no gradient."""
    rest: int

    @property
    def evaluation(self) -> int:
        return self.correlation + self.first + self.rest

    @property
    def training(self) -> int:
        """Forward and backward: a convolution again for its weights, and, but for the first, for its input."""
        return self.correlation + 2 * self.first + 3 * self.rest


def count(backbone: str, size: int, masks: Tensor) -> Count:
    """The mean over support masks (N, S, S) of what an episode with each of them needs."""
    counts = [_count_one(backbone, size, mask[None]) for mask in masks.cpu()]
    means = [round(sum(values) / len(counts)) for values in zip(*counts, strict=True)]
    return Count(*means)


def peak_tflops(device_name: str) -> float | None:
    """Peak of a device by its name; None for one that is not in the table.

    >>> peak_tflops("NVIDIA H200"), peak_tflops("NVIDIA L40S"), peak_tflops("Imaginary 9000")
    (989, 362, None)
    """
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def _count_one(backbone: str, size: int, mask: Tensor) -> tuple[int, int, int]:
    spec = backbone_spec(backbone)
    correlation = first = rest = 0
    finest_up = [spec.level_shape(level, (size, size)) for level in range(spec.levels)]
    for level, kernels, strides in zip(reversed(range(spec.levels)), SQUEEZE_KERNELS, SQUEEZE_STRIDES, strict=True):
        layers, rows, columns, _ = finest_up[level]
        inside = interpolate_mask(mask, (rows, columns))[0] > 0
        correlation += int(inside.sum()) * rows * columns * sum(spec.channels[level])
        first += layers * CHANNELS[0] * _pairs(inside, (rows, columns), kernels[0], strides[0])
        grid = _strided(inside.shape, strides[0])
        for into, out, kernel, stride in zip(CHANNELS[:-1], CHANNELS[1:], kernels[1:], strides[1:], strict=True):
            rest += into * out * _pairs(torch.ones(grid, dtype=torch.bool), (rows, columns), kernel, stride)
            grid = _strided(grid, stride)
        if level < spec.levels - 1:
            full = torch.ones(grid, dtype=torch.bool)
            rest += MIX_CONVOLUTIONS * CHANNELS[-1] ** 2 * _pairs(full, (rows, columns), 3, 1)
    rows, columns = finest_up[0][1:3]
    width = CHANNELS[-1]
    for into, out, scale in (
        (width, width, 1),
        (width, width // 2, 1),
        (width // 2, width // 2, 2),
        (width // 2, 2, 2),
    ):
        rest += into * out * _reach(scale * rows, 3, 1) * _reach(scale * columns, 3, 1)
    return correlation, first, rest


def _pairs(inside: Tensor, query: tuple[int, int], kernel: int, stride: int) -> int:
    """Multiplications of a centre-pivot convolution, per input and output channel, that meet no zero."""
    over_query = int(inside[::stride, ::stride].sum()) * _reach(query[0], kernel, 1) * _reach(query[1], kernel, 1)
    hits = [_hits(length, kernel, stride) for length in inside.shape]
    over_support = int((hits[0][:, None] * hits[1][None] * inside).sum()) * query[0] * query[1]
    return over_query + over_support


def _hits(length: int, kernel: int, stride: int) -> Tensor:
    """For each of `length` inputs in a row, how many outputs of a padded convolution it reaches."""
    outputs = torch.arange(0, length, stride)
    return ((torch.arange(length)[:, None] - outputs[None]).abs() <= kernel // 2).sum(1)


def _reach(length: int, kernel: int, stride: int) -> int:
    return int(_hits(length, kernel, stride).sum())


def _strided(grid: tuple[int, ...] | torch.Size, stride: int) -> tuple[int, int]:
    return -(-grid[0] // stride), -(-grid[1] // stride)
