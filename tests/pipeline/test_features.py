"""From episodes to tensors, from a store or online, ahead of time or not."""

import threading

import pytest
import torch

from pipeline.episodes import Episode, EpisodeStream
from pipeline.features import load_batch, prefetch


@pytest.fixture(scope="module")
def stream(tiny_source):
    return EpisodeStream(tiny_source.index, 0, "trn", 2, 0)


def test_a_batch_holds_what_its_episodes_name(tiny_source, stream):
    episodes = [stream[0], stream[1], stream[2]]
    batch = load_batch(tiny_source, episodes)
    assert (batch.size, batch.shots) == (3, 2)
    assert [tuple(level.shape[:2]) for level in batch.query] == [(3, 2), (3, 2), (3, 4)]
    assert all(len(level) == 6 for level in batch.support)
    for row, episode in enumerate(episodes):
        assert torch.equal(batch.query[0][row], tiny_source.features([episode.query])[0][0])
        assert torch.equal(batch.target[row], tiny_source.labels([episode.query])[0] == episode.class_id + 1)
        for shot, support in enumerate(episode.supports):
            assert torch.equal(batch.support[2][2 * row + shot], tiny_source.features([support])[2][0])
            expected = tiny_source.labels([support])[0] == episode.class_id + 1
            assert torch.equal(batch.support_mask[2 * row + shot], expected)
            assert expected.any()
    assert batch.ignore is None


def test_prefetch_keeps_order_and_its_bound(tiny_source, stream):
    asked = []

    class Watched:
        def __getattr__(self, name):
            return getattr(tiny_source, name)

        def features(self, images):
            asked.append(threading.current_thread().name)
            return tiny_source.features(images)

    groups = [[stream[i]] for i in range(6)]
    loader = prefetch(Watched(), iter(groups), depth=2)
    first, _ = next(loader)
    assert first == groups[0]
    assert [episodes for episodes, _ in loader] == groups[1:]
    assert len(asked) == 12
    assert all(name.startswith("prefetch") for name in asked)

    asked.clear()
    drawn = []
    bounded = prefetch(Watched(), (drawn.append(g) or g for g in groups), depth=2)
    next(bounded)
    assert len(drawn) == 3, "one in use and two ahead"
    bounded.close()


def test_an_error_is_raised_at_the_batch_it_belongs_to(tiny_source, stream):
    missing = Episode(10**6, (0, 1), 0)
    loader = prefetch(tiny_source, iter([[stream[0]], [missing], [stream[1]]]), depth=2)
    assert next(loader)[0] == [stream[0]]
    with pytest.raises(Exception, match="1000000"):
        next(loader)
