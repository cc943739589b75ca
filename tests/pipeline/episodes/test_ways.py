"""N-way episodes: what is added to a one-way one, and their manifests."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.episodes.balance import balance_of, notes
from pipeline.episodes.drawing import make, of_protocol, redraw
from pipeline.episodes.imported import import_episodes
from pipeline.episodes.manifest import ListedEpisode, Manifest, difference, episodes_in, row_text
from pipeline.episodes.manifest_file import read, write
from pipeline.episodes.protocols import Protocol, resolve
from pipeline.episodes.ways import Ways

CLASSES = {0: "cat", 1: "dog", 2: "cow", 3: "bus"}


def index(per_class=6, several=True):
    """Four classes; every fourth photo of a class is listed for the next class, too."""
    images, entries = [], []
    for class_id in CLASSES:
        for number in range(per_class):
            entries.append((len(images), class_id))
            if several and number % 4 == 0:
                entries.append((len(images), (class_id + 1) % 4))
            images.append(f"{CLASSES[class_id]}/{number}.jpg")
    split = Split(tuple(entries))
    return DatasetIndex("folder", CLASSES, tuple(images), {0: {"test": split, "trn": split}})


def episodes(data, **choices):
    manifest = make(data, 0, choices.pop("shots", 2), **{"episodes": 80, **choices})
    return episodes_in(manifest, data)


def test_one_way_is_as_it_was():
    data = index()
    one, again = make(data, 0, 3, episodes=50), make(data, 0, 3, episodes=50, ways=1, absent=0.0)
    assert again == one
    assert "ways" not in one.made
    # A fixed value: manifests of before have the digests they had.
    assert one.format == 1
    assert one.digest == make_digest_of_before(one)
    protocol = resolve("default")
    assert "ways" not in protocol.to_dict()
    assert Protocol.from_dict(protocol.to_dict()) == protocol
    three = resolve("default", ways=3, absent=0.5)
    assert Protocol.from_dict(three.to_dict()) == three
    assert three.digest != protocol.digest


def make_digest_of_before(manifest):
    """sha256 over lines of JSON, as the first version wrote them."""
    import hashlib

    hasher = hashlib.sha256(json.dumps([1, manifest.data, 0, "test"], separators=(",", ":")).encode())
    for number, row in enumerate(manifest.rows):
        line = [number, row.query, list(row.supports), row.class_id]
        hasher.update(b"\n" + json.dumps(line, separators=(",", ":")).encode())
    return "sha256:" + hasher.hexdigest()


@pytest.mark.parametrize("draw", ["stream", "reference"])
def test_classes_are_added_to_the_one_way_episodes(draw):
    data = index()
    alone, three = episodes(data, draw=draw), episodes(data, draw=draw, ways=3)
    by_class = data.split(0, "test").by_class
    for one, several in zip(alone, three, strict=True):
        assert replace(several, others=()) == one
        assert len({class_id for class_id, _ in several.classes}) == 3
        for class_id, supports in several.classes:
            assert len(supports) == 2
            assert several.query not in supports
            assert set(supports) <= set(by_class[class_id])
    others = {class_id for several in three for class_id, _ in several.others}
    assert others == set(CLASSES)
    assert len({several.others for several in three}) > 40


def test_fewer_ways_and_shots_are_the_first_of_more():
    data = index()
    for absent in (0.0, 0.5):
        one, two = (episodes(data, ways=ways, absent=absent, seed=5) for ways in (1, 2))
        for few, more in zip(one, two, strict=True):
            if few.absent == more.absent:
                assert more.classes[: len(few.classes)] == few.classes
    one, three = make(data, 0, 1, episodes=40, ways=3), make(data, 0, 3, episodes=40, ways=3)
    assert three.first(1).digest == one.digest != three.digest
    assert three.first(1).rows == one.rows


def test_another_seed_or_number_gives_other_classes():
    data = index()
    first, second = (episodes(data, ways=2, seed=seed) for seed in (0, 1))
    assert [e.others for e in first] != [e.others for e in second]
    stream = Ways(data, 0, "test", 2, 0, shots=2)
    assert stream(3, first[0]).others != stream(4, first[0]).others or stream(5, first[0]) != stream(4, first[0])


def test_absent_queries_are_listed_for_no_class_of_theirs():
    data = index()
    listed = set(data.split(0, "test").entries)
    drawn = episodes(data, ways=2, absent=0.4, episodes=400)
    absent = [e for e in drawn if e.absent]
    assert 0.3 * 400 < len(absent) < 0.5 * 400
    for episode in absent:
        assert not any((episode.query, class_id) in listed for class_id, _ in episode.classes)
    alone = episodes(data, episodes=400)
    assert [e.query for e in drawn] == [e.query for e in alone]
    assert all(e.absent for e in episodes(data, ways=1, absent=1.0))
    # A query of two classes leaves two others, not three: it stays as it is.
    three = episodes(data, ways=3, absent=1.0)
    both = {image for image, _ in listed if len([1 for i, _ in listed if i == image]) > 1}
    assert {e.absent for e in three if e.query in both} == {False}
    assert {e.absent for e in three if e.query not in both} == {True}
    assert not any("were asked for" in note for note in notes(make(data, 0, 1, episodes=400, ways=2, absent=0.4)))
    assert any("were asked for" in note for note in notes(make(data, 0, 1, episodes=400, ways=3, absent=1.0)))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"ways": 5},
            r"needs 5 classes with photos, there are 4 \(cat, dog, cow, bus\)\. Choose 1 to 4",
        ),
        ({"ways": 4, "absent": 0.1}, "beside the query's, so that it shows none of them, there are 4"),
        ({"ways": 0}, "ways must be a whole number from 1, got 0"),
        ({"ways": 2, "absent": 1.5}, "absent must be a share from 0 to 1, got 1.5"),
        ({"ways": 2, "shots": 8, "repeat_supports": False}, "a 8-shot episode needs 9 images of its class"),
        ({"ways": 2, "role": "val"}, "no images to draw episodes from"),
    ],
)
def test_what_cannot_be_drawn_is_named(choices, message):
    with pytest.raises(ConfigError, match=message):
        episodes(index(), **choices)


def test_distinct_supports_and_left_out_images():
    data = index()
    drawn = episodes(data, ways=3, shots=4, repeat_supports=False, skipped=[0, 7])
    for episode in drawn:
        assert not {0, 7} & set(episode.photos)
        assert all(len(set(supports)) == 4 for _, supports in episode.classes)


def test_manifests_of_several_ways_come_back_and_are_checked(tmp_path):
    data, path = index(), tmp_path / "m.parquet"
    (planned,) = of_protocol(resolve("default", ways=3, absent=0.3, episodes=60, shots=(1, 2)), data, 0)
    manifest = planned.manifest
    write(path, manifest)
    back = read(path)
    assert back == manifest
    assert (back.digest, back.ways, back.absent, back.format) == (manifest.digest, 3, manifest.absent, 2)
    assert redraw(back, data).digest == back.digest
    assert [e.classes for e in episodes_in(back, data)] == [
        e.classes for e in episodes(data, ways=3, absent=0.3, episodes=60)
    ]
    table = pq.read_table(path)
    others = table["others"].to_pylist()
    others[4][0]["class_id"], others[4][1]["class_id"] = others[4][1]["class_id"], others[4][0]["class_id"]
    column = table.column_names.index("others")
    pq.write_table(table.set_column(column, "others", [others]), path)
    with pytest.raises(DataError, match=r"1 of 60 episodes are not as they were written\. First in row 4"):
        read(path)
    others[4][0]["supports"] = None
    pq.write_table(table.set_column(column, "others", [others]), path)
    with pytest.raises(DataError, match="has empty fields"):
        read(path)
    pq.write_table(table.drop_columns(["absent"]), path)
    with pytest.raises(DataError, match="no column 'absent'"):
        read(path)


def test_what_episodes_differ_in_counts():
    data = index()
    base = make(data, 0, 2, episodes=30)
    kinds = [base, *(make(data, 0, 2, episodes=30, **more) for more in ({"ways": 2}, {"ways": 3}, {"absent": 0.5}))]
    assert len({kind.digest for kind in kinds}) == len({kind.fingerprint for kind in kinds}) == 4
    assert "episode 0: " in str(difference(base, kinds[1]))
    text = row_text(kinds[2].rows[0], kinds[2].classes)
    assert all(f"({kinds[2].classes[c]})" in text for c, _ in kinds[2].rows[0].classes)
    assert text.count("(class id ") == 0
    assert row_text(kinds[2].rows[0], {}).count("(class id ") == 3
    assert balance_of(kinds[2]).per_class == {c: sum(c in dict(row.classes) for row in kinds[2].rows) for c in CLASSES}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"others": ((0, ("a", "b")),)}, r"Episode 1 has classes \[0, 0\], episode 0 has 2"),
        ({"others": ()}, r"Episode 1 has classes \[0\], episode 0 has 2"),
        ({"others": ((1, ("a",)),)}, "Episode 1 has 1 supports, episode 0 has 2"),
        ({"others": ((1, ("q", "b")),)}, "photo 'q' is the query and its own support"),
        ({"others": ((7, ("a", "b")),)}, "class 7 is not tested in fold 0"),
    ],
)
def test_manifests_that_cannot_be(row, message):
    good = ListedEpisode("q", ("s", "t"), 0, ((1, ("a", "b")),))
    with pytest.raises(DataError, match=message):
        Manifest(data="d", dataset="own", fold=0, role="test", classes=CLASSES, rows=(good, replace(good, **row)))


def test_a_query_that_should_show_none_but_is_listed_is_refused():
    data = index()
    manifest = make(data, 0, 1, episodes=20, ways=2)
    wrong = replace(manifest, rows=tuple(replace(row, absent=True) for row in manifest.rows))
    with pytest.raises(DataError, match="should show none of its classes, but is listed for class"):
        episodes_in(wrong, data)


def test_lists_of_several_ways_are_not_imported(tmp_path):
    write(tmp_path / "m.parquet", make(index(), 0, 1, episodes=20, ways=2))
    with pytest.raises(DataError, match="holds 2-way episodes"):
        import_episodes(tmp_path / "m.parquet", index(), 0)
