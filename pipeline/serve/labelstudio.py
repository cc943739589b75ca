"""Label Studio's ML backend: masks for its tasks as brush regions, and what people submit there into the bank.

    GET  /health
    POST /setup     {"project", "schema", ...}                        -> {"model_version"}
    POST /predict   {"tasks": [{"id", "data": {...}}], "label_config"} -> {"results": [{"result", "score", ...}]}
    POST /webhook   {"action": "ANNOTATION_CREATED", "project": {"label_config"}, "task", "annotation"}

As the server of label-studio-ml-backend does it (`label_studio_ml/api.py`). A task names its photo by an address. Only
three are followed: data: (in the request), a path of the Label Studio that was configured, and http(s) of that very
host. Nothing is read from this machine's disk, nothing is fetched from elsewhere, and no redirect is followed.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urljoin, urlsplit
from xml.etree import ElementTree

from flask import Flask, Response, jsonify, request

from hsnet.errors import ConfigError, DataError
from pipeline.annotations.found import Found, objects_of
from pipeline.annotations.item import Annotation
from pipeline.annotations.labelstudio import open_source
from pipeline.annotations.read import Annotations
from pipeline.annotations.runs import pack, placed_runs
from pipeline.serve.engine import Engine
from pipeline.serve.guard import Refused
from pipeline.serve.results import found_of
from pipeline.serve.uploads import TooLarge, Upload, decode_base64, read_upload

log = logging.getLogger(__name__)

LEARNS_FROM = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED")
TIMEOUT_S = 30.0
_REGIONS = ("BrushLabels", "PolygonLabels")
_LONGEST_SETUP = 1 << 20


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead to any host, with the token."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        raise DataError(f"Label Studio redirects {req.full_url} to {newurl}; redirects are not followed.")


class Studio:
    """The Label Studio whose photos may be fetched.

    Args:
        address: http(s)://host[:port][/path].
        token: of its "Account & settings": a legacy token, or a personal access token.

    Raises:
        ConfigError: no such address.
    """

    def __init__(self, address: str, token: str | None = None, most_bytes: int = 64 << 20) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError(f"--label-studio must be an address such as http://localhost:8080, got {address!r}.")
        self.address = address.rstrip("/") + "/"
        self._token, self._most = token, most_bytes
        # Straight to the host, whatever proxy the environment names; and nothing but http(s).
        handlers = (urllib.request.ProxyHandler({}), _NoRedirect())
        self._opener = urllib.request.build_opener(*handlers)

    def allows(self, address: str) -> bool:
        """Whether an absolute address is one of its host."""
        one, own = urlsplit(address), urlsplit(self.address)
        return (one.scheme, one.netloc.lower()) == (own.scheme, own.netloc.lower())

    def fetch(self, address: str) -> bytes:
        """A file of Label Studio's. Raises DataError, TooLarge."""
        return self._ask(urllib.request.Request(address, headers=self._authorization()))

    def _authorization(self) -> dict[str, str]:
        if self._token is None:
            return {}
        if self._token.count(".") != 2:
            return {"Authorization": f"Token {self._token}"}
        # A personal access token only buys another one, for minutes.
        content = json.dumps({"refresh": self._token}).encode()
        asked = urllib.request.Request(
            urljoin(self.address, "api/token/refresh"), content, {"Content-Type": "application/json"}
        )
        try:
            return {"Authorization": f"Bearer {json.loads(self._ask(asked))['access']}"}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.address} gave no access token for the personal one: {error}.") from error

    def _ask(self, asked: urllib.request.Request) -> bytes:
        try:
            with self._opener.open(asked, timeout=TIMEOUT_S) as answer:
                data: bytes = answer.read(self._most + 1)
        except urllib.error.HTTPError as error:
            with error:
                why = "; is --label-studio-token right?" if error.code in (401, 403) else ""
                raise DataError(
                    f"Label Studio answers {asked.full_url} with {error.code} {error.reason}{why}"
                ) from error
        except (OSError, HTTPException, ValueError) as error:
            raise DataError(f"{asked.full_url} cannot be fetched: {error}.") from error
        if len(data) > self._most:
            raise TooLarge(f"{asked.full_url} has more than {self._most:,} bytes.")
        return data


@dataclass(frozen=True)
class Setup:
    """What a project's labelling setup says of its photos."""

    kind: str
    """brushlabels or polygonlabels."""
    tag: str
    """Name of the tag with the labels."""
    image: str
    """Name of the image's tag."""
    key: str
    """Key of the photo in a task's data."""
    labels: tuple[str, ...]

    @classmethod
    def of(cls, text: object) -> Setup:
        """Read the setup's XML. Raises DataError if it has no image with brush or polygon labels."""
        if not isinstance(text, str) or len(text) > _LONGEST_SETUP:
            raise DataError("The request holds no labelling setup (label_config).")
        if "<!" in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL):
            raise DataError("The labelling setup declares a document type or entities; it is not read.")
        try:
            root = ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            raise DataError(f"The labelling setup is no XML: {error}.") from error
        images = {tag.get("name"): tag.get("value", "") for tag in root.iter("Image")}
        for kind in _REGIONS:
            for tag in root.iter(kind):
                value = images.get(tag.get("toName"), "")
                if value.startswith("$") and tag.get("name"):
                    labels = tuple(label.get("value", "") for label in tag.iter("Label"))
                    return cls(kind.lower(), str(tag.get("name")), str(tag.get("toName")), value[1:], labels)
        raise DataError(
            'The labelling setup needs <Image name="image" value="$image"/> with <BrushLabels name="tag" '
            'toName="image">, and a <Label> for each class of the bank.'
        )


def register(app: Flask, engine: Engine, studio: Studio | None) -> None:
    """Add the interface to an application."""

    @app.post("/setup")
    def studio_setup() -> Response:
        values = _json()
        setup = Setup.of(values.get("schema") or values.get("label_config"))
        missing = [name for name in engine.bank.classes if name not in setup.labels]
        if missing:
            log.warning("Label Studio's project has no label for the classes %s: they are left out", ", ".join(missing))
        return jsonify(model_version=engine.version)

    @app.get("/versions")
    def studio_versions() -> Response:
        return jsonify(versions=[engine.version])

    @app.post("/predict")
    def studio_predict() -> Response:
        values = _json()
        setup = Setup.of(values.get("label_config"))
        tasks = values.get("tasks")
        if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
            raise DataError("The request holds no tasks.")
        return jsonify(results=[_prediction(engine, setup, task, studio) for task in tasks])

    @app.post("/webhook")
    def webhook() -> tuple[Response, int]:
        values = _json()
        action = values.get("action")
        if action not in LEARNS_FROM:
            return jsonify(status="ignored", action=action), 200
        project, task, annotation = (values.get(key) for key in ("project", "task", "annotation"))
        if not isinstance(task, dict) or not isinstance(annotation, dict) or not isinstance(project, dict):
            raise DataError(f"{action} without project, task and annotation: let the webhook send its payload.")
        if annotation.get("was_cancelled"):
            return jsonify(status="ignored", action="skipped"), 200
        added = learn(engine, Setup.of(project.get("label_config")), task, annotation, studio)
        return jsonify(status="ok", result={"photo": added.photo.id, "changed": added.changed}), 201


def _json() -> Mapping[str, Any]:
    """The request's JSON object; a browser cannot send one from another site unasked."""
    values = request.get_json(silent=True) if request.is_json else None
    if not isinstance(values, dict):
        raise DataError("The request must be a JSON object (Content-Type: application/json).")
    return values


def _prediction(engine: Engine, setup: Setup, task: Mapping[str, Any], studio: Studio | None) -> dict[str, Any]:
    upload = photo_of(setup, task, studio)
    found = {name: one for name, one in engine.answer(upload.photo).items() if name in setup.labels}
    regions = list(regions_of(found_of(found, Path(upload.name), upload.size), setup))
    # By the least sure class: Label Studio sorts tasks by it.
    score = min((one.sureness for one in found.values()), default=None)
    return {"result": regions, "score": score, "model_version": engine.version}


def regions_of(found: Found, setup: Setup) -> Iterator[dict[str, Any]]:
    """Brush regions of Label Studio's, one for each object; where only polygons are labelled, brushes all the same."""
    for label, one in found.classes.items():
        for number, instance in enumerate(objects_of(one)):
            left, top, _, _ = instance.box
            rle = pack(placed_runs(instance.mask, left, top, found.height, found.width))
            yield {
                "id": f"{label[:20]}-{number}",
                "type": "brushlabels",
                "from_name": setup.tag,
                "to_name": setup.image,
                "original_width": found.width,
                "original_height": found.height,
                "image_rotation": 0,
                "score": instance.score,
                "value": {"format": "rle", "rle": rle, "brushlabels": [label]},
            }


def photo_of(setup: Setup, task: Mapping[str, Any], studio: Studio | None) -> Upload:
    """The photo of a task.

    Raises:
        DataError: the task has none, its address is not one that is followed, or no photo is there.
    """
    data = task.get("data")
    address = data.get(setup.key) if isinstance(data, dict) else None
    if not isinstance(address, str) or not address:
        raise DataError(f"Task {task.get('id')!r} names no photo under {setup.key!r}.")
    if address.startswith("data:"):
        return read_upload(decode_base64(address, f"the photo of task {task.get('id')!r}"), f"task-{task.get('id')}")
    parts = urlsplit(address)
    if studio is None:
        raise Refused(
            400, f"The photo of task {task.get('id')!r} lies at {address[:200]!r}. Start `hsnet serve` with "
            "--label-studio ADDRESS and --label-studio-token, so that it may be fetched there.",
        )  # fmt: skip
    if not parts.scheme and not parts.netloc and address.startswith("/"):
        address = urljoin(studio.address, address.lstrip("/"))
    if not studio.allows(address):
        raise Refused(
            400, f"The photo of task {task.get('id')!r} lies at {address[:200]!r}, which is not on {studio.address}: "
            "nothing is fetched from elsewhere or read from this machine.",
        )  # fmt: skip
    name = unquote(parts.query.removeprefix("d=") if parts.path.endswith("/local-files/") else parts.path)
    return read_upload(studio.fetch(address), name)


def learn(
    engine: Engine, setup: Setup, task: Mapping[str, Any], annotation: Mapping[str, Any], studio: Studio | None
) -> Any:
    """Put a submitted annotation into the bank; classes of the setup that it does not mark are absent.

    Raises:
        DataError: broken regions, or no photo. BankBusy.
    """
    upload = photo_of(setup, task, studio)
    with tempfile.TemporaryDirectory(prefix="hsnet-") as name:
        folder = Path(name)
        (folder / upload.name).write_bytes(upload.data)
        raw = [{"id": task.get("id"), "data": {"image": upload.name}, "annotations": [dict(annotation)]}]
        read = Annotations(open_source(Path(f"task {task.get('id')}"), raw, folder))[0]
        known = [label for label in setup.labels if label in engine.bank.classes]
        absent = frozenset(label for label in known if label not in read.masks and not _mentions(annotation, label))
        if not read.masks and not absent:
            raise DataError(f"Task {task.get('id')!r} marks nothing, and none of its labels is a class of the bank.")
        return engine.add(Annotation(read.photo, read.masks, absent, read.ignore))


def _mentions(annotation: Mapping[str, Any], label: str) -> bool:
    """Whether any region, a box or a point too, has the label: the class is there, wherever it is."""
    values = [region.get("value") for region in annotation.get("result") or [] if isinstance(region, dict)]
    lists = [names for value in values if isinstance(value, dict) for names in value.values()]
    return any(isinstance(names, list) and label in names for names in lists)
