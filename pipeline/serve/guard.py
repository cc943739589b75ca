"""Who may ask what: the address, the token, the page that a request comes from, and what answers forbid a browser.

A page of any site can send requests to localhost, and a name of any site can be made to lead there (DNS rebinding).
So a request must name a known host, and one that changes something must not come from another origin. Beyond this
machine a token is needed as well.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from flask import Flask, Response, jsonify, redirect, render_template, request
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as AnyResponse

from hsnet.errors import ConfigError, HSNetError
from pipeline.serve.engine import BankBusy
from pipeline.serve.uploads import TooLarge

log = logging.getLogger(__name__)

LEAST_TOKEN = 16
"""Characters: what cannot be guessed over a network."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
COOKIE = "hsnet-token"
OPEN = ("/health", "/login", "/static/")
"""Asked without a token: nothing of the bank is in the answers."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """Where is listened, and who may ask.

    Raises:
        ConfigError: another address than this machine's without a token, or a token that could be guessed.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    token: str | None = None
    names: tuple[str, ...] = ()
    """Further names under which the server is asked."""
    max_bytes: int = 64 << 20
    """Of a request."""

    def __post_init__(self) -> None:
        if self.token is None and not self.local:
            raise ConfigError(
                f"With --host {self.host} other machines can reach the server: give --token (at least {LEAST_TOKEN} "
                "characters), which they must then know. Nothing was started."
            )
        if self.token is not None and (len(self.token) < LEAST_TOKEN or not self.token.isascii()):
            raise ConfigError(
                f"--token has {len(self.token)} characters, it needs at least {LEAST_TOKEN}, all ASCII: "
                'python -c "import secrets; print(secrets.token_urlsafe())" makes one. Nothing was started.'
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOCAL_NAMES

    def knows(self, host: str) -> bool:
        """Whether a request may be for this host (the header, with or without its port)."""
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower()
        own = {self.host, *LOCAL_NAMES, *self.names}
        if not self.local:
            own |= {socket.gethostname(), socket.getfqdn()}
            try:
                ipaddress.ip_address(name)
            except ValueError:
                pass
            else:
                return True  # an address cannot be made to lead elsewhere
        return name in {one.lower() for one in own}

    def accepts(self, offered: str | None) -> bool:
        """Whether this is the token. Takes as long for a wrong one."""
        return self.token is None or (
            offered is not None and hmac.compare_digest(offered.encode(), self.token.encode())
        )

    @property
    def cookie(self) -> str:
        """What a browser keeps instead of the token."""
        return hmac.new((self.token or "").encode(), b"hsnet cookie", hashlib.sha256).hexdigest()


class Refused(HSNetError):
    """A request that is not answered, with its status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def guard(app: Flask, access: Access) -> None:
    """Check every request of an app, and give every answer its headers; errors become JSON."""
    app.config["MAX_CONTENT_LENGTH"] = access.max_bytes
    app.config["MAX_FORM_MEMORY_SIZE"] = access.max_bytes

    @app.before_request
    def check() -> AnyResponse | None:
        if not access.knows(request.host):
            raise Refused(403, f"Not served under the name {request.host!r}. If it is yours, start with --allow-host.")
        if request.method not in ("GET", "HEAD", "OPTIONS"):
            _check_origin()
        if access.token is None or request.path in OPEN or request.path.startswith(OPEN[-1]) or _has_token(access):
            return None
        if request.method == "GET" and wants_page():
            return redirect("/login")
        raise Refused(401, "A token is needed: as `Authorization: Bearer TOKEN`, as `Token: TOKEN`, or log in.")

    @app.after_request
    def protect(response: Response) -> Response:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        if response.status_code == 401:
            response.headers["WWW-Authenticate"] = 'Basic realm="hsnet"'
        return response

    @app.get("/login")
    def login_page() -> str:
        return render_template("login.html", wrong=False)

    @app.post("/login")
    def login() -> tuple[str, int] | AnyResponse:
        if not access.accepts(request.form.get("token")):
            return render_template("login.html", wrong=True), 401
        answer = redirect("/")
        answer.set_cookie(COOKIE, access.cookie, httponly=True, samesite="Strict", secure=request.is_secure)
        return answer

    @app.errorhandler(HSNetError)
    def refused(error: HSNetError) -> tuple[Response, int]:
        return told(str(error), status_of(error))

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[Response, int]:
        if error.code == 413:
            return told(f"More than {access.max_bytes / (1 << 20):.0f} MB are not taken (--max-mb).", 413)
        return told(error.description or error.name, error.code or 500)

    @app.errorhandler(Exception)
    def unforeseen(error: Exception) -> tuple[Response, int]:
        log.exception("%s %s", request.method, request.path)
        return told(f"An error that nobody foresaw: {type(error).__name__}. The server's log has more.", 500)


def wants_page() -> bool:
    """Whether a browser asks for a page, and no program for data."""
    return "text/html" in request.headers.get("Accept", "")


def status_of(error: HSNetError) -> int:
    """The HTTP status of an error: what is wrong with the request, or the bank is being written."""
    if isinstance(error, Refused):
        return error.status
    return 409 if isinstance(error, BankBusy) else 413 if isinstance(error, TooLarge) else 400


def told(message: str, status: int) -> tuple[Response, int]:
    """An error as annotators and pages read it."""
    if request.path.startswith("/v1/"):
        codes = {401: "UNAUTHORIZED", 404: "MODEL_NOT_FOUND", 413: "INVALID_IMAGE", 500: "INFERENCE_ERROR"}
        code = codes.get(status, "INVALID_IMAGE")
        return jsonify(success=False, error={"code": code, "message": message}), status
    return jsonify(error=message), status


def _check_origin() -> None:
    """Browsers say which page sends a request; annotators' servers say nothing."""
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    # The scheme may be that of a proxy before this server.
    if origin is not None and urlsplit(origin).netloc.lower() != request.host.lower():
        raise Refused(403, f"Requests from the page {origin!r} are not taken.")
    if site not in (None, "same-origin", "none"):
        raise Refused(403, "Requests from pages of other sites are not taken.")


def _has_token(access: Access) -> bool:
    kind, _, value = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() in ("bearer", "token"):
        return access.accepts(value.strip())
    if request.authorization is not None and request.authorization.type == "basic":
        return access.accepts(request.authorization.password)
    if "Token" in request.headers:
        return access.accepts(request.headers["Token"])
    cookie = request.cookies.get(COOKIE, "")
    return hmac.compare_digest(cookie.encode(), access.cookie.encode())
