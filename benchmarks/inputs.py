"""What is timed, and with what: pieces of work; pictures and masks, deterministic, of torch operations only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hsnet.backbone import IMAGENET_MEAN, IMAGENET_STD

OBJECT_SHARE = 0.18
"""Share of a photo that its object covers. A typical one: the correlation of object positions depends on it."""


@dataclass(frozen=True)
class Work:
    """A piece of work: `batch` episodes of `shots` supports, trained on or evaluated."""

    title: str
    task: str
    """"train": forward, backward, Adam. "evaluate": to hard masks at photo size, with the vote."""
    batch: int
    shots: int = 1


def picture(number: int, size: int) -> Tensor:
    """Picture `number`: smooth coloured noise with finer noise on it, (S, S, 3) uint8."""
    generator = torch.Generator().manual_seed(1000 + number)
    image = torch.zeros(1, 3, size, size)
    for cells, strength in ((5, 1.0), (20, 0.6), (80, 0.3)):
        noise = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        image += strength * F.interpolate(noise, (size, size), mode="bilinear", align_corners=False)
    return ((image[0] * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def disc(number: int, size: int, share: float = OBJECT_SHARE) -> Tensor:
    """Mask of picture `number`: a disc of `share` of the area, somewhere inside, (S, S) bool.

    >>> [round(float(disc(number, 200, 0.18).float().mean()), 2) for number in range(3)]
    [0.18, 0.18, 0.18]
    """
    if not 0 < share <= math.pi / 4:
        raise ValueError(f"A disc inside a square covers at most {math.pi / 4:.0%} of it, not {share:.0%}.")
    radius = math.sqrt(share / math.pi)
    free = torch.rand(2, generator=torch.Generator().manual_seed(2000 + number)) * (1 - 2 * radius) + radius
    place = (torch.arange(size) + 0.5) / size
    return (place[:, None] - free[0]) ** 2 + (place[None] - free[1]) ** 2 < radius**2


def normalised(pictures: Tensor) -> Tensor:
    """(N, S, S, 3) uint8 as a backbone wants it: (N, 3, S, S) float32."""
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std
