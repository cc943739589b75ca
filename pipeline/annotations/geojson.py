"""GeoJSON: a FeatureCollection with one feature per object, in pixels of its photo instead of degrees.

x to the right, y down, (0, 0) the upper left corner of the photo. Holes are kept. Properties: photo, width, height,
class, area (pixels), box ([left, top, width, height]) and score, if known. The geometry is a MultiPolygon with the
connected parts, exact (`outline`). Outer rings turn as RFC 7946 asks for, with y taken as upwards. A photo without an
object has no feature. Written only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.annotations.found import Found, objects_of
from pipeline.annotations.outline import Ring, polygons
from pipeline.annotations.streams import JsonParts, Names, bare


class GeoJsonWriter:
    """`found.geojson`."""

    def __init__(self, out: Path, classes: Sequence[str], root: Path) -> None:
        self.files = (out / "found.geojson",)
        self._names = Names(root)
        self._parts = JsonParts(self.files[0], {"type": "FeatureCollection"}, ("features",))

    def add(self, found: Found) -> None:
        for name, found_class in found.classes.items():
            for one in objects_of(found_class):
                parts = polygons(one.mask, one.box[0], one.box[1])
                properties = {
                    "photo": self._names.relative(found.photo),
                    "width": found.width,
                    "height": found.height,
                    "class": name,
                    "area": one.area,
                    "box": list(one.box),
                    "score": one.score,
                }
                coordinates = [[_closed(ring) for ring in rings] for rings in parts]
                geometry = {"type": "MultiPolygon", "coordinates": coordinates}
                self._parts.add("features", {"type": "Feature", "properties": bare(properties), "geometry": geometry})

    def close(self) -> None:
        self._parts.close()

    def discard(self) -> None:
        self._parts.discard()


def _closed(ring: Ring) -> list[list[float]]:
    points: list[list[float]] = ring.tolist()
    return [*points, points[0]]
