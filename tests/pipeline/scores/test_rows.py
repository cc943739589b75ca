"""Rows read back: what is refused, and what is never put together."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hsnet.errors import DataError
from pipeline.episodes.protocols import POLICIES
from pipeline.scores.rows import (
    METADATA,
    read_results,
    require_one_configuration,
    require_same_episodes,
    scored_episodes,
)


def change(table, name, edit):
    """A table with `edit` done to the values of a column."""
    values = table[name].to_pylist()
    edit(values)
    field = table.schema.field(name)
    return table.set_column(table.column_names.index(name), field, pa.array(values, field.type))


def said(table, **facts):
    old = json.loads(table.schema.metadata[METADATA])
    return table.replace_schema_metadata({METADATA: json.dumps({**old, **facts})})


def put(values, place, value):
    values[place] = value


def test_what_a_file_says(rows_by_hand, tmp_path):
    results = read_results(rows_by_hand.write(tmp_path / "r.parquet", seeds=(0, 1), n=9))
    assert (results.fold, results.shots, results.fusions) == (0, (1, 5), ("vote", "logits"))
    assert results.policies == POLICIES
    assert len(results.manifests) == len(set(results.manifests.values())) == 4
    own = scored_episodes([results], 0, 5, "logits", POLICIES[0])
    assert own.counts.shape == (18, 2, 2)
    assert own.seeds.tolist() == [0] * 9 + [1] * 9
    assert own.numbers.tolist() == [*range(9), *range(9)]
    assert scored_episodes([results], 1, 5, "vote", POLICIES[0]) is None
    assert scored_episodes([results], 0, 3, "vote", POLICIES[0]) is None
    without = read_results(rows_by_hand.write(tmp_path / "n.parquet", original=False, n=9))
    assert without.policies == POLICIES[:2]
    assert scored_episodes([without], 0, 5, "vote", POLICIES[3]) is None


def test_files_that_are_no_rows(rows_by_hand, tmp_path):
    whole = rows_by_hand.write(tmp_path / "r.parquet", n=9).read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 2):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        with pytest.raises(DataError, match="no readable Parquet file"):
            read_results(tmp_path / "cut.parquet")
    with pytest.raises(DataError, match="no readable Parquet file"):
        read_results(tmp_path / "not there.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(DataError, match="no rows of an evaluation: `hsnet evaluate --out`"):
        read_results(tmp_path / "foreign.parquet")


@pytest.mark.parametrize("name", ["fusion", "union_all", "manifest", "seed", "object_pixels"])
def test_a_missing_column_is_named(rows_by_hand, tmp_path, name):
    file = rows_by_hand.write(tmp_path / "r.parquet", rows_by_hand.made(n=9).drop_columns([name]))
    with pytest.raises(DataError, match=f"lacks the columns {name}: an earlier version wrote it"):
        read_results(file)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.slice(0, 0), "holds no episode"),
        (lambda t: change(t, "union", lambda v: put(v, 3, None)), r"column 'union' is empty in 1 of 36 rows"),
        (lambda t: change(t, "union_original", lambda v: put(v, 3, None)), r"'union_original' is empty in 1 of 36"),
        (lambda t: change(t, "intersection", lambda v: put(v, 5, 10**9)), r"row 5 .*larger than its union"),
        (lambda t: change(t, "intersection_all", lambda v: put(v, 5, -1)), r"row 5 .*negative"),
        (lambda t: change(t, "episode", lambda v: put(v, 1, 0)), "two rows of one episode"),
        (lambda t: change(t, "class_id", lambda v: put(v, 1, 9)), "another fold or class"),
        (lambda t: change(t, "fold", lambda v: put(v, 1, 2)), "another fold or class"),
        (lambda t: change(t, "checkpoint", lambda v: put(v, 1, "b")), "mixes rows of 2 values of 'checkpoint'"),
        (lambda t: change(t, "manifest", lambda v: put(v, 1, "b")), "rows of several manifests under one seed"),
        (lambda t: t.slice(0, 35), "not every way to combine supports"),
        (lambda t: said(t, classes=[]), "does not say its classes"),
        (lambda t: said(t, protocol={"episodes": 5}), "A protocol has the fields"),
        (lambda t: said(t, classes={"a": "b"}), "Another version wrote it"),
        (
            lambda t: t.set_column(t.column_names.index("union"), "union", pa.array(["x"] * len(t))),
            "Another version wrote it",
        ),
    ],
)
def test_values_that_cannot_be(rows_by_hand, tmp_path, edit, message):
    file = rows_by_hand.write(tmp_path / "r.parquet", edit(rows_by_hand.made(n=9)))
    with pytest.raises(DataError, match=message):
        read_results(file)


def test_folds_seeds_and_shots_of_one_configuration_belong_together(rows_by_hand, tmp_path):
    files = [
        rows_by_hand.write(tmp_path / "0.parquet", shots=(1,)),
        rows_by_hand.write(tmp_path / "1.parquet", shots=(1,), seeds=(1,)),
        rows_by_hand.write(tmp_path / "2.parquet", shots=(5,)),
        rows_by_hand.write(tmp_path / "3.parquet", shots=(1,), fold=1, classes=(4, 5), checkpoint="sha256:bb"),
    ]
    require_one_configuration([read_results(file) for file in files])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"data": "sha256:other"}, ("data", "sha256:data", "sha256:other")),
        ({"store": "sha256:other"}, ("store", "sha256:store", "sha256:other")),
        ({"protocol": "original"}, ("protocol's resolution", "network", "original")),
        ({"n": 30}, ("protocol's episodes", "60", "30")),
        ({"method": {"name": "cosine"}}, ("method", "hsnet", "cosine")),
        ({"recipe": {"image_size": 96}}, ("recipe", "100", "96")),
        ({"role": "val"}, ("role", "test", "val")),
        ({"fold": 0, "checkpoint": "sha256:bb"}, ("different heads", "sha256:aa", "sha256:bb")),
        ({"fold": 0, "seeds": (0,)}, ("would count twice", "manifest sha256:", "")),
        ({"fold": 0, "seeds": (0,), "images": 15}, ("different manifests", "sha256:", "seed 0")),
    ],
)
def test_what_is_never_put_together(rows_by_hand, tmp_path, other, named):
    first = read_results(rows_by_hand.write(tmp_path / "a.parquet"))
    second = read_results(rows_by_hand.write(tmp_path / "b.parquet", **{"fold": 1, "seeds": (1,), **other}))
    with pytest.raises(DataError) as error:
        require_one_configuration([first, second])
    for text in (*named, "a.parquet", "b.parquet", "Nothing was computed"):
        assert text in str(error.value)


def test_other_episodes_are_not_paired(rows_by_hand, tmp_path):
    first = read_results(rows_by_hand.write(tmp_path / "a.parquet"))
    same = read_results(rows_by_hand.write(tmp_path / "b.parquet", checkpoint="sha256:bb", draw=1, store="sha256:s"))
    require_same_episodes([first], [same])
    fewer = read_results(rows_by_hand.write(tmp_path / "c.parquet", shots=(1,)))
    assert fewer.manifests.keys() < first.manifests.keys()
    for other in ({"images": 12}, {"data": "sha256:other"}):
        odd = read_results(rows_by_hand.write(tmp_path / "d.parquet", **other))
        with pytest.raises(DataError, match="of different manifests") as error:
            require_same_episodes([first], [odd])
        for one in (first, odd):
            assert one.manifests[1, 0] in str(error.value)
    for other in ({"seeds": (3,)}, {"fold": 1}):
        odd = read_results(rows_by_hand.write(tmp_path / "d.parquet", **other))
        with pytest.raises(DataError, match="needs the same episodes") as error:
            require_same_episodes([first], [odd])
        assert first.manifests[1, 0] in str(error.value)
        assert next(iter(odd.manifests.values())) in str(error.value)
    odd = read_results(rows_by_hand.write(tmp_path / "d.parquet", shots=(2,)))
    with pytest.raises(DataError, match="no number of shots in common"):
        require_same_episodes([first], [odd])


def test_counts_are_those_of_the_table(rows_by_hand, tmp_path):
    table = rows_by_hand.made(n=9, shots=(1,), fusions=("vote",))
    own = scored_episodes([read_results(rows_by_hand.write(tmp_path / "r.parquet", table))], 0, 1, "vote", POLICIES[1])
    for place, name in ((np.s_[:, 0, 0], "intersection_background_all"), (np.s_[:, 1, 1], "union_all")):
        assert own.counts[place].tolist() == table[name].to_pylist()
