"""A coarse answer brought to the photo's resolution along the photo's own edges.

A backbone answers on a grid of, say, 16 by 16 cells. Resized bilinearly its masks are blobs. Here the grid is doubled
again and again, and every new cell takes the mean of the nine old cells around it, weighted by how near they are and by
how much the photo has the same colour there (joint bilateral upsampling). From the working size to the photo's own, the
map is a linear function of the colours in each small window (fast guided filter), which costs the same for any photo.

Chosen by measured boundary scores against other ways to do it: docs/predict.md, `benchmarks/refine.py`.

Sources: Kopf et al. 2007, Joint Bilateral Upsampling, Sec. 3; He, Sun and Tang 2013, Guided Image Filtering, Eq. 18-19
(colour guide); He and Sun 2015, Fast Guided Filter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hsnet.errors import ShapeError

COLOUR = 0.1
"""Distance of colours, in RGB from 0 to 1, at which a cell counts exp(-1/2) as much as one of the same colour."""

NEARNESS = 0.8
"""The same of places, in cells of the coarser grid."""

WORKING_SIDE = 256
"""Longer side, in pixels, up to which a photo is doubled; larger photos follow from there by the guided filter."""

WINDOW = 1
"""Cells to each side of a window of the guided filter, at the working size."""

FLATNESS = 1e-3
"""Variance of colour below which a window counts as flat: there the map stays smooth."""

STRIP_PIXELS = 100_000
"""Pixels of the photo that are worked on at a time: few enough to stay in a core's cache."""

_NEVER_NOTHING = 1e-8
"""Weight of a cell of quite another colour: where all nine are, the place decides."""

Photo = Image.Image | NDArray[np.uint8]


def refine(
    margin: NDArray[np.float32], photo: Photo, *, colour: float = COLOUR, working_side: int = WORKING_SIDE
) -> NDArray[np.float32]:
    """The margin at the photo's resolution, its sign changing along the photo's edges.

    Args:
        margin: (h, w) finite, object above 0, in any unit; cells of an even grid on the photo.
        photo: RGB, as a Pillow image or (H, W, 3) uint8. Photos of other modes are taken as RGB.
        colour: see `COLOUR`; a higher one follows only strong edges.
        working_side: see `WORKING_SIDE`.

    Returns:
        (H, W) float32 in the margin's unit, object above 0. A constant margin stays constant; twice the margin gives
        twice the map.

    Raises:
        ShapeError: the margin is no (h, w) of finite numbers, or the photo no (H, W, 3) of bytes.

    Memory beside the photo and the result: under 200 MB for any photo. `refine_strips` gives the result part by part.
    """
    parts = list(refine_strips(margin, photo, colour=colour, working_side=working_side))
    return np.concatenate([part for _, part in parts]) if len(parts) > 1 else parts[0][1]


def refine_strips(
    margin: NDArray[np.float32], photo: Photo, *, colour: float = COLOUR, working_side: int = WORKING_SIDE
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """The same in strips from top to bottom, each with its rows: for photos whose result need not be held."""
    margin = np.asarray(margin, np.float32)
    if margin.ndim != 2 or not margin.size or not np.isfinite(margin).all():
        raise ShapeError(f"A margin to refine is (h, w) of finite numbers, got {margin.shape} or numbers that are not.")
    height, width = _size(photo)
    shrunk = min(1.0, working_side / max(height, width))
    size = max(1, round(height * shrunk)), max(1, round(width * shrunk))
    guide = _guide(photo, size)
    fine = upsample(torch.from_numpy(margin), guide, colour)
    if size == (height, width):
        yield slice(0, height), fine.numpy()
        return
    slope, offset = linear_model(guide, fine)
    model = torch.cat([slope, offset[None]])
    columns = _Between.of(width, size[1])
    strip = max(1, STRIP_PIXELS // width)
    for top in range(0, height, strip):
        rows = slice(top, min(top + strip, height))
        local = columns.read(_Between.of(height, size[0], rows).read(model.transpose(1, 2)).transpose(1, 2))
        colours = _colours(_part(photo, rows))
        yield rows, (local[:3] * colours).sum(0).add_(local[3]).numpy()


def upsample(coarse: Tensor, guide: Tensor, colour: float = COLOUR) -> Tensor:
    """Joint bilateral upsampling by doublings.

    Args:
        coarse: (h, w) float32.
        guide: (3, H, W) float32 from 0 to 1, the photo at the size that is wanted.
        colour: see `COLOUR`.

    Returns:
        (H, W) float32, between the least and the largest value of `coarse`.
    """
    height, width = guide.shape[1:]
    while coarse.shape != (height, width):
        size = min(height, 2 * coarse.shape[0]), min(width, 2 * coarse.shape[1])
        coarse = _bilateral_step(coarse, F.adaptive_avg_pool2d(guide[None], size)[0], colour)
    return coarse


def _bilateral_step(coarse: Tensor, guide: Tensor, colour: float) -> Tensor:
    """(h, w) at the guide's size: the mean of nine cells, by nearness and by likeness of colour."""
    (height, width), (rows, columns) = coarse.shape, guide.shape[1:]
    means = F.adaptive_avg_pool2d(guide[None], (height, width))[0]
    y, x = _places(rows, height), _places(columns, width)
    row, column = y.round(), x.round()
    total, weights = torch.zeros_like(guide[0]), torch.zeros_like(guide[0])
    for down in (-1, 0, 1):
        vertical = (row + down).clamp(0, height - 1).long()
        far_down = (y - row - down).square() / (2 * NEARNESS**2)
        old, old_colours = coarse[vertical], means[:, vertical]
        for right in (-1, 0, 1):
            horizontal = (column + right).clamp(0, width - 1).long()
            far = far_down[:, None] + (x - column - right).square() / (2 * NEARNESS**2)
            unlike = (old_colours[:, :, horizontal] - guide).square_().sum(0) / (2 * colour**2)
            weight = torch.exp(-unlike.add_(far)).add_(_NEVER_NOTHING)
            total.addcmul_(weight, old[:, horizontal])
            weights += weight
    return total.div_(weights)


def _places(fine: int, coarse: int) -> Tensor:
    """(fine,): the middles of cells in units of the coarser grid, whose first cell has its middle at 0."""
    return (torch.arange(fine) + 0.5) * (coarse / fine) - 0.5


def linear_model(
    guide: Tensor, values: Tensor, window: int = WINDOW, flatness: float = FLATNESS
) -> tuple[Tensor, Tensor]:
    """The guided filter's coefficients: values as a linear function of the colours around each place.

    Args:
        guide: (3, h, w) float32 from 0 to 1.
        values: (h, w) float32.
        window, flatness: see `WINDOW` and `FLATNESS`.

    Returns:
        slope (3, h, w) and offset (h, w): `(slope * colours).sum(0) + offset`, for colours of any finer photo, too.

    Source: He, Sun and Tang 2013, Eq. 18-19, windows of 2 `window` + 1 cells and epsilon = `flatness`.
    """
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]
    moments = torch.cat([guide, values[None], guide * values, torch.stack([guide[i] * guide[j] for i, j in pairs])])
    # float64: a variance is a small difference of large means
    means = _box(moments.double(), window)
    colours, mean, both = means[:3], means[3], means[4:7] - means[:3] * means[3]
    rr, rg, rb, gg, gb, bb = (
        moment - colours[i] * colours[j] + flatness * (i == j) for moment, (i, j) in zip(means[7:], pairs, strict=True)
    )
    # The inverse of the symmetric 3 by 3 covariances by cofactors: a solver for each pixel takes four times as long.
    adjoint = torch.stack(
        [
            torch.stack([gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb]),
            torch.stack([gb * rb - rg * bb, rr * bb - rb * rb, rg * rb - rr * gb]),
            torch.stack([rg * gb - gg * rb, rg * rb - rr * gb, rr * gg - rg * rg]),
        ]
    )
    determinant = rr * adjoint[0, 0] + rg * adjoint[0, 1] + rb * adjoint[0, 2]
    slope = (adjoint * both).sum(1) / determinant
    found = _box(torch.cat([slope, (mean - (slope * colours).sum(0))[None]]), window)
    return found[:3].float(), found[3].float()


def _box(maps: Tensor, window: int) -> Tensor:
    """Means over windows, at the photo's edges over what is there; (n, h, w)."""
    return F.avg_pool2d(maps[None], 2 * window + 1, 1, window, count_include_pad=False)[0]


class _Between:
    """Where the pixels of one axis lie between the cells of a coarser one, to read maps there linearly."""

    def __init__(self, below: Tensor, above: Tensor, share: Tensor) -> None:
        self.below, self.above, self.share = below, above, share

    @classmethod
    def of(cls, fine: int, coarse: int, part: slice = slice(None)) -> _Between:
        place = _places(fine, coarse)[part].clamp(0, coarse - 1)
        below = place.long()
        return cls(below, (below + 1).clamp(max=coarse - 1), place - below)

    def read(self, maps: Tensor) -> Tensor:
        """Maps (n, a, cells) at the pixels of their last axis."""
        return torch.lerp(maps[..., self.below], maps[..., self.above], self.share)


def _size(photo: Photo) -> tuple[int, int]:
    if isinstance(photo, Image.Image):
        return photo.height, photo.width
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or not photo.size:
        raise ShapeError(f"A photo is (H, W, 3) of bytes, got {photo.shape} of {photo.dtype}.")
    return photo.shape[0], photo.shape[1]


def _guide(photo: Photo, size: tuple[int, int]) -> Tensor:
    """(3, h, w) from 0 to 1: each pixel the mean colour of its area."""
    picture = _rgb(photo) if isinstance(photo, Image.Image) else Image.fromarray(photo)
    if size != (picture.height, picture.width):
        picture = picture.resize((size[1], size[0]), Image.Resampling.BOX)
    return _colours(picture)


def _rgb(photo: Image.Image) -> Image.Image:
    return photo if photo.mode == "RGB" else photo.convert("RGB")  # of RGB, Pillow would make a copy


def _part(photo: Photo, rows: slice) -> Photo:
    return photo.crop((0, rows.start, photo.width, rows.stop)) if isinstance(photo, Image.Image) else photo[rows]


def _colours(photo: Photo) -> Tensor:
    pixels = np.asarray(_rgb(photo) if isinstance(photo, Image.Image) else photo)
    return torch.from_numpy(pixels.astype(np.float32) / np.float32(255)).permute(2, 0, 1).contiguous()
