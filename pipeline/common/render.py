"""Pictures of masks: overlays, error maps, and captioned sheets of panels. Pillow and numpy only.

Masks are bool or 0/1 arrays (H, W) of the very size of the photo they are drawn on; another size is an error
here, because resizing silently would hide a bug in whoever made the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from hsnet.errors import ShapeError

Colour = tuple[int, int, int]

# Okabe and Ito's palette: told apart by the colour-blind as well.
GREEN: Colour = (0, 158, 115)
VERMILION: Colour = (213, 94, 0)
BLUE: Colour = (0, 114, 178)

TRUTH, PREDICTION = GREEN, VERMILION
HIT, FALSE_ALARM, MISS = GREEN, VERMILION, BLUE
ERROR_LEGEND: tuple[tuple[str, Colour], ...] = (("hit", HIT), ("false alarm", FALSE_ALARM), ("missed", MISS))

_PAPER: Colour = (255, 255, 255)
_INK: Colour = (38, 38, 38)
_MARGIN = 10


def overlay(
    photo: Image.Image, mask: NDArray[np.generic], colour: Colour = PREDICTION, *, opacity: float = 0.4
) -> Image.Image:
    """Tint the object and draw a line around it.

    Args:
        photo: any mode, (H, W); drawn as RGB.
        mask: (H, W), non-zero = object.
        colour: of the tint and of the line.
        opacity: of the tint, 0 to 1. The line is always solid.

    Returns:
        RGB image of the photo's size. The line lies inside the object, with a thin white one outside it so
        that it shows on any background; its width grows with the photo.
    """
    inside = _as_bool(mask, photo)
    out = np.array(photo.convert("RGB"))
    _tint(out, inside, colour, opacity)
    width = max(1, round(min(photo.size) / 350))
    out[_band(inside, width) & ~inside] = 255
    out[_band(inside, 2 * width) & inside] = colour
    return Image.fromarray(out)


def error_map(
    photo: Image.Image,
    prediction: NDArray[np.generic],
    truth: NDArray[np.generic],
    ignore: NDArray[np.generic] | None = None,
) -> Image.Image:
    """Colour every pixel by what became of it: hit, false alarm, missed (see `ERROR_LEGEND`).

    Args:
        photo: any mode, (H, W); shown in pale grey so that only the errors have colour.
        prediction, truth: (H, W), non-zero = object.
        ignore: (H, W), non-zero = not counted; such pixels stay grey, as evaluation leaves them out.
    """
    said, true = _as_bool(prediction, photo), _as_bool(truth, photo)
    counted = np.ones_like(said) if ignore is None else ~_as_bool(ignore, photo)
    grey = np.asarray(photo.convert("L"), np.float32)[..., None].repeat(3, axis=2)
    out = (0.6 * grey + 0.4 * 255).astype(np.uint8)
    for region, colour in ((said & true, HIT), (said & ~true, FALSE_ALARM), (~said & true, MISS)):
        _tint(out, region & counted, colour, 0.65)
    return Image.fromarray(out)


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet, with the line of text under it ("" for none)."""

    image: Image.Image
    caption: str = ""


def masked_panel(
    photo: Image.Image,
    mask: NDArray[np.generic],
    caption: str = "",
    *,
    cell: int = 240,
    colour: Colour = PREDICTION,
) -> Panel:
    """An overlay drawn at the size it will have in a sheet, so that its line is crisp on small photos.

    The mask is resized smoothly and cut at one half: for looking at, not for counting pixels.
    """
    inside = _as_bool(mask, photo)
    size = _fit(photo.size, cell)
    small = Image.fromarray(inside.astype(np.uint8) * np.uint8(255)).resize(size, Image.Resampling.BILINEAR)
    shown = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return Panel(overlay(shown, np.asarray(small) >= 128, colour), caption)


def sheet(
    rows: Sequence[Sequence[Panel]],
    *,
    cell: int = 240,
    title: str = "",
    legend: Sequence[tuple[str, Colour]] = (),
) -> Image.Image:
    """Lay panels out in rows on white paper; a strip support | query | truth | prediction is one row.

    Args:
        rows: panels from left to right; rows may differ in length. Pictures are scaled to fit `cell`, keeping
            their aspect ratio, and centred.
        cell: side of a picture's place, pixels.
        title: one line on top.
        legend: names and colours, shown as swatches at the bottom.
    """
    if not rows or not any(rows):
        raise ShapeError("a sheet needs at least one panel")
    font, small = _font(max(12, cell // 13)), _font(max(11, cell // 17))
    text_height = _line_height(small)
    # The captions' band only where a row has captions: sheets of bare pictures stay tight.
    bands = [text_height + 6 if any(panel.caption for panel in row) else 0 for row in rows]
    top = _MARGIN + (_line_height(font) + _MARGIN if title else 0)
    bottom = _line_height(small) + _MARGIN if legend else 0
    columns = max(len(row) for row in rows)
    size = (
        _MARGIN + columns * (cell + _MARGIN),
        top + sum(cell + band + _MARGIN for band in bands) + bottom,
    )
    paper = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(paper)
    if title:
        draw.text((_MARGIN, _MARGIN), _shorten(draw, title, font, size[0] - 2 * _MARGIN), _INK, font)

    y = top
    for row, band in zip(rows, bands, strict=True):
        for column, panel in enumerate(row):
            x = _MARGIN + column * (cell + _MARGIN)
            picture = panel.image.convert("RGB")
            if picture.size != _fit(picture.size, cell):
                picture = picture.resize(_fit(picture.size, cell), Image.Resampling.LANCZOS)
            paper.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2))
            if panel.caption:
                text = _shorten(draw, panel.caption, small, cell)
                draw.text((x + cell / 2, y + cell + 4), text, _INK, small, anchor="ma")
        y += cell + band + _MARGIN

    x = _MARGIN
    for name, colour in legend:
        side = text_height - 4
        draw.rectangle((x, y + 2, x + side, y + 2 + side), fill=colour)
        draw.text((x + side + 6, y), name, _INK, small)
        x += side + 6 + round(draw.textlength(name, small)) + 2 * _MARGIN
    return paper


def strip(
    support: tuple[Image.Image, NDArray[np.generic]],
    query: Image.Image,
    prediction: NDArray[np.generic],
    truth: NDArray[np.generic] | None = None,
    *,
    captions: tuple[str, str, str, str] = ("support", "query", "truth", "prediction"),
    cell: int = 240,
) -> list[Panel]:
    """The usual row of a sheet: support with its mask, query, truth (left out when None), prediction."""
    photo, mask = support
    row = [masked_panel(photo, mask, captions[0], cell=cell, colour=BLUE), Panel(query, captions[1])]
    if truth is not None:
        row.append(masked_panel(query, truth, captions[2], cell=cell, colour=TRUTH))
    return [*row, masked_panel(query, prediction, captions[3], cell=cell, colour=PREDICTION)]


def _as_bool(mask: NDArray[np.generic], photo: Image.Image) -> NDArray[np.bool_]:
    """(H, W) bool of the photo's size, or an error with both sizes."""
    mask = np.asarray(mask)
    if mask.shape != (photo.height, photo.width):
        raise ShapeError(
            f"a mask of shape {mask.shape} does not fit a photo of {photo.height} rows x {photo.width} "
            "columns; bring both to the same size first"
        )
    return mask != 0


def _tint(pixels: NDArray[np.uint8], region: NDArray[np.bool_], colour: Colour, opacity: float) -> None:
    """Mix the colour into the region, in place. Only the region becomes float: photos can be large."""
    inside = pixels[region].astype(np.float32)
    pixels[region] = np.rint(inside + opacity * (np.asarray(colour, np.float32) - inside)).astype(np.uint8)


def _band(inside: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Pixels within `radius` of the object's edge, on both sides of it. The frame of the photo is no edge."""
    # A box blur is 0 or 255 wherever its window sees one side only; its cost does not grow with the radius.
    blurred = np.asarray(Image.fromarray(inside.astype(np.uint8) * np.uint8(255)).filter(ImageFilter.BoxBlur(radius)))
    return (blurred > 0) & (blurred < 255)


def _fit(size: tuple[int, int], cell: int) -> tuple[int, int]:
    """(width, height) scaled so that the longer side is `cell`."""
    scale = cell / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # ships inside Pillow: the same letters on every machine


def _line_height(font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    return round(font.getbbox("Ágj|")[3]) + 4


def _shorten(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float
) -> str:
    """The text, its middle replaced by "…" when it is wider than `width` pixels; one line in any case."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if draw.textlength(text, font) <= width:
        return text
    for keep in range(len(text) - 1, 1, -1):
        short = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
        if draw.textlength(short, font) <= width:
            return short
    return "…"
