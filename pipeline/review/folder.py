"""A folder of `hsnet predict` as it is looked at: its photos, their masks, and what somebody said of them.

OUT/results.jsonl     a line per photo, rewritten whole when photos were predicted again
OUT/NAME_mask.png     and the others, rewritten whole
OUT/review.json       what somebody said of each photo: accepted, rejected or corrected
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hsnet.errors import DataError
from pipeline.annotations.found import Found, FoundClass
from pipeline.annotations.write import Writer
from pipeline.common.files import replace_json, replace_text
from pipeline.predict.instances import find_instances
from pipeline.predict.stage import RESULTS, Prediction, line_of, read_results
from pipeline.predict.writing import DECISIONS, REVIEW, Result, Said, Task, class_parts, decisions_in
from pipeline.serve.results import LEAST_AREA

_MASK, _SOFT = "_mask.png", "_soft.png"


@dataclass
class Photo:
    """A photo that was predicted."""

    prediction: Prediction
    decision: str | None = None
    drawn: Mapping[str, NDArray[np.bool_]] | None = None
    """Corrected masks that are not in the folder's files yet."""

    @property
    def path(self) -> Path:
        return self.prediction.query

    @property
    def task(self) -> Task:
        """Where its files are."""
        mask = self.prediction.mask
        return Task(self.path, mask.parent, mask.name.removesuffix(_MASK), self.prediction.overlay is not None)

    @property
    def soft(self) -> bool:
        """Whether soft maps were written."""
        return any(self.task.folder.glob(f"{_literal(self.task.name)}*{_SOFT}"))


@dataclass
class Reviewed:
    """The folder.

    Raises:
        DataError: no results of `hsnet predict` are there, they have no photo that could be predicted, or were made by
            a version that kept no classes; or review.json is damaged.
    """

    root: Path
    photos: list[Photo] = field(init=False)
    failed: int = field(init=False)
    """Photos that could not be predicted."""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        if not (self.root / RESULTS).is_file():
            raise DataError(f"{self.root} holds no {RESULTS}: give the folder that `hsnet predict --out` wrote.")
        lines = list(read_results(self.root / RESULTS))
        self.photos = [Photo(self._here(one)) for one in lines if isinstance(one, Prediction)]
        self._others = [one for one in lines if not isinstance(one, Prediction)]
        self.failed = len(self._others)
        if not self.photos:
            raise DataError(f"{self.root / RESULTS} has no photo that could be predicted: there is nothing to review.")
        old = next((one for one in self.photos if not one.prediction.classes), None)
        if old is not None:
            raise DataError(
                f"{self.root / RESULTS} says nothing of the classes in {old.path}: it was made by an earlier version. "
                "Run `hsnet predict` again."
            )
        said = decisions_in(self.root)
        for photo in self.photos:
            photo.decision = said.get(str(photo.path))

    def _here(self, prediction: Prediction) -> Prediction:
        """Masks are those in this folder: it may have been moved or copied since, and others are not to be touched."""
        mask, overlay = (path and self._inside(path) for path in (prediction.mask, prediction.overlay))
        assert mask is not None
        return Prediction(prediction.query, mask, overlay, prediction.object_share, prediction.classes)

    def _inside(self, path: Path) -> Path:
        """In the folder, or the subfolder of many results (`pipeline.predict.stage.subfolder`)."""
        spread = self.root / path.parent.name / path.name
        return spread if spread.exists() else self.root / path.name

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of their numbers in the masks."""
        drawn = (name for photo in self.photos for name in photo.drawn or ())
        return tuple(dict.fromkeys((*(name for photo in self.photos for name in photo.prediction.classes), *drawn)))

    @property
    def overlapping(self) -> bool:
        """Whether every class has a mask of its own."""
        task = self.photos[0].task
        return not task.mask.exists() and len(self.photos[0].prediction.classes) > 1

    def masks(self, photo: Photo) -> dict[str, NDArray[np.bool_]]:
        """Class -> (H, W). Raises DataError: they are gone, or damaged."""
        names = tuple(photo.prediction.classes)
        task = photo.task
        if photo.drawn is not None:
            return dict(photo.drawn)
        if task.mask.exists():
            numbers = _read(task.mask)
            if len(names) == 1:
                return {names[0]: numbers > 0}
            return {name: numbers == number for number, name in enumerate(names, 1)}
        parts = class_parts(names)
        return {name: _read(task.folder / f"{task.name}_{parts[name]}{_MASK}") > 0 for name in names}

    def found(self, photo: Photo) -> Found:
        """For the formats of annotation tools. Raises DataError as `masks`."""
        masks = self.masks(photo)
        said = photo.prediction.classes
        classes = {}
        for name, mask in masks.items():
            objects, scores = find_instances(mask, least_area=LEAST_AREA), said[name].instances if name in said else ()
            if len(scores) == len(objects) and photo.drawn is None:
                objects = tuple(replace(one, score=score) for one, score in zip(objects, scores, strict=True))
            classes[name] = FoundClass(mask, said[name].score if name in said else None, objects)
        height, width = next(iter(masks.values())).shape
        return Found(photo.path, width, height, classes)

    def export(self, kind: str, out: Path) -> list[Path]:
        """Write all masks that nobody has rejected in a format of annotation tools; returns the files.

        Raises:
            ConfigError: no such format. DataError: a mask is gone, or the disk refused.
        """
        kept = [photo for photo in self.photos if photo.decision != "rejected"]
        root = Path(os.path.commonpath([os.path.abspath(photo.path.parent) for photo in self.photos]))
        with Writer([kind], out, self.classes, root, overlapping=self.overlapping) as writer:
            for photo in kept:
                writer.add(self.found(photo))
        return sorted(path for path in out.rglob("*") if path.is_file())

    def decide(self, photo: Photo, decision: str | None) -> None:
        """Keep what somebody said of a photo; None forgets it.

        Raises:
            DataError: no such decision, or the disk refused.
        """
        if decision is not None and decision not in DECISIONS:
            raise DataError(f"No decision {decision!r}. There are {', '.join(DECISIONS)}.")
        with self._lock:
            photo.decision = decision
            said = {str(one.path): one.decision for one in self.photos if one.decision is not None}
            try:
                replace_json(self.root / REVIEW, {"format": 1, "photos": said})
            except OSError as error:
                raise DataError(f"Cannot write {self.root / REVIEW}: {error}. It is as it was.") from error

    def renew(self, photo: Photo, result: Result) -> None:
        """A photo was predicted again; its files are there."""
        assert result.object_share is not None
        old = photo.prediction
        photo.prediction = Prediction(
            old.query, result.task.mask, result.task.overlay, result.object_share, result.classes
        )

    def save(self) -> None:
        """Write the results whole, in their order. Raises DataError: the disk refused; the old ones are then there."""
        with self._lock:
            results = [_result(photo) for photo in self.photos]
            results += [Result(Task(path, self.root, path.stem), error=why) for path, why in self._others]
            try:
                replace_text(self.root / RESULTS, "".join(json.dumps(line_of(one)) + "\n" for one in results))
            except OSError as error:
                raise DataError(f"Cannot write {self.root / RESULTS}: {error}. It is as it was.") from error


def _result(photo: Photo) -> Result:
    said: Mapping[str, Said] = photo.prediction.classes
    return Result(photo.task, said, photo.prediction.object_share)


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            return np.array(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"The mask {path} is gone or damaged ({error}). Run `hsnet predict` again.") from error


def _literal(name: str) -> str:
    """A name for glob, taken as it is."""
    return "".join(f"[{letter}]" if letter in "[]*?" else letter for letter in name)
