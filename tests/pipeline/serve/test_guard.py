"""Who is answered: hosts, origins, tokens."""

from __future__ import annotations

import base64
import errno
import io
import json
import socket
import urllib.request

import pytest
from fakes import invoke
from tiny_bank import numbers, photo_bytes, running

from hsnet.errors import ConfigError
from pipeline.serve.app import create_app
from pipeline.serve.guard import COOKIE, Access
from pipeline.serve.server import listen

TOKEN = "a-token-of-many-letters"


def basic(password):
    return {"Authorization": "Basic " + base64.b64encode(f"hsnet:{password}".encode()).decode()}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "10.0.0.7"])
def test_a_name_that_was_made_to_lead_here_is_refused(client, host):
    answer = client.get("/health", headers={"Host": host})
    assert answer.status_code in (400, 403)
    assert "error" in answer.json


@pytest.mark.parametrize("host", ["localhost", "localhost:8765", "127.0.0.1:1", "[::1]:8765", "LOCALHOST"])
def test_this_machine_by_its_names(client, host):
    assert client.get("/health", headers={"Host": host}).status_code == 200


def test_another_name_can_be_allowed(engine):
    app = create_app(engine, Access(names=("host.docker.internal",)))
    assert app.test_client().get("/health", headers={"Host": "host.docker.internal:8765"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://localhost.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/api/predict", "/predict", "/v1/predict", "/webhook", "/setup", "/login"])
def test_pages_of_others_change_nothing(client, headers, path):
    assert client.post(path, json={}, headers=headers).status_code == 403


def test_its_own_page_is_heard(client):
    photo = (io.BytesIO(photo_bytes(numbers()[2])), "a.png")
    headers = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/predict", data={"photo": photo}, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/predict", "/v1/predict", "/webhook", "/setup"])
def test_json_sent_as_a_form_is_no_request(client, path):
    """A form of another page can send text, never application/json."""
    answer = client.post(path, data=json.dumps({"tasks": []}), content_type="text/plain")
    assert answer.status_code == 400
    assert "application/json" in json.dumps(answer.json)


def test_answers_forbid_what_a_browser_might_do(client):
    for path in ("/", "/health", "/nothing", "/static/style.css"):
        with client.get(path) as answer:
            headers = answer.headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong-token-of-letters"},
        {"Token": TOKEN + "x"},
        {"Token": ""},
        basic("wrong"),
        {"Cookie": f"{COOKIE}={TOKEN}"},
        {"Cookie": f"{COOKIE}="},
    ],
)
def test_without_the_token_nothing_is_told(with_token, headers):
    for path in ("/api/bank", "/v1/models", "/api/answers/x/photo.jpg", "/versions", "/"):
        answer = with_token.get(path, headers=headers)
        assert answer.status_code == 401, path
        assert "tiny" not in answer.get_data(as_text=True)
    assert with_token.post("/predict", json={}, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"Token {TOKEN}"}, {"Token": TOKEN}, basic(TOKEN)],
)
def test_with_the_token(with_token, headers):
    assert with_token.get("/api/bank", headers=headers).json["photos"] == 2
    assert with_token.get("/health").status_code == 200, "says nothing of the bank"


def test_logging_in(with_token):
    page = with_token.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 302
    assert page.headers["Location"] == "/login"
    assert "Token" in with_token.get("/login").get_data(as_text=True)
    assert with_token.post("/login", data={"token": "wrong"}).status_code == 401
    done = with_token.post("/login", data={"token": TOKEN})
    assert done.status_code == 302
    cookie = done.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    assert with_token.get("/api/bank").status_code == 200


def test_beyond_this_machine_a_token_is_a_must(ready_bank):
    for words in (("--host", "0.0.0.0"), ("--host", "0.0.0.0", "--token", "short"), ("--token", "ü" * 20)):
        result = invoke("serve", str(ready_bank), "--port", "0", *words)
        assert result.exit_code == 1
        assert "--token" in result.stderr
        assert "Nothing was started." in result.stderr
    with pytest.raises(ConfigError):
        Access(host="192.168.1.4")


def test_no_bank(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.serve.server.listen", None)
    result = invoke("serve", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert "is no bank" in result.stderr


def test_without_flask_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "waitress", None)
    result = invoke("serve", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert "pip install 'hsnet-pipeline[serve]'" in result.stderr


@pytest.mark.s3
def test_a_port_that_is_taken(ready_bank):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = invoke("serve", str(ready_bank), "--port", port)
    assert result.exit_code == 1
    assert f"Port {port} of 127.0.0.1 is taken" in result.stderr
    assert "Nothing was started." in result.stderr


def test_an_address_that_is_not_this_machines(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(ConfigError, match=r"Cannot listen on 192\.0\.2\.1, port 80"):
        listen("192.0.2.1", 80)


@pytest.mark.s3
def test_an_annotator_that_disconnects_does_no_harm(engine):
    engine.prepared()
    image = base64.b64encode(photo_bytes(numbers()[2])).decode()
    body = json.dumps({"model": "hsnet", "image": image}).encode()
    lines = ("POST /v1/predict HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with running(lambda port: create_app(engine, Access(port=port))) as address:
        for sent in (head + body, head + body[:100], b"POST / HT"):
            with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as caller:
                caller.sendall(sent)
        asked = urllib.request.Request(f"{address}/v1/predict", body, {"Content-Type": "application/json"})
        with opener.open(asked, timeout=60) as answer:
            assert json.load(answer)["success"]
