"""Formats as the tools write them, literally; what is absent, ignored, unknown; hostile and broken files."""

from __future__ import annotations

import base64
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from rle_pack import encode_rle

from hsnet.errors import ConfigError, DataError
from pipeline.annotations.item import Annotation
from pipeline.annotations.read import read_annotations

RECTANGLE = np.zeros((20, 30), bool)
RECTANGLE[5:15, 10:25] = True
POLYGON = [10, 5, 25, 5, 25, 15, 10, 15]
PAIRS = [[10, 5], [25, 5], [25, 15], [10, 15]]


def photo(path: Path, width: int = 30, height: int = 20, turn: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turn is not None:
        exif[274] = turn
    Image.new("RGB", (width, height), (90, 120, 30)).save(path, exif=exif)
    return path


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        photo(tmp_path / name)
    return tmp_path


# COCO


def coco(*annotations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "images": [
            {"id": n, "file_name": name, "width": 30, "height": 20}
            for n, name in enumerate(("a.jpg", "b.jpg", "c.jpg"))
        ],
        "categories": [{"id": 3, "name": "car"}, {"id": 8, "name": "road"}],
        "annotations": [
            {"id": n, "image_id": 0, "category_id": 3, "bbox": [10, 5, 15, 10], "area": 150, "iscrowd": 0, **annotation}
            for n, annotation in enumerate(annotations, start=1)
        ],
        **changes,
    }


def compressed(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


@pytest.mark.parametrize(
    "outline", [[POLYGON], compressed(RECTANGLE), uncompressed(RECTANGLE)], ids=["polygon", "c", "u"]
)
def test_coco_outlines(here: Path, outline) -> None:
    read = read_annotations(write(here / "x.json", coco({"segmentation": outline})))
    assert (read.kind, read.classes, len(read)) == ("coco", ("car", "road"), 3)
    assert np.array_equal(read[0].masks["car"], RECTANGLE)
    assert [item.absent for item in read] == [{"road"}, {"car", "road"}, {"car", "road"}]
    assert [path.name for path in read.photos] == ["a.jpg", "b.jpg", "c.jpg"]


def test_coco_instances_of_a_class_are_united(here: Path) -> None:
    other = [0, 0, 4, 0, 4, 4, 0, 4]
    raw = coco(
        {"segmentation": [POLYGON]},
        {"segmentation": [other]},
        {"segmentation": [[20, 0, 28, 0, 28, 3]], "category_id": 8},
    )
    item = read_annotations(write(here / "x.json", raw))[0]
    expected = RECTANGLE.copy()
    expected[:4, :4] = True
    assert np.array_equal(item.masks["car"], expected)
    assert list(item.masks) == ["car", "road"]
    assert item.absent == set()


def test_coco_crowds_are_ignored_and_neither_marked_nor_absent(here: Path) -> None:
    crowd = np.zeros((20, 30), bool)
    crowd[:10] = True
    raw = coco({"segmentation": uncompressed(crowd), "iscrowd": 1}, {"segmentation": [POLYGON], "category_id": 8})
    item = read_annotations(write(here / "x.json", raw))[0]
    assert list(item.masks) == ["road"]
    assert item.absent == set()
    assert item.ignore is not None
    assert np.array_equal(item.ignore, crowd & ~RECTANGLE), "marked pixels are known"


def test_coco_boxes_are_ignored(here: Path) -> None:
    read = read_annotations(write(here / "x.json", coco({"segmentation": []})))
    assert read.notes == ("1 annotations are boxes without an outline: ignored, not filled.",)
    item = read[0]
    assert (item.masks, item.absent) == ({}, {"road"})
    assert np.array_equal(item.ignore, RECTANGLE)


def test_classes_are_chosen_renamed_united_and_ignored(here: Path) -> None:
    raw = coco({"segmentation": [POLYGON]}, {"segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]], "category_id": 8})
    path = write(here / "x.json", raw)
    (only, *_) = read_annotations(path, classes={"road": "Straße"})
    assert (list(only.masks), only.absent) == (["Straße"], set())
    both = read_annotations(path, classes={"car": "thing", "road": "thing"})
    assert both.classes == ("thing",)
    assert both[0].masks["thing"].sum() == 150 + 16
    assert both[1].absent == {"thing"}
    dropped = read_annotations(path, classes={"car": "car", "road": "(ignore)"})
    assert dropped.classes == ("car",)
    assert dropped[0].ignore.sum() == 16
    assert dropped[1].absent == {"car"}
    with pytest.raises(ConfigError, match=r"has no class 'raod', it has car, road; did you mean 'road'"):
        read_annotations(path, classes={"raod": "road"})


def test_an_outline_that_leaves_the_photo_is_clipped_with_a_note(here: Path, caplog) -> None:
    raw = coco({"segmentation": [[20, 10, 60, 10, 60, 40, 20, 40]]})
    with caplog.at_level(logging.WARNING):
        item = read_annotations(write(here / "x.json", raw))[0]
    expected = np.zeros((20, 30), bool)
    expected[10:, 20:] = True
    assert np.array_equal(item.masks["car"], expected)
    assert "annotation 1 reaches from (20, 10) to (60, 40), the photo has 30 x 20 pixels: clipped" in caplog.text


@pytest.mark.parametrize("move", [(-40, 0), (40, 0), (0, -30), (0, 30)])
def test_an_outline_beyond_any_side_is_an_error(here: Path, move: tuple[int, int]) -> None:
    raw = coco({"segmentation": [[x + move[i % 2] for i, x in enumerate(POLYGON)]]})
    with pytest.raises(DataError, match="annotation 1 lies outside its photo"):
        _ = read_annotations(write(here / "x.json", raw))[0]


@pytest.mark.parametrize(("left", "top"), [(-12, 0), (10, 0), (0, -7), (0, 9)])
def test_an_outline_beyond_any_side_in_part_is_clipped(here: Path, caplog, left: int, top: int) -> None:
    raw = coco({"segmentation": [[x + (top if i % 2 else left) for i, x in enumerate(POLYGON)]]})
    with caplog.at_level(logging.WARNING):
        item = read_annotations(write(here / "x.json", raw))[0]
    expected = np.zeros((20, 30), bool)
    expected[max(0, 5 + top) : 15 + top, max(0, 10 + left) : 25 + left] = True
    assert np.array_equal(item.masks["car"], expected)
    assert "clipped" in caplog.text


def test_an_outline_up_to_the_edge_is_no_note(here: Path, caplog) -> None:
    raw = coco({"segmentation": [[0, 0, 30, 0, 30, 20, 0, 20]]})
    with caplog.at_level(logging.WARNING):
        assert read_annotations(write(here / "x.json", raw))[0].masks["car"].all()
    assert caplog.text == ""


def test_what_covers_no_pixel_makes_its_class_unknown(here: Path, caplog) -> None:
    raw = coco({"segmentation": [[3.1, 3.1, 3.2, 3.1, 3.2, 3.2]]})
    with caplog.at_level(logging.WARNING):
        item = read_annotations(write(here / "x.json", raw))[0]
    assert (item.masks, item.absent, item.ignore) == ({}, {"road"}, None)
    assert "covers no pixel" in caplog.text


BROKEN_COCO = {
    "outside": (coco({"segmentation": [[40, 5, 55, 5, 55, 15]]}), "annotation 1 lies outside its photo"),
    "far": (coco({"segmentation": [[1, 1, 1e6, 1, 5, 5]]}), "a polygon is not x, y, x, y"),
    "not a number": (coco({"segmentation": [[1, 1, float("nan"), 1, 5, 5]]}), "a polygon is not x, y, x, y"),
    "odd": (coco({"segmentation": [[1, 1, 4, 1, 5]]}), "a polygon is not x, y, x, y"),
    "short runs": (
        coco({"segmentation": {"size": [20, 30], "counts": [3, 4]}}),
        "run lengths that do not fill its image",
    ),
    "broken text": (coco({"segmentation": {"size": [20, 30], "counts": "\x01 "}}), "broken compressed run lengths"),
    "other size": (coco({"segmentation": {"size": [30, 20], "counts": [600]}}), "run lengths of another size"),
    "no category": (coco({"segmentation": [POLYGON], "category_id": 5}), "category 5, which is not listed"),
    "no image": (coco({"segmentation": [POLYGON], "image_id": 9}), "image 9, which is not listed"),
    "size": (
        coco(images=[{"id": 0, "file_name": "a.jpg", "width": 300, "height": 200}]),
        "the annotation is 300 x 200 pixels .* but its photo .*a.jpg has 30 x 20",
    ),
    "huge": (coco(images=[{"id": 0, "file_name": "a.jpg", "width": 10**6, "height": 10**6}]), "1000000 x 1000000"),
    "missing photo": (
        coco(images=[{"id": n, "file_name": f"{n}/z.jpg", "width": 30, "height": 20} for n in range(4)]),
        r"names 4 photos that are not in .*: '0/z.jpg', '1/z.jpg', '2/z.jpg', \.\.\.",
    ),
    "no name": (coco(images=[{"id": 0, "file_name": 7, "width": 30, "height": 20}]), "file name '7'"),
    "no photos": (coco(images=[]), "holds no annotated photo"),
}


@pytest.mark.parametrize("case", BROKEN_COCO)
def test_broken_coco(here: Path, case: str) -> None:
    raw, said = BROKEN_COCO[case]
    with pytest.raises(DataError, match=said) as caught:
        list(read_annotations(write(here / "x.json", raw)))
    assert str(here) in str(caught.value), "the file or photo is named"


def test_names_never_lead_out_of_the_folder(here: Path) -> None:
    """The last part of the name is looked for in the folder of photos instead."""
    photo(here / "secret" / "z.jpg")
    photo(here / "photos" / "sub" / "y.jpg")
    for name in (str(here / "secret" / "z.jpg"), "../secret/z.jpg", "..\\secret\\z.jpg", "/etc/passwd", "\0", "", "."):
        raw = coco(images=[{"id": 0, "file_name": name, "width": 30, "height": 20}])
        with pytest.raises(DataError, match="not in"):
            read_annotations(write(here / "x.json", raw), photos=here / "photos")
    for name in ("C:\\work\\y.jpg", "/elsewhere/y.jpg", "../../y.jpg", "sub\\y.jpg", "sub/y.jpg"):
        raw = coco(images=[{"id": 0, "file_name": name, "width": 30, "height": 20}])
        read = read_annotations(write(here / "x.json", raw), photos=here / "photos")
        assert read.photos == (here / "photos" / "sub" / "y.jpg",)
    photo(here / "photos" / "other" / "y.jpg")
    raw["images"][0]["file_name"] = "y.jpg"
    with pytest.raises(DataError, match=r"names the photo 'y.jpg', and there are 2 of that name"):
        read_annotations(write(here / "x.json", raw), photos=here / "photos")
    raw["images"][0]["file_name"] = "/elsewhere/other/y.jpg"
    read = read_annotations(write(here / "x.json", raw), photos=here / "photos")
    assert read.photos == (here / "photos" / "other" / "y.jpg",)


@pytest.mark.parametrize("turned", [True, False])
def test_masks_lie_as_viewers_show_the_photo(tmp_path: Path, turned: bool) -> None:
    """A phone's photo, stored 30 x 20 and shown 20 x 30; some tools follow the tag, others do not."""
    photo(tmp_path / "a.jpg", turn=6)  # a quarter to the right
    shown = np.rot90(RECTANGLE, -1)
    assert shown.shape == (30, 20)
    mask = shown if turned else RECTANGLE
    raw = coco({"segmentation": compressed(mask)})
    raw["images"] = [{"id": 0, "file_name": "a.jpg", "width": mask.shape[1], "height": mask.shape[0]}]
    item = read_annotations(write(tmp_path / "x.json", raw))[0]
    assert np.array_equal(item.masks["car"], shown)


# Label Studio


def task(*regions: dict[str, Any], name: str = "/data/upload/1/0a1b2c3d-a.jpg", **changes: Any) -> dict[str, Any]:
    base = {"original_width": 30, "original_height": 20, "image_rotation": 0, "from_name": "t", "to_name": "image"}
    result = [{**base, "id": str(n), **region} for n, region in enumerate(regions)]
    return {"id": 4, "data": {"image": name}, "annotations": [{"was_cancelled": False, "result": result}], **changes}


def brushed(mask: np.ndarray, label: str = "car") -> dict[str, Any]:
    rle = encode_rle(np.repeat(mask.ravel(), 4).astype(np.uint8) * 255)
    return {"type": "brushlabels", "value": {"format": "rle", "rle": rle, "brushlabels": [label]}}


def polygonal(label: str = "car") -> dict[str, Any]:
    points = [[x / 30 * 100, y / 20 * 100] for x, y in PAIRS]
    return {"type": "polygonlabels", "value": {"points": points, "closed": True, "polygonlabels": [label]}}


RECTANGULAR = {
    "type": "rectanglelabels",
    "value": {"x": 100 / 3, "y": 25, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["car"]},
}


def test_label_studio_brushes_and_polygons(here: Path) -> None:
    raw = [
        task(brushed(RECTANGLE), {"type": "choices", "value": {"choices": ["blurred"]}}),
        task(polygonal("road"), name="/data/local-files/?d=sub%2Fdir%2Fb.jpg"),
        task(name="c.jpg"),
        {**task(name="nobody.jpg"), "annotations": []},
    ]
    read = read_annotations(write(here / "x.json", raw))
    assert (read.kind, read.classes) == ("labelstudio", ("car", "road"))
    assert [item.photo.name for item in read] == ["a.jpg", "b.jpg", "c.jpg"]
    assert np.array_equal(read[0].masks["car"], RECTANGLE)
    assert np.array_equal(read[1].masks["road"], RECTANGLE)
    assert [item.absent for item in read] == [{"road"}, {"car"}, {"car", "road"}]
    assert read.notes == ("Left out 1 tasks without a submitted annotation.",)


def test_label_studio_names(here: Path) -> None:
    """As its server stores them; as addresses of buckets and servers; plain."""
    odd = photo(here / "Tür (2) ä.jpg")
    for name in (
        "/data/upload/3/12345678-T%C3%BCr_2_%C3%A4.jpg",
        "/data/local-files/?d=Tür (2) ä.jpg",
        "s3://bucket/x/T%C3%BCr%20(2)%20%C3%A4.jpg",
        "https://host/x/T%C3%BCr%20(2)%20%C3%A4.jpg?token=1",
        "Tür (2) ä.jpg",
    ):
        read = read_annotations(write(here / "x.json", [task(polygonal(), name=name)]))
        assert read.photos == (odd,), name


def test_label_studio_the_last_annotation_that_was_not_cancelled_counts(here: Path) -> None:
    other = np.zeros((20, 30), bool)
    other[0, 0] = True
    done = [task(brushed(mask))["annotations"][0] for mask in (other, RECTANGLE, other)]
    done[2]["was_cancelled"] = True
    read = read_annotations(write(here / "x.json", [task(annotations=done)]))
    assert np.array_equal(read[0].masks["car"], RECTANGLE)
    assert read.notes == ("1 tasks have several annotations: the last one counts.",)


def test_label_studio_rectangles_are_ignored(here: Path) -> None:
    read = read_annotations(write(here / "x.json", [task(RECTANGULAR)]))
    assert np.array_equal(read[0].ignore, RECTANGLE)
    assert (read[0].masks, read[0].absent) == ({}, set())
    assert read.notes == ("1 rectangles are ignored, not filled.",)


def changed(region: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**region, "value": {**region["value"], **values}}


BROKEN_LABEL_STUDIO = {
    "cut off": (
        [task(changed(brushed(RECTANGLE), rle=brushed(RECTANGLE)["value"]["rle"][:20]))],
        "region 1 are broken: it ends",
    ),
    "no bytes": ([task(changed(brushed(RECTANGLE), rle=[0, 0, 9, 96, -1]))], "region 1 are broken"),
    "texts": ([task(changed(brushed(RECTANGLE), rle=["a"] * 9))], "region 1 are broken"),
    "other size": ([task(brushed(RECTANGLE.T.copy()[:-1]))], "region 1 are broken: 2,320 values"),
    "no runs": ([task(changed(brushed(RECTANGLE), rle=None))], "without run lengths"),
    "no label": ([task(changed(brushed(RECTANGLE), brushlabels=[]))], "region 1 has no label"),
    "turned": ([task({**polygonal(), "image_rotation": 90})], "turned by 90 degrees"),
    "points": ([task(changed(polygonal(), points=[[1, 2, 3]]))], "no list of pairs"),
    "words": ([task(changed(polygonal(), points=[["a", "b"]]))], "no list of"),
    "outside": ([task(changed(polygonal(), points=[[120, 10], [140, 10], [140, 20]]))], "lies outside its photo"),
    "sizes": ([task(polygonal(), {**polygonal(), "original_width": 31})], "its regions state the sizes"),
    "no size": ([task({**polygonal(), "original_width": None})], "its regions state the sizes"),
    "another photo": ([task({**polygonal(), "original_width": 300, "original_height": 200})], "300 x 200 pixels"),
    "twice": ([task(polygonal()), task(polygonal())], "another task for the photo"),
    "missing": ([task(polygonal(), name="z.jpg")], "names 1 photos that are not in .*'z.jpg'"),
    "min": ([{"image": "a.jpg", "label": []}], "not JSON-MIN"),
    "no data": ([{**task(polygonal()), "data": 7}], "not as Label Studio exports"),
    "no photo": ([{**task(polygonal()), "data": {"text": "hello"}}], "no photo in its data"),
}


@pytest.mark.parametrize("case", BROKEN_LABEL_STUDIO)
def test_broken_label_studio(here: Path, case: str) -> None:
    raw, said = BROKEN_LABEL_STUDIO[case]
    with pytest.raises(DataError, match=said) as caught:
        list(read_annotations(write(here / "x.json", raw)))
    assert str(here) in str(caught.value)


# CVAT


def cvat(*shapes: str, name: str = "a.jpg", more: str = "", size: str = 'width="30" height="20"') -> str:
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task><labels>'
        "<label><name>car</name></label><label><name>road</name></label></labels></task></meta>"
        f'<image id="0" name="{name}" {size}>{"".join(shapes)}</image>{more}</annotations>'
    )


CVAT_POLYGON = '<polygon label="car" points="10.00,5.00;25.00,5.00;25.00,15.00;10.00,15.00" z_order="0"/>'
CVAT_MASK = (
    '<mask label="road" occluded="0" rle="1, 2, 3, 2, 4" left="27" top="1" width="3" height="4" z_order="0"></mask>'
)
CVAT_BOX = '<box label="car" occluded="0" xtl="10" ytl="5" xbr="25" ybr="15" z_order="0"/>'


def test_cvat_polygons_and_masks(here: Path) -> None:
    read = read_annotations(write(here / "x.xml", cvat(CVAT_POLYGON, CVAT_MASK)))
    assert (read.kind, read.classes) == ("cvat", ("car", "road"))
    assert np.array_equal(read[0].masks["car"], RECTANGLE)
    rows, columns = np.nonzero(read[0].masks["road"])
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(1, 28), (1, 29), (3, 27), (3, 28)]


def test_cvat_what_is_absent_and_unknown(here: Path) -> None:
    line = '<polyline label="road" points="1,1;5,5"/>'
    size = 'width="30" height="20"'
    more = f'<image id="1" name="b.jpg" {size}>{CVAT_BOX}{line}</image><image id="2" name="c.jpg" {size}/>'
    read = read_annotations(write(here / "x.xml", cvat(CVAT_POLYGON, more=more)))
    assert [item.absent for item in read] == [{"road"}, set()]
    assert np.array_equal(read[1].ignore, RECTANGLE)
    assert read.notes == (
        "Left out 1 photos without a shape: nobody may have looked at them.",
        "1 boxes are ignored, not filled.",
    )


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
BROKEN_CVAT = {
    "bomb": (BOMB + "<annotations>&b;</annotations>", "a DOCTYPE"),
    "entity": (OUTSIDE + "<annotations>&a;</annotations>", "a DOCTYPE"),
    "no xml": ("{}", "is no XML"),
    "cut off": (cvat(CVAT_POLYGON)[:-10], "is no XML"),
    "video": ("<annotations><track/></annotations>", "CVAT for video"),
    "other": ("<svg/>", "is <svg>"),
    "runs": (cvat(CVAT_MASK.replace("1, 2, 3", "1, 2, 4")), "run lengths of mask 1 are broken: they sum up to 13"),
    "negative": (cvat(CVAT_MASK.replace("1, 2, 3", "1, -2, 7")), "are broken"),
    "words": (cvat(CVAT_MASK.replace("1, 2, 3", "x")), "are broken"),
    "large": (cvat(CVAT_MASK.replace("1, 2, 3", "9" * 30)), "are broken"),
    "outside": (cvat(CVAT_MASK.replace('left="27"', 'left="28"')), r"3 x 4 pixels at \(28, 1\) leaves its photo"),
    "points": (cvat(CVAT_POLYGON.replace("25.00,5.00", "25.00")), "no list of"),
    "text": (cvat(CVAT_POLYGON.replace("25.00,5.00", "a,b")), "the points of polygon 1"),
    "box": (cvat(CVAT_BOX.replace('xtl="10"', "")), "no xtl"),
    "no label": (cvat(CVAT_POLYGON.replace('label="car"', "")), "polygon 1 has no label"),
    "no size": (cvat(CVAT_POLYGON, size=""), "height is '', must be a whole number"),
    "photo": (cvat(CVAT_POLYGON, name="z.jpg"), "names 1 photos that are not in"),
    "size": (cvat(CVAT_POLYGON, size='width="20" height="30"'), "is 20 x 30 pixels"),
    "twice": (
        cvat(CVAT_POLYGON, more=f'<image name="a.jpg" width="30" height="20">{CVAT_POLYGON}</image>'),
        "photo 'a.jpg' twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_CVAT)
def test_broken_cvat(here: Path, case: str) -> None:
    text, said = BROKEN_CVAT[case]
    with pytest.raises(DataError, match=said) as caught:
        list(read_annotations(write(here / "x.xml", text)))
    assert str(here) in str(caught.value)


# LabelMe


def labelme(*shapes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {"label": "car", "points": PAIRS, "group_id": None, "shape_type": "polygon", "flags": {}}
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": [{**base, **shape} for shape in shapes],
        "imagePath": "a.jpg",
        "imageData": "bm90IGxvb2tlZCBhdA==",
        "imageHeight": 20,
        "imageWidth": 30,
        **changes,
    }


def test_labelme_polygons_and_masks(here: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [255, 255]], np.uint8)).save(file, "PNG")
    mask = {
        "shape_type": "mask",
        "points": [[3, 4], [4, 5]],
        "mask": base64.b64encode(file.getvalue()).decode(),
        "label": "dot",
    }
    write(here / "a.json", labelme({}, mask))
    write(here / "sub" / "b.json", labelme({"label": "road"}, imagePath="..\\b.jpg"))
    read = read_annotations(here / "a.json")
    assert (read.kind, len(read)) == ("labelme", 1)
    read = read_annotations(here, kind="labelme")
    assert read.classes == ("car", "dot", "road")
    assert [item.photo.name for item in read] == ["a.jpg", "b.jpg"]
    assert np.array_equal(read[0].masks["car"], RECTANGLE)
    assert np.argwhere(read[0].masks["dot"]).tolist() == [[4, 4], [5, 3], [5, 4]]
    assert [item.absent for item in read] == [set(), set()], "unknown"


def test_labelme_rectangles_circles_and_points(here: Path) -> None:
    shapes = [
        {"shape_type": "rectangle", "points": [[25, 15], [10, 5]]},
        {"shape_type": "circle", "points": [[2, 2], [2, 4]]},
        {"shape_type": "point", "points": [[1, 1]]},
    ]
    item = read_annotations(write(here / "a.json", labelme(*shapes)))[0]
    expected = RECTANGLE.copy()
    expected[:4, :4] = True
    assert np.array_equal(item.ignore, expected)
    assert (item.masks, item.absent) == ({}, set())


BROKEN_LABELME = {
    "points": (labelme({"points": [[1], [2]]}), "no list of pairs"),
    "no points": (labelme({"points": None}), "shape 1 has no label or no points"),
    "no label": (labelme({"label": 5}), "shape 1 has no label or no points"),
    "rectangle": (labelme({"shape_type": "rectangle", "points": [[1, 2]]}), "is a rectangle and needs two points"),
    "mask": (
        labelme({"shape_type": "mask", "points": [[1, 2], [3, 4]], "mask": "????"}),
        "the mask of shape 1 is broken",
    ),
    "no mask": (labelme({"shape_type": "mask", "points": [[1, 2], [3, 4]]}), "the mask of shape 1 is broken"),
    "no path": ({k: v for k, v in labelme({}).items() if k != "imagePath"}, "it has no 'imagePath'"),
    "path": (labelme({}, imagePath=3), "imagePath is no name"),
    "size": (labelme({}, imageHeight=21), "30 x 21 pixels"),
    "photo": (labelme({}, imagePath="z.jpg"), "names 1 photos"),
    "shapes": (labelme({}, shapes=3), "is no LabelMe file"),
}


@pytest.mark.parametrize("case", BROKEN_LABELME)
def test_broken_labelme(here: Path, case: str) -> None:
    raw, said = BROKEN_LABELME[case]
    with pytest.raises(DataError, match=said) as caught:
        list(read_annotations(write(here / "a.json", raw)))
    assert str(here) in str(caught.value)


def test_labelme_two_files_for_one_photo(here: Path) -> None:
    write(here / "a.json", labelme({}))
    write(here / "b.json", labelme({}))
    with pytest.raises(DataError, match=r"has two files for the photo .*a.jpg"):
        read_annotations(here)


# YOLO

LINE = "0 " + " ".join(f"{x / 30} {y / 20}" for x, y in PAIRS)


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    write(tmp_path / "data.yaml", "train: images\nnames: [car, road]\n")
    for name in ("a.jpg", "b.jpg", "train/c.png", "unlabelled.jpg"):
        photo(tmp_path / "images" / name)
    write(tmp_path / "labels" / "a.txt", LINE + "\n\n")
    write(tmp_path / "labels" / "b.txt", "")
    write(tmp_path / "labels" / "train" / "c.txt", LINE.replace("0 ", "1 ", 1) + f"\n0 {17.5 / 30} 0.5 0.5 0.5")
    return tmp_path


@pytest.mark.parametrize("names", ["[car, road]", "{0: car, 1: road}"])
def test_yolo(yolo: Path, names: str) -> None:
    write(yolo / "data.yaml", f"names: {names}\npath: /nowhere\n")
    read = read_annotations(yolo)
    assert (read.kind, read.classes) == ("yolo", ("car", "road"))
    items = {item.photo.name: item for item in read}
    assert sorted(items) == ["a.jpg", "b.jpg", "c.png"]
    assert np.array_equal(items["a.jpg"].masks["car"], RECTANGLE)
    assert items["b.jpg"].absent == {"car", "road"}
    assert np.array_equal(items["c.png"].masks["road"], RECTANGLE)
    assert (items["c.png"].absent, items["c.png"].ignore) == (set(), None), "all of the box is marked as road"
    assert read.notes == (
        "Left out 1 photos without a label file: not known what they show.",
        "1 lines are boxes: ignored, not filled.",
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("7 0.1 0.1 0.2 0.1 0.2 0.2", "line 1 has class 7; data.yaml names 0 car, 1 road"),
        ("car 0.1 0.1 0.2 0.1 0.2 0.2", "no class number"),
        ("0 0.1 0.1 0.2 0.1 0.2", "5 numbers after the class"),
        ("0 0.1 0.1 0.2 0.1 0.2 nan", "finite"),
        ("0 1.1 0.1 1.2 0.1 1.2 0.2", "lies outside its photo"),
        ("ä", "is no label file"),
    ],
)
def test_broken_yolo_lines(yolo: Path, line: str, said: str) -> None:
    write(yolo / "labels" / "a.txt", line)
    with pytest.raises(DataError, match=said) as caught:
        list(read_annotations(yolo))
    assert "a.txt" in str(caught.value)


@pytest.mark.parametrize("text", ["names: 3", "[]", "names: {a: b}", "names: [", "names: []", "names: [[1]]"])
def test_broken_data_yaml(yolo: Path, text: str) -> None:
    write(yolo / "data.yaml", text)
    with pytest.raises(DataError, match=r"is no data\.yaml"):
        read_annotations(yolo)


def test_yolo_labels_without_a_photo(yolo: Path) -> None:
    write(yolo / "labels" / "z.txt", LINE)
    with pytest.raises(DataError, match=r"names 1 photos that are not in .*'z.jpg'"):
        read_annotations(yolo)


# Any


def test_what_is_no_annotation(here: Path) -> None:
    for name, content, said in (
        ("x.json", "{}", "none of COCO"),
        ("x.json", "[", "is no JSON"),
        ("x.json", "[" * 100_000, "is no JSON"),
        ("x.txt", "", "is no annotation file that is known"),
        ("x.zip", "", "Unpack it first"),
    ):
        with pytest.raises(DataError, match=said):
            read_annotations(write(here / name, content))
    with pytest.raises(DataError, match="is missing"):
        read_annotations(here / "nothing.json")
    with pytest.raises(DataError, match=r"The folder of photos .* is missing"):
        read_annotations(here / "x.json", photos=here / "nothing")
    with pytest.raises(ConfigError, match="kind is 'koko', must be auto, folder"):
        read_annotations(here / "x.json", kind="koko")
    (here / "empty").mkdir()
    with pytest.raises(DataError, match="is no annotation folder that is known"):
        read_annotations(here / "empty")


def test_a_file_too_large_to_read(here: Path, monkeypatch) -> None:
    path = write(here / "x.json", coco())
    monkeypatch.setattr("pipeline.annotations.photos.LARGEST", 100)
    with pytest.raises(DataError, match="100 is the most that is read"):
        read_annotations(path)


def test_too_many_shapes_and_too_long_an_outline(here: Path, monkeypatch) -> None:
    read = read_annotations(write(here / "x.json", coco(*[{"segmentation": [POLYGON]}] * 4)))
    monkeypatch.setattr("pipeline.annotations.read.MOST_SHAPES", 3)
    with pytest.raises(DataError, match="has 4 shapes; 3 is the most"):
        _ = read[0]
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.annotations.shapes._LONGEST", 49)
    with pytest.raises(DataError, match="an outline of 50 pixels; 49 is the most"):
        _ = read[0]


def test_what_is_known_of_a_photo_must_fit() -> None:
    mask = np.ones((3, 4), bool)
    with pytest.raises(DataError, match="'a' 4 x 3, 'b' 3 x 4"):
        Annotation(Path("x.jpg"), {"a": mask, "b": mask.T})
    with pytest.raises(DataError, match=r"'a' 4 x 3, '.ignored.' 3 x 4"):
        Annotation(Path("x.jpg"), {"a": mask}, ignore=mask.T)
    with pytest.raises(DataError, match="'a' marks no pixel"):
        Annotation(Path("x.jpg"), {"a": ~mask})
    with pytest.raises(DataError, match="'a' is marked and said to be absent"):
        Annotation(Path("x.jpg"), {"a": mask}, frozenset("a"))
    with pytest.raises(DataError, match="uint8 of 2 dimensions"):
        Annotation(Path("x.jpg"), {"a": mask.astype(np.uint8)})
    assert Annotation(Path("x.jpg"), {"a": mask}).size == (3, 4)
    assert Annotation(Path("x.jpg"), absent=frozenset("a")).size is None
