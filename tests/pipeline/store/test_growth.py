"""Images added to a finished store: only they are extracted, and no byte of the others changes."""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from fakes import CLASSES, Photos
from numcodecs import zstd
from PIL import Image

import pipeline.extract.stage as extract_module
import pipeline.store.feature_store as store_module
from hsnet.errors import DataError, StoreError, StoreIncomplete, StoreMismatch
from hsnet.model import HSNet
from pipeline.common.lock import OWNER
from pipeline.compare import compare
from pipeline.datasets.folder import Folder
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.protocols import resolve
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.evaluate.stage import evaluate
from pipeline.extract.plan import plan_extraction
from pipeline.extract.stage import extract
from pipeline.heads.catalogue import Method
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.loading.resident import keep
from pipeline.loading.source import StoreSource
from pipeline.store.attributes import Placement, read_facts
from pipeline.store.feature_store import FeatureStore
from pipeline.store.growth import Grown, grow
from pipeline.store.markers import marker_file, shard_file
from pipeline.store.skeleton import write_vector as _write_line
from pipeline.store.verify import verify

SIZE = 64
SHARD = 4
COW = {**CLASSES, 2: "cow"}
FIRST = tuple(range(0, 20, 2))
"""Ten photos: two whole shards and one of two images."""
MORE = tuple(range(23))
"""Thirteen more, before, between and after them."""
SOME = tuple(sorted({*FIRST, 5, 7}))
HALF = tuple(sorted({*FIRST, *range(5, 17)}))


def run(photos, weights, path, **options):
    return extract(photos, weights, path, image_size=SIZE, precision="int8", shard_images=SHARD, **options)


def data_files(path: Path) -> dict[str, tuple[str, int, int]]:
    """Shards and markers, without their summary: contents, inode and time of the last change."""
    files = [f for f in path.rglob("*") if f.is_file() and ("c" in f.parts or "_done" in f.parts)]
    files = [f for f in files if f.name != "summary"]
    return {
        str(f.relative_to(path)): (
            hashlib.sha256(f.read_bytes()).hexdigest(),
            f.stat().st_ino,
            f.stat().st_mtime_ns,
        )
        for f in files
    }


def contents(store: FeatureStore) -> dict[str, list]:
    """All that a reader gets, by image id."""
    images = range(len(store.index.images))
    arrays = [*store.features(images), store.labels(images)]
    return {
        name: [*(array[i].tobytes() for array in arrays), store.size(i), store.classes_present(i)]
        for i, name in enumerate(store.index.images)
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory, squeezenet) -> Path:
    """A store of the first photos."""
    path = tmp_path_factory.mktemp("first") / "s.zarr"
    run(Photos(FIRST), squeezenet, path)
    return path


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, squeezenet) -> Path:
    """A store of all photos, made at once."""
    path = tmp_path_factory.mktemp("fresh") / "s.zarr"
    run(Photos(MORE), squeezenet, path)
    return path


@pytest.fixture
def path(made, tmp_path) -> Path:
    """A copy of the store of the first photos."""
    return Path(shutil.copytree(made, tmp_path / "s.zarr"))


@pytest.fixture(scope="module")
def made_grown(made, tmp_path_factory, squeezenet) -> Path:
    path = Path(shutil.copytree(made, tmp_path_factory.mktemp("grown") / "s.zarr"))
    run(Photos(MORE), squeezenet, path)
    return path


@pytest.fixture
def grown(made_grown, tmp_path) -> Path:
    """A copy of the store of the first photos after it took the others."""
    return Path(shutil.copytree(made_grown, tmp_path / "grown.zarr"))


# -- what comes out --------------------------------------------------------------------------------------------


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


class Killed(BaseException):
    """From here on nothing reaches the disk."""


def kill_at(monkeypatch, here: Callable[[list[str]], bool]) -> list[str]:
    """Note every change of a name on the disk; none is made any more once `here` is true of the notes.

    But for the owner's file: the lock on it ends with its holder.
    """
    changes: list[str] = []
    dead = []

    def noted(name, real):
        def change(*arguments, **options):
            if Path(arguments[0]).name == OWNER:
                return real(*arguments, **options)
            changes.append(str(arguments[1] if name in ("replace", "rename") else arguments[0]))
            if dead or here(changes):
                dead.append(True)
                raise Killed
            return real(*arguments, **options)

        return change

    for owner, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "mkdir"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    monkeypatch.setattr(Path, "unlink", noted("unlink", Path.unlink))
    return changes


@pytest.mark.parametrize(
    ("file", "time"),
    [
        pytest.param("s.zarr/zarr.json", 1, id="before the store says that it grows"),
        pytest.param("level2/zarr.json", 1, id="while its arrays are made longer"),
        pytest.param("level1/c/3/0/0/0/0", 1, id="in the first new shard"),
        pytest.param("_done/000003.json", 1, id="before its marker"),
        pytest.param("_done/000006.json", 1, id="before the last marker"),
        pytest.param("s.zarr/zarr.json", 2, id="before the new state is the current one"),
    ],
)
def test_killed_at_any_moment_the_old_state_is_whole_and_the_next_run_finishes(
    path, made, fresh, squeezenet, monkeypatch, file, time
):
    before = data_files(path)
    with monkeypatch.context() as patch:
        kill_at(patch, lambda changes: sum(change.endswith(file) for change in changes) == time)
        with pytest.raises(Killed):
            run(Photos(MORE), squeezenet, path)
    assert data_files(path).items() >= before.items()
    store = FeatureStore.open(path)
    assert store.index == Photos(FIRST).index
    assert contents(store) == contents(FeatureStore.open(made))
    run(Photos(MORE), squeezenet, path)
    assert contents(FeatureStore.open(path)) == contents(FeatureStore.open(fresh))
    assert not list(path.rglob("*.partial"))


@pytest.mark.parametrize("begun", [None, MORE], ids=["alone", "another given up"])
def test_each_step_of_a_growth(path, made, monkeypatch, begun):
    """Killed after every single change of a name, the store opens, and the same growth can be made after it.

    Giving a longer one up, the arrays are shortened and made longer again.
    """
    before, right, recipe = data_files(path), contents(FeatureStore.open(made)), FeatureStore.open(made).recipe
    if begun is not None:
        grow(path, recipe, Photos(begun).index)
    index = Photos(MORE[:20]).index
    for moment in count():
        copy = Path(shutil.copytree(path, path.with_name(f"{moment}.zarr")))
        with monkeypatch.context() as patch:
            changes = kill_at(patch, lambda changes, moment=moment: len(changes) > moment)
            with suppress(Killed):
                grow(copy, recipe, index)
                break
        assert contents(FeatureStore.open(copy)) == right
        grow(copy, recipe, index)
        assert FeatureStore.open(copy).index == Photos(FIRST).index
        begun_now = FeatureStore.open(copy, require_complete=False, index_digest=index.digest)
        assert begun_now.missing_shards() == (3, 4, 5)
        shutil.rmtree(copy)
    assert [Path(change).parent.name for change in changes[-4:]] == ["level0", "level1", "level2", "label"]
    assert zarr.open_array(str(copy / "level0"), mode="r").shape[0] == 12 + 10
    assert {name: data_files(copy)[name][0] for name in before} == {name: file[0] for name, file in before.items()}


def test_shards_that_a_smaller_growth_has_no_use_for_are_deleted(path, squeezenet, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(extract_module, "make_current", lambda root, digest: None)
        run(Photos(MORE), squeezenet, path)
    assert marker_file(path, 6).exists()
    photos = Photos(MORE[:20])
    run(photos, squeezenet, path)
    assert sorted(photos.read) == [17, 19], "its two other shards are as they must be"
    assert not marker_file(path, 6).exists()
    assert not shard_file(path, "level0", 6).exists()


def test_a_store_that_grows_while_it_is_opened(path, squeezenet, monkeypatch):
    """The attributes are read before the arrays: in between, another process may have made these longer."""
    real, times = store_module.read_index, []

    def grown_meanwhile(*arguments):
        if not times:
            times.append(grow(path, recipe, Photos(MORE).index))
        return real(*arguments)

    recipe = FeatureStore.open(path).recipe
    monkeypatch.setattr(store_module, "read_index", grown_meanwhile)
    assert FeatureStore.open(path).index == Photos(FIRST).index
    assert times


# -- refused ---------------------------------------------------------------------------------------------------

MANY = {**CLASSES, **{n: f"class {n}" for n in range(2, 260)}}


@pytest.mark.parametrize(
    ("photos", "field", "text"),
    [
        (Photos(MORE[1:]), "image in the data set", "stored 'photos/0.jpg', wanted 'not there'"),
        (Photos(MORE[3:]), "image in the data set", "stored 'photos/0.jpg and 1 more', wanted 'not there'"),
        (Photos(MORE, classes={0: "cat", 1: "horse"}), "class 1", "stored 'dog', wanted 'horse'"),
        (Photos(MORE, classes={0: "cat"}, lists=1), "class 1", "stored 'dog', wanted 'not there'"),
        (Photos(MORE, classes=MANY), "label type", "stored 'uint8', wanted 'uint16'"),
        (Photos(MORE, classes=MANY), "ignore label", "stored 255, wanted 65535"),
        (Photos(MORE, has_ignore=True), "ignore label in use", "stored False, wanted True"),
        (Photos(MORE, name="pascal"), "data set", "stored 'folder', wanted 'pascal'"),
    ],
)
def test_a_data_set_that_has_not_only_grown_is_refused(path, squeezenet, photos, field, text):
    before = data_files(path), (path / "zarr.json").read_bytes()
    with pytest.raises(StoreMismatch, match=rf"(?s){field} +{text}.*Put back.*Nothing was changed") as caught:
        run(photos, squeezenet, path)
    assert field in caught.value.differences
    assert photos.read == []
    assert (data_files(path), (path / "zarr.json").read_bytes()) == before


def test_a_store_does_not_shrink_to_what_it_was(grown, squeezenet):
    with pytest.raises(StoreMismatch, match=r"photos/1.jpg and 12 more"):
        run(Photos(FIRST), squeezenet, grown)


def test_another_recipe_is_named_with_the_other_data_set(path, squeezenet):
    with pytest.raises(StoreMismatch, match=r"(?s)precision.*data set"):
        extract(Photos(MORE), squeezenet, path, image_size=SIZE, precision="float32")
    assert read_facts(path).states[1:] == ()


def test_only_a_growth_is_planned_and_nothing_is_written(path, squeezenet):
    recipe = FeatureStore.open(path).recipe
    assert plan_extraction(Photos(FIRST), recipe, path).plan.grown is None
    plan = plan_extraction(Photos(MORE), recipe, path).plan
    assert (plan.images, plan.images_done, plan.shards, plan.shards_done) == (23, 10, 7, 3)
    each = plan.bytes_needed / 13
    assert read_facts(path).states[1:] == ()
    with pytest.raises(DataError):
        run(Photos(MORE, broken=[15]), squeezenet, path)
    assert plan_extraction(Photos(MORE), recipe, path).plan.bytes_needed == pytest.approx(each * 9)


def test_too_small_a_disk_is_told_before_the_store_is_touched(path, squeezenet, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(StoreError, match=r"bytes more for 13 images; 1,000 are free"):
        run(Photos(MORE), squeezenet, path)
    assert read_facts(path).states[1:] == ()


def test_a_disk_that_refuses_is_told(path, squeezenet, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError, match=r"cannot be made ready for more images: .*No space left.*Mend the cause"):
            run(Photos(MORE), squeezenet, path)
    assert FeatureStore.open(path).index == Photos(FIRST).index
    run(Photos(MORE), squeezenet, path)


def test_a_store_that_is_being_written_does_not_grow(path, squeezenet):
    recipe = FeatureStore.open(path).recipe
    with FeatureStore.open(path).writing(), pytest.raises(StoreError, match="is being written by"):
        grow(path, recipe, Photos(MORE).index)
    assert read_facts(path).states[1:] == ()


# -- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a.pop("growth"), "attributes are damaged"),
        (lambda a: a.update(format=1), "damaged|does not belong"),
        (lambda a: a.update(growth={}), "attributes are damaged"),
        (lambda a: a["growth"].pop(), "attributes are damaged"),
        (lambda a: a["growth"].reverse(), "attributes are damaged"),
        (lambda a: a["growth"].append(a["growth"][0]), "attributes are damaged"),
        (lambda a: a["growth"][0].update(images=10**12), "attributes are damaged"),
        (lambda a: a["growth"][0].update(images=11), "does not fit|rows"),
        (lambda a: a["growth"][0].update(digest=a["dataset"]["digest"]), "attributes are damaged"),
        (lambda a: a["growth"][1].update(index="../index-1"), "attributes are damaged"),
        (lambda a: a["dataset"].update(row="../row-1"), "attributes are damaged"),
        (lambda a: a["dataset"].update(images=24), "attributes are damaged"),
        (lambda a: [s.update(images=24) for s in (a["growth"][1], a["dataset"])], "does not belong"),
        (lambda a: [s.update(index="index-7", row="row-7") for s in (a["growth"][1], a["dataset"])], "cannot be read"),
    ],
)
def test_changed_attributes_of_a_grown_store_are_an_error(grown, change, text):
    values = json.loads((grown / "zarr.json").read_text())
    facts = values["attributes"]["hsnet_store"]
    change(facts)
    (grown / "zarr.json").write_text(json.dumps(values))
    with pytest.raises(StoreError, match=text):
        FeatureStore.open(grown)


@pytest.mark.parametrize(
    "rows",
    [
        lambda rows: rows[::-1].copy() * 0,
        lambda rows: rows + 1,
        lambda rows: rows[:-1].copy(),
        lambda rows: np.concatenate([rows, [99]]),
        lambda rows: np.where(rows == 12, 10, rows),
        lambda rows: rows.astype(np.int32),
        lambda rows: -rows,
    ],
)
def test_changed_rows_are_an_error(grown, rows):
    stored = zarr.open_array(str(grown / "row-1"), mode="r")[:]
    _write_line(grown, "row-1", rows(stored), "")
    with pytest.raises(StoreError, match="'row-1'"):
        FeatureStore.open(grown)


def test_rows_of_other_images_make_their_shards_missing(grown):
    """A mapping that is possible but another: markers name their images, so that nothing is mistaken."""
    stored = zarr.open_array(str(grown / "row-1"), mode="r")[:]
    stored[[0, 2]] = stored[[2, 0]]
    _write_line(grown, "row-1", stored, "")
    with pytest.raises(StoreIncomplete):
        FeatureStore.open(grown)


@pytest.mark.parametrize("name", ["index", "index-1", "row-1"])
def test_an_array_that_would_unpack_to_more_than_it_says_is_refused_before_it_is(grown, name):
    digest = Photos(FIRST).index.digest if name == "index" else None
    file = grown / name / "c" / "0"
    whole = file.read_bytes()
    bomb = zstd.compress(bytes(1 << 24), 3)
    for text in (bomb + google_crc32c.value(bomb).to_bytes(4, "little"), whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(text)
        with pytest.raises(StoreError, match=f"the {name} cannot be read"):
            FeatureStore.open(grown, index_digest=digest)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(StoreError, match=f"the {name} cannot be read"):
        FeatureStore.open(grown, index_digest=digest)
    file.unlink()
    file.write_bytes(whole)
    metadata = grown / name / "zarr.json"
    values = json.loads(metadata.read_text())
    values["chunk_grid"]["configuration"]["chunk_shape"] = [10**12]
    metadata.write_text(json.dumps(values))
    with pytest.raises(StoreError, match=f"'{name}' is not laid out as"):
        FeatureStore.open(grown, index_digest=digest)


@pytest.mark.parametrize("rows", [10, 11, 13, 10**15])
def test_arrays_of_another_length_are_still_refused(grown, rows):
    file = grown / "level1" / "zarr.json"
    values = json.loads(file.read_text())
    values["shape"][0] = rows
    file.write_text(json.dumps(values))
    with pytest.raises(StoreError, match="does not fit"):
        FeatureStore.open(grown)


def test_placement():
    rows = np.array([4, 0, 5, 1, 8, 2])
    placement = Placement([3, 2, 1], 4, rows)
    assert [placement.row(i) for i in range(6)] == rows.tolist()
    assert [placement.images_in(n) for n in range(3)] == [(1, 3, 5), (0, 2), (4,)]
    assert Placement([3, 0, 3], 2, np.array([0, 1, 2, 4, 5, 6])).shards == 4
    for wrong in ([4, 0, 5, 1, 8, 3], [4, 0, 5, 1, 8], [0, 1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="do not fit"):
            Placement([3, 2, 1], 4, np.array(wrong))
