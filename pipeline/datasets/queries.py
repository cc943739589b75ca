"""Photos that are in no data set: found in files and folders, and named for what is made of them."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

from hsnet.errors import DataError
from pipeline.datasets.images import PHOTO_SUFFIXES

log = logging.getLogger(__name__)

_NAME_BYTES = 120  # file systems allow 255 bytes; leaves room for numbering and suffixes


class Queries(Sequence[Path]):
    """Paths of many photos, held as the names that they have in their folders: 80 bytes each, not 500."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._folders: list[Path] = []
        self._starts: list[int] = []

    def add(self, folder: Path, names: Sequence[str]) -> None:
        """Photos of a folder."""
        self._starts.append(len(self._names))
        self._folders.append(folder)
        self._names += names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, number: int) -> Path: ...

    @overload
    def __getitem__(self, number: slice) -> list[Path]: ...

    def __getitem__(self, number: int | slice) -> Path | list[Path]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return self._folders[bisect_right(self._starts, number) - 1] / self._names[number]

    @property
    def folders(self) -> list[Path]:
        """Where photos are."""
        return self._folders


def list_queries(paths: Iterable[Path]) -> Queries:
    """Photos to segment: files as given, folders by their photos in order of name (not of their subfolders).

    Raises:
        DataError: a path does not exist, or a folder holds no photo. Says what suffixes count.
    """
    queries = Queries()
    for path in paths:
        if path.is_dir():
            with os.scandir(path) as entries:
                names = [e.name for e in entries if suffix(e.name) in PHOTO_SUFFIXES and e.is_file()]
            names = _without_masks(path, sorted(names))
            if not names:
                raise DataError(
                    f"The folder {path} holds no photo ({', '.join(PHOTO_SUFFIXES)}); subfolders are not searched"
                )
            queries.add(path, names)
        elif path.exists():
            queries.add(path.parent, [path.name])
        else:
            raise DataError(f"The query {path} does not exist")
    return queries


def suffix(name: str) -> str:
    """In lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def _without_masks(folder: Path, names: list[str]) -> list[str]:
    """Leave out X.png beside X.jpg: the mask of an annotated photo."""
    stems = {os.path.splitext(name)[0] for name in names if suffix(name) != ".png"}
    kept = [name for name in names if suffix(name) != ".png" or os.path.splitext(name)[0] not in stems]
    if len(kept) < len(names):
        log.warning(
            "%s: %d PNG files beside a photo of the same name taken as masks, not as queries",
            folder, len(names) - len(kept),
        )  # fmt: skip
    return kept


def names_of(queries: Iterable[Path]) -> Iterator[str]:
    """A file name stem for each query: readable, never twice (also not by case alone), never another folder.

    >>> list(names_of([Path("a/dog.jpg"), Path("b/Dog.png"), Path("..jpg")]))
    ['dog', 'Dog-2', 'query']
    """
    taken: set[str] = set()
    numbers: dict[str, int] = {}
    for query in queries:
        # Names of the file system may hold anything but "/": bytes that are no text, control characters, dots only.
        text = os.fsencode(query.stem).decode("utf-8", "replace")
        text = "".join(letter if letter.isprintable() and letter not in '\\/:*?"<>|' else "_" for letter in text)
        base = text.encode()[:_NAME_BYTES].decode("utf-8", "ignore").strip(". ").lstrip("-") or "query"
        name = base
        while name.casefold() in taken:
            numbers[base] = numbers.get(base, 1) + 1
            name = f"{base}-{numbers[base]}"
        taken.add(name.casefold())
        yield name
