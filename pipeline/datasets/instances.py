"""Class-number masks from COCO instance annotations (the "instances" JSON), drawn when asked for.

Rules, where the format leaves a choice and the published masks have no description:

- class id k counts the categories in order of their id: COCO's 80 have ids from 1 to 90;
- larger objects are drawn first and smaller ones over them (a cup stays visible on its table), equal ones by id;
- crowd regions are drawn below everything, as pixels of their class, but do not make an image listed for it;
- polygons of fewer than three points enclose nothing and are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from hsnet.errors import DataError
from pipeline.datasets.index import MAX_CLASS_ID, image_id_problem, label_dtype


@dataclass(frozen=True)
class Instance:
    """One annotation: a polygon list (arrays x0 y0 x1 y1 ...) or run lengths, column by column from background."""

    id: int
    class_id: int
    crowd: bool
    area: float
    polygons: tuple[np.ndarray, ...] | None
    runs: np.ndarray | None
    box: tuple[float, float, float, float] | None = None
    """Left, top, width, height as the file states them, unchecked but finite."""


@dataclass(frozen=True)
class Annotations:
    """What an instances JSON holds."""

    classes: dict[int, str]
    """Class id, from 0 in order of category id -> name."""
    images: dict[str, tuple[int, int, tuple[Instance, ...]]]
    """File name -> height, width, objects."""


class InstanceMasks:
    """Masks of one JSON file. Pickles as its path: every process parses the file once, when it needs it.

    The parsed form of COCO's training annotations takes about 1 GB per process; `hsnet prepare coco` writes the
    masks as PNG instead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def classes(self) -> dict[int, str]:
        return read_annotations(self.path).classes

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all images, sorted; those without an object too."""
        return tuple(sorted(read_annotations(self.path).images))

    def size(self, file: str) -> tuple[int, int]:
        """(height, width) of an image as the file states it."""
        height, width, _ = self._image(file)
        return height, width

    def label(self, file: str) -> np.ndarray:
        """Mask (H, W) of an image: 0 background, class id + 1; uint8, or uint16 from 255 classes on.

        Raises:
            DataError: the image is not annotated here, or an outline in it is broken.
        """
        height, width, instances = self._image(file)
        shapes = [(instance, drawn(instance, height, width)) for instance in instances]
        shapes.sort(key=lambda pair: (not pair[0].crowd, -int(pair[1].sum()), pair[0].id))
        label = np.zeros((height, width), label_dtype(self.classes))
        for instance, shape in shapes:
            label[shape] = instance.class_id + 1
        return label

    def listed_classes(self, file: str, min_share: float) -> tuple[int, ...]:
        """Classes whose annotated areas, crowds left out, sum up to at least `min_share` of the image."""
        height, width, instances = self._image(file)
        areas: dict[int, float] = {}
        for instance in instances:
            if not instance.crowd:
                areas[instance.class_id] = areas.get(instance.class_id, 0.0) + instance.area
        return tuple(sorted(c for c, area in areas.items() if area > 0 and area >= min_share * height * width))

    def _image(self, file: str) -> tuple[int, int, tuple[Instance, ...]]:
        images = read_annotations(self.path).images
        if file not in images:
            raise DataError(f"{self.path} has no image {file}.")
        return images[file]


@lru_cache(maxsize=4)
def read_annotations(path: Path) -> Annotations:
    """`parse_annotations` for a data set, which does not change: the last four files stay in memory."""
    return parse_annotations(path)


def parse_annotations(path: Path, as_ids: bool = True) -> Annotations:
    """Parse an instances JSON, trusting nothing in it.

    Args:
        as_ids: file names must be image ids (`image_id_problem`). Without, they are any texts: check before use.

    Raises:
        DataError: missing, not JSON, or not such annotations. Names the place.
    """
    try:
        raw = json.loads(path.read_bytes())
        return _annotations(raw, as_ids)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except KeyError as error:
        raise DataError(f"{path} is not a COCO instances file: an entry has no field {error}.") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path} is not a COCO instances file: {error}.") from error


def _annotations(raw: Any, as_ids: bool) -> Annotations:
    if not isinstance(raw, dict):
        raise ValueError("must be an object with images, annotations and categories")
    categories = sorted((_whole(c["id"], "category id"), str(c["name"])) for c in raw["categories"])
    if not categories or len(categories) > MAX_CLASS_ID or len(dict(categories)) != len(categories):
        raise ValueError(f"{len(categories)} categories, some with the same id or too many or none")
    class_of = {category: k for k, (category, _) in enumerate(categories)}
    images: dict[int, tuple[str, int, int]] = {}
    for image in raw["images"]:
        name, height, width = image["file_name"], _whole(image["height"], "height"), _whole(image["width"], "width")
        if not isinstance(name, str) or (as_ids and image_id_problem(name)):
            raise ValueError(f"file name {str(name)[:80]!r}: {image_id_problem(name)}")
        if not 0 < height * width <= (Image.MAX_IMAGE_PIXELS or 10**9) or height < 0:
            raise ValueError(f"image {name} has {width} x {height} pixels")
        images[_whole(image["id"], "image id")] = (name, height, width)
    if len({name for name, _, _ in images.values()}) != len(raw["images"]):
        raise ValueError("two images have the same id or file name")
    objects: dict[int, list[Instance]] = {}
    for annotation in raw["annotations"]:
        image_id = _whole(annotation["image_id"], "image id")
        if image_id not in images:
            raise ValueError(f"annotation {annotation['id']} belongs to image {image_id}, which is not listed")
        _, height, width = images[image_id]
        objects.setdefault(image_id, []).append(_instance(annotation, class_of, height, width))
    return Annotations(
        {k: name for k, (_, name) in enumerate(categories)},
        {name: (h, w, tuple(objects.get(i, ()))) for i, (name, h, w) in images.items()},
    )


def _instance(raw: Any, class_of: dict[int, int], height: int, width: int) -> Instance:
    number = _whole(raw["id"], "annotation id")
    if raw["category_id"] not in class_of:
        raise ValueError(f"annotation {number} has category {str(raw['category_id'])[:40]}, which is not listed")
    polygons = runs = None
    outline = raw["segmentation"]
    if isinstance(outline, dict):
        if list(outline["size"]) != [height, width]:
            raise ValueError(f"annotation {number}: run lengths of another size than its image")
        counts = outline["counts"]
        runs = np.array(uncompressed(counts) if isinstance(counts, str) else counts)
        if runs.dtype.kind not in "iu" or runs.ndim != 1 or runs.min() < 0 or int(runs.sum()) != height * width:
            raise ValueError(f"annotation {number}: run lengths that do not fill its image")
    else:
        polygons = tuple(np.array(polygon, np.float64) for polygon in outline)
        limit = 10 * max(height, width)  # a far point would make the drawing code walk there pixel by pixel
        for polygon in polygons:
            if polygon.ndim != 1 or len(polygon) % 2 or not (np.abs(polygon) <= limit).all():
                raise ValueError(f"annotation {number}: a polygon is not x, y, x, y, ... within its image")
    area = float(raw.get("area", 0))
    if not math.isfinite(area) or area < 0:
        raise ValueError(f"annotation {number} has area {area}")
    return Instance(
        number, class_of[raw["category_id"]], bool(raw.get("iscrowd", 0)), area, polygons, runs, _box(raw.get("bbox"))
    )


def _box(raw: Any) -> tuple[float, float, float, float] | None:
    if raw is None:
        return None
    left, top, width, height = map(float, raw)
    return (left, top, width, height) if np.isfinite((left, top, width, height)).all() else None


def drawn(instance: Instance, height: int, width: int) -> np.ndarray:
    """(H, W) bool: true inside."""
    if instance.runs is not None:
        return draw_runs(instance.runs, height, width)
    return draw_polygons([polygon for polygon in instance.polygons or () if len(polygon) >= 6], height, width)


def draw_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """(H, W) bool: true in any of the polygons x0 y0 x1 y1 ..., each of three points at least; inside by even-odd.

    (0, 0) is the upper left corner of the first pixel, and a pixel is inside if its centre is, to a fifth of a pixel
    (pycocotools' rule).
    """
    if not polygons:
        return np.zeros((height, width), bool)
    merged = coco_mask.merge(coco_mask.frPyObjects([polygon.tolist() for polygon in polygons], height, width))
    # Not coco_mask.decode: 2.0.11 warns with numpy 2, and would need checked lengths.
    return draw_runs(uncompressed(merged["counts"].decode()), height, width)


def draw_runs(runs: Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) bool of run lengths, column by column from background, that sum up to H x W."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def uncompressed(text: str) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character, low bits first; from the third run on, differences to the
    run two before. Decoded here because pycocotools trusts the lengths."""
    runs: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError("broken compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end in the middle")
    return runs


def _whole(value: object, what: str) -> int:
    if type(value) is not int:
        raise ValueError(f"{what} {str(value)[:40]!r} is not a whole number")
    return value
