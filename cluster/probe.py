"""Whether what listens at an address is Ray: one call that only Ray's control service answers, with a time limit.

Ray itself waits two minutes for an answer and then ends the process, and a server that greets as gRPC does and then
says nothing holds it for longer than nine. So it is asked here first, in the few bytes of HTTP/2 that a gRPC call takes
(RFC 9113; https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md), without a library for it.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_DATA, _HEADERS, _RESET, _SETTINGS, _GO_AWAY = 0, 1, 3, 4, 7
_END_STREAM, _END_HEADERS = 1, 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def trouble(host: str, port: int, timeout_s: float) -> str | None:
    """Why there is no Ray at an address; None if there is. Takes at most about `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            if os.environ.get("RAY_USE_TLS") == "1":
                return None  # the call below would have to be encrypted; Ray's own error must do
            return _ask(connection, f"{host}:{port}", deadline)
    except TimeoutError:
        return f"timed out: it takes connections, and did not answer in {timeout_s:g} s as Ray does"
    except OSError as error:
        return f"{error or type(error).__name__}"


def _ask(connection: socket.socket, authority: str, deadline: float) -> str | None:
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": _METHOD,
        ":authority": authority,
        "content-type": "application/grpc",
        "te": "trailers",
    }
    token = _token()
    if token:
        headers["authorization"] = f"Bearer {token}"
    packed = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
    empty_message = bytes(5)  # not compressed, no bytes
    connection.sendall(
        _PREFACE
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, 1, packed)
        + _frame(_DATA, _END_STREAM, 1, empty_message)
    )
    greeted = False
    while True:
        length_kind_flags = _read(connection, 9, deadline)
        if not greeted and (len(length_kind_flags) < 9 or length_kind_flags[3] != _SETTINGS):
            return "what answers there is not Ray"
        if len(length_kind_flags) < 9:
            return "what answers there ended the conversation; it is not Ray"
        greeted = True
        kind, flags = length_kind_flags[3], length_kind_flags[4]
        length = int.from_bytes(length_kind_flags[:3], "big")
        if len(_read(connection, length, deadline)) < length:
            return "what answers there ended the conversation; it is not Ray"
        if kind == _DATA and length >= 5:
            return None
        if kind in (_RESET, _GO_AWAY) or (kind == _HEADERS and flags & _END_STREAM):
            asked = "the token given here" if token else "a call without a token"
            return (
                f"what answers there speaks gRPC but refused {asked}: it is not Ray, or its token is needed "
                "(RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)"
            )


def _read(connection: socket.socket, count: int, deadline: float) -> bytes:
    """That many bytes, or fewer if the other side ended."""
    got = b""
    while len(got) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        part = connection.recv(min(count - len(got), 1 << 16))
        if not part:
            break
        got += part
    return got


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _text(text: str) -> bytes:
    """A string of HPACK (RFC 7541, section 5.2), not shortened."""
    raw = text.encode()
    if len(raw) < 127:
        return bytes([len(raw)]) + raw
    rest, length = len(raw) - 127, b"\x7f"
    while rest >= 128:
        length += bytes([rest % 128 + 128])
        rest //= 128
    return length + bytes([rest]) + raw


def _token() -> str:
    """The token that Ray would use; "" if it would use none."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return ""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    try:
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser().read_text().strip()
    except OSError:
        return ""
