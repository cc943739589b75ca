"""The published code's split files, and the lists of every fold made from them.

Layouts, in the folder given as `--splits` or in its sub-folder of the data set's name:

    pascal/{trn,val}/fold{f}.txt    lines "2007_000033__01": image name, class number from 1
    coco/{trn,val}/fold{f}.pkl      pickled dict: class id from 0 -> list of image paths
    fss/{trn,val,test}.txt          one class name a line

A PASCAL file `trn/fold{f}.txt` lists the classes of fold f, so that fold f trains on the other three files. A COCO
file `trn/fold{f}.pkl` lists the classes that fold f trains on. Some files may be missing: a list is then either
whole or empty, never a part of what was published, and a note says so.

Training images that also show a novel class stay in the training lists, as published.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from hsnet.errors import DataError
from pipeline.datasets.index import DatasetIndex, Entry, Split, image_id_problem, small_class_notes

Lists = dict[int, list[tuple[str, int]]]
"""Fold -> (image id, class id) in file order."""

_FOLD_FILE = re.compile(r"fold(\d{1,3})\.(txt|pkl)")
_PLAIN_OPCODES = frozenset(
    [
        "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG",
        "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
        "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT",
        "DICT", "SETITEM", "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
        "POP", "POP_MARK",
    ]
)  # fmt: skip


def pascal_lists(directory: Path, side: str, classes: Collection[int]) -> Lists:
    """Fold -> entries of the files `{side}/fold*.txt` that there are; `side` is "trn" or "val".

    Raises:
        DataError: the folder has no such layout, or a line is not "name__CC" with a known class.
    """
    return {
        fold: _pascal_file(path, classes)
        for fold, path in _fold_files(_layout(directory, "pascal", ("trn", "val")) / side, "txt").items()
    }


def coco_lists(directory: Path, side: str, classes: Collection[int]) -> Lists:
    """Fold -> entries of the files `{side}/fold*.pkl` that there are, class after class, each in file order.

    Raises:
        DataError: the folder has no such layout; a file is not a plain dict of lists of image paths, or asks to
            run code (which is never done).
    """
    return {
        fold: _coco_file(path, classes)
        for fold, path in _fold_files(_layout(directory, "coco", ("trn", "val")) / side, "pkl").items()
    }


def fss_lists(directory: Path) -> dict[str, list[str]]:
    """Role -> its class names, sorted as the published code sorts them; roles without a file are left out.

    Raises:
        DataError: no file there; a name is listed twice or cannot be the name of a folder.
    """
    base = directory / "fss" if (directory / "fss").is_dir() else directory
    paths = {role: base / f"{role}.txt" for role in ("trn", "val", "test")}
    if not any(path.is_file() for path in paths.values()):
        raise DataError(f"No split files in {directory}: expected trn.txt, val.txt and test.txt, there or in fss/.")
    lists: dict[str, list[str]] = {}
    origin: dict[str, Path] = {}
    for role, path in paths.items():
        if not path.is_file():
            continue
        for number, name in _lines(path):
            if image_id_problem(name) or "/" in name:
                raise DataError(f"{path}, line {number}: {name!r} cannot be the name of a class folder.")
            if name in origin:
                raise DataError(f"{path}, line {number}: class '{name}' is already listed in {origin[name]}.")
            origin[name] = path
            lists.setdefault(role, []).append(name)
    return {role: sorted(names) for role, names in lists.items()}


def load_plain_pickle(path: Path) -> Any:
    """What a pickle of dicts, lists, tuples, texts, whole numbers, booleans and None holds. Runs nothing.

    Two locks: every instruction of the file must be one that builds such values, and the unpickler refuses to
    look up any name.

    Raises:
        DataError: another instruction, or not a pickle. Names the instruction.
    """
    try:
        data = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _PLAIN_OPCODES:
                detail = f" ({argument})" if isinstance(argument, str) else ""
                raise DataError(
                    f"{path}: this pickle holds more than plain lists and texts: instruction {opcode.name}"
                    f"{detail[:100]}. Nothing in it was run. Take the split files from their original source."
                )
            if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
                raise DataError(f"{path}: broken pickle (memo {argument} in {len(data)} bytes).")
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except (
        pickle.UnpicklingError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError,
        OverflowError, MemoryError, RecursionError,
    ) as error:  # fmt: skip
        raise DataError(f"{path} is not a readable pickle: {error}.") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused to look up {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refused to load a persistent object")


def fold_index(
    name: str,
    trn: Mapping[int, list[tuple[str, int]] | None],
    val: Mapping[int, list[tuple[str, int]] | None],
    novel: Callable[[int], tuple[int, ...]],
    classes: Mapping[int, str],
    images: Collection[str],
    files: str,
    notes: tuple[str, ...],
    **facts: Any,
) -> DatasetIndex:
    """An index with the lists of every fold: its training entries, and from the validation side "test" and "val".

    "test" is the published `val`: images of the fold's novel classes. "val", for choosing a model, is what the
    same side lists for the classes of the *other* folds, so that no test episode takes part in the choice. A fold
    without any list is left out.

    Args:
        trn: fold -> what it trains on; None where that is not known.
        val: fold -> images of its novel classes; None where not known. Same folds as `trn`.
        novel: fold -> its novel classes.
        images: all that are listed.
        files: "fold{}.txt" or "fold{}.pkl", to name what is missing.
        notes: others than those on what is missing.
        facts: `query_order` and `has_ignore` of the index.
    """
    images = tuple(sorted(images))
    number = {image: i for i, image in enumerate(images)}
    pairs: dict[Entry, Entry] = {}

    def entries(listed: Iterable[tuple[str, int]]) -> tuple[Entry, ...]:
        entries = ((number[image], class_id) for image, class_id in listed)
        return tuple(pairs.setdefault(entry, entry) for entry in entries)  # folds share their tuples: COCO has 840,000

    splits = {}
    for fold in sorted(trn):
        base = tuple(sorted(set(classes) - set(novel(fold))))
        others = [val[g] for g in sorted(val) if g != fold]
        known = [listed for listed in others if listed is not None]
        whole = len(known) == len(others)
        if (trn[fold], val[fold]) != (None, None):
            splits[fold] = {
                "trn": Split(entries(trn[fold] or ()), base),
                "val": Split(entries(entry for listed in known for entry in listed) if whole else (), base),
                "test": Split(entries(val[fold] or ()), novel(fold)),
            }
    notes = (*notes, *_missing_notes(trn, val, files), *small_class_notes(splits, classes))
    return DatasetIndex(name=name, classes=dict(classes), images=images, splits=splits, notes=notes, **facts)


def _missing_notes(
    trn: Mapping[int, list[tuple[str, int]] | None], val: Mapping[int, list[tuple[str, int]] | None], names: str
) -> tuple[str, ...]:
    """What cannot be done because split files are missing."""
    notes = []
    no_val = [fold for fold in sorted(val) if val[fold] is None]
    no_trn = [fold for fold in sorted(trn) if trn[fold] is None]
    if no_trn:
        notes.append(f"Folds {no_trn} have no training list: split files are missing in trn/.")
    if no_val:
        files = ", ".join("val/" + names.format(fold) for fold in no_val)
        notes.append(
            f"Split files {files} are missing: no test list for folds {no_val}, and no list for choosing a model "
            f"(the other folds' validation images) where one of them is needed."
        )
    return tuple(notes)


def _layout(directory: Path, name: str, sides: tuple[str, ...]) -> Path:
    for base in (directory / name, directory):
        if any((base / side).is_dir() for side in sides):
            return base
    wanted = " or ".join(f"{side}/" for side in sides)
    raise DataError(f"No split files in {directory}: expected {wanted}, there or in {name}/.")


def _fold_files(folder: Path, suffix: str) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((_FOLD_FILE.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return {int(match[1]): path for match, path in matches if match and match[2] == suffix}


def _pascal_file(path: Path, classes: Collection[int]) -> list[tuple[str, int]]:
    entries = []
    for number, line in _lines(path):
        name, separator, digits = line.rpartition("__")
        if not separator or not digits.isdecimal() or image_id_problem(name):
            raise DataError(f"{path}, line {number}: {line[:80]!r} is not 'image__CC' with a class number CC.")
        if int(digits[:9]) - 1 not in classes:
            raise DataError(
                f"{path}, line {number}: class {digits[:9]} of image {name}, but there are {len(classes)} classes "
                f"(numbers from 1)."
            )
        entries.append((name, int(digits) - 1))
    return entries


def _coco_file(path: Path, classes: Collection[int]) -> list[tuple[str, int]]:
    raw = load_plain_pickle(path)
    if not isinstance(raw, dict):
        raise DataError(f"{path} holds a {type(raw).__name__}, must be a dict of class id -> list of images.")
    for class_id, images in raw.items():
        if type(class_id) is not int or class_id not in classes or not isinstance(images, list | tuple):
            raise DataError(f"{path}: {str(class_id)[:40]!r} is not a class id in 0..{len(classes) - 1} with a list.")
        for image in images:
            if image_id_problem(image):
                raise DataError(f"{path}: class {class_id} lists {str(image)[:80]!r}: {image_id_problem(image)}.")
    return [(image, class_id) for class_id in sorted(raw) for image in raw[class_id]]


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as text: {error}.") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
