"""Which photo has which mask in a folder: by folder and name, by several folders, or by patterns of paths."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hsnet.errors import DataError
from pipeline.datasets.images import HEIC, HEIC_SUFFIXES, PHOTO_SUFFIXES, has_heic

NAME, CLASS = "{name}", "{class}"

_TEXTS = (".txt", ".json", ".xml", ".csv", ".yaml", ".yml", ".md")

Pair = tuple[str, str, str]
"""(image id, photo, mask), the paths relative to the root; of a pattern with {class}, see `pairs_by_pattern`."""


def is_pattern(text: str | tuple[str, ...]) -> bool:
    """Whether `images` of a description is a pattern and not a folder."""
    return isinstance(text, str) and NAME in text


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Relative names of files below a folder, without hidden ones, in order. Raises DataError: it is no folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts))


def other_files(folder: Path, suffixes: tuple[str, ...]) -> Counter[str]:
    """How many files below a folder are of none of the suffixes, by suffix; hidden ones and texts beside photos not."""
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() not in (*suffixes, *_TEXTS))
    seen = (path for path in inside if not any(part.startswith(".") for part in path.parts))
    return Counter(path.suffix.lower() for path in seen if path.suffix and not (folder / path).is_dir())


def others_note(others: Counter[str]) -> tuple[str, ...]:
    """A note of what `other_files` found; nothing if that is nothing."""
    if not others:
        return ()
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(6))
    heic = not has_heic and any(others[kind] for kind in HEIC_SUFFIXES)
    hint = f" HEIC photos need a decoder: {HEIC}." if heic else ""
    return (f"Left out files of other kinds: {kinds}. Photos are {', '.join(PHOTO_SUFFIXES)}, masks .png.{hint}",)


def pairs_by_folder(root: Path, images: Sequence[str], masks: Sequence[str]) -> tuple[list[Pair], tuple[str, ...]]:
    """Photos of folders with the masks of their names in the folders beside them, and what was left out.

    Image ids are relative to the folder of the photos where there is one, and to the root where there are several.
    """
    pairs: list[Pair] = []
    alone: list[str] = []
    lonely: list[str] = []
    others: Counter[str] = Counter()
    for photos, labels in zip(images, masks, strict=True):
        before = "" if len(images) == 1 else f"{photos}/"
        there = {name.rpartition(".")[0]: name for name in files_in(root / labels, (".png",))}
        others += other_files(root / photos, PHOTO_SUFFIXES)
        if photos != labels:
            others += other_files(root / labels, (".png",))
        taken = set()
        for name in files_in(root / photos, PHOTO_SUFFIXES):
            mask = there.get(name.rpartition(".")[0])
            if mask is None:
                alone.append(f"{before}{name}")
            else:
                taken.add(mask)
                pairs.append((f"{before}{name}", f"{photos}/{name}", f"{labels}/{mask}"))
        lonely += [f"{labels}/{name}" if before else name for name in there.values() if name not in taken]
    pairs.sort()
    notes = [*left_out("photo", "without a mask", alone), *left_out("mask", "without a photo", sorted(lonely))]
    return pairs, (*notes, *others_note(others))


def pairs_by_pattern(root: Path, images: str, masks: str) -> tuple[list[tuple[str, Pair]], tuple[str, ...]]:
    """(class, pair) of photos whose path fits a pattern and that have the mask of the other one, and what was left out.

    `{name}` stands for any part of a path, slashes included, `{class}` for one folder's name ("" where the pattern has
    none), `*` for anything without a slash. Image ids are the photos' paths relative to the root.
    """
    found = re.compile(_expression(images))
    pairs: list[tuple[str, Pair]] = []
    alone: list[str] = []
    for name in files_in(root, PHOTO_SUFFIXES):
        match = found.fullmatch(name)
        if match is None:
            continue
        parts = match.groupdict()
        mask = masks.replace(NAME, parts["name"]).replace(CLASS, parts.get("class", ""))
        if mask == name:
            raise DataError(f"{root}/dataset.yaml: with images {images!r} and masks {masks!r}, {name} is its own mask.")
        if (root / mask).is_file():
            pairs.append((parts.get("class", ""), (name, name, mask)))
        else:
            alone.append(name)
    masks_there = {mask for _, (_, _, mask) in pairs}
    pairs = [pair for pair in pairs if pair[1][1] not in masks_there]
    alone = [name for name in alone if name not in masks_there]
    return pairs, left_out("photo", "without a mask", alone)


def _expression(pattern: str) -> str:
    """The regular expression of a pattern; what comes twice must be the same."""
    text, seen = "", set()
    for part in re.split(r"(\{name\}|\{class\}|\*)", pattern):
        group = {NAME: "name", CLASS: "class"}.get(part)
        if group is None:
            text += "[^/]*" if part == "*" else re.escape(part)
        elif group in seen:
            text += f"(?P={group})"
        else:
            seen.add(group)
            text += f"(?P<{group}>{'.+' if group == 'name' else '[^/]+'})"
    return text


def left_out(what: str, why: str, names: Sequence[str]) -> tuple[str, ...]:
    """A note that files were left out; nothing if none were."""
    if not names:
        return ()
    many = "" if len(names) == 1 else "s"
    return (f"Left out {len(names)} {what}{many} {why}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}.",)


def groups_of(root: Path, wanted: str | None, ids: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Group number of every image, and notes; () without groups. Images that no group is known of are one each.

    Args:
        wanted: a regular expression whose one group is what the photos of a group have in common, looked for anywhere
            in an image id; or a .csv file in `root` with the columns image (an id, or without its suffix) and group.

    Raises:
        DataError: the file cannot be read or lists an image that is not there; no image matches.
    """
    if wanted is None:
        return (), ()
    if wanted.endswith(".csv"):
        names = _listed_groups(root / wanted, ids)
    else:
        found = re.compile(wanted)
        names = [match[1] if (match := found.search(image_id)) else None for image_id in ids]
    known = [name for name in names if name is not None]
    if not known:
        raise DataError(f"{root}/dataset.yaml: groups {wanted!r} matches no image; the first is {ids[0]}.")
    numbers: dict[str, int] = {}
    groups = []
    for image_id, name in zip(ids, names, strict=True):
        # An image alone has a name that no group can have: ids hold no line break.
        groups.append(numbers.setdefault(f"alone\n{image_id}" if name is None else name, len(numbers)))
    alone = [image_id for image_id, name in zip(ids, names, strict=True) if name is None]
    some = f"; {len(alone)} photos are in none ({alone[0]}{', ...' if len(alone) > 1 else ''})" if alone else ""
    return tuple(groups), (f"{len(set(known))} groups of {len(known)} photos{some}.",)


def _listed_groups(path: Path, ids: Sequence[str]) -> list[str | None]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a list of groups: {error}.") from error
    places = {image_id.rpartition(".")[0]: i for i, image_id in enumerate(ids)}
    places |= {image_id: i for i, image_id in enumerate(ids)}
    names: list[str | None] = [None] * len(ids)
    for row in rows:
        image, group = row.get("image"), row.get("group")
        if not image or not group:
            raise DataError(f"{path} must have the columns image and group, filled in every line; got {dict(row)}.")
        if image not in places:
            raise DataError(f"{path} lists {image[:80]!r}, but there is no such photo with a mask.")
        names[places[image]] = group
    return names
