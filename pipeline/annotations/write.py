"""What was found, written in the formats of other tools, one photo at a time.

    masks        masks/, class numbers or one picture per class, with names     see `masks_out`
    coco         coco.json with run lengths, boxes, areas, scores               `coco`
    yolo         yolo/ with data.yaml, polygons, links to the photos            `yolo`
    labelme      labelme/NAME.json with polygons                                `labelme`
    labelstudio  labelstudio.json, predictions to import, and the setup         `labelstudio`
    cvat         cvat.xml, "CVAT for images 1.1", with masks                    `cvat`
    geojson      found.geojson, polygons with holes, in pixels                  `geojson`
    csv          found.csv, a row per photo and class                           `table`

Files that hold many photos appear when the writer is closed; those of one photo as they are written. All are there
whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from hsnet.errors import ConfigError, DataError
from pipeline.annotations.coco import CocoWriter
from pipeline.annotations.cvat import CvatWriter
from pipeline.annotations.found import Found
from pipeline.annotations.geojson import GeoJsonWriter
from pipeline.annotations.labelme import LabelMeWriter
from pipeline.annotations.labelstudio import LabelStudioWriter
from pipeline.annotations.masks_out import MaskWriter
from pipeline.annotations.table import CsvWriter
from pipeline.annotations.yolo import YoloWriter
from pipeline.common.text import did_you_mean


class FormatWriter(Protocol):
    """One format."""

    @property
    def files(self) -> tuple[Path, ...]:
        """What it makes: files and folders."""

    def add(self, found: Found) -> None: ...
    def close(self) -> None: ...
    def discard(self) -> None: ...


_WRITERS: dict[str, Callable[[Path, Sequence[str], Path], FormatWriter]] = {
    "masks": MaskWriter,
    "coco": CocoWriter,
    "yolo": YoloWriter,
    "labelme": LabelMeWriter,
    "labelstudio": LabelStudioWriter,
    "cvat": CvatWriter,
    "geojson": GeoJsonWriter,
    "csv": CsvWriter,
}
FORMATS = tuple(_WRITERS)


class Writer:
    """Writes photos in several formats at once. To be closed, or used in a `with` block, which leaves the files that
    hold many photos as they were if it ends with an error.

    Args:
        formats: some of `FORMATS`.
        out: folder for everything; made if missing.
        classes: names of all classes that will be looked for, in the order in which formats number them.
        root: the folder of the photos: files name photos relative to it; those elsewhere by their absolute path.
        overlapping: for "masks": one picture per class instead of one map.

    Raises:
        ConfigError: a format that is not known, a class twice or without a name.
        DataError: the folder cannot be written.
    """

    def __init__(
        self, formats: Iterable[str], out: Path, classes: Sequence[str], root: Path, *, overlapping: bool = False
    ) -> None:
        names = list(dict.fromkeys(formats))
        unknown = [name for name in names if name not in FORMATS]
        if unknown:
            raise ConfigError(
                f"The format '{unknown[0]}' is not known{did_you_mean(unknown[0], FORMATS)}. "
                f"Known: {', '.join(FORMATS)}."
            )
        twice = next((name for name in classes if not name or list(classes).count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"The class '{twice}' has no name, or is there twice. Nothing was written.")
        self.out, self.classes = Path(out), tuple(classes)
        self._writers: list[FormatWriter] = []
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for name in names:
                if name == "masks":
                    self._writers.append(MaskWriter(self.out, self.classes, root, overlapping))
                else:
                    self._writers.append(_WRITERS[name](self.out, self.classes, root))
        except OSError as error:
            self.discard()
            raise self._refused(error) from error

    @property
    def files(self) -> tuple[Path, ...]:
        """Files and folders that are there after `close`."""
        return tuple(file for writer in self._writers for file in writer.files)

    def add(self, found: Found) -> None:
        """Write a photo in every format.

        Raises:
            ConfigError: it has a class that was not named at the beginning.
            DataError: the disk refused. Files of many photos are then as they were before.
        """
        unknown = [name for name in found.classes if name not in self.classes]
        if unknown:
            raise ConfigError(f"{found.photo}: the class '{unknown[0]}' is none of {', '.join(self.classes)}.")
        try:
            for writer in self._writers:
                writer.add(found)
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Give the files their names. Raises DataError if the disk refused."""
        try:
            while self._writers:
                self._writers[0].close()
                self._writers.pop(0)
        except OSError as error:
            self.discard()
            raise self._refused(error) from error

    def discard(self) -> None:
        """Leave files that hold many photos as they were."""
        for writer in self._writers:
            with suppress(OSError):
                writer.discard()
        self._writers = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def _refused(self, error: OSError) -> DataError:
        return DataError(f"Cannot write to {self.out}: {error.strerror or error}.")
