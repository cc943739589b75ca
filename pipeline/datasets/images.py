"""Reading photos and masks from files that may be anything, and bringing them to the network's size.

What happens to odd files:

    missing, truncated, not an image     DataError that names the file
    larger than 89 megapixels            DataError, before the pixels are decoded; HSNET_MAX_MEGAPIXELS raises the limit
    grey, 1-bit, palette, CMYK           converted to RGB
    alpha                                dropped; the colours under it are used
    16-bit grey                          0..65535 scaled to 0..255; 0..4095 if no value of the photo is greater, as
                                         12-bit cameras write it (said once per folder)
    floating point, LAB                  DataError
    several frames                       the first one
    EXIF rotation                        `read_image` ignores it, `read_photo` follows it

Only raster formats are opened: Pillow would start Ghostscript for a PostScript file named .jpg. HEIC needs the package
pillow-heif (extra `heic`), AVIF a Pillow that was built with it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, features

from hsnet.backbone import IMAGENET_MEAN, IMAGENET_STD
from hsnet.errors import ConfigError, DataError, ShapeError
from pipeline.datasets.index import label_dtype

HEIC = "pip install 'hsnet-pipeline[heic]'"
"""How photos of phones become readable."""
HEIC_SUFFIXES = (".heic", ".heif")
has_heic = importlib.util.find_spec("pillow_heif") is not None
if has_heic:
    importlib.import_module("pillow_heif").register_heif_opener()
_AVIF = (".avif",) if features.check("avif") else ()

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", *(["AVIF"] * bool(_AVIF)), *(["HEIF"] * has_heic))
PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"),
    *_AVIF,
    *(HEIC_SUFFIXES if has_heic else ()),
)
"""Files in a folder that count as photos; more with more decoders."""
MAX_MEGAPIXELS = "HSNET_MAX_MEGAPIXELS"
"""Environment variable: photos of more megapixels are refused."""
TWELVE_BITS = 4095
# Pillow warns at the limit at which `open_image` refuses; the warning would show through with its source line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

log = logging.getLogger(__name__)

Size = tuple[int, int]
"""(height, width) in pixels."""

# What Pillow raises on broken files, and its warnings where a caller has made them errors.
_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError, Warning,
)  # fmt: skip
_ORIENTATION_TAG = 274
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = tuple(_TRANSPOSE[tag] for tag in (5, 6, 7, 8))


def read_image(path: Path) -> Image.Image:
    """An image as RGB, its pixels as stored: EXIF rotation is ignored.

    For the published data sets: their masks were drawn on the stored pixels.

    Raises:
        DataError: missing, unreadable, too large or of a kind without a defined RGB form. Names the file.
    """
    with open_image(path) as image:
        return _rgb(image, path)


def read_photo(path: Path, mask_size: Size | None = None) -> Image.Image:
    """Somebody's own photo as RGB, rotated as its EXIF tag says, unless its mask was drawn on the stored pixels.

    Cameras and phones store pixels as the sensor lies and note the rotation; viewers and drawing tools follow it.
    So the photo is turned when there is no mask (`mask_size` None), when the mask has the turned size, and when
    turning leaves the size as it is. It is left alone when only the stored size fits the mask.

    Raises:
        DataError: as `read_image`, or the mask fits neither size.
    """
    with open_image(path) as image:
        turn = _turn(image, path, mask_size)
        rgb = _rgb(image, path)
    return rgb if turn is None else rgb.transpose(turn)


def photo_size(path: Path, mask_size: Size | None = None) -> Size:
    """(height, width) of what `read_photo` gives; reads the header only. Raises as `read_photo`."""
    with open_image(path) as image:
        turn = _turn(image, path, mask_size)
        return (image.width, image.height) if turn in _SWAPPING else (image.height, image.width)


def photo_turn(path: Path) -> Image.Transpose | None:
    """How `read_photo` turns the stored pixels when there is no mask; reads the header only."""
    with open_image(path) as image:
        return _turn(image, path, None)


def image_size(path: Path) -> Size:
    """(height, width) of the stored pixels; reads the header only."""
    with open_image(path) as image:
        return image.height, image.width


def require_same_size(path: Path, size: Size, mask_path: Path, mask_size: Size) -> None:
    """A mask of another size than its image is the mask of another image.

    Raises:
        DataError: the sizes differ. Names both files and sizes.
    """
    if size != mask_size:
        raise DataError(
            f"{mask_path} is {mask_size[1]} x {mask_size[0]} pixels (width x height), but its image {path} is "
            f"{size[1]} x {size[0]}. Put the mask that belongs to the image there, or remove the image."
        )


def same_aspect(one: Size, other: Size) -> bool:
    """Whether one (height, width) is a scaled copy of the other."""
    # Within rounding to whole pixels of the smaller of the two.
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other) / 2 if one != other else True


def network_image(
    image: Image.Image, size: int, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> np.ndarray:
    """An RGB image as network input: (3, size, size) float32, normalised with the network's mean and deviation.

    Squeezed to a square by Pillow's bilinear filter with its antialiasing; the aspect ratio is not kept. Equals
    the published transform exactly. A tensor resize without antialiasing would differ by up to 57/255.

    Source: juhongm999/hsnet @ 6b1bc12, `data/dataset.py`; golden h.
    """
    if image.mode != "RGB":
        raise ShapeError(f"network_image needs an RGB image, got mode '{image.mode}': use read_image.")
    squeezed = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    network = np.empty((3, size, size), np.float32)
    for channel, values in enumerate(_normalised(mean, std)):
        np.take(values, squeezed[..., channel], out=network[channel], mode="clip")  # "raise" would copy
    return network


@cache
def _normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """(3, 256) float32: what a pixel of each channel and value becomes. Looked up in a sixth of the time."""
    scaled = np.arange(256, dtype=np.float32)[None] / np.float32(255)
    return (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def resize_label(label: np.ndarray, size: Size) -> np.ndarray:
    """A label map (H, W) at another size, nearest by source = floor(target * in / out), in whole numbers.

    This is `F.interpolate(mode="nearest")`. Pillow's NEAREST takes pixel centres and differs on half the rows.
    """
    rows = np.arange(size[0]) * label.shape[0] // size[0]
    columns = np.arange(size[1]) * label.shape[1] // size[1]
    return np.ascontiguousarray(label[rows[:, None], columns])


def read_index_mask(path: Path) -> np.ndarray:
    """A mask whose pixel values are class numbers, as stored: (H, W) uint8 or uint16.

    Palette images give their indices, whatever the colours; colour images are taken if all channels are equal.

    Raises:
        DataError: unreadable, or coloured, so that no class number can be read from it.
    """
    with open_image(path) as image:
        if image.mode in ("L", "P"):
            return np.array(image, np.uint8)
        if image.mode == "1":
            return np.array(image).astype(np.uint8)
        if image.mode.startswith("I"):
            return _uint16(image, path)
        if image.mode in ("RGB", "RGBA", "LA"):
            channels = np.asarray(image)[..., : 1 if image.mode == "LA" else 3]
            if (channels == channels[..., :1]).all():
                return np.ascontiguousarray(channels[..., 0])
        raise DataError(
            f"{path}: a mask must hold one class number per pixel (8- or 16-bit grey or palette PNG), "
            f"this one is a colour image (mode '{image.mode}')."
        )


def read_binary_mask(path: Path) -> np.ndarray:
    """A mask of one object: (H, W) bool, true where the grey value is at least 128, as published for FSS-1000.

    Differs from the published code for masks in which nothing reaches 128: with a single other value (0/1 masks,
    palette masks) that value is the object, where the published code sees an empty mask.

    Raises:
        DataError: unreadable, or nothing reaches 128 and there are several values, so the object is a guess.
    """
    with open_image(path) as image:
        # 16 bits are clipped, as Pillow's own conversion does.
        grey = np.minimum(_uint16(image, path), 255) if _is_16_bit(image) else np.array(image.convert("L"))
    if (grey >= 128).any():
        return grey >= 128
    values = np.unique(grey[grey > 0])
    if len(values) > 1:
        raise DataError(
            f"{path}: cannot tell object from background: no pixel reaches 128 and there are {len(values)} values "
            f"above 0 (largest {values[-1]}). Save it with 0 as background and 255 as object."
        )
    return grey > 0


def class_label(
    mask: np.ndarray,
    path: Path,
    classes: Collection[int],
    *,
    ignore: bool,
    as_background: tuple[int, ...] = (),
) -> np.ndarray:
    """Checked label map of a class-number mask: 0 background, class id + 1, and the largest value for "ignore".

    Of the type `label_dtype(classes)`.

    Args:
        mask: (H, W) as `read_index_mask` gives it.
        classes: the class ids there are.
        ignore: whether the mask may mark pixels to be ignored, by 255 (unless a class has that number) or 65535.
        as_background: further values that mean background.

    Raises:
        DataError: a value is neither; names the file, the values and how many pixels have them.
    """
    dtype = label_dtype(classes)
    table = np.full(int(np.iinfo(mask.dtype).max) + 1, -1, np.int32)
    table[0] = 0
    for value in as_background:
        table[value] = 0
    if ignore:
        table[[value for value in (255, 65535) if value < len(table)]] = np.iinfo(dtype).max
    for class_id in classes:
        if class_id + 1 < len(table):
            table[class_id + 1] = class_id + 1
    label = table[mask]
    if label.min(initial=0) < 0:
        values, counts = np.unique(mask[label < 0], return_counts=True)
        odd = ", ".join(f"{v} ({n} px)" for v, n in list(zip(values, counts, strict=True))[:5])
        raise DataError(
            f"{path}: mask values without a class: {odd}. Known are 0 (background) and {_ranges(classes)}"
            f"{' and the ignore label' if ignore else ''}. Correct the mask, or declare the class."
        )
    return label.astype(dtype)


def object_pixels(label: np.ndarray, ignore_label: int) -> dict[int, int]:
    """Class id -> number of its pixels in a label map, background and ignored pixels left out."""
    counts = np.bincount(label.ravel())
    return {int(value) - 1: int(counts[value]) for value in counts.nonzero()[0] if value not in (0, ignore_label)}


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file for the length of a block. Raises DataError for whatever is wrong with it, also inside."""
    limit = _pixel_limit()
    try:
        with Image.open(path, formats=FORMATS) as image:
            # Pillow itself only warns up to twice its limit.
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels are more than the limit of {limit} (a small file can fill "
                    f"the memory this way); scale it down, or raise the limit: "
                    f"{MAX_MEGAPIXELS}={-(-image.width * image.height // 1_000_000)}"
                )
            yield image
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except _BROKEN as error:
        heic = path.suffix.lower() in HEIC_SUFFIXES and not has_heic
        hint = f" HEIC photos need a decoder: {HEIC}, or save them as JPEG." if heic else ""
        bomb = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
        if bomb and MAX_MEGAPIXELS not in str(error):
            hint = f" Scale it down, or raise the limit with {MAX_MEGAPIXELS}."
        raise DataError(f"{path} cannot be read as an image: {error or type(error).__name__}.{hint}") from error


def _pixel_limit() -> int | None:
    """The most pixels of an image; None for any. Raises ConfigError: the environment says no number."""
    text = os.environ.get(MAX_MEGAPIXELS)
    if text is None:
        return Image.MAX_IMAGE_PIXELS
    try:
        megapixels = float(text)
    except ValueError:
        megapixels = 0.0
    if not 0 < megapixels < 1e6:
        raise ConfigError(f"{MAX_MEGAPIXELS} is '{text}', must be a number of megapixels above 0, such as 150.")
    limit = int(megapixels * 1e6)
    if Image.MAX_IMAGE_PIXELS is not None and limit > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # beyond twice its own limit Pillow would refuse by itself
    return limit


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if _is_16_bit(image):
        wide = _uint16(image, path).astype(np.uint32)
        white = 65535
        if 255 < wide.max(initial=0) <= TWELVE_BITS:
            _say_twelve_bits(path.parent)
            white = TWELVE_BITS
        return Image.fromarray(((wide * 255 + white // 2) // white).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{path}: floating-point pixels have no defined white; save it with 8 or 16 bits.")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # straight to RGB, Pillow warns
    rgb = image.convert("RGB")
    rgb.load()
    return rgb


@cache
def _say_twelve_bits(folder: Path) -> None:
    """Once per folder and process."""
    log.info(
        "Note: 16-bit photos in %s with no value above %d are taken as 12 bits, %d being white.",
        folder, TWELVE_BITS, TWELVE_BITS,
    )  # fmt: skip


def _is_16_bit(image: Image.Image) -> bool:
    return image.mode.startswith("I")  # "I;16", "I;16B", and "I", which holds 16-bit PNGs in older Pillow


def _uint16(image: Image.Image, path: Path) -> np.ndarray:
    wide = np.array(image)
    if wide.min(initial=0) < 0 or wide.max(initial=0) > 65535:
        raise DataError(f"{path}: pixel values from {wide.min()} to {wide.max()} do not fit 16 bits.")
    return wide.astype(np.uint16)


def _turn(image: Image.Image, path: Path, mask_size: Size | None) -> Image.Transpose | None:
    try:
        turn = _TRANSPOSE.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a broken tag must not lose the photo; Pillow raises whatever its parser meets
        return None
    stored = (image.height, image.width)
    turned = stored[::-1] if turn in _SWAPPING else stored
    if turn is None or mask_size is None or mask_size == turned:
        return turn
    if mask_size == stored:
        return None
    raise DataError(
        f"{path} is {stored[1]} x {stored[0]} pixels (width x height), {turned[1]} x {turned[0]} as its EXIF rotation "
        f"shows it, but its mask is {mask_size[1]} x {mask_size[0]}."
    )


def _ranges(classes: Collection[int]) -> str:
    values = sorted(class_id + 1 for class_id in classes)
    if values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values[:20])) + (", ..." if len(values) > 20 else "")
