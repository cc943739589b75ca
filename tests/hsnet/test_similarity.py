"""Similarities without a learner, against readings with loops."""

import math

import pytest
import torch

from hsnet.errors import ShapeError
from hsnet.similarity import (
    NEAREST,
    NO_OBJECT,
    affinity,
    clear_positions,
    contrast,
    cosine_map,
    object_shares,
    positions,
)


def test_cosine_map_is_the_best_match_inside_the_object():
    pyramid = torch.zeros(1, 2, 2, 2, 1, 3)
    pyramid[0, :, 0, 0, 0] = torch.tensor([[0.2, 0.4, 0.0], [0.4, 0.0, 0.0]])
    pyramid[0, :, 1, 1, 0] = torch.tensor([0.1, 0.9, 0.9])  # outside the object
    mask = torch.tensor([[[1.0, 0.1], [0.0, 0.0]]])
    torch.testing.assert_close(cosine_map(pyramid, mask), torch.tensor([[[0.3, 0.2, 0.0]]]))
    assert cosine_map(pyramid, torch.zeros(1, 2, 2)).count_nonzero() == 0


def cosine(a, b):
    return float((a @ b) / (a.norm() * b.norm()))


def test_products_of_positions_are_the_mean_cosine_of_the_layers():
    torch.manual_seed(0)
    level = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64)
    one, other = positions([level])
    for p in range(8):
        for q in range(8):
            a, b = level[0, :, p // 4, p % 4], level[1, :, q // 4, q % 4]
            wanted = sum(cosine(x, y) for x, y in zip(a, b, strict=True)) / 3
            assert math.isclose(float(one[p] @ other[q]), wanted, abs_tol=1e-12)
    codes = (level * 30).round().to(torch.int8)
    torch.testing.assert_close(positions([codes]), positions([codes.float()]))
    torch.testing.assert_close(positions([codes]), positions([codes.double() * 7]).float())


def test_unit_features_are_not_stretched():
    weak = torch.full((1, 1, 1, 1, 4), 0.1)
    assert float(positions([weak], unit=True).norm()) == pytest.approx(0.2)
    assert float(positions([weak]).norm()) == pytest.approx(1)
    assert positions([torch.zeros(1, 2, 2, 2, 4)]).count_nonzero() == 0


def test_finer_levels_add_their_cosines_resized_on_both_sides():
    """From 3x3 to 2x2 with aligned corners, the corners stay what they are."""
    torch.manual_seed(1)
    fine, deep = torch.randn(2, 2, 3, 3, 4, dtype=torch.float64), torch.randn(2, 1, 2, 2, 6, dtype=torch.float64)
    one, other = positions([fine, deep])
    for p, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        for q, (line, place) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
            wanted = sum(cosine(fine[0, layer, row, column], fine[1, layer, line, place]) for layer in (0, 1))
            wanted += cosine(deep[0, 0, p // 2, p % 2], deep[1, 0, q // 2, q % 2])
            assert math.isclose(float(one[p] @ other[q]), wanted / 3, abs_tol=1e-12)
    with pytest.raises(ShapeError, match="Levels must be"):
        positions([torch.zeros(1, 2, 2, 4)])


def test_edges_stand_for_neither_side():
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, :, :3] = True  # the middle column of 2x3 is half object
    shares = object_shares(mask, (2, 3))
    assert shares.tolist() == [[1, 0.5, 0, 1, 0.5, 0]]
    inside, outside = clear_positions(shares)
    assert inside.tolist() == [[True, False, False, True, False, False]]
    assert outside.tolist() == [[False, False, True, False, False, True]]


@pytest.mark.parametrize(
    ("shares", "inside", "outside"),
    [
        ([0.0, 0.1, 0.3], [False, False, True], [True, False, False]),  # a small object keeps its largest share
        ([0.9, 0.6, 1.0], [True, True, True], [False, False, False]),
        ([0.9, 0.4, 1.0], [True, False, True], [False, True, False]),  # a large one leaves the smallest share
        ([0.0, 0.0, 0.0], [False, False, False], [True, True, True]),
        ([1.0, 1.0, 1.0], [True, True, True], [False, False, False]),
    ],
)
def test_small_and_large_objects(shares, inside, outside):
    found = clear_positions(torch.tensor([shares]))
    assert [side[0].tolist() for side in found] == [inside, outside]


def test_contrast_by_loops():
    torch.manual_seed(2)
    query, support = torch.randn(4, 5, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    inside, outside = torch.zeros(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)
    inside[[0, 2]], outside[[1, 4, 6, 7, 8, 9, 10]] = True, True  # of 3, 5 and 11, nobody says anything
    wanted = []
    for place in query:
        near = sum(float(place @ support[i]) for i in (0, 2)) / 2  # there are only two
        far = sorted(float(place @ support[i]) for i in (1, 4, 6, 7, 8, 9, 10))[-NEAREST:]
        wanted.append(near - sum(far) / 5)
    torch.testing.assert_close(contrast(query, support, inside, outside), torch.tensor(wanted, dtype=torch.float64))
    nothing = torch.zeros(12, dtype=torch.bool)
    assert contrast(query, support, nothing, outside).tolist() == [NO_OBJECT] * 4
    with pytest.raises(ShapeError, match="no background to compare with"):
        contrast(query, support, inside, nothing)


def test_affinity_by_loops():
    torch.manual_seed(3)
    query = torch.randn(5, 4, dtype=torch.float64)
    found = affinity(query, 0.5)
    for p in range(5):
        weights = [math.exp(float(query[p] @ query[q]) / 0.5) for q in range(5)]
        assert found[p].tolist() == pytest.approx([weight / sum(weights) for weight in weights])
