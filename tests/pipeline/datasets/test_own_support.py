"""A user's own support: what counts as object in masks of any kind, and which masks are refused."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.own_support import parse_support, read_mask, read_support

OBJECT = np.zeros((20, 30), bool)
OBJECT[5:15, 10:25] = True


def save(array: np.ndarray, path: Path, mode: str | None = None) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


@pytest.mark.parametrize("value", [1, 7, 128, 255])
def test_two_valued_masks_mean_not_zero(tmp_path: Path, value: int) -> None:
    assert np.array_equal(read_mask(save(OBJECT * np.uint8(value), tmp_path / "m.png")), OBJECT)


def test_one_bit_mask(tmp_path: Path) -> None:
    assert np.array_equal(read_mask(save(OBJECT * np.uint8(255), tmp_path / "m.png", "1")), OBJECT)


def test_jpeg_mask_is_cut_half_way(tmp_path: Path) -> None:
    """JPEG leaves values near 0 and near 255; "not zero" would make nearly everything object."""
    path = save(OBJECT * np.uint8(255), tmp_path / "m.jpg")
    assert len(np.unique(np.asarray(Image.open(path)))) > 2, "this JPEG is meant to have noise"
    assert np.array_equal(read_mask(path), OBJECT)


def test_soft_edges_are_cut_half_way(tmp_path: Path) -> None:
    soft = (OBJECT * 255).astype(np.uint8)
    soft[4, 10:25], soft[15, 10:25] = 100, 200
    mask = read_mask(save(soft, tmp_path / "m.png"))
    assert not mask[4].any()
    assert mask[15, 10:25].all()


@pytest.mark.parametrize("palette", [False, True])
def test_voc_masks_leave_the_boundary_out(tmp_path: Path, palette: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Values {0, class, 255} as in SegmentationClass: 255 is the line around the object, not the object."""
    voc = (OBJECT * 15).astype(np.uint8)
    voc[4, 10:25] = 255
    image = Image.fromarray(voc)
    if palette:
        image = image.convert("P")
        image.putdata(voc.ravel().tolist())
        image.putpalette([value for i in range(256) for value in (i, 255 - i, 128)])
    image.save(tmp_path / "m.png")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_mask(tmp_path / "m.png"), OBJECT)
    assert "values 15 taken as the object, 255 as its boundary" in caplog.text


def test_a_soft_edge_below_the_class_numbers_does_not_take_the_object_away(tmp_path: Path) -> None:
    """255 inside and edges of 40 and 80: 255 covers more than the rest, so it is no boundary."""
    soft = (OBJECT * 255).astype(np.uint8)
    soft[4, 10:25], soft[5, 10:25] = 40, 80
    Image.fromarray(soft).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png"), soft >= 128)


def test_several_classes_are_one_object_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = (OBJECT * 3).astype(np.uint8)
    both[0, 0] = 9
    with caplog.at_level(logging.WARNING):
        assert read_mask(save(both, tmp_path / "m.png"))[0, 0]
    assert "several values 3, 9" in caplog.text


def test_cut_out_with_transparency(tmp_path: Path) -> None:
    layers = np.zeros((20, 30, 4), np.uint8)
    layers[..., 3] = OBJECT * 255
    assert np.array_equal(read_mask(save(layers, tmp_path / "m.png")), OBJECT)


def test_coloured_mask(tmp_path: Path) -> None:
    """Pure blue is 29 of 255 in grey: a grey conversion cut at 128 would lose it."""
    layers = np.zeros((20, 30, 3), np.uint8)
    layers[..., 2] = OBJECT * 255
    assert np.array_equal(read_mask(save(layers, tmp_path / "m.png")), OBJECT)


def test_black_opaque_mask_is_empty(tmp_path: Path) -> None:
    layers = np.zeros((20, 30, 4), np.uint8)
    layers[..., 3] = 255
    assert not read_mask(save(layers, tmp_path / "m.png")).any()


def test_sixteen_bit_mask(tmp_path: Path) -> None:
    assert np.array_equal(read_mask(save(OBJECT * np.uint16(65535), tmp_path / "m.png")), OBJECT)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8), tmp_path / "photo.png")


def test_support(photo: Path, tmp_path: Path) -> None:
    support = read_support(photo, save(OBJECT * np.uint8(255), tmp_path / "m.png"))
    assert support.photo.size == (30, 20)
    assert np.array_equal(support.mask, OBJECT)


def test_mask_of_another_size_names_both(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"m.png is 31 x 20 .*photo.png is 30 x 20"):
        read_support(photo, save(np.ones((20, 31), np.uint8), tmp_path / "m.png"))


def test_empty_mask_is_refused(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="marks no object"):
        read_support(photo, save(np.zeros((20, 30), np.uint8), tmp_path / "m.png"))


def test_full_mask_is_a_warning(photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_support(photo, save(np.ones((20, 30), np.uint8), tmp_path / "m.png")).mask.all()
    assert "covers its whole photo" in caplog.text


def test_photo_is_turned_like_its_mask(tmp_path: Path) -> None:
    """A phone's portrait photo: stored lying, shown upright; the mask was drawn on what was shown."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    mask = np.zeros((30, 20), np.uint8)
    mask[:10] = 1
    support = read_support(tmp_path / "photo.png", save(mask, tmp_path / "m.png"))
    assert support.photo.size == (20, 30)
    assert support.photo.getpixel((19, 0)) == (255, 255, 255)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nbroken", b"just text"])
def test_a_mask_that_is_no_picture(photo: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.png").write_bytes(content)
    with pytest.raises(DataError, match=r"m\.png"):
        read_support(photo, tmp_path / "m.png")


def test_parse_support_finds_the_colon_between_two_files(tmp_path: Path) -> None:
    photo, mask = tmp_path / "a:b.jpg", tmp_path / "c:d.png"
    photo.touch()
    mask.touch()
    assert parse_support(f"{photo}:{mask}") == (photo, mask)


@pytest.mark.parametrize(
    ("text", "said"),
    [("photo.jpg", "has no colon"), ("no.jpg:nor.png", "no photo 'no.jpg' and no mask 'nor.png'")],
)
def test_parse_support_says_what_is_missing(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_support(text)
