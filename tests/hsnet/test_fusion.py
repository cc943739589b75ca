"""Ways to combine several supports."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnet.errors import ConfigError, ShapeError
from hsnet.fusion import foreground, fuse, hard_masks, vote
from hsnet.model import predict_mask, resize_logits

SIZE = (23, 31)


def answers(shots, seed=0):
    return torch.randn(shots, 2, 2, 10, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fusion", ["vote", "logits", "probabilities"])
def test_one_support_is_its_own_answer_however_it_is_combined(fusion):
    one = answers(1)
    assert torch.equal(fuse(one, SIZE, fusion), predict_mask(resize_logits(one[0], SIZE)))


def test_the_vote_is_the_published_one():
    many = answers(5)
    each = torch.stack([predict_mask(resize_logits(one, SIZE)) for one in many])
    assert torch.equal(hard_masks(many, SIZE), each)
    assert torch.equal(fuse(many, SIZE), vote(each))
    assert torch.equal(fuse(many, SIZE, "vote", 0.3, True, "shots"), vote(each, 0.3, True, "shots"))
    rare = many - torch.tensor([0.0, 2.0]).view(2, 1, 1)  # no pixel gets all votes
    assert not torch.equal(fuse(rare, SIZE), fuse(rare, SIZE, normalise="shots"))


def test_the_means_by_hand():
    """Two supports that disagree: one is sure, the other is not, the vote would not see it."""
    sure, unsure = torch.tensor([0.0, 4.0]), torch.tensor([0.5, 0.0])
    many = torch.stack([sure, unsure])[:, None, :, None, None].expand(2, 1, 2, 3, 3)
    for fusion, probability in (
        ("logits", torch.sigmoid(torch.tensor((4.0 - 0.5) / 2))),
        ("probabilities", (torch.sigmoid(torch.tensor(4.0)) + torch.sigmoid(torch.tensor(-0.5))) / 2),
    ):
        assert fuse(many, (3, 3), fusion).all()
        assert fuse(many, (3, 3), fusion, float(probability) - 1e-3).all()
        assert not fuse(many, (3, 3), fusion, float(probability) + 1e-3).any()
    assert (1 - torch.sigmoid(torch.tensor(4.0)) + torch.sigmoid(torch.tensor(0.5))) / 2 < 0.5


def test_the_means_differ_where_answers_do():
    many = answers(5)
    kinds = [fuse(many, SIZE, fusion) for fusion in ("vote", "logits", "probabilities")]
    assert not torch.equal(kinds[0], kinds[1])
    assert not torch.equal(kinds[1], kinds[2])


def test_a_threshold_is_one_of_the_foreground_probability():
    logits = answers(1)[0]
    share = logits.softmax(1)[:, 1]
    for tau in (0.2, 0.7):
        assert torch.equal(foreground(logits, tau), share >= tau)
    tied = torch.zeros(1, 2, 1, 1)
    assert not foreground(tied).any(), "a tie is background, as in the published code"


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(ConfigError, match="vote, logits, probabilities"):
        fuse(answers(2), SIZE, "mean")
    with pytest.raises(ShapeError, match="K >= 1"):
        fuse(torch.zeros(0, 1, 2, 3, 3), SIZE)
    with pytest.raises(ShapeError, match="K >= 1"):
        fuse(torch.zeros(3, 1, 1, 3, 3), SIZE)


# -- the vote alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 2, 3, 4, 5, 10])
def test_the_vote_equals_the_published_code(golden, shots):
    stored = np.load(golden / "d_vote.npz")
    prediction = vote(torch.from_numpy(stored[f"K{shots}/votes"]))
    assert np.array_equal(prediction.numpy(), stored[f"K{shots}/pred"].astype(bool))


masks = st.tuples(st.integers(1, 10), st.integers(1, 3), st.integers(0, 2**31)).map(
    lambda t: torch.from_numpy(np.random.RandomState(t[2]).random_sample((t[0], t[1], 4, 5)) < 0.3)
)


@settings(max_examples=60, deadline=None)
@given(masks, st.booleans(), st.sampled_from(["max", "shots"]), st.sampled_from([0.25, 0.5, 0.75]))
def test_the_vote_is_a_literal_reading_of_section_4_5(masks, strict, normalise, threshold):
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


def test_bad_votes_are_named():
    with pytest.raises(ShapeError, match=r"\(K, B, H, W\)"):
        vote(torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match="'max' or 'shots', got 'mean'"):
        vote(torch.zeros(2, 1, 3, 4), normalise="mean")
