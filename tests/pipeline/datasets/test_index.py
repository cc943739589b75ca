"""The index: lists of folds, digest, JSON both ways, hostile JSON."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.index import DatasetIndex, Split, small_class_notes


def make(**changes) -> DatasetIndex:
    fields = {
        "name": "folder",
        "classes": {0: "cat", 1: "dog", 2: "ünïcode"},
        "images": ("a/1.jpg", "a/2.jpg", "b/1.jpg"),
        "splits": {
            0: {
                "trn": Split(((1, 1), (0, 1), (2, 2))),
                "val": Split(),
                "test": Split(((0, 0), (2, 0)), declared=(0,)),
            }
        },
        "notes": ("no validation list",),
    }
    return DatasetIndex(**{**fields, **changes})


def test_split_groups_by_class_in_list_order():
    split = Split(((5, 1), (3, 0), (4, 1)), declared=(7,))
    assert split.class_ids == (0, 1, 7)
    assert split.by_class == {0: (3,), 1: (5, 4), 7: ()}


def test_classes_below_counts_different_images():
    split = Split(((5, 1), (5, 1), (3, 0), (4, 0)), declared=(7,))
    assert split.classes_below(2) == {1: 1, 7: 0}


def test_notes_name_classes_that_cannot_make_an_episode():
    (note,) = small_class_notes(make().splits, make().classes)
    assert "Fold 0, 'trn'" in note
    assert "ünïcode (1)" in note
    assert "dog" not in note


def test_missing_fold_and_role_are_named():
    with pytest.raises(ConfigError, match="no fold 4; folds here: 0"):
        make().split(4, "trn")
    with pytest.raises(ConfigError, match="trn, val, test"):
        make().split(0, "train")


def test_missing_role_is_an_empty_list():
    assert make(splits={2: {}}).split(2, "trn") == Split()


@pytest.mark.parametrize(("largest", "dtype", "ignore"), [(253, "uint8", 255), (254, "uint16", 65535)])
def test_label_dtype_leaves_room_for_the_ignore_label(largest, dtype, ignore):
    # Mask value of class 254 would be 255, which is the ignore label of uint8.
    index = make(classes={0: "cat", 1: "dog", 2: "x", largest: "last"})
    assert index.label_dtype == np.dtype(dtype)
    assert index.ignore_label == ignore


def test_json_gives_the_same_index_back():
    index = make()
    again = DatasetIndex.from_json(index.to_json())
    assert again == index
    assert again.notes == index.notes
    assert again.digest == index.digest
    assert again.to_json() == index.to_json()


def large_index() -> DatasetIndex:
    names = (*(f"{i % 7}/photo ü {i}.jpg" for i in range(1000)), "a:b/\udcff.jpg", "..x/y..z", "./1.jpg")
    splits = {
        fold: {role: Split(tuple((i * 7 % 1003, (i + fold) % 3) for i in range(500)), (2,)) for role in ("trn", "test")}
        for fold in (0, 10, 2)
    }
    return DatasetIndex("folder", {0: "cat", 11: "x", 1: "dog", 2: "ü"}, names, splits, notes=("a note",))


@pytest.mark.parametrize("index", [make(), large_index()], ids=["small", "large"])
def test_columns_give_the_same_index_back(index):
    again = DatasetIndex.from_columns(index.to_columns())
    assert (again == index, index == again) == (True, True)
    assert not isinstance(again.images, tuple)
    assert (again.notes, again.digest, again.content_digest()) == (index.notes, index.digest, index.digest)
    assert again.to_json() == index.to_json()
    assert list(again.classes) == list(DatasetIndex.from_json(index.to_json()).classes)
    assert again.to_columns().tobytes() == index.to_columns().tobytes()
    assert [again.images[i] for i in (0, -1)] == [index.images[i] for i in (0, -1)]
    assert again.images[1:3] == index.images[1:3]
    for fold in index.folds:
        for role in ("trn", "val", "test"):
            one, other = index.split(fold, role), again.split(fold, role)
            assert (one.class_ids, one.by_class) == (other.class_ids, other.by_class)
            assert list(one.by_class) == list(other.by_class)
            assert (list(one.entries), one.entries[:2]) == (list(other.entries), other.entries[:2])
            assert all(type(number) is int for entry in other.entries for number in entry)
    copy = pickle.loads(pickle.dumps(again))
    assert (copy, copy.digest) == (index, index.digest)
    assert again != make(images=("x", "y", "z"))
    with pytest.raises(IndexError):
        again.images[len(index.images)]


def test_index_pickles_with_its_cached_values():
    index = make()
    digest = index.digest
    assert pickle.loads(pickle.dumps(index)).digest == digest


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "pascal"},
        {"classes": {0: "cat", 1: "dog", 2: "unicode"}},
        {"images": ("a/1.jpg", "a/3.jpg", "b/1.jpg")},
        {"query_order": "class"},
        {"has_ignore": True},
        {"splits": {0: {"trn": Split(((0, 1), (1, 1), (2, 2)))}}},
        {"splits": {1: make().splits[0]}},
    ],
)
def test_every_field_changes_the_digest(changes):
    assert make(**changes).digest != make().digest


def test_notes_do_not_change_the_digest():
    assert make(notes=()).digest == make().digest


def test_digest_does_not_depend_on_the_order_of_dictionaries():
    index = make()
    turned = make(classes=dict(reversed(index.classes.items())))
    assert turned.digest == index.digest


@pytest.mark.parametrize(
    "bad", ["/etc/passwd", "../x.jpg", "a/../../x", "C:/x.jpg", "a\\b.jpg", "a\0.jpg", "", ".", "a\nb"]
)
def test_image_ids_stay_inside_the_root(bad):
    with pytest.raises(DataError, match="cannot be an image id"):
        make(images=("a/1.jpg", "a/2.jpg", bad))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"images": ("a", "a", "b")}, "twice"),
        ({"classes": {}, "splits": {}}, "no classes"),
        ({"classes": {65534: "x"}, "splits": {}}, "65533"),
        ({"splits": {0: {"trn": Split(((3, 0),))}}}, "image number 3, but there are 3"),
        ({"splits": {0: {"trn": Split(((-1, 0),))}}}, "image number -1"),
        ({"splits": {0: {"trn": Split(((0, 9),))}}}, "class 9"),
        ({"splits": {0: {"trn": Split((), declared=(9,))}}}, "declared class 9"),
        ({"splits": {0: {"training": Split()}}}, "no split 'training'"),
        ({"splits": {-1: {}}}, "Fold -1"),
        ({"query_order": "random"}, "query_order"),
    ],
)
def test_contradictions_are_found(changes, text):
    with pytest.raises(DataError, match=text):
        make(**changes)


def _edit(path: list, value: object) -> str:
    raw = json.loads(make().to_json())
    at = raw
    for key in path[:-1]:
        at = at[key]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], 2),
        (["format"], KeyError),
        (["surprise"], 1),
        (["name"], 3),
        (["classes"], []),
        (["classes", "01"], "again"),
        (["classes", "-1"], "x"),
        (["classes", "9" * 5000], "x"),
        (["classes", "²"], "x"),
        (["classes", "0"], None),
        (["images"], "abc"),
        (["images", 0], "../up.jpg"),
        (["images", 0], 1),
        (["query_order"], ["list"]),
        (["has_ignore"], 1),
        (["splits"], None),
        (["splits", "0"], []),
        (["splits", "0", "trn"], []),
        (["splits", "0", "trn", "images"], [0]),
        (["splits", "0", "trn", "images", 0], 99),
        (["splits", "0", "trn", "images", 0], True),
        (["splits", "0", "trn", "images", 0], 1.0),
        (["splits", "0", "trn", "classes", 0], "1"),
        (["splits", "0", "trn", "declared"], [77]),
        (["notes"], [1]),
    ],
)
def test_hostile_json_is_a_data_error(path, value):
    with pytest.raises(DataError):
        DatasetIndex.from_json(_edit(path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 1' + "0" * 5000 + "}", "NaN"])
def test_broken_json_is_a_data_error(text):
    with pytest.raises(DataError):
        DatasetIndex.from_json(text)
