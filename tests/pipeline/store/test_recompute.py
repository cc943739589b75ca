"""What is stored is compared with what the photos and the weights give now."""

import io
import re

import numpy as np
import pytest
from fakes import Photos
from PIL import Image

from hsnet.backbone import FrozenBackbone
from hsnet.errors import ConfigError, DataError, StoreIncomplete, StoreMismatch
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file, shard_file
from pipeline.store.recompute import CODED_TOLERANCE, TOLERANCE, recompute, sample

COUNT = 21


@pytest.fixture(scope="module")
def weights():
    return load_weights("squeezenet1_1")


@pytest.fixture(scope="module", params=["int8", "float16", "float32", "coded"])
def path(request, tmp_path_factory, weights):
    path = tmp_path_factory.mktemp(request.param) / "s.zarr"
    budget = 40_000 if request.param == "coded" else None
    precision = "int8" if budget else request.param
    extract(Photos(), weights, path, image_size=64, precision=precision, shard_images=8, bytes_per_image=budget)
    return path


def opened(path):
    return FeatureStore.open(path, require_complete=False)


def test_here_and_now_every_bit_is_the_same(path, weights):
    seen = []
    found = recompute(opened(path), Photos(), weights, share=1.0, on_images=lambda *done: seen.append(done))
    assert (found.images, found.equal, found.close, found.different, found.largest) == (COUNT, COUNT, 0, (), 0.0)
    assert seen[-1] == (COUNT, COUNT)


def test_the_sample_is_the_same_every_time_and_holds_the_smaller_ones(path):
    store = opened(path)
    whole = sample(store, 1.0)
    assert whole == list(range(COUNT))
    few = sample(store, 0.2)
    assert (len(few), few) == (5, sample(opened(path), 0.2))
    assert set(few) < set(sample(store, 0.5))
    assert len(sample(store, 1e-9)) == 1
    assert any(sample(store, 0.2, seed) != few for seed in (1, 2))


def test_other_arithmetic_is_within_the_tolerance(path, weights, monkeypatch):
    taps = FrozenBackbone.taps
    monkeypatch.setattr(FrozenBackbone, "taps", lambda self, images: taps(self, images * (1 + 2e-6)))
    found = recompute(opened(path), Photos(), weights, share=1.0)
    assert found.different == ()
    assert found.close > 0
    assert 0 < found.largest < found.tolerance == (CODED_TOLERANCE if opened(path).codec else TOLERANCE)


def resaved(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return Image.open(file).convert("RGB")


def patched(image):
    pixels = np.array(image)
    pixels[40:50, 40:50] = 255 - pixels[40:50, 40:50]
    return Image.fromarray(pixels)


def unreadable(image):
    raise DataError("/data/photos/3.jpg is truncated.")


@pytest.mark.parametrize(
    ("changes", "labels", "reason"),
    [
        ({3: resaved}, {}, "features differ: largest 1 - cosine"),
        ({3: patched}, {}, "features differ"),
        ({3: lambda image: image.crop((0, 0, 80, 53))}, {}, r"size and classes were \(\(53, 87\)"),
        ({3: unreadable}, {}, "cannot be read any more: .*truncated"),
        ({}, {3: lambda label: np.roll(label, 20)}, r"\d+ pixels of its label map differ$"),
        ({}, {3: lambda label: label * 0}, "size and classes were"),
    ],
)
def test_an_image_that_changed_is_named(path, weights, changes, labels, reason):
    found = recompute(opened(path), Photos(changes=changes, masks=labels), weights, share=1.0)
    (one,) = found.different
    assert (one.image, one.shard, found.equal, found.close) == ("photos/3.jpg", 0, COUNT - 1, 0)
    assert re.search(reason, one.reason)


def test_what_is_damaged_is_named_too_and_what_is_missing_left_out(tmp_path, weights):
    path = tmp_path / "s.zarr"
    extract(Photos(), weights, path, image_size=64, precision="int8", shard_images=8)
    file = shard_file(path, "level1", 1)
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    marker_file(path, 0).unlink()
    found = recompute(opened(path), Photos(), weights, share=1.0)
    assert found.images == COUNT - 8
    (one,) = found.different
    assert (one.image, "is damaged" in one.reason) == ("photos/8.jpg", True)
    for number in (1, 2):
        marker_file(path, number).unlink()
    with pytest.raises(StoreIncomplete):
        recompute(opened(path), Photos(), weights, share=1.0)


def test_another_data_set_or_other_weights_say_nothing_about_the_store(path, weights):
    other = Photos()
    other.index = DatasetIndex("folder", {0: "cat"}, ("x.jpg",), {0: {"trn": Split(((0, 0),))}})
    with pytest.raises(StoreMismatch, match="data set"):
        recompute(opened(path), other, weights, share=1.0)
    with pytest.raises(StoreMismatch, match="weights"):
        recompute(opened(path), Photos(), load_weights("squeezenet1_1", "random:1"), share=1.0)
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            recompute(opened(path), Photos(), weights, share=share)
