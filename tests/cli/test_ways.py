"""`--ways` of `hsnet episodes`, `hsnet evaluate` and `hsnet analyze`, on a store of generated pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import machine, printed

from commands.way_tables import ways_text
from pipeline.episodes.manifest_file import read
from pipeline.episodes.protocols import Policy
from pipeline.scores.bootstrap import Interval
from pipeline.scores.way_scores import WayDifference, WayFigures


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("ways") / "s.zarr"
    lists = ("--data-option", "size=64", "--data-option", "trn_per_class=3", "--data-option", "val_per_class=4")
    printed(
        "extract", "shapes", *lists, "--backbone", "squeezenet1_1", "--image-size", "64", "--store", path, "--quiet"
    )
    return path


def test_from_a_manifest_to_a_paired_test(store, tmp_path):
    manifest, rows, other = (tmp_path / f"{name}.parquet" for name in ("m", "rows", "other"))
    drawn = ("--ways", "3", "--absent", "25%", "--shots", "2", "--episodes", "24")
    text = printed("episodes", "make", "--store", store, *drawn, "--out", manifest)
    assert "24 with 2 supports each of 3 classes;" in text
    assert "drawn again: the same episodes" in printed("episodes", "verify", manifest, "--store", store)
    shown = machine("episodes", "show", manifest)
    assert (shown["ways"], shown["published"]) == (3, None)
    assert shown["absent"] == read(manifest).absent > 0
    given = ("evaluate", "--store", store, "--head", "untrained", "--quiet", "--background", "0")
    direct = machine(*given, *drawn, "--out", rows)
    again = machine(*given[:-1], "0.1", "--manifest", manifest, "--out", other)
    assert direct["facts"]["manifests"].keys() == again["facts"]["manifests"].keys()
    assert direct["facts"]["background"] == {"score": 0.0, "fit": None}
    text = printed("analyze", rows, "--against", other)
    assert "3-way episodes of shapes" in text
    assert "none shown: false alarms, of pixels" in text
    assert "p of the difference in mIoU" in text
    (score,) = machine("analyze", rows)["scores"]
    assert score == direct["scores"][0]
    refused = printed(
        "evaluate", "--store", store, "--head", "untrained", "--ways", "2", "--manifest", manifest, code=1
    )
    assert "The manifest holds 3-way episodes, 2-way ones were asked for. Give --ways 3" in refused


def test_one_way_by_either_name(store, tmp_path):
    given = ("evaluate", "--store", store, "--head", "untrained", "--episodes", "10", "--quiet")
    one, several = machine(*given), machine(*given, "--ways", "1", "--out", tmp_path / "r.parquet")
    assert several["scores"][0]["figures"]["miou"] == pytest.approx(one["scores"][0]["miou_interval"])
    assert one["facts"]["protocol"] == several["facts"]["protocol"]
    alone = tmp_path / "one.parquet"
    printed(*given, "--out", alone)
    mixed = printed("analyze", tmp_path / "r.parquet", alone, code=1)
    assert "one.parquet holds rows of 1-way episodes" in mixed


def test_the_score_of_the_background_is_fitted_and_said(store):
    text = printed("evaluate", "--store", store, "--head", "cosine", "--episodes", "10", "--ways", "2", "--quiet")
    assert "fitted on 100 one-shot episodes of training classes" in text
    assert "episodes    2-way, 10 per fold" in text


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (("--ways", "40"), 1, "a 40-way episode needs 40 classes with photos, there are"),
        (("--ways", "0"), 2, "0 is less than 1"),
        (("--ways", "2", "--background", "much"), 2, "'much' is neither a number nor 'fit'"),
        (("--background", "0.5"), 2, "--background is for --ways"),
        (("--ways", "2", "--absent", "120%"), 2, "is not above 0% and at most 100%"),
    ],
)
def test_bad_choices_are_named(store, given, code, message):
    said = printed("evaluate", "--store", store, "--head", "untrained", *given, "--quiet", code=code)
    assert message in " ".join(said.split())


def test_tables_that_are_not_made_of_several_ways(store, tmp_path):
    rows = tmp_path / "r.parquet"
    given = ("evaluate", "--store", store, "--head", "untrained", "--episodes", "5", "--quiet", "--out", rows)
    printed(*given, "--ways", "2", "--background", "0")
    assert "have no --csv" in printed("analyze", rows, "--csv", code=2)


def test_a_difference_of_two_ways_to_combine_supports_names_both():
    nothing = dict.fromkeys(("confused", "stray_pixels", "stray_episodes", "alarm_pixels", "alarm_episodes"))
    figures = WayFigures(miou=Interval(1, 0, 2), fb_iou=Interval(1, 0, 2), **nothing)
    five = WayDifference(Policy(), 5, "vote", "joint", 0, 3, figures, 0.5, ())
    assert "5-shot vote - joint, " in ways_text([five]).splitlines()[0]
    assert "vote" not in ways_text([replace(five, fusion_against="vote")])
