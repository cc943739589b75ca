"""What all writers need: names of photos, lists that grow on disk, files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from pipeline.common.files import whole
from pipeline.datasets.queries import names_of


class Names:
    """Numbers and names of the photos that a writer was given, in their order.

    Args:
        root: folder that names are relative to; a photo elsewhere keeps its absolute path.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self._last: Path = root
        self._stems = names_of(self._photos())
        self._count = 0

    def add(self, photo: Path) -> int:
        """Number of the photo, from 1."""
        self._count += 1
        return self._count

    def relative(self, photo: Path) -> str:
        """The photo's path under the root, with "/"."""
        path = Path(os.path.abspath(photo))
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()

    def stem(self, photo: Path) -> str:
        """A name for files of this photo: readable, never given twice; to be asked once per photo."""
        self._last = photo
        return next(self._stems)

    def _photos(self) -> Iterator[Path]:
        while True:
            yield self._last


class WholeFile:
    """A text file (UTF-8, `newline` as for `open`) that appears under its name when it is closed."""

    def __init__(self, path: Path, newline: str | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        partial = self._stack.enter_context(whole(path))
        # Names of the file system may hold bytes that are no text: they are written as they are.
        self.file: IO[str] = self._stack.enter_context(
            partial.open("w", encoding="utf-8", errors="surrogateescape", newline=newline)
        )

    def write(self, text: str) -> None:
        self.file.write(text)

    def close(self) -> None:
        """Give the file its name. Raises OSError."""
        self._stack.close()

    def discard(self) -> None:
        """Leave nothing; a file of that name stays as it was."""
        try:
            with self._stack:
                raise _Discarded
        except _Discarded:
            pass


class _Discarded(Exception):
    pass


class JsonParts:
    """A JSON object with lists that grow one entry at a time, in little memory.

    Args:
        path: the file, there after `close`.
        head: the other keys, first in the file.
        lists: keys of the lists, in order.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], lists: Sequence[str]) -> None:
        self._file = WholeFile(path)
        self._head = head
        self._parts = {
            name: tempfile.TemporaryFile("w+", encoding="ascii", dir=path.parent)  # noqa: SIM115
            for name in lists
        }

    def add(self, name: str, entry: Any) -> None:
        """One more entry of a list."""
        part = self._parts[name]
        part.write(",\n" if part.tell() else "\n")
        part.write(json.dumps(entry, allow_nan=False))

    def close(self) -> None:
        self._file.write(json.dumps(self._head)[:-1])
        for number, (name, part) in enumerate(self._parts.items()):
            self._file.write(f"{', ' if number or self._head else ''}{json.dumps(name)}: [")
            part.seek(0)
            while text := part.read(1 << 20):
                self._file.write(text)
            self._file.write("\n]")
            part.close()
        self._file.write("}\n")
        self._file.close()

    def discard(self) -> None:
        for part in self._parts.values():
            part.close()
        self._file.discard()


def bare(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Without the values that are None: a score that is not known is not written."""
    return {key: value for key, value in entry.items() if value is not None}
