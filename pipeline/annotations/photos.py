"""Photos found by the names that an annotation file has for them, and safe reading of such files.

A name in an annotation file is somebody else's: an absolute path, one with "..", an address of a server. It never leads
out of the folder of photos; its last part is looked for there instead.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from hsnet.errors import DataError
from pipeline.datasets.images import PHOTO_SUFFIXES

LARGEST = 1 << 30
"""Bytes of an annotation file. COCO's training file has 0.45 of it."""


def read_bytes(path: Path, largest: int | None = None) -> bytes:
    """An annotation file. Raises DataError: missing, no regular file, or larger than is read (`LARGEST`)."""
    largest = LARGEST if largest is None else largest
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(f"{path} is no file that can be read: a folder, a pipe or a device.")
        if facts.st_size > largest:
            raise DataError(f"{path} has {facts.st_size:,} bytes; {largest:,} is the most that is read. Split it.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


class PhotoFinder:
    """Finds the photos that an annotation file names.

    Args:
        source: the annotation file, for messages.
        folders: where photos may lie, in this order; a name is a path in one of them, or its last part is the name of
            one photo in them or their subfolders.
        key: brings names to a common form for the second way (servers change names on upload).
    """

    def __init__(self, source: Path, folders: Iterable[Path], key: Callable[[str], str] = str) -> None:
        self.source = source
        self.folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
        self.key = key
        self._by_name: dict[str, list[Path]] | None = None
        self._missing: list[str] = []

    def find(self, name: str, remember: bool = True) -> Path | None:
        """The photo, or None; the name is then remembered for `require_all` if wanted.

        Raises:
            DataError: several photos have this name and nothing tells which is meant.
        """
        plain = name.replace("\\", "/")
        inside = PurePosixPath(plain)
        if "\0" not in plain and not inside.is_absolute() and ".." not in inside.parts and inside.parts:
            for folder in self.folders:
                for text in dict.fromkeys((name, plain)):
                    if _is_file(folder / text):
                        return folder / text
        found = _nearest(self._named().get(self.key(inside.name), []), inside)
        if len(found) > 1:
            raise DataError(
                f"{self.source} names the photo {name!r}, and there are {len(found)} of that name: "
                f"{', '.join(map(str, found[:3]))}. Give the folder of the photos that are meant."
            )
        if not found:
            if remember:
                self._missing.append(name)
            return None
        return found[0]

    def require_all(self) -> None:
        """Raises DataError if a photo was not found: how many, the first names, where it was looked."""
        if self._missing:
            names = ", ".join(map(repr, self._missing[:3])) + (", ..." if len(self._missing) > 3 else "")
            where = " or ".join(map(str, self.folders)) or "any folder that exists"
            raise DataError(
                f"{self.source} names {len(self._missing)} photos that are not in {where}: {names}. "
                f"Say where the photos are, or take them out of the file."
            )

    def _named(self) -> dict[str, list[Path]]:
        if self._by_name is None:
            self._by_name = {}
            seen: set[Path] = set()
            for folder in self.folders:
                for path in list_photos(folder):
                    if path not in seen:
                        seen.add(path)
                        self._by_name.setdefault(self.key(path.name), []).append(path)
        return self._by_name


def list_photos(folder: Path) -> list[Path]:
    """Photos in a folder and its subfolders, in order of their paths; nothing hidden."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(place, name)
            for name in sorted(names)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES
        ]
    return found


def _nearest(photos: list[Path], name: PurePosixPath) -> list[Path]:
    """Those whose path ends with the most parts of the name."""
    photos = list({photo.resolve(): photo for photo in reversed(photos)}.values())  # a link is no other photo
    if len(photos) < 2:
        return photos

    def common(photo: Path) -> int:
        pairs = zip(reversed(photo.parts), reversed(name.parts), strict=False)
        return next((n for n, (one, other) in enumerate(pairs) if one != other), len(name.parts))

    most = max(map(common, photos))
    return [photo for photo in photos if common(photo) == most]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name longer than the file system allows
        return False
