"""Ways to combine several supports."""

import pytest
import torch

from hsnet.errors import ConfigError, ShapeError
from hsnet.fusion import foreground, fuse, hard_masks
from hsnet.model import predict_mask, resize_logits
from hsnet.vote import vote

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
