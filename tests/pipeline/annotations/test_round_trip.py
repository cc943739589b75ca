"""What is written is read again, pixel for pixel, with names, absent classes and all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.annotations.found import Found
from pipeline.annotations.item import Annotation
from pipeline.annotations.read import read_annotations
from pipeline.annotations.write import Writer

CLASSES = ("car", "Straße rot", 'odd "name" <&>')
"""Those of conftest.founds."""


def differences(read: Sequence[Annotation], founds: list[Found], absent: str) -> list[str]:
    """How annotations differ from what was found; empty if they say the same.

    `absent`: "others": every class without a mask is absent; "looked for": only those that were looked for; "none".
    """
    by_photo = {item.photo.resolve(): item for item in read}
    wrong = [f"{len(read)} photos, {len(by_photo)} different ones"] * (len(read) != len(by_photo))
    for found in founds:
        item = by_photo.pop(found.photo.resolve(), None)
        if item is None:
            wrong.append(f"{found.photo.name!r} is missing")
            continue
        masks = {name: one.mask for name, one in found.classes.items() if one.mask.any()}
        if set(masks) != set(item.masks):
            wrong.append(f"{found.photo.name!r} has {sorted(item.masks)}, not {sorted(masks)}")
        wrong += [
            f"{found.photo.name!r}, {name}: {int((mask ^ item.masks[name]).sum())} pixels differ"
            for name, mask in masks.items()
            if name in item.masks and (mask ^ item.masks[name]).any()
        ]
        expected = {"others": set(CLASSES), "looked for": set(found.classes), "none": set()}[absent] - set(masks)
        if item.absent != expected:
            wrong.append(f"{found.photo.name!r}: absent are {sorted(item.absent)}, not {sorted(expected)}")
        if item.ignore is not None:
            wrong.append(f"{found.photo.name!r} has ignored pixels")
    return wrong + [f"{path} was not written" for path in by_photo]


@pytest.mark.parametrize(
    ("place", "kind", "absent"),
    [
        ("coco.json", "coco", "others"),
        ("yolo", "yolo", "others"),
        ("yolo/data.yaml", "yolo", "others"),
        ("masks", "masks", "others"),
        ("labelme", "labelme", "none"),
    ],
)
def test_in_again(out: Path, album: Path, founds: list[Found], place: str, kind: str, absent: str) -> None:
    photos = None if kind == "yolo" else album
    for asked in ("auto", kind):
        read = read_annotations(out / place, photos=photos, kind=asked)
        assert read.kind == kind
        assert set(read.classes) == set(CLASSES)
        assert differences(read, founds, absent) == []


def test_labelme_files_find_their_photos_themselves(out: Path, founds: list[Found]) -> None:
    assert differences(read_annotations(out / "labelme"), founds, "none") == []


def test_cvat_in_again(out: Path, album: Path, founds: list[Found]) -> None:
    """The photo without an object is left out: in CVAT's file it may be one that nobody has come to."""
    read = read_annotations(out / "cvat.xml", photos=album)
    assert read.kind == "cvat"
    assert read.notes == ("Left out 1 photos without a shape: nobody may have looked at them.",)
    assert differences(read, founds[:-1], "others") == []


def test_label_studio_in_again(out: Path, album: Path, founds: list[Found], tmp_path: Path) -> None:
    """What is imported as predictions, accepted by a person, and exported."""
    tasks = json.loads((out / "labelstudio.json").read_text())
    exported = [
        {"id": n, "data": task["data"], "annotations": [{"was_cancelled": False, **prediction}], "predictions": []}
        for n, task in enumerate(tasks)
        for prediction in task["predictions"]
    ]
    (tmp_path / "export.json").write_text(json.dumps(exported))
    read = read_annotations(tmp_path / "export.json", photos=album)
    assert read.kind == "labelstudio"
    assert differences(read, founds, "others") == []


def test_overlapping_masks_in_again(tmp_path: Path, album: Path, founds: list[Found]) -> None:
    with Writer(["masks"], tmp_path, CLASSES, album, overlapping=True) as writer:
        for found in founds:
            writer.add(found)
    read = read_annotations(tmp_path, photos=album)
    assert read.kind == "masks"
    assert differences(read, founds, "looked for") == []


def test_a_folder_that_moved_with_its_photos(out: Path, album: Path, founds: list[Found], tmp_path: Path) -> None:
    """The file in the folder of the photos: no other word is needed."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(album, moved)
    shutil.copy(out / "coco.json", moved)
    read = read_annotations(moved / "coco.json")
    assert all(item.photo.is_relative_to(moved) for item in read)
    assert len(read) == len(founds)


def test_a_link_to_a_photo_is_no_second_photo(out: Path, album: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(album, moved)
    shutil.rmtree(moved / "sub")
    (moved / "yolo").mkdir()
    (moved / "yolo" / "a b.jpg").symlink_to(moved / "a b.jpg")
    raw = json.loads((out / "coco.json").read_text())
    raw["images"] = [{**raw["images"][0], "file_name": "/somewhere/a b.jpg"}]
    raw["annotations"] = []
    (tmp_path / "coco.json").write_text(json.dumps(raw))
    assert read_annotations(tmp_path / "coco.json", photos=moved).photos == (moved / "a b.jpg",)
