"""Manifests: the same episodes anywhere, changes found and named, other data refused."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.episodes.balance import balance_of, notes
from pipeline.episodes.drawing import make, of_protocol
from pipeline.episodes.manifest import ListedEpisode, Manifest, difference, episodes_in
from pipeline.episodes.manifest_file import read, write
from pipeline.episodes.protocols import resolve
from pipeline.episodes.published import published_name
from pipeline.episodes.stream import EpisodeStream


def make_index(name: str, listed: list[tuple[str, int]], fold: int = 0, query_order: str = "list") -> DatasetIndex:
    """An index with one test list of (image id, class id)."""
    images = tuple(sorted({image for image, _ in listed}))
    number = {image: i for i, image in enumerate(images)}
    split = Split(tuple((number[image], c) for image, c in listed))
    return DatasetIndex(
        name=name,
        classes={c: f"class{c:02d}" for c in sorted({c for _, c in listed})},
        images=images,
        splits={fold: {"test": split}},
        query_order=query_order,
    )


def small_index(*sizes: int) -> DatasetIndex:
    """Classes with so many images each, in one list."""
    sizes = sizes or (7, 8)
    return make_index("own", [(f"{c}_{i}", c) for i in range(max(sizes)) for c in range(len(sizes)) if i < sizes[c]])


def pascal_list(lines: list[str]) -> list[tuple[str, int]]:
    return [(line.split("__")[0], int(line.split("__")[1]) - 1) for line in lines]


@pytest.fixture
def manifest() -> Manifest:
    return make(small_index(), 0, 3, episodes=20, seed=4)


@pytest.fixture
def file(tmp_path, manifest) -> Path:
    write(tmp_path / "m.parquet", manifest)
    return tmp_path / "m.parquet"


def test_it_holds_the_stream_and_comes_back(manifest, file):
    stream = EpisodeStream(small_index(), 0, "test", 3, 4)
    back = read(file)
    assert back == manifest
    assert back.digest == manifest.digest
    assert episodes_in(back, small_index()) == [stream[i] for i in range(20)]


def test_fewer_shots_are_the_first_supports(manifest):
    assert manifest.first(1).digest == make(small_index(), 0, 1, episodes=20, seed=4).digest
    assert manifest.first(3) is manifest
    assert len({manifest.first(k).digest for k in (1, 2, 3)}) == 3
    for shots in (0, 4):
        with pytest.raises(ConfigError, match=f"has 3 supports per episode: it cannot give {shots} shots"):
            manifest.first(shots)


def test_the_digest_is_stable():
    """A fixed value: a change here makes every manifest that was ever written unreadable."""
    rows = (ListedEpisode("a", ("b",), 0), ListedEpisode("c/ä.jpg", ("a",), 1))
    one = Manifest(data="sha256:0", dataset="own", fold=0, role="test", classes={0: "x", 1: "y"}, rows=rows)
    lines = "a b 0\nc/ä.jpg a 1"
    assert one.fingerprint == "sha256:" + hashlib.sha256(lines.encode()).hexdigest(), "as of the published episodes"
    assert one.digest == "sha256:c2797b0f2cd1b4b5083ac00d1d87c57088be9559a76a47c47ea3a71ca0cb4085"
    for other in (
        replace(one, data="sha256:1"),
        replace(one, fold=1),
        replace(one, role="val"),
        replace(one, rows=rows[::-1]),
        replace(one, rows=rows[:1]),
    ):
        assert other.digest != one.digest
        assert difference(one, other)
    assert replace(one, made={"seed": 3}).digest == one.digest
    assert difference(one, replace(one, made={"seed": 3})) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ()}, "at least one episode"),
        ({"rows": (ListedEpisode("a", (), 0),)}, "Episode 0 has 0 supports"),
        (
            {"rows": (ListedEpisode("a", ("b",), 0), ListedEpisode("a", ("b", "c"), 0))},
            "Episode 1 has 2 supports, episode 0 has 1",
        ),
        ({"rows": (ListedEpisode("a", ("b", "a"), 0),)}, "'a' is the query and its own support"),
        ({"rows": (ListedEpisode("a", ("b",), 7),)}, "class 7 is not tested in fold 0"),
    ],
)
def test_rows_that_make_no_episodes(manifest, changes, message):
    with pytest.raises(DataError, match=message):
        replace(manifest, **changes)


def test_another_data_set_is_refused_with_both_digests(manifest):
    fewer, more = small_index(5, 8), small_index(7, 9)
    with pytest.raises(DataError, match=r"another data set[\s\S]*of its .* photos are not there") as error:
        episodes_in(manifest, fewer)
    assert manifest.data in str(error.value)
    assert fewer.digest in str(error.value)
    with pytest.raises(DataError, match=r"All its photos are there, but lists or classes differ"):
        episodes_in(manifest, more)
    # As if someone had copied the digest over.
    with pytest.raises(DataError, match=r"names \d+ photos that the data set has not"):
        episodes_in(replace(manifest, data=fewer.digest), fewer)


def test_a_photo_of_another_class_and_one_that_was_skipped(manifest):
    index = small_index()
    other = index.images[index.split(0, "test").by_class[1 - manifest.rows[0].class_id][0]]
    wrong = replace(manifest, rows=(replace(manifest.rows[0], query=other), *manifest.rows[1:]))
    with pytest.raises(DataError, match=rf"Episode 0: photo '{other}' is not listed for class"):
        episodes_in(wrong, index)
    used = index.images.index(manifest.rows[3].supports[1])
    for action in (
        lambda: episodes_in(manifest, index, skipped=(used,)),
        lambda: make(index, 0, 3, episodes=500, draw="reference", skipped=(used,)),
    ):
        with pytest.raises(ConfigError, match=rf"need 1 images that were skipped.*{index.images[used]}"):
            action()
    without = make(index, 0, 3, episodes=200, skipped=(used,))
    assert index.images[used] not in {image for row in without.rows for image in (row.query, *row.supports)}
    assert without.made["skipped"] == [index.images[used]]


# --- what is shown ---------------------------------------------------------------------------------------------


def test_the_balance_is_told():
    index = small_index(12, 3)
    listed = make(index, 0, 1, episodes=150)
    assert balance_of(listed).per_class == {0: 120, 1: 30}
    assert notes(listed) == ()  # less than twice the share of two classes
    unequal = make(small_index(30, 3, 3), 0, 1, episodes=150)
    assert notes(unequal)[0].startswith("126 of the 150 episodes are of class 'class00' (84 %)")
    even = make(index, 0, 1, episodes=150, balance="class")
    assert balance_of(even).per_class == {0: 75, 1: 75}
    assert notes(even) == ()
    short = make(index, 0, 1, episodes=1)
    assert len(balance_of(short).empty) == 1
    assert "counts as IoU 0" in notes(short)[-1]
    assert "show a support twice" in notes(make(index, 0, 2, episodes=50))[-1]
    assert notes(make(index, 0, 2, episodes=50, balance="class", repeat_supports=False)) == ()


def test_a_protocol_s_manifests():
    index = small_index()
    (only,) = of_protocol(resolve("default", episodes=10), index, 0)
    assert (only.shots, only.seed, only.manifest.shots) == ((1,), 0, 1)
    (several,) = of_protocol(resolve("default", episodes=10, shots=(1, 5)), index, 0)
    assert (several.shots, several.manifest.shots) == ((1, 5), 5)
    seeds = of_protocol(resolve("seeds", episodes=10, shots=(2,)), index, 0)
    assert [plan.seed for plan in seeds] == [0, 1, 2, 3, 4]
    assert len({plan.manifest.digest for plan in seeds}) == 5
    published = of_protocol(resolve("hsnet", episodes=10), index, 0)
    assert [(plan.shots, plan.manifest.shots) for plan in published] == [((1,), 1), ((5,), 5)]
    with pytest.raises(ConfigError, match="let supports repeat"):
        make(index, 0, 1, draw="reference", balance="class")


# --- the published episodes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 5])
def test_the_published_stream(golden, shots):
    synthetic = json.loads((golden / "f_episodes_synthetic.json").read_text())
    index = make_index("pascal", pascal_list(synthetic["pascal_lists"]["val/fold2"]), 2)
    made = make(index, 2, shots, episodes=20, draw="reference")
    assert episodes_in(made, index)
    drawn = [[row.query, list(row.supports), row.class_id] for row in made.rows]
    assert drawn == synthetic[f"pascal_fold2_shot{shots}"]


@pytest.mark.parametrize("case", [f"{d}_shot{k}" for d in ("pascal_fold1", "coco_fold0") for k in (1, 5, 10)])
def test_the_published_episodes_are_recognised(golden, shared, tmp_path, case):
    wanted = json.loads((golden / "f_episodes_real_fingerprints.json").read_text())[case]
    name, fold, shots = case.split("_")[0], int(case.split("_")[1][4:]), int(case.split("shot")[1])
    if name == "pascal":
        listed = pascal_list((shared / f"data/pascal-splits/val/fold{fold}.txt").read_text().split())
    else:
        content = pickle.loads((shared / f"data/coco-splits/val/fold{fold}.pkl").read_bytes())
        listed = [(image, c) for c, images in content.items() for image in images]
    index = make_index(name, listed, fold, "list" if name == "pascal" else "class")
    made = make(index, fold, shots, draw="reference")
    write(tmp_path / "m.parquet", made)
    back = read(tmp_path / "m.parquet")
    assert back.fingerprint == f"sha256:{wanted['sha256']}"
    assert published_name(back) == f"{name.upper()} fold {fold}, {shots}-shot"
    assert balance_of(back).repeating == wanted["episodes_with_duplicate_support"]
    assert published_name(replace(back, rows=back.rows[::-1])) is None


def test_the_published_balance_of_pascal_fold_2(shared):
    listed = pascal_list((shared / "data/pascal-splits/val/fold2.txt").read_text().split())
    made = make(make_index("pascal", listed, 2), 2, 1, draw="reference")
    assert list(balance_of(made).per_class.values()) == [99, 163, 103, 94, 541]
    assert "541 of the 1,000 episodes are of class 'class14' (54 %)" in notes(made)[0]
    even = make(make_index("pascal", listed, 2), 2, 1, balance="class")
    assert Counter(balance_of(even).per_class.values()) == {200: 5}


# --- files -----------------------------------------------------------------------------------------------------


def rewritten(file: Path, change) -> Path:
    """The file with its table and header (a dict) changed by `change(table, header)`."""
    table = pq.read_table(file)
    header = json.loads(table.schema.metadata[b"hsnet_manifest"])
    table, header = change(table, header)
    metadata = {} if header is None else {"hsnet_manifest": json.dumps(header)}
    pq.write_table(table.replace_schema_metadata(metadata), file)
    return file


def with_column(table, name, values):
    return table.set_column(table.column_names.index(name), name, values)


def test_a_changed_row_is_named(file):
    def change(table, header):
        queries = table["query"].to_pylist()
        queries[7] = "someone_else"
        return with_column(table, "query", pa.array(queries)), header

    with pytest.raises(DataError, match=r"1 of 20 episodes are not as.*row 7, episode 7: someone_else <- "):
        read(rewritten(file, change))


def test_rows_in_another_order_or_fewer(file, tmp_path, manifest):
    with pytest.raises(DataError, match=r"not as they were written. First in row 0, episode 19"):
        read(rewritten(file, lambda table, header: (table.take(list(range(19, -1, -1))), header)))
    write(file, manifest)
    with pytest.raises(DataError, match=r"says digest .* and 20 episodes, but it holds 15 with digest"):
        read(rewritten(file, lambda table, header: (table.slice(0, 15), header)))


@pytest.mark.parametrize("name", ["data", "fold", "role", "classes", "made", "digest", "episodes"])
def test_a_changed_header(file, name):
    other = {
        "data": "sha256:f",
        "fold": 1,
        "role": "val",
        "classes": {"0": "q"},
        "made": {},
        "digest": "x",
        "episodes": 1,
    }
    with pytest.raises(DataError, match="header was changed"):
        read(rewritten(file, lambda table, header: (table, {**header, name: other[name]})))
    with pytest.raises(DataError, match=f"header lacks {name}"):
        read(rewritten(file, lambda table, header: (table, {k: v for k, v in header.items() if k != name})))


def test_files_that_are_no_manifests(file, tmp_path):
    whole = file.read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 3):
        (tmp_path / "cut.parquet").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="no readable Parquet file"):
            read(tmp_path / "cut.parquet")
    for place in (tmp_path / "nothing.parquet", tmp_path / "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=r"no readable Parquet file|no manifest"):
            read(place)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(DataError, match="no manifest of episodes: `hsnet episodes make`"):
        read(tmp_path / "foreign.parquet")
    with pytest.raises(DataError, match="format 9; this version reads format 1"):
        read(rewritten(file, lambda table, header: (table, {**header, "format": 9})))


def test_columns_that_are_missing_of_another_type_or_empty(file, manifest):
    for name in ("query", "supports", "check"):
        write(file, manifest)
        with pytest.raises(DataError, match=f"no column '{name}'"):
            read(rewritten(file, lambda table, header, name=name: (table.drop_columns([name]), header)))
    write(file, manifest)
    with pytest.raises(DataError, match="no column 'class_id' of type int32"):
        read(rewritten(file, lambda t, h: (with_column(t, "class_id", pa.array(["a"] * 20)), h)))
    write(file, manifest)
    with pytest.raises(DataError, match="empty fields"):
        read(rewritten(file, lambda t, h: (with_column(t, "query", pa.array([None] * 20, pa.string())), h)))


def test_a_place_that_cannot_be_written(tmp_path, manifest):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="Cannot write"):
        write(tmp_path / "taken" / "m.parquet", manifest)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="Cannot write"):
        write(tmp_path / "folder", manifest)
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []
