"""Keeping the images of a fold in memory, for training that would otherwise wait for its store.

Two places: the memory of the device that computes, where a batch is gathered without leaving it; or the page cache of
the operating system, which all processes of a machine share, so that several workers need no copy each. Features stay
as they are stored (int8 or codes), so that as many images fit as the store's size says.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from hsnet.errors import ConfigError
from pipeline.common.machine import memory
from pipeline.common.text import size_text
from pipeline.loading.source import FeatureSource

RESIDENT = ("off", "auto", "host", "device")
RESERVED = 8 << 30
"""Bytes of a device left to training itself: a step of 20 episodes at 400 px is meant to fit."""
SHARE = 0.8
"""Part of the free memory that may be filled."""
_AT_ONCE = 16


class ResidentSource:
    """A source whose features and labels of some images lie on a device, as they are stored.

    Other images are read from the source behind it and moved.
    """

    def __init__(self, source: FeatureSource, images: Sequence[int], device: str | torch.device) -> None:
        self.source, self.device = source, torch.device(device)
        self.index, self.recipe, self.skipped, self.codec = source.index, source.recipe, source.skipped, source.codec
        self.classes_present = source.classes_present
        self.rows = {image: row for row, image in enumerate(images)}
        self._levels: list[Tensor] = []
        for first in range(0, len(images), _AT_ONCE):
            part = images[first : first + _AT_ONCE]
            levels, labels = source.features(part), source.labels(part)
            if not self._levels:
                self._levels = [level.new_empty(len(images), *level.shape[1:], device=device) for level in levels]
                self._labels = labels.new_empty(len(images), *labels.shape[1:], device=device)
            for kept, level in zip([*self._levels, self._labels], [*levels, labels], strict=True):
                kept[first : first + len(part)] = level.to(device)

    def features(self, images: Sequence[int]) -> list[Tensor]:
        rows = self._rows(images)
        if rows is None:
            return [level.to(self.device) for level in self.source.features(images)]
        return [level.index_select(0, rows) for level in self._levels]

    def labels(self, images: Sequence[int]) -> Tensor:
        rows = self._rows(images)
        if rows is None:
            return self.source.labels(images).to(self.device)
        return self._labels.index_select(0, rows)

    def _rows(self, images: Sequence[int]) -> Tensor | None:
        if not all(image in self.rows for image in images):
            return None
        rows = torch.tensor([self.rows[image] for image in images])
        # Made on the device it would wait for all that the device has to do. torch keeps page-locked memory as long as
        # a copy from it is under way.
        return rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows


def keep(
    source: FeatureSource,
    images: Collection[int],
    where: str,
    device: str | torch.device = "cpu",
    rank: int = 0,
    ranks: int = 1,
) -> FeatureSource:
    """The source with these images in memory.

    Args:
        where: "off" leaves the source as it is. "device" puts the images on `device`, once per process. "host" reads
            each of them once now, so that they are in the operating system's cache; a copy for all processes. "auto"
            is "device" on a GPU with room for them, else "off": what is read in training is cached anyway.
        rank, ranks: with "host" every process of a group reads its part.

    Raises:
        ConfigError: they do not fit; says how much there is and is needed.
    """
    if where not in RESIDENT:
        raise ConfigError(f"resident must be one of {', '.join(RESIDENT)}, got '{where}'.")
    wanted = sorted(set(images) - set(source.skipped))
    if where == "off" or not wanted or (where == "auto" and torch.device(device).type == "cpu"):
        return source
    needed = len(wanted) * sum(part.nbytes for part in [*source.features(wanted[:1]), source.labels(wanted[:1])])
    on_device = where != "host"
    room = int(SHARE * (free_on(device) if on_device else free_on("cpu")))
    if needed > room:
        if where == "auto":
            return source
        raise ConfigError(
            f"{len(wanted):,} images take {size_text(needed)}; {size_text(room)} may be filled on "
            f"{device if on_device else 'this machine'}. Use --resident off, or a store of fewer bytes per image "
            f"(`hsnet extract --bytes-per-image`). Nothing was changed."
        )
    if on_device:
        return ResidentSource(source, wanted, device)
    mine = wanted[rank::ranks]
    for first in range(0, len(mine), _AT_ONCE):
        source.features(mine[first : first + _AT_ONCE])
        source.labels(mine[first : first + _AT_ONCE])
    return source


def free_on(device: str | torch.device) -> int:
    """Bytes that could be allocated: of a GPU beside what training takes, else of the machine or its container."""
    device = torch.device(device)
    if device.type == "cuda":
        return max(0, int(torch.cuda.mem_get_info(device)[0]) - RESERVED)
    readable = memory()
    return readable[0] if readable else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
