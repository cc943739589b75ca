"""An album of small photos with names that are hard on formats, and what was found in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pipeline.annotations.found import Found, FoundClass, Instance
from pipeline.annotations.write import FORMATS, Writer

NAMES = ("a b.jpg", "Tür ä.png", "line\nbreak.jpg", "sub/a b.jpg", 'quote" & <tag>,;%20.jpg', "日本.jpg")
CLASSES = ("car", "Straße rot", 'odd "name" <&>')


def instances_of(mask: np.ndarray, scores: np.random.Generator) -> tuple[Instance, ...]:
    """Connected parts, by sides."""
    numbered, _ = ndimage.label(mask)
    parts = []
    for number, place in enumerate(ndimage.find_objects(numbered), start=1):
        rows, columns = place
        part = numbered[place] == number
        box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        parts.append(Instance(part, box, int(part.sum()), round(float(scores.random()), 3)))
    return tuple(parts)


def blobs(rng: np.random.Generator, height: int, width: int, share: float = 0.4) -> np.ndarray:
    """Rough regions with holes, islands in holes and single pixels, touching the edges."""
    coarse = ndimage.zoom(rng.random((max(2, height // 6), max(2, width // 6))), 6, order=1)
    noise = np.zeros((height, width))
    noise[: coarse.shape[0], : coarse.shape[1]] = coarse[:height, :width]
    mask = noise > np.quantile(noise, 1 - share)
    return mask ^ (rng.random((height, width)) > 0.97)


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos, to be read only: 41 to 46 wide, 30 high."""
    folder = tmp_path_factory.mktemp("album") / "my photos"
    for number, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (30, 41 + number, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="session")
def founds(album: Path) -> list[Found]:
    """Every photo with two or three classes that do not overlap; in the last nothing was found."""
    found = []
    for number, name in enumerate(NAMES):
        rng = np.random.default_rng(100 + number)
        width = 41 + number
        free = np.ones((30, width), bool)
        classes = {}
        for place, label in enumerate(CLASSES):
            looked_for = place < 2 or number % 2
            if not looked_for:
                continue
            mask = blobs(rng, 30, width, 0.3) & free if number < len(NAMES) - 1 else np.zeros_like(free)
            if number == 1 and place == 0:
                mask[:] = False
            free &= ~mask
            classes[label] = FoundClass(mask, round(float(rng.random()), 3), instances_of(mask, rng))
        found.append(Found(album / name, width, 30, classes))
    return found


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory, album: Path, founds: list[Found]) -> Path:
    """All formats, written; to be read only."""
    folder = tmp_path_factory.mktemp("written") / "out"
    with Writer(FORMATS, folder, CLASSES, album) as writer:
        for found in founds:
            writer.add(found)
    return folder
