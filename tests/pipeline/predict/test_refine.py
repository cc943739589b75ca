"""Refinement: coarse answers of photos whose edges are known."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.refine import boundary_f, boundary_iou, iou
from hsnet.errors import ShapeError
from pipeline.predict.refine import linear_model, refine, refine_strips, upsample


def scene(height: int = 120, width: int = 160) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A red ellipse on green with grain; its mask; and the margin of a coarse grid that knows its shares."""
    y, x = np.mgrid[:height, :width]
    mask = ((y - 0.55 * height) / (0.3 * height)) ** 2 + ((x - 0.45 * width) / (0.25 * width)) ** 2 < 1
    colours = np.where(mask[..., None], (190, 60, 50), (70, 140, 60)) + np.random.default_rng(0).normal(
        0, 8, (*mask.shape, 3)
    )
    shares = F.adaptive_avg_pool2d(torch.from_numpy(mask.astype(np.float32))[None], (10, 10))[0].numpy()
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8)), mask, shares - np.float32(0.5)


def plain(margin: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return F.interpolate(torch.from_numpy(margin)[None, None], size, mode="bilinear")[0, 0].numpy() > 0


@pytest.mark.parametrize(("size", "working"), [((120, 160), 256), ((360, 480), 120)], ids=["doubled", "guided"])
def test_the_mask_follows_the_photos_edge(size, working):
    photo, mask, margin = scene(*size)
    refined = refine(margin, photo, working_side=working)
    assert refined.shape == size
    assert refined.dtype == np.float32
    assert boundary_iou(refined > 0, mask) > 0.9
    assert boundary_iou(plain(margin, size), mask) < 0.5
    assert iou(refined > 0, mask) > 0.98


def test_a_plain_photo_gives_a_smooth_map_like_the_resized():
    _, mask, margin = scene()
    grey = Image.new("RGB", (160, 120), (90, 90, 90))
    refined = refine(margin, grey)
    assert iou(refined > 0, plain(margin, mask.shape)) > 0.93


@pytest.mark.parametrize("working", [256, 40])
def test_a_constant_stays_constant_and_the_unit_is_the_margins(working):
    photo, _, margin = scene()
    assert refine(np.full((7, 9), -1.5, np.float32), photo, working_side=working) == pytest.approx(-1.5, abs=1e-4)
    one, ten = refine(margin, photo, working_side=working), refine(10 * margin, photo, working_side=working)
    assert ten == pytest.approx(10 * one, abs=1e-3)


def test_doublings_stay_within_what_was_said():
    photo, _, margin = scene()
    guide = torch.from_numpy(np.asarray(photo, np.float32) / 255).permute(2, 0, 1)
    fine = upsample(torch.from_numpy(margin), guide)
    assert margin.min() - 1e-6 <= fine.min()
    assert fine.max() <= margin.max() + 1e-6


def test_the_guided_filter_is_the_regression_of_each_window():
    """Against numpy's least squares, with the penalty as further rows, at a place away from the edges."""
    generator = np.random.default_rng(3)
    guide, values = generator.random((3, 9, 9)), generator.random((9, 9))
    slope, offset = linear_model(torch.from_numpy(guide).float(), torch.from_numpy(values).float(), 1, 0.01)
    solved = []
    for y in range(3, 6):
        for x in range(3, 6):
            colours = guide[:, y - 1 : y + 2, x - 1 : x + 2].reshape(3, 9).T
            rows = np.vstack([np.c_[colours, np.ones(9)], np.c_[np.sqrt(9 * 0.01) * np.eye(3), np.zeros(3)]])
            wanted = np.r_[values[y - 1 : y + 2, x - 1 : x + 2].ravel(), np.zeros(3)]
            solved.append(np.linalg.lstsq(rows, wanted, rcond=None)[0])
    assert [*slope[:, 4, 4].tolist(), offset[4, 4].item()] == pytest.approx(np.mean(solved, 0), rel=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (300, 2), (5, 7)])
def test_odd_sizes_of_photos(size):
    pixels = np.random.default_rng(1).integers(0, 255, (*size, 3), np.uint8)
    refined = refine(np.ones((4, 6), np.float32), pixels, working_side=50)
    assert refined == pytest.approx(np.ones(size), abs=1e-4)


def test_arrays_pictures_and_strips_give_the_same(monkeypatch):
    photo, _, margin = scene()
    whole = refine(margin, photo, working_side=64)
    assert (refine(margin, np.asarray(photo), working_side=64) == whole).all()
    assert refine(margin, photo.convert("RGBA"), working_side=64) == pytest.approx(whole)
    monkeypatch.setattr("pipeline.predict.refine.STRIP_PIXELS", 160 * 7)
    parts = list(refine_strips(margin, photo, working_side=64))
    assert [rows.start for rows, _ in parts] == list(range(0, 120, 7))
    assert np.concatenate([part for _, part in parts]) == pytest.approx(whole, abs=1e-6)


def test_a_large_photo_takes_no_more_memory_than_strips():
    """Three megapixels, of which none but the strips become numbers."""
    photo = np.zeros((1500, 2000, 3), np.uint8)
    photo[:, 900:] = 200
    margin = np.tile(np.linspace(-1, 1.2, 16, dtype=np.float32), (12, 1))
    tracemalloc.start()
    seen = 0
    for rows, part in refine_strips(margin, photo):
        assert ((part > 0)[:, 950:]).all()
        seen += rows.stop - rows.start
    peak = tracemalloc.get_traced_memory()[1]  # numpy's; torch's tensors are as large as the strips'
    tracemalloc.stop()
    assert seen == 1500
    assert peak < 20_000_000


def test_bad_input():
    photo, _, margin = scene()
    for bad in (margin[0], margin[:0], np.where(margin > 0, np.nan, margin)):
        with pytest.raises(ShapeError, match=r"\(h, w\) of finite numbers"):
            refine(bad, photo)
    with pytest.raises(ShapeError, match=r"\(120, 160\) of uint8"):
        refine(margin, np.asarray(photo)[..., 0])


def test_boundary_scores_of_shifted_squares():
    one, other = np.zeros((100, 100), bool), np.zeros((100, 100), bool)
    one[20:60, 20:60] = True
    other[20:60, 23:63] = True
    assert boundary_iou(one, one) == boundary_f(one, one) == iou(one, one) == 1
    assert iou(one, other) == pytest.approx(37 / 43)
    # within 1 pixel: the top and bottom rows where they overlap
    assert boundary_iou(one, other) == pytest.approx(2 * 37 / (2 * (4 * 39) - 2 * 37))
    assert 0.4 < boundary_f(one, other) < 0.7
    assert boundary_iou(one, np.zeros_like(one)) == boundary_f(one, np.zeros_like(one)) == 0
