"""FSS-1000: class folders, lists, masks of one object."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline.datasets import open_dataset
from pipeline.datasets.fss import fss_index


def add_photo(folder: Path, name: str, mask: np.ndarray, size: tuple[int, int] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    height, width = size or mask.shape
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(folder / f"{name}.jpg")
    Image.fromarray(mask).save(folder / f"{name}.png")


def block(value: int = 255, height: int = 8, width: int = 12) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[2:5, 3:9] = value
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("zeta", "alpha", "mid"):
        for number in range(1, 11):
            add_photo(tmp_path / "FSS-1000" / name, str(number), block())
    (tmp_path / "splits").mkdir()
    for role, classes in (("trn", "zeta"), ("val", "mid"), ("test", "alpha")):
        (tmp_path / "splits" / f"{role}.txt").write_text(f"{classes}\n")
    return tmp_path


def test_lists_and_labels(root):
    dataset = open_dataset("fss", root, root / "splits")
    index = dataset.index
    assert index.folds == (0,)
    assert index.classes == {0: "zeta", 520: "mid", 760: "alpha"}
    test = index.split(0, "test")
    assert [index.images[i] for i, _ in test.entries][:3] == ["alpha/1.jpg", "alpha/10.jpg", "alpha/2.jpg"]
    label = dataset.label(test.entries[0][0])
    assert label.dtype == np.uint16
    np.testing.assert_array_equal(label, block(1).astype(np.uint16) * 761)
    assert dataset.image(0).size == (12, 8)


def test_root_may_be_the_class_folders(root):
    assert len(open_dataset("fss", root / "FSS-1000", root / "splits").index.images) == 30


def test_order_equals_the_published_one(golden):
    """Golden f: the order in which the published loader goes through the test classes."""
    raw = json.loads((golden / "f_episodes_synthetic.json").read_text())
    index = fss_index({"test": sorted(raw["fss_categories_file"])}, lambda n: sorted(f"{i}.jpg" for i in range(1, 11)))
    assert [index.images[i] for i, _ in index.split(0, "test").entries] == raw["fss_order"]
    assert index.split(0, "test").entries[0][1] == raw["fss_test_shot1"][0][2] == 760


def test_lists_by_rule_keep_the_published_proportions(tmp_path):
    for number in range(25):
        add_photo(tmp_path / f"class{number}", "1", block())
    first, again = open_dataset("fss", tmp_path), open_dataset("fss", tmp_path)
    assert [len(first.index.split(0, role).class_ids) for role in ("trn", "val", "test")] == [13, 6, 6]
    assert first.index.digest == again.index.digest
    assert "Classes split by rule, not as published: trn 13, val 6, test 6." in first.index.notes


def test_a_class_with_one_image_is_noted(root):
    for number in range(2, 11):
        (root / "FSS-1000" / "alpha" / f"{number}.jpg").unlink()
    index = open_dataset("fss", root, root / "splits").index
    assert any("alpha (1)" in note for note in index.notes)
    assert index.split(0, "test").classes_below(2) == {760: 1}


def test_a_class_without_images_stays_and_is_noted(root):
    for path in (root / "FSS-1000" / "alpha").iterdir():
        path.unlink()
    add_photo(root / "FSS-1000" / "beta", "1", block())
    (root / "splits" / "test.txt").write_text("alpha\nbeta\n")
    index = open_dataset("fss", root, root / "splits").index
    assert index.split(0, "test").class_ids == (760, 761)
    assert any("alpha (0)" in note for note in index.notes)


@pytest.mark.parametrize("value", [1, 128, 255])
def test_masks_of_another_scale(root, value):
    add_photo(root / "FSS-1000" / "zeta", "1", block(value))
    assert (open_dataset("fss", root, root / "splits").label(0) > 0).sum() == 18


def test_a_scaled_mask_keeps_its_size(root):
    """It goes to network size in one step, as published; over the photo's size other pixels would be picked."""
    add_photo(root / "FSS-1000" / "zeta", "1", block(), size=(16, 24))
    label = open_dataset("fss", root, root / "splits").label(0)
    np.testing.assert_array_equal(label > 0, block() > 0)


def test_a_mask_of_another_shape_is_an_error(root):
    add_photo(root / "FSS-1000" / "zeta", "1", block(), size=(12, 8))
    with pytest.raises(DataError, match=r"1\.png is 12 x 8 .*1\.jpg is 8 x 12"):
        open_dataset("fss", root, root / "splits").label(0)


def test_missing_class_and_mask(root):
    (root / "FSS-1000" / "mid" / "3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 30 masks are missing: .*3\.png"):
        open_dataset("fss", root, root / "splits")
    (root / "splits" / "val.txt").write_text("mid\nghost\n")
    with pytest.raises(DataError, match="lacks 1 of the listed classes: ghost"):
        open_dataset("fss", root, root / "splits")


def test_wrong_root(tmp_path):
    with pytest.raises(DataError, match="not an FSS-1000 tree"):
        open_dataset("fss", tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        open_dataset("fss", tmp_path / "nothing")


def test_options_are_checked(root):
    with pytest.raises(ConfigError, match="no option 'min_object_share'"):
        open_dataset("fss", root, min_object_share=0.1)
    with pytest.raises(ConfigError, match="choose one of pascal, coco, fss, folder, shapes"):
        open_dataset("imagenet", root)


def test_pickles_for_workers(root):
    assert pickle.loads(pickle.dumps(open_dataset("fss", root))).label(0).any()


def test_clothing_crops(shared):
    root = shared / "data" / "clothing-fss"
    dataset = open_dataset("fss", root, root / "splits")
    assert [len(dataset.index.split(0, role).entries) for role in ("trn", "val", "test")] == [260, 60, 90]
    assert dataset.index.notes == ()
    for i in range(0, 410, 20):
        assert dataset.image(i).size == (224, 224)
        assert dataset.label(i).any()
