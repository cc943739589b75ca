"""One label map of several one-way answers, pixel by pixel as its words say."""

import pytest
import torch

from hsnet.errors import ShapeError
from hsnet.metrics import count
from hsnet.ways import SCORES, best_score, confusion, label_map, tried_counts


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape, classes, seed=1):
    return torch.randint(0, classes + 1, shape, generator=torch.Generator().manual_seed(seed))


def test_a_pixel_goes_to_the_best_of_those_that_claim_it():
    scores, order = random(2, 3, 5, 4), torch.tensor([[0, 1, 2], [2, 0, 1]])
    claims = scores > 0.2
    found = label_map(claims, scores, order)
    for b in range(2):
        for y in range(5):
            for x in range(4):
                best = [n for n in range(3) if claims[b, n, y, x]]
                best.sort(key=lambda n: -scores[b, n, y, x])
                assert found[b, y, x] == (best[0] + 1 if best else 0)
    assert set(found.unique().tolist()) == {0, 1, 2, 3}


def test_a_claim_without_the_best_score_wins_over_a_score_without_a_claim():
    """After a vote a class may have the larger mean and yet too few votes."""
    claims, scores = torch.tensor([[[[False]], [[True]]]]), torch.tensor([[[[5.0]], [[-5.0]]]])
    assert label_map(claims, scores, torch.tensor([[0, 1]])).item() == 2


def test_equal_scores_are_decided_by_the_order_given():
    claims = torch.ones(2, 3, 2, 2, dtype=torch.bool)
    found = label_map(claims, torch.zeros(2, 3, 2, 2), torch.tensor([[1, 0, 2], [2, 1, 0]]))
    assert found[0].unique().tolist() == [2]
    assert found[1].unique().tolist() == [3]


def test_confusion_counts_every_pixel_once():
    truth, found = labels(3, 7, 6, classes=2), labels(3, 7, 6, classes=2, seed=2)
    ignore = random(3, 7, 6) > 1
    counts = confusion(found, truth, 2, ignore)
    for b in range(3):
        for t in range(3):
            for p in range(3):
                assert counts[b, t, p] == ((truth[b] == t) & (found[b] == p) & ~ignore[b]).sum()
    assert counts.sum() == (~ignore).sum()
    assert counts.dtype == torch.int64


def test_confusion_of_one_class_holds_the_one_way_counts():
    truth, found, ignore = random(4, 6, 5) > 0, random(4, 6, 5, seed=3) > 0, random(4, 6, 5, seed=4) > 1
    cells = confusion(found.long(), truth.long(), 1, ignore)
    both = torch.stack([torch.stack([cells[:, 0, 0], cells[:, 1, 1]], 1)], 1)
    unions = cells.sum((1, 2))[:, None] - both[:, 0].flip(1)
    assert torch.equal(torch.cat([both, unions[:, None]], 1), count(found, truth, ignore))


def test_every_score_is_counted_as_if_it_were_the_only_one():
    margins, truth, ignore = 3 * random(3, 2, 6, 5), labels(3, 6, 5, classes=2), random(3, 6, 5, seed=9) > 1
    margins[:, :, 0] = SCORES[230]  # a tie with the background is background
    margins[:, :, 1] = 0
    rows, order = torch.tensor([[0, 3], [3, 1], [1, 0]]), torch.tensor([[0, 1], [1, 0], [0, 1]])
    counts = tried_counts(margins, order, truth, rows, 4, ignore)
    assert counts.shape == (len(SCORES), 4, 2)
    for place in (0, 150, 200, 230, 290, 400):
        found = label_map(margins > SCORES[place], margins, order)
        cells = confusion(found, truth, 2, ignore)
        wanted = torch.zeros(4, 2, dtype=torch.int64)
        for b in range(3):
            for n in range(2):
                inside = cells[b, n + 1, n + 1]
                union = cells[b, n + 1].sum() + cells[b, :, n + 1].sum() - inside
                wanted[rows[b, n]] += torch.stack([inside, union])
        assert torch.equal(counts[place], wanted), place
    assert counts[:, 2].sum() == 0, "no episode has class 2"


def test_the_best_score_has_the_best_mean_and_of_equal_ones_is_nearest_to_zero():
    margins, order = torch.full((1, 1, 1, 4), -5.0), torch.tensor([[0]])
    margins[..., :2] = 2.0
    truth = torch.tensor([[[1, 1, 0, 0]]])
    assert best_score(tried_counts(margins, order, truth, torch.tensor([[0]]), 1)) == (0.0, 100.0)
    score, miou = best_score(tried_counts(margins + 4, order, truth, torch.tensor([[0]]), 1))
    assert score == 0.0
    assert miou == 100
    score, miou = best_score(tried_counts(margins + 10, order, truth, torch.tensor([[0]]), 1))
    assert 5 <= score < 5.3
    assert miou == 100
    assert best_score(torch.zeros(len(SCORES), 2, 2, dtype=torch.int64)) == (0.0, 0.0)


def test_zero_is_tried():
    assert SCORES[200] == 0
    assert (SCORES.diff() > 0).all()
    assert 40 < SCORES[-1] == -SCORES[0]


def test_shapes_are_named():
    with pytest.raises(ShapeError, match=r"must both be \(B, N, H, W\)"):
        label_map(torch.ones(1, 2, 3, 3) > 0, torch.ones(1, 2, 3, 4), torch.tensor([[0, 1]]))
    with pytest.raises(ShapeError, match=r"must both be \(B, H, W\)"):
        confusion(torch.ones(1, 2, 3), torch.ones(1, 3, 2), 1)
