"""COCO-20i: masks from PNG and from the official JSON, drawing rules, lists, hostile annotations."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from hsnet.errors import ConfigError, DataError
from pipeline.datasets import open_dataset
from pipeline.datasets.instances import InstanceMasks, read_annotations

CATEGORIES = [90, 1, 3, 7, 20]
"""Category ids, not in order and with gaps, as COCO's are: class ids 4, 0, 1, 2, 3."""
HEIGHT, WIDTH = 40, 60


def box(x: int, y: int, width: int, height: int) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def instances(images: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """An instances JSON; objects give category, segmentation and what else they set."""
    annotations = []
    for number, objects in enumerate(images.values(), 1):
        for entry in objects:
            fields = {"id": len(annotations) + 1, "image_id": number, "area": 200.0, "iscrowd": 0}
            annotations.append({**fields, **entry})
    return {
        "images": [
            {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH} for number, name in enumerate(images, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"thing {c}"} for c in CATEGORIES],
    }


def one(category: int, outline: Any, **more: Any) -> dict[str, Any]:
    return {"category_id": category, "segmentation": outline, **more}


def make_tree(root: Path, sides: dict[str, dict[str, list[dict[str, Any]]]]) -> Path:
    (root / "annotations").mkdir(parents=True)
    for side, images in sides.items():
        (root / side).mkdir()
        for name in images:
            Image.new("RGB", (WIDTH, HEIGHT), "grey").save(root / side / name)
        (root / "annotations" / f"instances_{side}.json").write_text(json.dumps(instances(images)))
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    train = {
        "COCO_train2014_000000000001.jpg": [one(1, box(0, 0, 20, 20)), one(90, box(30, 10, 20, 20))],
        "COCO_train2014_000000000002.jpg": [one(3, box(0, 0, 20, 20))],
    }
    val = {
        "COCO_val2014_000000000003.jpg": [one(90, box(0, 0, 20, 20)), one(3, box(30, 10, 20, 20), area=5.0)],
        "COCO_val2014_000000000004.jpg": [one(1, box(0, 0, 20, 20))],
        "COCO_val2014_000000000005.jpg": [],
    }
    return make_tree(tmp_path / "COCO2014", {"train2014": train, "val2014": val})


def label_of(tmp_path: Path, *objects: dict[str, Any]) -> np.ndarray:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(instances({"x.jpg": list(objects)})))
    read_annotations.cache_clear()
    return InstanceMasks(path).label("x.jpg")


def names(dataset, fold: int, role: str) -> list[tuple[str, int]]:
    return [(dataset.index.images[i][-7:-4], c) for i, c in dataset.index.split(fold, role).entries]


# --- drawing ----------------------------------------------------------------------------------------------------


def test_class_ids_follow_the_category_ids(tmp_path):
    label = label_of(tmp_path, one(90, box(0, 0, 10, 10)), one(1, box(20, 0, 10, 10)), one(7, box(40, 0, 10, 10)))
    assert [label[5, x] for x in (5, 25, 45, 58)] == [5, 1, 3, 0]
    assert label.shape == (HEIGHT, WIDTH)
    assert label.dtype == np.uint8


@pytest.mark.parametrize("turn", [1, -1])
def test_smaller_objects_are_drawn_over_larger_ones(tmp_path, turn):
    objects = [one(1, box(0, 0, 30, 30)), one(3, box(10, 10, 5, 5)), one(7, box(5, 5, 20, 20))]
    label = label_of(tmp_path, *objects[::turn])
    assert (label[12, 12], label[7, 7], label[2, 2]) == (2, 3, 1)


def test_crowds_lie_below_everything(tmp_path):
    crowd = coco_mask.encode(np.asfortranarray(np.pad(np.ones((10, 10), np.uint8), ((5, 25), (5, 45)))))
    outline = {"size": crowd["size"], "counts": crowd["counts"].decode()}
    label = label_of(tmp_path, one(3, outline, iscrowd=1), one(1, box(0, 0, 30, 30)))
    assert label[7, 7] == 1
    label = label_of(tmp_path, one(3, outline, iscrowd=1))
    assert label[7, 7] == 2
    assert (label > 0).sum() == 100


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_equal_pycocotools(tmp_path, seed):
    random = np.random.RandomState(seed)
    wanted = (random.random_sample((HEIGHT, WIDTH)) < (0.5, 0.02, 0.98, 0, 1)[seed]).astype(np.uint8)
    packed = coco_mask.encode(np.asfortranarray(wanted))
    label = label_of(tmp_path, one(1, {"size": packed["size"], "counts": packed["counts"].decode()}))
    np.testing.assert_array_equal(label, wanted)
    flat = wanted.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.r_[0, edges, flat.size]).tolist()
    runs = [0, *runs] if flat[0] else runs  # the first run is background and may be empty
    label = label_of(tmp_path, one(1, {"size": [HEIGHT, WIDTH], "counts": runs}))
    np.testing.assert_array_equal(label, wanted)


def test_polygons_of_several_parts_and_degenerate_ones(tmp_path):
    parts = box(0, 0, 10, 10) + box(20, 0, 10, 10) + [[1, 1, 50, 30], []]
    label = label_of(tmp_path, one(1, parts))
    assert (label > 0).sum() == 200  # the four numbers are no box, which pycocotools would draw


# --- trees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", [0, 1])
def test_lists_from_json(tree, up):
    dataset = open_dataset("coco", tree if up == 0 else tree.parent)
    index = dataset.index
    assert index.folds == (0, 1, 2, 3)
    assert index.classes == {0: "thing 1", 1: "thing 3", 2: "thing 7", 3: "thing 20", 4: "thing 90"}
    assert names(dataset, 0, "test") == [("004", 0), ("003", 4)]
    assert names(dataset, 0, "trn") == [("002", 1)]
    assert names(dataset, 1, "trn") == [("001", 0), ("001", 4)]
    assert names(dataset, 1, "test") == []  # its object is smaller than 0.5 % by its area field
    assert index.images[0] == "train2014/COCO_train2014_000000000001.jpg"
    assert index.query_order == "class"
    number = index.images.index("val2014/COCO_val2014_000000000003.jpg")
    assert sorted(np.unique(dataset.label(number))) == [0, 2, 5]
    assert dataset.image(number).size == (WIDTH, HEIGHT)


def test_crowds_do_not_list_an_image(tmp_path):
    images = {"COCO_train2014_000000000001.jpg": [one(1, box(0, 0, 20, 20), iscrowd=1), one(3, box(30, 0, 20, 20))]}
    dataset = open_dataset("coco", make_tree(tmp_path / "x", {"train2014": images}))
    assert [c for _, c in dataset.index.split(2, "trn").entries] == [1]


def save_png(tree: Path, name: str, label: np.ndarray) -> None:
    path = tree / "annotations" / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(label).save(path)


def test_png_masks_come_first(tree):
    for name in ("train2014/COCO_train2014_000000000001", "val2014/COCO_val2014_000000000004"):
        label = np.zeros((HEIGHT, WIDTH), np.uint8)
        label[:20, :20] = 80
        label[-1] = 255
        save_png(tree, f"{name}.png", label)
    dataset = open_dataset("coco", tree)
    assert len(dataset.index.classes) == 80
    assert dataset.index.classes[79] == "toothbrush"
    assert names(dataset, 3, "test") == [("004", 79)]
    assert names(dataset, 0, "trn") == [("001", 79)]
    assert sorted(np.unique(dataset.label(0))) == [0, 80]  # 255 is background, as published
    assert not open_dataset("coco", tree, masks="json").index.classes.keys() - range(5)


def test_published_lists(tree, tmp_path):
    lists = {c: [] for c in range(5)}
    lists[0] = ["val2014/COCO_val2014_000000000004.jpg", "val2014/COCO_val2014_000000000003.jpg"]
    (tmp_path / "splits" / "val").mkdir(parents=True)
    (tmp_path / "splits" / "val" / "fold0.pkl").write_bytes(pickle.dumps(lists))
    dataset = open_dataset("coco", tree, tmp_path / "splits")
    assert names(dataset, 0, "test") == [("004", 0), ("003", 0)]
    lists[4] = ["val2014/COCO_val2014_000000000099.jpg"]
    (tmp_path / "splits" / "val" / "fold0.pkl").write_bytes(pickle.dumps(lists))
    with pytest.raises(DataError, match=r"1 of 3 photos are missing: .*000099\.jpg"):
        open_dataset("coco", tree, tmp_path / "splits")


def test_pickle_holds_no_annotations(tree):
    dataset = open_dataset("coco", tree)
    data = pickle.dumps(dataset)
    assert b"segmentation" not in data
    assert len(data) < 5000
    read_annotations.cache_clear()
    assert pickle.loads(data).label(0).any()


# --- what may be wrong ------------------------------------------------------------------------------------------


def test_wrong_roots_and_options(tree, tmp_path):
    with pytest.raises(DataError, match="not a COCO tree"):
        open_dataset("coco", tmp_path / "annotations")
    with pytest.raises(ConfigError, match="auto, png or json"):
        open_dataset("coco", tree, masks="gif")
    with pytest.raises(DataError, match="hsnet prepare coco"):
        open_dataset("coco", tree, masks="png")
    for path in (tree / "annotations").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="No masks in"):
        open_dataset("coco", tree)


def test_photo_of_another_size_than_annotated(tree):
    Image.new("RGB", (30, 30)).save(tree / "train2014" / "COCO_train2014_000000000001.jpg")
    with pytest.raises(DataError, match=r"instances_train2014\.json is 60 x 40 .*000001\.jpg is 30 x 30"):
        open_dataset("coco", tree).label(0)


def test_sides_with_different_categories(tree):
    path = tree / "annotations" / "instances_val2014.json"
    raw = json.loads(path.read_text())
    raw["categories"][0]["name"] = "other"
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="different categories"):
        open_dataset("coco", tree)


RUNS = {"size": [HEIGHT, WIDTH]}


@pytest.mark.parametrize(
    "outline",
    [
        [[0, 0, 10, 0, float("nan"), 10]],
        [[0, 0, 10, 0, 1e9, 10]],
        [[0, 0, 10, 0, 10]],
        [["a", "b"]],
        [5],
        [[[0, 0], [1, 1]]],
        None,
        "text",
        {**RUNS, "counts": [HEIGHT * WIDTH + 1]},
        {**RUNS, "counts": [10]},
        {**RUNS, "counts": [-10, HEIGHT * WIDTH + 10]},
        {**RUNS, "counts": [0.5]},
        {**RUNS, "counts": []},
        {**RUNS, "counts": "0000"},
        {**RUNS, "counts": "oooooooooooooooooooooo"},
        {**RUNS, "counts": "o"},
        {**RUNS, "counts": "é"},
        {**RUNS, "counts": "\n"},
        {"size": [10**6, 10**6], "counts": [10**12]},
        {"counts": [HEIGHT * WIDTH]},
    ],
)
def test_broken_outlines_are_data_errors(tmp_path, outline):
    with pytest.raises(DataError, match=r"x\.json is not a COCO instances file"):
        label_of(tmp_path, one(1, outline))


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("images"),
        lambda raw: raw.update(categories=[]),
        lambda raw: raw.update(categories=raw["categories"] * 2),
        lambda raw: raw.update(images=3),
        lambda raw: raw["images"][0].update(file_name="../../x.jpg"),
        lambda raw: raw["images"][0].update(height=10**9),
        lambda raw: raw["images"][0].update(height=-40, width=-60),
        lambda raw: raw["images"][0].update(height="40"),
        lambda raw: raw["images"].append(raw["images"][0]),
        lambda raw: raw["annotations"][0].update(image_id=99),
        lambda raw: raw["annotations"][0].update(category_id=2),
        lambda raw: raw["annotations"][0].update(category_id=[1]),
        lambda raw: raw["annotations"][0].update(area="big"),
        lambda raw: raw["annotations"][0].update(area=-1),
    ],
)
def test_broken_annotations_are_data_errors(tmp_path, change):
    raw = instances({"x.jpg": [one(1, box(0, 0, 5, 5))]})
    change(raw)
    (tmp_path / "y.json").write_text(json.dumps(raw))
    read_annotations.cache_clear()
    with pytest.raises(DataError, match=r"y\.json is not a COCO instances file"):
        InstanceMasks(tmp_path / "y.json").label("x.jpg")


def test_missing_and_unlisted(tmp_path):
    with pytest.raises(DataError, match=r"none\.json is missing"):
        InstanceMasks(tmp_path / "none.json").label("x.jpg")
    label_of(tmp_path)
    with pytest.raises(DataError, match=r"x\.json has no image y\.jpg"):
        InstanceMasks(tmp_path / "x.json").label("y.jpg")
