"""Lists derived from a data set's own masks, where no split files are given."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.index import image_id_problem

MIN_OBJECT_SHARE = 0.005
"""An image is listed for a class that covers at least this share of it (about 1000 pixels of a VOC photo).

The published lists leave small objects out as well, by a rule that is not published. Smaller ones vanish from the
mask at the size of the features."""

log = logging.getLogger(__name__)


def listed_classes(
    label: Callable[[int], np.ndarray], count: int, ignore_label: int, min_share: float
) -> list[tuple[int, ...]]:
    """Classes of label maps 0..count-1, sorted, that cover at least `min_share` (and one pixel) of the image.

    Raises:
        ConfigError: `min_share` is no share.
        DataError: from `label`.
    """
    require_share(min_share, "min_object_share")
    return [
        tuple(v - 1 for v, n in sorted(pixels.items()) if v not in (0, ignore_label) and n >= min_share * total)
        for pixels, total in count_pixels(label, count)
    ]


def count_pixels(mask: Callable[[int], np.ndarray], count: int) -> list[tuple[dict[int, int], int]]:
    """Value -> its pixels, and all pixels, of masks 0..count-1. One thread per core: some 10 s for VOC2012, minutes
    for COCO's PNG masks."""

    def values(i: int) -> tuple[dict[int, int], int]:
        pixels = mask(i)
        counts = np.bincount(pixels.ravel())
        return {int(value): int(counts[value]) for value in counts.nonzero()[0]}, pixels.size

    log.info("Reading the classes of %d masks", count)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(values, range(count)))


def read_image_names(path: Path) -> list[str]:
    """The image names, one or more a line, of a list such as VOC's val.txt.

    Raises:
        DataError: it cannot be read, or a name would leave the folder of images.
    """
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list of image names: {error}.") from error
    for name in names:
        problem = image_id_problem(name)
        if problem:
            raise DataError(f"{path}: {name[:80]!r} cannot be an image name: {problem}.")
    return names


def require_share(value: float, name: str) -> None:
    """Raises ConfigError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name} is {value}, must be a share from 0 to below 1 (0.005 is half a per cent).")


def require_files(wanted: Collection[str], folder: Path, kind: str) -> None:
    """All `wanted` files, relative to `folder`, must be there. Lists each folder once, which is fast over networks.

    Raises:
        DataError: some are not. Names the first ones and how many.
    """
    there: dict[Path, set[str]] = {}
    missing = []
    for name in wanted:
        path = folder / name
        if path.parent not in there:
            there[path.parent] = {entry.name for entry in os.scandir(path.parent)} if path.parent.is_dir() else set()
        if path.name not in there[path.parent]:
            missing.append(path)
    if missing:
        first = ", ".join(map(str, missing[:3]))
        raise DataError(
            f"{len(missing)} of {len(wanted)} {kind} are missing: {first}{', ...' if len(missing) > 3 else ''}. "
            f"Complete the data set, or list only what is there."
        )
