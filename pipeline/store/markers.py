"""What is known of one complete shard, and the marker file that says so.

A shard is a fixed run of images: the unit of work, of atomic writing and of resuming. Its marker
`_done/<number>.json` is written last, after every array file has reached the disk. Only the marker says that a shard
is there: zarr reads a missing shard as fill values, without an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hsnet.errors import StoreError
from pipeline.common.files import PARTIAL, replace_text, sync

MARKERS = "_done"
_LARGEST_MARKER = 16 << 20
LARGEST_PHOTO = 1 << 28
"""Pixels. Three times what Pillow opens; masks are made at this size on request."""
_PIECE = 8 << 20
_MARKER = re.compile(r"(\d{6,9})\.json")
_FIRST_FIELDS = {"shard", "store", "images", "sizes", "classes", "skipped", "files"}


@dataclass(frozen=True)
class StoredFile:
    """One array's file of a shard, and what the marker says of it."""

    array: str
    number: int
    """Number of the shard."""
    size: int
    """Bytes."""
    checksum: str
    """CRC-32, 8 hex digits."""


@dataclass(frozen=True)
class ShardFacts:
    """Facts of one complete shard, in the order of its images."""

    number: int
    store: str
    """Identity of the store (recipe and data set), so that a marker copied from elsewhere does not count."""
    images: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    """Original (height, width) of each photo, pixels; (0, 0) for a skipped one."""
    classes: tuple[tuple[int, ...], ...]
    """Class ids in the full-size mask of each photo, ascending."""
    skipped: Mapping[str, str]
    """Image id -> why it could not be read."""
    files: Mapping[str, tuple[int, str]]
    """Array name -> (bytes, CRC-32 as 8 hex digits) of its shard file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the shard's array files."""
        return sum(size for size, _ in self.files.values())

    def stored(self, arrays: Collection[str] | None = None) -> list[StoredFile]:
        """Its files, or those of some arrays."""
        return [StoredFile(name, self.number, *self.files[name]) for name in (self.files if arrays is None else arrays)]


def shard_file(root: Path, array: str, number: int) -> Path:
    """Where zarr keeps a shard: only the first axis of any array is divided. Labels have 3 axes, levels 5."""
    inner = ("0",) * (2 if array == "label" else 4)
    return root.joinpath(array, "c", str(number), *inner)


def marker_file(root: Path, number: int) -> Path:
    """Path of a shard's marker."""
    return root / MARKERS / f"{number:06d}.json"


def summary_file(root: Path) -> Path:
    """Path of the summary of all markers (`pipeline.store.summary`). Among them: who deletes all deletes it, too."""
    return root / MARKERS / "summary"


def break_seal(root: Path) -> None:
    """Remove the summary, from the disk too: before anything is written or deleted. Raises OSError."""
    try:
        summary_file(root).unlink()
    except (FileNotFoundError, NotADirectoryError):
        return
    sync(root / MARKERS)


def write_marker(root: Path, facts: ShardFacts) -> None:
    """Commit a shard: write its marker so that it is there whole or not at all, even through a power cut."""
    path = marker_file(root, facts.number)
    path.parent.mkdir(exist_ok=True)  # somebody may have deleted it, to have everything made anew
    text = _text(
        {
            "shard": facts.number,
            "store": facts.store,
            "images": facts.images,
            "sizes": facts.sizes,
            "classes": facts.classes,
            "skipped": dict(facts.skipped),
            "files": {name: {"bytes": size, "crc32": crc} for name, (size, crc) in facts.files.items()},
        }
    )
    replace_text(path, text)


def _text(values: Mapping[str, object]) -> str:
    """A marker's text, with its own checksum at the end whatever `values` says of it."""
    text = json.dumps(values)
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def _summed(text: str) -> bool:
    """Whether a marker's text ends with its checksum."""
    body, found, end = text.rpartition(', "crc32": "')
    return bool(found) and end == f'{zlib.crc32(body.encode() + b"}"):08x}"}}\n'


def marked_shards(root: Path) -> set[int]:
    """Numbers of the shards that have a marker, by the names of the files alone. Raises StoreError."""
    try:
        with os.scandir(root / MARKERS) as entries:
            names = [_MARKER.fullmatch(entry.name) for entry in entries]
    except FileNotFoundError:  # somebody may have deleted all of them, to have everything made anew
        return set()
    except OSError as error:
        raise StoreError(f"{root}: its markers cannot be listed: {error}.") from error
    return {int(name[1]) for name in names if name}


def read_marker(
    root: Path, number: int, store: str, images: tuple[str, ...], files: tuple[str, ...], look: bool = True
) -> ShardFacts | None:
    """Facts of a shard, or None when it is not complete.

    Not complete means: no marker, a marker that cannot be understood or belongs to another store or other images, or
    an array file that is absent or of another length. Contents are not read here; every chunk carries a checksum that
    is verified when the chunk is read. Without `look` the array files are taken to be there: in an object store.
    """
    path = marker_file(root, number)
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_MARKER:
            return None
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        # Markers of the first version of this program have no checksum, and exactly the other fields.
        if not _summed(text) and set(values) != _FIRST_FIELDS:
            return None
        facts = ShardFacts(
            number=int(values["shard"]),
            store=str(values["store"]),
            images=tuple(map(str, values["images"])),
            sizes=tuple((int(height), int(width)) for height, width in values["sizes"]),
            classes=tuple(tuple(map(int, present)) for present in values["classes"]),
            skipped={str(image): str(reason) for image, reason in values["skipped"].items()},
            files={str(name): (int(f["bytes"]), str(f["crc32"])) for name, f in values["files"].items()},
        )
        sizes = {
            name: shard_file(root, name, number).stat().st_size if look else facts.files[name][0] for name in files
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
    whole = (
        (facts.number, facts.store, facts.images) == (number, store, images)
        and len(facts.sizes) == len(facts.classes) == len(images)
        and all(min(size) >= 0 and size[0] * size[1] <= LARGEST_PHOTO for size in facts.sizes)
        and set(facts.skipped) <= set(images)
        and {name: size for name, (size, _) in facts.files.items()} == sizes
    )
    return facts if whole else None


def require_no_links(root: Path, files: tuple[str, ...]) -> dict[str, set[str]]:
    """Refuse to write or delete through links: a folder of the store may lead anywhere.

    Returns:
        Array name -> names of the folders of its shards. One folder for each is read and nothing else.

    Raises:
        StoreError: names the link.
    """
    _shard_folders(root, MARKERS)
    return {name: _shard_folders(root, name) for name in files}


def _shard_folders(root: Path, array: str) -> set[str]:
    names = set()
    for path in (root / array, root / array / "c"):
        if path.is_symlink():
            raise _link(path)
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / array / "c") as entries:
        for entry in entries:
            if entry.is_symlink():
                raise _link(Path(entry.path))
            names.add(entry.name)
    return names


def _link(path: Path) -> StoreError:
    return StoreError(f"{path} is a link: nothing is written or deleted through it. Nothing was changed.")


def remove_shard(root: Path, number: int, files: tuple[str, ...]) -> None:
    """Delete what there is of a shard, its marker first: a marker must never outlive its data.

    The seal goes before, and again after: a writer that lost the store may be late, and its successor have sealed it in
    between. Whoever seals looks for all markers afterwards.
    """
    marker = marker_file(root, number)
    break_seal(root)
    for path in (marker, *marker.parent.glob(f".{marker.name}*{PARTIAL}")):
        path.unlink(missing_ok=True)
    break_seal(root)
    for name in files:
        path = shard_file(root, name, number)
        path.unlink(missing_ok=True)
        for partial in path.parent.glob("*.partial"):
            partial.unlink(missing_ok=True)


def sweep_partials(root: Path, files: tuple[str, ...], missing: Collection[int] = ()) -> int:
    """Delete temporary files and folders that killed writers left behind; returns how many.

    Those of shard files are looked for where shards are missing: the marker of a shard goes before its files are
    touched.

    Raises:
        StoreError: a folder of the store is a link. Nothing is deleted then.
    """
    folders = require_no_links(root, files)
    leftovers = [path for folder in (root, root / MARKERS) for path in _partials(folder)]
    wanted = {str(number) for number in missing}
    for name, there in folders.items():
        leftovers += [*_partials(root / name), *_partials(root / name / "c")]
        for number in wanted & there:
            leftovers += (root / name / "c" / number).rglob(f"*{PARTIAL}")
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)


def _partials(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.name.endswith(PARTIAL)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def sum_file(path: Path) -> tuple[int, str]:
    """(bytes, CRC-32 as 8 hex digits) of a file's contents."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            checksum = zlib.crc32(piece, checksum)
        size = file.tell()
    return size, f"{checksum:08x}"
