"""HSNet's learner: squeeze every level of the hypercorrelation pyramid, mix top-down, decode to a mask.

Dimension key: B batch, L layers of one level, C channels, U V support grid, H W query grid.
Pyramids and everything that lists levels here run deepest level first, the order in which the paper mixes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hsnet.conv4d import CenterPivotConv4d
from hsnet.errors import ConfigError, ShapeError

CHANNELS = (16, 64, 128)
"""Output channels of a squeeze block's three convolutions."""
SQUEEZE_KERNELS = ((3, 3, 3), (5, 3, 3), (5, 5, 3))
"""Kernel sides of the squeeze blocks, deepest level first."""
SQUEEZE_STRIDES = ((2, 2, 2), (4, 2, 2), (4, 4, 2))
"""Support strides of the squeeze blocks, deepest level first: each level ends at the same small support grid."""
MIX_CONVOLUTIONS = 3
GROUPS = 4
"""Groups of every GroupNorm."""


def block(
    in_channels: int,
    channels: Sequence[int],
    kernels: Sequence[int],
    strides: Sequence[int],
    groups: int = GROUPS,
) -> nn.Sequential:
    """Centre-pivot convolutions, each followed by GroupNorm (per sample, eps 1e-5) and ReLU."""
    layers: list[nn.Module] = []
    for width, kernel, stride in zip(channels, kernels, strides, strict=True):
        layers += [
            CenterPivotConv4d(in_channels, width, kernel, stride),
            nn.GroupNorm(groups, width),
            nn.ReLU(True),
        ]
        in_channels = width
    return nn.Sequential(*layers)


class HSNet(nn.Module):
    """The learnable part of HSNet. Everything before it is frozen.

    Args:
        layers: correlation layers of each level, deepest first: (1, 3, 3) for VGG-16, (3, 6, 4) for ResNet-50,
            (3, 23, 4) for ResNet-101.
        channels, kernels, strides: of the squeeze blocks; the published ones, for three levels, by default. For others
            see `squeeze_plan`.
        mix_convolutions: convolutions per mix block.

    `forward` takes the pyramid, one (B, L, U, V, H, W) tensor per level, deepest first
    (`hsnet.correlation.build_pyramid`), and returns logits (B, 2, 2 H, 2 W), H W the finest query grid; channel 0 is
    background. Bring them to a mask's size with `resize_logits`; the prediction is `predict_mask`.

    Raises:
        ShapeError: levels whose support grids differ after squeezing. (Published code adds a 1x1 grid to a 2x2 one
            by broadcasting, for instance VGG-16 at 264 px, and goes on.)

    Any size works otherwise, square or not. The published decoder doubles the width for both sides; this one doubles
    each side, which is the same for square images and keeps the aspect ratio of others.

    Source: Min et al. 2021, Sec. 4.2-4.4 and Tables A5-A7.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int] = CHANNELS,
        kernels: Sequence[Sequence[int]] = SQUEEZE_KERNELS,
        strides: Sequence[Sequence[int]] = SQUEEZE_STRIDES,
        mix_convolutions: int = MIX_CONVOLUTIONS,
    ) -> None:
        super().__init__()
        if not len(layers) == len(kernels) == len(strides):
            raise ConfigError(
                f"Levels, kernels and strides must be as many: {len(layers)}, {len(kernels)} and {len(strides)}. For "
                "other levels than three, `squeeze_plan` chooses kernels and strides."
            )
        width = channels[-1]
        self.squeeze = nn.ModuleList(
            block(count, channels, kernel, stride)
            for count, kernel, stride in zip(layers, kernels, strides, strict=True)
        )
        self.mix = nn.ModuleList(
            block(width, (width,) * mix_convolutions, (3,) * mix_convolutions, (1,) * mix_convolutions)
            for _ in layers[1:]
        )
        self.decode_coarse = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(True),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.ReLU(True),
        )
        self.decode_fine = nn.Sequential(
            nn.Conv2d(width // 2, width // 2, 3, padding=1),
            nn.ReLU(True),
            nn.Conv2d(width // 2, 2, 3, padding=1),
        )

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        return self.decode(self.encode(pyramid))

    def encode(self, pyramid: Sequence[Tensor]) -> Tensor:
        """What is left of the support, its mean over the squeezed grid: (B, C, H, W)."""
        if len(pyramid) != len(self.squeeze):
            raise ShapeError(f"The learner has {len(self.squeeze)} levels, the pyramid {len(pyramid)}.")
        squeezed = [squeeze(level) for squeeze, level in zip(self.squeeze, pyramid, strict=True)]
        mixed = squeezed[0]
        for mix, finer in zip(self.mix, squeezed[1:], strict=True):
            require_same_grid(mixed.shape[2:4], finer.shape[2:4])
            mixed = mix(upsample_query_grid(mixed, (finer.shape[4], finer.shape[5])) + finer)
        return mixed.mean(dim=(2, 3))

    def decode(self, context: Tensor) -> Tensor:
        """Logits (B, 2, 2 H, 2 W) from `encode`."""
        context = self.decode_coarse(context)
        return self.decode_fine(resize_logits(context, (2 * context.shape[2], 2 * context.shape[3])))


def require_same_grid(coarser: Sequence[int], finer: Sequence[int]) -> None:
    """Raise ShapeError unless two levels have the same support grid (U, V) after squeezing."""
    if tuple(coarser) != tuple(finer):
        raise ShapeError(
            f"Support grids of neighbouring levels differ after squeezing: {tuple(coarser)} and {tuple(finer)}. "
            f"This image size does not suit this backbone; choose another."
        )


def squeezed_grids(
    grids: Sequence[tuple[int, int]], strides: Sequence[Sequence[int]] = SQUEEZE_STRIDES
) -> list[tuple[int, int]]:
    """Support grids after the squeeze blocks, deepest level first; a learner needs them all equal.

    >>> squeezed_grids([(13, 13), (25, 25), (50, 50)])
    [(2, 2), (2, 2), (2, 2)]
    """
    ends = []
    for (rows, columns), steps in zip(grids, strides, strict=True):
        for step in steps:
            rows, columns = -(-rows // step), -(-columns // step)
        ends.append((rows, columns))
    return ends


def squeeze_plan(
    grids: Sequence[tuple[int, int]],
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Kernels and strides of squeeze blocks that bring the support grids of any levels together.

    Args:
        grids: (rows, columns) of every level, deepest level first; equal, halving or any other sizes.

    Returns:
        Kernel sides and support strides of every level's three convolutions, for `HSNet`.

    Raises:
        ConfigError: no strides bring these grids together.

    A block shrinks its support grid by 2 three times, as the published one of the deepest level; a finer level doubles
    as many of its strides as it takes, the first ones first, and a stride of 4 has a kernel of 5, as published. Equal
    grids have equal strides. The published strides (one doubling more for each finer grid) are taken where they fit;
    otherwise the coarsest grid's own are as small as bring it to 2 x 2 or less, and the others follow.

    >>> squeeze_plan([(13, 13), (25, 25), (50, 50)]) == (SQUEEZE_KERNELS, SQUEEZE_STRIDES)
    True
    >>> squeeze_plan([(16, 16)])
    (((3, 3, 3),), ((2, 2, 2),))
    >>> squeeze_plan([(37, 37), (37, 37)])
    (((5, 5, 3), (5, 5, 3)), ((4, 4, 2), (4, 4, 2)))
    """
    different = sorted(set(grids))
    for doublings in _stride_choices(different):
        by_grid = {grid: _strides(count) for grid, count in zip(different, doublings, strict=True)}
        strides = tuple(by_grid[grid] for grid in grids)
        if len(set(squeezed_grids(grids, strides))) == 1:
            kernels = tuple(tuple(5 if stride == 4 else 3 for stride in steps) for steps in strides)
            return kernels, strides
    raise ConfigError(
        f"Support grids of {', '.join(f'{rows}x{columns}' for rows, columns in grids)} (deepest level first) cannot be "
        "brought together by the learner's strides: choose another image size or other layers."
    )


def _strides(doublings: int) -> tuple[int, ...]:
    return tuple(4 if place < doublings else 2 for place in range(len(CHANNELS)))


def _stride_choices(grids: Sequence[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
    """Numbers of doubled strides of different grids, coarsest first, the better choices earlier."""
    most = len(CHANNELS)
    if 1 < len(grids) <= most + 1:
        yield tuple(range(len(grids)))
    enough = [count for count in range(most + 1) if max(squeezed_grids(grids[:1], [_strides(count)])[0]) <= 2]
    smallest = enough[0] if enough else most
    for first in (*range(smallest, most + 1), *range(smallest - 1, -1, -1)):
        others = itertools.combinations_with_replacement(range(first, most + 1), len(grids) - 1)
        yield from ((first, *rest) for rest in others)


def upsample_query_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize the query grid of (B, C, U, V, H, W), bilinear with aligned corners, to exactly the finer level's size.

    The paper speaks of upsampling by two; 13 to 25 is not, and the published code resizes to the target.
    """
    return F.interpolate(x.flatten(1, 3), grid, mode="bilinear", align_corners=True).view(*x.shape[:4], *grid)


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) to another size, bilinear with aligned corners: how the published code reaches mask size."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=True)


def predict_mask(logits: Tensor) -> Tensor:
    """Hard masks (B, H, W), bool, from logits (B, 2, H, W). A tie is background."""
    return logits[:, 1] > logits[:, 0]
