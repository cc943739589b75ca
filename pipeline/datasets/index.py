"""What a data set holds, without opening an image: classes, image ids, and the lists of every fold.

Everything that makes episodes, stores or results works from this index alone, so that it can be written into a
store, hashed and compared. Readers (pascal, coco, fss, folder, shapes) build it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError, DataError
from pipeline.common.columns import Pairs, Texts, column, pack, unpack

ROLES = ("trn", "val", "test")
QUERY_ORDERS = ("list", "class")
MAX_CLASS_ID = 65533
"""Largest class id: its mask value, id + 1, must fit below the ignore label of uint16."""

Entry = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """One list of (image, class) pairs: in each, the image can be the query for that class."""

    entries: Sequence[Entry] = ()
    """(image number, class id), in the order of the published list: a tuple, or columns read from a store."""
    declared: tuple[int, ...] = ()
    """Classes that belong to the split even if no image is listed for them: they count as IoU 0 in a mean."""

    @cached_property
    def class_ids(self) -> tuple[int, ...]:
        """All classes of the split, listed or declared, sorted."""
        if isinstance(self.entries, Pairs):
            listed = set(np.unique(self.entries.second).tolist())
        else:
            listed = {class_id for _, class_id in self.entries}
        return tuple(sorted(listed | set(self.declared)))

    @cached_property
    def by_class(self) -> dict[int, tuple[int, ...]]:
        """Class id -> its image numbers in list order. A class without an entry maps to ()."""
        if isinstance(self.entries, Pairs):
            order = np.argsort(self.entries.second, kind="stable")
            images, ids = self.entries.first[order], self.entries.second[order]
            bounds = np.searchsorted(ids, [*self.class_ids, MAX_CLASS_ID + 1]).tolist()
            return {
                class_id: tuple(images[start:end].tolist())
                for class_id, start, end in zip(self.class_ids, bounds[:-1], bounds[1:], strict=True)
            }
        groups: dict[int, list[int]] = {class_id: [] for class_id in self.class_ids}
        for image, class_id in self.entries:
            groups[class_id].append(image)
        return {class_id: tuple(images) for class_id, images in groups.items()}

    def classes_below(self, images: int) -> dict[int, int]:
        """Classes with fewer than `images` different images -> how many they have, with 0 for empty classes.

        An episode of K shots needs K + 1 images of its class; with fewer, the published code loops forever.
        """
        counts = {class_id: len(set(listed)) for class_id, listed in self.by_class.items()}
        return {class_id: count for class_id, count in counts.items() if count < images}


@dataclass(frozen=True)
class DatasetIndex:
    """Classes, images and lists of a data set.

    Masks: 0 is background, class id + 1 the class, `ignore_label` (the largest value of `label_dtype`) pixels
    that count for nothing. Checked when made.

    Raises:
        DataError: a field contradicts another (an entry without its image, a class without a name, ...).
    """

    name: str
    """Which reader made it: pascal, coco, fss, folder, shapes."""
    classes: dict[int, str]
    """Class id, from 0, -> name."""
    images: Sequence[str]
    """Unique ids with forward slashes, such as "2007_000032", "fountain/1.jpg"; never outside the data root. A tuple,
    or texts read from a store, each decoded when it is asked for."""
    splits: dict[int, dict[str, Split]]
    """Fold -> role ("trn", "val", "test") -> list. A role that is missing is empty."""
    query_order: str = "list"
    """How queries are drawn: "list" each entry once a cycle, "class" uniform class, then uniform image (COCO)."""
    has_ignore: bool = False
    """Whether masks may hold `ignore_label`."""
    groups: tuple[int, ...] = ()
    """Group number of every image: photos of one thing, never query and support of one episode. () without groups."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a user should know: lists that were not there, rules applied. Not part of the digest."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def folds(self) -> tuple[int, ...]:
        return tuple(sorted(self.splits))

    def split(self, fold: int, role: str) -> Split:
        """The list of a fold for a role; empty if the data set has none.

        Raises:
            ConfigError: no such fold or role. Names those there are.
        """
        if role not in ROLES:
            raise ConfigError(f"No split '{role}': choose one of {', '.join(ROLES)}.")
        if fold not in self.splits:
            there = ", ".join(map(str, self.folds)) or "none"
            raise ConfigError(f"{self.name} has no fold {fold}; folds here: {there}.")
        return self.splits[fold].get(role, Split())

    @property
    def label_dtype(self) -> np.dtype[Any]:
        """Type of the label maps, see `label_dtype`."""
        return label_dtype(self.classes)

    @property
    def ignore_label(self) -> int:
        """255 or 65535."""
        return int(np.iinfo(self.label_dtype).max)

    def photos_per_class(self) -> dict[int, int]:
        """Class id -> how many different photos are listed for it in any list, for every class there is."""
        keys = [np.zeros(0, np.int64)]
        for roles in self.splits.values():
            for split in roles.values():
                pairs = Pairs.of(split.entries)
                keys.append(pairs.second.astype(np.int64) * len(self.images) + pairs.first)
        found = np.unique(np.concatenate(keys)) // max(1, len(self.images))
        ids, counts = np.unique(found, return_counts=True)
        listed = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        return {class_id: listed.get(class_id, 0) for class_id in self.classes}

    def held_out(self) -> dict[int, tuple[int, ...]]:
        """Fold -> the classes that it tests."""
        return {fold: self.split(fold, "test").class_ids for fold in self.folds}

    def mates(self, image: int) -> tuple[int, ...]:
        """Numbers of all images of an image's group, itself among them, ascending."""
        return self._members[self.groups[image]] if self.groups else (image,)

    @cached_property
    def _members(self) -> dict[int, tuple[int, ...]]:
        members: dict[int, list[int]] = {}
        for image, group in enumerate(self.groups):
            members.setdefault(group, []).append(image)
        return {group: tuple(images) for group, images in members.items()}

    @cached_property
    def digest(self) -> str:
        """ "sha256:..." of everything but the notes: two data sets with one digest give the same episodes."""
        return self.content_digest()

    def content_digest(self) -> str:
        """The digest computed anew. That of an index read from columns is the one that was written with them."""
        return "sha256:" + hashlib.sha256(_canonical(_content(self)).encode()).hexdigest()

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives the same index back. About 9 MB for COCO-20i."""
        return _canonical({**_content(self), "notes": list(self.notes)})

    @classmethod
    def from_json(cls, text: str) -> DatasetIndex:
        """Read what `to_json` wrote, trusting nothing in it.

        Raises:
            DataError: not JSON, a field is missing, unknown, of another type, or contradicts another.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"The data-set index is not JSON: {error}.") from error
        return _from_raw(raw)

    def to_columns(self) -> NDArray[np.uint8]:
        """One block of columns (`pipeline.common.columns`); `from_columns` gives the same index back.

        Facts: `format`, `digest`, `name`, `classes`, `query_order`, `has_ignore`, `notes`, and in `declared` the
        declared classes of every fold and role. Columns: `images` and `images.ends`, the ids in UTF-8 and where each
        ends; `FOLD.ROLE.images` and `FOLD.ROLE.classes`, the entries of a list.
        """
        ids = Texts.of(self.images)
        columns: dict[str, NDArray[Any]] = {"images": ids.text, "images.ends": ids.ends}
        if self.groups:
            columns["groups"] = np.array(self.groups, np.int64)
        declared: dict[str, dict[str, list[int]]] = {}
        for fold, roles in self.splits.items():
            declared[str(fold)] = {role: list(split.declared) for role, split in roles.items()}
            for role, split in roles.items():
                entries = Pairs.of(split.entries)
                columns[f"{fold}.{role}.images"] = entries.first
                columns[f"{fold}.{role}.classes"] = entries.second.astype(np.uint16)
        return pack({**_facts(self), "digest": self.digest, "notes": list(self.notes), "declared": declared}, columns)

    @classmethod
    def from_columns(cls, block: NDArray[np.uint8]) -> DatasetIndex:
        """Read what `to_columns` wrote, without decoding images and entries; the block must stay as it is.

        Numbers and ids are checked to be possible. Taken as said: the digest, and that no id occurs twice. `verify` of
        a store compares both with the content.

        Raises:
            DataError: a field or column is missing, of another type, or contradicts another.
        """
        try:
            fields, columns = unpack(block)
            images = Texts(column(columns, "images", "uint8"), column(columns, "images.ends", "int64"))
            splits = {
                fold: {
                    role: {"pairs": _pairs(columns, f"{fold}.{role}"), "declared": classes}
                    for role, classes in _object(roles, "a fold").items()
                }
                for fold, roles in _object(fields.pop("declared"), "declared").items()
            }
            digest = fields.pop("digest")
            if "groups" in columns:
                fields["groups"] = column(columns, "groups", "int64").tolist()
        except (KeyError, ValueError) as error:
            raise DataError(f"The columns of the data-set index are damaged: {error!r:.300}.") from error
        if not isinstance(digest, str) or not re.fullmatch("sha256:[0-9a-f]{64}", digest):
            raise DataError(f"The digest of the data-set index is {digest!r:.80}.")
        index = _from_raw({**fields, "images": images, "splits": splits})
        index.__dict__["digest"] = digest
        return index


def label_dtype(classes: Iterable[int]) -> np.dtype[Any]:
    """Type of label maps of these class ids: uint8, or uint16 if a class needs mask value 255 or more."""
    return np.dtype(np.uint16 if max(classes, default=0) + 1 >= 255 else np.uint8)


def small_class_notes(splits: Mapping[int, Mapping[str, Split]], classes: Mapping[int, str]) -> tuple[str, ...]:
    """One note per list whose classes cannot make an episode: those with no image, and those with only one."""
    notes = []
    for fold in sorted(splits):
        for role, split in splits[fold].items():
            if not split.entries:
                continue  # a list that is not there has a note of its own
            below = split.classes_below(2)
            names = ", ".join(f"{classes[c]} ({n})" for c, n in sorted(below.items())[:5])
            if below:
                more = f" and {len(below) - 5} more" if len(below) > 5 else ""
                notes.append(
                    f"Fold {fold}, '{role}': too few images for any episode of {names}{more} (images in brackets)."
                )
    return tuple(notes)


def image_id_problem(image_id: object) -> str | None:
    """Why this cannot be an image id (a relative path that stays inside the data root), or None."""
    if not isinstance(image_id, str) or not image_id:
        return "not a text"
    if "\\" in image_id or "\0" in image_id or "\n" in image_id:
        return "backslash, zero byte or line break in it"
    path = PurePosixPath(image_id)
    if not path.parts or path.is_absolute() or ".." in path.parts or path.parts[0].endswith(":"):
        return "leaves the data root"
    return None


def _check(index: DatasetIndex) -> None:
    for class_id, name in index.classes.items():
        if not _is_int(class_id) or not 0 <= class_id <= MAX_CLASS_ID or not isinstance(name, str):
            raise DataError(f"Class {class_id!r}: {name!r} is not an id in 0..{MAX_CLASS_ID} with a name.")
    if not index.classes:
        raise DataError(f"Data set '{index.name}' has no classes.")
    texts = isinstance(index.images, Texts)
    for image_id in _doubtful(index.images) if isinstance(index.images, Texts) else index.images:
        problem = image_id_problem(image_id)
        if problem:
            raise DataError(f"{image_id!r} cannot be an image id: {problem}.")
    if not texts and len(set(index.images)) != len(index.images):
        raise DataError("The same image id occurs twice in the index.")
    if index.groups:
        if len(index.groups) != len(index.images):
            raise DataError(f"{len(index.groups)} groups for {len(index.images)} images: every image needs one.")
        if not all(_is_int(group) and 0 <= group < len(index.images) for group in index.groups):
            raise DataError("The group of an image must be a number from 0, below the number of images.")
    if index.query_order not in QUERY_ORDERS:
        raise DataError(f"query_order is {index.query_order!r}, must be one of {', '.join(QUERY_ORDERS)}.")
    for fold, roles in index.splits.items():
        if not _is_int(fold) or fold < 0:
            raise DataError(f"Fold {fold!r} is not a number from 0.")
        for role, split in roles.items():
            if role not in ROLES:
                raise DataError(f"Fold {fold}: no split '{role}', must be one of {', '.join(ROLES)}.")
            _check_split(index, f"Fold {fold}, '{role}'", split)


def _check_split(index: DatasetIndex, where: str, split: Split) -> None:
    count = len(index.images)
    entries = split.entries
    if isinstance(entries, Pairs):
        known = np.zeros(1 << 16, bool)
        known[list(index.classes)] = True
        wrong = (entries.first < 0) | (entries.first >= count) | ~known[entries.second]
        entries = [entries[int(place)] for place in np.flatnonzero(wrong)[:1]]  # none, unless it is an error
    for image, class_id in entries:
        if not (_is_int(image) and 0 <= image < count):
            raise DataError(f"{where}: image number {image!r}, but there are {count} images.")
        if not _is_int(class_id) or class_id not in index.classes:
            raise DataError(f"{where}: class {class_id!r} of image {index.images[image]} has no name.")
    for class_id in split.declared:
        if not _is_int(class_id) or class_id not in index.classes:
            raise DataError(f"{where}: declared class {class_id!r} has no name.")


def _pairs(columns: Mapping[str, NDArray[Any]], name: str) -> Pairs:
    return Pairs(column(columns, f"{name}.images", "int32", "int64"), column(columns, f"{name}.classes", "uint16"))


def _doubtful(ids: Texts) -> Iterator[str]:
    """The ids among them that `image_id_problem` must look at: all others cannot leave the data root."""
    text, ends = ids.text, ids.ends
    if not len(ends):
        return
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    empty = ends == starts
    odd = np.zeros(256, bool)
    odd[list(b"\\\0\n:")] = True
    places = np.flatnonzero(odd[text])
    dots = np.flatnonzero(text == ord("."))
    places = np.concatenate([places, dots[:-1][np.diff(dots) == 1]])
    first = text[np.minimum(starts, max(0, len(text) - 1))] if len(text) else np.zeros(len(ends), np.uint8)
    leading = np.flatnonzero(empty | (first == ord("/")) | (first == ord(".")))
    for number in np.unique(np.concatenate([np.searchsorted(ends, places, side="right"), leading])).tolist():
        yield ids[number]


def _facts(index: DatasetIndex) -> dict[str, Any]:
    return {
        "format": 1,
        "name": index.name,
        "classes": {str(class_id): name for class_id, name in index.classes.items()},
        "query_order": index.query_order,
        "has_ignore": index.has_ignore,
    }


def _content(index: DatasetIndex) -> dict[str, Any]:
    return {
        **_facts(index),
        "images": list(index.images),
        # Only where there are some: digests of data sets without stay what they were.
        **({"groups": list(index.groups)} if index.groups else {}),
        "splits": {
            str(fold): {
                role: {
                    "images": [image for image, _ in split.entries],
                    "classes": [class_id for _, class_id in split.entries],
                    "declared": list(split.declared),
                }
                for role, split in roles.items()
            }
            for fold, roles in index.splits.items()
        },
    }


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _from_raw(raw: object) -> DatasetIndex:
    fields = _object(raw, "the index")
    wanted = {"format", "name", "classes", "images", "query_order", "has_ignore", "splits", "notes"}
    groups = _list(fields.pop("groups", []), "groups", int)
    if set(fields) != wanted:
        odd = ", ".join(sorted(set(fields) ^ wanted))
        raise DataError(f"The data-set index has missing or unknown fields: {odd[:200]}.")
    if fields["format"] != 1:
        raise DataError(f"The data-set index has format {fields['format']!r}; this version reads format 1.")
    if not isinstance(fields["name"], str) or not isinstance(fields["has_ignore"], bool):
        raise DataError("The data-set index needs a text as name and true or false as has_ignore.")
    pairs: dict[Entry, Entry] = {}  # the same entry occurs in three folds: keep one tuple of each
    splits = {
        _number(fold, "fold"): {role: _split(raw_split, pairs) for role, raw_split in _object(roles, "a fold").items()}
        for fold, roles in _object(fields["splits"], "splits").items()
    }
    return DatasetIndex(
        name=fields["name"],
        classes={_number(key, "class id"): name for key, name in _object(fields["classes"], "classes").items()},
        images=images if isinstance(images := fields["images"], Texts) else tuple(_list(images, "images", str)),
        splits=splits,
        query_order=fields["query_order"] if isinstance(fields["query_order"], str) else "",
        has_ignore=fields["has_ignore"],
        groups=tuple(groups),
        notes=tuple(_list(fields["notes"], "notes", str)),
    )


def _split(raw: object, pairs: dict[Entry, Entry]) -> Split:
    fields = _object(raw, "a split")
    if isinstance(pairs_read := fields.get("pairs"), Pairs):
        return Split(pairs_read, tuple(_list(fields["declared"], "declared classes", int)))
    if set(fields) != {"images", "classes", "declared"}:
        raise DataError("A split of the data-set index needs exactly images, classes and declared.")
    images = _list(fields["images"], "images of a split", int)
    classes = _list(fields["classes"], "classes of a split", int)
    if len(images) != len(classes):
        raise DataError(f"A split of the data-set index has {len(images)} images, but {len(classes)} classes.")
    entries = zip(images, classes, strict=True)
    declared = _list(fields["declared"], "declared classes", int)
    return Split(tuple(pairs.setdefault(entry, entry) for entry in entries), tuple(declared))


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"In the data-set index, {what} is a {type(value).__name__}, must be an object.")
    return value


def _list(value: object, what: str, kind: type) -> list[Any]:
    if not isinstance(value, list) or not all(type(item) is kind for item in value):  # a bool is no int here
        raise DataError(f"In the data-set index, {what} must be a list of {kind.__name__}.")
    return value


def _number(text: str, what: str) -> int:
    # "07" and "+7" would give two spellings of one key.
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or str(int(text)) != text:
        raise DataError(f"In the data-set index, {what} {text[:40]!r} is not a number from 0.")
    return int(text)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
