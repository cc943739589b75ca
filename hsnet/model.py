"""HSNet's learner: squeeze every level of the hypercorrelation pyramid, mix top-down, decode to a mask.

Dimension key: B batch, L layers of one level, C channels, U V support grid, H W query grid.
Pyramids and everything that lists levels here run deepest level first, the order in which the paper mixes them.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        channels, kernels, strides: of the squeeze blocks; the published ones by default.
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
                f"Levels, kernels and strides must be as many: {len(layers)}, {len(kernels)} and {len(strides)}."
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
