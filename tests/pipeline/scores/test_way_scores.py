"""Scores of N-way rows: against sums by hand, against the 1-way bootstrap, and what does not belong together."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hsnet.errors import ConfigError, DataError
from pipeline.episodes.protocols import POLICIES, Policy, resolve
from pipeline.scores import bootstrap
from pipeline.scores.rows import METADATA, read_results
from pipeline.scores.way_rows import counts_column, holds_ways, read_way_results, schema, way_episodes
from pipeline.scores.way_scores import ALARM, compare_ways, score_ways, sums

NAMES = {0: "cat", 1: "dog", 2: "cow", 5: "bus"}


def made(*, ways=2, n=40, seed=0, draw=0, shots=(1,), fusions=("vote",), absent=0.25, fold=0, digest="m", **facts):
    """A table of made-up confusions."""
    columns = {name: [] for name in schema().names}
    for k in shots:
        for fusion in fusions:
            for number in range(n):
                random = np.random.default_rng([number, seed, fold])
                classes = random.permutation(list(NAMES))[:ways].tolist()
                none = bool(number < absent * n)
                shown = np.zeros(ways, bool) if none else random.random(ways) < 0.5
                shown[0] = not none
                noisy = np.random.default_rng([number, seed, draw, k, fold])
                cells = noisy.integers(0, 40, (ways + 1, ways + 1)) + 60 * np.eye(ways + 1, dtype=int)
                cells[0, 1:] *= int(noisy.integers(0, 2))
                cells[1:] *= shown[:, None]
                hidden = np.flatnonzero(~shown) + 1
                cells[:, hidden] *= int(noisy.integers(0, 2))
                values = {
                    "episode": number,
                    "fold": fold,
                    "seed": seed,
                    "shots": k,
                    "fusion": fusion,
                    "classes": classes,
                    "class_names": [NAMES[c] for c in classes],
                    "query": f"q{number % 15}",
                    "supports": [[f"s{c}"] * k for c in classes],
                    "absent": none,
                    "object_pixels": cells[1:].sum(1).tolist(),
                    "seconds": 0.1,
                    "manifest": f"sha256:{digest}{seed}{k}",
                    "store": "sha256:s",
                    "checkpoint": "",
                }
                for policy in POLICIES:
                    values[counts_column(policy)] = None if policy.resolution == "original" else cells.ravel().tolist()
                for name, value in values.items():
                    columns[name].append(value)
    protocol = resolve("default", ways=ways, absent=absent, shots=shots, seeds=(seed,), episodes=n, fusion=fusions[0])
    said = {
        "data": "sha256:d",
        "dataset": "own",
        "fold": fold,
        "role": "test",
        "classes": {str(c): name for c, name in NAMES.items()},
        "protocol": protocol.to_dict(),
        "method": {"name": "cosine"},
        "recipe": {"image_size": 10},
        "ways": ways,
        "background": {"score": 0.5, "fit": None},
        **facts,
    }
    return pa.table(columns, schema=schema()).replace_schema_metadata({METADATA: json.dumps(said)})


def results(path, table=None, **choices):
    pq.write_table(made(**choices) if table is None else table, path)
    return read_way_results(path)


def test_figures_are_sums_over_episodes(tmp_path):
    file = results(tmp_path / "r.parquet", ways=3)
    (score,) = score_ways([file])
    rows = file.table.to_pylist()
    inside, union = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0)
    right, wrong, objects = 0, 0, 0
    alarms, strays = [], []
    for row in rows:
        cells, places = np.reshape(row["confusion"], (4, 4)), range(1, 4)
        for place, class_id in zip(places, row["classes"], strict=True):
            inside[class_id] += cells[place, place]
            union[class_id] += cells[place].sum() + cells[:, place].sum() - cells[place, place]
            objects += cells[place].sum()
            wrong += sum(cells[place, other] for other in places if other != place)
        right += cells[1:, 1:].sum()
        hidden = [place for place in places if not cells[place].sum()]
        stray = sum(cells[:, place].sum() for place in hidden)
        seen = stray, cells.sum(), 0 < stray >= ALARM * cells.sum()
        if len(hidden) == 3:
            alarms.append(seen)
        elif hidden:
            strays.append(seen)
    ious = {name: 100 * inside[c] / union[c] for c, name in NAMES.items()}
    figures = score.figures
    assert {part.name: part.value.value for part in score.classes} == pytest.approx(ious)
    assert figures.miou.value == pytest.approx(np.mean(list(ious.values())))
    everything = sum(sum(row["confusion"]) for row in rows)
    background = sum(row["confusion"][0] for row in rows)
    halves = background / (everything - right), right / (everything - background)
    assert figures.fb_iou.value == pytest.approx(100 * np.mean(halves))
    assert figures.confused.value == pytest.approx(100 * wrong / objects)
    for seen, pixels, episodes in (
        (alarms, figures.alarm_pixels, figures.alarm_episodes),
        (strays, figures.stray_pixels, figures.stray_episodes),
    ):
        assert pixels.value == pytest.approx(100 * sum(s for s, _, _ in seen) / sum(p for _, p, _ in seen))
        assert episodes.value == pytest.approx(100 * np.mean([alarm for _, _, alarm in seen]))
        assert 0 < episodes.value < 100
        assert episodes.low < episodes.value < episodes.high
        assert pixels.low < pixels.value < pixels.high
    assert (score.empty, score.partial) == (len(alarms), len(strays))
    assert {part.name: part.episodes for part in score.classes} == {
        name: sum(c in row["classes"] for row in rows) for c, name in NAMES.items()
    }


def test_one_class_is_resampled_and_swapped_as_one_way(tmp_path):
    files = [results(tmp_path / f"{draw}.parquet", ways=1, absent=0.0, n=60, draw=draw) for draw in (0, 1)]
    episodes = [way_episodes([file], 0, 1, "vote", Policy()) for file in files]
    pair = []
    for one in episodes:
        outside, found, missed, inside = one.counts.reshape(-1, 4).T
        pair.append(np.stack([outside, inside, outside + found + missed, inside + found + missed], 1).reshape(-1, 2, 2))
    counts, classes = np.stack(pair), episodes[0].classes[:, 0]
    for unit, groups in (("episode", None), ("query", episodes[0].queries)):
        drawn = bootstrap.resample(counts, classes, sorted(NAMES), groups=groups)
        real, swapped = bootstrap.swapped_differences(counts, classes, sorted(NAMES), groups=groups)
        (score,) = score_ways(files[:1], unit=unit)
        (difference,) = compare_ways(files[:1], files[1:], unit=unit)
        values, samples = drawn.miou()
        wanted = bootstrap.interval(values[0], samples[:, 0])
        assert vars(score.figures.miou) == pytest.approx(vars(wanted))
        fb, fb_samples = drawn.fb_iou()
        assert vars(score.figures.fb_iou) == pytest.approx(vars(bootstrap.interval(fb[0], fb_samples[:, 0])))
        apart = bootstrap.interval(values[0] - values[1], samples[:, 0] - samples[:, 1])
        assert vars(difference.figures.miou) == pytest.approx(vars(apart))
        assert difference.figures.miou.value == pytest.approx(real)
        assert difference.p == pytest.approx(bootstrap.p_value(real, swapped))


def test_folds_are_averaged_and_seeds_pooled(tmp_path):
    folds = [results(tmp_path / f"{fold}.parquet", fold=fold, shots=(1, 5)) for fold in (0, 1)]
    scores = score_ways(folds)
    assert [(one.shots, one.fold) for one in scores] == [(k, fold) for k in (1, 5) for fold in (None, 0, 1)]
    mean, first, second = scores[:3]
    assert mean.figures.miou.value == pytest.approx((first.figures.miou.value + second.figures.miou.value) / 2)
    assert mean.figures.miou.half_width < first.figures.miou.half_width
    assert mean.episodes == 80
    seeds = [results(tmp_path / f"s{seed}.parquet", seed=seed) for seed in (0, 1)]
    (pooled,) = score_ways(seeds)
    assert (pooled.seeds, pooled.episodes) == ((0, 1), 80)


def test_a_headline_is_compared_with_the_headline(tmp_path):
    first = results(tmp_path / "1.parquet", shots=(1, 5), fusions=("vote",))
    second = results(tmp_path / "2.parquet", shots=(1, 5), fusions=("joint", "vote"), draw=1)
    found = compare_ways([first], [second])
    assert [(one.shots, one.fusion, one.fusion_against) for one in found] == [
        (1, "vote", "joint"),
        (5, "vote", "joint"),
    ]
    (alike,) = [one for one in compare_ways([first], [second], fusions=["vote"]) if one.shots == 5]
    assert (alike.fusion, alike.fusion_against) == ("vote", "vote")


def test_what_tells_nothing_is_none(tmp_path):
    (score,) = score_ways([results(tmp_path / "a.parquet", ways=1, absent=0.0)])
    assert score.figures.alarm_pixels is None
    assert score.figures.stray_pixels is None
    episodes = way_episodes([results(tmp_path / "b.parquet", n=4)], 0, 1, "vote", Policy())
    assert sums(episodes).shape == (4, 2 * len(NAMES) + 14)


def test_sets_that_do_not_belong_together_are_refused(tmp_path):
    two, three = results(tmp_path / "2.parquet"), results(tmp_path / "3.parquet", ways=3)
    with pytest.raises(DataError, match="protocol's ways   2\n"):
        score_ways([two, three])
    with pytest.raises(DataError, match="the same episodes, manifest sha256:m01, would count twice"):
        score_ways([two, results(tmp_path / "again.parquet")])
    with pytest.raises(DataError, match=r"protocol's absent   0\.25\n"):
        score_ways([two, results(tmp_path / "some.parquet", absent=0.5, fold=1)])
    with pytest.raises(DataError, match="are of different manifests"):
        compare_ways([two], [results(tmp_path / "other.parquet", digest="n")])
    other = made().set_column(7, "query", [[f"x{number}" for number in range(40)]])
    with pytest.raises(DataError, match=r"the episodes of .* differ"):
        compare_ways([two], [results(tmp_path / "changed.parquet", other)])
    with pytest.raises(DataError, match="no counts at original size"):
        score_ways([two], policies=[Policy("original")])
    with pytest.raises(ConfigError, match="No rows of fusion 'joint'"):
        score_ways([two], fusions=["joint"])
    with pytest.raises(ConfigError, match="unit is episode or query, not photo"):
        score_ways([two], unit="photo")


def test_files_of_the_other_kind_are_named(tmp_path, rows_by_hand):
    one = rows_by_hand.write(tmp_path / "one.parquet")
    results(tmp_path / "two.parquet")
    assert [holds_ways(path) for path in (one, tmp_path / "two.parquet", tmp_path / "none")] == [False, True, False]
    with pytest.raises(DataError, match=r"one\.parquet holds rows of 1-way episodes"):
        read_way_results(one)
    with pytest.raises(DataError, match=r"two\.parquet holds rows of 2-way episodes"):
        read_results(tmp_path / "two.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confusion": [[1, 2, 3, 4]] * 40}, r"rows of 2-way episodes have 9 values of 'confusion', found \[4\]"),
        ({"confusion": [[-1, *[1] * 8]] * 40}, "row 0: a negative number of pixels"),
        ({"classes": [[0, 9]] * 40}, "says fold 0 with its classes, but has rows of another"),
        ({"episode": [3] * 40}, "two rows of one episode"),
        ({"query": [None] * 40}, "column 'query' is empty in 40 of 40 rows"),
    ],
)
def test_rows_that_cannot_be_are_named(tmp_path, change, message):
    table = made()
    for name, values in change.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    with pytest.raises(DataError, match=message):
        results(tmp_path / "r.parquet", table.replace_schema_metadata(made().schema.metadata))
