"""Answers that a page shows, draws on and downloads: the last few, in memory, under names nobody can guess."""

from __future__ import annotations

import io
import secrets
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hsnet.errors import DataError
from pipeline.annotations.found import Found, FoundClass
from pipeline.annotations.write import FORMATS, Writer
from pipeline.common import render
from pipeline.datasets.images import resize_label
from pipeline.predict.instances import find_instances
from pipeline.predict.model import ClassAnswer
from pipeline.predict.writing import PALETTE
from pipeline.serve.uploads import Upload

VIEW = 1600
"""Longer side of what a page shows and draws on, pixels; masks are kept at the photo's own size."""
LEAST_AREA = 4
"""Pixels of an object that is counted as one."""
MOST_BYTES = 1 << 30
"""Of all answers that are kept."""
OWN = ("overlay", "soft")
"""Downloads beside the formats of annotation tools."""


@dataclass(frozen=True, eq=False)
class View:
    """A photo with the masks of its classes, as a page shows it."""

    photo: Image.Image
    masks: Mapping[str, NDArray[np.bool_]]
    """Class -> (H, W)."""

    @cached_property
    def size(self) -> tuple[int, int]:
        """(h, w) of the canvas."""
        height, width = self.photo.height, self.photo.width
        scale = min(1.0, VIEW / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def shown(self, name: str) -> NDArray[np.bool_]:
        """(h, w) of a class; nothing for one that was not looked for."""
        mask = self.masks.get(name)
        return np.zeros(self.size, bool) if mask is None else resize_label(mask, self.size)

    def photo_jpeg(self) -> bytes:
        return encoded(self.photo.resize(self.size[::-1], Image.Resampling.BILINEAR), "JPEG", quality=90)

    def mask_png(self, name: str) -> bytes:
        """White, as opaque as there is object."""
        return encoded(_opaque(self.shown(name).astype(np.uint8) * np.uint8(255)), "PNG")


@dataclass(frozen=True, eq=False)
class Answer:
    """What was found in an uploaded photo."""

    upload: Upload
    found: Mapping[str, ClassAnswer]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))

    @cached_property
    def view(self) -> View:
        return View(self.upload.photo, {name: one.mask for name, one in self.found.items()})

    @property
    def nbytes(self) -> int:
        """About what it holds."""
        return len(self.upload.data) + self.upload.photo.width * self.upload.photo.height * (3 + 5 * len(self.found))

    def soft_png(self, name: str) -> bytes:
        """As opaque as the class is likely."""
        soft = Image.fromarray(np.rint(self.found[name].soft * 255).astype(np.uint8))
        return encoded(_opaque(np.asarray(soft.resize(self.view.size[::-1], Image.Resampling.BILINEAR))), "PNG")

    def as_found(self, photo: Path) -> Found:
        """For the formats of annotation tools."""
        return found_of(self.found, photo, self.upload.size)

    def download(self, kind: str) -> tuple[str, bytes]:
        """(file name, bytes) in a format of `FORMATS` or `OWN`; several files as one .zip.

        Raises:
            DataError: no such format, or nothing was looked for.
        """
        if kind not in (*FORMATS, *OWN):
            raise DataError(f"No format {kind!r}. There are {', '.join((*FORMATS, *OWN))}.")
        if not self.found:
            raise DataError("There is nothing to download: the bank shows no class yet.")
        stem = self.upload.name.rsplit(".", 1)[0]
        with tempfile.TemporaryDirectory(prefix="hsnet-") as folder:
            root = Path(folder)
            files = self._own(kind, root / stem) if kind in OWN else self._written(kind, root / "photos", root / "out")
            if len(files) == 1:
                return f"{stem}_{kind}{files[0].suffix}", files[0].read_bytes()
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in files:
                    archive.write(file, file.relative_to(files[0].parent if kind in OWN else root / "out"))
            return f"{stem}_{kind}.zip", packed.getvalue()

    def _written(self, kind: str, photos: Path, out: Path) -> list[Path]:
        photos.mkdir()
        photo = photos / self.upload.name
        photo.write_bytes(self.upload.data)
        with Writer([kind], out, list(self.found), photos) as writer:
            writer.add(self.as_found(photo))
        return sorted(path for path in out.rglob("*") if path.is_file())

    def _own(self, kind: str, start: Path) -> list[Path]:
        if kind == "overlay":
            path = start.with_name(f"{start.name}_overlay.jpg")
            path.write_bytes(encoded(overlay(self.upload.photo, self.view.masks), "JPEG", quality=90))
            return [path]
        paths = []
        for number, one in enumerate(self.found.values(), 1):
            paths.append(start.with_name(f"{start.name}_{number}_soft.png"))
            paths[-1].write_bytes(encoded(Image.fromarray(np.rint(one.soft * 255).astype(np.uint8)), "PNG"))
        return paths


class Answers:
    """The last answers, oldest forgotten first."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._kept: OrderedDict[str, Answer] = OrderedDict()
        self._most, self._lock = most_bytes, threading.Lock()

    def keep(self, answer: Answer) -> None:
        with self._lock:
            self._kept[answer.id] = answer
            while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > self._most:
                self._kept.popitem(last=False)

    def get(self, name: str) -> Answer | None:
        with self._lock:
            return self._kept.get(name)


def found_of(found: Mapping[str, ClassAnswer], photo: Path, size: tuple[int, int]) -> Found:
    """Masks of a photo of (H, W) pixels with their separate objects."""
    classes = {
        name: FoundClass(one.mask, one.score, find_instances(one.mask, one.soft, LEAST_AREA))
        for name, one in found.items()
    }
    return Found(photo, size[1], size[0], classes)


def overlay(photo: Image.Image, masks: Mapping[str, NDArray[np.bool_]]) -> Image.Image:
    """The photo with every class tinted in its colour."""
    for number, mask in enumerate(masks.values()):
        if mask.any():
            photo = render.overlay(photo, mask, PALETTE[number % len(PALETTE)])
    return photo


def colour(number: int) -> str:
    """Of the n-th class, as pages write it."""
    return "#{:02x}{:02x}{:02x}".format(*PALETTE[number % len(PALETTE)])


def encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    """A picture file in memory."""
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def _opaque(alpha: NDArray[np.uint8]) -> Image.Image:
    picture = Image.new("LA", alpha.shape[::-1], (255, 0))
    picture.putalpha(Image.fromarray(alpha))
    return picture
