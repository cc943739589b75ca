"""The seal of a complete store: it says what the markers say, goes before anything is written, and is never believed
against them by a writer."""

import json
import os
import shutil
import signal
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import stores_by_hand as helpers
from fakes import fingerprints
from stores_by_hand import contents, fill, make_index, make_recipe

import pipeline.store.shard_table as table
from hsnet.errors import StoreError, StoreIncomplete
from pipeline.common.columns import pack, unpack
from pipeline.store.attributes import read_facts
from pipeline.store.feature_store import FeatureStore
from pipeline.store.growth import grow, make_current
from pipeline.store.markers import marker_file, shard_file, summary_file
from pipeline.store.restore import drop_damaged_summary
from pipeline.store.summary import SummaryDamaged
from pipeline.store.verify import verify


@pytest.fixture
def path(tmp_path):
    fill(tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def no_marker_is_read(monkeypatch) -> None:
    monkeypatch.setattr(table, "read_marker", lambda *_, **__: pytest.fail("a marker was read"))


def everything(store: FeatureStore) -> list:
    images = range(len(store.index.images))
    facts = [store.facts(number) for number in range(store.shards)]
    each = [(store.size(image), store.classes_present(image)) for image in images]
    info = {**store.info(), "sealed": None, "format": None}
    return [facts, each, store.skipped, store.nbytes, info, store.labels([3, 20]).tobytes()]


def test_a_sealed_store_says_the_same_without_reading_a_marker(path, monkeypatch):
    sealed = FeatureStore.open(path)
    assert sealed.sealed
    kept = summary_file(path).read_bytes()
    summary_file(path).unlink()
    by_markers = everything(FeatureStore.open(path))
    summary_file(path).write_bytes(kept)
    no_marker_is_read(monkeypatch)
    assert everything(FeatureStore.open(path)) == by_markers
    assert everything(sealed) == by_markers
    with pytest.raises(StoreError, match="asked for 21"):
        sealed.size(21)


def test_skipped_images_are_in_the_summary(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    store = fill(path, shards=range(0, 3, 2))
    with store.writing():
        store.write_shard(1, **contents(store, 1), skipped={10: "truncated ü file", 12: ""})
    no_marker_is_read(monkeypatch)
    store = FeatureStore.open(path)
    assert store.sealed
    assert store.skipped == {10: "truncated ü file", 12: ""}
    with pytest.raises(StoreError, match=r"skipped at extraction \(truncated"):
        store.features([10])
    assert store.features([11])


def test_the_same_store_has_the_same_summary_in_whatever_order_it_was_made(path, tmp_path):
    fill(tmp_path / "b.zarr", shards=range(2, 0, -1))
    assert not summary_file(tmp_path / "b.zarr").exists()
    fill(tmp_path / "b.zarr", shards=range(1))
    assert fingerprints(tmp_path / "b.zarr") == fingerprints(path)


WRITES = {
    "write_shard": lambda store: store.write_shard(1, **contents(store, 1)),
    "drop": lambda store: store.drop([1]),
    "grow": lambda store: grow(store.root, store.recipe, make_index(30)),
    "repair": lambda store: drop_damaged_summary(store.root) or store.drop([2]),
}


@pytest.mark.parametrize("write", WRITES)
def test_the_seal_goes_before_anything_is_written_or_deleted(path, write, monkeypatch):
    """Each call that changes the disk after it finds no summary any more."""
    store = FeatureStore.open(path)
    seen = []

    def watch(owner, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args, **more):
            seen.append((Path(args[-1]).name, summary_file(path).exists()))
            return real(*args, **more)

        monkeypatch.setattr(owner, name, watched)

    watch(Path, "unlink")
    watch(os, "replace")
    WRITES[write](store)
    changed = [entry for entry in seen if not entry[0].startswith((".", "_owner")) and entry[0] != "summary"]
    assert len(changed) > 1
    assert not any(sealed for _, sealed in changed), changed


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_deleted_marker_is_noticed_in_spite_of_the_summary(path, shard):
    marker_file(path, shard).unlink()
    with pytest.raises(StoreIncomplete, match="1 of 3 shards are missing"):
        FeatureStore.open(path)
    store = FeatureStore.open(path, require_complete=False)
    assert (store.sealed, store.missing_shards()) == (False, (shard,))
    before = fingerprints(path)
    fill(path, shards=range(shard, shard + 1))
    after = fingerprints(path)
    assert FeatureStore.open(path).sealed
    assert before.items() <= after.items()
    assert set(after) - set(before) == {f"_done/{shard:06d}.json"}


def test_killed_between_the_last_marker_and_the_summary(tmp_path, path):
    """The store is complete, is read by its markers, and the next writer seals it without changing anything else."""
    other = tmp_path / "other.zarr"
    child = os.fork()
    if not child:
        table.write_summary = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        fill(other)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    store = FeatureStore.open(other)
    assert not store.sealed
    assert everything(store)[1:4] == everything(FeatureStore.open(path))[1:4]
    with FeatureStore.open(other).writing():
        pass
    assert fingerprints(other) == fingerprints(path)


def test_a_writer_that_lost_the_store_and_is_late_leaves_no_false_seal(path, monkeypatch):
    """Its successor seals between two of its steps: when it looked for the seal, and when it removes the marker."""
    summary = summary_file(path).read_bytes()
    late = FeatureStore.open(path)
    real = table.write_summary
    summary_file(path).unlink()
    # The successor writes the summary; before it looks again the late one removes a marker.
    monkeypatch.setattr(table, "write_summary", lambda *args: (real(*args), marker_file(path, 1).unlink()))
    with FeatureStore.open(path).writing():
        pass
    assert not summary_file(path).exists()
    monkeypatch.undo()
    # The successor was done before the late one removed the marker: the late one breaks the seal itself.
    fill(path, shards=range(1, 2))
    assert summary_file(path).read_bytes() == summary
    real_unlink = Path.unlink

    def unlink(self, *args, **more):
        real_unlink(self, *args, **more)
        if self == marker_file(path, 1):
            assert not summary_file(path).exists()
            summary_file(path).write_bytes(summary)

    monkeypatch.setattr(Path, "unlink", unlink)
    late.drop([1])
    assert not summary_file(path).exists()


def rewrite(path: Path, change) -> None:
    """Change what the summary says, with a checksum that is right."""
    block = np.frombuffer(summary_file(path).read_bytes()[:-4], np.uint8)
    facts, columns = unpack(block)
    columns = {name: values.copy() for name, values in columns.items()}
    change(facts, columns)
    data = pack(facts, columns)
    summary_file(path).write_bytes(data.tobytes() + google_crc32c.value(data).to_bytes(4, "little"))


def flip(path: Path, place: int) -> None:
    data = bytearray(summary_file(path).read_bytes())
    data[place] ^= 1
    summary_file(path).write_bytes(data)


def set_to(name, value):
    def change(facts, columns):
        columns[name][0] = value

    return lambda path: rewrite(path, change)


DAMAGE = {
    "a flipped bit in a column": lambda path: flip(path, -20),
    "a flipped bit in the head": lambda path: flip(path, 12),
    "cut off": lambda path: os.truncate(summary_file(path), 100),
    "empty": lambda path: os.truncate(summary_file(path), 0),
    "text": lambda path: summary_file(path).write_text("{}" * 100),
    "huge": lambda path: os.truncate(summary_file(path), 1 << 40),
    "of another store": lambda path: rewrite(path, lambda facts, _: facts.update(store="sha256:of another store")),
    "of another data set": lambda path: rewrite(path, lambda facts, _: facts.update(dataset="sha256:other")),
    "of another format": lambda path: rewrite(path, lambda facts, _: facts.update(format=2)),
    "of other arrays": lambda path: rewrite(path, lambda facts, _: facts.update(arrays=["level0"])),
    "of more shards": lambda path: rewrite(path, lambda facts, _: facts.update(shards=1 << 60)),
    "without a column": lambda path: rewrite(path, lambda _, columns: columns.pop("width")),
    "with a short column": lambda path: rewrite(path, lambda _, c: c.update(width=c["width"][:-1])),
    "an impossible photo": set_to("height", (1 << 31) - 1),
    "a negative photo": set_to("height", -1),
    "classes from before the first": set_to("classes.ends", -5),
    "classes beyond the last": set_to("classes.ends", 1 << 40),
    "a link": lambda path: (
        summary_file(path).rename(path.parent / "outside"),
        summary_file(path).symlink_to(path.parent / "outside"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_summary_is_refused_and_repair_removes_it(path, damage):
    whole = summary_file(path).read_bytes()
    DAMAGE[damage](path)
    with pytest.raises(SummaryDamaged, match=r"_done/summary, .*cannot be used: .*hsnet store repair"):
        FeatureStore.open(path)
    assert "cannot be used" in drop_damaged_summary(path)
    assert not summary_file(path).is_symlink()
    assert not FeatureStore.open(path).sealed
    assert drop_damaged_summary(path) is None
    with FeatureStore.open(path).writing():
        pass
    assert summary_file(path).read_bytes() == whole
    if damage == "a link":
        assert (path.parent / "outside").read_bytes() == whole


@pytest.mark.parametrize("column", ["height", "classes", "level1.bytes", "label.crc32"])
def test_a_summary_that_says_something_else_than_the_markers(path, column):
    """Its checksum is right: only a comparison with the markers tells."""
    whole = summary_file(path).read_bytes()
    set_to(column, 1 if column != "classes" else 7)(path)
    store = FeatureStore.open(path)
    found = verify(store)
    assert not found.damage
    assert found.summary == "it does not say what the markers of 1 shards say, such as 0"
    with FeatureStore.open(path).writing():  # a writer believes the markers
        pass
    assert summary_file(path).read_bytes() == whole
    assert not verify(FeatureStore.open(path)).summary


def test_a_file_that_is_gone_from_a_sealed_store(path):
    """Nobody looks for the files at opening; reading, verifying and writing find out."""
    shard_file(path, "level1", 1).unlink()
    store = FeatureStore.open(path)
    with pytest.raises(StoreError, match=r"'level1' is damaged at image 'a/8\.jpg'"):
        store.features([8])
    assert verify(FeatureStore.open(path)).damaged_shards == (1,)
    with FeatureStore.open(path).writing():
        pass
    with pytest.raises(StoreIncomplete, match="1 of 3"):
        FeatureStore.open(path)


def test_a_store_that_grew_is_sealed_for_all_its_states(path, monkeypatch):
    old, grown = make_index(21), make_index(30)
    grow(path, make_recipe(), grown)
    assert not FeatureStore.open(path).sealed
    store = FeatureStore.open(path, require_complete=False, index_digest=grown.digest)
    with store.writing():
        for number in store.missing_shards():
            store.write_shard(number, **contents(store, number))
        make_current(store.place, grown.digest)
    no_marker_is_read(monkeypatch)
    for index in (old, grown):
        again = FeatureStore.open(path, index_digest=index.digest)
        assert again.sealed
        assert [again.size(image) for image in range(len(index.images))] == [
            (100 + image % 8 if image < 21 else 100 + image - 21 if image < 29 else 100, 200)
            for image in range(len(index.images))
        ]


def test_a_growth_that_is_not_current_yet_is_not_sealed(path):
    grown = make_index(30)
    grow(path, make_recipe(), grown)
    store = FeatureStore.open(path, require_complete=False, index_digest=grown.digest)
    with store.writing():
        for number in store.missing_shards():
            store.write_shard(number, **contents(store, number))
    assert not summary_file(path).exists()
    assert not FeatureStore.open(path).sealed
    assert read_facts(path).current == 0


def test_an_old_store_is_read_by_markers_until_a_writer_seals_it(path, monkeypatch):
    """Its format is raised with the seal: older programs, which know of no seal, refuse it then."""
    helpers.make_old(path)
    before = fingerprints(path)
    assert not FeatureStore.open(path).sealed
    assert verify(FeatureStore.open(path)).damage == ()
    assert fingerprints(path) == before
    with FeatureStore.open(path).writing():
        pass
    assert json.loads((path / "zarr.json").read_text())["attributes"]["hsnet_store"]["format"] == 3
    after = fingerprints(path)
    assert {name for name in after if after[name] != before.get(name)} - {"_owner.json"} == {
        "zarr.json",
        "_done/summary",
    }
    no_marker_is_read(monkeypatch)
    assert FeatureStore.open(path).sealed


def test_an_old_store_grows_and_each_state_keeps_its_kind_of_index(path, tmp_path):
    shutil.copytree(path, tmp_path / "new.zarr")
    helpers.make_old(path)
    before = fingerprints(path)
    for store_path in (path, tmp_path / "new.zarr"):
        index = make_index(30)
        grow(store_path, make_recipe(), index)
        store = FeatureStore.open(store_path, require_complete=False, index_digest=index.digest)
        with store.writing():
            for number in store.missing_shards():
                store.write_shard(number, **contents(store, number))
            make_current(store.place, index.digest)
    assert [state.columns for state in read_facts(path).states] == [False, True]
    assert (path / "zarr.json").read_bytes() != (tmp_path / "new.zarr" / "zarr.json").read_bytes()
    for digest in (make_index().digest, make_index(30).digest):
        old, new = (FeatureStore.open(one, index_digest=digest) for one in (path, tmp_path / "new.zarr"))
        assert (old.sealed, new.sealed) == (True, True)
        assert everything(old)[1:4] == everything(new)[1:4]
        assert not verify(old).damage
    kept = {
        name for name in before if name.startswith(("level", "label/c", "index", "_done")) and "zarr.json" not in name
    }
    assert {name: before[name] for name in kept}.items() <= fingerprints(path).items()
    helpers.make_old(path)  # as the old program left a store that grew: format 2
    assert read_facts(path).format == 2
    again = FeatureStore.open(path)
    assert (again.sealed, len(again.index.images)) == (False, 30)
    assert not verify(again).damage


def test_the_copy_of_a_store_is_sealed(path, tmp_path):
    shutil.copytree(path, tmp_path / "copy.zarr")
    assert FeatureStore.open(tmp_path / "copy.zarr").sealed
