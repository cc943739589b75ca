"""Masks -> polygons -> masks, exactly; holes, parts that touch at corners, one ring for formats without holes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from matplotlib.path import Path as Outline

from pipeline.annotations.outline import joined, polygons
from pipeline.annotations.shapes import draw_outlines
from pipeline.datasets.instances import draw_polygons

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))


def centres(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.stack([columns.ravel(), rows.ravel()], axis=1)


@settings(max_examples=150, deadline=None)
@given(masks)
def test_the_polygons_of_a_mask_fill_to_the_mask(mask: np.ndarray) -> None:
    height, width = mask.shape
    again = np.zeros_like(mask)
    for rings in polygons(mask):
        part = draw_polygons([joined(rings).ravel()], height, width)
        assert not (part & again).any(), "parts overlap"
        again |= part
    assert np.array_equal(again, mask)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_so_they_do_by_another_drawing_code(mask: np.ndarray) -> None:
    """Matplotlib's point-in-polygon test of the pixel centres, ring by ring, holes taken out."""
    points = centres(*mask.shape)
    again = np.zeros(mask.size, bool)
    for outer, *holes in polygons(mask):
        part = Outline(outer, closed=False).contains_points(points)
        for hole in holes:
            part &= ~Outline(hole, closed=False).contains_points(points)
        again |= part
    assert np.array_equal(again.reshape(mask.shape), mask)


@settings(max_examples=60, deadline=None)
@given(masks, st.integers(0, 5), st.integers(0, 5))
def test_a_part_of_a_photo_is_drawn_where_it_lies(mask: np.ndarray, left: int, top: int) -> None:
    height, width = mask.shape[0] + top + 2, mask.shape[1] + left + 1
    full = np.zeros((height, width), bool)
    full[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    again = np.zeros_like(full)
    for rings in polygons(mask, left, top):
        first, start, part = draw_outlines([joined(rings)], "file", "shape", height, width)
        assert not part.all() or part.size <= mask.size
        again[first : first + part.shape[0], start : start + part.shape[1]] |= part
    assert np.array_equal(again, full)


def test_rings_by_hand() -> None:
    """A frame of one pixel's width around a hole with an island."""
    mask = np.zeros((7, 7), bool)
    mask[1:6, 1:6] = True
    mask[2:5, 2:5] = False
    mask[3, 3] = True
    frame, island = sorted(polygons(mask, 10, 20), key=len, reverse=True)
    outer, hole = frame
    assert {tuple(point) for point in outer} == {
        (11.5, 21), (15.5, 21), (16, 21.5), (16, 25.5), (15.5, 26), (11.5, 26), (11, 25.5), (11, 21.5),
    }  # fmt: skip
    assert len(hole) == 8
    assert hole.min(axis=0).tolist() == [12, 22]
    assert hole.max(axis=0).tolist() == [15, 25]
    assert [len(ring) for ring in island] == [4]

    def area(ring: np.ndarray) -> float:
        x, y = ring.T
        return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)

    assert area(outer) > 0 > area(hole)
    assert area(joined(frame)) == pytest.approx(area(outer) + area(hole))


def test_nothing_has_no_polygons() -> None:
    assert polygons(np.zeros((4, 5), bool)) == []


def test_a_large_mask_with_hundreds_of_holes() -> None:
    rng = np.random.default_rng(1)
    mask = rng.random((150, 200)) > 0.2
    again = np.zeros_like(mask)
    for rings in polygons(mask):
        again |= draw_polygons([joined(rings).ravel()], *mask.shape)
    assert np.array_equal(again, mask)
