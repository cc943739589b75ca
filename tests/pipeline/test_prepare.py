"""Masks from official sources: small VOC, SBD and COCO trees with the real file formats."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline import prepare
from pipeline.datasets import open_dataset
from pipeline.datasets.images import read_index_mask
from pipeline.prepare import prepare_coco, prepare_voc, read_sbd_mask

SIZE = (12, 16)


def mask(*values: int) -> np.ndarray:
    label = np.zeros(SIZE, np.uint8)
    for row, value in enumerate(values):
        label[row, :10] = value
    return label


def save_mat(path: Path, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {"Segmentation": label, "CategoriesPresent": np.unique(label)[1:], "Boundaries": np.zeros((20, 1), object)}
    scipy.io.savemat(path, {"GTcls": fields}, do_compression=True)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """VOC with masks for a (training), v, w (test); SBD with masks for a, b, c, v."""
    voc, sbd = tmp_path / "VOCdevkit" / "VOC2012", tmp_path / "benchmark_RELEASE"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for name in "abcvw":
        Image.new("RGB", SIZE[::-1]).save(voc / "JPEGImages" / f"{name}.jpg")
    for name, label in (("a", mask(1, 255)), ("v", mask(2, 255)), ("w", mask(2, 255))):
        image = Image.fromarray(label)
        image.putpalette(prepare._palette())
        image.save(voc / "SegmentationClass" / f"{name}.png")
    (voc / "ImageSets/Segmentation/val.txt").write_text("v\nw\n")
    for name, label in (("a", mask(3)), ("b", mask(6, 7)), ("c", mask(8)), ("v", mask(9))):
        save_mat(sbd / "dataset" / "cls" / f"{name}.mat", label)
    return voc, sbd


# --- VOC and SBD ------------------------------------------------------------------------------------------------


def test_voc_masks_win_over_sbd_and_the_lists_follow(sources, caplog):
    voc, sbd = sources
    events: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING):
        summary = prepare_voc(voc.parent, sbd, on_event=lambda *done: events.append(done))
    made = {path.stem: read_index_mask(path) for path in summary.masks.iterdir()}
    assert summary.masks == voc / "SegmentationClassAug"
    for name, label in {"a": mask(1, 255), "v": mask(2, 255), "w": mask(2, 255), "b": mask(6, 7), "c": mask(8)}.items():
        np.testing.assert_array_equal(made.pop(name), label)
    assert not made
    assert (voc / "ImageSets/Segmentation/trainaug.txt").read_text() == "a\nb\nc\n"
    assert summary.counts == {"train_aug": (3, 10582), "val": (2, 1449)}
    assert (summary.written, summary.kept) == (5, 0)
    assert "train_aug 3 instead of 10,582, val 2 instead of 1,449" in summary.notes[0]
    assert "train_aug 3" in caplog.text
    assert events[-1] == (5, 5)
    index = open_dataset("pascal", voc).index
    assert {index.images[i] for i, _ in index.split(0, "trn").entries} == {"b", "c"}


def test_counts_can_be_required_and_then_nothing_is_written(sources):
    voc, sbd = sources
    with pytest.raises(DataError, match=r"train_aug 3 instead of 10,582.*Nothing was written"):
        prepare_voc(voc, sbd, counts="fail")
    assert not (voc / "SegmentationClassAug").exists()
    with pytest.raises(ConfigError, match="warn, fail"):
        prepare_voc(voc, sbd, counts="maybe")


def test_right_counts_pass(sources, monkeypatch):
    monkeypatch.setattr(prepare, "VOC_TRAIN_AUG", 3)
    monkeypatch.setattr(prepare, "VOC_VAL", 2)
    assert prepare_voc(*sources, counts="fail").notes == ()


def test_another_tree_can_be_read(sources, tmp_path):
    voc, sbd = sources
    prepare_voc(voc, sbd / "dataset", tmp_path / "new")
    assert not (voc / "SegmentationClassAug").exists()
    dataset = open_dataset("pascal", tmp_path / "new")
    assert dataset.image(0).size == SIZE[::-1]
    assert dataset.index.split(0, "test").by_class[1] == tuple(dataset.index.images.index(name) for name in "vw")


def test_masks_are_shown_in_voc_colours(sources):
    summary = prepare_voc(*sources)
    with Image.open(summary.masks / "c.png") as image:
        assert image.mode == "P"
        assert image.convert("RGB").getpixel((0, 0)) == (64, 0, 0)  # cat
    with Image.open(summary.masks / "v.png") as image:
        assert image.convert("RGB").getpixel((0, 1)) == (224, 224, 192)  # boundary


def test_an_interrupted_run_is_finished(sources, monkeypatch):
    voc, sbd = sources
    real, calls = prepare.read_sbd_mask, []

    def fails_on_second(path: Path) -> np.ndarray:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(prepare, "read_sbd_mask", fails_on_second)
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        prepare_voc(voc, sbd)
    there = sorted(path.name for path in (voc / "SegmentationClassAug").iterdir())
    assert 1 <= len(there) < 5
    assert all(name.endswith(".png") for name in there)
    assert not (voc / "ImageSets/Segmentation/trainaug.txt").exists()
    monkeypatch.setattr(prepare, "read_sbd_mask", real)
    summary = prepare_voc(voc, sbd)
    assert (summary.written, summary.kept) == (5 - len(there), len(there))
    again = prepare_voc(voc, sbd)
    assert (again.written, again.kept) == (0, 5)


def test_a_write_that_fails_leaves_no_half_mask(sources, monkeypatch):
    voc, sbd = sources

    def full(self, path, *rest):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match=r"No space left on device.*run again"):
        prepare_voc(voc, sbd)
    assert list((voc / "SegmentationClassAug").iterdir()) == []


def test_masks_without_photos_are_noted(sources):
    voc, sbd = sources
    save_mat(sbd / "dataset" / "cls" / "zz.mat", mask(1))
    summary = prepare_voc(voc, sbd)
    assert any("1 masks have no photo" in note and "zz" in note for note in summary.notes)


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda voc, sbd: (voc / "JPEGImages").rename(voc / "x"), "does not hold JPEGImages"),
        (lambda voc, sbd: (sbd / "dataset").rename(sbd / "x"), "does not hold cls"),
        (lambda voc, sbd: (voc / "SegmentationClass" / "v.png").unlink(), r"1 of 2 masks of val\.txt are missing"),
        (lambda voc, sbd: (voc / "ImageSets/Segmentation/val.txt").unlink(), r"val\.txt cannot be read"),
        (lambda voc, sbd: save_mat(sbd / "dataset/cls/b.mat", mask(6)[:5]), r"b\.mat is 16 x 5 .*b\.jpg is 16 x 12"),
        (lambda voc, sbd: save_mat(sbd / "dataset/cls/b.mat", mask(21)), r"b\.mat: mask values without a class: 21"),
        (lambda voc, sbd: save_mat(sbd / "dataset/cls/b.mat", mask(255)), r"b\.mat: mask values without a class: 255"),
        (lambda voc, sbd: (sbd / "dataset/cls/b.mat").write_bytes(b"no"), r"b\.mat cannot be read as a \.mat"),
    ],
)
def test_broken_sources_are_named(sources, break_it, match):
    break_it(*sources)
    with pytest.raises(DataError, match=match):
        prepare_voc(*sources)


@pytest.mark.parametrize(
    "content", [{"other": 1}, {"GTcls": 3}, {"GTcls": {"x": 1}}, {"GTcls": {"Segmentation": np.ones((3, 3))}}]
)
def test_other_mat_files_are_data_errors(tmp_path, content):
    scipy.io.savemat(tmp_path / "x.mat", content)
    with pytest.raises(DataError, match=r"x\.mat"):
        read_sbd_mask(tmp_path / "x.mat")
    with pytest.raises(DataError, match=r"gone\.mat is missing"):
        read_sbd_mask(tmp_path / "gone.mat")


def test_truncated_mat_file(tmp_path):
    save_mat(tmp_path / "x.mat", np.random.RandomState(0).randint(0, 20, (50, 50)).astype(np.uint8))
    data = (tmp_path / "x.mat").read_bytes()
    for share in (0.2, 0.5, 0.9):
        (tmp_path / "x.mat").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match=r"x\.mat"):
            read_sbd_mask(tmp_path / "x.mat")


# --- COCO -------------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    raw = {
        "images": [
            {"id": n, "file_name": f"COCO_val2014_{n:012}.jpg", "height": SIZE[0], "width": SIZE[1]} for n in (1, 2)
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 5, "area": 20, "segmentation": [[0, 0, 10, 0, 10, 2, 0, 2]]}
        ],
        "categories": [{"id": 5, "name": "cup"}, {"id": 2, "name": "fork"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps(raw))
    (tmp_path / "val2014").mkdir()
    for image in raw["images"]:
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "val2014" / image["file_name"])
    return tmp_path


def run_coco(root: Path, **options) -> prepare.PrepareSummary:
    json_file = root / "annotations" / "instances_val2014.json"
    return prepare_coco(json_file, root / "val2014", root / "annotations" / "val2014", **options)


def test_coco_masks(coco):
    summary = run_coco(coco)
    np.testing.assert_array_equal(read_index_mask(summary.masks / "COCO_val2014_000000000001.png"), mask(2, 2))
    assert not read_index_mask(summary.masks / "COCO_val2014_000000000002.png").any()
    assert summary.counts == {"images": (2, 40504), "categories": (2, 80)}
    assert "images 2 instead of 40,504" in summary.notes[0]
    assert (run_coco(coco).written, run_coco(coco).kept) == (0, 2)
    png, drawn = open_dataset("coco", coco), open_dataset("coco", coco, masks="json")
    assert png.index.split(1, "test").entries == drawn.index.split(1, "test").entries == ((0, 1),)
    np.testing.assert_array_equal(png.label(0), drawn.label(0))


def test_coco_counts_can_be_required(coco):
    with pytest.raises(DataError, match=r"Nothing was written"):
        run_coco(coco, counts="fail")
    assert not (coco / "annotations" / "val2014").exists()


def test_other_annotations_have_no_counts_to_meet(coco):
    path = coco / "annotations" / "mine.json"
    (coco / "annotations" / "instances_val2014.json").rename(path)
    summary = prepare_coco(path, coco / "val2014", coco / "out", counts="fail")
    assert summary.counts == {}
    assert summary.notes == ()


def test_coco_photo_missing_or_of_another_size(coco):
    Image.new("RGB", (9, 9)).save(coco / "val2014" / "COCO_val2014_000000000002.jpg")
    with pytest.raises(DataError, match=r"000002\.jpg is 9 x 9"):
        run_coco(coco)
    (coco / "val2014" / "COCO_val2014_000000000002.jpg").unlink()
    with pytest.raises(DataError, match="1 of 2 photos are missing"):
        run_coco(coco)
