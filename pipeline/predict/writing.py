"""What is written of one photo, and how it is known later what it was made with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hsnet.errors import DataError
from pipeline.annotations.found import Found, FoundClass, Instance
from pipeline.bank.heads import Coarse, TrainedFit
from pipeline.bank.kept import kept_features
from pipeline.bank.reading import Features, Reader, Reading
from pipeline.common import render
from pipeline.common.files import read_json, whole
from pipeline.datasets.queries import clean_name
from pipeline.features.weights import Weights
from pipeline.predict.instances import find_instances
from pipeline.predict.model import Answering, ClassAnswer, PhotoModel
from pipeline.predict.trust import Seen

_MASK, _OVERLAY, _SOFT = "_mask.png", "_overlay.jpg", "_soft.png"
DECISIONS = ("accepted", "rejected", "corrected")
MOST_DECISIONS = 1 << 28
"""Bytes of a file of decisions: those on two million photos."""
REVIEW = "review.json"
"""What somebody said of the photos of a folder: `pipeline.review`."""
_TEXT = "hsnet"
"""Key of the PNG text that says what a mask was made with."""
_DIGITS = 4
"""After the point, of scores."""
_LEAST_AREA = 4
"""Pixels of an object that is counted as one; specks below stay in the mask."""

PALETTE = (
    (0, 158, 115), (213, 94, 0), (0, 114, 178), (204, 121, 167), (230, 159, 0), (86, 180, 233), (240, 228, 66),
)  # fmt: skip
"""Colours of classes, in their order and again from the first: Okabe and Ito's."""


@dataclass(frozen=True)
class Said:
    """One class in one photo, in numbers."""

    share: float
    """Share of the photo's pixels predicted as object, 0 to 1."""
    score: float | None = None
    """How sure that the class is in the photo, 0 to 1; None if not known."""
    sureness: float | None = None
    """`pipeline.predict.trust.sureness`, 0 to 1; None if not known."""
    instances: tuple[float, ...] = ()
    """Mean soft value of every connected object of at least 4 pixels, the largest object first."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `of` reads them back."""
        return {**asdict(self), "instances": list(self.instances)}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Said:
        """Read `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        score, sureness = said["score"], said["sureness"]
        return cls(
            float(said["share"]),
            None if score is None else float(score),
            None if sureness is None else float(sureness),
            tuple(map(float, said["instances"])),
        )


@dataclass(frozen=True)
class Outputs:
    """Files that are written of every photo, beside its mask."""

    overlay: bool = True
    soft: bool = False
    """`NAME_soft.png`, 0 to 255: `ClassAnswer.soft`; with several classes one for each."""


@dataclass(frozen=True)
class Task:
    """A photo, and where what is made of it goes: NAME_mask.png in a folder, and the like."""

    query: Path
    folder: Path
    name: str
    overlay_wanted: bool = True

    @property
    def mask(self) -> Path:
        return self.folder / f"{self.name}{_MASK}"

    @property
    def overlay(self) -> Path | None:
        return self.folder / f"{self.name}{_OVERLAY}" if self.overlay_wanted else None


@dataclass(frozen=True)
class Result:
    """A task that is done."""

    task: Task
    classes: Mapping[str, Said] = field(default_factory=dict)
    """Empty if the photo could not be used."""
    object_share: float | None = None
    kept: bool = False
    error: str = ""
    seen: Mapping[str, Seen] = field(default_factory=dict)
    """For the notes of the run; empty for a photo that was kept."""


@dataclass(frozen=True, eq=False)
class Work:
    """All that prediction needs beside its photos; may be sent to other processes."""

    reading: Reading
    weights: Weights
    answering: Answering
    settings: str
    """Digest of all that decides a mask: those of other settings are made anew."""
    outputs: Outputs = Outputs()
    device: str = "cpu"
    keep: Path | None = None
    """Where features of photos are kept, see `pipeline.bank.kept`; None keeps none."""
    decided: frozenset[str] = frozenset()
    """Absolute paths of photos whose masks somebody has accepted or corrected: they stay, whoever made them."""

    def open(self) -> PhotoModel:
        """Load the network."""
        return PhotoModel(Reader(self.reading, self.weights, self.device), self.answering)

    def features(self, reader: Reader, path: Path, photo: Image.Image) -> Features:
        """Of a photo: those that are kept, or by a pass of the network."""
        return reader.read(photo) if self.keep is None else kept_features(self.keep, reader, path, photo)

    def look(self, model: PhotoModel, path: Path, photo: Image.Image) -> dict[str, Coarse]:
        """What the heads answer to a photo."""
        return model.answer(self.features(model.reader, path, photo))

    def names(self) -> dict[str, str]:
        """Class -> its part of file names: readable, never twice."""
        return class_parts(self.answering.names)

    def masks_of(self, task: Task) -> dict[str, Path]:
        """Class -> the file of its mask; the same file for all, unless they may overlap."""
        if not self._separate:
            return dict.fromkeys(self.answering.names, task.mask)
        return {name: task.folder / f"{task.name}_{part}{_MASK}" for name, part in self.names().items()}

    @property
    def _separate(self) -> bool:
        return self.answering.overlapping and len(self.answering.classes) > 1

    def _softs_of(self, task: Task) -> dict[str, Path]:
        if len(self.answering.classes) == 1:
            return {self.answering.names[0]: task.folder / f"{task.name}{_SOFT}"}
        return {name: task.folder / f"{task.name}_{part}{_SOFT}" for name, part in self.names().items()}

    def done_before(self, task: Task) -> Result | None:
        """The task's result, if its files are there and made with these settings of the same photo.

        A mask says in its PNG text what it was made with. It is there whole or not at all, and after all else.
        """
        try:
            last = list(self.masks_of(task).values())[-1]
            with Image.open(last) as picture:
                said = json.loads(picture.info.get(_TEXT, "{}"))
            others = [*self.masks_of(task).values(), *([task.overlay] if task.overlay else [])]
            others += self._softs_of(task).values() if self.outputs.soft else []
            if os.path.abspath(task.query) in self.decided:
                if set(said["classes"]) != set(self.answering.names):
                    why = f"{last} was accepted or corrected with other classes ({', '.join(said['classes'])})"
                    return Result(task, error=f"{why}. It stays; give another --out, or move {REVIEW} away.")
            elif said.get("made") != self._made(task) or not all(path.exists() for path in others):
                return None
            classes = {name: Said.of(said["classes"][name]) for name in self.answering.names}
            return Result(task, classes, float(said["object_share"]), kept=True)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None

    def write(self, task: Task, photo: Image.Image, answers: Mapping[str, Coarse]) -> Result:
        """Make the masks of a photo from what the heads answered, and write them after all else.

        Raises:
            DataError: the disk refused.
        """
        found = self.answering.masks(answers, photo)
        seen = {}
        for one in self.answering.classes:
            votes = one.fitted.votes(answers[one.name]) if isinstance(one.fitted, TrainedFit) else None
            seen[one.name] = Seen.of(found[one.name].mask, votes)
        return replace(self.write_found(task, photo, found), seen=seen)

    def write_found(self, task: Task, photo: Image.Image, found: Mapping[str, ClassAnswer]) -> Result:
        """The same of masks that somebody has corrected: of every class, in the order of the classes."""
        classes = {name: _said(one) for name, one in found.items()}
        anywhere = np.logical_or.reduce([one.mask for one in found.values()])
        share = float(anywhere.mean())
        facts = {
            "made": self._made(task),
            "object_share": share,
            "classes": {name: said.to_json() for name, said in classes.items()},
        }
        try:
            task.folder.mkdir(parents=True, exist_ok=True)
            self._write_pictures(task, photo, found)
            text = PngInfo()
            text.add_text(_TEXT, json.dumps(facts))
            if self._separate:
                for name, path in self.masks_of(task).items():
                    _save(_two_values(found[name].mask), path, pnginfo=text)
            elif len(found) == 1:
                _save(_two_values(anywhere), task.mask, pnginfo=text)
            else:
                _save(_numbers(found), task.mask, pnginfo=text)
        except OSError as error:
            raise DataError(f"Cannot write the masks of {task.query}: {error}.") from error
        return Result(task, classes, share)

    def _write_pictures(self, task: Task, photo: Image.Image, found: Mapping[str, ClassAnswer]) -> None:
        if task.overlay is None:  # one of an earlier mask would tell another story
            (task.folder / f"{task.name}{_OVERLAY}").unlink(missing_ok=True)
        else:
            picture = photo
            for number, one in enumerate(found.values()):
                colour = render.PREDICTION if len(found) == 1 else PALETTE[number % len(PALETTE)]
                if one.mask.any():
                    picture = render.overlay(picture, one.mask, colour)
            _save(picture, task.overlay, "JPEG", quality=90)
        for name, path in self._softs_of(task).items():
            if self.outputs.soft:
                _save(Image.fromarray(np.rint(found[name].soft * 255).astype(np.uint8)), path)
            else:
                path.unlink(missing_ok=True)

    def found(self, result: Result) -> Found:
        """What was written for a photo, for the formats of other tools. Raises DataError if it is gone."""
        masks: dict[str, FoundClass] = {}
        numbers: dict[Path, NDArray[np.uint8]] = {}
        for number, (name, path) in enumerate(self.masks_of(result.task).items(), 1):
            if path not in numbers:
                try:
                    with Image.open(path) as picture:
                        numbers[path] = np.array(picture)
                except OSError as error:
                    raise DataError(f"{path}, which was just written, cannot be read: {error}.") from error
            several = not self._separate and len(self.answering.classes) > 1
            mask = numbers[path] == number if several else numbers[path] > 0
            said = result.classes[name]
            objects = find_instances(mask, least_area=_LEAST_AREA)
            scored = (
                Instance(one.mask, one.box, one.area, score) for one, score in zip(objects, said.instances, strict=True)
            )
            masks[name] = FoundClass(mask, said.score, tuple(scored))
        height, width = next(iter(numbers.values())).shape
        return Found(result.task.query, width, height, masks)

    def _made(self, task: Task) -> str:
        facts = task.query.stat()
        text = f"{self.settings} {facts.st_size} {facts.st_mtime_ns} {os.fsencode(task.query.name)!r}"
        return hashlib.sha256(text.encode()).hexdigest()


def class_parts(names: Iterable[str]) -> dict[str, str]:
    """Class -> its part of file names: readable, never twice."""
    found: dict[str, str] = {}
    for name in names:
        base = clean_name(name)
        taken = {other.casefold() for other in found.values()}
        number = next(n for n in range(1, len(taken) + 2) if _numbered(base, n).casefold() not in taken)
        found[name] = _numbered(base, number)
    return found


def decisions_in(folder: Path) -> dict[str, str]:
    """Photo -> accepted, rejected or corrected, of a folder that was reviewed; empty of another.

    Raises:
        DataError: the file is damaged, or of a later version.
    """
    path = folder / REVIEW
    if not path.exists():
        return {}
    values = read_json(path, MOST_DECISIONS)
    said = values.get("photos")
    if values.get("format") != 1 or not isinstance(said, dict) or not set(said.values()) <= set(DECISIONS):
        raise DataError(f"{path} is damaged, or of a later version. Move it away to begin anew.")
    return said


def _numbered(base: str, number: int) -> str:
    return base if number == 1 else f"{base}-{number}"


def _said(one: ClassAnswer) -> Said:
    objects = find_instances(one.mask, one.soft, _LEAST_AREA)
    scores = tuple(round(item.score or 0.0, _DIGITS) for item in objects)
    score = None if one.score is None else round(one.score, _DIGITS)
    return Said(one.share, score, round(one.sureness, _DIGITS), scores)


def _two_values(mask: NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * np.uint8(255))


def _numbers(found: Mapping[str, ClassAnswer]) -> Image.Image:
    """Every pixel the number of its class from 1, with colours for viewers."""
    layers = list(found.values())
    numbers = np.zeros(layers[0].mask.shape, np.uint8)
    for number, one in enumerate(layers, 1):
        numbers[one.mask] = number
    picture = Image.fromarray(numbers, "P")
    colours = [(0, 0, 0), *(PALETTE[n % len(PALETTE)] for n in range(len(layers)))]
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def _save(picture: Image.Image, path: Path, kind: str = "PNG", **options: Any) -> None:
    with whole(path) as partial:
        picture.save(partial, format=kind, **options)
