"""COCO's instances JSON: polygons, run lengths of both kinds, crowds; written with compressed run lengths and scores.

    {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
     "annotations": [{"id", "image_id", "category_id", "segmentation": {"size": [h, w], "counts": "..."},
                      "bbox": [left, top, width, height], "area", "iscrowd": 0, "score"}]}

A photo that is listed without an annotation shows none of the classes. Masks are pycocotools' to the pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from pipeline.annotations.found import Found, objects_of
from pipeline.annotations.found import Instance as InstanceMask
from pipeline.annotations.photos import PhotoFinder
from pipeline.annotations.runs import placed_runs
from pipeline.annotations.shapes import Entry, Patch, Shape, Source, box, draw_outlines, mention
from pipeline.annotations.streams import JsonParts, Names, bare
from pipeline.datasets.instances import Instance, draw_runs, parse_annotations


def open_source(path: Path, photos: Path | None) -> Source:
    """Raises DataError: not such a file, broken run lengths, photos that are not there. Names the place."""
    annotations = parse_annotations(path, as_ids=False)
    finder = PhotoFinder(path, [photos] if photos is not None else [path.parent, path.parent / "images"])
    entries = []
    for name, (height, width, instances) in annotations.images.items():
        photo = finder.find(name)
        if photo is not None:
            shapes = partial(_shapes, instances, annotations.classes, f"{path}, {photo.name}")
            entries.append(Entry(photo, (height, width), shapes))
    finder.require_all()
    boxes = sum(_box_only(one) for _, _, instances in annotations.images.values() for one in instances)
    notes = (f"{boxes} annotations are boxes without an outline: ignored, not filled.",) if boxes else ()
    return Source(path, "coco", tuple(dict.fromkeys(annotations.classes.values())), entries, notes)


def _box_only(instance: Instance) -> bool:
    return instance.runs is None and not instance.polygons


def _shapes(instances: Sequence[Instance], classes: dict[int, str], place: str) -> list[Shape]:
    return [_shape(one, classes[one.class_id], place) for one in instances]


def _shape(instance: Instance, label: str, place: str) -> Shape:
    where = f"annotation {instance.id}"
    if _box_only(instance):
        if instance.box is None:
            return mention(label, where)
        left, top, width, height = instance.box
        return box(label, where, lambda _h, _w: (left, top, left + width, top + height))

    def draw(height: int, width: int) -> Patch:
        if instance.runs is not None:
            return 0, 0, draw_runs(instance.runs, height, width)
        outlines = [polygon.reshape(-1, 2) for polygon in instance.polygons or ()]
        return draw_outlines(outlines, place, where, height, width)

    return Shape(label, where, draw, sure=not instance.crowd)


def compressed(one: InstanceMask, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed run lengths, column by column, of an object in a photo, as they stand in JSON."""
    left, top, _, _ = one.box
    counts = placed_runs(one.mask.T, top, left, width, height).tolist()
    runs = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": runs["counts"].decode("ascii")}


class CocoWriter:
    """`coco.json`; category ids count the classes from 1. See `pipeline.annotations.write.Writer`."""

    def __init__(self, out: Path, classes: Sequence[str], root: Path) -> None:
        self.files = (out / "coco.json",)
        self._names = Names(root)
        self._ids = {name: number for number, name in enumerate(classes, start=1)}
        self._annotations = 0
        head = {"info": {"description": "hsnet predict"}, "licenses": []}
        categories = [{"id": number, "name": name, "supercategory": ""} for name, number in self._ids.items()]
        self._parts = JsonParts(self.files[0], {**head, "categories": categories}, ("images", "annotations"))

    def add(self, found: Found) -> None:
        image = self._names.add(found.photo)
        self._parts.add(
            "images",
            {"id": image, "file_name": self._names.relative(found.photo), "width": found.width, "height": found.height},
        )
        for name, found_class in found.classes.items():
            for one in objects_of(found_class):
                self._annotations += 1
                entry = {
                    "id": self._annotations,
                    "image_id": image,
                    "category_id": self._ids[name],
                    "segmentation": compressed(one, found.height, found.width),
                    "bbox": list(one.box),
                    "area": one.area,
                    "iscrowd": 0,
                    "score": one.score,
                }
                self._parts.add("annotations", bare(entry))

    def close(self) -> None:
        self._parts.close()

    def discard(self) -> None:
        self._parts.discard()
