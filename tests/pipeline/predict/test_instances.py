"""Instances: components of a mask that were put there by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hsnet.errors import ConfigError, ShapeError
from pipeline.predict.instances import find_instances


def drawn() -> np.ndarray:
    """A ring with a dot in its hole, a diagonal pair, and a speck."""
    mask = np.zeros((20, 30), bool)
    mask[2:11, 3:12] = True
    mask[4:9, 5:10] = False
    mask[6, 7] = True
    mask[15, 20] = mask[16, 21] = True
    mask[19, 29] = True
    return mask


def test_components_with_area_and_box_and_holes_kept():
    ring, pair, dot, speck = find_instances(drawn())
    assert (ring.area, ring.box) == (81 - 25, (3, 2, 9, 9))
    assert not ring.mask[2:7, 2:7].any()
    assert (pair.area, pair.box) == (2, (20, 15, 2, 2))
    assert (dot.area, dot.box) == (1, (7, 6, 1, 1))
    assert (speck.area, speck.box) == (1, (29, 19, 1, 1))


def test_together_they_are_the_mask():
    mask = np.random.default_rng(1).random((40, 50)) > 0.6
    again = np.zeros_like(mask)
    for one in find_instances(mask):
        left, top, width, height = one.box
        assert not (again[top : top + height, left : left + width] & one.mask).any()
        again[top : top + height, left : left + width] |= one.mask
    assert (again == mask).all()


def test_score_is_the_mean_probability_inside():
    mask = drawn()
    soft = np.where(mask, 0.9, 0.1).astype(np.float32)
    soft[2, 3:12] = 0.5
    ring, *others = find_instances(mask, soft)
    assert ring.score == pytest.approx((9 * 0.5 + 47 * 0.9) / 56)
    assert [one.score for one in others] == pytest.approx([0.9, 0.9, 0.9])
    assert find_instances(mask)[0].score is None


@pytest.mark.parametrize(("least", "left"), [(1, 4), (2, 2), (3, 1), (57, 0)])
def test_small_ones_are_left_out(least, left):
    assert len(find_instances(drawn(), least_area=least)) == left


def test_nothing_and_everything():
    assert find_instances(np.zeros((4, 5), bool)) == ()
    (everything,) = find_instances(np.ones((4, 5), bool))
    assert (everything.area, everything.box) == (20, (0, 0, 5, 4))


def test_bad_input():
    with pytest.raises(ConfigError, match="at least 1 pixel, got 0"):
        find_instances(drawn(), least_area=0)
    with pytest.raises(ShapeError, match=r"\(H, W\) of booleans"):
        find_instances(drawn().astype(np.uint8))
    with pytest.raises(ShapeError, match=r"\(3, 3\), its mask \(20, 30\)"):
        find_instances(drawn(), np.zeros((3, 3)))
