"""Lists of other code: every way to write one, and every way in which one can be wrong."""

from __future__ import annotations

import json

import pytest

from hsnet.errors import DataError
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.episodes.drawing import make
from pipeline.episodes.imported import import_episodes
from pipeline.episodes.manifest import ListedEpisode
from pipeline.episodes.manifest_file import write

IMAGES = ("a/1.jpg", "a/2.jpg", "a/3.jpg", "b/1.jpg", "b/2.jpg", "b/3.jpg", "b/4.jpg", "both")


def make_index(images=IMAGES, listed=None) -> DatasetIndex:
    """Fold 0 tests cat (0) and dog (1), fold 1 cow (2); 'both' shows a cat and a dog."""
    listed = listed or [(i, 0) for i in (0, 1, 2, 7)] + [(i, 1) for i in (3, 4, 5, 6, 7)]
    return DatasetIndex(
        name="own",
        classes={0: "cat", 1: "dog", 2: "cow"},
        images=tuple(images),
        splits={0: {"test": Split(tuple(listed))}, 1: {"test": Split(((0, 2), (1, 2)))}},
    )


WANTED = (ListedEpisode("a/1.jpg", ("a/2.jpg", "both"), 0), ListedEpisode("b/4.jpg", ("b/3.jpg", "b/3.jpg"), 1))


@pytest.mark.parametrize(
    ("name", "text", "more"),
    [
        ("x.csv", "query,supports,class\na/1.jpg,a/2.jpg both,cat\nb/4.jpg,b/3.jpg b/3.jpg,dog\n", {}),
        ("x.csv", "class,query,supports\r\n0,VOC/a/1.png,x/a/2;both.jpg\r\n1,4,b/3; b/3\r\n", {}),
        ("x.csv", "\ufeffquery,supports,class\na/1,a/2 both,1\nb/4,b/3 b/3,2\n", {"first_class": 1}),
        ("x.csv", "query,supports\na/1,a/2 both\nb/4,b/3 b/3\n", {}),
        (
            "x.jsonl",
            '{"query": "a/1.jpg", "supports": ["a/2", "both"], "class": "cat"}\n\n'
            '{"query": "C:\\\\b\\\\4.jpg", "supports": ["b/3", "b/3"], "class": 1}',
            {},
        ),
    ],
)
def test_ways_to_write_the_same_list(tmp_path, name, text, more):
    (tmp_path / name).write_text(text)
    manifest = import_episodes(tmp_path / name, make_index(), 0, **more)
    assert manifest.rows == WANTED
    assert manifest.made == {"draw": "imported", "from": name}


def test_a_manifest_for_other_lists_of_the_same_photos(tmp_path):
    old = make_index((*IMAGES, "more.jpg"), [(i, 0) for i in (0, 1, 2)] + [(i, 1) for i in (3, 4, 5, 6)])
    made = make(old, 0, 2, episodes=9)
    write(tmp_path / "m.parquet", made)
    new = import_episodes(tmp_path / "m.parquet", make_index(), 0)
    assert new.rows == made.rows
    assert new.data == make_index().digest != made.data


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "c/1.jpg"}, r"line 1: the data set has no photo 'c/1.jpg'"),
        ({"query": "c/4.jpg"}, r"line 1: the data set has no photo 'c/4.jpg'"),
        ({"query": ""}, r"no photo ''"),
        ({"query": "1.jpg"}, r"line 1: '1.jpg' fits 2 photos of the data set. Use whole ids"),
        ({"class": "cats"}, r"the data set has no class 'cats'"),
        ({"class": 9}, r"has no class 9 \(the first one is 0\)"),
        ({"class": -1}, r"has no class -1"),
        (
            {"class": 1},
            r"'a/1.jpg' is not listed for class 1 'dog' in fold 0, 'test'; there it has 0 'cat'.*first-class 1",
        ),
        ({"class": 2}, r"not listed for class 2 'cow'.*That class is not tested in fold 0; choose another --fold"),
        ({"supports": ["a/1"]}, r"photo 'a/1.jpg' is the query and its own support"),
        ({"supports": ["b/1"]}, r"photo 'b/1.jpg' is not listed for class 0 'cat'"),
        ({"supports": []}, r"0 supports"),
        ({"supports": "a/2"}, r"line 1 must be"),
        ({"query": 7}, r"line 1 must be"),
        ({"class": [0]}, r"class must be a name or a number"),
        ({"query": "both", "supports": ["both"], "class": None}, r"class must be|listed together for cat, dog"),
        ({"query": "../../etc/passwd"}, r"no photo"),
        ({"query": "\u001b[31mred"}, r"no photo '\\x1b\[31mred'"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path, row, message):
    good = {"query": "a/1.jpg", "supports": ["a/2.jpg"], "class": 0}
    (tmp_path / "x.jsonl").write_text(json.dumps({**good, **row}))
    with pytest.raises(DataError, match=message):
        import_episodes(tmp_path / "x.jsonl", make_index(), 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"photo,supports\na,b\n", "no column query in its first line"),
        ("x.csv", b"", "no column query and supports"),
        ("x.csv", b"query,supports\n", "holds no episode"),
        ("x.csv", b"query,supports\na/1.jpg\n", "line 2: query or supports are empty"),
        ("x.csv", b"query,supports\na/1,a/2\na/1,a/2 a/3\n", "line 3: 2 supports, but the first row has 1"),
        ("x.csv", b"query,supports\n\xff\xfe,a\n", "cannot be read as a list"),
        ("x.csv", b'query,supports\n"a/1,a/2\n', "cannot be read as a list"),
        ("x.csv", b"query,supports\n" + b"a" * 200_000 + b",b\n", "cannot be read as a list"),
        ("x.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("x.jsonl", b"7\n", "line 1 must be"),
        ("x.parquet", b"PAR1", "no readable Parquet"),
        ("x.txt", b"a b", r"must end in .csv, .jsonl, .parquet"),
    ],
)
def test_files_that_are_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        import_episodes(tmp_path / name, make_index(), 0)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        import_episodes(tmp_path / "x.csv", make_index(), 0)
