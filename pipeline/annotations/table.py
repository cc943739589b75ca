"""A CSV table with a row for every photo and class that was looked for.

    photo,width,height,class,score,pixels,share,objects,areas,boxes,scores
    a.jpg,640,480,car,0.93,5120,0.016667,2,5000 120,10 20 100 50;300 40 12 10,0.9 0.4

`share` is the part of the photo, 0 to 1. `areas`, `boxes` (left top width height, pixels) and `scores` are those of the
objects, the largest first. Names with commas, quotes and line breaks are quoted as RFC 4180 says: read the table with a
CSV reader. A score that is
not known is empty.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from pipeline.annotations.found import Found, objects_of
from pipeline.annotations.streams import Names, WholeFile

COLUMNS = ("photo", "width", "height", "class", "score", "pixels", "share", "objects", "areas", "boxes", "scores")


class CsvWriter:
    """`found.csv`."""

    def __init__(self, out: Path, classes: Sequence[str], root: Path) -> None:
        self.files = (out / "found.csv",)
        self._names = Names(root)
        self._file = WholeFile(self.files[0], newline="")
        self._rows = csv.writer(self._file.file)
        self._rows.writerow(COLUMNS)

    def add(self, found: Found) -> None:
        for name, found_class in found.classes.items():
            objects = sorted(objects_of(found_class), key=lambda one: (-one.area, one.box))
            scores = [one.score for one in objects]
            pixels = int(found_class.mask.sum())
            row = (
                self._names.relative(found.photo),
                found.width,
                found.height,
                name,
                _number(found_class.score),
                pixels,
                f"{pixels / (found.width * found.height):.6f}",
                len(objects),
                " ".join(str(one.area) for one in objects),
                ";".join(" ".join(map(str, one.box)) for one in objects),
                " ".join(map(_number, scores)) if None not in scores else "",
            )
            self._rows.writerow(row)

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        self._file.discard()


def _number(score: float | None) -> str:
    return "" if score is None else f"{score:.6g}"
