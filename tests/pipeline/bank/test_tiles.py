"""Tiles: they cover the photo, and maps of them become one map without seams."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hsnet.errors import ConfigError, ShapeError
from pipeline.bank.tiles import Tile, crops, merge_tiles, object_pixels, plan_tiles, suggest_tile

SIZES = [
    (100, 100, 40, 0.25),
    (101, 37, 40, 0.5),
    (40, 40, 40, 0.25),
    (39, 500, 40, 0.0),
    (1, 1, 7, 0.9),
    (90, 91, 1, 0),
]


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), SIZES)
def test_tiles_cover_the_photo_and_lie_in_it(height, width, tile, overlap):
    tiles = plan_tiles(height, width, tile, overlap)
    seen = np.zeros((height, width), int)
    for one in tiles:
        assert (one.height, one.width) == (min(tile, height), min(tile, width))
        assert min(one.top, one.left) >= 0
        assert one.top + one.height <= height
        assert one.left + one.width <= width
        seen[one.top : one.top + one.height, one.left : one.left + one.width] += 1
    assert seen.min() >= 1
    assert len(set(tiles)) == len(tiles)


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), SIZES)
def test_neighbours_overlap_by_what_was_asked_and_none_is_superfluous(height, width, tile, overlap):
    tops = sorted({one.top for one in plan_tiles(height, width, tile, overlap)})
    side = min(tile, height)
    steps = np.diff(tops)
    assert (steps <= max(1, side * (1 - overlap) + 1)).all()  # one: tiles lie on whole pixels
    if len(tops) > 1:
        assert (len(tops) - 2) * max(1, side * (1 - overlap)) < height - side


def test_one_tile_is_the_photo():
    assert plan_tiles(30, 20, 50) == (Tile(0, 0, 30, 20),)


def test_crops_are_the_pixels_and_are_cut_when_asked_for():
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    photo = Image.fromarray(pixels)
    tiles = plan_tiles(50, 70, 32)
    cut = crops(photo, tiles)
    for tile in tiles:
        part = pixels[tile.top : tile.top + 32, tile.left : tile.left + 32]
        assert (np.asarray(next(cut)) == part).all()
    endless = crops(photo, (tiles[0] for _ in iter(int, 1)))
    assert next(endless).size == (32, 32)


def of_tiles(height: int, width: int, tile: int, cells: int, value) -> list[tuple[Tile, np.ndarray]]:
    """Maps of tiles that read a function of the place, (y, x) in pixels."""
    found = []
    for one in plan_tiles(height, width, tile):
        y = one.top + (np.arange(cells) + 0.5) * one.height / cells
        x = one.left + (np.arange(cells) + 0.5) * one.width / cells
        found.append((one, value(y[:, None], x[None]).astype(np.float32)))
    return found


@pytest.mark.parametrize(("height", "width", "tile"), [(100, 180, 64), (64, 64, 64), (333, 70, 64), (60, 300, 64)])
@pytest.mark.parametrize(
    "value", [lambda y, x: 3.25 + 0 * y * x, lambda y, x: 0.5 * x - 0.25 * y], ids=["constant", "ramp"]
)
def test_a_constant_and_a_ramp_have_no_seams(height, width, tile, value):
    merged = merge_tiles(height, width, of_tiles(height, width, tile, 8, value))
    y = (np.arange(merged.shape[0]) + 0.5) * height / merged.shape[0]
    x = (np.arange(merged.shape[1]) + 0.5) * width / merged.shape[1]
    assert merged == pytest.approx(value(y[:, None], x[None]), abs=1e-4)


def test_one_tile_gives_its_own_map():
    answer = np.random.default_rng(2).normal(size=(9, 7)).astype(np.float32)
    merged = merge_tiles(50, 41, [(Tile(0, 0, 50, 41), answer)])
    assert merged.dtype == np.float32
    assert (merged == answer).all()


def test_tiles_that_disagree_change_over_smoothly():
    """Two tiles say 0 and 1: from one to the other without a step."""
    tiles = plan_tiles(40, 70, 40)
    assert len(tiles) == 2
    answers = [(tile, np.full((20, 20), float(number % 2), np.float32)) for number, tile in enumerate(tiles)]
    merged = merge_tiles(40, 70, answers)
    assert merged[:, :15] == pytest.approx(0)
    assert merged[:, 20:] == pytest.approx(1)
    assert (np.diff(merged, axis=1) >= 0).all()
    assert np.abs(np.diff(merged, axis=1)).max() < 0.35
    assert np.abs(np.diff(merged, axis=0)).max() < 1e-6


def test_merging_reads_tiles_one_by_one():
    held = []

    def answers():
        for tile in plan_tiles(200, 200, 40):
            held.append(tile)
            yield tile, np.ones((4, 4), np.float32)

    assert merge_tiles(200, 200, answers(), (20, 30)) == pytest.approx(np.ones((20, 30)))
    assert len(held) == len(plan_tiles(200, 200, 40))


def test_merging_refuses_gaps_and_maps_of_several_sizes():
    tiles = plan_tiles(100, 100, 40)
    ones = np.ones((4, 4), np.float32)
    with pytest.raises(ShapeError, match="leave a part of the photo"):
        merge_tiles(100, 100, [(tile, ones) for tile in tiles[:-1]])
    with pytest.raises(ShapeError, match="leave a part of the photo"):
        merge_tiles(100, 100, [])
    with pytest.raises(ShapeError, match=r"\(4, 4\) and \(5, 5\)"):
        merge_tiles(100, 100, [(tiles[0], ones), (tiles[1], np.ones((5, 5), np.float32))])


@pytest.mark.parametrize(("height", "tile", "overlap"), [(0, 4, 0.1), (4, 0, 0.1), (4, 4, 0.95), (4, 4, -0.1)])
def test_bad_sizes(height, tile, overlap):
    with pytest.raises(ConfigError):
        plan_tiles(height, 10, tile, overlap)


def box(height: int, width: int, side: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[10 : 10 + side, 20 : 20 + side] = True
    return mask


def test_pixels_that_a_network_sees_of_an_object():
    assert object_pixels(box(400, 800, 40), 100) == 10 * 5
    assert object_pixels(box(400, 800, 40), 400) == 40 * 20
    single = np.zeros((1000, 1000), bool)
    single[501, 501] = True
    assert object_pixels(single, 100) == 0


def test_a_tile_is_suggested_for_small_objects_only():
    small = [box(3000, 4000, 40)] * 5
    side = suggest_tile(small, 224)
    assert side is not None
    assert object_pixels(box(side, side, 40), 224) >= 400 * 0.95  # rounding of sides
    assert suggest_tile([box(400, 400, 200)] * 5, 224) is None
    assert suggest_tile([np.zeros((50, 50), bool)], 224) is None
    assert suggest_tile([], 224) is None


def test_a_suggested_tile_holds_the_object_and_is_not_finer_than_the_photo():
    thin = np.zeros((3000, 4000), bool)
    thin[100:900, 50:53] = True
    side = suggest_tile([thin] * 3, 224)
    assert side is not None
    assert side >= 1600
    tiny = np.zeros((2000, 2000), bool)
    tiny[5, 5] = True
    assert suggest_tile([tiny] * 5, 224) == 112
    assert suggest_tile([box(100, 100, 3)] * 5, 224) is None  # the photo is smaller than such a tile
