"""A real S3 server on this machine (moto's), and one that fails and slows down at random from a seed."""

from __future__ import annotations

import logging
import random
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from fakes import Photos


@dataclass
class Faults:
    """What happens to requests, drawn from a seed. Chances are of one request each."""

    seed: int = 0
    error: float = 0.0
    """Answer 500 or 503."""
    refuse: float = 0.0
    """Break the connection before the request is looked at."""
    lose: float = 0.0
    """Do what is asked, then break the connection without an answer."""
    cut: float = 0.0
    """Break the connection in the middle of the answer's body."""
    slow: float = 0.0
    delay_s: float = 0.03
    deny: bool = False
    """Answer 403 to everything."""
    done: list[str] = field(default_factory=list)
    """Faults that happened."""

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(self.seed), threading.Lock()

    def draw(self) -> str:
        """Name of a fault, or nothing."""
        with self._lock:
            if self._random.random() < self.slow:
                self.done.append("slow")
                time.sleep(self.delay_s * self._random.random())
            number = self._random.random()
            for name in ("error", "refuse", "lose", "cut"):
                number -= getattr(self, name)
                if number < 0:
                    self.done.append(name)
                    return name
        return ""


class S3Server:
    """moto's server behind `faults`; `seen` lists the requests as METHOD /path."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.faults = Faults()
        self.seen: list[str] = []
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __call__(self, environ, start_response):
        self.seen.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if self.faults.deny:
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>"]
        fault = self.faults.draw()
        if fault == "refuse":
            return self._hang_up(environ)
        if fault == "error":
            start_response(f"{random.choice((500, 503))} Trouble", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code></Error>"]
        if fault == "lose":
            list(self._app(environ, lambda *_: None))
            return self._hang_up(environ)
        answer = self._app(environ, start_response)
        if fault == "cut":
            body = b"".join(answer)
            return self._cut(environ, body)
        return answer

    def _cut(self, environ, body):
        yield body[: len(body) // 2]
        self._hang_up(environ)

    def _hang_up(self, environ):
        import socket

        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return [b""]

    def misbehave(self, seed: int) -> None:
        """Two of five requests fail, in every way; some are slow."""
        self.faults = Faults(seed, error=0.1, refuse=0.1, lose=0.1, cut=0.1, slow=0.3)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- the objects, without our code -------------------------------------------------------------------------

    def objects(self, bucket: str = "bucket") -> dict[str, bytes]:
        """All objects of a bucket."""
        return {key.name: key.value for key in self._backend().buckets[bucket].keys.values()}

    def change(self, key: str, data: bytes, bucket: str = "bucket") -> None:
        """Replace an object behind everybody's back."""
        self._backend().put_object(bucket, key, data)

    def delete(self, key: str, bucket: str = "bucket") -> None:
        self._backend().delete_object(bucket, key)

    def _backend(self):
        from moto.s3.models import s3_backends

        return s3_backends["123456789012"]["aws"]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, tmp_path, monkeypatch) -> Iterator[S3Server]:
    """An empty bucket named bucket, the environment that leads there, and a cache of the test's own."""
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "HSNET_CACHE_BYTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("HSNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.store.bucket.BACKOFF_S", 0.002)
    s3_server.faults = Faults()
    for path in ("/moto-api/reset", "/bucket"):
        method = "POST" if path.startswith("/moto") else "PUT"
        urllib.request.urlopen(urllib.request.Request(s3_server.endpoint + path, method=method)).close()
    s3_server.seen.clear()
    yield s3_server
    s3_server.faults = Faults()


@pytest.fixture
def photos() -> Photos:
    return Photos(range(11))


@pytest.fixture(scope="session")
def weights():
    from pipeline.features.weights import load_weights

    return load_weights("squeezenet1_1")


@pytest.fixture
def run(weights):
    """Extracts photos at 32 px, four to a shard."""
    from pipeline.extract.stage import extract

    def call(photos, path, **options):
        options = {"precision": "int8", "shard_images": 4, **options}
        return extract(photos, weights, path, image_size=32, **options)

    return call
