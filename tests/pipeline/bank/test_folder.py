"""A bank on disk: what is added is there again, what is damaged is named, and nothing is left half done."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hsnet.errors import ConfigError, DataError, HSNetError, StoreError
from pipeline.annotations.item import Annotation
from pipeline.bank.folder import Bank
from pipeline.bank.reading import Reader, Reading
from pipeline.common.lock import sole_writer


@pytest.fixture
def files(tmp_path, drawn):
    """Four photo files and their masks."""
    found = []
    for number, (photo, mask) in enumerate(drawn["class 0"][:4]):
        path = tmp_path / "in" / f"photo {number} ä.png"
        path.parent.mkdir(exist_ok=True)
        photo.save(path)
        found.append((path, mask))
    return found


@pytest.fixture
def bank(tmp_path, reader):
    return Bank.create(tmp_path / "b.bank", reader.reading)


def state(root):
    return {path: path.stat().st_ino for path in root.rglob("*") if path.is_file()}


def test_what_was_added_is_there_again(bank, files):
    (first, mask), (second, other), (third, _), _ = files
    assert bank.add(Annotation(first, {"cup": mask})).new
    bank.add(Annotation(second, {"cup": other, "lid": ~other}, ignore=np.eye(80, 96, dtype=bool)))
    bank.add(Annotation(third, absent=frozenset({"cup"})))
    again = Bank(bank.root)
    assert again.classes == ("cup", "lid")
    photos = again.photos()
    assert [photo.item.name for photo in photos] == [first.name, second.name, third.name]
    assert np.array_equal(photos[0].mask("cup"), mask)
    assert np.array_equal(photos[1].mask("lid"), ~other)
    assert np.array_equal(photos[1].ignore(), np.eye(80, 96, dtype=bool))
    assert photos[0].mask("lid") is None
    assert photos[2].item.absent == ("cup",)
    assert [len(side) for side in again.of_class("cup")] == [2, 1]
    assert [len(side) for side in again.of_class("lid")] == [1, 0]
    assert np.array_equal(np.asarray(photos[0].read()), np.asarray(Image.open(first).convert("RGB")))


def test_adding_a_photo_computes_one_photo(bank, files, packaged, monkeypatch):
    seen = []
    original = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, photo: seen.append(photo.size) or original(self, photo))
    reader = Reader(bank.reading, packaged)
    for path, mask in files[:3]:
        bank.add(Annotation(path, {"cup": mask}))
    bank.examples("cup", reader)
    assert len(seen) == 3
    bank.add(Annotation(files[3][0], {"cup": files[3][1]}))
    _, examples = Bank(bank.root).examples("cup", reader)
    assert len(seen) == 4
    fresh = original(reader, Image.open(files[0][0]).convert("RGB"))
    for kept, level in zip(examples[0].features.levels, fresh.levels, strict=True):
        assert np.allclose(kept, level, rtol=1e-3, atol=1e-2)


def test_another_reading_keeps_features_of_its_own(bank, files, packaged):
    bank.add(Annotation(files[0][0], {"cup": files[0][1]}))
    for reading in (bank.reading, replace(bank.reading, tile=48), bank.reading):
        bank.examples("cup", Reader(reading, packaged))
    assert len(list(bank.root.rglob("features-*"))) == 2


def test_what_is_known_is_not_overwritten_unless_asked(bank, files):
    path, mask = files[0]
    bank.add(Annotation(path, {"cup": mask}))
    before = state(bank.root)
    assert bank.add(Annotation(path, {"cup": mask})).changed == ()
    with pytest.raises(DataError, match="with a mask of 'cup', and another one was given"):
        bank.add(Annotation(path, {"cup": ~mask}))
    with pytest.raises(DataError, match="with a mask of 'cup'"):
        bank.add(Annotation(path, absent=frozenset({"cup"})))
    assert set(state(bank.root)) == set(before)
    assert bank.add(Annotation(path, {"cup": ~mask}), replace_masks=True).changed == ("cup",)
    (photo,) = bank.photos()
    assert np.array_equal(photo.mask("cup"), ~mask)
    assert len(list(photo.folder.glob("mask-*"))) == 1, "the old mask is gone"
    bank.add(Annotation(path, absent=frozenset({"cup"})), replace_masks=True)
    assert bank.photos()[0].item.absent == ("cup",)
    assert bank.photos()[0].mask("cup") is None


def test_photos_and_classes_can_be_forgotten(bank, files):
    for path, mask in files[:2]:
        bank.add(Annotation(path, {"cup": mask, "lid": ~mask}))
    bank.forget(files[0][0].name, ["lid"])
    assert [len(bank.of_class(name)[0]) for name in ("cup", "lid")] == [2, 1]
    bank.forget(files[1][0].name)
    assert (bank.classes, len(bank.photos())) == (("cup",), 1)
    bank.forget(bank.photos()[0].id, ["cup"])
    assert (bank.classes, bank.photos()) == ((), ())
    with pytest.raises(DataError, match="names no photo"):
        bank.forget("gone.png")


def test_a_killed_writer_leaves_the_bank_as_it_was(bank, files, monkeypatch):
    class Killed(BaseException):
        pass

    bank.add(Annotation(files[0][0], {"cup": files[0][1]}))

    def die(*_):
        raise Killed

    for name in ("os.replace", "pipeline.bank.folder.replace_json"):
        with monkeypatch.context() as patch:
            patch.setattr(name, die)
            for path, mask in (files[1], (files[0][0], ~files[0][1])):
                with pytest.raises(Killed):
                    bank.add(Annotation(path, {"cup": mask}), replace_masks=True)
        (photo,) = Bank(bank.root).photos()
        assert np.array_equal(photo.mask("cup"), files[0][1])
    bank.add(Annotation(files[1][0], {"cup": files[1][1]}))
    assert len(Bank(bank.root).photos()) == 2


def test_a_second_writer_is_refused(bank, files):
    with sole_writer(bank.root), pytest.raises(StoreError, match="is being written by"):
        bank.add(Annotation(files[0][0], {"cup": files[0][1]}))
    assert bank.photos() == ()


def test_bad_photos_and_masks_are_refused_by_name(bank, files, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[0][0].read_bytes()[:90])
    with pytest.raises(DataError, match=r"broken\.png"):
        bank.add(Annotation(broken, {"cup": files[0][1]}))
    with pytest.raises(DataError, match="96 x 80 pixels, its masks have"):
        bank.add(Annotation(files[0][0], {"cup": np.ones((8, 8), bool)}))
    with pytest.raises(DataError, match="A class needs a name"):
        bank.add(Annotation(files[0][0], {"a\nb": files[0][1]}))
    assert bank.photos() == ()
    assert bank.classes == ()


def test_what_is_no_bank_is_said(bank, tmp_path):
    with pytest.raises(DataError, match="is no bank"):
        Bank(tmp_path)
    with pytest.raises(DataError, match="not empty"):
        Bank.create(bank.root, bank.reading)
    header = bank.root / "bank.json"
    good = json.loads(header.read_text())
    header.write_text(json.dumps({**good, "format": 9}))
    with pytest.raises(ConfigError, match="format 9"):
        Bank(bank.root)
    for damage in ({"tile": -3}, {"classes": [3]}, {"recipe": {"backbone": "x"}}):
        header.write_text(json.dumps({**good, **damage}))
        with pytest.raises(DataError, match="damaged"):
            Bank(bank.root)


def test_a_hostile_bank_reads_no_file_outside(bank, files, reader, tmp_path):
    bank.add(Annotation(files[0][0], {"cup": files[0][1]}))
    (photo,) = bank.photos()
    item = photo.folder / "item.json"
    good = json.loads(item.read_text())
    for damage in (
        {"file": "../../../in/photo.png"}, {"masks": {"cup": "/etc/passwd"}}, {"masks": {"cup": "..png"}},
        {"height": "tall"}, {"more": 1},
    ):  # fmt: skip
        item.write_text(json.dumps({**good, **damage}))
        with pytest.raises(HSNetError, match="damaged"):
            bank.photos()
    item.write_text(json.dumps({**good, "height": 79}))
    with pytest.raises(DataError, match="96 x 80 pixels, its photo 96 x 79"):
        bank.photos()[0].mask("cup")
    item.write_text(json.dumps(good))
    bank.examples("cup", reader)
    (kept,) = photo.folder.glob("features-*")
    kept.write_bytes(kept.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"damaged .* Delete it"):
        bank.examples("cup", reader)
    os.unlink(kept)
    assert bank.examples("cup", reader)[1]


def test_readings_differ_by_what_changes_features(reader):
    reading = reader.reading
    others = [Reading(reading.recipe, 48), Reading(replace(reading.recipe, image_size=96))]
    assert len({reading.digest, *(other.digest for other in others)}) == 3
    assert reading.digest == Reading(replace(reading.recipe, precision="int8")).digest
