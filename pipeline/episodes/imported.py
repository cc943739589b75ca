"""Episodes that other code drew, as a manifest: from CSV, JSON lines, or a manifest made for other lists.

Photos are found by their id, with or without suffix and leading folders: "JPEGImages/2007_000032.jpg" is "2007_000032".
Everything is checked against the index; nothing is guessed.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hsnet.errors import DataError
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.episodes.manifest import MANIFEST_FORMAT, Manifest, of_episodes
from pipeline.episodes.stream import Episode

MAX_BYTES = 200_000_000
"""Largest list that is read; 20,000 ten-shot episodes take about 10 MB."""


def import_episodes(
    path: Path, index: DatasetIndex, fold: int, role: str = "test", *, first_class: int = 0
) -> Manifest:
    """Read a list of episodes and make it a manifest of this data set.

    Formats, told by the file's suffix:
        .csv: a header with `query`, `supports` (separated by spaces or semicolons) and, if wanted, `class`.
        .jsonl: an object a line, with `query`, `supports` (a list) and, if wanted, `class`.
        .parquet: a manifest, such as one made for other lists of the same photos.

    `class` is a name or a number. Without it, the class is the only one of the fold that all photos are listed for.

    Args:
        first_class: number of the first class in the list: 0, or 1 for code that counts from mask values.

    Raises:
        DataError: unreadable, an unknown or ambiguous photo or class, a photo not listed for its class in this fold, a
            query among its supports, rows with different numbers of supports. Names the row.
        ConfigError: no such fold.
    """
    split = index.split(fold, role)
    find, listed = _Finder(index.images), set(split.entries)
    episodes, shots = [], 0
    for where, row in _rows(path):
        query, *supports = (find(image, where) for image in (row["query"], *row["supports"]))
        class_id = _class(index, split, row.get("class"), (query, *supports), listed, first_class, where)
        for image in (query, *supports):
            if (image, class_id) not in listed:
                raise DataError(_not_listed(index, split, fold, role, image, class_id, row.get("class"), where))
        if query in supports:
            raise DataError(f"{where}: photo '{index.images[query]}' is the query and its own support.")
        shots = shots or len(supports)
        if len(supports) != shots or not supports:
            raise DataError(f"{where}: {len(supports)} supports, but the first row has {shots}.")
        episodes.append(Episode(query, tuple(supports), class_id))
    if not episodes:
        raise DataError(f"{path} holds no episode.")
    return of_episodes(index, fold, role, episodes, {"draw": "imported", "from": path.name})


class _Finder:
    """Image numbers by id, by the end of an id, or by a path that ends in a whole id; suffixes do not matter."""

    def __init__(self, images: Iterable[str]) -> None:
        self._exact: dict[str, int] = {}
        self._whole: dict[str, list[int]] = {}
        self._ends: dict[str, list[int]] = {}
        for number, image in enumerate(images):
            self._exact[image] = number
            parts = _parts(image)
            self._whole.setdefault("/".join(parts), []).append(number)
            for start in range(len(parts)):
                self._ends.setdefault("/".join(parts[start:]), []).append(number)

    def __call__(self, name: str, where: str) -> int:
        if name in self._exact:
            return self._exact[name]
        parts = _parts(name)
        # "c/4.jpg" is not "b/4.jpg": a folder may be missing on either side, but never contradict.
        fitting = self._ends.get("/".join(parts), []) if parts else []
        for start in range(1, len(parts)):
            fitting = fitting or self._whole.get("/".join(parts[start:]), [])
        if not fitting:
            raise DataError(f"{where}: the data set has no photo '{_shown(name)}'.")
        if len(fitting) > 1:
            raise DataError(f"{where}: '{_shown(name)}' fits {len(fitting)} photos of the data set. Use whole ids.")
        return fitting[0]


def _parts(name: str) -> list[str]:
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if parts:
        parts[-1] = re.sub(r"\.(jpe?g|png|bmp|webp|tiff?)$", "", parts[-1], flags=re.IGNORECASE)
    return parts


def _class(
    index: DatasetIndex,
    split: Split,
    given: object,
    images: tuple[int, ...],
    listed: set[tuple[int, int]],
    first_class: int,
    where: str,
) -> int:
    if given is None or given == "":
        fitting = [c for c in split.class_ids if all((image, c) in listed for image in images)]
        if len(fitting) != 1:
            names = ", ".join(index.classes[c] for c in fitting[:5]) or "none"
            raise DataError(f"{where}: no class is given, and the photos are listed together for {names}. Add a class.")
        return fitting[0]
    by_name = [class_id for class_id, name in index.classes.items() if name == given]
    if len(by_name) == 1:
        return by_name[0]
    try:
        class_id = int(str(given)) - first_class
    except ValueError:
        raise DataError(f"{where}: the data set has no class '{_shown(given)}'.") from None
    if class_id not in index.classes:
        raise DataError(f"{where}: the data set has no class {_shown(given)} (the first one is {first_class}).")
    return class_id


def _not_listed(
    index: DatasetIndex, split: Split, fold: int, role: str, image: int, class_id: int, given: object, where: str
) -> str:
    class_ids = [c for i, c in split.entries if i == image]
    listed = ", ".join(f"{c} '{index.classes[c]}'" for c in class_ids) or "no class"
    hint = ""
    if str(given).isdecimal() and class_id - 1 in class_ids:
        hint = " Numbers that count from 1 need --first-class 1."
    elif class_id not in split.class_ids:
        hint = f" That class is not tested in fold {fold}; choose another --fold."
    return (
        f"{where}: photo '{index.images[image]}' is not listed for class {class_id} '{index.classes[class_id]}' in "
        f"fold {fold}, '{role}'; there it has {listed}.{hint}"
    )


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row with query, supports as list and perhaps class) of any of the formats."""
    readers = {".csv": _csv, ".jsonl": _json_lines, ".parquet": _manifest}
    if path.suffix not in readers:
        raise DataError(f"{path}: a list of episodes must end in {', '.join(readers)}.")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; a list of episodes has at most {MAX_BYTES:,}.")
        yield from readers[path.suffix](path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a list of episodes: {error}") from error


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True, strict=True)
        missing = {"query", "supports"} - set(reader.fieldnames or ())
        if missing:
            raise DataError(f"{path} has no column {' and '.join(sorted(missing))} in its first line.")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not row["query"] or not row["supports"]:
                raise DataError(f"{where}: query or supports are empty.")
            yield where, {**row, "supports": [s for s in re.split(r"[;\s]+", row["supports"]) if s]}


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from error
            supports = row.get("supports") if isinstance(row, dict) else None
            good = isinstance(supports, list) and all(isinstance(s, str) for s in supports)
            if not good or not isinstance(row.get("query"), str):
                raise DataError(f'{where} must be {{"query": "...", "supports": ["...", ...], "class": ...}}.')
            if not isinstance(row.get("class", ""), (str, int)) or isinstance(row.get("class"), bool):
                raise DataError(f"{where}: class must be a name or a number.")
            yield where, row


def _manifest(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pipeline.episodes.manifest_file import read

    manifest = read(path)
    if manifest.format != MANIFEST_FORMAT:
        raise DataError(
            f"{path} holds {manifest.ways}-way episodes, {manifest.absent:,} with no class shown; only episodes of "
            f"one class that the query shows can be brought in. Draw them again for these data: "
            f"`hsnet episodes make --ways`."
        )
    for number, row in enumerate(manifest.rows):
        name = manifest.classes[row.class_id]
        yield f"{path}, episode {number}", {"query": row.query, "supports": list(row.supports), "class": name}


def _shown(value: object) -> str:
    text = str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)[:100]
