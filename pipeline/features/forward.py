"""How photos go through the backbone: the same way in extraction, training on the fly, fitting and prediction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hsnet.backbone import Backbone, pack_levels
from pipeline.datasets.images import network_image

BATCH = {"cpu": 1, "cuda": 16}
"""Images per forward pass. Not an option: another number changes last bits (8e-6 of SqueezeNet at 64 px).

On a CPU one image at a time is also the fastest at real sizes, and a photo's features then depend on no other.
"""


def levels_of(backbone: Backbone, photos: Tensor) -> list[Tensor]:
    """Levels, finest first, each (n, L, H, W, C), of (n, 3, S, S) normalised photos, on the photos' device."""
    size = BATCH["cpu" if photos.device.type == "cpu" else "cuda"]
    parts = [backbone(photos[first : first + size]) for first in range(0, len(photos), size)]
    return [torch.cat(level) for level in zip(*parts, strict=True)]


class PhotoNetwork:
    """A frozen backbone on a device, for photos brought to one size.

    The steps may be taken apart, so that photos are read on another thread: `pixels`, then `taps` or `levels`.

    Args:
        backbone: moved to the device.
        image_size: S, side of the square that photos are squashed to, pixels.
    """

    def __init__(self, backbone: Backbone, image_size: int, device: torch.device | str = "cpu") -> None:
        self.backbone = backbone.to(device)
        self.image_size = image_size
        # With its number: "cuda" alone means another GPU on another thread, and batches are read ahead on one.
        self.device = next(self.backbone.parameters()).device
        self.batch = BATCH["cpu" if self.device.type == "cpu" else "cuda"]

    def pixels(self, photo: Image.Image) -> np.ndarray:
        """A photo at network size, normalised as the backbone wants it, (3, S, S) float32."""
        return network_image(photo, self.image_size, self.backbone.mean, self.backbone.std)

    def taps(self, pixels: Sequence[np.ndarray]) -> list[Tensor]:
        """What the backbone gives for photos at network size, all in one pass; see `Backbone.taps`."""
        return self.backbone.taps(torch.from_numpy(np.stack(pixels)).to(self.device))

    def levels(self, pixels: Sequence[np.ndarray]) -> list[Tensor]:
        """The same as levels, finest first, each (n, L, H, W, C) float32."""
        return pack_levels(self.taps(pixels), self.backbone.spec)

    def __call__(self, photos: Sequence[Image.Image]) -> list[Tensor]:
        """Levels of photos, in passes of as many as in extraction: with one torch thread, to the bit those stored."""
        passes = [photos[first : first + self.batch] for first in range(0, len(photos), self.batch)]
        parts = [self.levels([self.pixels(photo) for photo in group]) for group in passes]
        return [torch.cat(level) for level in zip(*parts, strict=True)]
