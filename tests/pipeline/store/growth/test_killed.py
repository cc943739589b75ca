"""A growth that is killed, given up or overtaken: the old state is whole, and the next run finishes."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import zarr
from fakes import Photos
from growing import FIRST, MORE, contents, data_files, run

import pipeline.extract.stage as extract_module
import pipeline.store.feature_store as store_module
from pipeline.common.lock import OWNER
from pipeline.store.feature_store import FeatureStore
from pipeline.store.growth import grow
from pipeline.store.markers import marker_file, shard_file


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
