"""The vote over K supports."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnet.errors import ConfigError, ShapeError
from hsnet.vote import vote


@pytest.mark.parametrize("shots", [1, 2, 3, 4, 5, 10])
def test_equals_the_published_vote(golden, shots):
    stored = np.load(golden / "d_vote.npz")
    prediction = vote(torch.from_numpy(stored[f"K{shots}/votes"]))
    assert np.array_equal(prediction.numpy(), stored[f"K{shots}/pred"].astype(bool))


masks = st.tuples(st.integers(1, 10), st.integers(1, 3), st.integers(0, 2**31)).map(
    lambda t: torch.from_numpy(np.random.RandomState(t[2]).random_sample((t[0], t[1], 4, 5)) < 0.3)
)


@settings(max_examples=60, deadline=None)
@given(masks, st.booleans(), st.sampled_from(["max", "shots"]), st.sampled_from([0.25, 0.5, 0.75]))
def test_is_a_literal_reading_of_section_4_5(masks, strict, normalise, threshold):
    """Sum the predictions, divide by the maximum, compare with tau, pixel by pixel in plain Python."""
    actual = vote(masks, threshold, strict, normalise)
    shots = len(masks)
    for image in range(masks.shape[1]):
        sums = [[sum(int(masks[k, image, y, x]) for k in range(shots)) for x in range(5)] for y in range(4)]
        most = max(1, max(map(max, sums))) if normalise == "max" else shots
        for y in range(4):
            for x in range(5):
                share = sums[y][x] / most
                expected = sums[y][x] > 0 if shots == 1 else (share > threshold if strict else share >= threshold)
                assert bool(actual[image, y, x]) == expected


def test_one_vote_of_five_is_enough_when_the_best_pixel_has_two():
    masks = torch.zeros(5, 1, 1, 3, dtype=torch.bool)
    masks[0, 0, 0, :2] = True
    masks[1, 0, 0, 0] = True
    assert vote(masks)[0, 0].tolist() == [True, True, False]
    assert vote(masks, strict=True)[0, 0].tolist() == [True, False, False]
    assert vote(masks, normalise="shots")[0, 0].tolist() == [False, False, False]


def test_bad_input_is_named():
    with pytest.raises(ShapeError, match=r"\(K, B, H, W\)"):
        vote(torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match="'max' or 'shots', got 'mean'"):
        vote(torch.zeros(2, 1, 3, 4), normalise="mean")
