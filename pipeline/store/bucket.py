"""Objects under an address such as s3://bucket/x.zarr: read, written and listed; a failure is told in one line.

The requests, their signatures and the first retries are obstore's. Credentials come from the usual environment
(AWS_ACCESS_KEY_ID and so on) and are neither kept nor printed: of an answer only its status and code are shown.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import unquote, urlsplit

from hsnet.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore

SCHEMES = ("s3", "gs", "az")
"""Only s3 is tested; the others go through the same library."""

RETRIES = 8
"""Repetitions of one request, by obstore: after refused and dropped connections and answers of 500 and more."""
ATTEMPTS = 4
"""Attempts of one call here: for what obstore gives up, such as an answer that breaks off in its middle."""
BACKOFF_S = 0.1
"""First pause before a request is repeated; the next ones are longer, up to 5 s."""
_TIMEOUT = timedelta(minutes=5)
_PART = 8 << 20
_KEY = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/){0,7}[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")

# obstore has types for what a server answers, not for why there is no answer: names in the text of a GenericError.
_NOT_REACHED = {
    "dns error": "its name is unknown, or there is no network",
    "ConnectionRefused": "nothing listens there",
    "InvalidCertificate": "its certificate is not valid",
}
_TOO_SLOW = dict.fromkeys(("TimedOut", "timed out"), "it does not answer in time")
_CREDENTIALS = ("/latest/api/token", "/latest/meta-data", "169.254.170.2")
"""Where a machine's role is asked for."""

T = TypeVar("T")


@dataclass(frozen=True)
class ObjectFacts:
    """What a listing says of one object."""

    size: int
    etag: str
    """Changes with the content."""
    modified: datetime
    """When it was written, by the server's clock."""


def address(path: str | Path) -> str | None:
    """The address of a store in an object store, in one spelling; None if `path` is a path of this machine.

    >>> address("s3://bucket/x.zarr/")
    's3://bucket/x.zarr'
    >>> address("voc.zarr") is None
    True

    Raises:
        ConfigError: it looks like an address and cannot be one.
    """
    text = str(path)
    # pathlib makes s3:/bucket of s3://bucket.
    known = re.match(rf"(?:{'|'.join(SCHEMES)}):/", text)
    if text.startswith("file://") or not (known or "://" in text):
        return None
    scheme, _, rest = text.partition(":")
    parts = rest.strip("/").split("/")
    if scheme not in SCHEMES:
        raise ConfigError(
            f"'{_without_user(text)}' is no place for a store: use a path, or an address s3://BUCKET/NAME."
        )
    if "@" in rest or "?" in rest or "#" in rest:
        raise ConfigError(
            f"'{_without_user(text)}' holds more than an address s3://BUCKET/NAME. Credentials are given by the "
            f"environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) only."
        )
    if len(parts) < 2 or not all(parts) or {".", ".."} & set(parts):
        raise ConfigError(f"'{text}' is not an address of the form {scheme}://BUCKET/NAME.")
    return f"{scheme}://{'/'.join(parts)}"


def local_path(path: str | Path) -> Path:
    """A path of this machine, also from file:///... ."""
    text = str(path)
    return Path(unquote(urlsplit(text).path)) if text.startswith("file://") else Path(path)


def location(path: str | Path) -> str | Path:
    """An address, or an absolute path: what a worker with another working directory is given."""
    return address(path) or local_path(path).absolute()


class Bucket:
    """The objects whose names begin with an address. Safe in several threads.

    Every method raises StoreError with one clear line when the server refuses or cannot be reached.
    """

    def __init__(self, url: str) -> None:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        self.url = url
        self.endpoint = _without_user(_endpoint())
        try:
            self._store: ObjectStore = from_url(
                url,
                client_options=_client(),
                retry_config={
                    # Without a key the role of a virtual machine is asked for; most machines have none.
                    "max_retries": RETRIES if "AWS_ACCESS_KEY_ID" in os.environ else min(RETRIES, 2),
                    "retry_timeout": _TIMEOUT,
                    "backoff": {
                        "init_backoff": timedelta(seconds=BACKOFF_S),
                        "max_backoff": timedelta(seconds=50 * BACKOFF_S),
                        "base": 2,
                    },
                },
            )
        except (BaseError, ValueError) as error:
            raise self._failure("cannot be opened", error) from None

    def get(self, key: str, most: int) -> bytes:
        """An object of at most `most` bytes. Raises FileNotFoundError if there is none."""
        import obstore

        def read() -> bytes:
            answer = obstore.get(self._store, key)
            if answer.meta["size"] > most:
                raise StoreError(
                    f"{self.url}/{key} has {answer.meta['size']:,} bytes; {most:,} is the most that is read."
                )
            return bytes(answer.bytes())

        return self._call(f"object '{key}' cannot be read", read)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes of an object, fewer where it is shorter. Raises FileNotFoundError if there is none."""
        import obstore

        return self._call(
            f"object '{key}' cannot be read",
            lambda: bytes(obstore.get_range(self._store, key, start=start, end=end)),
        )

    def head(self, key: str) -> ObjectFacts | None:
        """Facts of an object, None if there is none."""
        import obstore

        try:
            return self._call(f"object '{key}' cannot be looked at", lambda: _entry(obstore.head(self._store, key)))
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object, whole or not at all; a large file in several requests."""
        import obstore

        self._call(
            f"object '{key}' cannot be written",
            lambda: obstore.put(self._store, key, data, chunk_size=_PART, max_concurrency=4),
        )

    def put_if(self, key: str, data: bytes, etag: str | None) -> str | None:
        """Write an object if it is the one with `etag`, or with None if there is none.

        Returns its new etag; None if the condition does not hold. After a broken connection nobody knows whether it was
        written: the caller's data must tell, by a token.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            done = self._call(
                f"object '{key}' cannot be written",
                lambda: obstore.put(self._store, key, data, mode="create" if etag is None else {"e_tag": etag}),
            )
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return None
        return done["e_tag"] or ""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; one that is not there is no error."""
        import obstore

        if keys:
            self._call("objects cannot be deleted", lambda: obstore.delete(self._store, list(keys)))

    def objects(self, prefix: str = "") -> dict[str, ObjectFacts]:
        """All objects below `prefix`. Names that no store has are left out: nothing is to be written by them here."""
        import obstore

        def read() -> dict[str, ObjectFacts]:
            pages = obstore.list(self._store, prefix or None)
            return _entries(meta for page in pages for meta in page)

        return self._call("cannot be listed", read)

    def children(self) -> tuple[list[str], dict[str, ObjectFacts]]:
        """(folders, objects) directly below the address."""
        import obstore

        def read() -> tuple[list[str], dict[str, ObjectFacts]]:
            page = obstore.list_with_delimiter(self._store)
            folders = [prefix.rstrip("/") for prefix in page["common_prefixes"]]
            return [name for name in folders if _KEY.fullmatch(name)], _entries(page["objects"])

        return self._call("cannot be listed", read)

    def _call(self, what: str, request: Callable[[], T]) -> T:
        from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError

        for attempt in range(ATTEMPTS):
            try:
                return request()
            except (AlreadyExistsError, PreconditionError):
                raise
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise self._failure(what, error) from None
                raise FileNotFoundError(f"there is no object at {self.url}") from None
            except GenericError as error:  # the only type of which another try may succeed
                if attempt + 1 == ATTEMPTS or not _passing(str(error)):
                    raise self._failure(what, error) from None
            except (BaseError, NotImplementedError, OSError, ValueError) as error:
                raise self._failure(what, error) from None
            time.sleep(BACKOFF_S * 2**attempt)
        raise AssertionError("not reached")

    def _failure(self, what: str, error: Exception) -> StoreError:
        return StoreError(f"{self.url}: {what}: {self._reason(error)} Nothing else was changed.")

    def _reason(self, error: Exception) -> str:
        from obstore.exceptions import GenericError, PermissionDeniedError, UnauthenticatedError

        text = str(error)
        status, code = _status(text), _first(r"<Code>([A-Za-z]{1,60})</Code>", text)
        answer = f"{status} {code}".strip()
        where = f"at {self.endpoint}" if self.endpoint else "at the provider's own endpoint"
        if any(sign in text for sign in _CREDENTIALS):
            return (
                "there are no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN for "
                "temporary ones) in the environment; files such as ~/.aws/credentials are not read."
            )
        # What obstore has no type for, and all that fails in a list, is a GenericError.
        if isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or status in ("401", "403"):
            return f"access denied ({answer}). Check the credentials in the environment and what they may do there."
        if code == "NoSuchBucket":
            return f"there is no such bucket {where}. Make it first, or correct the address or AWS_ENDPOINT_URL."
        if status == "301" or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
            return f"the bucket is in another region ({answer}). Set AWS_REGION to the bucket's."
        if status == "501" or isinstance(error, NotImplementedError):
            return f"the server cannot do it ({answer}). It must know conditional writes (If-None-Match)."
        if status:
            return f"the server {where} answered {answer}, {_times(text)}."
        if isinstance(error, GenericError):
            if "BadScheme" in text:
                return f"the endpoint {self.endpoint} is not https. Set AWS_ALLOW_HTTP=true if that is meant."
            for sign, meaning in {**_NOT_REACHED, **_TOO_SLOW}.items():
                if sign in text:
                    return f"the server {where} cannot be reached: {meaning}. Check the network and AWS_ENDPOINT_URL."
            if "HttpError" in text:
                return f"the connection to the server {where} broke, {_times(text)}. Run the command again."
        line = text.splitlines()[0][:300] if text else type(error).__name__
        for name in _SECRETS:
            if value := os.environ.get(name):
                line = line.replace(value, "***")
        return f"{_without_user(line).rstrip('.')}."


def _passing(text: str) -> bool:
    """Whether another try may succeed after a GenericError; obstore has waited for servers that are not there."""
    status = _status(text)
    if status:
        return status in ("408", "409", "429") or status >= "500"
    return "HttpError" in text and not any(sign in text for sign in (*_NOT_REACHED, *_CREDENTIALS, "BadScheme"))


def _status(text: str) -> str:
    """HTTP status in an error's debug text; empty if there was no answer."""
    return _first(r"\bstatus: (\d{3}),", text)


def _times(text: str) -> str:
    retries = int(_first(r"\bretries: (\d+),", text) or 0)
    return f"{retries + 1} times" if retries else "again and again"


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _endpoint() -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _client() -> ClientConfig:
    """Options of the connection. Where any is given obstore looks for none in the environment: it is done here."""
    options: dict[str, Any] = {"timeout": "5min", "connect_timeout": "5s", "read_timeout": "60s"}
    for name in (*options, "proxy_url", "proxy_ca_certificate", "proxy_excludes"):
        if value := os.environ.get(f"AWS_{name.upper()}"):
            options[name] = value
    for name in ("allow_http", "allow_invalid_certificates"):
        options[name] = os.environ.get(f"AWS_{name.upper()}", "").lower() in ("true", "1", "yes", "on")
    return cast("ClientConfig", options)


def _without_user(text: str) -> str:
    """An address without what stands before an @, which may be a password."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _entry(meta: Any) -> ObjectFacts:
    return ObjectFacts(int(meta["size"]), meta["e_tag"] or f"{meta['last_modified']}", meta["last_modified"])


def _entries(metas: Iterable[Any]) -> dict[str, ObjectFacts]:
    return {meta["path"]: _entry(meta) for meta in metas if _KEY.fullmatch(meta["path"])}
