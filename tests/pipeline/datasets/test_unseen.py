"""Classes that a head has not seen: names that mean one thing, and what is left to test."""

import pytest

from hsnet.errors import ConfigError
from pipeline.datasets.coco import COCO_CLASSES
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.datasets.pascal import VOC_CLASSES
from pipeline.datasets.unseen import canonical_name, training_index, unseen_classes


def test_names_of_pascal_and_coco_are_matched():
    for pascal, coco in (
        ("aeroplane", "airplane"),
        ("motorbike", "motorcycle"),
        ("sofa", "couch"),
        ("tvmonitor", "tv"),
        ("diningtable", "dining table"),
        ("pottedplant", "potted plant"),
    ):
        assert canonical_name(pascal) == canonical_name(coco)
    assert canonical_name("cow") != canonical_name("dog")


def test_only_unseen_classes_are_tested(tiny_source):
    index = tiny_source.index
    names = list(index.classes.values())
    found = unseen_classes(index, [names[0].upper(), "zebra"], fold=3)
    assert names[0] in found.left_out
    assert names[0] not in found.tested
    split = found.index.split(3, "test")
    assert split.entries, "photos of every fold's test list"
    assert {index.classes[c] for c in split.class_ids} == set(found.tested)
    listed = {entry for fold in index.folds for entry in index.split(fold, "test").entries}
    assert set(split.entries) == {entry for entry in listed if index.classes[entry[1]] != names[0]}
    assert found.index.digest != index.digest
    assert unseen_classes(index, [names[0]], 3).index.digest == found.index.digest
    with pytest.raises(ConfigError, match=r"No class of .* is new to this head"):
        unseen_classes(index, names)


def test_a_new_class_that_no_fold_holds_out_is_tested_too():
    """As with `folds: [[door]]` in dataset.yaml: all other classes are in the training and validation lists alone."""
    names = ("door", "window", "car", "roof", "sky", "lamp")
    split = {
        "test": Split(((0, 0), (1, 0)), (0,)),
        "val": Split(((0, 1), (1, 1), (0, 2), (1, 4)), (1, 2, 3, 4, 5)),
        "trn": Split(((2, 1), (3, 2), (4, 2), (5, 3), (2, 4), (3, 4)), (1, 2, 3, 4, 5)),
    }
    index = DatasetIndex("folder", dict(enumerate(names)), tuple("abcdef"), {0: split})
    found = unseen_classes(index, ["sky"])
    assert found.tested == ("door", "window", "car")
    assert found.left_out == ("sky",)
    assert found.elsewhere == {"val": ("window",), "trn": ("car",)}
    assert found.too_few == {"roof": 1, "lamp": 0}
    assert found.index.split(0, "test").entries == ((0, 0), (1, 0), (0, 1), (1, 1), (3, 2), (4, 2))
    assert unseen_classes(index, ["window", "car", "sky"]).index.split(0, "test").entries == ((0, 0), (1, 0))
    with pytest.raises(ConfigError, match="was trained on 4; the others cannot be tested") as caught:
        unseen_classes(index, ["window", "car", "sky", "door"])
    assert "roof (1), lamp (0)" in str(caught.value)
    with pytest.raises(ConfigError, match="it was trained on all 6"):
        unseen_classes(index, names)
    assert training_index(index, ["Sky", "roof"], 2).split(2, "trn").entries == ((1, 4), (2, 4), (3, 4))


def test_every_pascal_class_is_new_to_exactly_one_coco_fold():
    """The paper's Table 4: a head of COCO fold i is tested on PASCAL's classes among the twenty it held out."""
    tests = {fold: {"test": Split(tuple((c, c) for c in range(5 * fold, 5 * fold + 5)))} for fold in range(4)}
    pascal = DatasetIndex("pascal", dict(enumerate(VOC_CLASSES)), tuple(map(str, range(20))), tests)
    found = []
    for fold in range(4):
        trained = [name for number, name in enumerate(COCO_CLASSES) if number % 4 != fold]
        transfer = unseen_classes(pascal, trained, fold)
        assert set(transfer.tested).isdisjoint(transfer.left_out)
        assert len(transfer.tested) + len(transfer.left_out) == 20
        found.append(transfer.tested)
    assert sorted(name for names in found for name in names) == sorted(VOC_CLASSES)
    assert "person" in found[0], "class 0 of COCO, held out by its fold 0"
    assert "tv monitor" in found[2], "COCO's tv, class 62"
