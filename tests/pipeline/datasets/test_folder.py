"""Own photos: the three layouts, dataset.yaml, folds and lists by rule."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hsnet.errors import DataError
from pipeline.datasets import folder_files, open_dataset
from pipeline.datasets.images import has_heic


def photo(path: Path, height: int = 20, width: int = 30, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3) % 251
    Image.fromarray(pixels.astype(np.uint8)).save(path, exif=exif)


def mask(path: Path, *values: int, height: int = 20, width: int = 30) -> None:
    """A block of 20 pixels for each value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width), np.uint8)
    for row, value in enumerate(values):
        pixels[row, :20] = value
    Image.fromarray(pixels).save(path)


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Layout masks: 10 photos for each of the values 1..4; every other one shows the next value too."""
    for value in range(1, 5):
        for number in range(10):
            name = f"set{value}/{number}"
            photo(tmp_path / "images" / f"{name}.jpg")
            mask(tmp_path / "masks" / f"{name}.png", value, *([value % 4 + 1, 255] if number % 2 else []))
    return tmp_path


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Layout classes: five folders of four photos."""
    for name in ("ant", "bee", "cat", "dog", "eel"):
        for number in range(4):
            photo(tmp_path / name / f"{number}.jpg")
            mask(tmp_path / name / f"{number}.png", 255)
    return tmp_path


def describe(root: Path, text: str) -> None:
    (root / "dataset.yaml").write_text(text)


# --- layout masks -----------------------------------------------------------------------------------------------


def test_masks_without_a_description(masks):
    dataset = open_dataset("folder", masks)
    index = dataset.index
    assert index.classes == {0: "class 1", 1: "class 2", 2: "class 3", 3: "class 4"}
    assert index.folds == (0, 1, 2, 3)
    assert index.images[0] == "set1/0.jpg"
    assert index.has_ignore
    assert index.split(2, "test").class_ids == (2,)
    label = dataset.label(1)
    assert label.dtype == np.uint8
    assert sorted(np.unique(label)) == [0, 1, 2, 255]
    assert dataset.image(1).size == (30, 20)


def test_test_images_and_training_images_are_kept_apart(masks):
    index = open_dataset("folder", masks).index
    for fold in index.folds:
        trn, val, test = (index.split(fold, role).entries for role in ("trn", "val", "test"))
        assert not {i for i, _ in trn} & ({i for i, _ in val} | {i for i, _ in test})
        assert not {c for _, c in test} & ({c for _, c in val} | {c for _, c in trn})
        assert len({i for i, _ in test}) >= 2
        assert index.split(fold, "test").classes_below(2) == {}


def test_a_rare_class_keeps_two_test_images(masks):
    for number in range(3):
        photo(masks / "images" / f"rare{number}.jpg")
        mask(masks / "masks" / f"rare{number}.png", 5)
    describe(masks, "folds: 5\n")
    index = open_dataset("folder", masks).index
    assert len(index.split(4, "test").entries) == 2
    assert any("class 5 (1)" in note for note in index.notes)  # one is left for training: no episode


def test_adding_photos_moves_few_between_the_sides(masks):
    before = open_dataset("folder", masks).index
    tests = {before.images[i] for f in before.folds for i, _ in before.split(f, "test").entries}
    photo(masks / "images" / "new.jpg")
    mask(masks / "masks" / "new.png", 1)
    after = open_dataset("folder", masks).index
    again = {after.images[i] for f in after.folds for i, _ in after.split(f, "test").entries}
    assert len(tests ^ again) <= 2


def test_description_of_masks(masks):
    (masks / "images").rename(masks / "photos")
    (masks / "held.txt").write_text("set1/0\nset1/1.jpg\nset2/0\nset2/2\n\n")
    describe(
        masks,
        "images: photos\nclasses: {1: cup, 2: fork, 3: knife, 4: plate}\nfolds: [[cup, fork], [plate]]\n"
        "val_images: held.txt\nmin_object_share: 0\n",
    )
    index = open_dataset("folder", masks).index
    assert index.classes[1] == "fork"
    assert index.folds == (0, 1)
    assert index.split(0, "test").class_ids == (0, 1)
    assert {index.images[i] for i, _ in index.split(0, "test").entries} == {
        "set1/0.jpg",
        "set1/1.jpg",
        "set2/0.jpg",
        "set2/2.jpg",
    }
    assert index.split(1, "trn").class_ids == (0, 1, 2)


def test_small_objects_are_not_listed(masks):
    describe(masks, "min_object_share: 0.04\n")  # a block is 20 of 600 pixels
    index = open_dataset("folder", masks).index
    assert all(not index.split(f, role).entries for f in index.folds for role in ("trn", "test"))
    assert len(index.classes) == 4


def test_a_declared_class_without_images_stays(masks):
    describe(masks, "classes: [cup, fork, knife, plate, ghost]\nfolds: 5\n")
    index = open_dataset("folder", masks).index
    assert index.split(4, "test").class_ids == (4,)
    assert index.split(4, "test").entries == ()


def test_255_as_a_class(masks):
    for path in sorted((masks / "masks" / "set4").iterdir()):
        mask(path, 255)
    describe(masks, "ignore: false\n")
    dataset = open_dataset("folder", masks)
    assert dataset.index.classes[254] == "class 255"
    assert dataset.index.label_dtype == np.uint16
    assert not dataset.index.has_ignore
    assert dataset.label(39).max() == 255


def test_unknown_mask_values_are_named(masks):
    describe(masks, "classes: [cup, fork, knife]\n")
    with pytest.raises(DataError, match=r"png: mask values without a class: \[4\]"):
        open_dataset("folder", masks)


def test_binary_masks_in_the_wrong_layout(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    mask(tmp_path / "masks" / "a.png", 255)
    with pytest.raises(DataError, match="only 0 and 255"):
        open_dataset("folder", tmp_path)


def test_unpaired_files_are_left_out_with_a_note(masks):
    photo(masks / "images" / "alone.jpg")
    mask(masks / "masks" / "lonely.png", 1)
    (masks / "images" / ".hidden.jpg").write_bytes(b"")
    (masks / "images" / "notes.txt").write_text("x")
    dataset = open_dataset("folder", masks)
    assert len(dataset.index.images) == 40
    assert "Left out 1 photo without a mask: alone.jpg." in dataset.index.notes
    assert "Left out 1 mask without a photo: lonely.png." in dataset.index.notes


def test_files_of_other_kinds_are_counted(masks, folders, monkeypatch):
    monkeypatch.setattr(folder_files, "has_heic", False)
    for name in ("images/a.gif", "images/b.gif", "masks/c.tiff", "images/.d.gif", "images/e.txt"):
        (masks / name).touch()
    (masks / "images" / "f.HEIC").touch()
    notes = open_dataset("folder", masks).index.notes
    found = next(note for note in notes if note.startswith("Left out files"))
    kinds = "2 .gif, 1 .heic, 1 .tiff" if not has_heic else "2 .gif, 1 .tiff"
    assert sorted(found.split(": ")[1].split(". ")[0].split(", ")) == sorted(kinds.split(", "))
    if not has_heic:
        assert found.endswith("pip install 'hsnet-pipeline[heic]'.")


def test_files_of_other_kinds_in_class_folders(folders):
    (folders / "ant" / "9.gif").touch()
    assert any("other kinds: 1 .gif" in note for note in open_dataset("folder", folders).index.notes)


def test_mask_of_another_size(masks):
    mask(masks / "masks" / "set1" / "0.png", 1, height=10)
    with pytest.raises(DataError, match=r"set1/0\.png is 30 x 10 .*set1/0\.jpg is 30 x 20"):
        open_dataset("folder", masks).label(0)


# --- what masks say ---------------------------------------------------------------------------------------------


def coloured(path: Path, *colours: str, height: int = 20, width: int = 30) -> None:
    """A block of 20 pixels for each colour, on black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), np.uint8)
    for row, colour in enumerate(colours):
        pixels[row, :20] = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    Image.fromarray(pixels).save(path)


def test_what_is_made_of_values_that_nobody_named_is_said(masks):
    (note,) = open_dataset("folder", masks).index.notes
    assert note.startswith("No names in dataset.yaml: mask value 0 is taken as background (9")
    assert "1 to 4 as classes, 255 as ignored. If 0 is a class, say `background: none`" in note
    describe(masks, "classes: [background, fork, knife, plate]\n")
    assert open_dataset("folder", masks).index.notes[0].startswith("Mask value 1 is a class named 'background'.")
    describe(masks, "classes: [cup, fork, knife, plate]\n")
    assert open_dataset("folder", masks).index.notes == ()


def test_zero_can_be_a_class_and_any_value_nothing(masks):
    """Street photos as they are published: sky is 0, and 3 means nothing here."""
    describe(masks, "background: none\nvoid: 3\nclasses: {0: sky, 1: road, 2: car, 4: tree}\n")
    dataset = open_dataset("folder", masks)
    assert dataset.index.classes == {0: "sky", 1: "road", 2: "car", 4: "tree"}
    assert dataset.index.has_ignore
    label = dataset.label(dataset.index.images.index("set2/1.jpg"))  # rows of 2, 3 and 255 on 0
    assert label[0, 0] == 3
    assert label[1, 0] == label[2, 0] == 255
    assert (label == 1).sum() == 600 - 60
    describe(masks, "background: none\nvoid: 3\nclasses: [sky, road, car]\n")
    with pytest.raises(DataError, match=r"mask values without a class: \[4\]"):
        open_dataset("folder", masks)
    describe(masks, "background: none\n")
    assert open_dataset("folder", masks).index.classes == {n: f"class {n}" for n in range(5)}


def test_background_may_be_another_value(masks):
    describe(masks, "background: [0, 4]\nclasses: [cup, fork, knife]\n")
    dataset = open_dataset("folder", masks)
    assert dataset.index.classes == {0: "cup", 1: "fork", 2: "knife"}
    assert not (dataset.label(dataset.index.images.index("set4/0.jpg"))).any()
    describe(masks, "background: 4\nignore: false\nclasses: {0: table, 1: cup, 2: fork, 3: knife, 255: edge}\n")
    dataset = open_dataset("folder", masks)
    assert (dataset.index.classes[255], dataset.index.has_ignore) == ("edge", False)
    label = dataset.label(dataset.index.images.index("set3/1.jpg"))
    assert (label[0, 0], label[1, 0], label[2, 0], label[9, 0]) == (4, 0, 256, 1)


def test_colours_are_classes(tmp_path):
    for number in range(6):
        photo(tmp_path / "images" / f"{number}.jpg")
        coloured(tmp_path / "masks" / f"{number}.png", "#ff0000" if number % 2 else "#00ff00", "#0000ff")
    with pytest.raises(
        DataError, match=r"colours: \{name: '#rrggbb'.*most frequent here are #000000 \(560 px\), #0000"
    ):
        open_dataset("folder", tmp_path)
    text = "colours: {door: '#ff0000', wall: '#00FF00'}\n"
    describe(tmp_path, text)
    with pytest.raises(DataError, match=r"0\.png: colours without a meaning: #0000ff \(20 px\)\. Name them"):
        open_dataset("folder", tmp_path)
    describe(tmp_path, text + "void: '#0000ff'\n")
    dataset = open_dataset("folder", tmp_path)
    assert dataset.index.classes == {0: "door", 1: "wall"}
    assert dataset.index.has_ignore
    label = dataset.label(1)
    assert (label[0, 0], label[1, 0], label[5, 5]) == (1, 255, 0)
    describe(tmp_path, "colours: {door: '#ff0000', wall: '#00ff00', frame: '#0000ff', rest: '#000000'}\n")
    assert (open_dataset("folder", tmp_path).label(1) == 4).sum() == 560


# --- where files are --------------------------------------------------------------------------------------------


def test_several_folders_are_one_data_set(masks):
    for part in ("train", "test"):
        photo(masks / part / "0.jpg")
        mask(masks / f"{part}annot" / "0.png", 1)
    describe(masks, "images: [images, train, test]\nmasks: [masks, trainannot, testannot]\n")
    index = open_dataset("folder", masks).index
    assert len(index.images) == 42
    assert {"images/set1/0.jpg", "train/0.jpg", "test/0.jpg"} < set(index.images)
    assert open_dataset("folder", masks).label(41).any()


def test_patterns_pair_photos_and_masks(masks):
    for number in range(4):
        photo(masks / "left" / "berlin" / f"{number}_photo.png")
        mask(masks / "fine" / "berlin" / f"{number}_ids.png", number % 2 + 1)
    photo(masks / "left" / "berlin" / "alone_photo.png")
    describe(masks, "images: 'left/{name}_photo.png'\nmasks: 'fine/{name}_ids.png'\n")
    index = open_dataset("folder", masks).index
    assert index.images == tuple(f"left/berlin/{number}_photo.png" for number in range(4))
    assert "Left out 1 photo without a mask: left/berlin/alone_photo.png." in index.notes
    describe(masks, "images: 'left/{name}.png'\nmasks: 'left/{name}.png'\n")
    with pytest.raises(DataError, match="is its own mask"):
        open_dataset("folder", masks)


def test_a_pattern_can_name_the_class_and_one_is_proposed(folders):
    for name in ("ant", "bee", "cat", "dog", "eel"):
        (folders / name).rename(folders / "moved")
        (folders / name).mkdir()
        (folders / "moved").rename(folders / name / "Imgs")
    with pytest.raises(DataError, match=r"Photos with masks are in ant/Imgs: .*'\{class\}/Imgs/\{name\}\.jpg'"):
        open_dataset("folder", folders)
    describe(folders, "images: '{class}/Imgs/{name}.jpg'\nmasks: '{class}/Imgs/{name}.png'\n")
    index = open_dataset("folder", folders).index
    assert list(index.classes.values()) == ["ant", "bee", "cat", "dog", "eel"]
    assert index.images[0] == "ant/Imgs/0.jpg"
    assert len(index.images) == 20


# --- groups -----------------------------------------------------------------------------------------------------


def test_groups_by_expression_stay_together(masks):
    """Photos 0 and 1, 2 and 3, ... of a set are of one thing."""
    plain = open_dataset("folder", masks).index
    describe(masks, "groups: '^(set[1-3]/[0-9])'\n")
    index = open_dataset("folder", masks).index
    assert index.digest != plain.digest
    assert any("30 groups of 30 photos; 10 photos are in none (set4/0.jpg, ...)" in note for note in index.notes)
    for path in sorted((masks / "images").rglob("*.jpg")):
        for folder in ("images", "masks"):
            old = (
                masks
                / folder
                / path.relative_to(masks / "images").with_suffix(".jpg" if folder == "images" else ".png")
            )
            old.rename(old.with_stem(f"{int(old.stem) // 2}-{old.stem}"))
    describe(masks, "groups: '(set[1-4]/[0-9])-'\n")
    index = open_dataset("folder", masks).index
    assert sorted(set(index.groups)) == list(range(20))
    assert index.mates(0) == (0, 1)
    for fold in index.folds:
        tests = {i for role in ("test", "val") for i, _ in index.split(fold, role).entries}
        others = {i for i, _ in index.split(fold, "trn").entries}
        assert not {index.groups[i] for i in tests} & {index.groups[i] for i in others}
        assert index.split(fold, "test").classes_below(2) == {}
    (masks / "held.txt").write_text("set1/0-0\nset1/1-2\nset2/0-0\n")
    describe(masks, "groups: '(set[1-4]/[0-9])-'\nval_images: held.txt\n")
    assert any("takes some photos of 3 groups for tests" in note for note in open_dataset("folder", masks).index.notes)


def test_groups_from_a_file(masks):
    (masks / "groups.csv").write_text("image,group\nset1/0.jpg,a\nset1/1,a\nset2/0,b\n")
    describe(masks, "groups: groups.csv\n")
    index = open_dataset("folder", masks).index
    assert index.mates(0) == (0, 1)
    assert index.mates(2) == (2,)
    (masks / "groups.csv").write_text("image,group\nset9/0.jpg,a\n")
    with pytest.raises(DataError, match=r"lists 'set9/0\.jpg'"):
        open_dataset("folder", masks)
    (masks / "groups.csv").write_text("photo,group\nset1/0.jpg,a\n")
    with pytest.raises(DataError, match="must have the columns image and group"):
        open_dataset("folder", masks)


# --- EXIF -------------------------------------------------------------------------------------------------------


def test_a_turned_photo_fits_a_mask_drawn_on_either_form(masks):
    photo(masks / "images" / "set1" / "0.jpg", 30, 20, orientation=6)  # shown as 20 x 30, as its mask
    photo(masks / "images" / "set1" / "1.jpg", 20, 30, orientation=6)  # stored as 20 x 30, as its mask
    dataset = open_dataset("folder", masks)
    for i in (0, 1):
        assert dataset.label(i).shape == (20, 30)
        assert dataset.image(i).size == (30, 20)


def test_a_turned_photo_with_a_mask_of_no_fitting_size(masks):
    photo(masks / "images" / "set1" / "0.jpg", 25, 35, orientation=8)
    for read in (open_dataset("folder", masks).image, open_dataset("folder", masks).label):
        with pytest.raises(DataError, match="EXIF rotation"):
            read(0)


# --- layout classes ---------------------------------------------------------------------------------------------


def test_class_folders(folders):
    dataset = open_dataset("folder", folders)
    index = dataset.index
    assert list(index.classes.values()) == ["ant", "bee", "cat", "dog", "eel"]
    assert [index.split(f, "test").class_ids for f in index.folds] == [(0, 1), (2,), (3,), (4,)]
    assert index.split(0, "val").class_ids == (2,)
    assert index.split(3, "val").class_ids == (0, 1)
    assert index.split(3, "trn").class_ids == (2, 3)
    assert len(index.split(0, "test").entries) == 8
    number = index.images.index("dog/2.jpg")
    assert (dataset.label(number) == 4).sum() == 20
    assert dataset.label(number).dtype == np.uint8
    assert not index.has_ignore


def test_a_photo_without_its_mask_is_noted(folders):
    before = len(open_dataset("folder", folders).index.images)
    (folders / "dog" / "2.png").unlink()
    index = open_dataset("folder", folders).index
    assert len(index.images) == before - 1
    assert "Left out 1 photo without a mask: dog/2.jpg." in index.notes


def test_two_folds_leave_no_classes_to_choose_a_model(folders):
    describe(folders, "folds: [[ant], [bee, cat]]\n")
    index = open_dataset("folder", folders).index
    assert index.split(0, "trn").class_ids == (1, 2, 3, 4)
    assert index.split(0, "val").entries == ()
    assert any("'val' is empty" in note for note in index.notes)


def test_chosen_class_folders(folders):
    (folders / "extra").mkdir()
    describe(folders, "classes: [dog, ant, cat]\n")
    index = open_dataset("folder", folders).index
    assert index.classes == {0: "dog", 1: "ant", 2: "cat"}
    assert any("extra" in note for note in index.notes)
    describe(folders, "classes: [dog, extra]\n")
    with pytest.raises(DataError, match="no folder with photos and masks for the class 'extra'"):
        open_dataset("folder", folders)


def test_png_photos_have_masks_of_their_own_name(tmp_path):
    for name in ("ant", "bee"):
        for number in range(2):
            photo(tmp_path / name / f"{number}.png")
            mask(tmp_path / name / f"{number}_mask.png", 1)
    index = open_dataset("folder", tmp_path).index
    assert index.images == ("ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png")


def test_a_class_with_one_image_is_noted(folders):
    for number in range(1, 4):
        (folders / "eel" / f"{number}.jpg").unlink()
    assert any("eel (1)" in note for note in open_dataset("folder", folders).index.notes)


# --- layout coco ------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    images, annotations = [], []
    for number in range(12):
        photo(tmp_path / "images" / f"{number:02}.jpg")
        images.append({"id": number, "file_name": f"{number:02}.jpg", "height": 20, "width": 30})
        x = number % 4 * 5
        outline = [[x, 0, x + 10, 0, x + 10, 10, x, 10]]
        entry = {"id": number, "image_id": number, "category_id": number % 3 + 1, "area": 100, "segmentation": outline}
        annotations.append(entry)
    categories = [{"id": c, "name": name} for c, name in enumerate(("saw", "axe", "nut"), 1)]
    raw = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations.json").write_text(json.dumps(raw))
    return tmp_path


def test_coco_annotations(coco):
    dataset = open_dataset("folder", coco)
    assert dataset.index.classes == {0: "saw", 1: "axe", 2: "nut"}
    assert dataset.index.folds == (0, 1, 2)
    label = dataset.label(4)
    assert (label == 2).sum() == 100
    assert label.shape == (20, 30)
    assert dataset.image(4).size == (30, 20)


def test_coco_photo_missing(coco):
    (coco / "images" / "03.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 12 photos are missing: .*03\.jpg"):
        open_dataset("folder", coco)


# --- anything else ----------------------------------------------------------------------------------------------


def test_pickles_for_workers(masks, folders):
    assert pickle.loads(pickle.dumps(open_dataset("folder", masks))).label(0).any()


def test_no_layout_is_recognised(tmp_path):
    (tmp_path / "stuff").mkdir()
    with pytest.raises(DataError, match="none of the known layouts"):
        open_dataset("folder", tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        open_dataset("folder", tmp_path / "nothing")


def test_one_class_is_not_enough(folders):
    describe(folders, "classes: [dog]\n")
    with pytest.raises(DataError, match=r"one class, 'dog'.*takes two"):
        open_dataset("folder", folders)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("colour: red\n", "unknown key 'colour'; keys are layout, images"),
        ("layout: voc\n", "layout must be one of masks, classes, coco"),
        ("images: ../elsewhere\n", "a path inside the folder"),
        ("classes: {0: sky}\n", "names the mask value 0, which is the background. Write `background: none`"),
        ("classes: {-1: sky}\n", "classes must be"),
        ("classes: {1: sky, 2: ground}\nvoid: 2\n", "mask value 2 is a class and background or void"),
        ("background: 5\nvoid: [4, 5]\n", "5 cannot be both background and void"),
        ("background: '#000000'\n", "background and void must be numbers"),
        ("void: 70000\n", "void must be a mask value or colour"),
        ("colours: {a: red}\n", "colours must be"),
        ("colours: {a: '#ff0000', b: '#FF0000'}\n", "different colours"),
        ("colours: {a: '#ff0000'}\nvoid: 3\n", "must be '#rrggbb', because classes are colours"),
        ("colours: {a: '#ff0000'}\nvoid: '#ff0000'\n", "#ff0000 is a class and background or void"),
        ("colours: {a: '#ff0000'}\nclasses: [a]\n", "`colours` names the classes"),
        ("images: [a, b]\n", "2 folders of images need as many of masks"),
        ("images: [a, a]\n", "images must be"),
        ("images: 'a/{name}.jpg'\n", "must both be folders, or both be patterns"),
        ("groups: '(a)(b)'\n", r"a regular expression with one \(group\)"),
        ("groups: '(['\n", r"a regular expression with one \(group\)"),
        ("groups: '(nothing)'\n", "matches no image; the first is set1/0.jpg"),
        ("groups: none.csv\n", "none.csv cannot be read"),
        ("classes: {1: a, 2: a}\n", "different names"),
        ("classes: []\n", "classes must be"),
        ("classes: {yes: a}\n", "classes must be"),
        ("folds: 1\n", "a number from 2"),
        ("folds: [[]]\n", "held-out class names"),
        ("folds: true\n", "a number from 2"),
        ("folds: 9\n", "9 folds of 4 classes"),
        ("folds: [[unicorn]]\n", "folds name 'unicorn'"),
        ("folds: [['class 1', 'class 2', 'class 3', 'class 4']]\n", "holds out all classes"),
        ("val_images: 2\n", "a share above 0"),
        ("val_images: none.txt\n", "none.txt"),
        ("ignore: 255\n", "true or false"),
        ("min_object_share: 5\n", "a share from 0"),
        ("- a\n- b\n", "'key: value'"),
        ("a: [", "not readable YAML"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("!!python/object/apply:os.mkdir [ran]\n", "not readable YAML"),
        ("images: " + "[" * 5000, "opening brackets"),
        ("images: " + "[" * 100, "not readable YAML"),
    ],
)
def test_bad_descriptions_are_named(masks, text, match):
    describe(masks, text)
    with pytest.raises(DataError, match=match):
        open_dataset("folder", masks)


def test_an_empty_description_is_fine(masks):
    describe(masks, "# nothing yet\n")
    assert len(open_dataset("folder", masks).index.classes) == 4


def test_unknown_name_in_the_test_list(masks):
    (masks / "held.txt").write_text("set9/0\n")
    describe(masks, "val_images: held.txt\n")
    with pytest.raises(DataError, match=r"held\.txt lists 'set9/0'"):
        open_dataset("folder", masks)
