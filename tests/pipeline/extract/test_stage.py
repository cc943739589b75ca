"""Extraction in this process: right features, resumable, clear about what it cannot read. On Ray: tests/cluster."""

import errno
import functools
import os
import shutil
import threading
from collections import namedtuple
from dataclasses import replace

import fakes
import numpy as np
import pytest
import torch
import zarr
from fakes import fingerprints

import pipeline.extract.stage as extract_module
import pipeline.extract.worker as worker_module
import pipeline.store.shard_writer as store_module
from hsnet.backbone import FrozenBackbone
from hsnet.errors import ConfigError, DataError, DeviceMemoryError, StoreError, StoreMismatch
from pipeline.common.lock import OWNER
from pipeline.datasets.images import network_image, resize_label
from pipeline.extract.plan import ExtractionPlan, plan_extraction
from pipeline.extract.stage import ShardDone, extract
from pipeline.features import forward
from pipeline.features.backbones import Reading, open_backbone, same_reading
from pipeline.features.precision import encode
from pipeline.features.recipe import Recipe
from pipeline.features.weights import Weights, load_weights
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import shard_file

SIZE = 64
SHARD = 8
Photos = functools.partial(fakes.Photos, has_ignore=True)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_weights("squeezenet1_1")


def run(photos, weights, path, **options):
    options = {"shard_images": SHARD, "precision": "int8", **options}
    return extract(photos, weights, path, image_size=SIZE, **options)


def test_stored_features_are_those_of_the_backbone(tmp_path, weights):
    photos = Photos()
    summary = run(photos, weights, tmp_path / "s.zarr", precision="float32")
    store = FeatureStore.open(tmp_path / "s.zarr")
    backbone = FrozenBackbone("squeezenet1_1", weights.state_dict)
    images = [0, 5, 20]
    levels = store.features(images)
    for row, image in enumerate(images):
        pixels = network_image(photos.image(image), SIZE)
        for stored, fresh in zip(levels, backbone(torch.from_numpy(pixels)[None]), strict=True):
            # Bit for bit: on a CPU a photo goes through the backbone alone, as here.
            np.testing.assert_array_equal(stored[row], fresh[0].numpy())
        assert store.size(image) == photos.label(image).shape
        assert store.classes_present(image) == (image % 2,)
    assert set(np.unique(store.labels([4]))) == {0, 1, 255}
    assert (summary.images, summary.written_shards, summary.reused_shards) == (21, 3, 0)
    assert summary.skipped == ()
    assert summary.bytes == store.nbytes
    assert summary.images_per_s == pytest.approx(21 / summary.seconds)


@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_smaller_precisions_are_the_encoded_exact_ones(tmp_path, weights, precision):
    run(Photos(), weights, tmp_path / "exact.zarr", precision="float32")
    run(Photos(), weights, tmp_path / "small.zarr", precision=precision)
    exact = FeatureStore.open(tmp_path / "exact.zarr").features(range(21))
    small = FeatureStore.open(tmp_path / "small.zarr").features(range(21))
    for stored, wanted in zip(small, encode(exact, precision), strict=True):
        np.testing.assert_array_equal(stored, wanted)


def test_the_same_bytes_every_time_and_whatever_threads_torch_has(tmp_path, weights):
    run(Photos(), weights, tmp_path / "one.zarr")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(Photos(), weights, tmp_path / "two.zarr")
    finally:
        torch.set_num_threads(before)
    assert fingerprints(tmp_path / "one.zarr") == fingerprints(tmp_path / "two.zarr")


@pytest.mark.parametrize("room", [0, 1 << 30], ids=["one shard in memory", "two"])
def test_the_same_bytes_whether_shards_are_made_one_by_one_or_several_in_one_go(tmp_path, weights, monkeypatch, room):
    """In one go, a shard is written while the next is computed, if both fit in memory."""
    monkeypatch.setattr(extract_module, "TASK_SECONDS", 0.0)
    run(Photos(broken=(11,)), weights, tmp_path / "single.zarr", shard_images=3, on_error="skip")
    monkeypatch.setattr(extract_module, "TASK_SECONDS", 1e6)
    monkeypatch.setattr(worker_module, "WRITE_BEHIND_BYTES", room)
    photos, events = Photos(broken=(11,)), []
    run(photos, weights, tmp_path / "several.zarr", shard_images=3, on_error="skip", on_event=events.append)
    assert fingerprints(tmp_path / "single.zarr") == fingerprints(tmp_path / "several.zarr")
    assert photos.read == list(range(21))
    assert [event.shard for event in events[1:]] == list(range(7))
    assert len({event.seconds for event in events[1:]}) == 2, "the first alone, then all others together"


def test_shards_before_a_broken_photo_are_kept_when_several_are_made_in_one_go(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(extract_module, "TASK_SECONDS", 1e6)
    with pytest.raises(DataError, match=r"'photos/17\.jpg'"):
        run(Photos(broken=(17,)), weights, tmp_path / "s.zarr", shard_images=3)
    assert FeatureStore.open(tmp_path / "s.zarr", require_complete=False).missing_shards() == (5, 6)


def test_photos_are_read_ahead_but_not_without_bound(tmp_path, weights, monkeypatch):
    photos, ahead = Photos(), []
    taps = FrozenBackbone.taps

    def watched(self, images):
        ahead.append(len(photos.read) - len(ahead))
        return taps(self, images)

    monkeypatch.setattr(FrozenBackbone, "taps", watched)
    run(photos, weights, tmp_path / "s.zarr", shard_images=21)
    assert len(ahead) == 21
    assert max(ahead) <= worker_module.READ_AHEAD + 1


class Together:
    """What photos see that are read: holds the first reader until another one is inside, as slow photos would."""

    def __init__(self, wanted: int) -> None:
        self.barrier, self.threads = threading.Barrier(wanted, timeout=30), set()

    def __call__(self, photo):
        self.threads.add(threading.current_thread().name)
        self.barrier.wait()
        return photo


def test_several_readers_give_the_same_bytes_and_the_same_errors(tmp_path, weights, monkeypatch):
    run(Photos(), weights, tmp_path / "one.zarr")
    monkeypatch.setattr(worker_module, "readers", lambda *_: 3)
    together = Together(3)
    run(Photos(changes={0: together, 1: together, 2: together}), weights, tmp_path / "three.zarr")
    assert len(together.threads) == 3, "three photos were read at a time"
    assert fingerprints(tmp_path / "one.zarr") == fingerprints(tmp_path / "three.zarr")
    with pytest.raises(DataError, match=r"'photos/11\.jpg' .*truncated"):  # the first, though 12 is read beside it
        run(Photos(broken=(11, 12)), weights, tmp_path / "broken.zarr")
    assert FeatureStore.open(tmp_path / "broken.zarr", require_complete=False).missing_shards() == (1, 2)


def test_a_gpu_reads_two_batches_ahead_and_no_more(tmp_path, weights, monkeypatch):
    monkeypatch.setitem(forward.BATCH, "cpu", 3)  # as a GPU, which takes more than one photo a pass
    monkeypatch.setattr(worker_module, "readers", lambda *_: 4)
    photos, ahead, passes = Photos(), [], []
    taps = FrozenBackbone.taps

    def watched(self, images):
        passes.append(len(images))
        ahead.append(len(photos.read) - sum(passes))
        return taps(self, images)

    monkeypatch.setattr(FrozenBackbone, "taps", watched)
    run(photos, weights, tmp_path / "s.zarr", shard_images=21)
    assert sum(passes) == 21
    assert max(ahead) <= 2 * 3 + 1


def test_features_stay_with_their_image_whatever_a_forward_pass_holds(tmp_path, weights, monkeypatch):
    """Memory of one pass is used again for the next, also where the last pass of a shard is smaller."""
    run(Photos(broken=(4,)), weights, tmp_path / "one.zarr", precision="float32", on_error="skip", shard_images=8)
    monkeypatch.setitem(forward.BATCH, "cpu", 3)
    run(Photos(broken=(4,)), weights, tmp_path / "three.zarr", precision="float32", on_error="skip", shard_images=8)
    one, three = (FeatureStore.open(tmp_path / name) for name in ("one.zarr", "three.zarr"))
    images = [image for image in range(21) if image != 4]
    for left, right in zip(one.features(images), three.features(images), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-2)


def test_events_tell_the_plan_and_every_shard(tmp_path, weights):
    events = []
    run(Photos(), weights, tmp_path / "s.zarr", on_event=events.append)
    plan, *done = events
    assert isinstance(plan, ExtractionPlan)
    assert (plan.images, plan.images_done, plan.shards, plan.shards_done) == (21, 0, 3, 0)
    store = FeatureStore.open(tmp_path / "s.zarr")
    # At most: label maps compress.
    assert store.nbytes <= plan.bytes_needed <= store.nbytes + 21 * (SIZE * SIZE + 200)
    assert all(isinstance(event, ShardDone) for event in done)
    assert [(event.shard, event.images) for event in done] == [(0, 8), (1, 8), (2, 5)]
    assert sum(event.nbytes for event in done) == store.nbytes
    assert all(event.seconds > 0 for event in done)


def planned(photos, weights, path, **options):
    exact = Recipe.of("squeezenet1_1", weights.sha256, SIZE, "int8")
    return plan_extraction(photos, exact, path, shard_images=SHARD, **options).plan


def test_what_is_planned_beforehand_is_what_is_done(tmp_path, weights):
    """Also into an empty folder, and where a photo that had been left out can be read by now."""
    path, events = tmp_path / "s.zarr", []
    path.mkdir()
    for photos, done in ((Photos(broken=(11,)), 0), (Photos(), 13), (Photos(), 21)):
        plan = planned(photos, weights, path)
        run(photos, weights, path, on_error="skip", on_event=events.append)
        told = next(event for event in events if isinstance(event, ExtractionPlan))
        assert replace(plan, bytes_free=0) == replace(told, bytes_free=0)
        assert plan.images_done == done
        events.clear()
    assert planned(Photos(), weights, path, damaged=[2]).images_done == 16


def test_something_else_at_the_path_is_refused_by_the_plan_and_the_run_alike(tmp_path, weights):
    path = tmp_path / "s.zarr"
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    photos = Photos()
    for attempt in (planned, run):
        with pytest.raises(StoreError, match=r"s\.zarr is not a feature store"):
            attempt(photos, weights, path, bytes_per_image=20_000)
    assert photos.read == []
    assert [file.name for file in path.iterdir()] == ["notes.txt"]


def test_running_again_does_nothing(tmp_path, weights):
    run(Photos(), weights, tmp_path / "s.zarr")
    before, photos = fingerprints(tmp_path / "s.zarr"), Photos()
    summary = run(photos, weights, tmp_path / "s.zarr")
    assert photos.read == []
    assert (summary.written_shards, summary.reused_shards, summary.images_per_s) == (0, 3, 0)
    assert fingerprints(tmp_path / "s.zarr") == before
    assert OWNER not in before


def test_a_run_that_was_cut_short_is_finished_reading_only_what_is_missing(tmp_path, weights):
    def interrupt(photo):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Photos(changes={10: interrupt}), weights, tmp_path / "s.zarr")
    photos, events = Photos(), []
    summary = run(photos, weights, tmp_path / "s.zarr", on_event=events.append)
    assert photos.read == list(range(8, 21))
    assert (summary.written_shards, summary.reused_shards, summary.written_images) == (2, 1, 13)
    assert events[0].images_done == 8
    run(Photos(), weights, tmp_path / "undisturbed.zarr")
    assert fingerprints(tmp_path / "s.zarr") == fingerprints(tmp_path / "undisturbed.zarr")


def test_a_lack_of_memory_is_told_and_complete_shards_stay(tmp_path, weights, monkeypatch):
    taken, passes = forward.PhotoNetwork.taps, []

    def taps(self, pixels):
        passes.append(len(pixels))
        if sum(passes) > SHARD:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return taken(self, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(forward.PhotoNetwork, "taps", taps)
        with pytest.raises(DeviceMemoryError, match=r"Out of memory \(CUDA.*--image-size makes.*shards stay: the same"):
            run(Photos(), weights, tmp_path / "s.zarr")
    assert FeatureStore.open(tmp_path / "s.zarr", require_complete=False).missing_shards() == (1, 2)
    run(Photos(), weights, tmp_path / "s.zarr")
    run(Photos(), weights, tmp_path / "undisturbed.zarr")
    assert fingerprints(tmp_path / "s.zarr") == fingerprints(tmp_path / "undisturbed.zarr")


def test_a_helper_that_outlived_its_killed_run_does_not_disturb_the_next(tmp_path, weights):
    """Its shard may be complete already: deleting and rewriting it now could leave it missing."""

    def overtaken(photo):
        (tmp_path / "s.zarr" / OWNER).write_text('{"pid": 1, "host": "other", "token": "next run"}')
        return photo

    with pytest.raises(StoreError, match="written by another run now"):
        run(Photos(changes={10: overtaken}), weights, tmp_path / "s.zarr")
    assert FeatureStore.open(tmp_path / "s.zarr", require_complete=False).missing_shards() == (1, 2)


# -- images that cannot be read --------------------------------------------------------------------------------


def test_an_unreadable_image_stops_with_its_name_and_nothing_half_written(tmp_path, weights):
    with pytest.raises(DataError, match=r"'photos/11\.jpg' .*/data/photos/11\.jpg is truncated\. .*--on-error skip"):
        run(Photos(broken=(11,)), weights, tmp_path / "s.zarr")
    store = FeatureStore.open(tmp_path / "s.zarr", require_complete=False)
    assert store.missing_shards() == (1, 2)
    run(Photos(), weights, tmp_path / "s.zarr")  # mended
    run(Photos(), weights, tmp_path / "undisturbed.zarr")
    assert fingerprints(tmp_path / "s.zarr") == fingerprints(tmp_path / "undisturbed.zarr")


def test_an_unreadable_image_can_be_left_out(tmp_path, weights):
    events = []
    summary = run(Photos(broken=(11, 20)), weights, tmp_path / "s.zarr", on_error="skip", on_event=events.append)
    assert summary.skipped == ("photos/11.jpg", "photos/20.jpg")
    assert [event.skipped for event in events[1:]] == [(), ("photos/11.jpg",), ("photos/20.jpg",)]
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert set(store.skipped) == {11, 20}
    assert "truncated" in store.skipped[11]
    assert store.size(11) == (0, 0)
    assert not zarr.open_array(str(tmp_path / "s.zarr" / "level0"), mode="r")[11].any()
    run(Photos(), weights, tmp_path / "whole.zarr")
    others = [i for i in range(21) if i not in (11, 20)]
    whole = FeatureStore.open(tmp_path / "whole.zarr").features(others)
    for stored, wanted in zip(store.features(others), whole, strict=True):
        np.testing.assert_array_equal(stored, wanted)  # its neighbours are not touched
    again = run(Photos(broken=(11, 20)), weights, tmp_path / "s.zarr", on_error="fail")
    assert (again.skipped, again.written_shards) == (summary.skipped, 0), "remembered; a complete shard is not lost"


def test_a_mended_photo_comes_into_the_store(tmp_path, weights):
    """Only the shard it is in is made anew, and the store ends as if nothing had been wrong."""
    run(Photos(broken=(11, 20)), weights, tmp_path / "s.zarr", on_error="skip")
    half = run(Photos(broken=(20,)), weights, tmp_path / "s.zarr", on_error="skip")
    assert (half.skipped, half.written_shards) == (("photos/20.jpg",), 1)
    assert run(Photos(), weights, tmp_path / "s.zarr").skipped == ()
    run(Photos(), weights, tmp_path / "whole.zarr")
    assert fingerprints(tmp_path / "s.zarr") == fingerprints(tmp_path / "whole.zarr")


def test_a_label_map_of_another_size(tmp_path, weights):
    with pytest.raises(DataError, match=r"'photos/0\.jpg'.*\(49, 90\).* 50 x 90"):
        run(Photos(masks={0: lambda label: label[:-1]}), weights, tmp_path / "s.zarr")


def test_a_scaled_label_map_is_resized_once(tmp_path, weights):
    """A map of half the photo's size (FSS masks may be) goes straight to network size; the photo's size is kept."""
    halved = Photos(masks=dict.fromkeys(range(21), lambda label: label[::2, ::2]))
    run(halved, weights, tmp_path / "s.zarr")
    store = FeatureStore.open(tmp_path / "s.zarr")
    np.testing.assert_array_equal(store.labels([0])[0], resize_label(halved.label(0), (SIZE, SIZE)))
    assert store.size(0) == (Photos().image(0).height, Photos().image(0).width)


# -- what cannot work ------------------------------------------------------------------------------------------


def test_bfloat16_is_another_recipe_whose_features_are_nearly_the_same(tmp_path, weights):
    run(Photos(range(4)), weights, tmp_path / "exact.zarr", precision="float32", shard_images=4)
    half = {"precision": "float32", "shard_images": 4, "reading": Reading(autocast="bfloat16")}
    run(Photos(range(4)), weights, tmp_path / "half.zarr", **half)
    exact, other = FeatureStore.open(tmp_path / "exact.zarr"), FeatureStore.open(tmp_path / "half.zarr")
    assert "autocast" not in exact.recipe.to_dict(), "stores of float32 keep their recipe and their digest"
    assert Recipe.from_json(other.recipe.to_json()) == other.recipe
    assert exact.recipe.differences(other.recipe) == {"autocast": ("", "bfloat16")}
    for left, right in zip(exact.features(range(4)), other.features(range(4)), strict=True):
        left, right = torch.from_numpy(left), torch.from_numpy(right)
        away = 1 - torch.nn.functional.cosine_similarity(left, right, dim=-1)
        assert 0 < float(away[left.norm(dim=-1) > 0].mean()) < 1e-3
    before = fingerprints(tmp_path / "exact.zarr")
    with pytest.raises(StoreMismatch, match=r"autocast +stored '', wanted 'bfloat16'"):
        run(Photos(range(4)), weights, tmp_path / "exact.zarr", **half)
    assert fingerprints(tmp_path / "exact.zarr") == before
    again = same_reading(other.recipe, weights)
    assert again == other.recipe, "who computes features like a store's computes as it did"
    assert open_backbone(again, weights).autocast == torch.bfloat16


def test_another_recipe_is_refused_and_changes_nothing(tmp_path, weights):
    run(Photos(), weights, tmp_path / "s.zarr")
    before = fingerprints(tmp_path / "s.zarr")
    with pytest.raises(StoreMismatch, match="stored 'int8', wanted 'float32'"):
        run(Photos(), weights, tmp_path / "s.zarr", precision="float32")
    with pytest.raises(StoreMismatch, match="data set"):
        run(Photos(range(20)), weights, tmp_path / "s.zarr")
    with pytest.raises(StoreMismatch, match="weights"):
        run(Photos(), load_weights("squeezenet1_1", "random:1"), tmp_path / "s.zarr")
    assert fingerprints(tmp_path / "s.zarr") == before


def test_too_small_a_disk_is_told_before_any_work(tmp_path, weights, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000))
    photos = Photos()
    with pytest.raises(StoreError, match=r"needs [\d,]+ bytes more for 21 images; 1,000,000 are free"):
        run(photos, weights, tmp_path / "s.zarr")
    assert photos.read == []
    monkeypatch.undo()
    assert run(photos, weights, tmp_path / "s.zarr").written_shards == 3


@pytest.mark.parametrize("task_seconds", [0, 1e6], ids=["shard by shard", "two in one go, the first fails"])
def test_a_disk_that_fills_up_on_the_way_is_told_and_the_run_can_be_finished(
    tmp_path, weights, monkeypatch, task_seconds
):
    monkeypatch.setattr(extract_module, "TASK_SECONDS", task_seconds)
    real = store_module.write_shard_file

    def full(path, *arguments):
        if path == shard_file(tmp_path / "s.zarr", "level1", 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *arguments)

    monkeypatch.setattr(store_module, "write_shard_file", full)
    with pytest.raises(StoreError, match=r"Shard 1 of .*No space left.* are free there\. Free some space"):
        run(Photos(), weights, tmp_path / "s.zarr")
    monkeypatch.undo()
    run(Photos(), weights, tmp_path / "s.zarr")
    run(Photos(), weights, tmp_path / "undisturbed.zarr")
    assert fingerprints(tmp_path / "s.zarr") == fingerprints(tmp_path / "undisturbed.zarr")


def test_features_that_are_not_numbers(tmp_path, weights):
    state = {name: tensor.clone() for name, tensor in weights.state_dict.items()}
    state["features.12.expand3x3.bias"][3] = torch.nan
    broken = Weights("squeezenet1_1", state, weights.sha256, "test")
    with pytest.raises(StoreError, match=r"'photos/0\.jpg' hold NaN or infinity at level 2"):
        run(Photos(), broken, tmp_path / "s.zarr", on_error="skip")


def test_arguments_that_cannot_work(tmp_path, weights):
    with pytest.raises(ConfigError, match="fail, skip"):
        run(Photos(), weights, tmp_path / "s.zarr", on_error="ignore")
    assert list(tmp_path.iterdir()) == []
