"""`hsnet bank` and `hsnet predict` on it: from photos with masks to a folder of masks, by the command line alone."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import invoke, machine, printed
from PIL import Image
from pycocotools import mask as rle

from commands import bank, predict
from pipeline.annotations.read import KINDS
from pipeline.annotations.write import FORMATS
from pipeline.bank.heads import HEADS
from pipeline.datasets.shapes import Shapes
from pipeline.predict.model import AUTO

ROOT = Path(__file__).parents[2]
SIZE = ("--image-size", "64")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with photos and masks, and two photos of each class without."""
    folder, data = tmp_path_factory.mktemp("photos"), Shapes(size=80)
    (folder / "new").mkdir()
    for name, class_id in (("cup ä", 0), ("lid", 1)):
        role = "test" if data.index.split(0, "test").by_class.get(class_id) else "trn"
        (folder / "own" / name).mkdir(parents=True)
        for number, image in enumerate(data.index.split(0, role).by_class[class_id][:6]):
            place = folder / ("own" if number < 4 else "new")
            stem = place / name / f"{name} {number}" if number < 4 else place / f"{name} {number}"
            data.image(image).save(stem.with_suffix(".jpg"), quality=95)
            if number < 4:
                Image.fromarray((data.label(image) == class_id + 1).astype(np.uint8) * 255).save(
                    stem.with_suffix(".png")
                )
    return folder


@pytest.fixture(scope="module")
def own(photos: Path) -> Path:
    path = photos / "own.bank"
    machine("bank", "new", path, *SIZE)
    machine("bank", "add", path, photos / "own", "--complete")
    return path


def test_words_of_the_commands_are_those_of_the_stages() -> None:
    assert ("auto", *KINDS) == bank.KINDS
    assert set(predict.FORMATS) == {*FORMATS, "overlay", "soft"}
    assert set(predict.PHOTO_HEADS) == {AUTO, *HEADS} - {"tune on hsnet"}


def test_a_bank_says_what_it_holds(photos: Path, own: Path) -> None:
    shown = machine("bank", "show", own)
    assert shown["classes"] == ["cup ä", "lid"]
    assert len(shown["photos"]) == 8
    assert all(len(one["network_pixels"]) == 1 for one in shown["photos"])
    text = printed("bank", "show", own)
    assert "cup ä 0.jpg" in text
    again = machine("bank", "add", own, photos / "own", "--complete")
    assert (again["photos"], again["new"], again["changed"]) == (8, 0, 4), "now the cups are known to show no lid"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools reading run lengths
def test_several_classes_in_one_pass(photos: Path, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    formats = "masks,overlay,soft,coco,csv,yolo,labelme,labelstudio,cvat,geojson"
    done = machine("predict", "--bank", own, "--query", photos / "new", "--out", out, "--format", formats)
    assert (done["photos"], done["unusable"], done["shots"]) == (4, 0, 8)
    assert set(done["heads"]) == {"cup ä", "lid"}
    assert all(check["scores"] for check in done["expected"])
    with Image.open(out / "cup ä 4_mask.png") as picture:
        assert picture.mode == "P"
        numbers = np.array(picture)
    assert set(np.unique(numbers)) <= {0, 1, 2}
    coco = json.loads((out / "coco.json").read_text())
    drawn = np.zeros(numbers.shape, bool)
    (image,) = (one["id"] for one in coco["images"] if one["file_name"] == "cup ä 4.jpg")
    (kind,) = (one["id"] for one in coco["categories"] if one["name"] == "cup ä")
    for one in coco["annotations"]:
        if (one["image_id"], one["category_id"]) == (image, kind):
            drawn |= rle.decode(one["segmentation"]).astype(bool)
    assert (drawn != (numbers == 1)).sum() <= 12, "all but specks of fewer than 4 pixels"
    with (out / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    (row,) = (row for row in rows if (row["photo"], row["class"]) == ("cup ä 4.jpg", "cup ä"))
    assert int(row["pixels"]) == (numbers == 1).sum()
    assert {path.name for path in out.glob("cup ä 4*")} == {
        "cup ä 4_mask.png", "cup ä 4_overlay.jpg", "cup ä 4_cup ä_soft.png", "cup ä 4_lid_soft.png",
    }  # fmt: skip
    before = {path: path.stat().st_ino for path in out.glob("*_mask.png")}
    again = machine("predict", "--bank", own, "--query", photos / "new", "--out", out, "--format", formats)
    assert again["kept"] == 4
    assert {path: path.stat().st_ino for path in out.glob("*_mask.png")} == before
    assert json.loads((out / "coco.json").read_text())["annotations"] == coco["annotations"], "kept photos are in it"


def test_overlapping_classes_have_a_mask_each(photos: Path, own: Path, tmp_path: Path) -> None:
    ask = ("predict", "--bank", own, "--query", photos / "new", "--no-overlay", "--head", "contrast")
    machine(*ask, "--out", tmp_path, "--overlapping")
    assert {path.name for path in tmp_path.glob("lid 5*")} == {"lid 5_cup ä_mask.png", "lid 5_lid_mask.png"}
    assert machine(*ask, "--out", tmp_path, "--overlapping")["kept"] == 4


def test_one_class_by_pairs_is_that_of_a_bank(photos: Path, own: Path, tmp_path: Path) -> None:
    pairs = [
        word
        for number in range(4)
        for stem in [photos / "own" / "lid" / f"lid {number}"]
        for word in ("--support", f"{stem}.jpg:{stem}.png")
    ]
    rest = ("--query", photos / "new", "--head", "contrast", "--no-overlay", *SIZE)
    machine("predict", *pairs, *rest, "--out", tmp_path / "pairs")
    path = tmp_path / "lid.bank"
    machine("bank", "new", path, *SIZE)
    machine("bank", "add", path, *pairs[1::2], "--class", "lid")
    machine("predict", "--bank", path, *rest, "--out", tmp_path / "bank")
    for name in ("cup ä 4_mask.png", "lid 4_mask.png", "lid 5_mask.png"):
        one, other = (np.asarray(Image.open(tmp_path / folder / name)) > 0 for folder in ("pairs", "bank"))
        assert one.any() == name.startswith("lid")
        assert (one != other).mean() < 0.01, "features in a bank are kept as float16"


def test_the_check_says_what_to_expect(own: Path) -> None:
    found = machine("bank", "check", own, "--class", "lid", "--head", "contrast", "--tile", "40")
    assert list(found["checks"]) == ["squeezenet1_1 at 64 px", "squeezenet1_1 at 64 px, tiles of 40 px"]
    text = printed("bank", "check", own, "--class", "lid", "--head", "contrast")
    assert "lid: expect an IoU of" in text


def test_negatives_and_what_is_taken_of_a_file(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.bank"
    machine("bank", "new", path, *SIZE)
    machine("bank", "add", path, photos / "own", "--take", "cup ä=cup")
    assert machine("bank", "add", path, photos / "new" / "lid 4.jpg", "--without", "cup")["classes"] == ["cup"]
    assert machine("bank", "remove", path, "cup ä 0.jpg")["removed"] == ["cup ä 0.jpg"]
    assert ["cup", "3", "1"] in [line.split() for line in printed("bank", "show", path).splitlines()]


def test_what_is_refused(photos: Path, own: Path, tmp_path: Path) -> None:
    pair = f"{photos / 'own' / 'lid' / 'lid 0'}.jpg:{photos / 'own' / 'lid' / 'lid 0'}.png"
    query = ("--query", photos / "new", "--out", tmp_path / "out")
    (tmp_path / "empty.bank").mkdir()
    machine("bank", "new", tmp_path / "new.bank", *SIZE)
    for words, code, said in (
        (("predict", *query), 1, "Give either --bank or --support"),
        (("predict", "--bank", own, "--support", pair, *query), 1, "Give either --bank or --support"),
        (("predict", "--bank", tmp_path / "empty.bank", *query), 1, "is no bank"),
        (("predict", "--bank", tmp_path / "new.bank", *query), 1, "holds no annotated photo yet"),
        (("predict", "--bank", own, "--class", "mug", *query), 1, "has no class 'mug'"),
        (("predict", "--support", pair, "--class", "mug", *query), 2, "--class is a class of a bank"),
        (("predict", "--support", pair, "--head", "hsnet", *query), 1, "needs a trained one"),
        (("predict", "--support", pair, "--fusion", "vote", *query), 1, "give it with --checkpoint only"),
        (("predict", "--support", pair, "--format", "coco,svg", *query), 2, "'svg' is none of"),
        (
            ("predict", "--support", pair, "--query", photos / "new", "--out", photos / "new", "--watch"),
            1,
            "own folder",
        ),
        (
            ("predict", "--support", pair, "--query", tmp_path / "gone", "--out", tmp_path / "out", "--watch"),
            1,
            "does not",
        ),
        (("predict", "--bank", own, "--weights", "random:1", *query), 1, "other weights"),
        (("bank", "new", own), 1, "not empty"),
        (("bank", "add", own), 2, "give photos with masks"),
        (("bank", "add", own, photos / "new" / "lid 4.jpg"), 1, "a photo without a mask"),
        (("bank", "add", own, photos / "own", "--take", "mug"), 1, "no class 'mug'"),
        (("bank", "check", own, "--head", "hsnet"), 1, "needs a trained one"),
        (("bank", "remove", own, "gone.jpg"), 1, "names no photo"),
    ):
        result = invoke(*words)
        assert result.exit_code == code, (words, result.output)
        assert said in result.output, (words, result.output)
        assert not (tmp_path / "out").exists()


def test_features_are_kept_for_another_class(photos: Path, own: Path, tmp_path: Path) -> None:
    ask = ("predict", "--bank", own, "--query", photos / "new", "--head", "contrast")
    ask = (*ask, "--keep-features", tmp_path / "kept")
    machine(*ask, "--out", tmp_path / "one", "--class", "lid")
    kept = {path: path.stat().st_ino for path in (tmp_path / "kept").rglob("*.safetensors")}
    assert len(kept) == 4
    machine(*ask, "--out", tmp_path / "other", "--class", "cup ä")
    assert {path: path.stat().st_ino for path in (tmp_path / "kept").rglob("*.safetensors")} == kept
    refused = invoke(*ask, "--out", tmp_path / "ray", "--workers", "2")
    assert refused.exit_code == 2
    assert "work in this process" in refused.output


@pytest.mark.slow
def test_a_watched_folder_is_done_as_photos_come(photos: Path, own: Path, tmp_path: Path) -> None:
    """A process of its own, stopped by Ctrl-C: two photos, then a third, then the results are whole."""
    (tmp_path / "in").mkdir()
    shutil.copy(photos / "new" / "lid 4.jpg", tmp_path / "in")
    out = tmp_path / "out"
    ask = ("predict", "--bank", own, "--query", tmp_path / "in", "--out", out, "--head", "contrast")
    words = [*map(str, ask), "--watch", "--json"]
    child = subprocess.Popen(
        [sys.executable, ROOT / "cli.py", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(out / "lid 4_mask.png", child)
        shutil.copy(photos / "new" / "lid 5.jpg", tmp_path / "in")
        wait_for(out / "lid 5_mask.png", child)
        child.send_signal(signal.SIGINT)
        said, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 0, errors
    assert json.loads(said)["photos"] == 2
    assert len((out / "results.jsonl").read_text().splitlines()) == 2


def wait_for(path: Path, child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
