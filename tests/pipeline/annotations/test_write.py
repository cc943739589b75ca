"""Every format as the tools read it: pycocotools, Label Studio's converter, geojson, csv, and the files literally."""

from __future__ import annotations

import csv
import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from urllib.parse import unquote, urlsplit

import geojson
import numpy as np
import pytest
import yaml
from matplotlib.path import Path as Outline
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from rle_pack import decode_rle

from hsnet.errors import ConfigError, DataError, ShapeError
from pipeline.annotations.found import Found, FoundClass, Instance, objects_of, placed, whole_mask
from pipeline.annotations.masks_out import folder_name, palette
from pipeline.annotations.write import FORMATS, Writer

CLASSES = ("car", "Straße rot", 'odd "name" <&>')
"""Those of conftest.founds."""

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools


def by_name(founds: list[Found], album: Path) -> dict[str, Found]:
    return {found.photo.relative_to(album).as_posix(): found for found in founds}


def test_coco_as_pycocotools_reads_it(out: Path, album: Path, founds: list[Found], capsys) -> None:
    api = COCO(str(out / "coco.json"))
    assert [api.cats[i]["name"] for i in api.getCatIds()] == list(CLASSES)
    expected = by_name(founds, album)
    assert {image["file_name"] for image in api.imgs.values()} == set(expected)
    for image in api.imgs.values():
        found = expected[image["file_name"]]
        assert (image["width"], image["height"]) == (found.width, found.height)
        for number, name in enumerate(CLASSES, start=1):
            annotations = api.loadAnns(api.getAnnIds(imgIds=image["id"], catIds=number))
            objects = objects_of(found.classes[name]) if name in found.classes else ()
            assert len(annotations) == len(objects)
            for annotation, one in zip(annotations, objects, strict=True):
                assert np.array_equal(api.annToMask(annotation).astype(bool), placed(one, found))
                assert annotation["score"] == one.score
                assert annotation["area"] == one.area == coco_mask.area(annotation["segmentation"])
                assert annotation["bbox"] == list(one.box) == coco_mask.toBbox(annotation["segmentation"]).tolist()
    results = [{k: a[k] for k in ("image_id", "category_id", "segmentation", "score")} for a in api.anns.values()]
    assert len(api.loadRes(results).anns) == len(api.anns) > 20, "its annotations are a result file, too"


def test_label_studio_as_its_converter_reads_it(out: Path, album: Path, founds: list[Found]) -> None:
    tasks = json.loads((out / "labelstudio.json").read_text())
    setup = ElementTree.parse(out / "labelstudio.xml").getroot()
    (tag,) = setup.iter("BrushLabels")
    assert [label.get("value") for label in tag] == list(CLASSES)
    expected = by_name(founds, album)
    for task in tasks:
        address = urlsplit(task["data"]["image"])
        assert address.path == "/data/local-files/"
        found = expected.pop(unquote(address.query.removeprefix("d=")))
        (prediction,) = task["predictions"]
        assert prediction["score"] == min(one.score for one in found.classes.values())
        for region in prediction["result"]:
            assert (region["from_name"], region["to_name"]) == (tag.get("name"), setup.find("Image").get("name"))
            assert (region["original_width"], region["original_height"]) == (found.width, found.height)
        layers = [
            (region["value"]["brushlabels"], decode_rle(region["value"]["rle"]).reshape(found.height, found.width, 4))
            for region in prediction["result"]
        ]
        assert len(layers) == sum(len(objects_of(one)) for one in found.classes.values())
        for name, one in found.classes.items():
            mine = [layer[..., 3] for labels, layer in layers if labels == [name]]
            union = np.any([layer == 255 for layer in mine], axis=0) if mine else np.zeros_like(one.mask)
            assert np.array_equal(union, one.mask)
            assert {int(value) for layer in mine for value in np.unique(layer)} <= {0, 255}
    assert not expected


def test_geojson_as_its_library_checks_it(out: Path, album: Path, founds: list[Found]) -> None:
    collection = geojson.loads((out / "found.geojson").read_text())
    assert collection.is_valid
    assert collection.errors() == []
    expected = by_name(founds, album)
    assert len(collection.features) == sum(len(objects_of(c)) for f in founds for c in f.classes.values())
    masks = {(name, label): np.zeros((f.height, f.width), bool) for name, f in expected.items() for label in f.classes}
    holes = 0
    for feature in collection.features:
        facts, geometry = feature.properties, feature.geometry
        mask = masks[facts["photo"], facts["class"]]
        rows, columns = np.mgrid[: facts["height"], : facts["width"]] + 0.5
        points = np.stack([columns.ravel(), rows.ravel()], axis=1)
        inside = np.zeros(mask.size, bool)
        for outer, *inner in geometry.coordinates:
            assert outer[0] == outer[-1]
            part = Outline(outer).contains_points(points)
            for hole in inner:
                part &= ~Outline(hole).contains_points(points)
                holes += 1
            inside |= part
        assert inside.sum() == facts["area"]
        assert 0 <= facts["score"] <= 1
        mask |= inside.reshape(mask.shape)
    assert holes > 5
    assert all(np.array_equal(masks[name, label], expected[name].classes[label].mask) for name, label in masks)


def test_csv_as_a_csv_reader_reads_it(out: Path, album: Path, founds: list[Found]) -> None:
    with (out / "found.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = by_name(founds, album)
    assert [(row["photo"], row["class"]) for row in rows] == [
        (n, label) for n, f in expected.items() for label in f.classes
    ]
    assert any("\n" in row["photo"] for row in rows)
    for row in rows:
        found = expected[row["photo"]].classes[row["class"]]
        objects = objects_of(found)
        assert int(row["pixels"]) == found.mask.sum()
        assert float(row["share"]) == pytest.approx(found.mask.mean(), abs=1e-6)
        assert float(row["score"]) == found.score
        assert int(row["objects"]) == len(objects)
        areas = [int(area) for area in row["areas"].split()]
        assert areas == sorted((one.area for one in objects), reverse=True)
        boxes = [tuple(map(int, box.split())) for box in row["boxes"].split(";") if box]
        scores = [float(score) for score in row["scores"].split()]
        assert set(zip(boxes, areas, scores, strict=True)) == {(one.box, one.area, one.score) for one in objects}


def test_yolo_literally(out: Path, album: Path, founds: list[Found]) -> None:
    """Read as Ultralytics does: names by number, the label file by the photo's name, shares of width and height."""
    root = out / "yolo"
    description = yaml.safe_load((root / "data.yaml").read_text(encoding="utf-8"))
    assert description["names"] == dict(enumerate(CLASSES))
    links = sorted((root / description["train"]).iterdir())
    expected = {found.photo.resolve(): found for found in founds}
    assert {link.resolve() for link in links} == set(expected)
    assert len(list((root / "labels").iterdir())) == len(links)
    for link in links:
        assert "\n" not in link.name
        found = expected[link.resolve()]
        masks = {name: np.zeros((found.height, found.width), bool) for name in CLASSES}
        for line in (root / "labels" / f"{link.stem}.txt").read_text().splitlines():
            number, *shares = line.split()
            points = np.array(shares, float).reshape(-1, 2)
            assert ((points >= 0) & (points <= 1)).all()
            rows, columns = np.mgrid[: found.height, : found.width] + 0.5
            pixels = np.stack([columns.ravel() / found.width, rows.ravel() / found.height], axis=1)
            # The line to a hole is walked twice: by winding number as by even-odd it encloses nothing.
            masks[CLASSES[int(number)]] |= (
                Outline(points, closed=False).contains_points(pixels).reshape(found.height, found.width)
            )
        for name, one in found.classes.items():
            assert np.array_equal(masks[name], one.mask), (link, name)


def test_labelme_literally(out: Path, album: Path, founds: list[Found]) -> None:
    """Fields that LabelMe's LabelFile needs, and polygons near what its own drawing (Pillow's) makes of them."""
    files = sorted((out / "labelme").iterdir())
    assert len(files) == len(founds)
    expected = {found.photo.resolve(): found for found in founds}
    groups = 0
    for file in files:
        raw = json.loads(file.read_text())
        assert set(raw) == {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"}
        assert raw["imageData"] is None
        found = expected.pop((file.parent / raw["imagePath"]).resolve())
        assert (raw["imageWidth"], raw["imageHeight"]) == (found.width, found.height)
        drawn = {name: Image.new("1", (found.width, found.height)) for name in CLASSES}
        for shape in raw["shapes"]:
            assert shape["shape_type"] == "polygon"
            assert isinstance(shape["flags"], dict)
            assert shape["group_id"] is None or isinstance(shape["group_id"], int)
            groups += shape["group_id"] is not None
            assert {len(point) for point in shape["points"]} == {2}
            assert len(shape["points"]) >= 4
            ImageDraw.Draw(drawn[shape["label"]]).polygon([tuple(p) for p in shape["points"]], fill=1, outline=1)
        for name, one in found.classes.items():
            grown = np.asarray(drawn[name])
            assert (grown | ~one.mask)[:-1, :-1].all(), "what Pillow fills holds the mask"
    assert not expected
    assert groups == 0, "connected parts have no group"


def test_parts_of_one_object_share_a_group_in_labelme(tmp_path: Path, album: Path) -> None:
    mask = np.zeros((30, 41), bool)
    mask[2:5, 2:5] = mask[10:14, 20:30] = True
    with Writer(["labelme"], tmp_path / "out", ["car"], album) as writer:
        writer.add(Found(album / "a b.jpg", 41, 30, {"car": FoundClass(mask, 0.5)}))
    (file,) = (tmp_path / "out" / "labelme").iterdir()
    shapes = json.loads(file.read_text())["shapes"]
    assert [shape["group_id"] for shape in shapes] == [1, 1]
    assert [shape["score"] for shape in shapes] == [0.5, 0.5]


def test_cvat_literally(out: Path, album: Path, founds: list[Found]) -> None:
    root = ElementTree.parse(out / "cvat.xml").getroot()
    assert root.tag == "annotations"
    assert root.findtext("version") == "1.1"
    assert [label.text for label in root.findall("./meta/task/labels/label/name")] == list(CLASSES)
    expected = by_name(founds, album)
    images = root.findall("image")
    assert [int(image.get("id")) for image in images] == list(range(len(founds)))
    for image in images:
        found = expected.pop(image.get("name"))
        masks = {name: np.zeros((found.height, found.width), bool) for name in CLASSES}
        for element in image:
            assert set(element.attrib) == {
                "label", "source", "occluded", "rle", "left", "top", "width", "height", "z_order",
            }  # fmt: skip
            left, top, width, height = (int(element.get(side)) for side in ("left", "top", "width", "height"))
            runs = [int(run) for run in element.get("rle").split(",")]
            pixels = [pixel for n, run in enumerate(runs) for pixel in [n % 2] * run]
            masks[element.get("label")][top : top + height, left : left + width] |= np.array(pixels, bool).reshape(
                height, width
            )
        for name, one in found.classes.items():
            assert np.array_equal(masks[name], one.mask)
    assert not expected


def test_masks_literally(out: Path, album: Path, founds: list[Found]) -> None:
    table = json.loads((out / "masks" / "classes.json").read_text())
    assert table["classes"] == {"1": CLASSES[0], "2": CLASSES[1], "3": CLASSES[2]}
    expected = by_name(founds, album)
    assert set(table["photos"].values()) == set(expected)
    for file, photo in table["photos"].items():
        with Image.open(out / "masks" / file) as picture:
            assert picture.mode == "P"
            assert picture.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
            values = np.asarray(picture)
        for number, name in enumerate(CLASSES, start=1):
            one = expected[photo].classes.get(name)
            assert np.array_equal(values == number, one.mask if one else np.zeros_like(values, bool))


def test_the_palette_is_that_of_voc() -> None:
    assert palette()[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip


def test_where_classes_overlap_the_surer_wins_then_the_smaller(tmp_path: Path, album: Path) -> None:
    large, small = np.zeros((2, 30, 41), bool)
    large[:20], small[10:, :20] = True, True

    def written(scores: tuple[float | None, float | None]) -> np.ndarray:
        classes = {"a": FoundClass(large, scores[0]), "b": FoundClass(small, scores[1])}
        with Writer(["masks"], tmp_path, ["a", "b"], album) as writer:
            writer.add(Found(album / "a b.jpg", 41, 30, classes))
        return np.asarray(Image.open(tmp_path / "masks" / "a b.png"))

    assert np.array_equal(written((0.9, 0.2)), np.where(large, 1, np.where(small, 2, 0)))
    assert np.array_equal(written((0.2, 0.9)), np.where(small, 2, np.where(large, 1, 0)))
    assert np.array_equal(written((None, None)), np.where(small, 2, np.where(large, 1, 0)))


def test_a_picture_per_class_where_they_may_overlap(tmp_path: Path, album: Path, founds: list[Found]) -> None:
    with Writer(["masks"], tmp_path / "o", CLASSES, album, overlapping=True) as writer:
        for found in founds:
            writer.add(found)
    folders = {path.name for path in (tmp_path / "o" / "masks").iterdir() if path.is_dir()}
    assert folders == {"car", "Straße rot", "odd %22name%22 %3C&%3E"}
    values = np.asarray(Image.open(tmp_path / "o" / "masks" / "car" / "a b.png"))
    assert np.array_equal(values, founds[0].classes["car"].mask * 255)


def test_more_classes_than_a_byte_holds(tmp_path: Path, album: Path) -> None:
    names = [f"class {number}" for number in range(300)]
    mask = np.zeros((30, 41), bool)
    mask[3, 4] = True
    with Writer(["masks"], tmp_path, names, album) as writer:
        writer.add(Found(album / "a b.jpg", 41, 30, {"class 299": FoundClass(mask)}))
    values = np.asarray(Image.open(tmp_path / "masks" / "a b.png"))
    assert values[3, 4] == 300
    assert (values > 0).sum() == 1


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "_absent", "nul\0", "line\n", "C:\\x", "100%"])
def test_names_of_classes_do_not_lead_elsewhere(tmp_path: Path, name: str) -> None:
    text = folder_name(name)
    assert unquote(text) == name
    (tmp_path / text).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [text]
    assert text[0] not in "._"


def test_nothing_is_there_before_the_end_and_an_error_leaves_the_old_files(tmp_path: Path, album: Path, founds) -> None:
    many = ("coco.json", "cvat.xml", "found.geojson", "found.csv", "labelstudio.json")
    for name in many:
        (tmp_path / name).write_text("old")
    writer = Writer(FORMATS, tmp_path, CLASSES, album)
    writer.add(founds[0])
    assert {(tmp_path / name).read_text() for name in many} == {"old"}
    writer.discard()
    with pytest.raises(ConfigError, match="none of"), Writer(FORMATS, tmp_path, CLASSES[:1], album) as writer:
        writer.add(founds[0])
    assert {(tmp_path / name).read_text() for name in many} == {"old"}
    assert not list(tmp_path.glob(".*"))
    with Writer(FORMATS, tmp_path, CLASSES, album) as writer:
        files = writer.files
    assert {path.name for path in files} == {*many, "masks", "yolo", "labelme", "labelstudio.xml"}
    assert all(path.exists() for path in files)
    assert json.loads((tmp_path / "coco.json").read_text())["images"] == []
    assert json.loads((tmp_path / "labelstudio.json").read_text()) == []


def test_a_full_disk_is_an_error_that_leaves_the_old_file(tmp_path: Path, album: Path, founds, monkeypatch) -> None:
    (tmp_path / "coco.json").write_text("old")
    writer = Writer(["coco"], tmp_path, CLASSES, album)
    writer.add(founds[0])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.common.files.sync", full)
    with pytest.raises(DataError, match="No space left on device"):
        writer.close()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["coco.json"]
    assert (tmp_path / "coco.json").read_text() == "old"


def test_photos_outside_the_root_keep_their_whole_path(tmp_path: Path, album: Path, founds: list[Found]) -> None:
    with Writer(["coco", "yolo"], tmp_path / "out", CLASSES, album / "sub") as writer:
        for found in founds:
            writer.add(found)
    names = [image["file_name"] for image in json.loads((tmp_path / "out" / "coco.json").read_text())["images"]]
    assert names[3] == "a b.jpg"
    assert names[0] == os.path.abspath(album / "a b.jpg")
    assert sorted(path.name for path in (tmp_path / "out" / "yolo" / "labels").iterdir())[:2] == [
        "Tür ä.txt",
        "a b-2.txt",
    ]


def test_names_that_are_no_text_survive(tmp_path: Path) -> None:
    photo = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    Image.new("RGB", (8, 6)).save(photo)
    mask = np.ones((6, 8), bool)
    with Writer(FORMATS, tmp_path / "out", ["car"], tmp_path) as writer:
        writer.add(Found(photo, 8, 6, {"car": FoundClass(mask)}))
    assert b"caf\xe9.jpg" in (tmp_path / "out" / "found.csv").read_bytes()
    assert json.loads((tmp_path / "out" / "coco.json").read_text())["images"][0]["file_name"] == photo.name
    ElementTree.parse(tmp_path / "out" / "cvat.xml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((["coko"], ["car"]), "'coko' is not known; did you mean 'coco'"),
        ((["coco"], ["car", "car"]), "'car' has no name, or is there twice"),
        ((["coco"], [""]), "has no name"),
    ],
)
def test_what_cannot_be_written_is_said_first(tmp_path: Path, arguments, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Writer(arguments[0], tmp_path / "out", arguments[1], tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_class_that_was_not_named_is_refused(tmp_path: Path, album: Path, founds: list[Found]) -> None:
    with pytest.raises(ConfigError, match="'car' is none of dog"), Writer(["csv"], tmp_path, ["dog"], album) as writer:
        writer.add(founds[0])


def test_what_was_found_must_fit() -> None:
    mask = np.ones((3, 4), bool)
    with pytest.raises(ShapeError, match="must be bool \\(5, 4\\)"):
        Found(Path("a.jpg"), 4, 5, {"car": FoundClass(mask)})
    with pytest.raises(ShapeError, match="does not fit its box"):
        Instance(mask, (0, 0, 3, 4), 12)
    with pytest.raises(ShapeError, match="12 pixels, but its area is said to be 11"):
        Instance(mask, (0, 0, 4, 3), 11)
    with pytest.raises(ShapeError, match="leaves the photo"):
        Found(Path("a.jpg"), 4, 3, {"car": FoundClass(mask, None, (Instance(mask, (1, 0, 4, 3), 12),))})
    for score in (-0.1, 1.1, float("nan")):
        with pytest.raises(ShapeError, match="score"):
            FoundClass(mask, score)
    assert whole_mask(np.zeros((3, 4), bool)) is None
    one = np.zeros((5, 6), bool)
    one[1:3, 2:5] = True
    found = whole_mask(one, 0.3)
    assert found is not None
    assert (found.box, found.area, found.score, found.mask.all()) == ((2, 1, 3, 2), 6, 0.3, True)
