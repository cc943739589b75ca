"""Label Studio: its JSON export in, tasks with predictions to import out.

    [{"data": {"image": "/data/local-files/?d=album/1.jpg"},
      "predictions": [{"model_version", "score", "result": [
        {"id", "type": "brushlabels", "from_name": "tag", "to_name": "image", "original_width", "original_height",
         "image_rotation": 0, "score", "value": {"format": "rle", "rle": [...], "brushlabels": ["car"]}}]}]}]

Read are brushes (run lengths: `runs`) and polygons (percent). Rectangles are ignored, not filled; ellipses and key
points only say that the class is there. Of several annotations of a task the last that was not cancelled counts;
predictions are not read. A task without an annotation is left out; in the others a class of the file without a region
is absent. Classes are those that are used somewhere in the file: it does not hold the labelling setup.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

from hsnet.errors import DataError
from pipeline.annotations.found import Found, Instance, objects_of
from pipeline.annotations.photos import PhotoFinder
from pipeline.annotations.runs import pack, placed_runs, unpack
from pipeline.annotations.shapes import Entry, Patch, Shape, Source, box, mention, scaled_polygon
from pipeline.annotations.streams import Names, WholeFile, bare
from pipeline.datasets.images import PHOTO_SUFFIXES

_REGIONS = ("brushlabels", "polygonlabels", "rectanglelabels", "ellipselabels", "keypointlabels")
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")


def open_source(path: Path, raw: Any, photos: Path | None) -> Source:
    """Raises DataError: not such a file, broken regions, photos that are not there. Names the place."""
    if not isinstance(raw, list) or not all(isinstance(task, dict) for task in raw):
        raise DataError(f"{path} is no Label Studio export: it must be a list of tasks.")
    if not any(isinstance(task.get("annotations"), list) for task in raw):
        raise DataError(
            f"{path} has no task with annotations. Export as 'JSON' (not JSON-MIN or CSV), after "
            "something was submitted."
        )
    finder = PhotoFinder(path, [photos] if photos is not None else [path.parent, path.parent / "images"], _plain)
    entries: dict[Path, Entry] = {}
    classes: dict[str, None] = {}
    unseen = several = boxes = 0
    for number, task in enumerate(raw, start=1):
        place = f"{path}, task {task.get('id', number)}"
        try:
            done = [one for one in task.get("annotations") or [] if not one.get("was_cancelled")]
            several += len(done) > 1
            regions = [region for region in done[-1]["result"] if region.get("type") in _REGIONS] if done else []
            names = _names(task)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{place}: not as Label Studio exports tasks ({type(error).__name__}: {error}).") from error
        if not done:
            unseen += 1
            continue
        boxes += sum(region["type"] == "rectanglelabels" for region in regions)
        shapes = [shape for n, region in enumerate(regions, 1) for shape in _shapes(region, place, f"region {n}")]
        classes.update(dict.fromkeys(shape.label for shape in shapes))
        photo = _photo(finder, names)
        if photo is None:
            continue
        if photo in entries:
            raise DataError(f"{place}: there is another task for the photo {photo}. Keep one of them.")
        entries[photo] = Entry(photo, _size(regions, place), partial(tuple, shapes))
    finder.require_all()
    notes = []
    if unseen:
        notes.append(f"Left out {unseen} tasks without a submitted annotation.")
    if several:
        notes.append(f"{several} tasks have several annotations: the last one counts.")
    if boxes:
        notes.append(f"{boxes} rectangles are ignored, not filled.")
    return Source(path, "labelstudio", tuple(classes), list(entries.values()), tuple(notes))


def _names(task: dict[str, Any]) -> list[str]:
    """Names that the photo may have here, the likeliest first."""
    data = task["data"]
    texts = [data["image"]] if isinstance(data.get("image"), str) else []
    texts += [text for text in data.values() if isinstance(text, str) and _last(text).lower().endswith(PHOTO_SUFFIXES)]
    if not texts:
        raise ValueError("no photo in its data")
    parts = urlsplit(texts[0])
    asked = parse_qs(parts.query).get("d")
    name = asked[0] if asked else unquote(parts.path) or texts[0]
    names = [name.lstrip("/")] if asked or not parts.scheme else []
    names += [texts[0], PurePosixPath(name).name, _UPLOAD.sub("", PurePosixPath(name).name)]
    return list(dict.fromkeys(filter(None, names)))


def _last(text: str) -> str:
    parts = urlsplit(text)
    asked = parse_qs(parts.query).get("d")
    return asked[0] if asked else parts.path


def _photo(finder: PhotoFinder, names: list[str]) -> Path | None:
    for name in names[:-1]:
        photo = finder.find(name, remember=False)
        if photo is not None:
            return photo
    return finder.find(names[-1])


def _plain(name: str) -> str:
    """As Label Studio stores uploaded names: blanks as underscores, nothing but letters, numbers, "_", "-" and "."."""
    return re.sub(r"[^-\w.]", "", name.strip().replace(" ", "_"))


def _size(regions: Sequence[dict[str, Any]], place: str) -> tuple[int, int] | None:
    sizes = {(region.get("original_height"), region.get("original_width")) for region in regions}
    if not sizes:
        return None
    ((height, width), *others) = sizes
    if others or type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise DataError(
            f"{place}: its regions state the sizes {sorted(map(str, sizes))[:3]}, must be one of whole pixels."
        )
    return height, width


def _shapes(region: dict[str, Any], place: str, where: str) -> list[Shape]:
    """A shape for each label of a region."""
    kind, value = region["type"], region.get("value")
    if not isinstance(value, dict):
        raise DataError(f"{place}: {where} has no value.")
    labels = value.get(kind)
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{place}: {where} has no label. Name its class in Label Studio, or delete it.")
    if region.get("image_rotation"):
        raise DataError(
            f"{place}: {where} was drawn on the photo turned by {region['image_rotation']} degrees. Turn it back there."
        )
    return [_shape(label, kind, value, place, where) for label in labels]


def _shape(label: str, kind: str, value: dict[str, Any], place: str, where: str) -> Shape:
    if kind == "brushlabels":
        if value.get("format", "rle") != "rle" or not isinstance(value.get("rle"), list):
            raise DataError(f"{place}: {where} is a brush without run lengths (format rle).")
        return Shape(label, where, partial(_brush, value["rle"], place, where))
    if kind == "polygonlabels":
        return scaled_polygon(label, place, where, value.get("points") or [], 100)
    if kind == "rectanglelabels" and not value.get("rotation"):
        try:
            left, top, width, height = (float(value[side]) for side in ("x", "y", "width", "height"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}: {where} has no x, y, width, height: {error}.") from error
        corners = (left, top, left + width, top + height)
        return box(label, where, lambda h, w: [side * (h if i % 2 else w) / 100 for i, side in enumerate(corners)])
    return mention(label, where)


def _brush(rle: list[int], place: str, where: str, height: int, width: int) -> Patch:
    try:
        return 0, 0, unpack(rle, height, width)
    except (ValueError, TypeError) as error:
        raise DataError(f"{place}: the run lengths of {where} are broken: {error}.") from error


def _packed(one: Instance, found: Found) -> list[int]:
    left, top, _, _ = one.box
    return pack(placed_runs(one.mask, left, top, found.height, found.width))


class LabelStudioWriter:
    """`labelstudio.json` to import into a project, `labelstudio.xml` as its labelling setup.

    Photos are addressed as files that Label Studio serves from local storage whose root is the folder that names are
    relative to; `address` is put before their names otherwise.
    """

    def __init__(
        self,
        out: Path,
        classes: Sequence[str],
        root: Path,
        address: str = "/data/local-files/?d=",
        version: str = "hsnet",
    ) -> None:
        self.files = (out / "labelstudio.json", out / "labelstudio.xml")
        self._names = Names(root)
        self._address, self._version = address, version
        self._started = False
        self._file = WholeFile(self.files[0])
        self._file.write("[")
        setup = WholeFile(self.files[1])
        labels = "\n".join(f"    <Label value={quoteattr(name)}/>" for name in classes)
        setup.write(
            '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
            f'  <BrushLabels name="tag" toName="image">\n{labels}\n  </BrushLabels>\n</View>\n'
        )
        setup.close()

    def add(self, found: Found) -> None:
        results: list[dict[str, Any]] = []
        for label, found_class in found.classes.items():
            for one in objects_of(found_class):
                region = {
                    "id": uuid.uuid5(uuid.NAMESPACE_URL, f"{found.photo!r} {len(results)}").hex[:10],
                    "type": "brushlabels",
                    "from_name": "tag",
                    "to_name": "image",
                    "original_width": found.width,
                    "original_height": found.height,
                    "image_rotation": 0,
                    "value": {"format": "rle", "rle": _packed(one, found), "brushlabels": [label]},
                    "score": one.score,
                }
                results.append(bare(region))
        scores = [one.score for one in found.classes.values() if one.score is not None]
        prediction = {"model_version": self._version, "score": min(scores, default=None), "result": results}
        name = self._names.relative(found.photo)
        address = self._address + quote(name, safe="/", errors="surrogateescape")
        task = {"data": {"image": address}, "predictions": [bare(prediction)]}
        self._file.write((",\n" if self._started else "\n") + json.dumps(task, allow_nan=False))
        self._started = True

    def close(self) -> None:
        self._file.write("\n]\n")
        self._file.close()

    def discard(self) -> None:
        self._file.discard()
