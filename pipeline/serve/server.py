"""The server process: a port, and the application behind waitress."""

from __future__ import annotations

import errno
import socket
from typing import Any

from hsnet.errors import ConfigError

INSTALL = "pip install 'hsnet-pipeline[serve]'"
THREADS = 8
_HEAD_BYTES = 1 << 20


def require_server() -> None:
    """Raises ConfigError that says what to install, if it is not there."""
    try:
        import flask  # noqa: F401
        import waitress  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"This needs Flask and waitress ({error.name} is missing): {INSTALL}.") from error


def listen(host: str, port: int) -> socket.socket:
    """Take a port, before anything slow is done; 0 for any that is free.

    Raises:
        ConfigError: it is taken, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} of {host} is taken by another process, perhaps by another `hsnet serve`. Stop that, or "
                "give another --port. Nothing was started."
            ) from error
        raise ConfigError(f"Cannot listen on {host}, port {port}: {error}. Nothing was started.") from error


def make_server(app: Any, taken: socket.socket, max_bytes: int) -> Any:
    """A waitress server, to be run and closed.

    Args:
        taken: from `listen`.
        max_bytes: of a request; the application refuses more with a message, and much more is cut off.
    """
    import waitress

    return waitress.create_server(
        app,
        sockets=[taken],
        threads=THREADS,
        max_request_body_size=max_bytes + _HEAD_BYTES,
        ident="hsnet",
        clear_untrusted_proxy_headers=True,
    )


def serve(app: Any, taken: socket.socket, max_bytes: int) -> None:
    """Answer until interrupted."""
    server = make_server(app, taken, max_bytes)
    try:
        server.run()
    finally:
        server.close()
