"""Masks that are picture files: pairs, class folders, maps of numbers and colours, negatives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline.annotations.mask_files import colours_of, parse_pair
from pipeline.annotations.read import read_annotations, read_pairs

RECTANGLE = np.zeros((20, 30), bool)
RECTANGLE[5:15, 10:25] = True
CORNER = np.zeros((20, 30), bool)
CORNER[:4, :6] = True
NUMBERS = (RECTANGLE * 8 + CORNER * 3).astype(np.uint8)
RED, BLUE = (255, 0, 0), (0, 0, 200)


def coloured(background: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    values = np.full((20, 30, 3), background, np.uint8)
    values[RECTANGLE], values[CORNER] = RED, BLUE
    return values


def save(values: np.ndarray, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def photo(path: Path, turn: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turn is not None:
        exif[274] = turn
    Image.new("RGB", (30, 20), (90, 120, 30)).save(path, exif=exif)
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return photo(tmp_path / "a.jpg")


# Pairs


def test_a_pair(a: Path, tmp_path: Path) -> None:
    read = read_pairs([f"{a}:{save(RECTANGLE * np.uint8(255), tmp_path / 'm.png')}"], "car")
    assert (read.classes, read.photos) == (("car",), (a,))
    assert np.array_equal(read[0].masks["car"], RECTANGLE)
    assert (read[0].absent, read[0].ignore) == (set(), None)


@pytest.mark.parametrize(
    ("choice", "expected"), [("8", RECTANGLE), ("3", CORNER), ("#ff0000", RECTANGLE), ("#0000C8", CORNER)]
)
def test_a_choice_of_number_or_colour(a: Path, tmp_path: Path, choice: str, expected: np.ndarray) -> None:
    mask = save(coloured() if choice[0] == "#" else NUMBERS, tmp_path / "m.png")
    read = read_pairs([f"{a}:{mask}:{choice}"], "window")
    assert np.array_equal(read[0].masks["window"], expected)
    assert read[0].absent == set()


def test_several_classes_of_one_photo(a: Path, tmp_path: Path) -> None:
    one = save(RECTANGLE * np.uint8(255), tmp_path / "one.png")
    numbers = save(NUMBERS, tmp_path / "m.png")
    read = read_pairs([f"{a}:{numbers}:8", f"{a}:{numbers}"], "car", {"3": "sky", "9": "cat"})
    assert (len(read), read.classes) == (1, ("car", "sky", "cat"))
    assert np.array_equal(read[0].masks["car"], RECTANGLE)
    assert np.array_equal(read[0].masks["sky"], CORNER)
    assert read[0].absent == {"cat"}
    with pytest.raises(DataError, match=r"two masks for 'car', .*one.png and .*m.png"):
        read_pairs([f"{a}:{one}", f"{a}:{numbers}:8"], "car")


def test_a_table_says_what_is_absent(a: Path, tmp_path: Path) -> None:
    for values, table in (
        (NUMBERS, {"8": "car", "3": "sky", "5": "cat"}),
        (coloured(), {"#FF0000": "car", "#0000c8": "sky", "#00ff00": "cat"}),
    ):
        read = read_pairs([f"{a}:{save(values, tmp_path / 'm.png')}"], "unused", table)
        assert read.classes == ("car", "sky", "cat")
        assert np.array_equal(read[0].masks["car"], RECTANGLE)
        assert np.array_equal(read[0].masks["sky"], CORNER)
        assert read[0].absent == {"cat"}
        table = {key: "(ignore)" if name == "sky" else name for key, name in table.items()}
        read = read_pairs([f"{a}:{tmp_path / 'm.png'}"], "unused", table)
        assert read.classes == ("car", "cat")
        assert np.array_equal(read[0].ignore, CORNER)


def test_a_boundary_beside_class_numbers_is_ignored(a: Path, tmp_path: Path) -> None:
    values = NUMBERS.copy()
    values[4, 10:25] = 255
    read = read_pairs([f"{a}:{save(values, tmp_path / 'm.png')}:8"], "car")
    assert np.array_equal(read[0].masks["car"], RECTANGLE)
    assert np.argwhere(read[0].ignore).tolist() == [[4, column] for column in range(10, 25)]
    values[0, 0] = 200  # no class number: 255 is a value like others
    assert read_pairs([f"{a}:{save(values, tmp_path / 'm.png')}:8"], "car")[0].ignore is None


def test_names_with_colons(tmp_path: Path) -> None:
    a, mask = photo(tmp_path / "a:1.jpg"), save(NUMBERS, tmp_path / "m:2.png")
    assert parse_pair(f"{a}:{mask}") == (a, mask, None)
    assert parse_pair(f"{a}:{mask}:08") == (a, mask, "8")
    odd = tmp_path / "m.png:8"
    odd.write_bytes(mask.read_bytes())
    save(NUMBERS, tmp_path / "m.png")
    assert parse_pair(f"{a}:{odd}") == (a, odd, None), "a file of that name is that file"
    for text, said in (
        (f"{a}:{tmp_path / 'nothing.png'}:8", "there is no mask"),
        (f"{a}:{mask}:red", "there is no"),
        (str(tmp_path), "has no colon"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_pair(text)


def test_a_coloured_mask_without_a_choice_is_refused_with_its_colours(a: Path, tmp_path: Path) -> None:
    mask = save(coloured(), tmp_path / "m.png")
    with pytest.raises(DataError, match=r"several colours: #000000 \(71\.0%\), #ff0000 \(25\.0%\), #0000c8 \(4\.0%\)"):
        _ = read_pairs([f"{a}:{mask}"], "car")[0]
    mask = save(coloured(), tmp_path / "m.jpg", quality=70)
    with pytest.raises(DataError, match="has several colours"):
        _ = read_pairs([f"{a}:{mask}"], "car")[0]
    assert colours_of(tmp_path / "m.png")[1] == ("#ff0000", 0.25)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_one_colour_on_black_is_an_object(a: Path, tmp_path: Path, suffix: str) -> None:
    large = np.kron(RECTANGLE, np.ones((8, 8), bool))
    Image.new("RGB", (240, 160)).save(a)
    values = large[..., None] * np.array(RED, np.uint8)
    read = read_pairs([f"{a}:{save(values, tmp_path / f'm.{suffix}')}"], "car")
    assert (read[0].masks["car"] ^ large).mean() <= (0 if suffix == "png" else 0.01)


def test_soft_edges_of_one_colour_are_no_colours_of_their_own(a: Path, tmp_path: Path) -> None:
    big = Image.fromarray((RECTANGLE * 255).astype(np.uint8)).resize((300, 200), Image.Resampling.BILINEAR)
    shades = np.asarray(big)[..., None] // np.array([1, 8, 8], np.uint8)
    assert len(np.unique(shades[..., 0])) > 20
    Image.new("RGB", (300, 200)).save(tmp_path / "big.jpg")
    read = read_pairs([f"{tmp_path / 'big.jpg'}:{save(shades, tmp_path / 'm.png')}"], "car")
    assert np.array_equal(read[0].masks["car"], np.asarray(big) >= 128)


def test_two_shades_of_a_few_colours_are_two_colours(a: Path, tmp_path: Path) -> None:
    """PASCAL VOC's aeroplane and chair, saved as a colour picture."""
    values = RECTANGLE[..., None] * np.array((128, 0, 0), np.uint8) + CORNER[..., None] * np.array(
        (192, 0, 0), np.uint8
    )
    with pytest.raises(DataError, match=r"several colours: #000000 \(71.0%\), #800000 \(25.0%\), #c00000"):
        _ = read_pairs([f"{a}:{save(values, tmp_path / 'm.png')}"], "car")[0]


def test_grey_with_soft_edges_in_colour_channels_is_an_object(a: Path, tmp_path: Path) -> None:
    values = np.repeat((RECTANGLE * 255).astype(np.uint8)[..., None], 3, axis=2)
    values[4, 10:25] = 100
    assert np.array_equal(read_pairs([f"{a}:{save(values, tmp_path / 'm.png')}"], "car")[0].masks["car"], RECTANGLE)


@pytest.mark.parametrize(
    ("values", "choice", "said"),
    [
        (NUMBERS, ":7", r"has no pixel of 7; it has 0, 3, 8"),
        (coloured(), ":#123456", r"has no pixel of #123456; it has #000000 \(71"),
        (coloured(), ":8", r"a mask of colours, and a number was asked for. Choose a colour; it has #000000"),
        (np.zeros((20, 30), np.uint8), "", "marks no object"),
        (NUMBERS[:-1], ":8", "30 x 19 pixels"),
        (np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8), ":#ff0000", "no mask of flat colours"),
    ],
)
def test_pairs_that_do_not_fit(a: Path, tmp_path: Path, values: np.ndarray, choice: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        _ = read_pairs([f"{a}:{save(values, tmp_path / 'm.png')}{choice}"], "car")[0]
    assert "m.png" in str(caught.value)


def test_masks_of_one_photo_in_two_sizes(a: Path, tmp_path: Path) -> None:
    one, two = save(NUMBERS, tmp_path / "1.png"), save(NUMBERS[:-1], tmp_path / "2.png")
    table = {"8": "car"}
    with pytest.raises(DataError, match=r"2.png is 30 x 19 .* the other masks of its photo are 30 x 20"):
        _ = read_pairs([f"{a}:{one}", f"{a}:{two}:3"], "sky", table)[0]


@pytest.mark.parametrize(
    ("table", "said"),
    [({"red": "car"}, "'red' is neither a value"), ({"1": "car", "#ff0000": "cat"}, "numbers or colours, not both")],
)
def test_tables_that_are_none(a: Path, tmp_path: Path, table: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_pairs([f"{a}:{save(NUMBERS, tmp_path / 'm.png')}"], "car", table)


def test_a_mask_drawn_on_the_stored_pixels_is_turned(tmp_path: Path) -> None:
    a = photo(tmp_path / "a.jpg", turn=6)
    read = read_pairs([f"{a}:{save(NUMBERS, tmp_path / 'm.png')}:8"], "car")
    assert np.array_equal(read[0].masks["car"], np.rot90(RECTANGLE, -1))
    turned = save(np.rot90(NUMBERS, -1), tmp_path / "t.png")
    assert np.array_equal(read_pairs([f"{a}:{turned}:8"], "car")[0].masks["car"], np.rot90(RECTANGLE, -1))


# Class folders


def test_class_folders(tmp_path: Path) -> None:
    photo(tmp_path / "car" / "1.jpg")
    save(RECTANGLE * np.uint8(255), tmp_path / "car" / "1.png")
    photo(tmp_path / "car" / "alone.jpg")
    photo(tmp_path / "rote Tür" / "1.png")
    save(CORNER * np.uint8(255), tmp_path / "rote Tür" / "1_mask.png")
    photo(tmp_path / "car" / "2.jpg")
    save(np.zeros((20, 30), np.uint8), tmp_path / "car" / "2.png")
    photo(tmp_path / "_absent" / "car" / "nothing.jpg")
    photo(tmp_path / "_absent" / "dog" / "x.jpg")
    read = read_annotations(tmp_path)
    assert (read.kind, read.classes) == ("folder", ("car", "rote Tür", "dog"))
    assert read.notes == ("Left out 1 pictures that are neither a photo with a mask nor a mask.",)
    items = {f"{item.photo.parent.name}/{item.photo.name}": item for item in read}
    assert {name: (set(item.masks), set(item.absent)) for name, item in items.items()} == {
        "car/1.jpg": ({"car"}, set()),
        "car/2.jpg": (set(), {"car"}),
        "rote Tür/1.png": ({"rote Tür"}, set()),
        "car/nothing.jpg": (set(), {"car"}),
        "dog/x.jpg": (set(), {"dog"}),
    }
    assert np.array_equal(items["rote Tür/1.png"].masks["rote Tür"], CORNER)
    only = read_annotations(tmp_path, classes={"rote Tür": "door"})
    assert next(item for item in only if item.masks).masks["door"].sum() == CORNER.sum()


# Masks in a folder of their own


def test_maps_of_numbers(tmp_path: Path) -> None:
    for name in ("images/a.jpg", "images/sub/b.jpg"):
        photo(tmp_path / name)
    save(NUMBERS, tmp_path / "masks" / "a.png")
    save(RECTANGLE * np.uint8(8), tmp_path / "masks" / "sub" / "b.png")
    read = read_annotations(tmp_path, classes={"8": "car", "3": "sky"})
    assert read.kind == "masks"
    assert [(sorted(item.masks), set(item.absent)) for item in read] == [(["car", "sky"], set()), (["car"], {"sky"})]
    assert np.array_equal(read[0].masks["sky"], CORNER)
    with pytest.raises(DataError, match=r"a.png has the values 0, 3, 8. Give a table of classes"):
        read_annotations(tmp_path)
    (tmp_path / "masks" / "classes.json").write_text('{"classes": {"3": "Himmel", "8": "Auto"}}')
    assert read_annotations(tmp_path).classes == ("Himmel", "Auto")
    assert read_annotations(tmp_path, classes={"Auto": "car"})[0].masks["car"].sum() == RECTANGLE.sum()
    for text in ("[]", '{"classes": {"red": "x"}}', '{"classes": {"1": 2}}', "{"):
        (tmp_path / "masks" / "classes.json").write_text(text)
        with pytest.raises(DataError, match="is no table of classes"):
            read_annotations(tmp_path)


def test_maps_of_colours(tmp_path: Path) -> None:
    photo(tmp_path / "photos" / "a.jpg")
    save(coloured((255, 255, 255)), tmp_path / "masks" / "a.png")
    read = read_annotations(tmp_path, photos=tmp_path / "photos", classes={"#FF0000": "car", "#00ff00": "cat"})
    assert np.array_equal(read[0].masks["car"], RECTANGLE)
    assert read[0].absent == {"cat"}
    with pytest.raises(DataError, match=r"has the colours #ffffff \(71\.0%\), #ff0000"):
        read_annotations(tmp_path, photos=tmp_path / "photos")


def test_a_mask_per_class(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        photo(tmp_path / "images" / name)
    save(RECTANGLE * np.uint8(255), tmp_path / "masks" / "car" / "a.png")
    save(CORNER * np.uint8(255), tmp_path / "masks" / "%2E.%2Fup" / "a.png")
    save(np.zeros((20, 30), np.uint8), tmp_path / "masks" / "car" / "b.png")
    photo(tmp_path / "_absent" / "car" / "n.jpg")
    read = read_annotations(tmp_path)
    assert read.classes == ("../up", "car")
    assert np.array_equal(read[0].masks["../up"], CORNER)
    assert [sorted(item.absent) for item in read][1:] == [["car"], ["car"]]
    assert np.array_equal(read[0].masks["car"], RECTANGLE)


def test_masks_without_a_photo_and_with_two(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "a.jpg")
    save(NUMBERS, tmp_path / "masks" / "z.png")
    with pytest.raises(DataError, match=r"names 1 photos that are not in .*'z.jpg'"):
        read_annotations(tmp_path, classes={"8": "car"})
    photo(tmp_path / "images" / "z.jpg")
    photo(tmp_path / "images" / "z.png")
    with pytest.raises(DataError, match=r"belongs to .* or .*: rename one"):
        read_annotations(tmp_path, classes={"8": "car"})


def test_an_index_mask_of_several_values_is_one_object_with_a_warning(a: Path, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        item = read_pairs([f"{a}:{save(NUMBERS, tmp_path / 'm.png')}"], "car")[0]
    assert np.array_equal(item.masks["car"], RECTANGLE | CORNER)
    assert "holds several values 3, 8" in caplog.text
