"""The five pictures of an episode: supports, query, truth, prediction and errors, as addresses that hold the data.

Masks are those of network size, drawn on the photo in its own shape.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.common import render
from pipeline.report.again import Prediction

LONGER_SIDE = 224
"""Side of a picture, pixels."""
PLAIN = (226, 226, 222)
"""What masks are drawn on where there is no photo."""
MOST_SUPPORTS = 10


@dataclass(frozen=True)
class Picture:
    """One picture of a row of the gallery."""

    source: str
    """A data: address."""
    caption: str
    alt: str
    width: int
    height: int


def draw(
    prediction: Prediction,
    query: Image.Image,
    supports: Sequence[Image.Image],
    *,
    class_name: str,
    names: Sequence[str],
) -> tuple[Picture, ...]:
    """Draw an episode.

    Args:
        query, supports: photos of `picture_size`.
        names: of the query's and the supports' photos.
    """
    outlined = [
        render.overlay(photo, resized(mask, photo.size), render.BLUE)
        for photo, mask in zip(supports, prediction.support_masks, strict=True)
    ]
    support = _mosaic(outlined) if len(outlined) > 1 else outlined[0]
    several = f"{len(outlined)} supports" if len(outlined) > 1 else "support"
    truth, answer = (resized(mask, query.size) for mask in (prediction.truth, prediction.mask))
    hidden = None if prediction.ignore is None else resized(prediction.ignore, query.size)
    hit, false, missed = (
        int(pixels.sum())
        for pixels in (
            prediction.truth & prediction.mask,
            ~prediction.truth & prediction.mask,
            prediction.truth & ~prediction.mask,
        )
    )
    return (
        _picture(support, several, f"{several} of class {class_name}, object outlined: {', '.join(names[1:])}"),
        _picture(query, "query", f"query photo {names[0]}"),
        _picture(render.overlay(query, truth, render.TRUTH), "truth", f"true mask of class {class_name} in {names[0]}"),
        _picture(render.overlay(query, answer, render.PREDICTION), "prediction", f"predicted mask of {class_name}"),
        _picture(
            render.error_map(query, answer, truth, hidden),
            "errors",
            f"error map: {hit:,} pixels true positive, {false:,} false positive, {missed:,} false negative",
        ),
    )


def picture_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of the picture of a photo."""
    scale = LONGER_SIDE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask at the (width, height) of a picture: smooth, cut at one half. To look at, not to count."""
    grey = Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).resize(size, Image.Resampling.BILINEAR)
    inside: NDArray[np.bool_] = np.asarray(grey) >= 128
    return inside


def _mosaic(pictures: Sequence[Image.Image]) -> Image.Image:
    """Several supports as one picture of the usual size."""
    shown = pictures[:MOST_SUPPORTS]
    columns = 2 if len(shown) <= 4 else 3
    side = LONGER_SIDE // columns
    lines = -(-len(shown) // columns)
    paper = Image.new("RGB", (columns * side, lines * side), PLAIN)
    for number, picture in enumerate(shown):
        small = picture.copy()
        small.thumbnail((side - 2, side - 2), Image.Resampling.LANCZOS)
        x, y = number % columns * side, number // columns * side
        paper.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
    return paper


def _picture(image: Image.Image, caption: str, alt: str) -> Picture:
    """WebP where Pillow has it, else JPEG."""
    from PIL import features

    stream = io.BytesIO()
    webp = features.check("webp")
    if webp:
        image.save(stream, "WEBP", quality=82, method=6)
    else:
        image.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(f"data:image/{'webp' if webp else 'jpeg'};base64,{data}", caption, alt, image.width, image.height)
