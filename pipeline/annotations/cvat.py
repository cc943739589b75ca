"""CVAT's "CVAT for images 1.1" XML: polygons and masks in pixels; written with masks.

    <annotations><version>1.1</version>
      <meta><task><labels><label><name>car</name></label></labels></task></meta>
      <image id="0" name="a.jpg" width="640" height="480">
        <mask label="car" source="auto" occluded="0" rle="3, 2, 7" left="10" top="5" width="4" height="3" z_order="0"/>
      </image></annotations>

Run lengths go row by row through the box, background first. CVAT lists every photo of a task, so that one without a
shape may be one that nobody has come to: it is left out, with a note. In the others a class of the file without a
shape is absent. Boxes are ignored, not filled; ellipses, lines, points and the like only say that the class is there.
A document with a DOCTYPE is refused: nothing in it is expanded or fetched.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from hsnet.errors import DataError
from pipeline.annotations.found import Found, objects_of
from pipeline.annotations.photos import PhotoFinder, read_bytes
from pipeline.annotations.runs import row_runs
from pipeline.annotations.shapes import Entry, Patch, Shape, Source, box, mention, polygon
from pipeline.annotations.streams import Names, WholeFile

_OTHERS = ("ellipse", "polyline", "points", "cuboid", "skeleton")
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class _NoDoctype(ElementTree.TreeBuilder):
    """Stops at a DOCTYPE: only there can entities be declared."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise DataError("a DOCTYPE, which annotations have no use for")


def open_source(path: Path, photos: Path | None) -> Source:
    """Raises DataError: not such a file, broken shapes, photos that are not there. Names the place."""
    root = _tree(path)
    if root.tag != "annotations" or (root.find("track") is not None):
        what = "CVAT for video (tracks)" if root.find("track") is not None else f"<{root.tag[:40]}>"
        raise DataError(f"{path} is {what}; export the task as 'CVAT for images 1.1'.")
    names = [(name.text or "").strip() for name in root.findall("./meta//labels/label/name")]
    finder = PhotoFinder(path, [photos] if photos is not None else [path.parent, path.parent / "images"])
    entries: dict[Path, Entry] = {}
    empty = boxes = 0
    for image in root.findall("image"):
        file = image.get("name", "")
        shapes = [_shape(element, f"{path}, {file}", n) for n, element in enumerate(_shapes(image), start=1)]
        if not shapes:
            empty += 1
            continue
        boxes += len(image.findall("box"))
        names += [shape.label for shape in shapes]
        photo = finder.find(file)
        if photo is None:
            continue
        if photo in entries:
            raise DataError(f"{path} has the photo {file!r} twice. Keep one of them.")
        size = (_number(image, "height", f"{path}, {file}"), _number(image, "width", f"{path}, {file}"))
        entries[photo] = Entry(photo, size, partial(tuple, shapes))
    finder.require_all()
    notes = []
    if empty:
        notes.append(f"Left out {empty} photos without a shape: nobody may have looked at them.")
    if boxes:
        notes.append(f"{boxes} boxes are ignored, not filled.")
    return Source(path, "cvat", tuple(dict.fromkeys(names)), list(entries.values()), tuple(notes))


def _tree(path: Path) -> ElementTree.Element:
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        parser.feed(read_bytes(path))
        root: ElementTree.Element = parser.close()
        return root
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is no XML: {error}.") from error
    except DataError as error:
        if str(path) in str(error):
            raise
        raise DataError(f"{path} has {error}: refused.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no XML: {error}.") from error


def _shapes(image: ElementTree.Element) -> list[ElementTree.Element]:
    return [element for element in image if element.tag in ("polygon", "mask", "box", *_OTHERS)]


def _shape(element: ElementTree.Element, place: str, number: int) -> Shape:
    where = f"{element.tag} {number}"
    label = element.get("label")
    if not label:
        raise DataError(f"{place}: {where} has no label.")
    if element.tag == "polygon":
        try:
            points = [[float(value) for value in point.split(",")] for point in element.get("points", "").split(";")]
        except ValueError as error:
            raise DataError(f"{place}: the points of {where} are no x,y;x,y;...: {error}.") from error
        return polygon(label, place, where, points)
    if element.tag == "mask":
        sides = [_number(element, side, f"{place}, {where}") for side in ("left", "top", "width", "height")]
        return Shape(
            label, where, partial(_mask, element.get("rle", ""), sides, f"{place}: the run lengths of {where}")
        )
    if element.tag == "box":
        try:
            corners = [float(element.get(side, "")) for side in ("xtl", "ytl", "xbr", "ybr")]
        except ValueError as error:
            raise DataError(f"{place}: {where} has no xtl, ytl, xbr, ybr: {error}.") from error
        return box(label, where, lambda _h, _w: corners)
    return mention(label, where)


def _mask(text: str, sides: Sequence[int], what: str, height: int, width: int) -> Patch:
    left, top, w, h = sides
    if left < 0 or top < 0 or w < 1 or h < 1 or left + w > width or top + h > height:
        raise DataError(f"{what}: a box of {w} x {h} pixels at ({left}, {top}) leaves its photo of {width} x {height}.")
    try:
        runs = np.array([int(run) for run in text.split(",")], np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{what} are broken: {str(error)[:80]}.") from error
    if runs.min() < 0 or runs.max() > w * h or int(runs.sum()) != w * h:
        raise DataError(f"{what} are broken: they sum up to {int(runs.sum()):,}, its box has {w * h:,} pixels.")
    return top, left, np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w)


def _number(element: ElementTree.Element, name: str, place: str) -> int:
    text = element.get(name, "")
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise DataError(f"{place}: {name} is {text[:40]!r}, must be a whole number.")
    return int(text)


class CvatWriter:
    """`cvat.xml`, for "Upload annotations" of a task that has the photos under the same names.

    CVAT knows no scores. Characters that XML cannot hold (control characters, bytes that are no text) become "?".
    """

    def __init__(self, out: Path, classes: Sequence[str], root: Path) -> None:
        self.files = (out / "cvat.xml",)
        self._names = Names(root)
        self._file = WholeFile(self.files[0], newline="\n")
        labels = "".join(f"<label><name>{escape(_legal(name))}</name></label>" for name in classes)
        self._file.write(
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
            f"<meta><task><labels>{labels}</labels></task></meta>\n"
        )

    def add(self, found: Found) -> None:
        number = self._names.add(found.photo) - 1
        name = quoteattr(_legal(self._names.relative(found.photo)))
        lines = [f'<image id="{number}" name={name} width="{found.width}" height="{found.height}">']
        for label, found_class in found.classes.items():
            for one in objects_of(found_class):
                left, top, width, height = one.box
                rle = ", ".join(map(str, row_runs(one.mask).tolist()))
                lines.append(
                    f'<mask label={quoteattr(_legal(label))} source="auto" occluded="0" rle="{rle}" left="{left}" '
                    f'top="{top}" width="{width}" height="{height}" z_order="0"/>'
                )
        self._file.write("\n".join([*lines, "</image>\n"]))

    def close(self) -> None:
        self._file.write("</annotations>\n")
        self._file.close()

    def discard(self) -> None:
        self._file.discard()


def _legal(text: str) -> str:
    return _ILLEGAL.sub("?", text)
