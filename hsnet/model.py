"""HSNet's learner: squeeze every level of the hypercorrelation pyramid, mix top-down, decode to a mask.

Dimension key: B batch, L layers of one level, C channels, U V support grid, H W query grid.
Pyramids and everything that lists levels here run deepest level first, the order in which the paper mixes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsnet.contrast import MAPS, contrast_maps
from hsnet.correlation import build_pyramid
from hsnet.errors import ConfigError, ShapeError
from hsnet.kernels import KERNELS

CHANNELS = (16, 64, 128)
"""Output channels of a squeeze block's three convolutions."""
SQUEEZE_KERNELS = ((3, 3, 3), (5, 3, 3), (5, 5, 3))
"""Kernel sides of the squeeze blocks, deepest level first."""
SQUEEZE_STRIDES = ((2, 2, 2), (4, 2, 2), (4, 4, 2))
"""Support strides of the squeeze blocks, deepest level first: each level ends at the same small support grid."""
MIX_CONVOLUTIONS = 3
MOST_CONVOLUTIONS = 4
"""Of a squeeze block."""
GROUPS = 4
"""Groups of every GroupNorm."""
KERNEL = "center-pivot"


def block(
    in_channels: int,
    channels: Sequence[int],
    kernels: Sequence[int],
    strides: Sequence[int],
    groups: int = GROUPS,
    kernel: str = KERNEL,
) -> nn.Sequential:
    """4D convolutions (`hsnet.kernels.KERNELS`), each followed by GroupNorm (per sample, eps 1e-5) and ReLU."""
    layers: list[nn.Module] = []
    for width, side, stride in zip(channels, kernels, strides, strict=True):
        layers += [
            KERNELS[kernel](in_channels, width, side, stride),
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
        kernel: of all 4D convolutions, a key of `hsnet.kernels.KERNELS`.
        groups: of every normalisation; must divide all channels.
        picked: for every level of the features, deepest first, the layers used, counted from 0 at the shallowest; a
            level of which none is used is left out. `layers`, `kernels` and `strides` are those of the levels used.
            All layers by default.
        support_mask: correlate with the support's object only, as published; False correlates with the whole photo.
        background: the decoder also sees the contrast maps of every layer (`hsnet.contrast`): how similar the support's
            most similar object position is, and its most similar background position, and the difference.

    The last three say what is made of features; `answer` reads them, and so does `hsnet.fused`, which is faster.
    `forward` takes the pyramid, one (B, L, U, V, H, W) tensor per level used, deepest first
    (`hsnet.correlation.build_pyramid`), and returns logits (B, 2, 2 H, 2 W), H W the finest query grid; channel 0 is
    background. Bring them to a mask's size with `resize_logits`; the prediction is `predict_mask`.

    Raises:
        ConfigError: arguments that do not fit each other.
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
        *,
        kernel: str = KERNEL,
        groups: int = GROUPS,
        picked: Sequence[Sequence[int]] | None = None,
        support_mask: bool = True,
        background: bool = False,
    ) -> None:
        super().__init__()
        if not len(layers) == len(kernels) == len(strides):
            raise ConfigError(
                f"Levels, kernels and strides must be as many: {len(layers)}, {len(kernels)} and {len(strides)}. For "
                "other levels than three, `squeeze_plan` chooses kernels and strides."
            )
        _require_fitting(layers, channels, kernels, kernel, groups, picked)
        width = channels[-1]
        self.kernel = kernel
        self.picked = None if picked is None else tuple(tuple(of_level) for of_level in picked)
        self.support_mask = support_mask
        self.background = background
        self.squeeze = nn.ModuleList(
            block(count, channels, sides, steps, groups, kernel)
            for count, sides, steps in zip(layers, kernels, strides, strict=True)
        )
        self.mix = nn.ModuleList(
            block(width, (width,) * mix_convolutions, (3,) * mix_convolutions, (1,) * mix_convolutions, groups, kernel)
            for _ in layers[1:]
        )
        maps = MAPS * sum(layers) if background else 0
        self.decode_coarse = nn.Sequential(
            nn.Conv2d(width + maps, width, 3, padding=1),
            nn.ReLU(True),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.ReLU(True),
        )
        self.decode_fine = nn.Sequential(
            nn.Conv2d(width // 2, width // 2, 3, padding=1),
            nn.ReLU(True),
            nn.Conv2d(width // 2, 2, 3, padding=1),
        )

    def forward(self, pyramid: Sequence[Tensor], contrast: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(pyramid, contrast))

    def answer(self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, unit: bool = False) -> Tensor:
        """Features and masks in, logits out: the plain reading of what `hsnet.fused.FusedHSNet` computes.

        Args:
            query, support: levels, finest first, each (B, L, H, W, C), all layers of all levels.
            mask: (B, S, S') support masks at network size, 1 inside the object.
            unit: see `hsnet.correlation`.

        Returns:
            (B, 2, 2 H, 2 W) float32 logits.
        """
        query, support = self.chosen(query), self.chosen(support)
        pyramid = build_pyramid(query, support, self.seen(mask), unit=unit)
        return self(pyramid, contrast_maps(query, support, mask, unit) if self.background else None)

    def chosen(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Of feature levels, finest first, each (B, L, H, W, C), the levels and layers used.

        Raises:
            ConfigError: the features hold fewer.
        """
        if self.picked is None:
            return list(levels)
        if len(levels) != len(self.picked) or any(
            max(of_level, default=-1) >= level.shape[1]
            for of_level, level in zip(reversed(self.picked), levels, strict=True)
        ):
            raise ConfigError(
                f"The learner uses layers {[list(of_level) for of_level in self.picked]} of its levels (deepest first, "
                f"counted from 0), but the features hold {[level.shape[1] for level in reversed(levels)]}."
            )
        return [
            _layers(level, of_level) for level, of_level in zip(levels, reversed(self.picked), strict=True) if of_level
        ]

    def seen(self, mask: Tensor) -> Tensor:
        """The part of the support that is correlated: its mask, or all of it without `support_mask`."""
        return mask if self.support_mask else torch.ones_like(mask)

    def encode(self, pyramid: Sequence[Tensor], contrast: Tensor | None = None) -> Tensor:
        """What the decoder reads: `squeezed_mean`, then the contrast maps (B, M, H, W) of a learner that sees them."""
        if self.background != (contrast is not None):
            raise ShapeError(f"This learner reads {'' if self.background else 'no '}contrast maps beside the pyramid.")
        context = self.squeezed_mean(pyramid)
        return context if contrast is None else torch.cat([context, contrast.to(context.dtype)], 1)

    def squeezed_mean(self, pyramid: Sequence[Tensor]) -> Tensor:
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


def _require_fitting(
    layers: Sequence[int],
    channels: Sequence[int],
    kernels: Sequence[Sequence[int]],
    kernel: str,
    groups: int,
    picked: Sequence[Sequence[int]] | None,
) -> None:
    if kernel not in KERNELS:
        raise ConfigError(f"Unknown kernel '{kernel}'. Choose one of: {', '.join(KERNELS)}.")
    depths = sorted({len(channels), *map(len, kernels)})
    if len(depths) > 1:
        raise ConfigError(f"Squeeze blocks of {len(channels)} channels cannot have {depths} kernels: give as many.")
    if min(*channels, channels[-1] // 2) < 1:
        raise ConfigError(f"The learner's channels must be positive, the last at least 2, got {tuple(channels)}.")
    if groups < 1 or any(width % groups for width in channels):
        raise ConfigError(f"{groups} groups do not divide the learner's channels {tuple(channels)}.")
    if picked is not None and [len(of_level) for of_level in picked if of_level] != list(layers):
        raise ConfigError(f"The layers picked, {[list(level) for level in picked]}, are not {list(layers)} per level.")


def _layers(level: Tensor, chosen: Sequence[int]) -> Tensor:
    """Layers of (B, L, H, W, C); a view if they are neighbours."""
    if list(chosen) == list(range(chosen[0], chosen[-1] + 1)):
        return level[:, chosen[0] : chosen[-1] + 1]
    return level[:, list(chosen)]


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
    grids: Sequence[tuple[int, int]], depth: int = len(CHANNELS)
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Kernels and strides of squeeze blocks that bring the support grids of any levels together.

    Args:
        grids: (rows, columns) of every level, deepest level first; equal, halving or any other sizes.
        depth: convolutions per block, 1 to 4.

    Returns:
        Kernel sides and support strides of every level's convolutions, for `HSNet`.

    Raises:
        ConfigError: no strides bring these grids together.

    A block of three shrinks its support grid by 2 three times, as the published one of the deepest level; a finer level
    doubles as many of its strides as it takes, the first ones first, and a stride of 4 has a kernel of 5, as published.
    Equal grids have equal strides. The published strides (one doubling more for each finer grid) are taken where they
    fit; otherwise the coarsest grid's own are as small as bring it to 2 x 2 or less, and the others follow.

    Blocks of another depth shrink each grid as often by 2, shared out as evenly as it goes, the first convolutions
    first: (2, 2, 2, 1) for (2, 2, 2), and (4, 2) for it in a block of two. A stride of 8 has a kernel of 9, so that no
    position is skipped. One convolution shrinks by 8 at most: then the levels meet at a larger grid than 2 x 2, or not
    at all.

    >>> squeeze_plan([(13, 13), (25, 25), (50, 50)]) == (SQUEEZE_KERNELS, SQUEEZE_STRIDES)
    True
    >>> squeeze_plan([(16, 16)])
    (((3, 3, 3),), ((2, 2, 2),))
    >>> squeeze_plan([(37, 37), (37, 37)])
    (((5, 5, 3), (5, 5, 3)), ((4, 4, 2), (4, 4, 2)))
    >>> squeeze_plan([(13, 13), (25, 25), (50, 50)], depth=2)[1]
    ((4, 2), (4, 4), (8, 4))
    """
    if not 1 <= depth <= MOST_CONVOLUTIONS:
        raise ConfigError(f"A squeeze block has 1 to {MOST_CONVOLUTIONS} convolutions, got a depth of {depth}.")
    different = sorted(set(grids))
    for halvings in _halving_choices(different, depth):
        by_grid = {grid: _strides(count, depth) for grid, count in zip(different, halvings, strict=True)}
        strides = tuple(by_grid[grid] for grid in grids)
        if len(set(squeezed_grids(grids, strides))) == 1:
            kernels = tuple(tuple(max(3, stride + 1) for stride in steps) for steps in strides)
            return kernels, strides
    raise ConfigError(
        f"Support grids of {', '.join(f'{rows}x{columns}' for rows, columns in grids)} (deepest level first) cannot be "
        f"brought together by the learner's strides{'' if depth == len(CHANNELS) else f' at depth {depth}'}: choose "
        "another image size or other layers."
    )


def squeeze_channels(depth: int) -> tuple[int, ...]:
    """Output channels of a squeeze block of so many convolutions: the last of the published ones, or 128 once more.

    >>> squeeze_channels(2), squeeze_channels(4)
    ((64, 128), (16, 64, 128, 128))
    """
    return CHANNELS[-depth:] + CHANNELS[-1:] * (depth - len(CHANNELS))


def _strides(halvings: int, depth: int) -> tuple[int, ...]:
    """So many halvings shared out over a block's convolutions, the first ones first."""
    return tuple(2 ** (halvings // depth + (place < halvings % depth)) for place in range(depth))


def _halving_choices(grids: Sequence[tuple[int, int]], depth: int) -> Iterator[tuple[int, ...]]:
    """How often different grids, coarsest first, may be halved; the better choices earlier."""
    published = len(CHANNELS)  # halvings of the deepest level
    least, most = min(published, depth), min(2 * published, 3 * depth)
    if 1 < len(grids) <= most - published + 1:
        yield tuple(range(published, published + len(grids)))
    ends = {count: squeezed_grids(grids[:1], [_strides(count, depth)])[0] for count in range(least, most + 1)}
    smallest = next((count for count, end in ends.items() if max(end) <= 2), most)
    for first in (*range(smallest, most + 1), *range(smallest - 1, least - 1, -1)):
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
