"""Which supports are good, and what choosing one is worth."""

import numpy as np
import pytest
import torch

from hsnet.errors import ConfigError
from pipeline.heads.segmenters import Answers
from pipeline.supports import _gain, choose_supports


class Fickle:
    """Answers with the truth cut down to its upper rows: how many is the support's own number."""

    def answer(self, batch, joint=(), alone=None):
        share = batch.support_mask.flatten(1).float().mean(1).view(batch.size, batch.shots).T
        rows = torch.arange(batch.target.shape[1])
        kept = rows[None, None] < (share * 3).clamp(max=1)[..., None] * len(rows)
        mask = (batch.target[None] & kept[..., None]).float()
        return Answers(torch.stack([torch.full_like(mask, 0.5), mask], 2), {})


def choose(source, **options):
    return choose_supports(Fickle, lambda: source, source.index, fold=0, **options)


def test_every_query_meets_every_support_but_itself(tiny_source):
    found = choose(tiny_source)
    images = tiny_source.index.split(0, "test").by_class
    for one in found.classes:
        mine = [pair for pair in found.pairs if pair["class_id"] == one.class_id]
        count = len(set(images[one.class_id]))
        assert len(mine) == count * (count - 1)
        assert all(pair["query"] != pair["support"] for pair in mine)


def test_counts_are_those_of_the_object(tiny_source):
    """The fickle answer is the truth's upper rows: its intersection is its area, its union the truth's."""
    found = choose(tiny_source)
    numbers = {name: number for number, name in enumerate(tiny_source.index.images)}
    for pair in found.pairs[:40]:
        truth = tiny_source.labels([numbers[pair["query"]]])[0] == pair["class_id"] + 1
        assert pair["union"] == int(truth.sum())
        assert 0 <= pair["intersection"] <= pair["union"]


def test_scores_are_ious_of_summed_counts(tiny_source):
    found = choose(tiny_source)
    for one in found.classes:
        for support in one.supports:
            mine = [p for p in found.pairs if (p["class_id"], p["support"]) == (one.class_id, support.image)]
            wanted = 100 * sum(p["intersection"] for p in mine) / sum(p["union"] for p in mine)
            assert support.iou == pytest.approx(wanted)
        ious = [support.iou for support in one.supports]
        assert ious == sorted(ious, reverse=True)
        assert one.suggested == one.supports[0].image
        assert one.mean == pytest.approx(np.mean(ious))
        assert one.spread == pytest.approx(np.std(ious))
    assert max(one.spread for one in found.classes) > 1


def test_photos_are_not_both_where_there_are_enough(tiny_source):
    found = choose(tiny_source, candidates=2, queries=2)
    for one in found.classes:
        mine = [pair for pair in found.pairs if pair["class_id"] == one.class_id]
        assert not {pair["query"] for pair in mine} & {pair["support"] for pair in mine}
        assert len(mine) == 4
    assert found.pairs == choose(tiny_source, candidates=2, queries=2).pairs
    assert found.pairs != choose(tiny_source, candidates=2, queries=2, seed=1).pairs


def test_more_supports_than_a_batch_holds_change_nothing(tiny_source, monkeypatch):
    whole = choose(tiny_source)
    monkeypatch.setattr("pipeline.supports.SUPPORTS_AT_ONCE", 2)
    assert choose(tiny_source).pairs == whole.pairs


def test_the_gain_of_a_support_is_not_that_of_having_chosen_it():
    """Supports that do not differ: the best of fifty looks better, and is not."""
    random = np.random.RandomState(0)
    tables = [np.stack([random.randint(0, 100, (8, 50)), np.full((8, 50), 100)], 2) for _ in range(60)]
    apparent = [(100 * t[..., 0].sum(0) / t[..., 1].sum(0)) for t in tables]
    assert np.mean([scores.max() - scores.mean() for scores in apparent]) > 15
    assert abs(np.mean([_gain(t) for t in tables])) < 3
    better = np.stack([np.full((8, 5), 20), np.full((8, 5), 100)], 2)
    better[:, 3, 0] = 70
    assert _gain(better) == pytest.approx(70 - 30)
    assert _gain(better[:3]) is None


def test_only_the_classes_asked_for(tiny_source):
    name = next(iter(choose(tiny_source, candidates=1, queries=1).classes)).name
    found = choose(tiny_source, classes=[name], candidates=1, queries=2)
    assert [one.name for one in found.classes] == [name]
    with pytest.raises(ConfigError, match="no class 'zebra' to test; its classes: "):
        choose(tiny_source, classes=["zebra"])
    with pytest.raises(ConfigError, match="at least 1 candidate"):
        choose(tiny_source, candidates=0)
