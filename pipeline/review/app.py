"""The page over a folder of predictions as a Flask application; see `pipeline.serve.app` for what they share.

    GET  /api/review                    every photo, its numbers and decision
    GET  /api/status                    what is done in the background
    GET  /api/next                      which photo to annotate next
    GET  /api/photos/N/photo.jpg        and mask/K.png, thumb.jpg: what the page shows, K the class's number from 0
    GET  /api/download/KIND             all masks but the rejected in a format of annotation tools, as .zip
    POST /api/photos/N/decision         {"decision": "accepted" | "rejected" | null}
    POST /api/photos/N/annotate         what was drawn goes into the bank and the folder

A request names photos by their number in the results, never by a path.
"""

from __future__ import annotations

import tempfile
import zipfile
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flask import Flask, Response, jsonify, render_template, request, send_file
from jinja2 import ChoiceLoader, PackageLoader
from numpy.typing import NDArray
from PIL import Image

from hsnet.errors import DataError
from pipeline.annotations.write import FORMATS
from pipeline.datasets.images import read_photo
from pipeline.review.folder import Photo
from pipeline.review.loop import Loop
from pipeline.serve.app import added_facts, class_facts, drawn_of, new_app
from pipeline.serve.guard import Access, Refused
from pipeline.serve.results import View, encoded, overlay

THUMB = 160
"""Longer side of a photo in the list, pixels."""


def create_app(loop: Loop, access: Access) -> Flask:
    """The application of a folder."""
    app = new_app(access)
    pages = PackageLoader("pipeline.review", "pages")
    app.jinja_env.loader = ChoiceLoader([pages, PackageLoader("pipeline.serve", "pages")])
    reviewed = loop.reviewed

    def photo_of(number: int) -> Photo:
        if number >= len(reviewed.photos):
            raise Refused(404, f"There is no photo {number}; there are {len(reviewed.photos)}.")
        return reviewed.photos[number]

    @lru_cache(maxsize=4)
    def seen(number: int, _: object) -> View:
        photo = photo_of(number)
        picture = read_photo(photo.path)
        masks = reviewed.masks(photo)
        odd = [mask.shape for mask in masks.values() if mask.shape != (picture.height, picture.width)]
        if odd:
            raise DataError(f"{photo.path} has another size than its mask: it was changed after it was predicted.")
        return View(picture, masks)

    def view(number: int) -> View:
        photo = photo_of(number)
        # Another prediction is another object; so is another drawing.
        return seen(number, (id(photo.prediction), id(photo.drawn)))

    @app.get("/")
    def page() -> str:
        bank = None if loop.engine is None else loop.engine.root.name
        return render_template("review.html", folder=reviewed.root.resolve().name, bank=bank, formats=FORMATS)

    @app.get("/static/review.js")
    def script() -> Response:
        source, *_ = pages.get_source(app.jinja_env, "review.js")
        return Response(source, mimetype="text/javascript")

    @app.get("/api/review")
    def review() -> Response:
        photos = [_facts(number, photo) for number, photo in enumerate(reviewed.photos)]
        classes = [class_facts({}, number, name) for number, name in enumerate(classes_of(loop))]
        return jsonify(
            photos=photos,
            classes=classes,
            failed=reviewed.failed,
            bank=loop.engine and loop.engine.root.name,
            status=asdict(loop.status),
        )

    @app.get("/api/status")
    def status() -> Response:
        return jsonify(asdict(loop.status))

    @app.get("/api/next")
    def following() -> Response:
        return jsonify(number=loop.next())

    @app.get("/api/photos/<int:number>/photo.jpg")
    def photo(number: int) -> Response:
        return Response(view(number).photo_jpeg(), mimetype="image/jpeg")

    @app.get("/api/photos/<int:number>/thumb.jpg")
    def thumb(number: int) -> Response:
        one = view(number)
        picture = one.photo.copy()
        picture.thumbnail((2 * THUMB, 2 * THUMB))
        small = View(picture, {})
        scaled = {name: _scaled(mask, small.size) for name, mask in one.masks.items()}
        return Response(encoded(overlay(picture, scaled), "JPEG", quality=80), mimetype="image/jpeg")

    @app.get("/api/photos/<int:number>/mask/<int:kind>.png")
    def mask(number: int, kind: int) -> Response:
        names = classes_of(loop)
        if kind >= len(names):
            raise Refused(404, f"There is no class {kind}.")
        return Response(view(number).mask_png(names[kind]), mimetype="image/png")

    @app.get("/api/download/<kind>")
    def download(kind: str) -> Response:
        if kind not in FORMATS:
            raise Refused(404, f"No format {kind!r}. There are {', '.join(FORMATS)}.")
        packed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the answer
        try:
            with tempfile.TemporaryDirectory(prefix="hsnet-") as folder, zipfile.ZipFile(packed, "w") as archive:
                for file in reviewed.export(kind, Path(folder)):
                    archive.write(file, file.relative_to(folder), zipfile.ZIP_DEFLATED)
            packed.seek(0)
        except BaseException:
            packed.close()
            raise
        return send_file(packed, "application/zip", True, f"{reviewed.root.resolve().name}_{kind}.zip", max_age=0)

    @app.post("/api/photos/<int:number>/decision")
    def decide(number: int) -> Response:
        values = request.get_json(silent=True) if request.is_json else None
        if not isinstance(values, dict) or values.get("decision", "") not in ("accepted", "rejected", None):
            raise DataError('The request must be JSON: {"decision": "accepted"}, "rejected" or null.')
        loop.decide(photo_of(number), values["decision"])
        return jsonify(_facts(number, photo_of(number)))

    @app.post("/api/photos/<int:number>/annotate")
    def annotate(number: int) -> Response:
        one = view(number)
        masks, absent = drawn_of(one, (one.photo.height, one.photo.width))
        return jsonify(added_facts(loop.correct(photo_of(number), masks, absent)))

    return app


def classes_of(loop: Loop) -> tuple[str, ...]:
    """Of the folder, and of the bank what was drawn since."""
    names = loop.reviewed.classes
    return names if loop.engine is None else tuple(dict.fromkeys((*names, *loop.engine.classes)))


def _facts(number: int, photo: Photo) -> dict[str, Any]:
    said = photo.prediction
    return {
        "number": number,
        "name": photo.path.name,
        "sureness": round(said.sureness, 4),
        "share": round(said.object_share, 4),
        "decision": photo.decision,
        "classes": {name: {"score": one.score, "sureness": one.sureness} for name, one in said.classes.items()},
    }


def _scaled(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    picture = Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).resize(size[::-1], Image.Resampling.BOX)
    return np.asarray(picture) >= 128
