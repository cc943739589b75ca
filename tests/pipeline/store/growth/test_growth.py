"""Images added to a finished store: only they are extracted, and no byte of the others changes."""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import Photos
from growing import COW, FIRST, HALF, MORE, SHARD, SIZE, SOME, contents, data_files, run
from PIL import Image

import pipeline.store.feature_store as store_module
from hsnet.errors import DataError, StoreError, StoreMismatch
from hsnet.model import HSNet
from pipeline.compare import compare
from pipeline.datasets.folder import Folder
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.protocols import resolve
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.evaluate.stage import evaluate
from pipeline.extract.stage import extract
from pipeline.heads.catalogue import Method
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.loading.resident import keep
from pipeline.loading.source import StoreSource
from pipeline.store.attributes import Placement
from pipeline.store.feature_store import FeatureStore
from pipeline.store.growth import Grown
from pipeline.store.markers import shard_file
from pipeline.store.verify import verify


def test_a_grown_store_gives_what_a_fresh_one_gives_and_keeps_every_byte(path, fresh, squeezenet):
    before, photos, events = data_files(path), Photos(MORE), []
    summary = run(photos, squeezenet, path, on_event=events.append)
    assert sorted(photos.read) == sorted(set(MORE) - set(FIRST)), "only the new ones"
    after = data_files(path)
    assert {name: after[name] for name in before} == before
    new_shards = {name for name in set(after) - set(before) if not name.startswith(("index-", "row-"))}
    assert {re.search(r"(\d+)(/0|\.json)", name)[1].lstrip("0") for name in new_shards} == {"3", "4", "5", "6"}
    assert (summary.images, summary.written_shards, summary.reused_shards, summary.written_images) == (23, 4, 3, 13)
    assert events[0].grown == Grown(images_before=10, images_new=13, classes_new=())
    assert (events[0].images, events[0].images_done, events[0].shards) == (23, 10, 7)
    one, other = FeatureStore.open(path), FeatureStore.open(fresh)
    assert one.index == other.index
    assert one.index.digest == other.index.digest == Photos(MORE).index.digest
    assert contents(one) == contents(other)
    assert verify(one).damage == ()
    assert not list(path.rglob("*.partial"))
    cow = Photos(MORE, classes=COW)
    run(cow, squeezenet, path, on_event=events.append)
    assert events[-1].grown == Grown(images_before=23, images_new=0, classes_new=("cow",))
    assert (cow.read, data_files(path).items() >= after.items()) == ([], True)


def test_rows_of_a_store_that_never_grew_are_its_image_numbers(made, fresh):
    store = FeatureStore.open(made)
    assert [store.row(i) for i in range(10)] == list(range(10))
    assert [list(store.images_in(n)) for n in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    attributes = json.loads((fresh / "zarr.json").read_text())["attributes"]["hsnet_store"]
    assert sorted(attributes) == ["dataset", "format", "recipe", "shard_images"]
    assert attributes["format"] == 3


STEPS = {
    "twice": [(Photos(FIRST), 10), (Photos(SOME), 2), (Photos(MORE), 11), (Photos(MORE), 0)],
    "lists and classes, without a photo": [
        (Photos(FIRST), 10),
        (Photos(FIRST[::-1], lists=1), 0),
        (Photos(FIRST), 0),  # back to the first lists
        (Photos(FIRST, classes=COW), 0),
        (Photos(MORE, classes=COW), 13),
    ],
    "a single photo": [
        (Photos(FIRST[:1]), 1),
        (Photos(FIRST[:1], classes=COW), 0),
        (Photos(FIRST[:2], classes=COW), 1),
    ],
    "a store that was not finished": [(Photos(FIRST, broken=[10]), None), (Photos(MORE), 23 - SHARD)],
    "a growth that was not finished": [
        (Photos(FIRST), 10),
        (Photos(HALF, broken=[15]), None),
        (Photos(MORE), 13 - SHARD),
    ],
    "a photo that is taken out before it was extracted": [
        (Photos(FIRST), 10),
        (Photos(MORE, broken=[15]), None),
        (Photos([*MORE[:15], *MORE[16:]]), 12 - SHARD),  # the first new shard was done, and has the same photos
    ],
}
"""The data sets that are extracted one after the other, and how many photos that reads; None: it fails."""


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_growing_in_steps_ends_where_a_fresh_store_is(tmp_path, squeezenet, steps):
    path, kept, finished = tmp_path / "s.zarr", {}, []
    for photos, wanted in steps:
        if wanted is None:
            with pytest.raises(DataError):
                run(photos, squeezenet, path)
            assert data_files(path).items() >= kept.items()
            continue
        run(photos, squeezenet, path)
        assert len(photos.read) == wanted
        assert data_files(path).items() >= kept.items(), "what was finished is never touched"
        kept = data_files(path)
        finished.append(photos.index)
    run(photos, squeezenet, tmp_path / "fresh.zarr")
    store = FeatureStore.open(path)
    whole = contents(store)
    assert whole == contents(FeatureStore.open(tmp_path / "fresh.zarr"))
    for index in finished:  # what was trained on them can be repeated
        earlier = FeatureStore.open(path, index_digest=index.digest)
        assert earlier.index == index
        assert contents(earlier) == {name: whole[name] for name in index.images}
    assert store.info()["images_to_come"] == 0
    assert len(list(path.glob("_done/*.json"))) == store.shards
    assert len(list(path.glob("index*"))) == len(store.info()["growths"]), "nothing is left of what was given up"


def test_the_example_of_the_documentation_runs_on_both(grown, fresh, tmp_path, monkeypatch, capsys):
    text = (Path(store_module.__file__).parents[2] / "docs" / "store.md").read_text()
    program = next(part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "correlation" in part)
    for number, made in enumerate((grown, fresh)):
        (tmp_path / str(number)).mkdir()
        shutil.copytree(made, tmp_path / str(number) / "shapes.zarr")
        monkeypatch.chdir(tmp_path / str(number))
        exec(program, {})
    one, other = capsys.readouterr().out.splitlines()
    assert one == other
    assert one.startswith("photos/0.jpg against photos/1.jpg (")


def test_a_folder_that_grows_by_photos_and_by_a_class(tmp_path, squeezenet):
    def add(name):
        number = int(re.sub(r"\D", "", name))
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (60, 70, 3), np.uint8)
        mask = np.zeros((60, 70), np.uint8)
        mask[10:40, number : 30 + number] = 255
        Image.fromarray(pixels).save(tmp_path / "data" / f"{name}.jpg")
        Image.fromarray(mask).save(tmp_path / "data" / f"{name}.png")

    def extracted(path):
        return run(Folder(tmp_path / "data"), squeezenet, path)

    for name in ("cat/2", "cat/4", "dog/1", "dog/7"):
        add(name)
    path = tmp_path / "s.zarr"
    extracted(path)
    before = data_files(path)
    for name in ("cat/1", "cat/3", "dog/5", "emu/1", "emu/2"):
        add(name)
    assert extracted(path).written_images == 5
    after = data_files(path)
    assert {name: after[name] for name in before} == before
    for name in ("bat/1", "bat/2"):
        add(name)
    with pytest.raises(StoreMismatch, match=r"class 0 +stored 'cat', wanted 'bat'"):
        extracted(path)
    (tmp_path / "data" / "dataset.yaml").write_text("classes: [cat, dog, emu, bat]\n")
    assert extracted(path).written_images == 2
    extracted(tmp_path / "fresh.zarr")
    store = FeatureStore.open(path)
    assert contents(store) == contents(FeatureStore.open(tmp_path / "fresh.zarr"))
    assert store.index.images[:2] == ("cat/1.jpg", "cat/2.jpg")


# -- every stage ------------------------------------------------------------------------------------------------


def test_an_evaluation_of_a_grown_store_gives_the_rows_of_a_fresh_one(tmp_path, squeezenet):
    def made(path, *sides):
        for side in sides:
            data = Shapes(size=64, trn_per_class=side, val_per_class=side)
            extract(data, squeezenet, path, image_size=SIZE, precision="int8")
        return StoreSource(FeatureStore.open(path))

    def segmenter():
        torch.manual_seed(0)
        return LearnedSegmenter(HSNet((4, 2, 2), (4, 8, 16)).eval())

    grown, fresh = made(tmp_path / "grown.zarr", 2, 3), made(tmp_path / "fresh.zarr", 3)
    protocol = resolve(shots=(1,), episodes=6)
    one, other = (
        evaluate(EvaluationPlan(method=Method(segmenter, {}), source=source, protocol=protocol, fold=0))
        for source in (grown, fresh)
    )
    one, other = (result.rows.drop_columns(["seconds", "store"]) for result in (one, other))
    assert one.num_rows == 6
    assert one.equals(other)
    images = sorted({*range(5), len(grown.index.images) - 1})
    resident = keep(grown, images, "device")
    for a, b in zip(resident.features(images), fresh.features(images), strict=True):
        assert torch.equal(a, b)
    assert all(error.largest == 0 for error in compare(grown, fresh, pairs=3).layers)


def test_a_coded_store_keeps_its_fit(tmp_path, squeezenet):
    path = tmp_path / "s.zarr"
    options = {"bytes_per_image": 30_000}
    run(Photos(FIRST), squeezenet, path, **options)
    recipe, events = FeatureStore.open(path).recipe, []
    run(Photos(MORE), squeezenet, path, on_event=events.append, **options)
    store = FeatureStore.open(path)
    assert store.recipe == recipe
    assert events[0].grown.images_new == 13, "nothing is fitted again"
    assert store.codec.decode(StoreSource(store).features([22]))


def test_damage_in_a_grown_store_is_named_and_repaired(grown, fresh, squeezenet):
    file = shard_file(grown, "level1", 4)
    whole = file.read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    store = FeatureStore.open(grown)
    image = store.images_in(4)[0]
    with pytest.raises(StoreError, match=f"'level1' is damaged at image '{store.index.images[image]}' .*c/4/"):
        store.features([image])
    found = verify(store)
    assert found.damaged_shards == (4,)
    run(Photos(MORE), squeezenet, grown, damaged=found.damaged_shards)
    assert file.read_bytes() == whole
    assert contents(FeatureStore.open(grown)) == contents(FeatureStore.open(fresh))


def test_a_skipped_photo_keeps_its_number(path, squeezenet):
    run(Photos(MORE, broken=[1]), squeezenet, path, on_error="skip")
    store = FeatureStore.open(path)
    assert list(store.skipped) == [1]
    with pytest.raises(StoreError, match=r"'photos/1\.jpg' has no features"):
        store.features([1])
    photos = Photos(MORE)
    run(photos, squeezenet, path)  # mended: its shard is made anew, no other
    assert len(set(photos.read)) == SHARD
    assert not FeatureStore.open(path).skipped


# -- readers, killed writers -----------------------------------------------------------------------------------


def test_readers_keep_the_old_state_until_all_new_images_are_there(path, squeezenet):
    early = FeatureStore.open(path)
    right, copy = contents(early), pickle.dumps(early)
    seen = []

    class Watched(Photos):
        def image(self, i):
            store = FeatureStore.open(path)
            seen.append((store.index.digest, contents(store) == right, store.info()["images_to_come"]))
            return super().image(i)

    run(Watched(MORE), squeezenet, path)
    assert set(seen) == {(Photos(FIRST).index.digest, True, 13)}
    assert contents(early) == right, "opened before, used after"
    assert contents(pickle.loads(copy)) == right
    assert early.index == Photos(FIRST).index
    assert len(FeatureStore.open(path).index.images) == 23


def test_placement():
    rows = np.array([4, 0, 5, 1, 8, 2])
    placement = Placement([3, 2, 1], 4, rows)
    assert [placement.row(i) for i in range(6)] == rows.tolist()
    assert [placement.images_in(n) for n in range(3)] == [(1, 3, 5), (0, 2), (4,)]
    assert Placement([3, 0, 3], 2, np.array([0, 1, 2, 4, 5, 6])).shards == 4
    for wrong in ([4, 0, 5, 1, 8, 3], [4, 0, 5, 1, 8], [0, 1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="do not fit"):
            Placement([3, 2, 1], 4, np.array(wrong))
