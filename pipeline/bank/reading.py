"""How a person's own photos become features: one network, one size, whole photos or tiles of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsnet.errors import ConfigError
from hsnet.similarity import object_shares, positions
from pipeline.bank.tiles import Tile, crops, merge_tiles, plan_tiles
from pipeline.common.files import whole
from pipeline.features.backbones import open_backbone
from pipeline.features.forward import PhotoNetwork
from pipeline.features.recipe import Recipe
from pipeline.features.weights import Weights


@dataclass(frozen=True)
class Reading:
    """What decides the features of a photo: two equal readings give equal ones."""

    recipe: Recipe
    """Network, weights and the size to which a photo, or a tile, is squashed. Its precision is not looked at."""
    tile: int | None = None
    """Side of the tiles that a photo is cut into, pixels of the photo; None: the whole photo at once."""

    @property
    def digest(self) -> str:
        """16 hex digits."""
        recipe = self.recipe
        facts = [1, recipe.backbone, recipe.weights, recipe.image_size, recipe.taps, recipe.normalisation, self.tile]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def text(self) -> str:
        """In words."""
        tiles = "" if self.tile is None else f", tiles of {self.tile} px"
        return f"{self.recipe.backbone} at {self.recipe.image_size} px{tiles}"

    def plan(self, size: tuple[int, int]) -> tuple[Tile, ...]:
        """The tiles of a photo of (H, W) pixels."""
        height, width = size
        return (Tile(0, 0, height, width),) if self.tile is None else plan_tiles(height, width, self.tile)

    def squash(self, photo: Image.Image) -> list[NDArray[np.uint8]]:
        """The photo's tiles at network size, each (S, S, 3): all that the network needs, and the least to send."""
        side = (self.recipe.image_size,) * 2
        tiles = self.plan((photo.height, photo.width))
        return [np.asarray(tile.resize(side, Image.Resampling.BILINEAR)) for tile in crops(photo, tiles)]


@dataclass(frozen=True, eq=False)
class Features:
    """What the network gave for one photo, tile by tile; a whole photo is one tile."""

    size: tuple[int, int]
    """(height, width) of the photo, pixels."""
    tiles: tuple[Tile, ...]
    levels: list[Tensor]
    """Finest first, each (T, L, h, w, C) float32."""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the deepest level, on which the heads answer tile by tile."""
        return self.levels[-1].shape[2], self.levels[-1].shape[3]

    def vectors(self) -> Tensor:
        """(T, P, D) float32: every position of the deepest grid as one vector, see `hsnet.similarity.positions`."""
        return positions(self.levels)

    def shares(self, mask: NDArray[np.bool_]) -> Tensor:
        """(T, P) in [0, 1]: how much of each position's area is object.

        Args:
            mask: (H, W) of the photo's own size: no pixel of a small object is lost on the way to the grid.
        """
        found = []
        for tile in self.tiles:
            part = mask[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
            found.append(object_shares(torch.from_numpy(np.ascontiguousarray(part))[None], self.grid))
        return torch.cat(found).to(self.levels[-1].device)

    def as_map(self, values: Tensor) -> Tensor:
        """(h', w') float32 of the whole photo, of a value for every position, (T, P)."""
        maps = values.unflatten(1, self.grid).float()
        if len(self.tiles) == 1:
            return maps[0]
        height, width = self.size
        parts = [(tile, np.asarray(part)) for tile, part in zip(self.tiles, maps.cpu(), strict=True)]
        return torch.from_numpy(merge_tiles(height, width, parts))


class Reader:
    """The network of a reading, ready for photos.

    Args:
        weights: must be those of the reading's recipe.

    Raises:
        ConfigError, WeightsError: as `pipeline.features.backbones.open_backbone`.
    """

    def __init__(self, reading: Reading, weights: Weights, device: torch.device | str = "cpu") -> None:
        self.reading = reading
        backbone = open_backbone(reading.recipe, weights)
        self.network = PhotoNetwork(backbone, reading.recipe.image_size, device)

    @torch.inference_mode()
    def read_squashed(
        self, photos: Sequence[Sequence[NDArray[np.uint8]]], sizes: Sequence[tuple[int, int]]
    ) -> list[Features]:
        """Features of photos squashed by `Reading.squash`, of (H, W) pixels.

        The network takes as many tiles at a time as in extraction: one on a CPU, so that no photo depends on another.
        """
        network = self.network
        pixels = [network.pixels(Image.fromarray(tile)) for tiles in photos for tile in tiles]
        parts = [network.levels(pixels[i : i + network.batch]) for i in range(0, len(pixels), network.batch)]
        levels = [torch.cat(level).split([len(tiles) for tiles in photos]) for level in zip(*parts, strict=True)]
        own = zip(*levels, strict=True)
        return [Features(size, self.reading.plan(size), list(one)) for size, one in zip(sizes, own, strict=True)]

    def read(self, photo: Image.Image) -> Features:
        """Features of a photo (RGB), on the reader's device."""
        return self.read_squashed([self.reading.squash(photo)], [(photo.height, photo.width)])[0]


def save_levels(path: Path, levels: Sequence[Tensor]) -> None:
    """Write levels of any type to a file, whole or not at all. Raises OSError."""
    with whole(path) as partial:
        save_file({str(number): level.cpu().contiguous() for number, level in enumerate(levels)}, partial)


def load_levels(path: Path) -> list[Tensor]:
    """What `save_levels` wrote. Raises OSError, SafetensorError or KeyError for anything else."""
    kept = load_file(path)
    return [kept[str(number)] for number in range(len(kept))]


def default_size(backbone: str) -> int:
    """Side of the network's square for photos, pixels: what a backbone reads well and fast enough on a CPU."""
    from pipeline.features.known_networks import backbone_facts

    for size in (448, 392, 384, 256, 257, 224, 400):
        if not backbone_facts(backbone, size).problem:
            return size
    raise ConfigError(f"{backbone} reads none of the usual sizes: give --image-size.")
