"""`hsnet episodes`: make, show, verify, import, from a data set and from a store."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fakes import printed as invoke

from pipeline.episodes.manifest_file import read

SMALL = ("--data-option", "size=64", "--data-option", "trn_per_class=2", "--data-option", "val_per_class=6")
SHAPES = ("shapes", *SMALL)


def make(out: Path, *more: str | Path, code: int = 0) -> str:
    return invoke("episodes", "make", *SHAPES, "--out", out, *more, code=code)


def test_made_shown_and_verified(tmp_path):
    out = tmp_path / "m.parquet"
    text = make(out, "--shots", "5", "--episodes", "40", "--seed", "3", "--fold", "1")
    assert "40 with 5 supports each" in text
    assert "counter-based, seed 3" in text
    facts = json.loads(invoke("episodes", "show", out, "--json"))
    assert facts["digest"] == read(out).digest
    assert facts["fold"] == 1
    assert sum(facts["per_class"].values()) == 40
    assert invoke("episodes", "show", out) == text
    listed = invoke("episodes", "show", out, "--rows", "3")
    assert "2: " in listed
    assert "3: " not in listed.split("2: ")[1]
    rows = json.loads(invoke("episodes", "show", out, "--rows", "3", "--json"))["rows"]
    assert rows[0]["classes"][0] in facts["per_class"]
    assert f"({rows[2]['classes'][0]})" in listed, "by name, as the data set calls it"
    assert "drawn again: the same episodes" in invoke("episodes", "verify", out, *SHAPES)
    assert json.loads(invoke("episodes", "verify", out, *SHAPES, "--json"))["drawn_again"] is True


def test_the_same_everywhere_and_fewer_shots(tmp_path):
    for name, shots in (("a", "1,5"), ("b", "5"), ("c", "1")):
        make(tmp_path / f"{name}.parquet", "--shots", shots, "--episodes", "30")
    five, again, one = (read(tmp_path / f"{name}.parquet") for name in "abc")
    assert five.digest == again.digest != one.digest
    assert five.first(1).digest == one.digest
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_protocols_and_choices(tmp_path):
    made = json.loads(make(tmp_path / "p.parquet", "--protocol", "hsnet", "--episodes", "20", "--json"))
    assert [Path(one["path"]).name for one in made] == ["p-1shot.parquet", "p-5shot.parquet"]
    assert all(one["made"]["draw"] == "reference" for one in made)
    made = json.loads(make(tmp_path / "s.parquet", "--protocol", "seeds", "--episodes", "8", "--shots", "1", "--json"))
    assert [Path(one["path"]).name for one in made] == [f"s-seed{seed}.parquet" for seed in range(5)]
    text = make(tmp_path / "b.parquet", "--balance", "class", "--distinct-supports", "--episodes", "80", "--shots", "4")
    assert "classes balanced, distinct supports" in text
    assert all(len(set(row.supports)) == len(row.supports) for row in read(tmp_path / "b.parquet").rows)
    error = make(tmp_path / "x.parquet", "--draw", "reference", "--balance", "class", code=1)
    assert "follow its lists and let supports repeat" in error
    assert not (tmp_path / "x.parquet").exists()


def test_from_a_store(tmp_path):
    store = tmp_path / "s.zarr"
    invoke("extract", *SHAPES, "--backbone", "squeezenet1_1", "--image-size", "64", "--store", store, "--quiet")
    invoke("episodes", "make", "--store", store, "--episodes", "12", "--shots", "2", "--out", tmp_path / "m.parquet")
    make(tmp_path / "n.parquet", "--episodes", "12", "--shots", "2")
    assert read(tmp_path / "m.parquet").digest == read(tmp_path / "n.parquet").digest
    assert "all of these data" in invoke("episodes", "verify", tmp_path / "m.parquet", "--store", store)


def test_a_store_that_grew_still_has_the_lists_it_had(tmp_path):
    store, old = tmp_path / "s.zarr", tmp_path / "old.parquet"
    how = ("--backbone", "squeezenet1_1", "--image-size", "64", "--store", store, "--quiet")
    invoke("extract", *SHAPES, *how)
    invoke("episodes", "make", "--store", store, "--episodes", "12", "--shots", "2", "--out", old)
    invoke("extract", *SHAPES[:-1], "val_per_class=7", *how)
    assert "drawn again: the same" in invoke("episodes", "verify", old, "--store", store)
    rows = tmp_path / "rows.parquet"
    invoke(*("evaluate", "--head", "untrained", "--store", store, "--manifest", old, "--out", rows, "--quiet"))
    assert set(pq.read_table(rows)["manifest"].to_pylist()) == {read(old).digest}
    new = tmp_path / "new.parquet"
    invoke("episodes", "make", "--store", store, "--episodes", "12", "--shots", "2", "--out", new)
    assert read(new).data != read(old).data
    # The same episodes for the lists of now.
    moved = tmp_path / "moved.parquet"
    invoke("episodes", "import", old, "--store", store, "--out", moved)
    assert (read(moved).data, read(moved).rows) == (read(new).data, read(old).rows)


def test_another_data_set_is_refused(tmp_path):
    make(tmp_path / "m.parquet", "--episodes", "12", "--shots", "1")
    other = (
        "shapes",
        "--data-option",
        "size=64",
        "--data-option",
        "trn_per_class=2",
        "--data-option",
        "val_per_class=5",
    )
    error = invoke("episodes", "verify", tmp_path / "m.parquet", *other, code=1)
    assert "another data set" in error
    assert error.count("sha256:") == 2


def test_a_changed_manifest_is_refused_and_named(tmp_path):
    out = tmp_path / "m.parquet"
    make(out, "--episodes", "12", "--shots", "1")
    table = pq.read_table(out)
    queries = table["query"].to_pylist()
    queries[4], queries[5] = queries[5], queries[4]
    pq.write_table(table.set_column(table.column_names.index("query"), "query", [queries]), out)
    for command in (("show", out), ("verify", out, *SHAPES)):
        error = invoke("episodes", *command, code=1)
        assert "2 of 12 episodes are not as they were written" in error
        assert "episode 4" in error
    out.write_bytes(out.read_bytes()[:-50])
    assert "no readable Parquet file" in invoke("episodes", "show", out, code=1)


def test_a_list_of_other_code_comes_in(tmp_path):
    make(tmp_path / "m.parquet", "--episodes", "10", "--shots", "2", "--fold", "0")
    ours = read(tmp_path / "m.parquet")
    lines = [f"photos/{r.query},{'; '.join(r.supports)},{r.class_id + 1}" for r in ours.rows]
    (tmp_path / "theirs.csv").write_text("query,supports,class\n" + "\n".join(lines) + "\n")
    arguments = (tmp_path / "theirs.csv", *SHAPES, "--out", tmp_path / "theirs.parquet")
    text = invoke("episodes", "import", *arguments, "--first-class", "1")
    assert "imported from theirs.csv" in text
    assert read(tmp_path / "theirs.parquet").digest == ours.digest
    assert "nothing to draw again" in invoke("episodes", "verify", tmp_path / "theirs.parquet", *SHAPES)
    assert "--first-class 1" in invoke("episodes", "import", *arguments, code=1)


@pytest.mark.parametrize("given", [(), (*SHAPES, "--store", "s.zarr"), ("--store", "s.zarr", *SMALL)])
def test_one_source_of_lists(tmp_path, given):
    invoke("episodes", "make", *given, "--out", tmp_path / "m.parquet", code=2)
