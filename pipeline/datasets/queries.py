"""Photos that are in no data set: found in files and folders, and named for what is made of them."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import overload

from hsnet.errors import DataError
from pipeline.datasets.images import HEIC, HEIC_SUFFIXES, PHOTO_SUFFIXES, has_heic

log = logging.getLogger(__name__)

_OF_SYSTEMS = ("Thumbs.db", "desktop.ini")
_KINDS = 6
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
        below = {(number, os.path.dirname(name)) for number, name in self._numbered() if "/" in name}
        return [*self._folders, *(self._folders[number] / name for number, name in sorted(below))]

    def names(self) -> Iterator[str]:
        """What each is called in the folder it was found in, subfolders of that one included."""
        return iter(self._names)

    def _numbered(self) -> Iterator[tuple[int, str]]:
        """(number of the folder, name in it) of every photo."""
        bounds = [*self._starts, len(self._names)]
        for number, (first, last) in enumerate(pairwise(bounds)):
            for name in self._names[first:last]:
                yield number, name


def list_queries(
    paths: Iterable[Path], recursive: bool = False, leave_out: Path | None = None, *, watched: bool = False
) -> Queries:
    """Photos to segment: files as given, folders by their photos in order of name. Each photo once.

    What lies in a folder and is no photo is counted, by suffix, in one line per folder given.

    Args:
        recursive: take the photos of subfolders, too, the folder's own first. Links to folders are not followed.
        leave_out: with `recursive`, a folder that is not looked into, such as the one that is written to.
        watched: asked again and again: a folder may hold no photo yet, and nothing is told of what else it holds.

    Raises:
        DataError: a path does not exist, or a folder holds no photo. Says what suffixes count.
    """
    paths = list(paths)
    queries, again = Queries(), 0
    # Absolute names, where a photo can come twice.
    seen: set[str] | None = set() if len(paths) > 1 else None
    for path in paths:
        if path.is_dir():
            folder, names = path, _photos_in(path, recursive, leave_out, watched)
        elif path.exists():
            folder, names = path.parent, [path.name]
        else:
            raise DataError(f"The query {path} does not exist")
        if seen is not None:
            whole = os.path.abspath(folder)
            new = [name for name in dict.fromkeys(names) if os.path.join(whole, name) not in seen]
            again += len(names) - len(new)
            seen.update(os.path.join(whole, name) for name in new)
            names = new
        queries.add(folder, names)
    if again and not watched:
        log.warning("%d %s given more than once: done once", again, "photo was" if again == 1 else "photos were")
    return queries


def _photos_in(path: Path, recursive: bool, leave_out: Path | None, watched: bool) -> list[str]:
    """Names of a folder's photos relative to it, and what else is there told. Raises DataError: there is none."""
    photos: list[str] = []
    others: Counter[str] = Counter()
    written = None if leave_out is None else os.path.realpath(leave_out)
    for folder, below, files in os.walk(path):
        below.sort()
        if written is not None:
            below[:] = [name for name in below if os.path.realpath(os.path.join(folder, name)) != written]
        before = os.path.relpath(folder, path)
        names = []
        for name in files:
            if suffix(name) not in PHOTO_SUFFIXES:
                others.update([] if name.startswith(".") or name in _OF_SYSTEMS else [suffix(name) or "no suffix"])
            elif os.path.isfile(os.path.join(folder, name)):
                names.append(name)
            else:
                others["broken links and the like"] += 1
        kept = _without_masks(Path(folder), sorted(names), watched)
        photos += kept if before == "." else [os.path.join(before, name) for name in kept]
        if not recursive:
            if below:
                others["subfolders"] = len(below)
            break
    if watched:
        return photos
    told = left_out_text(others)
    if told:
        log.info("Note: %s: %s", path, told)
    if not photos:
        raise DataError(
            f"The folder {path} holds no photo ({', '.join(PHOTO_SUFFIXES)})"
            f"{'' if recursive else '; subfolders are not searched without --recursive'}{f'. {told}' if told else ''}"
        )
    return photos


def left_out_text(others: Mapping[str, int]) -> str:
    """ "left out 4 files that are no photos: 3 .heic, 1 .pdf; ..." with what helps; "" if nothing was left out."""
    if not others:
        return ""
    files = {kind: count for kind, count in others.items() if kind != "subfolders"}
    parts = []
    if files:
        kinds = sorted(files.items(), key=lambda item: (-item[1], item[0]))
        some = ", ".join(f"{count} {kind}" for kind, count in kinds[:_KINDS])
        many = sum(files.values())
        parts.append(
            f"left out {many} {'file that is no photo' if many == 1 else 'files that are no photos'} here: {some}"
            f"{', ...' if len(kinds) > _KINDS else ''}"
        )
    if set(files) & set(HEIC_SUFFIXES) and not has_heic:
        parts.append(f"HEIC photos need a decoder: {HEIC}")
    if count := others.get("subfolders"):
        parts.append(f"{count} subfolder{'' if count == 1 else 's'} not searched (--recursive does)")
    return "; ".join(parts)


def suffix(name: str) -> str:
    """In lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def _without_masks(folder: Path, names: list[str], watched: bool) -> list[str]:
    """Leave out X.png beside X.jpg: the mask of an annotated photo."""
    stems = {os.path.splitext(name)[0] for name in names if suffix(name) != ".png"}
    kept = [name for name in names if suffix(name) != ".png" or os.path.splitext(name)[0] not in stems]
    if (masks := sorted(set(names) - set(kept))) and not watched:
        log.warning(
            "%s: %d PNG file%s beside a photo of the same name taken as %s, not as %s: %s%s",
            folder, len(masks), *(("", "a mask", "a query") if len(masks) == 1 else ("s", "masks", "queries")),
            ", ".join(masks[:3]), ", ..." if len(masks) > 3 else "",
        )  # fmt: skip
    return kept


def names_of(queries: Iterable[Path]) -> Iterator[str]:
    """A file name stem for each query: readable, never twice (also not by case alone), never another folder.

    >>> list(names_of([Path("a/dog.jpg"), Path("b/Dog.png"), Path("..jpg")]))
    ['dog', 'Dog-2', 'query']
    """
    taken: set[str] = set()
    numbers: dict[str, int] = {}
    found = queries.names() if isinstance(queries, Queries) else (query.name for query in queries)
    for whole in found:
        # Photos of subfolders are named with them: "monday/cup.jpg" is "monday-cup".
        below, _, last = whole.rpartition("/")
        stem = Path(last).stem
        base = clean_name("-".join([*below.split("/"), stem]) if below else stem)
        name = base
        while name.casefold() in taken:
            numbers[base] = numbers.get(base, 1) + 1
            name = f"{base}-{numbers[base]}"
        taken.add(name.casefold())
        yield name


def clean_name(text: str) -> str:
    """A part of file names, readable and safe, of any text: names may hold bytes that are no text, or dots only.

    >>> clean_name("a/b"), clean_name("..")
    ('a_b', 'query')
    """
    text = os.fsencode(text).decode("utf-8", "replace")
    text = "".join(letter if letter.isprintable() and letter not in '\\/:*?"<>|' else "_" for letter in text)
    return text.encode()[:_NAME_BYTES].decode("utf-8", "ignore").strip(". ").lstrip("-") or "query"
