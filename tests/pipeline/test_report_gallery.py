"""The gallery: which episodes, the same predictions again, and what happens where something is missing."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hsnet.errors import HSNetError
from pipeline.episodes.protocols import POLICIES
from pipeline.report.choice import choose
from pipeline.report.drawing import LONGER_SIDE
from pipeline.report.gallery import make_gallery
from pipeline.report.inputs import result_sets
from pipeline.report.origins import Origins
from pipeline.report.stage import report
from pipeline.scores.rows import METADATA, read_results, scored_episodes

OPTIONS = (("size", 64), ("trn_per_class", 2), ("val_per_class", 5))
HERE = Origins(data_options=OPTIONS)


def changed(path, out, edit):
    """The rows with `edit` done to their facts."""
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[METADATA])
    edit(facts)
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(facts)}), out)
    return out


def one_set(path):
    (rows,) = result_sets([read_results(path)])
    return rows


def picture(shown):
    return Image.open(io.BytesIO(base64.b64decode(shown.source.partition(",")[2])))


def test_the_choice(rows_by_hand, tmp_path):
    rows = read_results(rows_by_hand.write(tmp_path / "r.parquet", n=60))
    own = scored_episodes([rows], 0, 1, "vote", POLICIES[0])
    parts = {heading: chosen for heading, _, chosen in choose(own, 12)}
    assert {name: len(chosen) for name, chosen in parts.items()} == dict.fromkeys(parts, 3)
    assert list(parts) == ["Best", "Worst", "Random", "By object size"]
    every = [place for chosen in parts.values() for place in chosen]
    assert len(set(every)) == 12
    iou = np.where(own.object_pixels > 0, own.iou, np.nan)
    assert iou[parts["Best"][0]] == np.nanmax(iou)
    assert iou[parts["Worst"][0]] == np.nanmin(iou)
    for name in ("Best", "Worst"):
        assert len({int(own.classes[place]) for place in parts[name]}) == 3
    sizes = [own.object_pixels[place] for place in parts["By object size"]]
    assert sizes == sorted(sizes)
    assert choose(own, 12) == choose(own, 12)
    assert choose(own, 12, seed=1)[2] != choose(own, 12)[2]
    assert all(len(chosen) == 1 for _, _, chosen in choose(own, 1))


def test_few_episodes(rows_by_hand, tmp_path):
    rows = read_results(rows_by_hand.write(tmp_path / "r.parquet", n=2, classes=(0,)))
    own = scored_episodes([rows], 0, 1, "vote", POLICIES[0])
    shown = [number for _, _, chosen in choose(own, 40) for number in chosen]
    assert len(shown) == len(set(shown)) <= 2


@pytest.mark.parametrize("shots", [1, 2])
def test_predictions_are_those_of_the_rows(tiny_report, shots):
    gallery = make_gallery(one_set(tiny_report.rows), shots=shots, wanted=8, origins=HERE)
    assert len(gallery.episodes) == 8
    assert all(shown.equal for shown in gallery.episodes)
    assert gallery.notes == ("All 8 predictions were made again and have exactly the counts of their rows.",)
    shown = gallery.episodes[0]
    captions = [one.caption for one in shown.pictures]
    assert captions == ["support" if shots == 1 else "2 supports", "query", "truth", "prediction", "errors"]
    assert len(shown.supports) == shots
    for one in shown.pictures:
        with picture(one) as image:
            assert image.size == (one.width, one.height)
            assert max(image.size) <= LONGER_SIDE
    errors = shown.pictures[-1].alt
    inside = int(errors.split()[2].replace(",", ""))
    rows = pq.read_table(tiny_report.rows).to_pylist()
    row = next(r for r in rows if (r["episode"], r["shots"], r["fusion"]) == (shown.number, shots, "vote"))
    assert inside == row["intersection"]
    assert shown.iou == pytest.approx(100 * row["intersection"] / max(row["union"], 1))


def test_a_row_that_was_changed_is_told(tiny_report, tmp_path):
    table = pq.read_table(tiny_report.rows)
    place = table.column_names.index("union_background")
    more = [value + 1 for value in table["union_background"].to_pylist()]
    file = tmp_path / "changed.parquet"
    pq.write_table(table.set_column(place, table.schema.field(place), [more]), file)
    gallery = make_gallery(one_set(file), wanted=4, origins=HERE)
    assert not any(shown.equal for shown in gallery.episodes)
    assert "4 of 4 predictions made again differ" in gallery.notes[0]


def test_photos_are_shown_and_others_are_not(tiny_report, caplog):
    """Photos of another data set of the same layout are not taken for ours."""
    rows = one_set(tiny_report.rows)
    right = make_gallery(rows, wanted=4, origins=HERE)
    other = make_gallery(rows, wanted=4, origins=Origins(data_options=(("size", 80), ("val_per_class", 5))))
    assert "photos could not be shown" in other.notes[1]
    assert "their masks differ" in other.notes[1]
    assert "their masks differ" in caplog.text
    with picture(right.episodes[0].pictures[1]) as photo, picture(other.episodes[0].pictures[1]) as plain:
        assert np.asarray(photo).std((0, 1)).min() > 5
        assert np.asarray(plain).std((0, 1)).max() < 1


def test_without_a_data_set_masks_only(tiny_report, tmp_path, caplog):
    file = changed(tiny_report.rows, tmp_path / "r.parquet", lambda facts: facts.update(dataset="folder"))
    gallery = make_gallery(one_set(file), wanted=4)
    assert "No photos, masks only: the rows do not say where the data set is" in gallery.notes[1]
    assert "masks only" in caplog.text


@pytest.mark.parametrize(
    ("what", "origins", "text"),
    [
        ({"store": "gone.zarr"}, {}, "no feature store"),
        ({"store": None}, {}, "give --store"),
        ({"checkpoint": "gone"}, {}, "No checkpoint at gone"),
        ({"checkpoint": None}, {}, "give --checkpoint"),
        ({}, {"checkpoint": "last.safetensors"}, "is not the checkpoint of"),
    ],
)
def test_what_is_missing_is_left_out_with_its_reason(tiny_report, report_inputs, tmp_path, caplog, what, origins, text):
    """The page is made, without pictures; page, log and summary say why."""
    file = changed(tiny_report.rows, tmp_path / "r.parquet", lambda facts: facts["paths"].update(what))
    given = {name: tiny_report.run / value for name, value in origins.items()}
    made = report([file], tmp_path / "p.html", gallery=4, origins=Origins(**given))
    page = report_inputs.read(made.path)
    assert made.episodes_shown == 0
    assert text in made.left_out[0]
    assert text in page.text
    assert "Left out of this page" in page.text
    assert text in caplog.text
    assert not page.images
    assert "results-0" in page.tables


def test_another_store_is_refused(tiny_report, report_inputs, tmp_path):
    other = tmp_path / "other.zarr"
    report_inputs.hsnet(
        "extract", "shapes", "--data-option", "size=64", "--data-option", "trn_per_class=2", "--data-option",
        "val_per_class=4", "--backbone", "squeezenet1_1", "--image-size", "64", "--store", other, "-q",
    )  # fmt: skip
    with pytest.raises(HSNetError, match="is not the store of"):
        make_gallery(one_set(tiny_report.rows), wanted=4, origins=Origins(store=other))


def test_methods_that_cannot_be_had_again(tiny_report, tmp_path):
    file = changed(tiny_report.rows, tmp_path / "r.parquet", lambda facts: facts.update(method={"name": "location"}))
    with pytest.raises(HSNetError, match="cannot be made again"):
        make_gallery(one_set(file), wanted=4)
    with pytest.raises(HSNetError, match="no 7-shot"):
        make_gallery(one_set(tiny_report.rows), shots=7)


def test_baselines_are_shown_too(tiny_report):
    gallery = make_gallery(one_set(tiny_report.untrained), wanted=4, origins=HERE)
    assert all(shown.equal for shown in gallery.episodes)
    assert gallery.label == "HSNet, untrained"


def test_rows_of_some_classes_of_a_store(tiny_report, tmp_path):
    """Domain shift: the rows' data are the store's without some classes, so their digest is another."""
    file = changed(tiny_report.rows, tmp_path / "r.parquet", lambda facts: facts.update(data="sha256:narrowed"))
    gallery = make_gallery(one_set(file), wanted=4, origins=HERE)
    assert all(shown.equal for shown in gallery.episodes)
