"""What is read for a batch: each photo once, wherever it stands, and the same batch however it is put together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.datasets.index import label_dtype
from pipeline.episodes.stream import Episode
from pipeline.extract.stage import extract
from pipeline.heads.scene import without_background
from pipeline.loading.batch import load_batch, load_ways, read_batch, read_kinds, read_ways
from pipeline.loading.source import OnlineSource, StoreSource, as_labels
from pipeline.store.feature_store import FeatureStore
from pipeline.store.shard_file import ChunkReader

SHARING = [Episode(3, (1, 2), 0), Episode(1, (3, 3), 0), Episode(4, (1, 5), 1)]
"""Photos 1 and 3 are query and support, 3 twice in one episode."""
PHOTOS = [1, 2, 3, 4, 5]
WAYS = [Episode(3, (1,), 0, ((1, (4,)),)), Episode(4, (2,), 0, ((1, (5,)),)), Episode(3, (2,), 0, ((1, (4,)),))]


class Fake:
    """Counts what is read. Features and labels say which image they are of."""

    codec = None

    def __init__(self, like, kind=torch.uint8):
        self.index, self.recipe, self.kind = dataclasses.replace(like.index, has_ignore=True), like.recipe, kind
        self.features_read, self.labels_read = [], []

    def features(self, images):
        self.features_read += images
        return [torch.stack([torch.full((2, 3, 3, 4), float(image)) for image in images])]

    def labels(self, images):
        self.labels_read += images
        maps = torch.stack([torch.arange(36).view(6, 6).add(image) % 4 for image in images])
        maps[:, 0, 0] = self.index.ignore_label
        return maps.to(self.kind)


def tensors(value):
    """Everything in a batch, by name."""
    found = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if dataclasses.is_dataclass(part):
            found |= {f"{field.name}.{name}": tensor for name, tensor in tensors(part).items()}
        elif isinstance(part, list):
            found |= {f"{field.name}.{number}": tensor for number, tensor in enumerate(part)}
        elif isinstance(part, torch.Tensor):
            found[field.name] = part
    return found


def same(ours, theirs):
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 5
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def by_hand(source, episodes, novel=()):
    """A batch as its definition says, photo by photo."""

    def marked(images, values):
        return torch.stack(
            [source.labels([image])[0].int() == value for image, value in zip(images, values, strict=True)]
        )

    queries = [episode.query for episode in episodes]
    supports = [image for episode in episodes for image in episode.supports]
    values = [episode.class_id + 1 for episode in episodes]
    each = [value for value, episode in zip(values, episodes, strict=True) for _ in episode.supports]
    shown = [
        torch.stack([torch.isin(source.labels([i])[0].int(), torch.tensor(novel) + 1) for i in images])
        for images in (queries, supports)
    ]
    boundary = source.index.ignore_label
    return {
        "query.0": torch.cat([source.features([image])[0] for image in queries]),
        "support.0": torch.cat([source.features([image])[0] for image in supports]),
        "target": marked(queries, values),
        "support_mask": marked(supports, each),
        "ignore": marked(queries, [boundary] * len(queries)),
        "support_ignore": marked(supports, [boundary] * len(supports)),
        "novel": shown[0],
        "support_novel": shown[1],
    }


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
@pytest.mark.parametrize("once", [True, False])
def test_a_batch_of_shared_photos_is_what_its_episodes_say(tiny_source, kind, once):
    source = Fake(tiny_source, kind)
    expected = by_hand(source, SHARING, (1, 2))
    assert expected["support_mask"].any()
    found = tensors(read_batch(source, SHARING, (1, 2), once).made())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_every_photo_is_read_and_sent_once(tiny_source):
    source, moved = Fake(tiny_source), []
    reading = read_batch(source, SHARING, once=True)
    assert sorted(source.features_read) == sorted(source.labels_read) == PHOTOS
    reading = reading.moved(lambda tensor: moved.append(tensor) or tensor.clone())
    (features,) = (tensor for tensor in moved if tensor.ndim == 5)
    (labels,) = (tensor for tensor in moved if tensor.ndim == 3)
    assert len(features) == len(labels) == 5
    assert labels.dtype == torch.uint8, "a byte for a pixel travels, not four, and no mask"
    assert all(tensor.ndim == 1 for tensor in moved if tensor is not features and tensor is not labels)
    same(reading.made(), load_batch(source, SHARING))


def test_the_photos_of_several_classes_are_read_once(tiny_source):
    source = Fake(tiny_source)
    batch = read_ways(source, WAYS, once=True).made()
    assert sorted(source.features_read) == sorted(source.labels_read) == PHOTOS
    same(batch, load_ways(source, WAYS))
    assert set(batch.truth.unique().tolist()) == {0, 1, 2}


def test_batches_of_several_kinds_share_their_photos(tiny_source):
    source = Fake(tiny_source)
    kinds = {"one": (SHARING, (1,)), "other": (SHARING[1:], ())}
    batches = read_kinds(source, kinds, once=True).made()
    assert sorted(source.features_read) == sorted(source.labels_read) == PHOTOS
    assert list(batches) == ["one", "other"]
    for name, (episodes, novel) in kinds.items():
        same(batches[name], load_batch(source, episodes, novel))
        same(read_kinds(source, kinds).made()[name], load_batch(source, episodes, novel))


def test_on_a_cpu_nothing_is_gathered(tiny_source):
    """Queries and supports lie behind each other in what was read, also where photos repeat."""
    for episodes in (SHARING, SHARING[:1]):
        reading = read_batch(Fake(tiny_source), episodes)
        batch = reading.made()
        (level,) = reading.photos.levels
        assert batch.query[0].data_ptr() == level.data_ptr()
        assert batch.support[0].data_ptr() == level[len(episodes) :].data_ptr()
    reading = read_batch(Fake(tiny_source), [Episode(3, (1, 2), 0)], once=True)
    assert reading.made().query[0].data_ptr() == reading.photos.levels[0].data_ptr(), "nor where there is no repeat"


def test_a_store_reads_a_repeated_photo_once(tiny_shapes, squeezenet, tmp_path, monkeypatch):
    extract(tiny_shapes, squeezenet, tmp_path / "s.zarr", image_size=64, precision="int8")
    source = StoreSource(FeatureStore.open(tmp_path / "s.zarr"))
    read, before = [], ChunkReader.read
    monkeypatch.setattr(ChunkReader, "read", lambda self, image, out: read.append(image) or before(self, image, out))
    batch = load_batch(source, SHARING)
    assert sorted(read) == sorted(PHOTOS * 4), "three levels and the labels"
    same(read_batch(source, SHARING, once=True).made(), batch)
    assert source.labels([1]).dtype == torch.uint8


def test_a_photo_asked_for_twice_is_computed_once(tiny_shapes, tiny_recipe, tiny_source):
    source = OnlineSource(tiny_shapes, tiny_source.network.backbone, tiny_recipe)
    seen, network = [], source.network
    source.network = lambda photos: seen.extend(photos) or network(photos)
    levels, labels = source.features([3, 1, 3]), source.labels([3, 1, 3])
    assert len(seen) == 2
    for one, other in zip(levels, tiny_source.features([3, 1, 3]), strict=True):
        assert torch.equal(one, other)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels[0], labels[2])
    assert torch.equal(labels[1], source.labels([1])[0])


def test_labels_of_many_classes_can_be_compared(tiny_source):
    """More than 254 classes are stored in 16 bits, which torch cannot compare with a class."""
    assert label_dtype(range(300)) == np.uint16

    class Many(Fake):
        def labels(self, images):
            return as_labels((super().labels(images).int().numpy() + 298).astype(np.uint16))

    source = Many(tiny_source, torch.int32)
    assert source.labels([1]).dtype == torch.int32
    assert without_background(source, [(1, 250), (3, 250)]) == [], "nobody shows that class"
    batch = load_batch(source, [Episode(3, (1,), 299)], novel=[298, 300])
    labels = source.labels([3, 1])
    assert torch.equal(batch.target[0], labels[0] == 300)
    assert torch.equal(batch.support_mask[0], labels[1] == 300)
    assert torch.equal(batch.novel[0], (labels[0] == 299) | (labels[0] == 301))
    assert batch.target.any()
    assert not batch.target.all()
