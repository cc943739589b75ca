"""The page and the interfaces of annotation tools as one Flask application.

GET  /                              the page
POST /api/predict                   a photo (multipart: photo) -> what was found
GET  /api/answers/ID/photo.jpg      and mask/N.png, soft/N.png: what the page shows, N the class's number from 0
GET  /api/answers/ID/download/KIND  a format of `results`
POST /api/answers/ID/annotate       what was drawn goes into the bank
POST /predict, /setup, /webhook     Label Studio's ML backend           see `labelstudio`
GET  /v1/models, POST /v1/predict   X-AnyLabeling's remote server       see `xanylabeling`
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
from flask import Flask, Response, jsonify, render_template, request
from jinja2 import StrictUndefined
from numpy.typing import NDArray
from werkzeug.datastructures import FileStorage

from hsnet.errors import DataError
from pipeline.annotations.write import FORMATS
from pipeline.bank.folder import Added
from pipeline.serve import labelstudio, xanylabeling
from pipeline.serve.engine import Engine
from pipeline.serve.guard import Access, Refused, guard, wants_page
from pipeline.serve.results import OWN, Answer, Answers, View, colour
from pipeline.serve.uploads import Upload, merge_drawn, read_drawn, read_upload


def new_app(access: Access) -> Flask:
    """An application without pages yet, guarded; templates and files from the pages of this stage."""
    app = Flask("pipeline.serve", template_folder="pages", static_folder="pages", static_url_path="/static")
    app.jinja_env.undefined = StrictUndefined
    guard(app, access)
    return app


def create_app(engine: Engine, access: Access, studio: labelstudio.Studio | None = None) -> Flask:
    """The application of a bank.

    Args:
        studio: where photos of Label Studio's tasks may be fetched; None: only what requests hold is read.
    """
    app = new_app(access)
    answers = Answers()

    def answer_of(name: str) -> Answer:
        answer = answers.get(name)
        if answer is None:
            raise Refused(404, "This answer is not kept any more. Upload the photo again.")
        return answer

    @app.get("/")
    def page() -> str | Response:
        if not wants_page():  # Label Studio asks here, too
            return health()
        return render_template("serve.html", bank=engine.root.name, formats=(*OWN, *FORMATS))

    @app.get("/health")
    def health() -> Response:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return jsonify(status="UP", model_class="hsnet", models_loaded=1, timestamp=now)

    @app.get("/api/bank")
    def bank() -> Response:
        return jsonify(_bank_facts(engine))

    @app.post("/api/predict")
    def predict() -> Response:
        upload = photo_of(request.files.get("photo"))
        started = time.monotonic()
        answer = Answer(upload, engine.answer(upload.photo))
        answers.keep(answer)
        return jsonify(_answer_facts(answer, engine) | {"seconds": round(time.monotonic() - started, 2)})

    @app.get("/api/answers/<name>/photo.jpg")
    def photo(name: str) -> Response:
        return Response(answer_of(name).view.photo_jpeg(), mimetype="image/jpeg")

    @app.get("/api/answers/<name>/<any(mask, soft):kind>/<int:number>.png")
    def layer(name: str, kind: str, number: int) -> Response:
        answer = answer_of(name)
        if number >= len(answer.found):
            raise Refused(404, f"There is no class {number}.")
        class_name = list(answer.found)[number]
        data = answer.view.mask_png(class_name) if kind == "mask" else answer.soft_png(class_name)
        return Response(data, mimetype="image/png")

    @app.get("/api/answers/<name>/download/<kind>")
    def download(name: str, kind: str) -> Response:
        file, data = answer_of(name).download(kind)
        answer = Response(data, mimetype="application/octet-stream")
        answer.headers.set("Content-Disposition", "attachment", filename=file)
        return answer

    @app.post("/api/answers/<name>/annotate")
    def annotate(name: str) -> Response:
        answer = answer_of(name)
        masks, absent = drawn_of(answer.view, answer.upload.size)
        added = engine.annotate(answer.upload, masks, absent)
        return jsonify(added_facts(added) | {"bank": _bank_facts(engine)})

    labelstudio.register(app, engine, studio)
    xanylabeling.register(app, engine)
    return app


def photo_of(file: FileStorage | None) -> Upload:
    """The uploaded photo. Raises DataError if there is none, or it is none."""
    if file is None:
        raise DataError("The request holds no photo (a file named photo, multipart/form-data).")
    return read_upload(file.read(), file.filename)


def drawn_of(view: View, size: tuple[int, int]) -> tuple[dict[str, NDArray[np.bool_]], frozenset[str]]:
    """Masks (H, W) and absent classes out of the request: for each class `name-N` and `mask-N`, a PNG of the canvas.

    Raises:
        DataError: no class, a name twice, or a picture that is no mask of this canvas.
    """
    masks: dict[str, NDArray[np.bool_]] = {}
    absent: set[str] = set()
    for name, file in _layers():
        if name in masks or name in absent:
            raise DataError(f"The class {name!r} is there twice. Nothing was kept.")
        drawn = read_drawn(file.read(), view.size)
        mask = merge_drawn(drawn, view.shown(name), view.masks.get(name), size)
        if mask.any():
            masks[name] = mask
        else:
            absent.add(name)
    if not masks and not absent:
        raise DataError("The request says nothing of any class. Nothing was kept.")
    return masks, frozenset(absent)


def _layers() -> Iterator[tuple[str, FileStorage]]:
    for key, name in request.form.items():
        file = request.files.get(f"mask-{key[5:]}")
        if key.startswith("name-") and file is not None:
            yield name, file


def added_facts(added: Added) -> dict[str, Any]:
    """What a page says of a photo that went into the bank."""
    return {"photo": added.photo.item.name, "id": added.photo.id, "new": added.new, "changed": added.changed}


def class_facts(found: Mapping[str, Any], number: int, name: str) -> dict[str, Any]:
    """A class, its colour and what is known of it in a photo."""
    return {"name": name, "colour": colour(number), **found}


def _answer_facts(answer: Answer, engine: Engine) -> dict[str, Any]:
    prepared = engine.prepared()
    heads = {} if prepared is None else {one.name: one for one in prepared.model.answering.classes}
    classes = []
    for number, (name, one) in enumerate(answer.found.items()):
        head = heads.get(name)
        best = None if head is None or head.expected is None else head.expected.best
        facts = {
            "score": one.score,
            "share": one.share,
            "sureness": one.sureness,
            "head": None if head is None else head.fitted.name,
            "expected": None if best is None else [best.pooled, best.low, best.high],
        }
        classes.append(class_facts(facts, number, name))
    height, width = answer.upload.size
    canvas = dict(zip(("height", "width"), answer.view.size, strict=True))
    return {
        "id": answer.id,
        "name": answer.upload.name,
        "width": width,
        "height": height,
        "canvas": canvas,
        "classes": classes,
    }


def _bank_facts(engine: Engine) -> dict[str, Any]:
    bank = engine.bank
    photos = bank.photos()
    counts = [
        {"name": name, "photos": sum(name in photo.item.masks for photo in photos), "colour": colour(number)}
        for number, name in enumerate(bank.classes)
    ]
    return {"name": engine.root.name, "photos": len(photos), "reading": bank.reading.text, "classes": counts}
