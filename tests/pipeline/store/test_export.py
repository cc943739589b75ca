"""A sample of a store is a store: whole, readable by anyone, good for small episodes, equal image by image."""

import shutil

import numpy as np
import pytest
import zarr

from hsnet.errors import ConfigError, StoreError
from pipeline.common.columns import Texts, unpack
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.stream import EpisodeStream
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.store.export import export_sample
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file, shard_file
from pipeline.store.verify import verify


@pytest.fixture(scope="module", params=["int8", "coded"])
def big(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "big.zarr"
    budget = 40_000 if request.param == "coded" else None
    data = Shapes(size=64, trn_per_class=3, val_per_class=3)
    extract(data, load_weights("squeezenet1_1"), path, image_size=64, precision="int8", bytes_per_image=budget)
    return FeatureStore.open(path)


def same_images(small, big):
    numbers = {name: number for number, name in enumerate(big.index.images)}
    ours, theirs = list(range(len(small.index.images))), [numbers[name] for name in small.index.images]
    for one, two in zip(small.features(ours), big.features(theirs), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(small.labels(ours), big.labels(theirs))
    for here, there in zip(ours, theirs, strict=True):
        assert small.size(here) == big.size(there)
        assert small.classes_present(here) == big.classes_present(there)


def test_a_sample_is_a_whole_store_of_the_same_recipe(big, tmp_path):
    result = export_sample(big, tmp_path / "small.zarr", 24)
    small = FeatureStore.open(tmp_path / "small.zarr", big.recipe)
    assert [place.name for place in tmp_path.iterdir()] == ["small.zarr"]
    assert (result.images, result.bytes) == (len(small.index.images), small.nbytes)
    assert 20 <= result.images <= 24
    assert result.images_left_out == len(big.index.images) - result.images
    assert verify(small).damage == ()
    same_images(small, big)
    assert small.index.classes == big.index.classes
    assert (small.codec is None) == (big.codec is None)
    assert small.codec is None or small.codec.digest == big.codec.digest
    assert f"A sample of {result.images} of the {len(big.index.images)} images" in small.index.notes[0]


def test_plain_zarr_reads_it(big, tmp_path):
    export_sample(big, tmp_path / "small.zarr", 12)
    group = zarr.open_group(str(tmp_path / "small.zarr"), mode="r")
    names = Texts(*(unpack(group["index"][:])[1][name] for name in ("images", "images.ends")))
    small = FeatureStore.open(tmp_path / "small.zarr")
    assert names == small.index.images
    np.testing.assert_array_equal(group["level1"][3], small.features([3])[1][0])
    np.testing.assert_array_equal(group["label"][3], small.labels([3])[0])


@pytest.mark.parametrize("shots", [1, 2])
def test_episodes_can_be_drawn_in_every_fold(big, tmp_path, shots):
    result = export_sample(big, tmp_path / "small.zarr", 60, shots=shots)
    index = FeatureStore.open(tmp_path / "small.zarr").index
    for fold in big.index.folds:
        for role in ("trn", "val", "test"):
            if big.index.split(fold, role).entries:
                stream = EpisodeStream(index, fold, role, shots, seed=0, repeat_supports=False)
                assert all(len(set(stream[i].supports)) == shots for i in range(20))
    for one in result.lists:
        old = big.index.split(one.fold, one.role)
        assert one.entries + one.entries_left_out == len(old.entries)
        assert len(one.classes) + one.classes_left_out == len(old.class_ids)
        assert one.classes


def test_the_same_sample_every_time_and_another_for_another_seed(big, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        export_sample(big, tmp_path / name, 20, seed=seed)
    a, b, c = (FeatureStore.open(tmp_path / name).index for name in "abc")
    assert a.digest == b.digest != c.digest


def test_chosen_images_classes_and_folds(big, tmp_path):
    wanted = [big.index.images[i] for i in (40, 3, 7, 3)]
    export_sample(big, tmp_path / "ids", ids=wanted)
    small = FeatureStore.open(tmp_path / "ids")
    assert small.index.images == tuple(big.index.images[i] for i in (3, 7, 40))
    lists = [split for roles in small.index.splits.values() for split in roles.values()]
    assert not any(split.classes_below(2) for split in lists), "single images of a class would stop every episode"
    same_images(small, big)
    fold = big.index.folds[-1]
    role = next(role for role in ("test", "val") if big.index.split(fold, role).entries)
    name = big.index.classes[big.index.split(fold, role).class_ids[0]]
    result = export_sample(big, tmp_path / "class", classes=[name], fold=fold)
    assert {one for part in result.lists for one in part.classes} == {name}
    result = export_sample(big, tmp_path / "fold", 4, fold=fold)
    assert next(part for part in result.lists if (part.fold, part.role) == (fold, role)).classes


def test_images_that_are_not_there_are_not_drawn(big, tmp_path):
    half = tmp_path / "half.zarr"
    shutil.copytree(big.root, half)
    for number in (0, 1):
        marker_file(half, number).unlink()
    store = FeatureStore.open(half, require_complete=False)
    export_sample(store, tmp_path / "small.zarr", 1000)
    there = set(FeatureStore.open(tmp_path / "small.zarr").index.images)
    assert there
    assert not there & set(big.index.images[: 2 * big.shard_images])


def test_what_cannot_be_exported_leaves_nothing(big, tmp_path):
    (tmp_path / "there").mkdir()
    for attempt, error, text in (
        (lambda path: export_sample(big, tmp_path / "there"), StoreError, "is there already"),
        (lambda path: export_sample(big, path, ids=["no.jpg"]), ConfigError, r"no image 'no\.jpg'.*look like"),
        (lambda path: export_sample(big, path, classes=["cat", "unicorn"]), ConfigError, "no class"),
        (lambda path: export_sample(big, path, fold=99), ConfigError, "no fold 99; folds here"),
        (lambda path: export_sample(big, path, 1), ConfigError, "2 images of a 1-shot episode among at most 1"),
        (lambda path: export_sample(big, path, shots=0), ConfigError, "at least 1 support"),
    ):
        with pytest.raises(error, match=text):
            attempt(tmp_path / "new")
    file = shard_file(big.root, "level0", 0)
    whole = file.read_bytes()
    try:
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(StoreError, match=r"level0.*is damaged"):
            export_sample(big, tmp_path / "new", ids=big.index.images[:1])
    finally:
        file.write_bytes(whole)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        export_sample(big, tmp_path / "file" / "new", 8)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["file", "there"]
