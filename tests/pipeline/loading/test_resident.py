"""Images kept in memory: the same features and the same run, and an error where they do not fit."""

import pytest
import torch

from hsnet.errors import ConfigError
from pipeline.loading import resident
from pipeline.loading.batch import load_batch
from pipeline.train import fit, training_stream


class Counting:
    """A source that notes which images are read."""

    def __init__(self, source):
        self.source, self.read = source, []

    def __getattr__(self, name):
        return getattr(self.source, name)

    def features(self, images):
        self.read += images
        return self.source.features(images)


def test_a_resident_batch_is_the_stored_one_and_reads_nothing(tiny_source, tiny_config):
    stream = training_stream(tiny_config(), tiny_source)
    episodes = [stream[number] for number in range(5)]
    images = {image for episode in episodes for image in (episode.query, *episode.supports)}
    counting = Counting(tiny_source)
    kept = resident.keep(counting, images, "device")
    counting.read.clear()
    ours, theirs = load_batch(kept, episodes), load_batch(tiny_source, episodes)
    assert counting.read == []
    for name in ("query", "support"):
        for one, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert torch.equal(ours.support_mask, theirs.support_mask)
    assert torch.equal(ours.target, theirs.target)
    assert (kept.index, kept.recipe, kept.codec) == (tiny_source.index, tiny_source.recipe, tiny_source.codec)


def test_other_images_are_read_from_the_store(tiny_source):
    kept = resident.ResidentSource(tiny_source, [3, 1], "cpu")
    for one, other in zip(kept.features([1, 2]), tiny_source.features([1, 2]), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(kept.labels([0]), tiny_source.labels([0]))


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_run_is_the_same(tiny_source, tiny_config, tmp_path, where):
    config = tiny_config(steps=2)
    runs = [fit(config, tiny_source, tmp_path / name, resident=name) for name in ("off", where)]
    assert runs[0].loss == runs[1].loss
    assert runs[0].best_miou == runs[1].best_miou


def test_host_reads_every_image_once_over_the_ranks(tiny_source):
    counting = Counting(tiny_source)
    wanted = [5, 0, 3, 4, 4]
    for rank in range(2):
        assert resident.keep(counting, wanted, "host", "cpu", rank, 2) is counting
    measured = [0, 0]  # each rank looks at one image to know its size
    assert sorted(counting.read) == sorted([0, 3, 4, 5, *measured])


def test_auto_leaves_a_cpu_alone_and_off_everything(tiny_source):
    assert resident.keep(tiny_source, [0, 1], "auto", "cpu") is tiny_source
    assert resident.keep(tiny_source, [0, 1], "off") is tiny_source


def test_what_does_not_fit_is_refused_with_both_sizes(tiny_source, monkeypatch):
    monkeypatch.setattr(resident, "free_on", lambda device: 1000)
    for where in ("device", "host"):
        with pytest.raises(ConfigError, match=r"2 images take .*; 800 B may be filled on .*--resident off"):
            resident.keep(tiny_source, [0, 1], where)


def test_skipped_images_are_not_asked_for(tiny_source):
    class Skipping(Counting):
        skipped = frozenset({1})

    counting = Skipping(tiny_source)
    resident.keep(counting, [0, 1, 2], "device")
    assert 1 not in counting.read


def test_unknown_place_is_named(tiny_source):
    with pytest.raises(ConfigError, match="resident must be one of off, auto, host, device, got 'tape'"):
        resident.keep(tiny_source, [0], "tape")


def test_a_container_s_limit_decides_what_fits(tiny_source, monkeypatch):
    monkeypatch.setattr(resident, "memory", lambda: (1000, 2000))
    assert resident.free_on("cpu") == 1000
    with pytest.raises(ConfigError, match="800 B may be filled on this machine"):
        resident.keep(tiny_source, [0, 1], "host")
