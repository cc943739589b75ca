"""Photos and masks of every odd kind, and the published resizing."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from hsnet.errors import ConfigError, DataError, ShapeError
from pipeline.datasets import images
from pipeline.datasets.images import (
    class_label,
    image_size,
    network_image,
    object_pixels,
    photo_size,
    read_binary_mask,
    read_image,
    read_index_mask,
    read_photo,
    require_same_size,
    resize_label,
)

ORIENTATION = 274


@pytest.fixture(scope="module")
def h_data(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "h_data.npz") as file:
        return dict(file)


def gradient(height: int = 12, width: int = 20) -> np.ndarray:
    """An image in which no two halves look the same: (H, W, 3) uint8."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 40)], 2).astype(np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one byte of pixels."""
    chunks = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


# --- the published resizing -------------------------------------------------------------------------------------


def test_network_image_equals_the_published_transform(h_data):
    image = Image.fromarray(h_data["transform/img_u8"])
    # Bit for bit: same uint8 after Pillow's resize, then the same three float32 operations.
    np.testing.assert_array_equal(network_image(image, 40), h_data["transform/out_40"])


def test_network_image_wants_rgb():
    with pytest.raises(ShapeError, match="mode 'L'"):
        network_image(Image.new("L", (4, 4)), 4)


@pytest.mark.parametrize(
    "sizes", ["375to400", "500to400", "333to400", "37to40", "53to40", "480to400", "640to400", "224to400", "401to400"]
)
def test_resize_label_takes_the_published_rows(h_data, sizes):
    source, target = (int(text) for text in sizes.split("to"))
    label = np.arange(source, dtype=np.uint16)[:, None].repeat(3, 1)
    np.testing.assert_array_equal(resize_label(label, (target, 3))[:, 0], h_data[f"nearest_idx/{sizes}"])


@pytest.mark.parametrize(("size", "target"), [((30, 44), (32, 32)), ((375, 500), (400, 400)), ((5, 7), (11, 3))])
def test_resize_label_equals_interpolate(size, target):
    label = np.random.RandomState(0).randint(0, 255, size).astype(np.uint8)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(label)[None, None].float(), target, mode="nearest")
    np.testing.assert_array_equal(resize_label(label, target), wanted[0, 0].numpy())


# --- photos -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr", "I;16"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("photo.tif" if mode in ("CMYK", "YCbCr") else "photo.png")
    rgb = Image.fromarray(gradient())
    if mode == "I;16":
        Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257).save(path)
        wanted = np.asarray(rgb.convert("L").convert("RGB"))
    else:
        rgb.convert(mode).save(path)
        wanted = np.asarray(rgb.convert(mode).convert("RGB"))
    image = read_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), wanted)


def test_16_bit_white_is_white(tmp_path):
    Image.fromarray(np.array([[0, 65535, 32768]], np.uint16)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.png"))[0, :, 0], [0, 255, 128])


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red, green, blue = np.asarray(read_image(tmp_path / "red.jpg"))[8, 8].tolist()
    assert red > 240
    assert max(green, blue) < 15


def test_alpha_is_dropped(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (10, 20, 30)


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(gradient()).convert("P")
    image.save(tmp_path / "x.png", transparency=bytes(range(256)))
    assert read_image(tmp_path / "x.png").mode == "RGB"


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif: floating-point"):
        read_image(tmp_path / "x.tif")


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg is missing"):
        read_image(tmp_path / "gone.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.jpg cannot be read as an image"):
        read_image(tmp_path / "text.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.jpg"):
        read_image(tmp_path / "empty.jpg")
    with pytest.raises(DataError):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_truncated_files_are_errors(tmp_path, suffix, share):
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3)).astype(np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=path.name):
        read_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_600, 20_000])
def test_decompression_bombs_are_refused(tmp_path, side):
    # Pillow warns from 89 Mpx (9,600 squared is 92) and refuses only twice that.
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    for read in (read_image, read_photo, read_index_mask, read_binary_mask, image_size):
        with pytest.raises(DataError, match=r"bomb\.png.*pixels"):
            read(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels_can_be_raised(tmp_path, monkeypatch):
    """And Pillow's warning, with its line of source, is never shown."""
    Image.new("L", (400, 300)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # Pillow refuses from 100,000 on
    with pytest.raises(DataError, match=r"120000 pixels.*raise the limit with HSNET_MAX_MEGAPIXELS"):
        image_size(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)
    with pytest.raises(DataError, match=r"raise the limit: HSNET_MAX_MEGAPIXELS=1"):
        image_size(tmp_path / "x.png")
    monkeypatch.setenv("HSNET_MAX_MEGAPIXELS", "0.11")
    with pytest.raises(DataError, match="more than the limit of 110000"):
        image_size(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    monkeypatch.setenv("HSNET_MAX_MEGAPIXELS", "0.5")
    assert image_size(tmp_path / "x.png") == (300, 400)
    assert read_photo(tmp_path / "x.png").size == (400, 300)
    monkeypatch.setenv("HSNET_MAX_MEGAPIXELS", "many")
    with pytest.raises(ConfigError, match="HSNET_MAX_MEGAPIXELS is 'many'"):
        image_size(tmp_path / "x.png")
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\nfrom pipeline.datasets.images import image_size\n"
        f"from PIL import Image\nImage.MAX_IMAGE_PIXELS = 80_000\nimage_size(Path({str(tmp_path / 'x.png')!r}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HSNET_MAX_MEGAPIXELS"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stderr
    assert "DataError" in shown
    assert "DecompressionBombWarning" not in shown


def test_12_bits_in_16_are_scaled_by_12_bits(tmp_path, caplog):
    """As cameras write them: by 16 bits they would be nearly black."""
    caplog.set_level("INFO", logger="pipeline")
    Image.fromarray(np.array([[0, 2048, 4095]], np.uint16)).save(tmp_path / "a.tif")
    Image.fromarray(np.array([[0, 2048, 4096]], np.uint16)).save(tmp_path / "b.tif")
    Image.fromarray(np.array([[0, 100, 255]], np.uint16)).save(tmp_path / "c.tif")
    assert np.asarray(read_photo(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(read_photo(tmp_path / "b.tif"))[0, :, 0].tolist() == [0, 8, 16]
    assert np.asarray(read_photo(tmp_path / "c.tif"))[0, :, 0].tolist() == [0, 0, 1]
    read_image(tmp_path / "a.tif")
    assert caplog.text.count("are taken as 12 bits, 4095 being white") == 1, "once per folder"


def test_photos_of_phones(tmp_path, monkeypatch):
    pixels = np.arange(20 * 30 * 3, dtype=np.uint32).reshape(20, 30, 3) % 251
    picture = Image.fromarray(pixels.astype(np.uint8))
    if features.check("avif"):
        assert ".avif" in images.PHOTO_SUFFIXES
        picture.save(tmp_path / "x.avif")
        assert read_photo(tmp_path / "x.avif").size == (30, 20)
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(80))
    monkeypatch.setattr(images, "has_heic", False)
    with pytest.raises(DataError, match=r"phone\.heic cannot be read.*pip install 'hsnet-pipeline\[heic\]'"):
        read_photo(tmp_path / "phone.heic")
    monkeypatch.undo()
    pytest.importorskip("pillow_heif", reason="HEIC needs the extra heic")
    assert ".heic" in images.PHOTO_SUFFIXES
    picture.save(tmp_path / "y.heic", quality=95)
    assert read_photo(tmp_path / "y.heic").size == (30, 20)


def test_postscript_is_not_opened(tmp_path):
    # Decoding it would start Ghostscript; the header alone is enough for Pillow to take it for an image.
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    for read in (read_image, image_size):
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path / "x.jpg")


# --- EXIF rotation ----------------------------------------------------------------------------------------------


def rotated(path: Path, orientation: int, size: tuple[int, int] = (12, 20)) -> np.ndarray:
    """Saves a photo with an EXIF orientation; returns its stored pixels."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(gradient(*size)).save(path, exif=exif)
    return np.asarray(read_image(path))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_own_photos_are_turned_as_viewers_show_them(tmp_path, orientation):
    path = tmp_path / "x.png"
    stored = rotated(path, orientation)
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(np.asarray(read_photo(path)), turn(stored))
    assert photo_size(path) == turn(stored).shape[:2]


def test_published_photos_are_never_turned(tmp_path):
    np.testing.assert_array_equal(rotated(tmp_path / "x.png", 6), gradient())


def test_the_mask_decides_whether_a_photo_is_turned(tmp_path):
    path = tmp_path / "x.png"
    stored = rotated(path, 6)
    np.testing.assert_array_equal(np.asarray(read_photo(path, (12, 20))), stored)
    assert read_photo(path, (20, 12)).size == (12, 20)
    assert photo_size(path, (12, 20)) == (12, 20)
    with pytest.raises(DataError, match=r"20 x 12.*12 x 20 as its EXIF rotation.*mask is 5 x 5"):
        read_photo(path, (5, 5))


@pytest.mark.parametrize(("orientation", "size"), [(3, (12, 20)), (6, (16, 16))])
def test_a_turn_that_keeps_the_size_is_made(tmp_path, orientation, size):
    path = tmp_path / "x.png"
    stored = rotated(path, orientation, size)
    assert not np.array_equal(np.asarray(read_photo(path, size)), stored)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_lose_the_photo(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(gradient()).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    (tmp_path / "x.jpg").write_bytes(buffer.getvalue())
    assert read_photo(tmp_path / "x.jpg").size == (20, 12)


# --- masks ------------------------------------------------------------------------------------------------------


def save_mask(path: Path, values: np.ndarray, mode: str = "L") -> Path:
    image = Image.fromarray(values)
    if mode == "P":
        image = Image.fromarray(values, "L").convert("P")
        image.putdata(values.ravel().tolist())
        image.putpalette([value for i in range(256) for value in (255 - i, i // 2, i)])
    image.save(path)
    return path


def test_index_masks_give_their_numbers(tmp_path):
    values = np.array([[0, 1, 20], [255, 7, 0]], np.uint8)
    np.testing.assert_array_equal(read_index_mask(save_mask(tmp_path / "l.png", values)), values)
    np.testing.assert_array_equal(read_index_mask(save_mask(tmp_path / "p.png", values, "P")), values)
    np.testing.assert_array_equal(
        read_index_mask(save_mask(tmp_path / "rgb.png", values[..., None].repeat(3, 2))), values
    )
    wide = values.astype(np.uint16) * 257
    np.testing.assert_array_equal(read_index_mask(save_mask(tmp_path / "w.png", wide)), wide)
    bits = Image.fromarray(values > 5)
    bits.save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_index_mask(tmp_path / "b.png"), values > 5)


def test_coloured_index_masks_are_refused(tmp_path):
    path = save_mask(tmp_path / "x.png", gradient())
    with pytest.raises(DataError, match=r"x\.png: a mask must hold one class number.*mode 'RGB'"):
        read_index_mask(path)


def test_binary_masks_from_128_on(tmp_path):
    values = np.array([[0, 127, 128, 255]], np.uint8)
    np.testing.assert_array_equal(read_binary_mask(save_mask(tmp_path / "x.png", values)), [[0, 0, 1, 1]])
    np.testing.assert_array_equal(
        read_binary_mask(save_mask(tmp_path / "c.png", values[..., None].repeat(3, 2))), [[0, 0, 1, 1]]
    )


@pytest.mark.parametrize("value", [1, 38, 127])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_single_low_value_is_the_object(tmp_path, value, dtype):
    path = save_mask(tmp_path / "x.png", np.array([[0, value], [0, 0]], dtype))
    np.testing.assert_array_equal(read_binary_mask(path), [[0, 1], [0, 0]])


def test_16_bit_binary_mask(tmp_path):
    path = save_mask(tmp_path / "x.png", np.array([[0, 65535]], np.uint16))
    np.testing.assert_array_equal(read_binary_mask(path), [[0, 1]])


def test_an_empty_binary_mask_is_empty(tmp_path):
    assert not read_binary_mask(save_mask(tmp_path / "x.png", np.zeros((3, 3), np.uint8))).any()


def test_a_soft_mask_without_a_clear_object_is_refused(tmp_path):
    path = save_mask(tmp_path / "x.png", np.array([[0, 50, 100]], np.uint8))
    with pytest.raises(DataError, match=r"x\.png: cannot tell object from background.*largest 100"):
        read_binary_mask(path)


def test_class_label_keeps_known_values_and_the_ignore_label():
    mask = np.array([[0, 1, 20, 255]], np.uint8)
    label = class_label(mask, Path("m.png"), range(20), ignore=True)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, mask)
    wide = class_label(mask, Path("m.png"), [0, 19, 999], ignore=True)
    np.testing.assert_array_equal(wide, [[0, 1, 20, 65535]])


def test_class_255_wins_over_the_ignore_label_of_8_bits():
    label = class_label(np.array([[255]], np.uint8), Path("m"), [0, 254], ignore=True)
    assert label[0, 0] == 255


def test_unknown_classes_are_named():
    mask = np.array([[0, 1, 21, 21, 200]], np.uint8)
    with pytest.raises(DataError, match=r"m\.png: mask values without a class: 21 \(2 px\), 200 \(1 px\).*1 to 20"):
        class_label(mask, Path("m.png"), range(20), ignore=False)


def test_the_ignore_label_is_unknown_where_there_is_none():
    mask = np.array([[255]], np.uint8)
    with pytest.raises(DataError, match="255"):
        class_label(mask, Path("m"), range(20), ignore=False)
    label = class_label(mask, Path("m"), range(20), ignore=False, as_background=(255,))
    assert label[0, 0] == 0


def test_object_pixels_leaves_out_background_and_ignored():
    label = np.array([[0, 3, 3, 255, 1]], np.uint8)
    assert object_pixels(label, 255) == {2: 2, 0: 1}


def test_size_disagreement_names_both(tmp_path):
    with pytest.raises(DataError, match=r"m\.png is 4 x 3 .*p\.jpg is 40 x 30"):
        require_same_size(Path("p.jpg"), (30, 40), Path("m.png"), (3, 4))
