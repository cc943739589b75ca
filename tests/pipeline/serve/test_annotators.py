"""What annotation tools send and get, by their own documents, readers and checks."""

from __future__ import annotations

import base64
import io
import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from rle_pack import decode_rle, mask2rle
from tiny_bank import NAME, mask_of, numbers, photo_bytes, reading

from hsnet.errors import ConfigError, DataError
from pipeline.annotations.outline import polygons
from pipeline.bank.folder import Bank
from pipeline.serve.app import create_app
from pipeline.serve.guard import Access
from pipeline.serve.labelstudio import Setup, Studio
from pipeline.serve.xanylabeling import simplified

cvat = pytest.importorskip("cvat_sdk.auto_annotation", reason="needs cvat-sdk, which make venv installs")

NUMBER = numbers()[2]
URI = "data:image/png;base64," + base64.b64encode(photo_bytes(NUMBER)).decode()
SETUP = f"""<View><!-- comment -->
  <Image name="img" value="$picture" zoom="true"/>
  <BrushLabels name="tag" toName="img"><Label value="{NAME}"/><Label value="other"/></BrushLabels>
</View>"""


def expected(engine):
    return engine.prepared().model(Image.open(io.BytesIO(photo_bytes(NUMBER))))[NAME]


# --- Label Studio ------------------------------------------------------------------------------------------------


def ask(client, *tasks, setup=SETUP):
    return client.post("/predict", json={"tasks": list(tasks), "label_config": setup, "project": "1.2", "params": {}})


def test_label_studio_connects(client, engine):
    assert client.get("/health").json["status"] == "UP"
    body = {"project": "1.2", "schema": SETUP, "hostname": "http://localhost:8080", "access_token": "secret"}
    answer = client.post("/setup", json=body)
    assert answer.status_code == 200
    assert answer.json == {"model_version": engine.version}
    assert client.get("/versions").json == {"versions": [engine.version]}


def test_label_studio_gets_brushes_that_its_own_reader_reads(client, engine):
    answer = ask(client, {"id": 7, "data": {"picture": URI}}, {"id": 8, "data": {"picture": URI}})
    assert answer.status_code == 200, answer.json
    first, second = answer.json["results"]
    assert first["result"] == second["result"]
    assert first["model_version"] == engine.version
    truth = expected(engine)
    assert first["score"] == pytest.approx(truth.sureness)
    whole = np.zeros((96, 96), bool)
    for region in first["result"]:
        assert region["type"] == "brushlabels"
        assert (region["from_name"], region["to_name"]) == ("tag", "img")
        assert (region["original_width"], region["original_height"]) == (96, 96)
        assert region["value"]["brushlabels"] == [NAME]
        assert region["value"]["format"] == "rle"
        whole |= decode_rle(region["value"]["rle"]).reshape(96, 96, 4)[..., 3] > 0
    assert whole.any()
    assert not (whole & ~truth.mask).any()
    assert (truth.mask & ~whole).sum() < 4 * 30, "specks of less than four pixels are no objects"
    assert len({region["id"] for region in first["result"]}) == len(first["result"])


def test_a_class_without_a_label_is_left_out(client):
    answer = ask(client, {"id": 7, "data": {"picture": URI}}, setup=SETUP.replace(NAME, "car"))
    assert answer.json["results"][0]["result"] == []


def submitted(action="ANNOTATION_CREATED", mask=None, regions=None, **annotation):
    if regions is None:
        rle = mask2rle((mask if mask is not None else mask_of(NUMBER)).astype(np.uint8) * 255)
        regions = [
            {"id": uuid.uuid4().hex, "type": "brushlabels", "from_name": "tag", "to_name": "img",
             "original_width": 96, "original_height": 96, "image_rotation": 0,
             "value": {"format": "rle", "rle": [int(value) for value in rle], "brushlabels": [NAME]}}
        ]  # fmt: skip
    return {
        "action": action,
        "project": {"id": 1, "label_config": SETUP},
        "task": {"id": 7, "data": {"picture": URI}},
        "annotation": {"id": 3, "result": regions, "was_cancelled": False, **annotation},
    }


def test_what_is_submitted_in_label_studio_goes_into_the_bank(client, engine):
    before = engine.version
    answer = client.post("/webhook", json=submitted())
    assert answer.status_code == 201, answer.json
    photo = Bank(engine.root).find(answer.json["result"]["photo"])
    np.testing.assert_array_equal(photo.mask(NAME), mask_of(NUMBER))
    assert photo.path.read_bytes() == photo_bytes(NUMBER)
    assert engine.version != before
    smaller = mask_of(NUMBER) & (np.arange(96) < np.nonzero(mask_of(NUMBER))[1].mean())
    assert client.post("/webhook", json=submitted("ANNOTATION_UPDATED", smaller)).status_code == 201
    np.testing.assert_array_equal(Bank(engine.root).find(photo.id).mask(NAME), smaller)
    box = {"type": "rectanglelabels", "value": {"x": 0, "y": 0, "width": 9, "height": 9, "rectanglelabels": [NAME]}}
    assert client.post("/webhook", json=submitted(regions=[box])).status_code == 400, "a box is no mask, nor absence"
    assert client.post("/webhook", json=submitted(regions=[])).status_code == 201
    assert Bank(engine.root).find(photo.id).item.absent == (NAME,)


def test_what_teaches_nothing_is_ignored(client, engine):
    before = engine.stamp()
    assert client.post("/webhook", json=submitted("ANNOTATIONS_DELETED")).json["status"] == "ignored"
    assert client.post("/webhook", json=submitted(was_cancelled=True)).json["status"] == "ignored"
    assert client.post("/webhook", json={"action": "START_TRAINING", "project": {"id": 1}}).status_code == 200
    assert engine.stamp() == before


def broken(value):
    region = submitted()["annotation"]["result"][0]
    return submitted(regions=[region | {"value": region["value"] | value}])


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/webhook", {"action": "ANNOTATION_CREATED"}, "payload"),
        ("/webhook", broken({"rle": [1, 2, 3]}), "run lengths"),
        ("/webhook", broken({"rle": "text"}), "run lengths"),
        ("/webhook", broken({"brushlabels": []}), "no label"),
        ("/webhook", submitted(regions=["text"]), "not as Label Studio"),
        ("/predict", {"label_config": SETUP}, "no tasks"),
        ("/predict", {"tasks": [], "label_config": "<View"}, "no XML"),
        ("/predict", {"tasks": [], "label_config": "<View/>"}, "BrushLabels"),
        ("/predict", {"tasks": [], "label_config": '<!DOCTYPE a [<!ENTITY b "c">]><View>&b;</View>'}, "entities"),
        ("/setup", {}, "no labelling setup"),
        ("/predict", {"tasks": [{"data": {}}], "label_config": SETUP}, "names no photo"),
        ("/predict", {"tasks": [{"data": {"picture": "data:,x"}}], "label_config": SETUP}, "base64"),
        ("/predict", {"tasks": [{"data": {"picture": "data:a;base64,AAAA"}}], "label_config": SETUP}, "as an image"),
    ],
)
def test_broken_requests_are_told_and_change_nothing(client, engine, path, body, says):
    before = engine.stamp()
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.json
    assert says in answer.json["error"]
    assert engine.stamp() == before


@pytest.mark.parametrize(
    "address",
    ["file:///etc/passwd", "/etc/passwd", "http://169.254.169.254/latest", "//evil.example/x.png", "s3://bucket/x.png",
     "http://studio.example.evil.example/x.png", "http://studio.example@evil.example/x.png", "https://studio.example/x",
     "http://studio.example:81/x.png", "C:\\secret.png", "ftp://studio.example/x.png"],
)  # fmt: skip
def test_only_the_label_studio_that_was_named_is_asked(engine, address, monkeypatch):
    asked = []

    def fetch(_, address):
        asked.append(address)
        return photo_bytes(NUMBER)

    monkeypatch.setattr(Studio, "fetch", fetch)
    for studio in (None, Studio("http://studio.example")):
        client = create_app(engine, Access(), studio).test_client()
        answer = ask(client, {"id": 1, "data": {"picture": address}})
        if studio is not None and address == "/etc/passwd":  # a path of Label Studio's, not of this machine
            assert answer.status_code == 200
            assert asked == ["http://studio.example/etc/passwd"]
            continue
        assert answer.status_code == 400
        assert "--label-studio" in answer.json["error"] or "nothing is fetched" in answer.json["error"]
        assert asked == []


class _Label_Studio(BaseHTTPRequestHandler):
    """Serves a photo to those with the token; sends others elsewhere, or too much."""

    def do_GET(self):
        allowed = self.headers.get("Authorization") in ("Token secret", "Bearer bought")
        status = 401 if not allowed else 302 if "redirect" in self.path else 200
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1:1/secret")
        self.end_headers()
        if status == 200:
            self.wfile.write(bytes(1 << 20) if "large" in self.path else photo_bytes(NUMBER))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, asked) == ("/api/token/refresh", {"refresh": "a.b.c"})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"access": "bought"}')

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def label_studio():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Label_Studio) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.s3
def test_photos_are_fetched_from_label_studio_with_its_token(engine, label_studio):
    for token in ("secret", "a.b.c"):
        client = create_app(engine, Access(), Studio(label_studio, token, 1 << 19)).test_client()
        for address in ("/data/upload/1/ab-cup.png", f"{label_studio}/data/local-files/?d=cup.png"):
            answer = ask(client, {"id": 1, "data": {"picture": address}})
            assert answer.status_code == 200, answer.json
            assert answer.json["results"][0]["result"]
    answer = ask(client, {"id": 1, "data": {"picture": "/redirect"}})
    assert answer.status_code == 400
    assert "redirects are not followed" in answer.json["error"]
    assert ask(client, {"id": 1, "data": {"picture": "/large"}}).status_code == 413
    without = create_app(engine, Access(), Studio(label_studio)).test_client()
    answer = ask(without, {"id": 1, "data": {"picture": "/data/upload/1/cup.png"}})
    assert answer.status_code == 400
    assert "--label-studio-token" in answer.json["error"]
    gone = create_app(engine, Access(), Studio("http://127.0.0.1:1")).test_client()
    assert "cannot be fetched" in ask(gone, {"id": 1, "data": {"picture": "/x.png"}}).json["error"]


def test_an_address_that_is_none():
    for address in ("localhost:8080", "file:///x", "http://", "http://user:word@host"):
        with pytest.raises(ConfigError, match="--label-studio"):
            Studio(address)


def test_the_setup_of_polygons():
    text = SETUP.replace("BrushLabels", "PolygonLabels")
    assert Setup.of(text) == Setup("polygonlabels", "tag", "img", "picture", (NAME, "other"))


# --- X-AnyLabeling -----------------------------------------------------------------------------------------------


def test_x_anylabeling_finds_the_model(client):
    models = client.get("/v1/models").json
    assert models["success"]
    assert set(models["data"]) == {"hsnet"}
    assert "button_run" in {widget["name"] for widget in models["data"]["hsnet"]["widgets"]}
    assert client.get("/v1/models/hsnet/info").json["data"]["model_id"] == "hsnet"
    answer = client.get("/v1/models/other/info")
    assert answer.status_code == 404
    assert answer.json["error"]["code"] == "MODEL_NOT_FOUND"


@pytest.mark.parametrize("image", [URI, URI.split(",")[1]], ids=["uri", "raw"])
def test_x_anylabeling_gets_polygons(client, engine, image):
    params = {"conf_threshold": 0.0, "iou_threshold": 0.0, "epsilon_factor": 0.001}
    answer = client.post("/v1/predict", json={"model": "hsnet", "image": image, "params": params})
    assert answer.status_code == 200, answer.json
    shapes = answer.json["data"]["shapes"]
    assert shapes
    from PIL import ImageDraw

    picture = Image.new("1", (96, 96))
    for shape in shapes:
        assert (shape["label"], shape["shape_type"]) == (NAME, "polygon")
        assert 0 <= shape["score"] <= 1
        assert len(shape["points"]) >= 3
        ImageDraw.Draw(picture).polygon([(x - 0.5, y - 0.5) for x, y in shape["points"]], fill=1)
    said, truth = np.asarray(picture), expected(engine).mask
    assert (said & truth).sum() / (said | truth).sum() > 0.9
    answer = client.post("/v1/predict", json={"model": "hsnet", "image": image, "params": {"conf_threshold": 1}})
    assert answer.json["data"]["shapes"] == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "hsnet", "image": "AAAA"}, 400),
        ({"model": "hsnet", "image": "***"}, 400),
        ({"model": "hsnet"}, 400),
        ({"model": "other", "image": URI}, 404),
        ({"model": "hsnet", "image": URI, "params": {"conf_threshold": "x"}}, 400),
        ([], 400),
    ],
)
def test_x_anylabeling_is_told_what_is_wrong(client, body, status):
    answer = client.post("/v1/predict", json=body)
    assert answer.status_code == status
    assert answer.json["success"] is False
    assert answer.json["error"]["message"]


def test_simplified_outlines_stay_near():
    rows, columns = np.indices((200, 200))
    disc = (rows - 100) ** 2 + (columns - 90) ** 2 < 60**2
    (ring,) = polygons(disc)[0]
    few = simplified(ring, 0.002)
    assert 8 <= len(few) < len(ring) / 4
    reach = 0.002 * np.linalg.norm(np.diff(np.concatenate([ring, ring[:1]]), axis=0), axis=1).sum()
    closed = np.concatenate([few, few[:1]])
    for point in ring:
        nearest = np.inf
        for start, end in pairwise(closed):
            place = np.clip((point - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
            nearest = min(nearest, float(np.linalg.norm(point - start - place * (end - start))))
        assert nearest <= reach + 1e-9
    assert simplified(ring, 0) is ring


# --- CVAT --------------------------------------------------------------------------------------------------------


class Context(cvat.DetectionFunctionContext):
    frame_name = "photos/cup.png"
    conf_threshold = None
    conv_mask_to_poly = False


def mapper(function, conv_mask_to_poly=False):
    """The check of what a function gives, of CVAT's own driver, against a task whose labels have other numbers."""
    import logging

    from cvat_sdk import models
    from cvat_sdk.auto_annotation.driver import _AnnotationMapper

    labels = [
        models.Label._new_from_openapi_data(name=label.name, id=100 + label.id, type="any", sublabels=[], attributes=[])
        for label in function.spec.labels
    ]
    log = logging.getLogger("cvat")
    return _AnnotationMapper(
        log, function.spec.labels, labels, allow_unmatched_labels=False, conv_mask_to_poly=conv_mask_to_poly
    )


def test_cvat_takes_the_function_and_reads_its_masks(engine):
    from cvat_sdk.masks import decode_mask

    from pipeline.serve.cvat import create

    function = create(str(engine.root), head="contrast")
    assert [(label.name, label.id) for label in function.spec.labels] == [(NAME, 0)]
    photo = Image.open(io.BytesIO(photo_bytes(NUMBER)))
    tags, shapes = mapper(function).validate_and_remap(function.detect(Context(), photo), 4)
    assert tags == []
    truth, whole = expected(engine).mask, np.zeros((96, 96), bool)
    for shape in shapes:
        assert (shape.type.value, shape.frame, shape.label_id) == ("mask", 4, 100)
        whole |= decode_mask(shape.points, image_width=96, image_height=96)
    assert whole.any()
    assert not (whole & ~truth).any()
    assert (truth & ~whole).sum() < 4 * 30


def test_cvat_gets_polygons_where_it_asks_for_them(engine):
    from pipeline.serve.cvat import create

    function = create(str(engine.root), head="contrast")
    context = Context()
    context.conv_mask_to_poly = True
    photo = Image.open(io.BytesIO(photo_bytes(NUMBER)))
    _, shapes = mapper(function, True).validate_and_remap(function.detect(context, photo), 0)
    assert shapes
    for shape in shapes:
        assert shape.type.value == "polygon"
        assert len(shape.points) >= 6
        assert 0 <= min(shape.points) <= max(shape.points) <= 96
    context.conf_threshold = 1.0
    assert function.detect(context, photo) == []


def test_cvat_with_an_empty_bank(tmp_path):
    from pipeline.serve.cvat import create

    bank = Bank.create(tmp_path / "new.bank", reading())
    with pytest.raises(DataError, match="no annotated photo yet"):
        create(str(bank.root))


def test_cvat_loads_the_file_by_its_path(engine):
    """As `cvat-cli task auto-annotate --function-file` does."""
    import importlib.util
    from pathlib import Path

    import pipeline.serve

    path = Path(pipeline.serve.__file__).with_name("cvat.py")
    spec = importlib.util.spec_from_file_location("__cvat_function__", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert isinstance(module.create(str(engine.root), head="contrast").spec, cvat.DetectionFunctionSpec)
