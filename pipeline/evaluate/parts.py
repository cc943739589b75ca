"""Rows of an evaluation on their way to one file: part files beside it, which an interrupted evaluation goes on from.

Workers write what they have answered into `ROWS.parquet.parts/`, one file per run of episodes, named by manifest, by
everything else that decides its rows, and by its range; a file is there whole or not at all. A worker that does not
see the folder (on another machine, without a shared disk) sends its rows to the process that does. At the end the
parts are read one after the other into the file of rows, in its order, and removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsnet.errors import DataError, StoreError
from pipeline.common.files import read_json, replace_json, whole
from pipeline.common.lock import sole_writer, still_owned
from pipeline.evaluate.blocks import BLOCK, Drawn
from pipeline.scores.rows import METADATA

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

SUFFIX = ".parts"
IDENTITY = "evaluation.json"
ROWS_AT_ONCE = 1 << 14
"""Rows of a row group of the finished file; so many are in memory while it is put together."""

_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})-(\d{9,})-(\d{9,})\.parquet")
_NOT_IDENTITY = ("environment", "paths", "notes")
_SHOWN = 100
_LONG = 10_000


@dataclass(frozen=True)
class Part:
    """The rows of episodes `first` to `last` (not included) of one test."""

    manifest: str
    """Digest of the test's episodes with the most supports."""
    first: int
    last: int
    place: Path | pa.Table
    """A file, with a row group per number of shots and fusion; or the rows themselves, where nothing is kept."""

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Its rows. Raises OSError or ArrowException if the file is damaged."""
        import pyarrow.parquet as pq

        if isinstance(self.place, Path):
            return pq.read_table(self.place, columns=columns, partitioning=None)
        return self.place if columns is None else self.place.select(columns)

    def group(self, shots: int, fusion: str) -> pa.Table:
        """Rows of one number of shots and fusion, by episode."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        if not isinstance(self.place, Path):
            table = self.place
            return table.filter(pc.and_(pc.equal(table["shots"], shots), pc.equal(table["fusion"], fusion)))
        with pq.ParquetFile(self.place) as file:
            cases = json.loads(file.schema_arrow.metadata[b"cases"])
            return file.read_row_group(cases.index([shots, fusion])).replace_schema_metadata(None)


@dataclass(frozen=True)
class PartWriter:
    """Writes parts, in any process that sees the folder as its owner does."""

    folder: Path
    key: str
    owner: str
    """Token of the process that holds the folder."""

    def write(self, manifest: str, first: int, last: int, table: pa.Table) -> Part:
        """The part as a file; with its rows in it where the folder is not to be seen from here."""
        if not still_owned(self.folder, self.owner):
            return Part(manifest, first, last, table)
        return self.keep(Part(manifest, first, last, table))

    def keep(self, part: Part) -> Part:
        """The part as a file of the folder."""
        path = self.folder / _name(part.manifest, self.key, part.first, part.last)
        write_part(path, part)
        return Part(part.manifest, part.first, part.last, path)


@dataclass(frozen=True)
class PartFolder:
    """The parts of one evaluation, held by this process alone."""

    writer: PartWriter

    def found(self, tests: Sequence[Drawn]) -> list[Part]:
        """Whole parts of earlier calls, no two of them of one episode. What a killed process left half is passed over.

        Raises:
            DataError: a part of another manifest, or of another head or other rules. Nothing is changed.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        known = {_short(test.manifest): test for test in tests}
        parts: list[Part] = []
        for path in sorted(self.writer.folder.glob("*.parquet")):
            match = _NAME.fullmatch(path.name)
            if match is None or match[1] not in known or match[2] != self.writer.key:
                wanted = ", ".join(f"{name}-{self.writer.key}-..." for name in known)
                raise DataError(
                    f"{path} is a part of another evaluation (manifest, then head and rules: {path.name[:33]}; this "
                    f"one's are {wanted}). Move it away, or give another --out. Nothing was computed or changed."
                )
            test, first, last = known[match[1]], int(match[3]), int(match[4])
            try:
                with pq.ParquetFile(path) as file:
                    said, rows = (file.schema_arrow.metadata or {}).get(b"name"), file.metadata.num_rows
                    cases = len(json.loads((file.schema_arrow.metadata or {}).get(b"cases", b"[]")))
                whole_file = said == path.name.encode() and rows == cases * (last - first)
                whole_file &= first % BLOCK == 0 and (last % BLOCK == 0 or last == len(test.episodes))
            except (OSError, ValueError, pa.ArrowException):
                whole_file = False
            if not whole_file:
                log.warning("%s is damaged: its episodes are answered again.", path)
            elif not any(p.manifest == test.manifest and p.first < last and first < p.last for p in parts[-1:]):
                parts.append(Part(test.manifest, first, last, path))
        return parts

    def remove(self) -> None:
        """The parts are in the file of rows now."""
        shutil.rmtree(self.writer.folder, ignore_errors=True)


@contextmanager
def part_folder(out: Path, facts: Mapping[str, Any], *, replace: bool = False) -> Iterator[PartFolder]:
    """Hold the folder of an evaluation's parts inside the block; made if it is not there.

    Args:
        out: the file of rows that is wanted.
        facts: everything that decides the rows; see `pipeline.evaluate.keeping.decided_by`.
        replace: remove parts of another evaluation instead of refusing them.

    Raises:
        DataError: it holds parts of another evaluation (says what differs), another process works on it, or it cannot
            be written. Nothing was changed.
    """
    folder = out.absolute().parent / (out.name + SUFFIX)
    identity = {name: _short_value(value) for name, value in facts.items() if name not in _NOT_IDENTITY}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token = stack.enter_context(sole_writer(folder))
            known = folder / IDENTITY
            there = read_json(known) if known.exists() else None
            if there is not None and not replace:
                _require_same(folder, there, identity)
            if there != identity:
                for part in folder.glob("*.parquet") if replace else ():
                    part.unlink()
                replace_json(known, identity)
        except StoreError as error:
            raise DataError(str(error)) from error
        except OSError as error:
            raise DataError(f"Cannot write {folder}: {error.strerror or error}. Nothing was computed.") from error
        try:
            yield PartFolder(PartWriter(folder, key, token))
        finally:
            if not any(folder.glob("*.parquet")):  # done, or nothing was
                shutil.rmtree(folder, ignore_errors=True)


def require_own_rows(out: Path, facts: Mapping[str, Any], overwrite: bool = False) -> None:
    """Refuse a place where the rows of another test are. Rows of the same test may be made anew.

    Args:
        facts: of the evaluation that is about to begin.
        overwrite: take any file's place.

    Raises:
        DataError: what is there is no file of rows, or of another test: says what differs. Nothing was changed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if overwrite or not out.exists():
        return
    advice = "Give another --out, or --overwrite to replace it. Nothing was computed or changed."
    try:
        there = json.loads((pq.read_schema(out).metadata or {})[METADATA])
        if not isinstance(there, dict):
            raise ValueError("its facts are no object")
    except (OSError, ValueError, KeyError, RecursionError, pa.ArrowException) as error:
        raise DataError(f"{out} is there and holds no rows of an evaluation ({error!r:.100}). {advice}") from None
    here = json.loads(json.dumps(facts))
    differing = [n for n in sorted({*there, *here} - set(_NOT_IDENTITY)) if there.get(n) != here.get(n)]
    if differing:
        raise DataError(f"{out} holds the rows of another test:\n{_difference_lines(differing, there, here)}\n{advice}")
    log.info("%s holds rows of the same test; they are made anew.", out)


def _short_value(value: object) -> object:
    """As JSON holds it; the digest of what is too long to be read by people."""
    text = json.dumps(value, sort_keys=True)
    return json.loads(text) if len(text) <= _LONG else "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _require_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differing = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if not differing:
        return
    raise DataError(
        f"{folder} holds parts of another evaluation, which was interrupted:\n"
        f"{_difference_lines(differing, there, here)}\n"
        "Finish that one with its own command, or remove the folder, or give another --out. Nothing was computed or "
        "changed."
    )


def _difference_lines(names: Sequence[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return "\n".join(
        f"  {name}\n    there      {_text(there.get(name))}\n    this call  {_text(here.get(name))}" for name in names
    )


def _text(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _short(manifest: str) -> str:
    return manifest.removeprefix("sha256:")[:16]


def _name(manifest: str, key: str, first: int, last: int) -> str:
    return f"{_short(manifest)}-{key}-{first:09d}-{last:09d}.parquet"


def write_part(path: Path, part: Part) -> None:
    """Write a part whole or not at all, a row group per number of shots and fusion. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = part.table()
    keys = zip(table["shots"].to_pylist(), table["fusion"].to_pylist(), strict=True)
    cases = list(dict.fromkeys(keys))
    schema = table.schema.with_metadata({"cases": json.dumps(cases), "name": path.name})
    try:
        with whole(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for shots, fusion in cases:
                writer.write_table(part.group(shots, fusion).cast(schema))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"Cannot write {path}: {error}. What was written before is kept.") from error


def in_order(parts: Sequence[Part], tests: Sequence[Drawn], fusions: Sequence[str]) -> Iterator[pa.Table]:
    """Rows of all parts by number of shots, fusion, seed and episode, a part's at a time."""
    by_test: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.first):
        by_test.setdefault(part.manifest, []).append(part)
    for shots in sorted({k for test in tests for k in test.shots}):
        for fusion in fusions:
            for test in sorted((test for test in tests if shots in test.shots), key=lambda test: test.seed):
                for part in by_test[test.manifest]:
                    yield part.group(shots, fusion)


def write_rows(out: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    """Write tables one after the other into one file, whole or not at all; a bounded number of rows is in memory.

    Raises:
        DataError: the place cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with whole(out) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            waiting: list[pa.Table] = []
            for table in tables:
                waiting.append(table.cast(schema))
                if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                    writer.write_table(pa.concat_tables(waiting).unify_dictionaries())
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting).unify_dictionaries())
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"Cannot write {out}: {error}. Its parts are kept: give the same command again.") from error
