"""A folder of predictions: looked at, corrected, predicted again."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fakes import invoke, machine
from PIL import Image
from tiny_bank import NAME, drawn, make_bank, mask_of, numbers, photo_file

from hsnet.errors import ConfigError, DataError
from pipeline.annotations.write import FORMATS
from pipeline.bank.folder import Bank
from pipeline.predict.prepare import Choices, prepare
from pipeline.predict.stage import RESULTS, predict, read_results
from pipeline.review.app import create_app
from pipeline.review.folder import REVIEW, Reviewed
from pipeline.review.loop import Loop
from pipeline.serve.engine import Engine
from pipeline.serve.guard import Access

CHOICES = Choices(head="contrast")


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A bank of two photos, and three others predicted by it."""
    folder = tmp_path_factory.mktemp("review")
    bank = make_bank(folder)
    photos = folder / "photos"
    photos.mkdir()
    queries = [photo_file(photos, number) for number in numbers()[2:5]]
    (photos / "broken.png").write_bytes(b"none")
    predict(prepare(CHOICES, bank=bank).work, [*queries, photos / "broken.png"], folder / "out", supports={NAME: ()})
    return folder


@pytest.fixture
def folder(ready, tmp_path):
    for name in ("tiny.bank", "out"):
        shutil.copytree(ready / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def loop(folder):
    loop = Loop(Reviewed(folder / "out"), Engine(folder / "tiny.bank", CHOICES))
    yield loop
    loop.stop()


@pytest.fixture
def client(loop):
    return create_app(loop, Access()).test_client()


def wait(loop):
    deadline = time.monotonic() + 120
    while True:
        before = loop.status.changes
        time.sleep(0.2)
        if (
            loop.status.doing == "idle"
            and not loop._wake.is_set()
            and not loop._stale
            and loop.status.changes == before
        ):
            return
        assert time.monotonic() < deadline


def annotate(client, number, masks):
    data = {}
    for place, (name, mask) in enumerate(masks.items()):
        data |= {f"name-{place}": name, f"mask-{place}": (io.BytesIO(drawn(mask)), "mask.png")}
    return client.post(f"/api/photos/{number}/annotate", data=data)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_the_folder_is_shown_as_it_was_written(client, folder, loop):
    said = client.get("/api/review").json
    written = [one for one in read_results(folder / "out" / RESULTS) if not isinstance(one, tuple)]
    assert [one["name"] for one in said["photos"]] == [one.query.name for one in written]
    assert [one["sureness"] for one in said["photos"]] == [one.sureness for one in written]
    assert said["failed"] == 1
    assert said["bank"] == "tiny.bank"
    assert [one["name"] for one in said["classes"]] == [NAME]
    for number, one in enumerate(written):
        mask = np.asarray(Image.open(folder / "out" / one.mask.name)) > 0
        shown = pixels(client.get(f"/api/photos/{number}/mask/0.png").data)[..., 1] == 255
        np.testing.assert_array_equal(shown, mask)
        assert pixels(client.get(f"/api/photos/{number}/photo.jpg").data).shape == (96, 96, 3)
        assert pixels(client.get(f"/api/photos/{number}/thumb.jpg").data).shape == (96, 96, 3)
    for path in (
        "/api/photos/3/photo.jpg",
        "/api/photos/0/mask/9.png",
        "/api/photos/x/photo.jpg",
        "/api/photos/-1/photo.jpg",
    ):
        assert client.get(path).status_code == 404, path


def test_decisions_are_kept(client, folder):
    assert client.post("/api/photos/0/decision", json={"decision": "accepted"}).json["decision"] == "accepted"
    assert client.post("/api/photos/1/decision", json={"decision": "rejected"}).status_code == 200
    again = Reviewed(folder / "out")
    assert [photo.decision for photo in again.photos] == ["accepted", "rejected", None]
    client.post("/api/photos/0/decision", json={"decision": None})
    assert Reviewed(folder / "out").photos[0].decision is None
    for body in ({"decision": "corrected"}, {"decision": "../x"}, {}, []):
        assert client.post("/api/photos/0/decision", json=body).status_code == 400
    assert client.post("/api/photos/7/decision", json={"decision": None}).status_code == 404


def test_a_correction_goes_into_bank_and_folder_and_the_others_are_predicted_again(client, folder, loop):
    loop.start()
    wait(loop)
    numbers_ = numbers()
    client.post("/api/photos/1/decision", json={"decision": "accepted"})
    client.post("/api/photos/2/decision", json={"decision": "rejected"})
    photos = loop.reviewed.photos
    files = [photo.task.mask for photo in photos]
    before = [path.read_bytes() for path in files]
    said = [json.dumps(photo.prediction.classes[NAME].to_json()) for photo in photos]
    truth = mask_of(numbers_[2])
    read = []
    reader = loop.engine.prepared().model.reader
    original = type(reader).read
    type(reader).read = lambda self, photo: read.append(photo) or original(self, photo)
    try:
        answer = annotate(client, 0, {NAME: truth})
        assert answer.status_code == 200, answer.json
        np.testing.assert_array_equal(pixels(client.get("/api/photos/0/mask/0.png").data)[..., 1] == 255, truth)
        wait(loop)
    finally:
        type(reader).read = original
    photo = Bank(folder / "tiny.bank").find(answer.json["id"])
    np.testing.assert_array_equal(photo.mask(NAME), truth)
    assert loop.status.error == ""
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])) > 0, truth)
    assert files[1].read_bytes() == before[1], "accepted masks stay"
    assert json.dumps(photos[2].prediction.classes[NAME].to_json()) != said[2], "a rejected one is made anew"
    assert [one.decision for one in photos] == ["corrected", "accepted", None]
    assert len(read) == 1, "of the bank's new photo alone; those of the folder were kept"
    again = Reviewed(folder / "out")
    assert [one.decision for one in again.photos] == ["corrected", "accepted", None]
    assert [one.prediction.sureness for one in again.photos] == [one.prediction.sureness for one in photos]
    assert again.failed == 1, "what could not be predicted is still told"
    assert again.photos[0].prediction.object_share == pytest.approx(truth.mean())


def test_the_new_masks_are_those_of_predict(client, folder, loop, tmp_path):
    loop.start()
    wait(loop)
    annotate(client, 0, {NAME: mask_of(numbers()[2])})
    wait(loop)
    work = prepare(CHOICES, bank=Bank(folder / "tiny.bank")).work
    query = loop.reviewed.photos[1].path
    predict(work, [query], tmp_path / "fresh", supports={NAME: ()})
    fresh = np.asarray(Image.open(tmp_path / "fresh" / f"{query.stem}_mask.png")) > 0
    renewed = np.asarray(Image.open(loop.reviewed.photos[1].task.mask)) > 0
    # Kept features are rounded to float16.
    assert (fresh != renewed).mean() < 0.01


def test_a_new_class_drawn_here(client, folder, loop):
    corner = np.zeros((96, 96), bool)
    corner[:30, :30] = True
    assert annotate(client, 0, {NAME: mask_of(numbers()[2]), "corner": corner}).status_code == 200
    loop.start()
    wait(loop)
    assert loop.status.error == ""
    assert Bank(folder / "tiny.bank").classes == (NAME, "corner")
    again = Reviewed(folder / "out")
    assert list(again.photos[1].prediction.classes) == [NAME, "corner"]
    np.testing.assert_array_equal(again.masks(again.photos[0])["corner"], corner)
    assert [one["name"] for one in client.get("/api/review").json["classes"]] == [NAME, "corner"]


@pytest.mark.parametrize("kind", FORMATS)
def test_all_masks_in_other_formats(client, loop, folder, kind, tmp_path):
    annotate(client, 0, {NAME: mask_of(numbers()[2])})
    client.post("/api/photos/1/decision", json={"decision": "rejected"})
    with client.get(f"/api/download/{kind}") as answer:
        assert answer.status_code == 200
        data = answer.data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "export")
    assert names
    if kind == "coco":
        said = json.loads((tmp_path / "export" / "coco.json").read_text())
        assert [Path(one["file_name"]).name for one in said["images"]] == [
            loop.reviewed.photos[number].path.name for number in (0, 2)
        ]
        assert sum(one["area"] for one in said["annotations"] if one["image_id"] == said["images"][0]["id"]) == (
            pytest.approx(mask_of(numbers()[2]).sum(), abs=12)
        )
    assert client.get("/api/download/docx").status_code == 404


def test_overlapping_masks_have_files_of_their_own(ready, tmp_path):
    shutil.copytree(ready / "tiny.bank", tmp_path / "tiny.bank")
    engine = Engine(tmp_path / "tiny.bank", CHOICES)
    photo = Bank(engine.root).photos()[0]
    from pipeline.annotations.item import Annotation

    engine.add(Annotation(photo.path, {"everything/much": np.arange(96 * 96).reshape(96, 96) > 96 * 20}))
    work = prepare(Choices(head="contrast", overlapping=True), bank=engine.bank).work
    predict(
        work,
        [ready / "photos" / f"photo-{numbers()[2]}.png"],
        tmp_path / "out",
        supports=dict.fromkeys(work.answering.names, ()),
    )
    reviewed = Reviewed(tmp_path / "out")
    assert reviewed.overlapping
    masks = reviewed.masks(reviewed.photos[0])
    assert set(masks) == {NAME, "everything/much"}
    assert masks["everything/much"].any()


def test_the_next_photo_is_unsure_and_unlike_what_is_known(loop):
    import torch

    photos = loop.reviewed.photos
    least = min(range(3), key=lambda number: photos[number].prediction.sureness)
    assert loop.next() == least, "by sureness alone before features are read"
    axes = torch.eye(4)
    loop._centres = {"bank": axes[0], **dict.fromkeys(range(3), axes[0])}
    other = (least + 1) % 3
    loop._centres[other] = axes[1]
    assert loop.next() == other
    loop.decide(photos[other], "accepted")
    loop._centres[least] = axes[1]
    loop._centres[3 - least - other] = axes[2]
    assert loop.next() == 3 - least - other, "unlike the accepted one, too"
    for photo in photos:
        loop.decide(photo, "accepted")
    assert loop.next() is None


def test_features_beyond_the_memory_are_not_kept(folder):
    loop = Loop(Reviewed(folder / "out"), Engine(folder / "tiny.bank", CHOICES), memory=1)
    loop.start()
    wait(loop)
    assert loop._features == {}
    assert {key for key in loop._centres if isinstance(key, int)} == {0, 1, 2}
    loop.stop()


def test_without_a_bank_nothing_is_corrected(folder):
    client = create_app(Loop(Reviewed(folder / "out"), None), Access()).test_client()
    assert client.get("/api/review").json["bank"] is None
    answer = annotate(client, 0, {NAME: mask_of(numbers()[2])})
    assert answer.status_code == 400
    assert "--bank" in answer.json["error"]
    assert client.post("/api/photos/0/decision", json={"decision": "accepted"}).status_code == 200
    page = client.get("/").get_data(as_text=True)
    assert "--bank" in page
    assert "Save the correction" not in page


def test_another_process_writing_the_bank(client, folder, loop):
    from pipeline.common.lock import sole_writer

    with sole_writer(folder / "tiny.bank"):
        answer = annotate(client, 0, {NAME: mask_of(numbers()[2])})
    assert answer.status_code == 409
    assert loop.reviewed.photos[0].decision is None
    assert not (folder / "out" / REVIEW).exists()


def test_pages_of_others_decide_nothing(client, folder):
    headers = {"Origin": "https://evil.example"}
    assert client.post("/api/photos/0/decision", json={"decision": "accepted"}, headers=headers).status_code == 403
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403


def test_the_page(client):
    answer = client.get("/")
    text = answer.get_data(as_text=True)
    assert "out" in text
    for file in ("editor.js", "review.js", "style.css"):
        with client.get(f"/static/{file}") as found:
            assert found.status_code == 200
        assert f"/static/{file}" in text


def test_a_folder_that_was_moved(folder):
    moved = folder / "elsewhere"
    os.rename(folder / "out", moved)
    reviewed = Reviewed(moved)
    assert reviewed.photos[0].prediction.overlay.is_file()
    assert reviewed.masks(reviewed.photos[0])[NAME].shape == (96, 96)
    assert reviewed.photos[0].task.folder == moved


def test_folders_that_cannot_be_reviewed(folder):
    out = folder / "out"
    for text, says in (
        ("", "nothing to review"),
        ("{", "cut off"),
        ('{"query": "a", "mask": "b", "overlay": null, "object_share": 0}\n', "earlier version"),
    ):
        (out / RESULTS).write_text(text)
        with pytest.raises(DataError, match=says):
            Reviewed(out)
    with pytest.raises(DataError, match="hsnet predict --out"):
        Reviewed(folder)
    result = invoke("review", folder)
    assert result.exit_code == 1
    assert "hsnet predict --out" in result.stderr


def test_the_command_predicts_as_the_folder_was_predicted(ready, folder, monkeypatch):
    """Without an option of review: then `hsnet predict` finds all masks as it would have made them."""
    out, bank = folder / "made", folder / "tiny.bank"
    queries = [part for photo in sorted((ready / "photos").glob("photo-*")) for part in ("--query", photo)]
    asked = ("--head", "contrast", "--tau", 0.35, "--no-refine", "--least-score", 0, "--tile", 64)
    asked = ("--bank", bank, *queries, "--out", out, *asked, "--keep-features", folder / "kept")
    assert invoke("predict", *asked).exit_code == 0
    loops = []

    def run(make_app, access, what, warm_up):
        loops.append(warm_up.__self__)
        if loops[-1].engine is None:
            return
        warm_up()
        wait(loops[0])
        number = numbers()[2]
        photo = next(one for one in loops[0].reviewed.photos if one.path.stem == f"photo-{number}")
        loops[0].correct(photo, {NAME: mask_of(number)})
        wait(loops[0])

    monkeypatch.setattr("commands.review.run", run)
    result = invoke("review", out)
    assert result.exit_code == 0, result.stderr
    assert loops[0].engine.root == bank
    assert machine("predict", *asked)["kept"] == 3
    (out / "predict.json").unlink()
    assert invoke("review", out).exit_code == 0
    assert loops[1].engine is None, "nothing says which bank"


def test_a_damaged_review_file(folder):
    for text in ('{"format": 1, "photos": {"a": "liked"}}', '{"format": 2}', '{"format": 1, "photos": []}'):
        (folder / "out" / REVIEW).write_text(text)
        with pytest.raises(DataError, match="damaged, or of a later version"):
            Reviewed(folder / "out")


def test_a_bank_without_the_folders_class(folder):
    engine = Engine(folder / "tiny.bank", CHOICES)
    for photo in engine.bank.photos():
        engine.bank.forget(photo.id)
    with pytest.raises(ConfigError, match="predicted with"):
        Loop(Reviewed(folder / "out"), engine)


def test_a_photo_that_is_gone_stops_nobody(ready, folder, loop, tmp_path):
    photo = loop.reviewed.photos[1]
    moved = photo.path.rename(tmp_path / "gone.png")
    try:
        client = create_app(loop, Access()).test_client()
        assert client.get("/api/photos/1/photo.jpg").status_code == 400
        annotate(client, 0, {NAME: mask_of(numbers()[2])})
        loop.start()
        wait(loop)
        assert "is missing" in loop.status.error
        assert loop.reviewed.photos[0].prediction.object_share == pytest.approx(mask_of(numbers()[2]).mean())
    finally:
        moved.rename(photo.path)
