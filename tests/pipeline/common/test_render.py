"""Pictures: what is coloured, what is left alone, and sizes that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hsnet.errors import ShapeError
from pipeline.common import render


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.full((60, 90, 3), 120, np.uint8))


@pytest.fixture
def mask() -> np.ndarray:
    """A block of rows 20-39, columns 30-59."""
    mask = np.zeros((60, 90), bool)
    mask[20:40, 30:60] = True
    return mask


def test_overlay_tints_the_object_and_leaves_the_rest(photo: Image.Image, mask: np.ndarray) -> None:
    out = np.asarray(render.overlay(photo, mask, (200, 0, 0), opacity=0.5))
    assert out.shape == (60, 90, 3)
    assert out[30, 45].tolist() == [160, 60, 60]  # half way from grey 120 to (200, 0, 0)
    assert out[20, 45].tolist() == [200, 0, 0]  # the line, inside the object
    assert out[19, 45].tolist() == [255, 255, 255]  # and its white companion outside
    assert out[5, 5].tolist() == [120, 120, 120]


def test_overlay_of_an_empty_mask_is_the_photo(photo: Image.Image) -> None:
    out = render.overlay(photo, np.zeros((60, 90), np.uint8))
    assert np.array_equal(np.asarray(out), np.asarray(photo))


def test_overlay_draws_no_line_along_the_frame(photo: Image.Image) -> None:
    """An object that fills the photo has no edge in it."""
    out = np.asarray(render.overlay(photo, np.ones((60, 90)), (200, 0, 0), opacity=0.5))
    assert (out == [160, 60, 60]).all()


def test_overlay_does_not_change_the_photo(photo: Image.Image, mask: np.ndarray) -> None:
    before = np.array(photo)
    render.overlay(photo, mask)
    assert np.array_equal(before, np.asarray(photo))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_overlay_takes_any_mode(photo: Image.Image, mask: np.ndarray, mode: str) -> None:
    assert render.overlay(photo.convert(mode), mask).mode == "RGB"


def test_mask_of_another_size_is_an_error(photo: Image.Image) -> None:
    with pytest.raises(ShapeError, match=r"\(90, 60\).*60 rows x 90 columns"):
        render.overlay(photo, np.zeros((90, 60)))


def test_error_map_tells_hits_false_alarms_and_misses_apart(photo: Image.Image, mask: np.ndarray) -> None:
    said = np.roll(mask, 10, axis=1)  # columns 40-69
    ignore = np.zeros_like(mask)
    ignore[:25] = True
    out = np.asarray(render.error_map(photo, said, mask, ignore)).astype(int)

    def nearest(pixel: np.ndarray) -> tuple[int, int, int]:
        colours = [render.HIT, render.FALSE_ALARM, render.MISS, (174, 174, 174)]
        return min(colours, key=lambda colour: float(np.abs(pixel - colour).sum()))

    assert nearest(out[30, 35]) == render.MISS
    assert nearest(out[30, 50]) == render.HIT
    assert nearest(out[30, 65]) == render.FALSE_ALARM
    assert nearest(out[30, 5]) == (174, 174, 174)
    assert nearest(out[22, 50]) == (174, 174, 174), "ignored pixels are not counted, so not coloured"


def test_sheet_places_rows_of_different_length(photo: Image.Image, mask: np.ndarray) -> None:
    rows = [render.strip((photo, mask), photo, mask, mask, cell=100), [render.Panel(photo, "alone")]]
    out = render.sheet(rows, cell=100, title="a title", legend=render.ERROR_LEGEND)
    assert out.width == 10 + 4 * 110
    assert out.height > 2 * 110
    # The second cell of the first row holds the bare query: grey in its middle.
    assert out.getpixel((10 + 110 + 50, _first_row_middle(out))) == (120, 120, 120)


def _first_row_middle(out: Image.Image) -> int:
    """Row in the middle of the first picture of the second column: found by its colour."""
    column = np.asarray(out)[:, 10 + 110 + 50]
    grey = np.flatnonzero((column == 120).all(axis=1))
    assert 60 <= len(grey) <= 70, "90 x 60 in a cell of 100 is 100 x 67"
    return int(grey[len(grey) // 2])


def test_strip_without_truth_has_three_panels(photo: Image.Image, mask: np.ndarray) -> None:
    row = render.strip((photo, mask), photo, mask)
    assert [panel.caption for panel in row] == ["support", "query", "prediction"]


@pytest.mark.parametrize("text", ["x" * 500, "line\nbreak", "\udcff bad name", "ü€漢"])
def test_captions_of_any_text_fit(photo: Image.Image, text: str) -> None:
    plain = render.sheet([[render.Panel(photo, "x")]])
    assert render.sheet([[render.Panel(photo, text)]]).size == plain.size


def test_a_sheet_of_nothing_is_an_error() -> None:
    with pytest.raises(ShapeError, match="at least one panel"):
        render.sheet([[]])
