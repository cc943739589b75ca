"""The analyze stage: figures that are those of the rows, and sets that are not mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hsnet.errors import ConfigError, DataError
from hsnet.metrics import class_iou, foreground_background_iou, mean_iou, sum_by_class
from pipeline.analyze import SECTIONS, analyze
from pipeline.episodes.protocols import POLICIES, Policy
from pipeline.scores.rows import count_columns


def metrics_of(table, shots, fusion, policy, classes):
    """(mIoU, FB-IoU, class IoUs) of a table by hsnet.metrics."""
    rows = [r for r in table.to_pylist() if (r["shots"], r["fusion"]) == (shots, fusion)]
    counts = torch.tensor([[r[name] for name in count_columns(policy)] for r in rows]).view(-1, 2, 2)
    totals = sum_by_class(counts, [r["class_id"] for r in rows], classes)
    return mean_iou(totals), foreground_background_iou(totals), class_iou(totals).tolist()


def test_every_score_is_that_of_the_metrics(rows_by_hand, tmp_path):
    table = rows_by_hand.made(classes=(0, 1, 2))
    file = rows_by_hand.read(tmp_path / "r.parquet", table)
    found = analyze([file], policies=POLICIES, fusions=("vote", "logits"))
    assert len(found.scores) == 4 * 2 * 2
    for score in found.scores:
        wanted = metrics_of(table, score.shots, score.fusion, score.policy, [0, 1, 2])
        assert (score.miou.value, score.fb_iou.value) == pytest.approx(wanted[:2], rel=1e-15)
        assert [part.value.value for part in score.classes] == wanted[2]
        assert [part.episodes for part in score.classes] == [20, 20, 20]
        assert score.miou.low < score.miou.value < score.miou.high
        assert score.episodes == 60
        assert score.needed == pytest.approx(60 * (score.miou.half_width / 0.5) ** 2, abs=1)
    assert len({(score.miou, score.policy) for score in found.scores}) == 16


def test_the_headline_is_the_protocol_s(rows_by_hand, tmp_path):
    file = rows_by_hand.read(tmp_path / "r.parquet", protocol="original")
    found = analyze([file])
    assert {score.policy for score in found.scores} == {Policy("original", False)}
    # One support: all fusions answer alike, so the protocol's own stands for them.
    assert [(score.shots, score.fusion) for score in found.scores] == [(1, "vote"), (5, "vote"), (5, "logits")]
    with pytest.raises(DataError, match=r"no counts at original size.*Evaluate again with --data-root"):
        analyze([rows_by_hand.read(tmp_path / "n.parquet", original=False)], policies=[Policy("original")])
    with pytest.raises(ConfigError, match=r"No rows of fusion 'joint'.* has logits, vote"):
        analyze([file], fusions=["joint"])
    with pytest.raises(ConfigError, match="Sections are class, size"):
        analyze([file], sections=["sizes"])
    with pytest.raises(ConfigError, match="units are episode, query"):
        analyze([file], unit="photo")
    with pytest.raises(ConfigError, match="no rows"):
        analyze([])


def test_folds_are_averaged_with_an_interval(rows_by_hand, tmp_path):
    files = [
        rows_by_hand.read(tmp_path / f"{f}.parquet", fold=f, classes=(3 * f, 3 * f + 1), checkpoint=f"c{f}", draw=f)
        for f in range(3)
    ]
    whole, *folds = analyze(files, fusions=["vote"]).scores[:4]
    assert [score.fold for score in (whole, *folds)] == [None, 0, 1, 2]
    assert whole.miou.value == pytest.approx(np.mean([score.miou.value for score in folds]))
    assert whole.fb_iou.value == pytest.approx(np.mean([score.fb_iou.value for score in folds]))
    expected = np.mean([score.miou.half_width**2 for score in folds]) ** 0.5 / 3**0.5
    assert whole.miou.half_width == pytest.approx(expected, rel=0.1)
    assert whole.episodes == 180
    assert folds[0].miou == analyze(files[:1]).scores[0].miou


def test_folds_are_drawn_apart_even_where_they_share_a_class(rows_by_hand, tmp_path):
    """Own folds may. The same draws in both would make the interval of the mean as wide as that of one fold."""
    files = [rows_by_hand.read(tmp_path / f"{f}.parquet", fold=f, shots=(1,), checkpoint=f"c{f}") for f in range(2)]
    whole, first, second = analyze(files).scores
    assert first.miou.value == second.miou.value
    assert whole.miou.half_width == pytest.approx(first.miou.half_width / 2**0.5, rel=0.1)


def test_seeds_are_pooled_and_their_spread_is_shown(rows_by_hand, tmp_path):
    together = rows_by_hand.read(tmp_path / "all.parquet", seeds=(0, 1, 2), shots=(1,), protocol="seeds")
    apart = [
        rows_by_hand.read(tmp_path / f"{seed}.parquet", seeds=(seed,), shots=(1,), protocol="seeds")
        for seed in range(3)
    ]
    (pooled,) = analyze([together], sections=SECTIONS).scores
    (same,) = analyze(apart, sections=SECTIONS).scores
    assert pooled == same
    singles = [analyze([file]).scores[0].miou for file in apart]
    assert [part.value for part in pooled.spread.parts] == singles
    values = [one.value for one in singles]
    assert pooled.spread.deviation == pytest.approx(np.std(values, ddof=1))
    assert pooled.spread.expected == pytest.approx(np.mean([one.half_width / 1.96 for one in singles]), rel=0.1)
    assert min(values) < pooled.miou.value < max(values)
    assert pooled.miou.half_width < min(one.half_width for one in singles)
    assert pooled.seeds == (0, 1, 2)
    assert analyze(apart[:1], sections=SECTIONS).scores[0].spread is None


def test_sizes(rows_by_hand, tmp_path):
    table = rows_by_hand.made(n=300, shots=(1,), fusions=("vote",))
    (score,) = analyze([rows_by_hand.read(tmp_path / "r.parquet", table)], sections=["size"]).scores
    assert sum(part.episodes for part in score.sizes) == 300
    shares = np.array(table["object_pixels"].to_pylist()) / rows_by_hand.SIZE**2
    assert score.sizes[0].name.startswith("0 px")
    assert score.sizes[0].episodes == (shares == 0).sum() > 0
    (part,) = [part for part in score.sizes if part.name == "5 to 15 %"]
    inside = table.filter(((shares > 0.05) & (shares <= 0.15)).tolist())
    assert part.episodes == len(inside)
    classes = sorted(set(inside["class_id"].to_pylist()))
    assert part.value.value == pytest.approx(metrics_of(inside, 1, "vote", POLICIES[0], classes)[0])
    assert part.classes == len(classes)
    empty = [part for part in score.sizes if not part.episodes]
    assert all(part.value is None for part in empty)
    assert score.classes == ()


def test_a_good_support_and_the_spread_by_supports_are_found(rows_by_hand, tmp_path):
    """A support that brings 30 points, among others that bring nothing; noise of 5 points between episodes."""
    effects = {"1/3.jpg": 0.3, "2/5.jpg": -0.3}
    file = rows_by_hand.read(
        tmp_path / "r.parquet", n=900, images=8, shots=(1, 5), effects=effects, noise=0.05, quality=0.45
    )
    one, five = analyze([file], sections=["support"], fusions=["vote"]).scores
    assert one.support.queries == 24
    assert one.support.best[0].name == "class1: 1/3.jpg"
    assert one.support.worst[0].name == "class2: 2/5.jpg"
    assert 15 < one.support.best[0].value.value < 40
    assert one.support.best[0].value.low > 5
    assert -40 < one.support.worst[0].value.value < -15
    assert one.support.photos == 24
    assert one.support.within.low < one.support.within.value < one.support.within.high
    assert five.support.best == five.support.worst == ()
    none = analyze([rows_by_hand.read(tmp_path / "s.parquet", n=9, images=40)], sections=["support"]).scores[0]
    assert none.support is None


def test_the_spread_by_supports_is_what_was_put_in(rows_by_hand, tmp_path):
    """Supports move IoU by 10 points, queries by 20 (a little less: IoU is cut at 0 and 100)."""
    random = np.random.default_rng(0)
    names = [f"{c}/{i}.jpg" for c in (0, 1, 2) for i in range(30)]
    effects = dict(zip(names, (0.1 * random.standard_normal(len(names))).tolist(), strict=True))
    table = rows_by_hand.made(n=1500, images=30, shots=(1,), fusions=("vote",), noise=0, effects=effects)
    (score,) = analyze([rows_by_hand.read(tmp_path / "r.parquet", table)], sections=["support"]).scores
    assert score.support.within.value == pytest.approx(10, rel=0.15)
    assert score.support.within.low < 10.5
    assert score.support.between == pytest.approx(100 * np.hypot(0.1, 0.2), rel=0.2)


def test_the_unit_of_resampling(rows_by_hand, tmp_path):
    file = rows_by_hand.read(tmp_path / "r.parquet", n=300, images=6)
    by_episode, by_query = (analyze([file], unit=unit) for unit in ("episode", "query"))
    assert by_episode.scores[0].miou.value == by_query.scores[0].miou.value
    assert by_episode.scores[0].miou != by_query.scores[0].miou
    assert any("--resample query" in note for note in by_episode.notes)
    assert not any("--resample query" in note for note in by_query.notes)


def test_what_cannot_vary_has_no_narrow_interval(rows_by_hand, tmp_path):
    """One episode of a class says little: its interval is everything, and a size leaves such a class out."""
    file = rows_by_hand.read(tmp_path / "r.parquet", n=3, shots=(1,), fusions=("vote",))
    other = rows_by_hand.read(tmp_path / "s.parquet", n=3, shots=(1,), fusions=("vote",), draw=1)
    found = analyze([file], [other], sections=["class", "size"])
    assert [(part.value.low, part.value.high) for part in found.scores[0].classes] == [(0, 100)] * 3
    assert [(part.value.low, part.value.high) for part in found.differences[0].classes] == [(-100, 100)] * 3
    assert all(part.value is None for part in found.scores[0].sizes)
    assert sum(part.episodes for part in found.scores[0].sizes) == 3


# --- paired ----------------------------------------------------------------------------------------------------


def test_a_paired_difference(rows_by_hand, tmp_path):
    better = rows_by_hand.read(tmp_path / "a.parquet", quality=0.58)
    worse = rows_by_hand.read(tmp_path / "b.parquet", draw=1, checkpoint="sha256:bb", store="sha256:other")
    found = analyze([better], [worse])
    for difference, mine, theirs in zip(found.differences, found.scores, found.scores_against, strict=True):
        assert (difference.shots, difference.fusion) == (mine.shots, mine.fusion)
        assert difference.miou.value == pytest.approx(mine.miou.value - theirs.miou.value)
        assert difference.fb_iou.value == pytest.approx(mine.fb_iou.value - theirs.fb_iou.value)
        assert difference.miou.low > 0
        assert difference.p < 0.01
        assert difference.miou.half_width < 0.7 * mine.miou.half_width  # what is hard for both cancels
        for part, one, other in zip(difference.classes, mine.classes, theirs.classes, strict=True):
            assert part.value.value == pytest.approx(one.value.value - other.value.value)
    back = analyze([worse], [better]).differences[0]
    assert (back.miou.value, back.p) == (-found.differences[0].miou.value, found.differences[0].p)


def test_a_file_against_itself_and_against_another_fusion(rows_by_hand, tmp_path):
    file = rows_by_hand.read(tmp_path / "a.parquet")
    for difference in analyze([file], [file]).differences:
        assert (difference.miou.value, difference.p, difference.needed) == (0, 1, None)
    (five,) = [d for d in analyze([file], fusions=["vote"], fusion_against="logits").differences if d.shots == 5]
    assert (five.fusion, five.fusion_against) == ("vote", "logits")
    assert five.miou.value != 0
    with pytest.raises(DataError, match="Nothing can be paired"):
        analyze([file], fusions=["vote"], fusion_against="joint")


def test_folds_are_paired_each_with_its_own(rows_by_hand, tmp_path):
    sets = [
        [
            rows_by_hand.read(
                tmp_path / f"{name}{f}.parquet", fold=f, classes=(f,), checkpoint=f"{name}{f}", draw=draw, shots=(1,)
            )
            for f in range(2)
        ]
        for draw, name in enumerate("ab")
    ]
    whole, *folds = analyze(sets[0], sets[1][::-1]).differences
    assert [one.fold for one in (whole, *folds)] == [None, 0, 1]
    assert whole.miou.value == pytest.approx(np.mean([one.miou.value for one in folds]))
    with pytest.raises(DataError, match="needs the same episodes"):
        analyze(sets[0], sets[1][:1])


def test_rows_that_were_changed_are_not_paired(rows_by_hand, tmp_path):
    import pyarrow as pa

    first, table = rows_by_hand.read(tmp_path / "a.parquet"), rows_by_hand.made(draw=1)
    queries = table["query"].to_pylist()
    queries[2] = "someone else"
    edited = table.set_column(table.column_names.index("query"), "query", pa.array(queries))
    with pytest.raises(DataError, match=r"digests of the manifests agree, but episode 2 is .*'someone else'"):
        analyze([first], [rows_by_hand.read(tmp_path / "b.parquet", edited)])


def test_what_a_reader_should_know(rows_by_hand, tmp_path):
    table = rows_by_hand.made(n=12, shots=(1,), classes=(0, 1), notes=["The store has 96 px."])
    import json

    from pipeline.scores.rows import METADATA

    facts = json.loads(table.schema.metadata[METADATA])
    facts["classes"]["9"] = "unseen"
    table = table.replace_schema_metadata({METADATA: json.dumps(facts)})
    found = analyze([rows_by_hand.read(tmp_path / "r.parquet", table)])
    assert found.notes[0] == "The store has 96 px."
    assert "No episode of 'unseen': a class without one counts as IoU 0." in found.notes
    assert any("only 6 episodes" in note for note in found.notes)
    assert found.scores[0].classes[-1].value is None
    # Two classes at about 50, one at 0.
    assert found.scores[0].miou.value == pytest.approx(sum(p.value.value for p in found.scores[0].classes[:2]) / 3)
