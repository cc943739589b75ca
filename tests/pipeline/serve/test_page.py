"""The page's own interface: a photo in, masks and files out, what was drawn into the bank."""

from __future__ import annotations

import io
import json
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from tiny_bank import NAME, drawn, mask_of, numbers, photo_bytes, reading

from pipeline.annotations.write import FORMATS
from pipeline.bank.folder import Bank
from pipeline.common.lock import sole_writer
from pipeline.predict.prepare import Choices
from pipeline.serve.app import create_app
from pipeline.serve.engine import Engine
from pipeline.serve.guard import Access
from pipeline.serve.results import OWN, VIEW, Answer, Answers, View
from pipeline.serve.uploads import merge_drawn, read_upload

HTML = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"}


def upload(client, number=None, name="cup.png", data=None):
    number = numbers()[2] if number is None else number
    photo = io.BytesIO(photo_bytes(number) if data is None else data)
    return client.post("/api/predict", data={"photo": (photo, name)})


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_photo_gets_the_mask_that_the_model_says(client, engine):
    answer = upload(client)
    assert answer.status_code == 200
    facts = answer.json
    assert (facts["width"], facts["height"], facts["name"]) == (96, 96, "cup.png")
    (one,) = facts["classes"]
    expected = engine.prepared().model(Image.open(io.BytesIO(photo_bytes(numbers()[2]))))[NAME]
    assert one["name"] == NAME
    assert one["share"] == pytest.approx(expected.share)
    assert one["sureness"] == pytest.approx(expected.sureness)
    start = f"/api/answers/{facts['id']}"
    mask = pixels(client.get(f"{start}/mask/0.png").data)
    np.testing.assert_array_equal(mask[..., 1] == 255, expected.mask)
    soft = pixels(client.get(f"{start}/soft/0.png").data)[..., 1]
    np.testing.assert_allclose(soft / 255, expected.soft, atol=0.003)
    assert pixels(client.get(f"{start}/photo.jpg").data).shape == (96, 96, 3)
    assert client.get(f"{start}/mask/1.png").status_code == 404


@pytest.mark.parametrize("kind", [*FORMATS, *OWN])
def test_every_download(client, engine, kind):
    facts = upload(client).json
    answer = client.get(f"/api/answers/{facts['id']}/download/{kind}")
    assert answer.status_code == 200
    name = answer.headers["Content-Disposition"].split("filename=")[1].strip('"')
    assert name.startswith(f"cup_{kind}.")
    files = {name: answer.data}
    if name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(answer.data)) as archive:
            files = {entry: archive.read(entry) for entry in archive.namelist()}
    assert files
    assert all(files.values())
    mask = engine.prepared().model(Image.open(io.BytesIO(photo_bytes(numbers()[2]))))[NAME].mask
    if kind == "coco":
        said = json.loads(files[name])
        whole = np.zeros(mask.shape, bool)
        for one in said["annotations"]:
            with warnings.catch_warnings():  # of the library itself, about numpy
                warnings.simplefilter("ignore", DeprecationWarning)
                whole |= coco_masks.decode(one["segmentation"]).astype(bool)
        assert (mask & ~whole).sum() < 4 * 30, "specks of less than four pixels are no objects"
        assert not (whole & ~mask).any()
    if kind == "masks":
        (picture,) = (data for entry, data in files.items() if entry.endswith(".png"))
        np.testing.assert_array_equal(pixels(picture) > 0, mask)
    if kind == "overlay":
        assert pixels(files[name]).shape == (96, 96, 3)


def test_an_unknown_download_says_what_there_is(client):
    answer = client.get(f"/api/answers/{upload(client).json['id']}/download/docx")
    assert answer.status_code == 400
    assert "coco" in answer.json["error"]


def annotate(client, facts, masks):
    data = {}
    for number, (name, mask) in enumerate(masks.items()):
        data |= {f"name-{number}": name, f"mask-{number}": (io.BytesIO(drawn(mask)), "mask.png")}
    return client.post(f"/api/answers/{facts['id']}/annotate", data=data)


def test_what_is_drawn_goes_into_the_bank_and_changes_the_answers(client, engine):
    number = numbers()[2]
    facts = upload(client, number).json
    before = engine.version
    answer = annotate(client, facts, {NAME: mask_of(number), "nothing here": np.zeros((96, 96), bool)})
    assert answer.status_code == 200, answer.json
    assert answer.json["new"]
    assert set(answer.json["changed"]) == {NAME, "nothing here"}
    photo = Bank(engine.root).find(answer.json["id"])
    np.testing.assert_array_equal(photo.mask(NAME), mask_of(number))
    assert photo.item.absent == ("nothing here",)
    assert photo.path.read_bytes() == photo_bytes(number)
    assert engine.version != before, "the heads are fitted anew"
    assert [one["name"] for one in upload(client).json["classes"]] == [NAME], "a class without an example has no head"
    again = annotate(client, facts, {NAME: ~mask_of(number)})
    assert again.status_code == 200
    assert not again.json["new"]
    np.testing.assert_array_equal(Bank(engine.root).find(answer.json["id"]).mask(NAME), ~mask_of(number))


def test_an_empty_bank_learns_its_first_class_here(tmp_path):
    bank = Bank.create(tmp_path / "new.bank", reading())
    engine = Engine(bank.root, Choices(head="contrast"))
    client = create_app(engine, Access()).test_client()
    number = numbers()[0]
    facts = upload(client, number).json
    assert facts["classes"] == []
    assert client.get(f"/api/answers/{facts['id']}/download/coco").status_code == 400
    assert annotate(client, facts, {"cup": mask_of(number)}).status_code == 200
    (one,) = upload(client, number).json["classes"]
    assert one["name"] == "cup"
    assert one["share"] > 0


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "nothing of any class"),
        ({"name-0": "cup", "mask-0": (io.BytesIO(b"no picture"), "m.png")}, "cannot be read as an image"),
        ({"name-0": "cup", "mask-0": (io.BytesIO(drawn(np.ones((9, 9), bool))), "m.png")}, "9 x 9 pixels"),
        ({"name-0": "../\n", "mask-0": (io.BytesIO(drawn(np.ones((96, 96), bool))), "m.png")}, "printable"),
        ({"name-0": "n" * 101, "mask-0": (io.BytesIO(drawn(np.ones((96, 96), bool))), "m.png")}, "1 to 100"),
    ],
)
def test_drawings_that_are_none_change_nothing(client, engine, data, says):
    facts = upload(client).json
    before = engine.stamp()
    data = {key: (io.BytesIO(value[0].getvalue()), value[1]) if isinstance(value, tuple) else value
            for key, value in data.items()}  # fmt: skip
    answer = client.post(f"/api/answers/{facts['id']}/annotate", data=data)
    assert answer.status_code == 400
    assert says in answer.json["error"]
    assert engine.stamp() == before


def test_another_process_writing_the_bank_is_a_409(client, engine):
    facts = upload(client).json
    before = engine.stamp()
    with sole_writer(engine.root):
        answer = annotate(client, facts, {NAME: mask_of(numbers()[2])})
    assert answer.status_code == 409
    assert "is being written by process" in answer.json["error"]
    assert engine.stamp() == before
    assert annotate(client, facts, {NAME: mask_of(numbers()[2])}).status_code == 200


def test_changes_by_another_process_are_seen(client, engine):
    before = upload(client).json["classes"][0]["share"]
    photo = Bank(engine.root).photos()[0]
    Bank(engine.root).forget(photo.id)
    assert client.get("/api/bank").json["photos"] == 1
    assert upload(client).json["classes"][0]["share"] != before


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "is empty"), (b"GIF89a nothing", "cannot be read as an image"), (b"<svg/>" * 99, "cannot be read")],
)
def test_uploads_that_are_no_photo(client, engine, tmp_path, data, says):
    before = sorted(tmp_path.rglob("*"))
    answer = upload(client, data=data)
    assert answer.status_code == 400
    assert says in answer.json["error"]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    assert client.post("/api/predict", data={"photo": "text"}).status_code == 400
    assert client.post("/api/predict").status_code == 400


def test_a_photo_with_too_many_pixels_is_not_decoded(client):
    data = io.BytesIO()
    Image.new("1", (10_000, 8_000)).save(data, "PNG")
    assert len(data.getvalue()) < 100_000
    answer = upload(client, data=data.getvalue())
    assert answer.status_code == 413
    assert "10000 x 8000 pixels" in answer.json["error"]


def test_too_many_bytes(with_token):
    headers = {"Token": "a-token-of-many-letters"}
    kind = "multipart/form-data; boundary=x"
    answer = with_token.post("/api/predict", data=bytes((1 << 20) + 1), content_type=kind, headers=headers)
    assert answer.status_code == 413
    assert answer.json["error"] == "More than 1 MB are not taken (--max-mb)."


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../../etc/passwd", "passwd.png"),
        ("..\\..\\boot.ini", "boot.png"),
        ("a\0b\n<script>.png", "a_b__script_.png"),
        (".hidden", "hidden.png"),
        ("..", "photo.png"),
        ("ü" * 300 + ".jpg", "ü" * 60 + ".png"),
        (None, "photo.png"),
    ],
)
def test_hostile_names_become_plain_file_names(name, kept, engine):
    one = read_upload(photo_bytes(numbers()[2]), name)
    assert one.name == kept
    added = engine.annotate(one, {NAME: mask_of(numbers()[2])})
    assert added.photo.path.parent.parent.parent == engine.root
    assert added.photo.item.name == kept


def test_the_photo_is_turned_as_viewers_show_it():
    data = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20), "red").save(data, "JPEG", exif=exif)
    one = read_upload(data.getvalue(), "turned.jpeg")
    assert one.size == (40, 20)
    assert one.name == "turned.jpg"


def test_pixels_nobody_drew_on_keep_their_fine_detail():
    mask = np.indices((4, 6)).sum(0) % 2 == 0
    view = View(Image.new("RGB", (6, 4)), {"a": mask})
    assert view.size == (4, 6)
    shown = mask[::2, ::2]
    drawn_on = shown.copy()
    drawn_on[0, 0] = not drawn_on[0, 0]
    merged = merge_drawn(drawn_on, shown, mask, (4, 6))
    assert not merged[:2, :2].any()
    np.testing.assert_array_equal(merged[2:], mask[2:])
    np.testing.assert_array_equal(merged[:, 2:], mask[:, 2:])
    large = View(Image.new("RGB", (2 * VIEW, 10)), {})
    assert large.size == (5, VIEW)


def test_old_answers_are_forgotten():
    one = read_upload(photo_bytes(0), "a.png")
    answers = Answers(most_bytes=3 * Answer(one, {}).nbytes)
    kept = [Answer(one, {}) for _ in range(4)]
    for answer in kept:
        answers.keep(answer)
    assert [answers.get(answer.id) is not None for answer in kept] == [False, True, True, True]


def test_a_forgotten_answer_is_a_404(client):
    answer = client.get("/api/answers/none/photo.jpg")
    assert answer.status_code == 404
    assert "Upload the photo again" in answer.json["error"]


def test_the_page_brings_everything_with_it(client):
    answer = client.get("/", headers=HTML)
    assert answer.status_code == 200
    text = answer.get_data(as_text=True)
    assert "tiny.bank" in text
    assert "http" not in text.replace("http-equiv", "")
    for file in ("editor.js", "serve.js", "style.css", "icon.svg"):
        with client.get(f"/static/{file}") as found:
            assert found.status_code == 200
        assert f"/static/{file}" in text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert client.get("/").json["status"] == "UP", "an annotator that asks for no page"


def test_no_file_beside_the_pages_is_served(client):
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/static/..%2fapp.py"):
        assert client.get(path, follow_redirects=True).status_code == 404, path
