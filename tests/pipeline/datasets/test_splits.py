"""Split files as published, whole and in part, and files that are something else."""

from __future__ import annotations

import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import pytest

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.coco import coco_index
from pipeline.datasets.fss import fss_index
from pipeline.datasets.index import DatasetIndex
from pipeline.datasets.pascal import pascal_index
from pipeline.datasets.splits import fss_lists, load_plain_pickle


def write_pascal(base: Path, side: str, folds=range(4)) -> None:
    """Two images for each class of the fold, named after side, class and number."""
    (base / side).mkdir(parents=True, exist_ok=True)
    for fold in folds:
        lines = [f"{side}_{c:02}_{n}__{c:02}" for n in range(2) for c in range(5 * fold + 1, 5 * fold + 6)]
        (base / side / f"fold{fold}.txt").write_text("\n".join(lines) + "\n")


def write_coco(base: Path, side: str, folds=range(4), protocol: int = 2) -> None:
    (base / side).mkdir(parents=True, exist_ok=True)
    folder = {"trn": "train2014", "val": "val2014"}[side]
    for fold in folds:
        listed = {c: [] for c in range(80)}
        for c in range(80):
            if (c % 4 == fold) == (side == "val"):
                listed[c] = [f"{folder}/COCO_{folder}_{c:06}{n}.jpg" for n in (2, 1)]
        (base / side / f"fold{fold}.pkl").write_bytes(pickle.dumps(listed, protocol=protocol))


def names(index: DatasetIndex, fold: int, role: str) -> list[tuple[str, int]]:
    return [(index.images[i], c) for i, c in index.split(fold, role).entries]


# --- PASCAL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["pascal", "."])
def test_pascal_trains_on_the_files_of_the_other_folds(tmp_path, inner):
    for side in ("trn", "val"):
        write_pascal(tmp_path / inner, side)
    index = pascal_index(tmp_path)
    assert index.folds == (0, 1, 2, 3)
    assert names(index, 2, "trn")[:6] == [(f"trn_{c:02}_0", c - 1) for c in range(1, 6)] + [("trn_01_1", 0)]
    assert {c for _, c in index.split(2, "trn").entries} == {*range(10), *range(15, 20)}
    assert names(index, 2, "test")[0] == ("val_11_0", 10)
    assert index.split(2, "test").class_ids == (10, 11, 12, 13, 14)
    assert index.images == tuple(sorted(index.images))
    assert index.has_ignore
    assert index.query_order == "list"
    assert index.notes == ()


def test_pascal_validation_is_the_test_side_of_the_other_classes(tmp_path):
    for side in ("trn", "val"):
        write_pascal(tmp_path, side)
    index = pascal_index(tmp_path)
    for fold in index.folds:
        val, test = set(index.split(fold, "val").entries), set(index.split(fold, "test").entries)
        assert not {c for _, c in val} & {c for _, c in test}
        assert val == {e for g in index.folds if g != fold for e in index.split(g, "test").entries}


def test_pascal_lists_in_part(tmp_path):
    write_pascal(tmp_path, "val", [0])
    index = pascal_index(tmp_path)
    assert index.folds == (0,)
    assert len(index.split(0, "test").entries) == 10
    assert index.split(0, "trn").entries == index.split(0, "val").entries == ()
    assert index.split(0, "trn").class_ids == tuple(range(5, 20))
    notes = " ".join(index.notes)
    assert "Folds [0, 1, 2, 3] have no training list" in notes
    assert "val/fold1.txt" in notes
    with pytest.raises(ConfigError, match="folds here: 0"):
        index.split(1, "test")


def test_a_training_list_is_whole_or_empty(tmp_path):
    # Fold 0 trains on files 1, 2 and 3; with one of them missing it must not train on the rest unnoticed.
    write_pascal(tmp_path, "trn", [1, 2])
    write_pascal(tmp_path, "val")
    index = pascal_index(tmp_path)
    assert all(not index.split(fold, "trn").entries for fold in range(4))
    write_pascal(tmp_path, "trn", [3])
    assert [bool(pascal_index(tmp_path).split(f, "trn").entries) for f in range(4)] == [True, False, False, False]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("2007_000032", "line 2.*not 'image__CC'"),
        ("2007_000032__x", "not 'image__CC'"),
        ("2007_000032__00", "class 00"),
        ("2007_000032__21", "class 21 .* 20 classes"),
        ("2007_000032__" + "9" * 5000, "20 classes"),
        ("../../etc/passwd__01", "not 'image__CC'"),
        ("2007_000032__06", "class 6.*classes 1 to 5 only"),
    ],
)
def test_bad_pascal_lines_are_named(tmp_path, line, text):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "fold0.txt").write_text(f"2007_000001__01\n{line}\n")
    with pytest.raises(DataError, match=text):
        pascal_index(tmp_path)


def test_binary_file_as_text_list(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "fold0.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"fold0\.txt cannot be read as text"):
        pascal_index(tmp_path)


def test_a_folder_without_split_files(tmp_path):
    for read in (pascal_index, coco_index, fss_lists):
        with pytest.raises(DataError, match="No split files in"):
            read(tmp_path)


# --- COCO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_coco_pickles(tmp_path, protocol):
    for side in ("trn", "val"):
        write_coco(tmp_path / "coco", side, protocol=protocol)
    index = coco_index(tmp_path)
    assert index.query_order == "class"
    assert not index.has_ignore
    assert index.split(1, "test").class_ids == tuple(range(1, 80, 4))
    assert names(index, 1, "test")[:2] == [
        ("val2014/COCO_val2014_0000012.jpg", 1),  # file order inside a class is kept: the reference stream needs it
        ("val2014/COCO_val2014_0000011.jpg", 1),
    ]
    assert {c for _, c in index.split(1, "trn").entries} == set(range(80)) - set(range(1, 80, 4))
    assert {c for _, c in index.split(1, "val").entries} == {c for _, c in index.split(1, "trn").entries}
    assert index.notes == ()


def test_coco_lists_in_part(tmp_path):
    write_coco(tmp_path, "val", [0])
    write_coco(tmp_path, "trn", [3])
    index = coco_index(tmp_path)
    assert index.folds == (0, 3)
    assert len(index.split(0, "test").entries) == 40
    assert len(index.split(3, "trn").entries) == 120
    assert index.split(0, "val").entries == ()  # would need val/fold1..3
    assert len(index.split(3, "val").entries) == 0
    assert "val/fold1.pkl" in " ".join(index.notes)


def test_coco_file_of_another_fold_is_found(tmp_path):
    write_coco(tmp_path, "val", [0])
    (tmp_path / "val" / "fold0.pkl").rename(tmp_path / "val" / "fold1.pkl")
    with pytest.raises(DataError, match=r"val/fold1\.pkl lists .* for class 0, which is not one of"):
        coco_index(tmp_path)


class Evil:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_never_run(tmp_path, protocol):
    write_coco(tmp_path, "val", [0])
    (tmp_path / "val" / "fold0.pkl").write_bytes(pickle.dumps({0: [Evil(tmp_path / "ran")]}, protocol=protocol))
    with pytest.raises(DataError, match=r"more than plain lists and texts.*Nothing in it was run"):
        coco_index(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(OrderedDict()),
        pickle.dumps({1.5: []}),
        pickle.dumps({0: {1, 2}}),
        pickle.dumps(b"x" * 10, protocol=5),
        b"",
        b"garbage",
        pickle.dumps({0: ["a"]})[:-3],
        b"\x80\x02h\x05.",  # memo that was never set
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a text of 2 GB in 3 bytes
        b"cos\nsystem\n(S'true'\ntR.",
        b"Pid\n.",
    ],
)
def test_other_pickles_are_data_errors(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.pkl"):
        load_plain_pickle(tmp_path / "x.pkl")


def test_memo_numbers_are_bounded(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")  # a list, noted as number 2 billion: 32 GB
    with pytest.raises(DataError, match=r"memo 2147483647 in 9 bytes"):
        load_plain_pickle(tmp_path / "x.pkl")


def test_the_second_lock_holds_alone(tmp_path, monkeypatch):
    """With every instruction let through, the unpickler itself still refuses to look up names."""
    monkeypatch.setattr("pipeline.datasets.splits._PLAIN_OPCODES", {op.name for op in pickletools.opcodes})
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(DataError, match="refused to look up"):
        load_plain_pickle(tmp_path / "x.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        ["a.jpg"],
        {0: "abc"},
        {80: ["a.jpg"]},
        {"0": ["a.jpg"]},
        {True: ["a.jpg"]},
        {0: [3]},
        {0: ["../../etc/passwd"]},
        {0: ["/etc/passwd"]},
    ],
)
def test_pickles_of_another_shape_are_data_errors(tmp_path, content):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "fold0.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=r"fold0\.pkl"):
        coco_index(tmp_path)


# --- FSS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["fss", "."])
def test_fss_lists_are_sorted(tmp_path, inner):
    base = tmp_path / inner
    base.mkdir(exist_ok=True)
    (base / "trn.txt").write_text("zeta\nalpha\n\n")
    (base / "test.txt").write_text("mid\n")
    assert fss_lists(tmp_path) == {"trn": ["alpha", "zeta"], "test": ["mid"]}


@pytest.mark.parametrize("line", ["../up", "a/b", "alpha"])
def test_bad_fss_names(tmp_path, line):
    (tmp_path / "trn.txt").write_text(f"alpha\n{line}\n")
    with pytest.raises(DataError, match=r"trn\.txt, line 2"):
        fss_lists(tmp_path)


def test_fss_class_ids_start_at_the_published_offsets():
    index = fss_index({"trn": ["b"], "val": ["c"], "test": ["a", "d"]}, lambda name: ["1.jpg", "10.jpg", "2.jpg"])
    assert index.classes == {0: "b", 520: "c", 760: "a", 761: "d"}
    assert index.split(0, "test").by_class == {760: (6, 7, 8), 761: (9, 10, 11)}
    assert index.images[6:9] == ("a/1.jpg", "a/10.jpg", "a/2.jpg")
    assert index.label_dtype == "uint16"


def test_fss_offsets_grow_with_longer_lists():
    names = [f"c{i:04}" for i in range(900)]
    index = fss_index({"trn": names[:600], "val": names[600:800], "test": names[800:]}, lambda name: ["1.jpg"])
    assert index.split(0, "val").class_ids[0] == 600
    assert index.split(0, "test").class_ids[0] == 800
    assert len(index.classes) == 900


# --- the published files themselves -----------------------------------------------------------------------------


def test_published_pascal_counts(shared):
    index = pascal_index(shared / "data" / "pascal-splits")
    counts = {
        fold: [(len(s.entries), len({i for i, _ in s.entries})) for s in map(index.splits[fold].get, ("trn", "test"))]
        for fold in index.folds
    }
    assert counts == {
        0: [(11394, 8450), (346, 345)],
        1: [(10255, 8081), (451, 433)],
        2: [(7797, 7007), (725, 587)],
        3: [(11594, 9002), (346, 326)],
    }
    assert len(index.images) == 11473
    assert index.notes == ()
    queries = [0] * 20  # 1000 evaluation episodes: full cycles and a rest
    for number in range(1000):
        queries[index.split(2, "test").entries[number % 725][1]] += 1
    assert queries[10:15] == [99, 163, 103, 94, 541]


def test_published_coco_counts(shared):
    index = coco_index(shared / "data" / "coco-splits")
    split = index.split(0, "test")
    assert len(split.entries) == 35783
    assert len({i for i, _ in split.entries}) == len(index.images) == 26052
    sizes = [len(images) for images in split.by_class.values()]
    assert (min(sizes), max(sizes), len(split.by_class[0])) == (142, 19217, 19217)
    assert DatasetIndex.from_json(index.to_json()) == index


def test_published_fss_counts(shared):
    lists = fss_lists(shared / "data" / "fss-splits")
    assert {role: len(found) for role, found in lists.items()} == {"trn": 520, "val": 240, "test": 240}
    index = fss_index(lists, lambda name: sorted(f"{n}.jpg" for n in range(1, 11)))
    assert [len(index.split(0, role).entries) for role in ("trn", "val", "test")] == [5200, 2400, 2400]
    assert sorted(index.classes) == list(range(1000))
