"""X-AnyLabeling's remote server: a photo as base64 in, polygons out.

    GET  /v1/models, /v1/models/hsnet/info   what there is
    POST /v1/predict   {"model": "hsnet", "image": "data:image/png;base64,...", "params": {...}}

As X-AnyLabeling-Server describes it (docs/router.md), but for the status of errors: a client that gets 200 for a photo
that could not be read shows nothing at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flask import Flask, Response, jsonify, request
from numpy.typing import NDArray

from hsnet.errors import DataError
from pipeline.annotations.found import objects_of
from pipeline.annotations.outline import Ring, joined, polygons
from pipeline.serve.engine import Engine
from pipeline.serve.guard import Refused
from pipeline.serve.results import found_of
from pipeline.serve.uploads import decode_base64, read_upload

MODEL = "hsnet"
FINENESS = 0.001
"""How far a polygon may leave the outline, as a share of the outline's length: X-AnyLabeling's own default."""


def register(app: Flask, engine: Engine) -> None:
    """Add the interface to an application."""

    def info() -> dict[str, Any]:
        widgets = [
            {"name": "button_run", "value": None},
            {"name": "edit_conf", "value": 0.0},
            {"name": "toggle_preserve_existing_annotations", "value": False},
            {"name": "mask_fineness_slider", "value": None},
        ]
        return {
            "display_name": f"HSNet: {engine.root.name}",
            "batch_processing_mode": "default",
            "widgets": widgets,
            "params": {"conf_threshold": 0.0, "epsilon_factor": FINENESS},
        }

    @app.get("/v1/models")
    def models() -> Response:
        return jsonify(success=True, data={MODEL: info()})

    @app.get("/v1/models/<name>/info")
    def model(name: str) -> Response:
        _require(name)
        return jsonify(success=True, data={"model_id": MODEL, **info()})

    @app.post("/v1/predict")
    def v1_predict() -> Response:
        values = request.get_json(silent=True) if request.is_json else None
        if not isinstance(values, dict):
            raise DataError("The request must be a JSON object (Content-Type: application/json).")
        _require(values.get("model"))
        params = values.get("params") or {}
        least, fineness = (_number(params, *one) for one in (("conf_threshold", 0.0), ("epsilon_factor", FINENESS)))
        upload = read_upload(decode_base64(values.get("image"), "the image"), "photo")
        found = found_of(engine.answer(upload.photo), Path(upload.name), upload.size)
        shapes = []
        for label, one in found.classes.items():
            for instance in objects_of(one):
                if (instance.score or 0.0) < least:
                    continue
                for rings in polygons(instance.mask, instance.box[0], instance.box[1]):
                    shapes.append(_shape(label, simplified(joined(rings), fineness), instance.score))
        return jsonify(success=True, data={"shapes": shapes, "description": ""})


def _require(name: object) -> None:
    if name != MODEL:
        raise Refused(404, f"Model {name!r} is not loaded; there is {MODEL!r}.")


def _number(params: object, key: str, default: float) -> float:
    value = params.get(key, default) if isinstance(params, dict) else None
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError(f"params.{key} must be a number from 0 to 1, got {value!r}.")
    return float(value)


def _shape(label: str, ring: Ring, score: float | None) -> dict[str, Any]:
    return {
        "label": label,
        "shape_type": "polygon",
        "points": ring.tolist(),
        "score": score,
        "attributes": {},
        "description": None,
        "difficult": False,
        "direction": 0,
        "flags": None,
        "group_id": None,
        "kie_linking": [],
    }


def simplified(ring: Ring, fineness: float) -> Ring:
    """Fewer points, none of the ring's farther from the new line than `fineness` times the ring's length, and never
    farther than needed to keep a triangle (Ramer 1972; Douglas and Peucker 1973)."""
    closed = np.concatenate([ring, ring[:1]])
    reach = fineness * float(np.linalg.norm(np.diff(closed, axis=0), axis=1).sum())
    if len(ring) <= 4 or reach <= 0:
        return ring
    # A closed line begins and ends at one point: it is cut at the point farthest from that.
    far = int(np.linalg.norm(ring - ring[0], axis=1).argmax())
    keep = np.zeros(len(closed), bool)
    keep[[0, far]] = True
    waiting = [(0, far), (far, len(ring))]
    while waiting:
        first, last = waiting.pop()
        if last - first < 2:
            continue
        apart = _distances(closed[first + 1 : last], closed[first], closed[last])
        place = int(apart.argmax())
        if apart[place] > reach:
            middle = first + 1 + place
            keep[middle] = True
            waiting += [(first, middle), (middle, last)]
    found = ring[keep[:-1]]
    return found if len(found) >= 3 else ring


def _distances(points: Ring, start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of points from a line piece."""
    way = end - start
    length = float(way @ way)
    place = np.clip((points - start) @ way / length, 0, 1) if length else np.zeros(len(points))
    found: NDArray[np.float64] = np.linalg.norm(points - start - place[:, None] * way, axis=1)
    return found
