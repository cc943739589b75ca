"""From episodes to tensors, from a store or online, ahead of time or not."""

import threading

import pytest
import torch

import pipeline.loading.source as source_module
from hsnet.backbone import FrozenBackbone
from pipeline.common.runner import one_torch_thread
from pipeline.episodes.stream import EpisodeStream
from pipeline.extract.stage import extract
from pipeline.loading.batch import load_batch, prefetch
from pipeline.loading.source import OnlineSource, RelistedSource, StoreSource, readers
from pipeline.store.feature_store import FeatureStore
from pipeline.train import fit


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


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetch_gives_the_batches_in_order(tiny_source, stream, depth):
    groups = [[stream[i], stream[i + 1]] for i in range(4)]
    for group, (episodes, batch) in zip(groups, prefetch(tiny_source, iter(groups), depth), strict=True):
        assert episodes == group
        assert torch.equal(batch.target, load_batch(tiny_source, group).target)


def test_several_threads_read_a_store_and_no_network(tiny_source, tmp_path, tiny_shapes, squeezenet, monkeypatch):
    extract(tiny_shapes, squeezenet, tmp_path / "s.zarr", image_size=64, precision="int8")
    stored = StoreSource(FeatureStore.open(tmp_path / "s.zarr"))
    for cores, expected in ((0.5, 1), (2, 1), (4, 1), (8, 2), (16, 4), (128, 4)):
        monkeypatch.setattr(source_module, "cores", lambda found=cores: found)
        assert readers(stored) == readers(RelistedSource(stored, stored.index)) == expected
        assert readers(tiny_source) == readers(RelistedSource(tiny_source, tiny_source.index)) == 1
    names, before = set(), StoreSource.features
    monkeypatch.setattr(
        StoreSource,
        "features",
        lambda self, images: names.add(threading.current_thread().name) or before(self, images),
    )
    episodes = EpisodeStream(stored.index, 0, "trn", 2, 0)
    groups = [[episodes[i], episodes[i + 1]] for i in range(30)]
    for group, (given, batch) in zip(groups, prefetch(stored, iter(groups), 3), strict=True):
        assert given == group
        alone = load_batch(stored, group)
        assert torch.equal(batch.target, alone.target)
        assert all(torch.equal(one, other) for one, other in zip(batch.support, alone.support, strict=True))
    assert len([name for name in names if name.startswith("prefetch")]) > 1


def test_a_float32_store_and_the_backbone_online_train_the_same_run(
    tiny_shapes, squeezenet, tiny_recipe, tiny_config, tmp_path
):
    """Features equal to the bit, so the loss curves are equal to the bit too."""
    extract(tiny_shapes, squeezenet, tmp_path / "s.zarr", image_size=64, precision="float32")
    stored = StoreSource(FeatureStore.open(tmp_path / "s.zarr"))
    with one_torch_thread():
        online = OnlineSource(tiny_shapes, FrozenBackbone("squeezenet1_1", squeezenet.state_dict), tiny_recipe)
        for ours, theirs in zip(stored.features([3, 0]), online.features([3, 0]), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(stored.labels([3, 0]), online.labels([3, 0]))
        assert list(stored.classes_present(5)) == list(online.classes_present(5))
        curves = []
        for name, source in (("store", stored), ("online", online)):
            losses = []
            fit(tiny_config(select_on="none"), source, tmp_path / name, on_event=lambda e, x=losses: x.append(e.loss))
            curves.append(losses)
    assert curves[0] == curves[1]
    assert len(curves[0]) == 4


def test_an_int8_store_trains_nearly_the_same_run(tiny_shapes, squeezenet, tiny_recipe, tiny_config, tmp_path):
    """Correlations of 8-bit codes differ by about 1e-3; so does the loss."""
    extract(tiny_shapes, squeezenet, tmp_path / "s.zarr", image_size=64, precision="int8")
    stored = StoreSource(FeatureStore.open(tmp_path / "s.zarr"))
    online = OnlineSource(tiny_shapes, FrozenBackbone("squeezenet1_1", squeezenet.state_dict), tiny_recipe)
    curves = []
    for name, source in (("store", stored), ("online", online)):
        losses = []
        config = tiny_config(recipe=source.recipe, select_on="none")
        fit(config, source, tmp_path / name, on_event=lambda e, x=losses: x.append(e.loss))
        curves.append(losses)
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], abs=0.01)
