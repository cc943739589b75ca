"""A user's own support: a photo and a mask drawn in some other program, read with care.

What counts as the object in a mask file (`read_mask`):

- a 0/1 or two-valued mask: everything that is not 0;
- a grey mask with values above 90 other than 255 (soft edges, JPEG): values of 128 and above;
- class numbers (PASCAL VOC and the like: values of at most 90, or a palette): everything that is not 0; 255 beside
  them is VOC's boundary and is left out;
- a coloured mask: the brightest of the three channels decides, by the rules above; a fully plain picture with a
  transparency channel: the opaque part.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.images import open_image, read_photo, require_same_size

log = logging.getLogger(__name__)

_HIGHEST_CLASS = 90  # COCO's category numbers end there
_BOUNDARY = 255


@dataclass(frozen=True)
class AnnotatedPhoto:
    """A photo (RGB, turned by its EXIF tag unless the mask was drawn unturned) and its mask (H, W) bool."""

    photo: Image.Image
    mask: NDArray[np.bool_]


def parse_support(text: str) -> tuple[Path, Path]:
    """Split `PHOTO:MASK` into two existing files.

    File names may hold colons: the last colon that leaves a file on both sides is taken.

    Raises:
        ConfigError: there is no such colon; says which of the two files is missing.
    """
    cuts = [position for position, letter in enumerate(text) if letter == ":"][::-1]
    if not cuts:
        raise ConfigError(f"--support '{text}' has no colon; give a photo and its mask as PHOTO.jpg:MASK.png")
    for cut in cuts:
        photo, mask = Path(text[:cut]), Path(text[cut + 1 :])
        if photo.is_file() and mask.is_file():
            return photo, mask
    photo, mask = Path(text[: cuts[0]]), Path(text[cuts[0] + 1 :])
    missing = [f"{what} '{path}'" for what, path in (("photo", photo), ("mask", mask)) if not path.is_file()]
    raise ConfigError(f"--support '{text}': there is no {' and no '.join(missing)}; give PHOTO.jpg:MASK.png")


def read_support(photo_path: Path, mask_path: Path) -> AnnotatedPhoto:
    """Read a support and check that it can guide a prediction.

    A mask that covers the whole photo is allowed with a warning: it says nothing of where the object ends.

    Raises:
        DataError: a file cannot be read; the mask has another size than the photo, or marks nothing.
    """
    mask = read_mask(mask_path)
    photo = read_photo(photo_path, (mask.shape[0], mask.shape[1]))
    require_same_size(photo_path, (photo.height, photo.width), mask_path, (mask.shape[0], mask.shape[1]))
    if not mask.any():
        raise DataError(f"The support mask {mask_path} marks no object: all its pixels count as background")
    if mask.all():
        log.warning("The support mask %s covers its whole photo: everything in it counts as object", mask_path)
    return AnnotatedPhoto(photo, mask)


def read_mask(path: Path) -> NDArray[np.bool_]:
    """(H, W) bool, True on the object, by the rules at the top of this file.

    Raises:
        DataError: the file is missing or no picture.
    """
    with open_image(path) as picture:
        values = _values(picture)
        palette = picture.mode == "P"

    used = np.unique(values)
    used = used[used > 0]
    if len(used) < 2:
        return values > 0
    others = used[used != _BOUNDARY]
    # A boundary is a thin line around a larger object; where 255 covers more than the rest, it is the object itself
    # and the rest its soft edge.
    boundary = (values == _BOUNDARY).sum() <= ((values > 0) & (values != _BOUNDARY)).sum()
    if palette or (others[-1] <= _HIGHEST_CLASS and boundary):
        if _BOUNDARY in used:
            log.warning("%s: values %s taken as the object, 255 as its boundary", path, _few(others))
        elif len(others) > 1:
            log.warning("%s holds several values %s: all of them taken as one object", path, _few(others))
        return (values > 0) & (values != _BOUNDARY)
    # Soft edges and JPEG noise: cut half way. 16-bit masks have their own half.
    return values >= (128 if used[-1] <= 255 else 32768)


def _values(picture: Image.Image) -> NDArray[np.int64]:
    """One integer per pixel, (H, W)."""
    if picture.mode in ("LA", "RGBA", "PA"):
        layers = np.asarray(picture.convert("RGBA"), np.int64)
        colour, alpha = layers[..., :3].max(axis=2), layers[..., 3]
        # Programs that export a cut-out give one plain colour and put the object into the transparency.
        cut_out = colour.min() == colour.max() and alpha.min() < alpha.max()
        return alpha if cut_out else colour * (alpha >= 128)
    if picture.mode in ("RGB", "CMYK", "YCbCr", "HSV", "LAB"):
        return np.asarray(picture.convert("RGB"), np.int64).max(axis=2)
    return np.asarray(picture).astype(np.int64)


def _few(values: NDArray[np.int64]) -> str:
    return ", ".join(map(str, values[:5].tolist())) + (", ..." if len(values) > 5 else "")
