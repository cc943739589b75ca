"""Manifests as Parquet files that tell when they were changed.

The header (the table's metadata) and every row carry a checksum of their own, so that a change is named, not only
noticed. They guard against accidents and edits by hand, not against someone who wants to deceive.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsnet.errors import DataError
from pipeline.common.files import read_table, write_table
from pipeline.episodes.manifest import (
    MANIFEST_FORMAT,
    WAYS_FORMAT,
    ListedEpisode,
    Manifest,
    canonical,
    row_content,
    row_text,
)

if TYPE_CHECKING:
    import pyarrow as pa

_KEY = b"hsnet_manifest"


def write(path: Path, manifest: Manifest) -> None:
    """Write a manifest as Parquet, whole or not at all; the same manifest gives the same content anywhere.

    Raises:
        DataError: the place cannot be written.
    """
    import pyarrow as pa

    columns = {
        "episode": pa.array(range(len(manifest)), pa.int32()),
        "class_id": pa.array([row.class_id for row in manifest.rows], pa.int32()),
        "class_name": pa.array([manifest.classes[row.class_id] for row in manifest.rows], pa.string()),
        "query": pa.array([row.query for row in manifest.rows], pa.string()),
        "supports": pa.array([list(row.supports) for row in manifest.rows], pa.list_(pa.string())),
        "check": pa.array([_row_check(number, row) for number, row in enumerate(manifest.rows)], pa.string()),
    }
    if manifest.format == WAYS_FORMAT:
        others = [[{"class_id": c, "supports": images} for c, images in row.others] for row in manifest.rows]
        columns["others"] = pa.array(others, _others())
        columns["absent"] = pa.array([row.absent for row in manifest.rows], pa.bool_())
    header = _header(manifest)
    metadata = {_KEY: json.dumps({**header, "check": _check(canonical(header))}, sort_keys=True)}
    write_table(path, pa.table(columns).replace_schema_metadata(metadata))


def read(path: Path) -> Manifest:
    """Read a manifest and check that it is what was written.

    Raises:
        DataError: not there, not Parquet, cut off, not a manifest, of a later format, or changed: then the changed
            episodes are named.
    """
    columns, header = _read_parquet(path)
    claimed = header.pop("check", None)
    if claimed != _check(canonical(header)):
        raise DataError(f"{path}: its header was changed after it was written. Make or fetch the manifest again.")
    names = ("query", "supports", "class_id", "others", "absent")
    rows = [
        ListedEpisode(
            query, tuple(supports), class_id, tuple((o["class_id"], tuple(o["supports"])) for o in more), none
        )
        for query, supports, class_id, more, none in zip(*(columns[name] for name in names), strict=True)
    ]
    changed = [
        number
        for number, (row, check, said) in enumerate(zip(rows, columns["check"], columns["episode"], strict=True))
        if said != number or check != _row_check(number, row)
    ]
    if changed:
        first, called = changed[0], {int(key): name for key, name in header["classes"].items()}
        raise DataError(
            f"{path}: {len(changed)} of {len(rows)} episodes are not as they were written. First in row {first}, "
            f"episode {columns['episode'][first]}: {row_text(rows[first], called)}. Make or fetch the manifest again."
        )
    manifest = Manifest(
        data=header["data"],
        dataset=header["dataset"],
        fold=header["fold"],
        role=header["role"],
        classes={int(class_id): name for class_id, name in header["classes"].items()},
        rows=tuple(rows),
        made=header["made"],
    )
    if manifest.digest != header["digest"]:
        raise DataError(
            f"{path} says digest {header['digest']} and {header['episodes']} episodes, but it holds "
            f"{len(manifest)} with digest {manifest.digest}. Make or fetch the manifest again."
        )
    return manifest


def _read_parquet(path: Path) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The columns as lists without a null, and the header, both of the right types."""
    import pyarrow as pa

    table = read_table(path)
    try:
        header = json.loads((table.schema.metadata or {})[_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no manifest of episodes: `hsnet episodes make` writes them.") from error
    if not isinstance(header, dict) or header.get("format") not in (MANIFEST_FORMAT, WAYS_FORMAT):
        found = header.get("format") if isinstance(header, dict) else header
        raise DataError(
            f"{path} is a manifest of format {found!r:.40}; this version reads format {MANIFEST_FORMAT} "
            f"or {WAYS_FORMAT}."
        )
    kinds = {"data": str, "dataset": str, "fold": int, "role": str, "classes": dict, "made": dict, "digest": str}
    wrong = [name for name, kind in {**kinds, "episodes": int}.items() if type(header.get(name)) is not kind]
    if wrong or not all(key.isdecimal() and isinstance(name, str) for key, name in header["classes"].items()):
        raise DataError(f"{path}: its header lacks {', '.join(wrong) or 'proper classes'}.")
    wanted = dict.fromkeys(("episode", "class_id"), pa.int32())
    wanted |= dict.fromkeys(("class_name", "query", "check"), pa.string()) | {"supports": pa.list_(pa.string())}
    if header["format"] == WAYS_FORMAT:
        wanted |= {"others": _others(), "absent": pa.bool_()}
    columns = {}
    for name, kind in wanted.items():
        try:
            columns[name] = table[name].cast(kind).to_pylist()
        except (KeyError, pa.ArrowException) as error:
            message = f"{path} has no column '{name}' of type {kind}: it is no manifest of episodes."
            raise DataError(message) from error
    count = len(table)
    columns = {"others": [()] * count, "absent": [False] * count, **columns}
    others = [other for row in columns["others"] if row is not None for other in row]
    lists = [*columns["supports"], *([None] if other is None else other["supports"] for other in others)]
    fields = [*columns.values(), *filter(None, lists), [other["class_id"] for other in others if other is not None]]
    if None in lists or any(None in values for values in fields):
        raise DataError(f"{path} has empty fields. Make or fetch the manifest again.")
    return columns, header


def _header(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": manifest.format,
        **({"ways": manifest.ways} if manifest.format == WAYS_FORMAT else {}),
        "data": manifest.data,
        "dataset": manifest.dataset,
        "fold": manifest.fold,
        "role": manifest.role,
        "shots": manifest.shots,
        "episodes": len(manifest),
        "classes": {str(class_id): name for class_id, name in manifest.classes.items()},
        "made": dict(manifest.made),
        "digest": manifest.digest,
    }


def _others() -> pa.DataType:
    """Type of the column of the further classes of N-way episodes."""
    import pyarrow as pa

    return pa.list_(pa.struct([("class_id", pa.int32()), ("supports", pa.list_(pa.string()))]))


def _row_check(number: int, row: ListedEpisode) -> str:
    return _check(row_content(number, row))


def _check(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
